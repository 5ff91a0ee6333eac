"""What Prometheus would scrape from Ray's exporter, read with Prometheus' own parser."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
EXPECTED = {
    "ray_acestep_jobs", "ray_acestep_jobs_ended", "ray_acestep_audio_seconds", "ray_acestep_stage_seconds",
    "ray_acestep_queue_seconds", "ray_acestep_real_time_factor", "ray_acestep_backlog_seconds", "ray_acestep_pool_replicas",
    "ray_acestep_engine", "ray_acestep_model_load_seconds",
}  # fmt: skip


def scrape(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for listing in Path(server.folder).rglob("prom_metrics_service_discovery.json"):
        for group in json.loads(listing.read_text()):
            for target in group["targets"]:
                try:
                    text = httpx.get(f"http://{target}/metrics", timeout=5).text
                except (
                    httpx.ConnectError
                ):  # Ray's dashboard and autoscaler have fixed ports, which another Ray may have had
                    continue
                for family in text_string_to_metric_families(text):
                    for sample in family.samples:
                        found.setdefault(family.name, []).append((sample.labels, sample.value))
    return found


def songs(seen: dict[str, list[tuple[dict[str, str], float]]]) -> float:
    return sum(value for labels, value in seen.get("ray_acestep_jobs", []) if labels["state"] == "succeeded")


def test_songs_show_in_the_exporter(server: Server) -> None:
    with Client(server.url) as client:
        client.wait(client.submit({"prompt": "a song", "duration": 10, "seed": 1})["id"])
    until = time.monotonic() + 180
    seen: dict[str, list[tuple[dict[str, str], float]]] = {}
    while time.monotonic() < until and not (set(seen) >= EXPECTED and songs(seen)):
        time.sleep(2.0)
        seen = scrape(server)
    assert set(seen) >= EXPECTED, sorted(n for n in seen if "acestep" in n)
    assert songs(seen) >= 1
    stages = {labels["stage"] for labels, _ in seen["ray_acestep_stage_seconds"]}
    assert stages == {"plan", "render"}
    assert {"tokens", "slots_used"} <= {labels["what"] for labels, _ in seen["ray_acestep_engine"]}
