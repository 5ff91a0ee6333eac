"""The router as Serve knows it. Builders import this class, and with it as good as nothing; the router itself comes with its replica."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from deployments.ingress.router import Router


class RouterDeployment:
    """`deployments.ingress.router.Router` in a replica."""

    _router: Router | None = None

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        from deployments.ingress.router import Router

        self._router = Router()
        await self._router.start(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        assert self._router is not None, "Serve asks for it when the router has started"
        return self._router.build_app()

    def check_health(self) -> None:
        if self._router is not None:
            self._router.check_health()

    async def __del__(self) -> None:
        if self._router is not None:
            await self._router.close()
