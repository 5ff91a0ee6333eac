"""Clients that are generated from the OpenAPI document: a song, a plan that is edited, a part made anew, events and an error go through them."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from acestep.formats import FORMATS
from tests.server import Server

pytestmark = pytest.mark.e2e
# Beside the dependencies that the tests have already; its own limit for typer is older than ours.
PYTHON_GENERATOR = ("openapi-python-client==0.29.1", "ruamel.yaml==0.19.1")
NODE_PACKAGES = ("openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20.19.0")
ASKED: dict[str, Any] = {"prompt": "calm piano", "steps": 1, "seed": 1}
PREFER = "wait=50"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def fetched(what: str, *command: str | Path, cwd: Path) -> None:
    """Skip where a registry cannot be reached."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=240)
    if done.returncode:
        pytest.skip(f"{what} cannot be installed here: {(done.stderr or done.stdout).strip()[-300:]}")


@pytest.fixture
def document(server: Server, tmp_path: Path) -> Path:
    path = tmp_path / "openapi.json"
    path.write_bytes(httpx.get(f"{server.url}/openapi.json", timeout=60).content)
    return path


def test_a_python_client(server: Server, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "tool"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        tool,
    )
    fetched(PYTHON_GENERATOR[0], *pip, *PYTHON_GENERATOR, cwd=tmp_path)
    kinds = {form.content_type: "application/octet-stream" for form in FORMATS.values()}  # it knows no audio
    (tmp_path / "config.json").write_text(json.dumps({"post_hooks": [], "content_type_overrides": kinds}))
    said = run(
        sys.executable, "-m", "openapi_python_client", "generate", "--path", document, "--config", "config.json", "--meta", "none",
        "--output-path", "acestep_client", cwd=tmp_path, PYTHONPATH=str(tool),
    )  # fmt: skip
    assert "WARNING" not in said, said  # it leaves out what it does not understand
    monkeypatch.syspath_prepend(str(tmp_path))
    api = {
        name: importlib.import_module(f"acestep_client.api.{name}")
        for name in (
            "songs.create_song",
            "songs.job_events",
            "songs.get_audio",
            "plans.create_plan",
            "files.upload_file",
        )
    }
    kind = importlib.import_module("acestep_client.models")
    client = importlib.import_module("acestep_client").Client(base_url=server.url, timeout=httpx.Timeout(60))

    def song(**fields: Any) -> Any:
        answer = api["songs.create_song"].sync(
            client=client, prefer=PREFER, body=kind.SongSubmission(**ASKED, **fields)
        )
        assert isinstance(answer, kind.JobView), answer
        assert answer.state == "succeeded", answer
        return answer

    made = song(duration=10.0)
    item = made.result.items[0]
    sound = api["songs.get_audio"].sync(made.id, "0.wav", client=client).payload.read()
    assert (len(sound), item.seed) == (item.audio[0].bytes_, 1)

    planned = api["plans.create_plan"].sync(
        client=client, prefer=PREFER, body=kind.SongSubmission(**ASKED, duration=10.0)
    )
    planned.plan.metadata.bpm = 80
    assert song(plan=planned.plan).plan.metadata.bpm == 80

    file = importlib.import_module("acestep_client.types").File(payload=io.BytesIO(sound), file_name="song.wav")
    source = api["files.upload_file"].sync(client=client, body=kind.BodyUploadFile(file=file))
    assert not isinstance(source, kind.Problem), source
    part = song(task=kind.SongSubmissionTask.REPAINT, src_audio=source.id, repainting_start=2.0, repainting_end=4.0)
    assert part.request["task"] == "repaint"

    seen = []
    for frame in api["songs.job_events"].sync(made.id, client=client).split("\n\n"):
        lines = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
        if "event" in lines:
            event = {"event": lines["event"], "data": json.loads(lines["data"]), "id": int(lines["id"])}
            shape = {"queued": "QueuedEvent", "started": "StartedEvent", "planned": "PlannedEvent"}.get(
                lines["event"], "EndedEvent"
            )
            assert getattr(kind, shape).from_dict(event).data.job_id == made.id
            seen.append(lines["event"])
    assert (seen[0], seen[-1]) == ("queued", "succeeded")

    refused = api["songs.create_song"].sync(client=client, body=kind.SongSubmission(prompt="x", duration=5.0))
    assert isinstance(refused, kind.Problem)
    assert (refused.status, refused.errors[0].field) == (422, "duration")


def test_a_typescript_client(server: Server, document: Path, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    fetched("openapi-typescript", "npm", "install", "--silent", "--no-audit", "--no-fund", *NODE_PACKAGES, cwd=tmp_path)
    tools = tmp_path / "node_modules" / ".bin"
    # Fields with a default may be left out of a request.
    flag = "--default-non-nullable=false"
    run(tools / "openapi-typescript", document, "--output", "api.d.ts", flag, cwd=tmp_path)
    shutil.copy(Path(__file__).with_name("clients") / "client.ts", tmp_path / "client.mts")
    options = {
        "strict": True, "noUncheckedIndexedAccess": True, "module": "nodenext", "target": "es2023", "lib": ["es2023", "dom"], "types": ["node"],
        "skipLibCheck": False,
    }  # fmt: skip
    (tmp_path / "tsconfig.json").write_text(
        json.dumps({"compilerOptions": options, "files": ["client.mts", "api.d.ts"]})
    )
    (tmp_path / "package.json").write_text(json.dumps({"type": "module"}))
    run(tools / "tsc", cwd=tmp_path)
    told = json.loads(run("node", "client.mjs", server.url, cwd=tmp_path))
    assert (told["events"][0], told["events"][-1], told["refused"]) == ("queued", "succeeded", "duration")
