"""Assembles the FastAPI application of the router."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from acestep import __version__
from deployments.api import cluster, files, health, native, plans, problems, webhooks
from deployments.api.compat import models, tasks, texts
from deployments.api.middleware import BodyLimit, OptionalPrefix
from deployments.api.service import Service

CHAT_PATH = "/v1/chat/completions"  # takes audio inside its JSON


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
        BodyLimit,
        limit=service.args.max_body_bytes,
        upload_limit=service.args.max_upload_bytes,
        upload_paths=(CHAT_PATH,),
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(service.args.cors_origins),
        allow_origin_regex=service.args.cors_origin_regex,
        allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
        allow_headers=["Content-Type", "Authorization", "Idempotency-Key", "Prefer", "Last-Event-ID"],
        expose_headers=["Location", "Retry-After", "Preference-Applied", "Content-Range"],
    )
    app.add_middleware(OptionalPrefix)
    for module in (health, cluster, native, plans, files, webhooks, tasks, texts, models):
        app.include_router(module.router)
    return app
