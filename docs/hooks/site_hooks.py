"""Hooks of the documentation site's build (mkdocs.yml). Each page's rules stand in the module of its own."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_links import OWN_PAGES, for_the_site, source_page, sources_in
from site_reference import pages
from site_results import titles, with_cards
from site_shared import expanded

NO_GUIDES = ("index.md", "glossary.md", "checked.md", "contributing.md", "api.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Guides and results are in the navigation because they are there; mkdocs.yml says which guides come first."""
    docs = Path(config.docs_dir)
    for entry in config.nav or []:
        if "Guides" in entry:
            named = [next(iter(guide.values())) for guide in entry["Guides"]]
            others = sorted(path.name for path in docs.glob("*.md") if path.name not in (*NO_GUIDES, *named))
            entry["Guides"] = [*entry["Guides"], *others]
        if "Results" in entry:
            entry["Results"] = ["results/README.md", *({title: f"results/{name}/README.md"}
                                                       for name, title in titles().items())]  # fmt: skip
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what the code writes, and a page for every source file that some page links to."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked |= sources_in(f"docs/{file.src_uri}", file.content_string)
        for whole in OWN_PAGES:
            if f"<!-- section {whole}" in file.content_string:
                linked |= sources_in(whole, Path(config.config_file_path).with_name(whole).read_text())
    for path in sorted(linked):
        page = "source/" + (path if path.endswith(".md") else f"{path}.md")
        files.append(File.generated(config, page, content=source_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **others: Any) -> str:
    at = page.file.src_uri
    if at.startswith("source/"):
        return markdown
    try:
        text = for_the_site(f"docs/{at}", markdown, at=at)
        text = with_cards(text) if at == "results/README.md" else text
        return expanded(f"docs/{at}", text)
    except (LookupError, OSError) as error:
        raise PluginError(str(error)) from None
