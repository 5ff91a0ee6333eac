"""The typed arguments of the three kinds of application.

Every application of `serve_config.yaml` names one builder of `deployments.app` and gives it `args`; these models are what `args` may say.
"""

from __future__ import annotations

import os
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from acestep.errors import InvalidRequest
from acestep.paths import home, writable
from acestep.settings.options import read_overrides
from acestep.validation import UNKNOWN_FIELD, first_problem

Tier = Literal["tier1", "tier2", "tier3", "tier4", "tier5", "tier6", "unlimited"]
Engine = Literal["torch", "simulated"]
Role = Literal["plan", "render"]
T = TypeVar("T", bound=BaseModel)
KEYS_ENV = "ACESTEP_API_KEY"
ROLE_OF_DEPLOYMENT: dict[str, Role] = {"lm": "plan", "dit": "render"}


def role_of(import_path: Any) -> Role | None:
    """What an application with this import path is; None for the router, and for what is none of ours."""
    return ROLE_OF_DEPLOYMENT.get(str(import_path).rpartition(":")[2])


class _Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolArgs(_Args):
    """What planner and renderer pools have in common. One application is one pool."""

    pool: str | None = Field(None, description="The application's own name; needed where it is to scale by itself.")
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
    shared_card: bool | None = Field(
        None,
        description="Planner and renderer share one card, so the tier table's limits for sharing hold. Null: they do where neither tiers "
        "nor num_gpus are given and the cluster has a GPU.",
    )
    num_cpus: float = Field(0.5, ge=0, description="Ray CPUs that one replica reserves (not its thread count).")
    num_replicas: int | None = Field(None, ge=0, description="Fixed size: min and max are this.")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=0)
    nodes_on_demand: bool = Field(
        False, description="The cluster adds nodes of these tiers when replicas wait for them."
    )
    drain_backlog_s: float = Field(30.0, gt=0, description="Scale so that what waits is worked off within this time.")
    downscale_delay_s: float = Field(60.0, ge=0, description="To zero: twice as long.")
    graceful_shutdown_s: float = Field(900.0, ge=0, description="How long a leaving replica may finish its songs.")
    max_queue: int = Field(256, ge=1, description="Requests that may wait inside one replica.")
    engine: Engine = Field(
        "torch", description="simulated: takes the time of `profile` and computes nothing. For tests."
    )
    profile: str | None = Field(None, description="Cost profile: a name in acestep/profiles or a JSON file.")
    database_url: str | None = Field(
        None, description="The router's job store, for autoscaling. Null: SQLite in ACESTEP_HOME."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of acestep.settings.resolve, by name."
    )

    @property
    def scales(self) -> bool:
        """Whether its size goes with its work."""
        return self.min_replicas != self.max_replicas

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, data: Any) -> Any:
        if isinstance(data, dict) and (size := data.get("num_replicas")) is not None:
            return {**data, "min_replicas": size, "max_replicas": size}
        return data

    @model_validator(mode="after")
    def _sizes(self) -> PoolArgs:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas: {self.min_replicas} is above max_replicas {self.max_replicas}")
        if self.scales and self.pool is None:
            raise ValueError("pool: must be the application's name where min_replicas and max_replicas differ")
        return self

    @field_validator("settings")
    @classmethod
    def _known_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            read_overrides(value, env={})
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        return value


class PlannerArgs(PoolArgs):
    """`deployments.app:lm`."""

    lora_roots: tuple[str, ...] | None = Field(
        None, description="Folders whose planner adapters a request's `lm_lora` may name. Null: ACESTEP_HOME/loras."
    )


class RendererArgs(PoolArgs):
    """`deployments.app:dit`."""

    files_url: str | None = Field(
        None, description="Where encoded files go: a folder or fsspec URL. Null: ACESTEP_HOME/files."
    )
    lora_roots: tuple[str, ...] | None = Field(
        None, description="Folders whose LoRA adapters a request may name. Null: ACESTEP_HOME/loras."
    )
    keep_latents: bool = Field(
        True,
        description="Store what each song was decoded from beside its audio: lyrics can be timed later. 12 MB per hour of audio.",
    )
    live_patience_s: float = Field(
        1.0,
        ge=0,
        description="Who listens to a song while it is made hears it at its final level where it is decoded within this time after its first "
        "piece; else from then on at a provisional one.",
    )


ARGS_OF_ROLE: dict[Role, type[PoolArgs]] = {"plan": PlannerArgs, "render": RendererArgs}


class KeyArgs(_Args):
    """One API key. Only its hash stands here, since Serve shows the arguments in its dashboard."""

    name: str = Field(min_length=1, max_length=64, description="Owner of the jobs that are sent with it.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key: `printf %s KEY | sha256sum`.")
    requests_per_minute: int | None = Field(None, ge=1, description="Null: the router's.")
    concurrent_jobs: int | None = Field(None, ge=1, description="Null: the router's.")
    audio_seconds_per_day: float | None = Field(None, gt=0, description="Null: the router's.")
    work_seconds: float | None = Field(None, gt=0, description="Null: the router's.")


def environment_keys(value: str | None = None) -> tuple[str, ...]:
    """The keys in `ACESTEP_API_KEY`, separated by commas. A variable that is empty is as one that is not set.

    Raises:
        InvalidRequest: there is something in it, but no key: whoever wrote it wanted one, and the server would be open.
    """
    text = os.environ.get(KEYS_ENV, "") if value is None else value
    keys = tuple(key for part in text.split(",") if (key := part.strip()))
    if text and not keys:
        raise InvalidRequest(f"{KEYS_ENV}: there is no key in {text!r}; unset it where none is wanted", field=KEYS_ENV)
    return keys


