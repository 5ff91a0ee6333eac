"""Two routers over PostgreSQL: a job is visible to both the moment it is accepted, and each job is made once."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.postgres import running
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_two_routers_share_the_jobs() -> None:
    with running() as postgres:
        url = postgres.database()

        def edit(config: dict[str, Any]) -> None:
            for application in config["applications"]:
                application.setdefault("args", {})["database_url"] = url
            config["applications"][0]["args"]["num_replicas"] = 2

        with Server(edit) as server:
            ids = []
            for number in range(20):
                song = {"prompt": f"song {number}", "duration": 10, "steps": 1, "thinking": False}
                answer = httpx.post(f"{server.url}/v1/music", json=song, timeout=30)
                assert answer.status_code == 202, answer.text
                job = answer.json()
                assert httpx.get(f"{server.url}/v1/jobs/{job['id']}", timeout=30).status_code == 200
                ids.append(job["id"])
            for job_id in ids:
                job = httpx.get(f"{server.url}/v1/jobs/{job_id}", headers={"Prefer": "wait=60"}, timeout=70).json()
                assert (job["state"], job["attempts"]) == ("succeeded", 1), job
