"""Habits of Ray and Serve that would cost a fleet dearly, each with what this project does about it.

Those that need a running cluster are tested through the front door: a policy without a database and a pending replica that nobody waits for
in `e2e/test_scaling.py`, draining in `e2e/test_update.py`.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray import serve

from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS
from acestep.request import SongRequest
from deployments.config.args import PlannerArgs, RendererArgs, RouterArgs, parse_args
from deployments.config.build import build_config, parse_tiers
from deployments.config.options import deployment_options, label_selector, settled
from deployments.config.validate import problems
from deployments.fleet.watch import SETTLE_S, Fleet, FleetView, Node, Pool, parse_details, unplaced
from deployments.stages.planner import PlannerDeployment
from tests.server import ROOT

SIMULATED = {"engine": "simulated", "profile": "h100-sxm", "num_cpus": 0.1}


# -- label selectors


@pytest.mark.parametrize("count", range(1, len(TIERS) + 1))
def test_selectors_never_hold_a_blank(count: int) -> None:
    """Ray accepts `in(tier4, tier5)` and never matches what follows the blank."""
    for tiers in itertools.permutations(TIERS, count) if count < 4 else itertools.combinations(TIERS, count):
        selector = label_selector(RendererArgs(tiers=tiers))
        assert " " not in "".join((*selector, *selector.values()))
        assert selector["acestep/role"] == "gpu"
        wanted = selector["acestep/gpu-tier"].removeprefix("in(").removesuffix(")").split(",")
        assert tuple(wanted) == tiers


def test_a_selector_names_what_a_node_must_have_and_never_what_it_must_not() -> None:
    """A node without the label matches `!tier4`: the head would."""
    for text in ("tier4", "tier4,tier5,unlimited"):
        selector = label_selector(RendererArgs(tiers=tuple(text.split(","))))  # type: ignore[arg-type]
        assert not any(v.startswith("!") for v in selector.values())


def test_the_selector_is_set_in_code_and_not_in_the_file() -> None:
    """In the file it would also pin the task that imports the application, to a node that may not exist yet."""
    config = build_config(parse_tiers("tier4:2,tier6,unlimited"), scale_to_zero=True, nodes_on_demand=True)
    assert "label_selector" not in yaml.safe_dump(config)
    routers = [a["import_path"] for a in config["applications"] if "deployments" in a]
    assert routers == ["deployments.app:router"]  # which stays on the head: that node exists
    args = settled(RendererArgs(tiers=("tier4",)), default_share=0.6)
    assert deployment_options(args)["ray_actor_options"]["label_selector"]["acestep/gpu-tier"] == "tier4"


def test_validate_warns_of_a_selector_in_the_file() -> None:
    config = build_config(parse_tiers("tier4"))
    config["applications"][1]["deployments"] = [
        {"name": "lm", "ray_actor_options": {"label_selector": {"acestep/gpu-tier": "tier4"}}}
    ]
    (found,) = problems(config)
    assert "pins the import task" in found
    assert "args.tiers" in found


# -- keys that Serve drops


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ((), "http_option", {"port": 1}),
        (("http_options",), "request_timeout", 1),
        (("applications", 1), "arg", {}),
        (("applications", 1, "deployments", 0), "max_ongoing_request", 3),
        (("applications", 1, "deployments", 0, "ray_actor_options"), "num_gpu", 1),
        (("applications", 1, "deployments", 0, "ray_actor_options"), "label_selectors", {}),
        (("applications", 1, "deployments", 0, "autoscaling_config"), "target_ongoing_request", 7),
    ],
)
def test_validate_refuses_keys_that_serve_drops(where: tuple[Any, ...], key: str, value: Any) -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][1]["deployments"] = [{"name": "lm", "ray_actor_options": {}, "autoscaling_config": {}}]
    assert problems(config) == []
    inner = config
    for step in where:
        inner = inner[step]
    inner[key] = value
    assert any(key in p and "unknown key" in p for p in problems(config))


@pytest.mark.parametrize("model", [RouterArgs, PlannerArgs, RendererArgs])
def test_unknown_args_are_refused(model: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"args\.num_gpuss.*known: "):
        parse_args(model, {"num_gpuss": 1}, "app")


# -- replicas that wait for a node


def test_only_a_leaving_replica_that_never_had_a_node_is_let_go() -> None:
    def replica(name: str, state: Any, node: str | None) -> dict[str, Any]:
        return {"actor_name": name, "state": state, "node_id": node}

    stopping = SimpleNamespace(value="STOPPING")
    ours = [
        replica("pending", stopping, None), replica("finishing its songs", stopping, "n1"), replica("waits", "STARTING", None),
        replica("serves", "RUNNING", "n1"),
    ]  # fmt: skip
    details: dict[str, Any] = {
        "applications": {
            "dit-tier4": {"deployments": {"dit": {"replicas": ours}}},
            "another": {"deployments": {"theirs": {"replicas": [replica("not ours", "STOPPING", None)]}}},
            "not built yet": {"deployments": None},
        }
    }
    assert unplaced(details, "STOPPING") == {"dit-tier4": ["pending"], "another": [], "not built yet": []}
    fleet = Fleet()
    args = RendererArgs(tiers=["tier4"])
    pools = (Pool("dit-tier4", "render", args, starting=1),)
    runs = FleetView(pools, apps={"dit-tier4": "RUNNING"})
    goes = FleetView(apps={"dit-tier4": "DELETING"})
    gone: dict[str, Any] = {"applications": {"dit-tier4": {}}}
    assert fleet._unplaced_leavers(details, runs, now=0.0) == ["pending"]
    # Of an application that goes, Serve tells no replicas any more. Until it has told them to stop, none may be let go.
    assert fleet._unplaced_leavers(gone, goes, now=1.0) == []
    assert fleet._unplaced_leavers(gone, goes, now=1.5) == []
    assert fleet._unplaced_leavers(gone, goes, now=1.0 + SETTLE_S) == ["waits"]
    assert fleet._unplaced_leavers({}, FleetView(), now=100.0) == []
    # Where there is a node, what has none yet may be a process that still starts: Serve ends it, and without a trace in the log.
    node = Node("n1", label_selector(args), gpus=1.0, cpus=1.0)
    assert fleet._unplaced_leavers(details, replace(runs, nodes=(node,)), now=200.0) == ["pending"]
    assert fleet._unplaced_leavers(gone, goes, now=201.0) == []
    assert fleet._unplaced_leavers(gone, goes, now=210.0) == []


def test_replicas_of_a_node_with_notice_are_given_nothing_new() -> None:
    replicas = [
        {"replica_id": state, "state": state} for state in ("RUNNING", "PENDING_MIGRATION", "STOPPING", "STARTING")
    ]
    details = {"applications": {"dit": {"status": "RUNNING", "deployments": {"dit": {"replicas": replicas}}}}}
    (pool,) = parse_details(details).pools
    assert (pool.replicas, pool.running, pool.starting) == (("RUNNING",), 1, 1)
    assert pool.leaving == ("STOPPING",)


def test_a_stage_that_is_told_to_go_while_it_starts_is_not_ill() -> None:
    """Serve looks at its health once more after it has closed it, and would log a trace."""
    dead, leaving = PlannerDeployment({}), PlannerDeployment({})
    dead.engine.close()
    with pytest.raises(RuntimeError, match="has ended"):
        dead.check_health()
    leaving.__del__()
    leaving.check_health()


# -- how Ray really schedules and builds


@pytest.fixture(scope="module")
def two_cards() -> Iterator[None]:
    """Two labelled nodes with a fake card each."""
    from ray.cluster_utils import Cluster

    config = build_config(parse_tiers("tier5:2"))
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ace-", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)  # another test's `acestep` would take a Ray in /tmp for the one to join
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
        try:
            patch.setenv("MAX_CUDA_VRAM", "12")  # nodes inherit the environment they are started in
            for _ in range(2):
                cluster.add_node(num_cpus=2, num_gpus=1, labels={"acestep/role": "gpu", "acestep/gpu-tier": "tier5"})
            patch.delenv("MAX_CUDA_VRAM")
            ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
            serve.start(proxy_location="Disabled", controller_options=config["controller_options"])
            yield
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.e2e
def test_planner_halves_leave_a_whole_card_for_the_renderer(two_cards: None) -> None:
    """SPREAD, Serve's default, would put a planner on each card, and the renderer would wait for ever."""
    from deployments.app import dit, lm

    tier = {**SIMULATED, "tiers": ["tier5"]}
    serve.run(lm({**tier, "num_replicas": 2, "num_gpus": 0.5}), name="lm", route_prefix=None)
    serve.run(dit({**tier, "num_replicas": 1, "num_gpus": 1}), name="dit", route_prefix=None, blocking=False)
    settle("dit")
    apps = serve.status().applications
    assert {name: app.status for name, app in apps.items()} == {"lm": "RUNNING", "dit": "RUNNING"}