class RouterArgs(_Args):
    """`deployments.app:router`."""

    num_replicas: int = Field(1, ge=1, description="More than one needs database_url on PostgreSQL or one shared host.")
    num_cpus: float = Field(0.1, ge=0)
    database_url: str | None = Field(None, description="SQLAlchemy URL of the job store. Null: SQLite in ACESTEP_HOME.")
    files_url: str | None = Field(None, description="The renderers' file store. Null: ACESTEP_HOME/files.")
    studio: bool = Field(True, description="Serve the page at `/`; false: only the API.")
    lease_s: float = Field(
        15.0,
        ge=3,
        description="A router that is silent for this long, by the database's clock, loses its jobs to another.",
    )

    graceful_shutdown_s: float = Field(
        900.0,
        ge=0,
        description="How long a router that is replaced may let its stages end; what is not done then goes on at another one, from its "
        "last finished stage.",
    )

    stage_calls: Literal["grpc", "actor"] = Field(
        "grpc",
        description="grpc needs any TCP port between the nodes; actor takes Ray's own ports, some milliseconds slower. IPv6: actor.",
    )

    # Who may call, and how much
    api_keys: tuple[KeyArgs, ...] = Field(
        (), description="Besides those in ACESTEP_API_KEY (comma-separated). No key at all: open to everybody."
    )
    open_models_and_chat: bool = Field(
        False, description="/v1/models and /v1/chat/completions need no key, as on ACE-Step's own server."
    )
    requests_per_minute: int | None = Field(None, ge=1, description="Per key. Null: no limit.")
    concurrent_jobs: int | None = Field(None, ge=1, description="Per key, queued and running. Null: no limit.")
    audio_seconds_per_day: float | None = Field(None, gt=0, description="Per key, in any 24 hours. Null: no limit.")
    work_seconds: float | None = Field(
        None, gt=0, description="Per key, seconds of planner and renderer work queued and running. Null: no limit."
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="Browser origins besides those of cors_origin_regex, such as https://studio.example; '*' allows all, 'null' pages that "
        "are opened from a file, and every sandboxed frame of any page. Without keys, others may not even post.",
    )
    cors_origin_regex: str | None = r"^https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$"
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^/?#\s@]+(/[A-Za-z0-9._~-]+)*/?$",
        description="Address under which callers reach the router through a proxy, such as https://example.org/music. Its path goes in front of "
        "every URL in answers, and webhooks name jobs with the whole of it. Null: X-Forwarded-Prefix and Serve's route_prefix say the path.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host headers besides this machine's own (localhost, 127.0.0.1, [::1]) that a server on a loopback address answers to, "
        "such as the public name that a reverse proxy hands on; '*' allows all.",
    )

    # How much at once
    max_backlog_s: float = Field(
        3600.0, gt=0, description="Jobs that would wait longer than this for a card are refused (429)."
    )
    max_queue: int = Field(200, ge=1, description="Jobs that may wait; beyond it 429.")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Of a request without files.")
    max_upload_bytes: int = Field(128 << 20, ge=1024, description="Of a request with files, chat included.")
    max_kept_upload_bytes: int | None = Field(
        8 << 30,
        ge=1024,
        description="Uploads of one key that are kept at the same time; beyond it 429. Null: no limit.",
    )
    max_waiting: int = Field(
        2000,
        ge=1,
        description="Event streams, `Prefer: wait` and chats of one key that one router holds open; beyond it 429.",
    )
    max_wait_s: float = Field(
        50.0, ge=0, description="Longest `Prefer: wait=n`: below the 60 s after which most proxies give up."
    )
    max_run_s: float = Field(
        3600.0, gt=0, description="A job one of whose stages runs for longer is given up. Waiting does not count."
    )
    chat_timeout_s: float = Field(
        600.0, gt=0, description="A chat completion that is not streamed ends with 504 after it."
    )
    cancel_with_stream: bool = Field(True, description="A chat stream that its client closes cancels the job.")
    unknown_task: Literal["failed", "queued"] = Field(
        "failed", description="What /query_result says of an id it never issued; ACE-Step's own server says queued."
    )

    # Source audio
    audio_roots: tuple[str, ...] | None = Field(
        None,
        description="Folders whose files may be named as source audio, besides the caller's own songs and uploads. Null: on a "
        "loopback address, and where no proxy handed the request on, the temporary folder.",
    )

    # What is kept
    keep_jobs_s: float = Field(7 * 86_400.0, gt=0, description="Ended jobs, their audio and their events.")
    keep_uploads_s: float = Field(86_400.0, gt=0, description="Uploaded files that no waiting job uses.")
    url_lifetime_s: float = Field(86_400.0, gt=0, description="How long a signed audio URL works.")

    # Webhooks
    webhook_networks: tuple[str, ...] = Field(
        (), description="Private networks that webhooks may reach, such as 10.1.0.0/16. Public addresses always may."
    )
    webhook_retry_s: tuple[float, ...] = Field(
        (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000),
        description="Pauses between attempts; then a dead letter.",
    )
    webhook_timeout_s: float = Field(15.0, gt=0)


def parse_args(model: type[T], args: dict[str, Any] | None, application: str) -> T:
    """`args` of an application as its model.

    Raises:
        InvalidRequest: naming application, key and what is allowed.
    """
    try:
        return model.model_validate(args or {})
    except ValidationError as error:
        key, message = first_problem(error)
        hint = f" (known: {', '.join(model.model_fields)})" if message == UNKNOWN_FIELD else ""
        raise InvalidRequest(f"application {application!r}, args.{key}: {message}{hint}", field=f"args.{key}") from None


def default_database_url() -> str:
    """SQLite in the state directory."""
    return f"sqlite:///{writable(home()) / 'jobs.sqlite3'}"
