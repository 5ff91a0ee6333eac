"""Assembles the FastAPI application of the router."""

from __future__ import annotations

import asyncio
from functools import cache

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.routing import BaseRoute, Route

from acestep import __version__
from deployments.ingress import errors as problems
from deployments.ingress.acestep import loras as compat_loras
from deployments.ingress.acestep import models, tasks, texts
from deployments.ingress.links import Prefix
from deployments.ingress.mcp import route as agents
from deployments.ingress.middleware import BodyLimit, LostProxy, OptionalPrefix, Strangers, host_of
from deployments.ingress.native import (
    cluster,
    edits,
    files,
    health,
    library,
    live_audio,
    loras,
    lyrics,
    song_files,
    webhooks,
)
from deployments.ingress.native import songs as native
from deployments.ingress.native import texts as plans
from deployments.ingress.openai import audio, chat
from deployments.ingress.openapi import describe
from deployments.ingress.relay import Relay
from deployments.ingress.service import Service
from deployments.ingress.studio import routes as studio

# Headers of answers that pages may read, besides those that they always may.
EXPOSED = (
    "Accept-Ranges", "Audio-Level", "Content-Disposition", "Content-Length", "Content-Range", "ETag", "Idempotent-Replayed", "Location",
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
    app.add_middleware(Relay)
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
    app.router.routes.extend(_routes())
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    _describe_beside(app)
    return app


def _describe_beside(app: FastAPI) -> None:
    """The document of all routes takes seconds to make, once: beside the loop, so that others are answered meanwhile."""
    (route,) = (route for route in app.routes if isinstance(route, Route) and route.path == app.openapi_url)

    async def document(request: Request) -> Response:
        await asyncio.to_thread(app.openapi)
        return await route.endpoint(request)

    app.router.routes.insert(0, Route(route.path, document, include_in_schema=False))


@cache
def _routes() -> tuple[BaseRoute, ...]:
    """The rooms' routes. Once for all applications of a process: at the first request FastAPI reads the signatures of what it includes."""
    api = APIRouter(generate_unique_id_function=lambda route: route.name)  # short, as generated clients call them
    for room in (
        studio, health, cluster, loras, native, library, song_files, live_audio, lyrics, edits, plans, files, webhooks, tasks,
        texts, models, compat_loras, chat, audio, agents,
    ):  # fmt: skip
        api.include_router(room.router)
    return tuple(api.routes)