@pytest.mark.e2e
def test_an_application_of_a_tier_without_a_node_is_built_and_waits_at_zero(two_cards: None) -> None:
    from deployments.app import dit

    args = {**SIMULATED, "pool": "dit-unlimited", "tiers": ["unlimited"], "min_replicas": 0, "max_replicas": 2}
    serve.run(dit(args), name="dit-unlimited", route_prefix=None)
    app = serve.status().applications["dit-unlimited"]
    assert app.status == "RUNNING"
    assert app.deployments["dit"].replica_states == {}


@pytest.mark.e2e
async def test_leaving_a_stages_stream_stops_the_replicas_work(two_cards: None) -> None:
    """Serve does not pass a lost consumer on to the replica by itself; `Dispatcher._follow` cancels the stream, and so does this."""
    handle = serve.get_deployment_handle("dit", app_name="dit")
    request = SongRequest(prompt="a song", duration=600, steps=20).with_seeds().model_dump(mode="json")
    stream = handle.options(stream=True).render.remote("job", request, {}, (0,))
    assert "progress" in await anext(stream)
    assert (await handle.describe.remote())["stats"]["slots_used"] == 1
    stream.cancel()
    until = time.monotonic() + 60
    while (await handle.describe.remote())["stats"]["slots_used"]:
        assert time.monotonic() < until, "the replica went on with what nobody waits for"


def settle(app: str, timeout_s: float = 90.0) -> None:
    until = time.monotonic() + timeout_s
    while serve.status().applications[app].status != "RUNNING" and time.monotonic() < until:
        time.sleep(0.5)
