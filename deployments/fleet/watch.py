"""What the cluster has now: pools, their replicas, and what those replicas said of themselves.

A pool is a Serve application that holds a deployment named `lm` (planner) or `dit` (renderer); nobody has to list them. The router
polls the Serve controller once a second and asks each pool's replica for its description once it runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from acestep.errors import InvalidRequest
from deployments.config.args import ARGS_OF_ROLE, ROLE_OF_DEPLOYMENT, PoolArgs, Role, parse_args, role_of
from deployments.config.options import label_selector, node_labels
from deployments.fleet.listening import dashboard_url

log = logging.getLogger(__name__)

POLL_S = 1.0
DESCRIBE_EVERY_S = 10.0
DESCRIBE_TIMEOUT_S = 5.0
COLD_START_TIMEOUT_S = 600.0
SETTLE_S = 1.0  # until Serve has told every replica of an application that it deletes to stop
_EXCEPTION_LINE = re.compile(
    r"^\s*(?:\w+\.)*(\w+(?:Error|Exception|Missing|Permission|Unavailable|Exceeded|Request|OutOfMemory)): (.+)$"
)


@dataclass(frozen=True)
class Pool:
    """One pool as seen now."""

    app: str
    role: Role
    args: PoolArgs
    status: str = "DEPLOYING"
    message: str = ""
    running: int = 0
    starting: int = 0
    target: int = 0
    replicas: tuple[str, ...] = ()  # ids of those that run
    leaving: tuple[str, ...] = ()  # of those that end what they have
    ordered: tuple[float, ...] = ()  # when those that start were, by Serve's clock
    started: Mapping[str, float] = field(default_factory=dict)  # all of its replicas, and when, by Serve's clock
    deployed_at: float = 0.0  # when its application was deployed last, by the same
    info: Mapping[str, Any] | None = None  # a replica's description; kept after the pool has gone to zero


@dataclass(frozen=True)
class Node:
    """A live node of the Ray cluster."""

    name: str
    labels: Mapping[str, str]
    gpus: float
    cpus: float
    metrics: str | None = None  # URL of its exporter for Prometheus


Capacity = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class FleetView:
    """A consistent picture of all pools."""

    pools: tuple[Pool, ...] = ()
    at: float = 0.0
    apps: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    dead_nodes: frozenset[str] = frozenset()  # Ray's ids of those that died; none of them comes back
    http_host: str | None = None  # what the proxies listen on; None until Serve has said so
    http_port: int | None = None
    dashboard: str | None = None  # URL of Ray's, where there is one
    leaving: bool = False  # the replica that looks is being stopped
    app_leaves: bool = False  # so is its whole application: nothing comes after it

    def of(self, role: Role) -> tuple[Pool, ...]:
        return tuple(p for p in self.pools if p.role == role)

    @property
    def capacity(self) -> Capacity:
        """Running replicas by pool: while this stays the same, a job that found no pool finds none."""
        return tuple((p.app, p.running if p.info else 0) for p in self.pools)

    def has_node(self, selector: Mapping[str, str]) -> bool:
        """Whether a live node carries the labels; `in(a,b)` as in Ray's selectors."""
        return any(all(_matches(node.labels.get(k), v) for k, v in selector.items()) for node in self.nodes)

    def placeable(self, pool: Pool) -> bool:
        """Whether the cluster has a node for the pool, free or not."""
        selector = label_selector(pool.args)
        return not selector or self.has_node(selector)

    def reachable(self, pool: Pool) -> bool:
        """Whether the cluster has a node for the pool, or adds one when a replica waits for it."""
        return pool.args.nodes_on_demand or self.placeable(pool)

    def wakes(self, pool: Pool) -> bool:
        """Whether a pool without a replica starts one for a call."""
        return (
            pool.args.min_replicas == 0 < pool.args.max_replicas
            and self.reachable(pool)
            and pool.status not in ("DEPLOY_FAILED", "UNHEALTHY")
        )

    def why_not_ready(self, pool: Pool) -> str | None:
        """A sentence for people, or None while at least one replica of the pool serves."""
        if pool.running:
            return None
        if pool.status in ("DEPLOY_FAILED", "UNHEALTHY") and (reason := exception_text(pool.message)):
            return reason
        wanted = node_labels(pool.args)
        if wanted and not self.has_node(label_selector(pool.args)):
            state = "is starting" if pool.starting else "has no replica"
            return f"pool {state}; it needs a Ray node labelled {wanted} with a free GPU share"
        if pool.starting:
            where = f", or waits for a free GPU share on a node labelled {wanted}" if wanted else ""
            return f"a replica is starting and loading its model{where}"
        return "no replica; one starts when work arrives" if self.wakes(pool) else "no replica yet"

    def get(self, app: str) -> Pool | None:
        return next((p for p in self.pools if p.app == app), None)


