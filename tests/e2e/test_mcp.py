"""An agent at `/mcp` of a real server: by the `mcp` package's client, and by the protocol's own inspector."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import Client

from tests.server import Server

pytestmark = pytest.mark.e2e
INSPECTOR = "@modelcontextprotocol/inspector-cli@1.0.3"  # the whole one brings a page, and takes three times as long
SONG = {"prompt": "calm piano", "duration": 10, "steps": 2, "seed": 1, "formats": ["mp3"], "wait_s": 50}


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_an_agent_plans_makes_and_edits_a_song(server: Server, mode: str) -> None:
    heard: list[str] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append(str(message))

    async with Client(f"{server.url}/mcp", mode=mode) as agent:

        async def job(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
            answer = await agent.call_tool(name, arguments, progress_callback=hear)
            assert not answer.is_error, answer.content
            found = answer.structured_content
            while found["state"] in ("queued", "running"):  # on a busy machine
                found = (await agent.call_tool("wait_for_job", {"job": found["id"]})).structured_content
            assert found["state"] == "succeeded", found
            return found

        plan = (await job("plan_song", SONG))["plan"]
        plan["metadata"]["bpm"] = 77
        made = await job("make_song", {**SONG, "plan": plan})
        assert made["plan"]["metadata"]["bpm"] == 77
        sound = httpx.get(made["result"]["items"][0]["audio"][0]["url"])
        assert sound.content[:3] == b"ID3"
        manifest = (await agent.read_resource(f"acestep://songs/{made['id']}/0/manifest")).contents[0]
        assert json.loads(manifest.text)["request"]["prompt"] == "calm piano"
        edited = await job("edit_song", {"job": made["id"], "edit": "vary", "strength": 0.5, "wait_s": 50})
        assert edited["lineage"]["parents"][0]["job"] == made["id"]
    assert {"queued", "started", "succeeded"} <= set(heard)


def test_the_inspector_lists_and_calls(server: Server, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", INSPECTOR]
    installed = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    if installed.returncode:
        pytest.skip(f"the inspector cannot be installed here: {(installed.stderr or installed.stdout).strip()[-300:]}")
    packages = (
        tmp_path / "node_modules"
    )  # where it finds its own description: it looks for one above the folder that it is called in

    def inspect(*what: str) -> dict[str, Any]:
        command = [packages / ".bin/mcp-inspector-cli", "--cli", f"{server.url}/mcp", "--transport", "http", *what]
        done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return json.loads(done.stdout)

    assert {"make_song", "fleet_status"} <= {tool["name"] for tool in inspect("--method", "tools/list")["tools"]}
    told = inspect("--method", "tools/call", "--tool-name", "list_jobs", "--tool-arg", "limit=1")
    assert "jobs" in told["structuredContent"]
