"""From typing to sound: starts in turn, in one run, against three empty Serve applications.

    python -m benchmarks.start [--rounds 3] [--quick] [--json]

In each round: `serve run` of three empty applications until they answer; `serve run serve_config.yaml` with the tiny checkpoint until `/readyz`
is 200, then one song; `acestep serve`, which is `make run` once it is installed, until the same; `acestep generate --local` until the file
is there. Ratios are of medians over the rounds, of seconds and of the processor seconds that were spent meanwhile: the latter hold on a busy
machine, too, whose load is printed.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from acestep.ray_env import ray_env
from benchmarks.service import ROOT, START_TIMEOUT_S, run

MARKS = {"serve_run": 1.4, "acestep_serve": 1.5, "first_song_s": 2.0, "local_s": 6.0}
EMPTY = """
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Empty:
    def __call__(self, request):
        return "ok"

def app(args):
    return Empty.bind()
"""
BIN = Path(sys.executable).parent


def measure(rounds: int, _quick: bool = False) -> dict[str, Any]:
    """Seconds and processor seconds, by what was started, and what they are against empty applications."""
    taken: dict[str, list[tuple[float, float]]] = {}
    songs = []
    with tempfile.TemporaryDirectory(prefix="ace-", ignore_cleanup_errors=True) as home:
        _local(Path(home))  # brings files into memory, and writes the checkpoint
        for _ in range(rounds):
            for name in ("empty", "serve_run", "acestep_serve"):
                seconds, cpu, song = _start(name, Path(home))
                taken.setdefault(name, []).append((seconds, cpu))
                songs += [song] if song is not None else []
            taken.setdefault("local", []).append(_local(Path(home)))
    medians = {name: [statistics.median(v) for v in zip(*pairs, strict=True)] for name, pairs in taken.items()}
    against = {
        name: {"seconds": medians[name][0] / medians["empty"][0], "cpu": medians[name][1] / medians["empty"][1]}
        for name in ("serve_run", "acestep_serve")
    }
    return {
        "rounds": rounds, "medians": {n: {"seconds": s, "cpu": c} for n, (s, c) in medians.items()}, "against_empty": against,
        "first_song_s": statistics.median(songs), "load": os.getloadavg()[1], "cores": os.cpu_count(), "marks": MARKS,
    }  # fmt: skip


def _start(name: str, home: Path) -> tuple[float, float, float | None]:
    """Seconds until it is ready, processor seconds until then, and seconds of a first song where there are songs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A short folder: Ray keeps unix sockets in there, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ace-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        paths = ["/a0", "/a1", "/a2"] if name == "empty" else ["/readyz"]
        config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = port
        if name == "empty":
            (folder / "empty.py").write_text(EMPTY)
            config["applications"] = [
                {"name": f"a{i}", "route_prefix": f"/a{i}", "import_path": "empty:app"} for i in range(3)
            ]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        env = _env(home) | {"RAY_TMPDIR": text, "PYTHONPATH": text}
        env |= ray_env(env, alone=True)
        command = [BIN / "acestep", "serve"] if name == "acestep_serve" else [BIN / "serve", "run"]
        began = time.monotonic()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, folder / "config.yaml"], env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False) as http:
                for path in paths:
                    _wait(http, path, process, folder / "log")
                seconds, cpu = time.monotonic() - began, _cpu_seconds(process.pid)
                return seconds, cpu, None if name == "empty" else _song(http)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _wait(http: httpx.Client, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 4 * START_TIMEOUT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if http.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it is still starting
        time.sleep(0.1)
    raise SystemExit(f"{path} did not get ready; the log ends with {log.read_text()[-2000:]}")


def _song(http: httpx.Client) -> float:
    began = time.monotonic()
    body = {"prompt": "calm piano, rain", "duration": 10, "seed": 1}
    answer = http.post("/v1/music", json=body, headers={"Prefer": "wait=30"})
    if answer.json().get("state") != "succeeded":
        raise SystemExit(f"the song did not succeed: {answer.text[:500]}")
    return time.monotonic() - began


def _local(home: Path) -> tuple[float, float]:
    began, before = time.monotonic(), psutil.Process().cpu_times()
    command = [BIN / "acestep", "generate", "calm piano, rain", "--duration", "10", "--local", "-o", home / "song.wav"]
    subprocess.run(command, env=_env(home), check=True, capture_output=True)
    after = psutil.Process().cpu_times()
    return time.monotonic() - began, _of_children(after) - _of_children(before)


def _of_children(times: Any) -> float:
    return float(times.children_user + times.children_system)


def _cpu_seconds(root: int) -> float:
    """Processor seconds of a process and of all its descendants, those that have ended included."""
    total = 0.0
    family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    for process in family:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it ended while we looked; its parent has it
        total += times.user + times.system + _of_children(times)
    return total


def _env(home: Path) -> dict[str, str]:
    # Bytecode is kept, as `make` does: else the project alone would be compiled anew in each process, and what is installed not.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ACESTEP_", "PYTHONDONTWRITEBYTECODE"))}
    return kept | {"ACESTEP_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def text(result: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{result['rounds']} rounds on {result['cores']} cores, load {result['load']:.1f}; medians"]
    lines += [f"{n:<14}{m['seconds']:6.1f} s {m['cpu']:6.1f} s of processor" for n, m in result["medians"].items()]
    lines += [
        f"{n} / empty: {r['seconds']:.2f} in seconds, {r['cpu']:.2f} in processor seconds (mark: {MARKS[n]:g})"
        for n, r in result["against_empty"].items()
    ]
    lines.append(f"first song after ready: {result['first_song_s']:.1f} s (mark: {MARKS['first_song_s']:g})")
    lines.append(f"generate --local: {result['medians']['local']['seconds']:.1f} s (mark: {MARKS['local_s']:g})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(__doc__, "rounds", 3, 1, measure, text))