def _matches(value: str | None, wanted: str) -> bool:
    if wanted.startswith("in(") and wanted.endswith(")"):
        return value in wanted[3:-1].split(",")
    return value == wanted


def exception_text(message: str) -> str:
    """The last exception line of a traceback that Serve reports, without the traceback."""
    lines = [m for line in message.splitlines() if (m := _EXCEPTION_LINE.match(line))]
    if lines:
        return f"{lines[-1].group(1)}: {lines[-1].group(2)}"
    return message.strip().splitlines()[-1] if message.strip() else ""


def parse_details(
    details: Mapping[str, Any], dead: Collection[str] = (), own: tuple[str, str] | None = None
) -> FleetView:
    """Serve's own description of the cluster (`ServeInstanceDetails`) as pools.

    Args:
        own: The router's replica that looks: its application's name, and its id.
        dead: Ray's ids of nodes that died. Serve still calls their replicas running until it has asked for their health.
    """

    def state_of(replica: Mapping[str, Any]) -> str:
        return "DEAD" if replica.get("node_id") in dead else str(getattr(replica["state"], "value", replica["state"]))

    pools = []
    apps = {}
    leaving = app_leaves = False
    for app, facts in details.get("applications", {}).items():
        apps[app] = str(getattr(facts["status"], "value", facts["status"]))
        deployments = facts.get("deployments") or {}
        if own is not None and app == own[0]:
            routers = (deployments.get("router") or {}).get("replicas", [])
            app_leaves = apps[app] == "DELETING"  # of such an application Serve tells no replicas
            leaving = app_leaves or any(r.get("replica_id") == own[1] and state_of(r) == "STOPPING" for r in routers)
        config = facts.get("deployed_app_config") or {}
        # Not built yet, or failed to: its import path still tells what it was to be.
        unbuilt: tuple[Role | None, Mapping[str, Any]] = (role_of(config.get("import_path")), {})
        role, deployment = next(
            ((ROLE_OF_DEPLOYMENT[n], d) for n, d in deployments.items() if n in ROLE_OF_DEPLOYMENT), unbuilt
        )
        if role is None:
            continue
        try:
            args = parse_args(ARGS_OF_ROLE[role], config.get("args"), app)
        except InvalidRequest:
            args = ARGS_OF_ROLE[role]()  # the application fails with this very message; it is shown from there
        replicas = deployment.get("replicas", [])
        states = [state_of(r) for r in replicas]
        ids = sorted((str(r.get("replica_id")), s) for r, s in zip(replicas, states, strict=True))
        messages = [str(facts.get("message") or ""), str(deployment.get("message") or "")]
        pool = Pool(
            app=app,
            role=role,
            args=args,
            status=apps[app],
            message="\n".join(m for m in messages if m),
            running=states.count("RUNNING"),
            starting=states.count("STARTING"),
            target=int(deployment.get("target_num_replicas") or 0),
            ordered=tuple(
                float(r["start_time_s"])
                for r, s in zip(replicas, states, strict=True)
                if s == "STARTING" and r.get("start_time_s")
            ),
            started={str(r.get("replica_id")): float(r.get("start_time_s") or 0.0) for r in replicas},
            deployed_at=float(facts.get("last_deployed_time_s") or 0.0),
            replicas=tuple(replica for replica, state in ids if state == "RUNNING"),
            leaving=tuple(replica for replica, state in ids if state == "STOPPING"),
        )
        pools.append(pool)
    http = details.get("http_options") or {}
    return FleetView(
        tuple(sorted(pools, key=lambda p: p.app)),
        time.time(),
        apps,
        http_host=http.get("host"),
        http_port=http.get("port"),
        leaving=leaving,
        app_leaves=app_leaves,
    )


