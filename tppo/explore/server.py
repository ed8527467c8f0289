"""The routes. What computes is in other processes (planner.py); a request that its page gives up is dropped."""

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from analysis import style
from profiling.errors import ConfigError, DataError, InputError, ToolkitError
from profiling.settings import to_toml
from simulator.hardware import gpu_names
from simulator.models import bundled_names
from simulator.plan import Question
from simulator.plan.options import Option
from tppo.commands.plan import LISTS
from tppo.explore.asked import REFUSED, faults_of, question_from
from tppo.explore.guard import Guard
from tppo.explore.planner import MOST_OPTIONS, MOST_SHOWN, Busy, Planner
from tppo.explore.uploads import MOST_BYTES, Kind, Upload, Uploads, pasted
from tppo.explore.work import name_of

STATIC = {
    "": ("index.html", "text/html"), "style.css": ("style.css", "text/css"),
    **{name: (name, "text/javascript") for name in ("page.js", "form.js", "answer.js", "pictures.js")},
    "icon.svg": ("icon.svg", "image/svg+xml"),
}  # fmt: skip
"""The only files that are served: name in the address -> file and type."""

Found = TypeVar("Found")


class GivenUp(Exception):
    """The page does not wait for the answer any more."""


def make_app(folder: Path, *, port: int, token: str | None = None, limit_s: float | None = None) -> FastAPI:
    """folder: where uploads and simulated runs are kept for as long as the server runs."""
    uploads = Uploads(folder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.planner = Planner(folder) if limit_s is None else Planner(folder, limit_s=limit_s)
        try:
            yield
        finally:
            app.state.planner.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, port=port, token=token)
    _add_errors(app, uploads)
    _add_page(app)
    _add_uploads(app, uploads)
    _add_answers(app, uploads)
    return app


def _add_errors(app: FastAPI, uploads: Uploads) -> None:
    @app.exception_handler(ToolkitError)
    async def told(request: Request, error: ToolkitError) -> Response:
        status = 503 if isinstance(error, Busy) else 400 if isinstance(error, InputError) else 500
        return JSONResponse({"faults": [vars(fault) for fault in faults_of(error, uploads)]}, status)

    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> Response:
        message = f"a fault of ours: {type(error).__name__}; please report it with the address of this page"
        return JSONResponse({"faults": [{"field": None, "message": message}]}, 500)

    @app.exception_handler(GivenUp)
    async def dropped(request: Request, error: GivenUp) -> Response:
        return Response(status_code=499)


def _add_page(app: FastAPI) -> None:
    static = files("tppo.explore") / "static"

    @app.get("/")
    @app.get("/static/{name}")
    async def page(name: str = "") -> Response:
        if name not in STATIC:
            return Response("no such file", 404, media_type="text/plain")
        file, kind = STATIC[name]
        return Response((static / file).read_bytes(), media_type=kind)

    @app.get("/api/choices")
    async def choices() -> dict[str, Any]:
        """What the form offers: the fields of a question, with the help of `tppo plan --help`."""
        return {
            "models": bundled_names(),
            "gpus": gpu_names(),
            "fields": fields(),
            "causes": {cause: {"colour": colour, "label": label} for cause, (colour, label) in style.CAUSES.items()},
            "most_shown": MOST_SHOWN,
            "most_options": MOST_OPTIONS,
        }


def fields() -> list[dict[str, Any]]:
    """name, help, default, choices of a question's fields; those that name files of one's own left out."""
    properties = Question.model_json_schema()["properties"]
    found = []
    for name, field in Question.model_fields.items():
        if name in REFUSED:
            continue
        kinds = [properties[name], *properties[name].get("anyOf", ())]
        choices = next((kind["enum"] for kind in kinds if "enum" in kind), None)
        several = next((kind["items"]["enum"] for kind in kinds if "enum" in kind.get("items", {})), None)
        default = None if field.is_required() else field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        found.append({
            "name": name, "help": field.description or "", "default": shown, "choices": choices or several,
            "list": name in LISTS, "flag": any(kind.get("type") == "boolean" for kind in kinds),
        })  # fmt: skip
    return found


