"""What a page must have for everyone: enough contrast, names of what is drawn and of what can be used."""

LEAST_CONTRAST, LEAST_CONTRAST_LARGE = 4.5, 3.0
"""WCAG 2.2, success criterion 1.4.3 (AA); large: from 24 px, or from 18.66 px in bold."""

_TEXTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), rgba("Canvas"));
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.textContent.trim() || element.closest("script, style, svg") || !element.checkVisibility()) continue;
    const back = behind(element);
    found.push({ text: node.textContent.trim().slice(0, 40), ink: over(rgba(style.color), back), back,
                 px: parseFloat(style.fontSize), bold: parseInt(style.fontWeight) >= 700 });
  }
  return found;
}"""

_UNNAMED = """() => {
  const name = (e) => e.getAttribute("aria-label") || e.getAttribute("alt") || e.textContent.trim()
    || (e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby"))?.textContent)
    || (e.labels && [...e.labels].map((label) => label.textContent).join(""));
  const wanted = "img, [role=img], button, a[href], input, select, textarea, nav, summary, table, [role=region]";
  const shown = [...document.querySelectorAll(wanted)].filter((e) => e.checkVisibility() && e.type !== "hidden");
  const faults = shown.filter((e) => !name(e)).map((e) => e.outerHTML.slice(0, 80));
  for (const svg of document.querySelectorAll("svg"))
    if (!svg.closest("[role=img], [aria-hidden=true]")) faults.push(svg.outerHTML.slice(0, 80));
  if (!document.documentElement.lang) faults.push("html without lang");
  return faults;
}"""


def contrast_faults(page):
    """Texts that are too faint against their background, each with its ratio."""
    faults = []
    for found in page.evaluate(_TEXTS):
        ratio = contrast(found["ink"], found["back"])
        large = found["px"] >= 24 or (found["bold"] and found["px"] >= 18.66)
        if ratio < (LEAST_CONTRAST_LARGE if large else LEAST_CONTRAST):
            faults.append(f"{found['text']!r}: {ratio:.2f}")
    return faults


def unnamed(page):
    """Images, controls and regions that a screen reader has no name for."""
    return page.evaluate(_UNNAMED)


def contrast(one, other):
    """(L1 + 0.05) / (L2 + 0.05) of WCAG's relative luminances; colours as red, green, blue in 0 to 255."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in colour[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
