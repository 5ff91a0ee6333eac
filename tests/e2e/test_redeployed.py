"""What a running server becomes by another config: cards of other tiers, with their limits, warnings, and the planner on or off; a model that is
not there; and pools that sleep. Card sizes are simulated and nothing is computed, so that a redeployment takes seconds. All sizes are in `api/test_card_sizes.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.card_sizes import ARGS, ASKED, SOME, Size, check_answers, check_renderer
from tests.server import Server

pytestmark = pytest.mark.e2e


def config(base: dict[str, Any], size: Size) -> dict[str, Any]:
    applications = []
    for application in base["applications"]:
        application = dict(application)
        if application["name"] != "router":
            application["args"] = ARGS
            application["runtime_env"] = {"env_vars": size.env}
        applications.append(application)
    return {**base, "applications": applications}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    def simulate(data: dict[str, Any]) -> None:
        data.update(config(data, SOME[0]))

    with Server(edit=simulate) as running:
        yield running


@pytest.mark.parametrize("size", SOME, ids=lambda size: f"{size.gib:g}")
def test_a_card_of_this_size(server: Server, size: Size) -> None:
    server.deploy(config(yaml.safe_load(server.config.read_text()), size))
    seen = wait_for_card(server, size.gib)
    check_renderer(size, next(p for p in seen["pools"] if p["name"] == "dit"))
    with httpx.Client(base_url=server.url, timeout=30) as client:
        job = client.post("/v1/music", json=ASKED).json()
        strict = client.post("/v1/music", json={**ASKED, "strict": True})
        check_answers(size, job, (strict.status_code, strict.json()))
        for accepted in {job["id"], strict.json().get("id", job["id"])}:
            client.delete(f"/v1/jobs/{accepted}")


def test_a_missing_model_is_said_in_readyz(server: Server, tmp_path: Path) -> None:
    changed = config(yaml.safe_load(server.config.read_text()), SOME[0])
    missing = {"model": str(tmp_path / "no-such-model")}
    server.deploy(
        {
            **changed,
            "applications": [{**a, "args": missing} if a["name"] == "dit" else a for a in changed["applications"]],
        }
    )
    until = time.monotonic() + 180
    reason = ""
    while "no-such-model" not in reason:
        assert time.monotonic() < until, server.output()[-3000:]
        time.sleep(0.5)
        pools = httpx.get(f"{server.url}/readyz", timeout=30).json().get("pools", [])
        reason = next((p.get("reason", "") for p in pools if p["pool"] == "dit"), "")
    assert server.wait_for("/readyz", status=503)
    assert "ModelMissing" in reason
    assert "\n" not in reason


def wait_for_card(server: Server, gib: float) -> dict[str, Any]:
    until = time.monotonic() + 180
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while time.monotonic() < until:
            seen: dict[str, Any] = client.get("/v1/cluster").json()
            if all(p["replicas"]["running"] == 1 and abs(p.get("memory_gib", 0) - gib) < 1e-6 for p in seen["pools"]):
                return seen
            time.sleep(0.5)
    raise AssertionError(f"no card of {gib} GiB came: {seen}\n{server.output()[-3000:]}")


def asleep(base: dict[str, Any]) -> dict[str, Any]:
    """Both pools may go to zero, and the planner is a real one."""
    sizes = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 3}
    applications = []
    for application in base["applications"]:
        application = {name: value for name, value in application.items() if name != "runtime_env"}
        if application["name"] != "router":
            engine = {} if application["name"] == "lm" else {"engine": "simulated"}
            application["args"] = {"pool": application["name"], **sizes, **engine}
        applications.append(application)
    return {**base, "applications": applications}


def until_asleep(server: Server) -> None:
    end = time.monotonic() + 180
    while True:
        pools = httpx.get(f"{server.url}/v1/cluster", timeout=30).json()["pools"]
        lm = next(pool for pool in pools if pool["name"] == "lm")
        if (
            lm["status"] == "RUNNING"
            and lm["scale"]["min"] == lm["replicas"]["running"] == lm["replicas"]["target"] == 0
        ):
            return
        assert time.monotonic() < end, server.output()[-3000:]
        time.sleep(0.5)


def test_a_question_wakes_the_planner_and_leaves_the_renderer_asleep(server: Server) -> None:
    server.deploy(asleep(yaml.safe_load(server.config.read_text())))
    until_asleep(server)
    end = time.monotonic() + 120
    body = {"caption": "sad song", "seed": 1}
    while (answer := httpx.post(f"{server.url}/v1/format", json=body, timeout=90)).status_code == 503:
        # A slow machine: it goes on starting meanwhile, and whoever comes again finds it.
        assert time.monotonic() < end, answer.text
        assert answer.headers["retry-after"] == "5"
        time.sleep(1.0)
    assert answer.status_code == 200, answer.text
    until_asleep(server)


def test_a_pool_that_is_deployed_anew_in_its_sleep_is_no_more_what_it_was(server: Server) -> None:
    """Nobody has asked it anything since."""

    def lm() -> dict[str, Any]:
        pools = httpx.get(f"{server.url}/v1/cluster", timeout=30).json()["pools"]
        found: dict[str, Any] = next(pool for pool in pools if pool["name"] == "lm")
        return found

    until_asleep(server)
    assert lm()["model"] == "tiny-lm"
    other = asleep(yaml.safe_load(server.config.read_text()))
    args = next(application["args"] for application in other["applications"] if application["name"] == "lm")
    args["model"] = "acestep-5Hz-lm-4B"  # nothing for a CPU
    server.deploy(other)
    end = time.monotonic() + 120
    while "planner sizes for the CPU" not in (lm().get("disabled") or ""):
        assert time.monotonic() < end, f"{lm()}\n{server.output()[-3000:]}"
        time.sleep(0.5)
    assert lm().get("model") != "tiny-lm"
