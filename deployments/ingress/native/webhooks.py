"""What became of webhooks, and the secret that receivers check them with."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from deployments.ingress.auth import Auth
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS, NotFound
from deployments.ingress.native import examples
from deployments.ingress.native.answers import Secret, WebhookList, WebhookView
from deployments.ingress.service import Svc
from deployments.jobs.outbox import Message, derived_secret, shown_secret

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=PROBLEMS, route_class=KeyFirst)


def _view(message: Message) -> WebhookView:
    view = asdict(message)
    del view["owner_key"]
    return WebhookView(**view)


@router.get("/webhooks", summary="Messages and their deliveries, newest first", responses={200: examples.WEBHOOKS})
async def list_webhooks(
    service: Svc,
    caller: Auth,
    state: Annotated[
        Literal["pending", "delivered", "dead"] | None, Query(description="`dead`: given up after all attempts.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Messages in the answer.")] = 50,
) -> WebhookList:
    owner = caller.name if service.keys.required else None
    messages = await asyncio.to_thread(service.outbox.page, owner_key=owner, state=state, limit=limit)
    return WebhookList(webhooks=[_view(m) for m in messages])


@router.post("/webhooks/{message_id}/retry", summary="Send a dead letter again", responses={200: examples.WEBHOOK})
async def retry_webhook(
    message_id: Annotated[str, Field(max_length=64, description="`id` of the message.")], service: Svc, caller: Auth
) -> WebhookView:
    owner = caller.name if service.keys.required else None
    message = await asyncio.to_thread(service.outbox.retry, message_id, owner)
    if message is None:
        raise NotFound(f"there is no webhook {message_id[:64]!r}")
    return _view(message)


@router.get(
    "/webhooks/secret", summary="Your signing secret, for a Standard Webhooks library", responses={200: examples.SECRET}
)
async def get_webhook_secret(service: Svc, caller: Auth) -> Secret:
    return Secret(secret=shown_secret(derived_secret(service.webhook_secret, caller.name)))
