"""The page: static files of the web platform, and what `/` answers to whom.

A browser that opens `/` gets the page; everything else gets the service's name, version and links as JSON. The files speak the public HTTP
API and nothing else, so what the page can do, a script can do.
"""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from acestep import __version__
from deployments.ingress.errors import NotFound
from deployments.ingress.links import public

router = APIRouter(tags=["page"])
FOLDER = "studio"
INDEX = "index.html"
POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' data: blob:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # asked for each time, answered with 304: a new version is there at once
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
    "X-Content-Type-Options": "nosniff",
}
LINKS = {
    "documentation": "/docs", "schema": "/openapi.json", "songs": "/v1/music", "jobs": "/v1/jobs", "fleet": "/v1/cluster",
    "ready": "/readyz",
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


@cache
def files() -> dict[str, File]:
    """All files of the page by name, read once."""
    found = {}
    for entry in resources.files(__package__).joinpath("static").iterdir():
        body = entry.read_bytes()
        kind = mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
        kind = f"{kind}; charset=utf-8" if kind.startswith("text/") or kind.endswith(("json", "javascript")) else kind
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        found[entry.name] = File(body, kind, etag)
    return found


def _send(request: Request, name: str) -> Response:
    file = files().get(name)
    if file is None:
        raise NotFound(f"the page has no file {name[:64]!r}")
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)


@router.get("/", summary="The page for a browser; name, version and links as JSON for others", include_in_schema=False)
async def index(request: Request) -> Response:
    studio = request.app.state.service.args.studio
    if studio and "text/html" in request.headers.get("accept", ""):
        return _send(request, INDEX)
    links = {name: public(path) for name, path in LINKS.items()}
    body = {"service": "ACE-Step 1.5", "version": __version__, "links": links}
    return JSONResponse(body, headers={"Vary": "Accept"})


@router.get(f"/{FOLDER}/{{name}}", summary="A file of the page", include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    if not request.app.state.service.args.studio:
        raise NotFound("the page is switched off (studio: false)")
    return _send(request, name)
