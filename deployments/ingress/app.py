"""Assembles the FastAPI application of the router."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware

from acestep import __version__
from deployments.ingress import errors as problems
from deployments.ingress.acestep import loras as compat_loras
from deployments.ingress.acestep import models, tasks, texts
from deployments.ingress.links import Prefix
from deployments.ingress.middleware import BodyLimit, LostProxy, OptionalPrefix, Strangers, host_of
from deployments.ingress.native import (
    answers,
    cluster,
    edits,
    files,
    health,
    library,
    loras,
    lyrics,
    song_files,
    webhooks,
)
from deployments.ingress.native import songs as native
from deployments.ingress.native import texts as plans
from deployments.ingress.openai import chat
from deployments.ingress.service import Service
from deployments.ingress.studio import routes as studio

# Headers of answers that pages may read, besides those that they always may.
EXPOSED = (
    "Accept-Ranges", "Content-Disposition", "Content-Length", "Content-Range", "ETag", "Idempotent-Replayed", "Location",
    "Preference-Applied", "Retry-After", "X-Request-Id",
)  # fmt: skip
FORM_PATHS, JSON_PATHS = ("/v1/files", "/release_task"), ("/v1/chat/completions",)  # where source audio may come


def build_app(service: Service) -> FastAPI:
    """The router's HTTP application over its parts."""
    app = FastAPI(
        title="ACE-Step 1.5",
        version=__version__,
        description="Songs as durable jobs, on a fleet of unequal cards.",
        redirect_slashes=False,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(
        GZipMiddleware,
        minimum_size=1000,
        compresslevel=5,
        # Files are sent by ranges of what is stored.
        exclude_content_types=(*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream"),
    )
    app.add_middleware(
        BodyLimit,
        limit=service.args.max_body_bytes,
        upload_limit=service.args.max_upload_bytes,
        form_paths=FORM_PATHS,
        json_paths=JSON_PATHS,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(service.args.cors_origins),
        allow_origin_regex=service.args.cors_origin_regex,
        allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"],
        allow_headers=["*"],  # whatever is asked: SDKs and frameworks send headers of their own
        expose_headers=EXPOSED,
    )
    app.add_middleware(
        Strangers,
        bound=lambda: service.fleet.view.http_host,
        hosts=(*service.args.allowed_hosts, host_of(service.args.public_url or "")),
        origins=service.args.cors_origins,
        origin_regex=service.args.cors_origin_regex,
        keys=service.keys.required and not service.args.open_models_and_chat,
    )
    app.add_middleware(OptionalPrefix)
    app.add_middleware(Prefix, public_url=service.args.public_url)
    app.add_middleware(LostProxy)
    for module in (
        studio,
        health,
        cluster,
        loras,
        native,
        library,
        song_files,
        lyrics,
        edits,
        plans,
        files,
        webhooks,
        tasks,
        texts,
        models,
        compat_loras,
        chat,
    ):
        app.include_router(module.router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with what FastAPI cannot know."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for operation in (o for path in document["paths"].values() for o in path.values()):
            if "HTTPValidationError" in str(operation["responses"].get("422")):  # FastAPI's own, which nobody gets
                operation["responses"]["422"] = problems.DETAIL
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        chat.add_schemas(document)
        answers.add_schemas(document)
        schemes = document["components"].setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer", "description": "Only where the server has keys."}
        document["security"] = [{"key": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema
