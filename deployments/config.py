"""The typed arguments of the three kinds of application.

Every application of `serve_config.yaml` names one builder of `deployments.app` and gives it `args`; these models are what `args` may say.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from acestep.errors import InvalidRequest

Tier = Literal["tier1", "tier2", "tier3", "tier4", "tier5", "tier6", "unlimited"]
Engine = Literal["torch", "simulated"]
T = TypeVar("T", bound=BaseModel)


class _Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolArgs(_Args):
    """What planner and renderer pools have in common. One application is one pool."""

    model: str | None = Field(
        None, description="Checkpoint name, Hub repository or folder. Null: environment, else the default."
    )
    tiers: tuple[Tier, ...] = Field(
        (), description="Node label acestep/gpu-tier must be one of these. Empty: any machine."
    )
    need_gb: float | None = Field(
        None, gt=0, description="Memory one replica takes; its GPU share is need_gb / tier size."
    )
    num_gpus: float | None = Field(
        None, ge=0, description="GPU share; null: from need_gb and tiers, or what this machine has."
    )
    shared_card: bool = Field(
        False, description="Planner and renderer share one card; the tier table's limits for sharing hold."
    )
    num_cpus: float = Field(0.5, ge=0, description="Ray CPUs that one replica reserves (not its thread count).")
    num_replicas: int | None = Field(None, ge=0, description="Fixed size; excludes the min and max below.")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    nodes_on_demand: bool = Field(
        False, description="The cluster adds nodes of these tiers when replicas wait for them."
    )
    drain_backlog_s: float = Field(30.0, gt=0, description="Scale so that what waits is worked off within this time.")
    downscale_delay_s: float = Field(300.0, ge=0)
    graceful_shutdown_s: float = Field(900.0, ge=0, description="How long a leaving replica may finish its songs.")
    max_queue: int = Field(256, ge=1, description="Requests that may wait inside one replica.")
    engine: Engine = Field(
        "torch", description="simulated: takes the time of `profile` and computes nothing. For tests."
    )
    profile: str | None = Field(None, description="Cost profile: a name in acestep/profiles or a JSON file.")
    database_url: str | None = Field(
        None, description="The router's job store, for autoscaling. Null: SQLite in ACESTEP_HOME."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Overrides of acestep.settings, by name.")

    @model_validator(mode="after")
    def _sizes(self) -> PoolArgs:
        if self.num_replicas is None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas: {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class PlannerArgs(PoolArgs):
    """`deployments.app:lm`."""


class RendererArgs(PoolArgs):
    """`deployments.app:dit`."""

    files_url: str | None = Field(
        None, description="Where encoded files go: a folder or fsspec URL. Null: ACESTEP_HOME/files."
    )


class RouterArgs(_Args):
    """`deployments.app:router`."""

    num_replicas: int = Field(1, ge=1, description="More than one needs database_url on PostgreSQL or one shared host.")
    num_cpus: float = Field(0.1, ge=0)
    database_url: str | None = Field(None, description="SQLAlchemy URL of the job store. Null: SQLite in ACESTEP_HOME.")
    files_url: str | None = Field(None, description="The renderers' file store. Null: ACESTEP_HOME/files.")
    lease_s: float = Field(15.0, gt=0, description="A router that is silent for this long loses its jobs to another.")
    max_body_bytes: int = Field(16 << 20, ge=1024)


def parse_args(model: type[T], args: dict[str, Any] | None, application: str) -> T:
    """`args` of an application as its model.

    Raises:
        InvalidRequest: naming application, key and what is allowed.
    """
    try:
        return model.model_validate(args or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(p) for p in first["loc"])
        hint = f" (known: {', '.join(model.model_fields)})" if first["type"] == "extra_forbidden" else ""
        raise InvalidRequest(
            f"application {application!r}, args.{key}: {first['msg']}{hint}", field=f"args.{key}"
        ) from None