def unplaced(details: Mapping[str, Any], state: str) -> dict[str, list[str]]:
    """Actor names, by application, of pools' replicas in a state (`STARTING`, `STOPPING`) that have found no node yet."""
    return {
        app: [
            str(replica["actor_name"])
            for name, deployment in (facts.get("deployments") or {}).items()
            if name in ROLE_OF_DEPLOYMENT
            for replica in deployment.get("replicas", [])
            if str(getattr(replica["state"], "value", replica["state"])) == state and replica.get("node_id") is None
        ]
        for app, facts in details.get("applications", {}).items()
    }


class Fleet:
    """Keeps a `FleetView` fresh. Lives in the router's event loop.

    Args:
        own: The replica that this is: its application's name, and its id; None outside Serve.
    """

    def __init__(self, own: tuple[str, str] | None = None) -> None:
        self.own = own
        self.view = FleetView()
        self.changed = asyncio.Event()
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._infos: dict[str, Mapping[str, Any]] = {}
        self._args: dict[str, tuple[PoolArgs, float]] = {}  # and when they were deployed
        self._started: dict[str, float] = {}  # when replicas did
        self._described: dict[str, tuple[float, tuple[str, ...]]] = {}  # when, and which replicas there were
        self._describing: dict[str, asyncio.Task[None]] = {}
        self._waiting: Mapping[str, list[str]] = {}  # replicas that wait for a node the cluster lacks, by application
        self._leaving: dict[str, tuple[float, list[str]]] = {}  # those of an application that goes, since when

    async def run(self) -> None:
        """Poll until cancelled. A failed poll keeps the last picture and is tried again."""
        while True:
            try:
                await self.refresh()
            except Exception:
                log.exception("cannot read the fleet's state")
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> None:
        details, (nodes, dead) = await asyncio.to_thread(_serve_details), await asyncio.to_thread(_nodes)
        view = replace(parse_details(details, dead, self.own), nodes=nodes, dead_nodes=dead, dashboard=dashboard_url())
        await asyncio.to_thread(_release, self._unplaced_leavers(details, view, time.monotonic()))
        for pool in view.pools:
            if self._args.get(pool.app, (None,))[0] != pool.args:
                self._args[pool.app] = pool.args, pool.deployed_at
            self._started.update(pool.started)
            if pool.running:
                self._describe_soon(pool, DESCRIBE_TIMEOUT_S)
                continue
            said_by = str(self._infos.get(pool.app, {}).get("replica"))
            if self._started.get(said_by, math.inf) < self._args[pool.app][1]:
                del self._infos[pool.app]  # deployed anew since, and asleep: its next replica may serve another model
            if pool.app not in self._infos and not pool.args.tiers:
                # Without a tier nobody knows what it can do until a replica says so, and no job could be given to it to wake it. The
                # question itself makes Serve start the first replica.
                self._describe_soon(pool, COLD_START_TIMEOUT_S)
        pools = tuple(replace(p, info=self._infos[p.app]) if p.app in self._infos else p for p in view.pools)
        self.view = replace(view, pools=pools)
        self.changed.set()
        self.changed = asyncio.Event()

    async def last_look(self) -> None:
        """Before this router leaves: where all of Serve stops, nobody after it lets go what waits for a node."""
        if any(self._waiting.values()) or self._leaving:
            await self.refresh()
            await asyncio.sleep(SETTLE_S)
            await self.refresh()

    def _unplaced_leavers(self, details: Mapping[str, Any], view: FleetView, now: float) -> list[str]:
        """Replicas that leave, or whose application does, and for which the cluster has no node.

        Serve asks a leaving replica to finish first and waits for `graceful_shutdown_timeout_s`. One that never started cannot answer, so for
        all that time it would go on asking the cluster for a card, and hold up a shutdown of Serve. Of an application that is being deleted
        Serve tells no replicas any more; what it told before counts. Such a replica is let go only after `SETTLE_S`: until Serve has told it to
        stop, its end would be taken for a failed start, logged with a trace, and another one started. For the same reason one whose process
        still starts on a node is left to Serve, which cannot be told from one that waits but by the node.
        """
        for app in self._waiting:
            if view.apps.get(app) in (None, "DELETING") and self._waiting[app]:
                self._leaving.setdefault(app, (now, self._waiting[app]))
        settled = [app for app, (since, _) in self._leaving.items() if now - since >= SETTLE_S]
        leavers = [actor for app in settled for actor in self._leaving.pop(app)[1]]
        starting = unplaced(details, "STARTING")
        self._waiting = {p.app: starting.get(p.app, []) for p in view.pools if not view.placeable(p)}
        return leavers + [actor for actors in unplaced(details, "STOPPING").values() for actor in actors]

    def handle(self, app: str, role: Role) -> DeploymentHandle[Any]:
        if app not in self._handles:
            deployment = next(d for d, r in ROLE_OF_DEPLOYMENT.items() if r == role)
            handle = serve.get_deployment_handle(deployment, app_name=app)
            # This one is asynchronous: another thread only costs time.
            handle._init(_run_router_in_separate_loop=False)  # type: ignore[no-untyped-call]
            self._handles[app] = handle
        return self._handles[app]

    def _describe_soon(self, pool: Pool, timeout_s: float) -> None:
        """Ask what the pool can do, now and then, and at once where its replicas are others: they may serve another model."""
        at, replicas = self._described.get(pool.app, (-math.inf, ()))
        busy = self._describing.get(pool.app)
        fresh = replicas == pool.replicas and time.monotonic() - at < DESCRIBE_EVERY_S
        if fresh or (busy and not busy.done()):
            return
        self._describing[pool.app] = asyncio.create_task(self._describe(pool, timeout_s))

    async def _describe(self, pool: Pool, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                info: Mapping[str, Any] = await self.handle(pool.app, pool.role).describe.remote()
        except Exception as error:
            log.info("pool %s did not describe itself: %s", pool.app, error)
            return
        self._infos[pool.app] = info
        self._described[pool.app] = (time.monotonic(), pool.replicas)


def _serve_details() -> Mapping[str, Any]:
    # The dashboard's own source; Serve has no public call that tells replicas and their states.
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    details: Mapping[str, Any] = client.get_serve_details() if client is not None else {}
    return details


def _release(actors: Iterable[str]) -> None:
    for name in actors:
        try:
            ray.kill(ray.get_actor(name, namespace="serve"))
        except ValueError:
            continue  # gone meanwhile
        log.info("released %s, which had not started and is not needed any more", name)


def _nodes() -> tuple[tuple[Node, ...], frozenset[str]]:
    """The nodes of the cluster, and the ids of those that died."""
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    live = tuple(
        Node(
            name=str(node.get("NodeName") or node.get("NodeManagerAddress")),
            labels=node.get("Labels") or {},
            gpus=float((node.get("Resources") or {}).get("GPU", 0.0)),
            cpus=float((node.get("Resources") or {}).get("CPU", 0.0)),
            metrics=_exporter(node),
        )
        for node in known
        if node.get("Alive")
    )
    return live, frozenset(str(node["NodeID"]) for node in known if not node.get("Alive"))


def _exporter(node: Mapping[str, Any]) -> str | None:
    host, port = node.get("NodeManagerAddress"), node.get("MetricsExportPort")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics" if host and port else None