def _add_uploads(app: FastAPI, uploads: Uploads) -> None:
    @app.post("/api/lengths")
    async def lengths(request: Request, name: str = "lengths.csv", paste: bool = False) -> dict[str, Any]:
        content = await _body(request, "lengths", name)
        if paste:
            text = content.decode(errors="replace")
            name, content = "pasted.csv", await run_in_threadpool(pasted, text)  # others are answered meanwhile
        return _about(uploads.keep("lengths", name, content))

    @app.post("/api/model")
    async def model(request: Request, name: str = "config.json") -> dict[str, Any]:
        own = uploads.keep("model", name, await _body(request, "model", name))
        try:
            parameters = await app.state.planner.size_of_model(own.path)
        except ToolkitError as error:
            uploads.forget(own.id)
            raise DataError(str(error).replace(str(own.path), own.name)) from None
        return {**_about(own), "parameters": parameters}


def _about(own: Upload) -> dict[str, Any]:
    return {"id": own.id, "name": own.name, "columns": own.columns}


async def _body(request: Request, kind: Kind, name: str) -> bytes:
    """Raises DataError as soon as it is too long."""
    content, most = b"", MOST_BYTES[kind]
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise DataError(f"{name[:80]}: is larger than {most // 2**20} MiB; upload a sample of it")
    return content


def _add_answers(app: FastAPI, uploads: Uploads) -> None:
    def asked(request: Request) -> tuple[Question, dict[str, str]]:
        query = dict(request.query_params)
        others: dict[str, str] = {name: query.pop(name) for name in ("shown", "place") if name in query}
        return question_from(query, uploads), others

    @app.get("/api/answer")
    async def answer(request: Request) -> Response:
        question, _ = asked(request)
        found = await _unless_given_up(request, app.state.planner.answer(question))
        return _json(found, uploads)

    @app.get("/api/first")
    async def first(request: Request) -> Response:
        question, _ = asked(request)
        found, whole = await _unless_given_up(request, app.state.planner.first(question))
        return _json({"whole": whole, "answer": found}, uploads)

    async def drawn(request: Request, *, first: bool) -> Response:
        question, others = asked(request)
        shown = places(others, "shown")
        found = await _unless_given_up(request, app.state.planner.pictures(question, shown, first=first))
        return _json(found, uploads)

    @app.get("/api/pictures")
    async def pictures(request: Request) -> Response:
        return await drawn(request, first=False)

    @app.get("/api/first/pictures")
    async def first_pictures(request: Request) -> Response:
        return await drawn(request, first=True)

    @app.get("/api/experiment")
    async def experiment(request: Request) -> Response:
        question, others = asked(request)
        (place, *_) = places(others, "place")
        option = await _unless_given_up(request, app.state.planner.option(question, place))
        name, kind, content = experiment_file(option, question, uploads)
        return Response(content, media_type=kind, headers=_saved_as(name))

    @app.get("/api/report")
    async def report(request: Request) -> Response:
        question, others = asked(request)
        page = await _unless_given_up(request, app.state.planner.report(question, places(others, "shown")))
        return Response(page, media_type="text/html", headers=_saved_as("report.html"))


def places(query: Mapping[str, str], name: str) -> list[int]:
    """Rows of the answer, with commas. Raises ConfigError."""
    text = query.get(name, "")
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in text.split(",")):
        raise ConfigError(f"{name} = {text[:40]!r}: write places in the answer, from 0, with commas")
    return list(dict.fromkeys(map(int, text.split(","))))


def _json(found: Any, uploads: Uploads) -> Response:
    text = json.dumps(found, indent=1, allow_nan=False)
    return Response(uploads.with_names(text), media_type="application/json")


def _saved_as(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def experiment_file(option: Option, question: Question, uploads: Uploads) -> tuple[str, str, bytes]:
    """(name, type, content) of what `tppo simulate` runs: a TOML file, with its uploads in a zip where there are
    any."""
    assert option.experiment is not None
    first = f"# {option.label} on {option.gpus} GPUs, as tppo explore simulates it: tppo simulate experiment.toml\n"
    toml = uploads.with_names(first + to_toml(option.experiment.model_dump(mode="json", exclude_none=True)))
    used = uploads.of(question)
    if not used:
        return f"{name_of(option)}.toml", "application/toml", toml.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("experiment.toml", toml)
        for upload in used:
            archive.write(upload.path, upload.name)
    return f"{name_of(option)}.zip", "application/zip", packed.getvalue()


async def _unless_given_up(request: Request, work: Awaitable[Found]) -> Found:
    """The work's result; cancelled, and GivenUp, when the page closes the connection first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GivenUp
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
