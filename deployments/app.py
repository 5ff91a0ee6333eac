"""Import paths of `serve_config.yaml`: `deployments.app:router`, `:lm` and `:dit`.

Each builder takes its application's `args` and returns a Serve application. Builders run in a light process: heavy imports wait until a
replica starts.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application, Deployment

from deployments.config.args import PlannerArgs, PoolArgs, RendererArgs, RouterArgs, parse_args
from deployments.config.deployer import check_environment
from deployments.config.options import deployment_options, settled

# Requests that wait cost a router next to nothing, and one beyond this hangs, a probe of its health, too: keys have limits, the router has none.
MAX_ONGOING = 1_000_000
LAST_S = 15.0  # to hand back what has not ended, and to let go what waits for nodes


def _deployment(cls: type) -> Deployment:
    made = serve.deployment(cls)
    assert isinstance(made, Deployment), "given a class, the decorator makes the deployment at once"
    return made


def router(args: dict[str, Any]) -> Application:
    """The HTTP ingress and dispatcher. Knows no pool by name: it finds them among the running applications."""
    from deployments.ingress.deployment import RouterDeployment

    check_environment()
    parsed = parse_args(RouterArgs, args, "router")
    deployment = _deployment(serve.ingress()(RouterDeployment)).options(
        name="router",
        num_replicas=parsed.num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_surge_percent=100,  # the next router answers before this one leaves
        ray_actor_options={"num_cpus": parsed.num_cpus},
        graceful_shutdown_timeout_s=parsed.graceful_shutdown_s + LAST_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5.0,
    )
    return deployment.bind(parsed.model_dump(mode="json"))


def lm(args: dict[str, Any]) -> Application:
    """A planner pool."""
    from deployments.stages.planner import PlannerDeployment

    return _pool("lm", PlannerDeployment, parse_args(PlannerArgs, args, "lm"), default_share=0.4)


def dit(args: dict[str, Any]) -> Application:
    """A renderer pool."""
    from deployments.stages.renderer import RendererDeployment

    return _pool("dit", RendererDeployment, parse_args(RendererArgs, args, "dit"), default_share=0.6)


def _pool(name: str, cls: type, args: PoolArgs, default_share: float) -> Application:
    check_environment()
    parsed = settled(args, default_share)
    return _deployment(cls).options(name=name, **deployment_options(parsed)).bind(parsed.model_dump(mode="json"))
