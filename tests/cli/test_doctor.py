"""Doctor on this machine as it is, and on machines that are not this one."""

from __future__ import annotations

import io
import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from acestep import paths
from acestep.audio.encoder import encoder
from acestep.checkpoints import resolve
from acestep.cli.doctor import command, probes
from acestep.cli.doctor.probes import Finding
from acestep.cli.doctor.report import Report, build_mismatches, report
from acestep.cli.doctor.view import print_report
from acestep.formats import FORMATS, AudioFormat
from acestep.hardware.cards import Device, cpu_device
from acestep.settings.options import misspelt
from tests.cards import MakeCard, shared_checkpoints
from tests.server import free_port


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("ACESTEP_CHECKPOINTS", raising=False)
    monkeypatch.setenv("ACESTEP_URL", f"http://127.0.0.1:{free_port()}")
    return tmp_path / "state"


def errors(made: Report) -> list[Finding]:
    return [f for f in made.findings if f.level == "error"]


def text_of(made: Report, width: int = 200) -> str:
    out = io.StringIO()
    print_report(made, Console(file=out, width=width))
    return out.getvalue()


def test_this_machine_can_make_a_song(own_home: Path) -> None:
    made = report(devices=[cpu_device()], env={})
    assert made.ok, errors(made)
    assert {f.area for f in made.findings} >= {"storage", "codecs", "port", "checkpoints"}
    assert made.machine["torch_build"]
    json.dumps(made.to_dict())
    shown = text_of(made)
    for part in (
        "songs can be made here",
        "tier1",
        "180 s",
        str(own_home),
        "opus works",
        "the tiny planner fits anywhere",
    ):
        assert part in shown


def test_cards_and_what_each_could_do(card: MakeCard) -> None:
    devices = [card(7.99, (8, 9)), card(23.99, (8, 9), index=1), cpu_device()]
    made = report({"model": "acestep-v15-turbo"}, devices=devices, env={})
    small, large, cpu = made.cards
    assert [(c.tier, c.chosen) for c in made.cards] == [("tier4", True), ("unlimited", False), ("tier1", False)]
    assert "acestep-5Hz-lm-0.6B" in small.plan
    assert "songs of 360 s, 4 per request" in small.render
    assert "no planner" in small.both
    assert "ACESTEP_INIT_LLM=true" in small.both
    assert "acestep-5Hz-lm-4B" in large.both
    assert "GiB (" in large.render
    assert "180 s" in cpu.render
    assert "compute capability 8.9" in text_of(made)
    assert made.ledger["renderer weights"]["vae"] == 2 * 168_695_426
    assert {"conditions", "denoise", "decode"} == set(made.ledger["renderer"])
    assert "denoise" in text_of(made)


def test_a_terminal_of_80_columns_shows_names_and_values_whole(card: MakeCard) -> None:
    env = {"ACESTEP_CONFIG_PATH": "acestep-v15-turbo", "ACESTEP_THREADS": "3"}
    shown = text_of(report(devices=[card(15.9), cpu_device()], env=env), width=80)
    for part in ("lm_model = acestep-5Hz-lm-1.7B ", "offload_dit_to_cpu = False ", "by ACESTEP_THREADS: as asked"):
        assert part in shown


def test_real_checkpoint_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = probes.checkpoint("acestep-v15-turbo", "renderer")
    assert (found.level, "acestep download acestep-v15-turbo" in found.text) == ("note", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert probes.checkpoint("acestep-v15-turbo", "renderer").level == "error"
    assert probes.checkpoint(str(tmp_path / "nothing"), "renderer").level == "error"


def test_checkpoint_folder_of_an_upstream_user(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = resolve("tiny", "renderer", root=shared_checkpoints(tmp_path_factory)).path.parent
    shutil.copytree(shared, tmp_path / "checkpoints" / shared.name)
    made = resolve("tiny", "renderer", root=tmp_path / "checkpoints")
    found = probes.checkpoint(str(made.path), "renderer")
    assert (found.level, str(made.path) in found.text) == ("ok", True)
    both = probes.checkpoint(str(made.path.parent / "tiny"), "renderer")
    assert (both.level, both.details["complete"], "and its conversion" in both.text) == ("ok", True, True)
    (made.path / "vae" / "config.json").unlink()
    assert probes.checkpoint(str(made.path), "renderer").level == "error"
    shutil.rmtree(made.path)
    original = probes.checkpoint(str(made.path.parent / "tiny"), "renderer")
    assert (original.level, original.details["complete"]) == ("ok", False)
    assert "converted on first use" in original.text


def test_read_only_checkpoints_will_do_once_they_are_complete(
    monkeypatch: pytest.MonkeyPatch, own_home: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    write = paths.writable

    def writable(folder: Path, *remedy: str) -> Path:
        if folder == volume:
            raise paths.refusal(folder, OSError(30, "Read-only file system"), *remedy)
        return write(folder, *remedy)

    monkeypatch.setenv("ACESTEP_CHECKPOINTS", str(volume))
    with monkeypatch.context() as patch:
        patch.setattr(paths, "writable", writable)
        (refused,) = errors(report(devices=[cpu_device()], env={}))
        assert "ACESTEP_CHECKPOINTS" in refused.text
    monkeypatch.setattr(probes, "has_tiny", lambda root: root == volume)
    monkeypatch.setattr(paths, "writable", writable)
    made = report(devices=[cpu_device()], env={})
    assert made.ok
    assert [f.level for f in made.findings if "read-only" in f.text] == ["note"]


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("ACESTEP_HOME", str(blocked / "state"))
    made = report(devices=[cpu_device()], env={})
    assert not made.ok
    assert {f.details["type"] for f in errors(made)} == {"storage_permission"}
    assert all(str(blocked) in f.details["path"] for f in errors(made))
    assert "songs cannot be made here" in text_of(made)


def test_setting_that_cannot_be(card: MakeCard) -> None:
    made = report(devices=[cpu_device()], env={"ACESTEP_DEVICE": "cuda"})
    assert made.settings is None
    assert [f.details["type"] for f in errors(made)] == ["device_unavailable"]
    assert "✗ settings" in text_of(made)
    simulated = report(env={"MAX_CUDA_VRAM": "abc"})
    assert any("MAX_CUDA_VRAM" in f.text for f in errors(simulated))
    warned = report(devices=[card(15, (7, 5))], env={"ACESTEP_USE_FLASH_ATTENTION": "true"})
    assert any(f.level == "warning" and "flash" in f.text for f in warned.findings)
    assert warned.ok


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("ACESTEP_TIER_PROFILE", "2031"),
        ("MAX_CUDA_VRAM_AS_DETECTED", "perhaps"),
        ("ACESTEP_URL", "http://127.0.0.1:99999"),
        ("ACESTEP_URL", "http://127.0.0.1:x"),
        ("ACESTEP_URL", "somewhere"),
        ("ACESTEP_DEVICE", "toaster"),
    ],
)
def test_wrong_variable_is_a_finding_that_names_it(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    """In the process's own environment, as a user has it: the whole report still comes."""
    monkeypatch.setenv("MAX_CUDA_VRAM", "8")
    monkeypatch.setenv(variable, text)
    made = report()
    assert [variable in f.text and text in f.text for f in errors(made)] == [True]
    assert [c.tier for c in made.cards][-1] == "tier1"
    assert "songs cannot be made here" in text_of(made)


def test_variable_that_is_misspelt() -> None:
    env = {"ACESTEP_OFFLOAD_TO_CPUS": "1", "ACESTEP_API_KEYS": "k", "ACESTEP_HOME": "/x", "ACESTEP_DEVICE": "cpu"}
    assert misspelt(env) == [
        "nothing reads ACESTEP_OFFLOAD_TO_CPUS: did you mean ACESTEP_OFFLOAD_TO_CPU?",
        "nothing reads ACESTEP_API_KEYS: did you mean ACESTEP_API_KEY?",
    ]


def test_planner_machine_without_planner(card: MakeCard) -> None:
    made = report({"model": "acestep-v15-turbo"}, role="plan", devices=[card(3.9)], env={})
    assert any("no planner here" in f.text for f in errors(made))


def test_cards_that_this_torch_cannot_use(card: MakeCard) -> None:
    def mismatches(devices: list[Device], pci: list[str], build: str) -> str:
        return " / ".join(f.text for f in build_mismatches(devices, pci, build))

    unusable = card(24, (8, 9), usable=False, name="RTX 4090")
    assert "RTX 4090 is present" in mismatches([unusable], ["NVIDIA"], "CPU")
    assert "install a CUDA build" in mismatches([unusable], ["NVIDIA"], "CPU")
    assert "built for compute capability 8.9" in mismatches([unusable], ["NVIDIA"], "CUDA 13.0")
    assert "driver does not answer" in mismatches([cpu_device()], ["NVIDIA"], "CUDA 13.0")
    amd = mismatches([cpu_device()], ["AMD"], "CPU")
    assert "an AMD card is present, this torch is a CPU build" in amd
    assert "ROCm" in amd
    assert "XPU build" in mismatches([cpu_device()], ["Intel"], "CPU")
    assert mismatches([card(24)], ["NVIDIA"], "CUDA 13.0") == ""
    assert mismatches([card(16, None, kind="rocm")], ["AMD"], "ROCm 6.4") == ""


def test_cards_on_the_bus(tmp_path: Path) -> None:
    for i, (vendor, kind) in enumerate(
        [("0x1002", "0x030000"), ("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x1af4", "0x030000")]
    ):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "vendor").write_text(vendor + "\n")
        (tmp_path / f"{i}" / "class").write_text(kind + "\n")
    (tmp_path / "9").mkdir()
    assert probes.pci_cards(tmp_path) == ["AMD", "NVIDIA"]
    assert probes.pci_cards(tmp_path / "missing") == []


def test_port() -> None:
    number = free_port()
    assert probes.port(number).level == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", number))
        found = probes.port(number)
        assert found.level == "error"
        assert str(number) in found.text


def test_port_where_our_server_listens() -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": {"service": "ACE-Step API"}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        found = probes.port(server.server_port)
        assert (found.level, "answers there already" in found.text) == ("note", True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_codec_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such encoder")

    def only_lossless(fmt: AudioFormat, *args: Any, **options: Any) -> Any:
        return encoder(fmt, *args, **options) if FORMATS[fmt].lossless else refuse()

    monkeypatch.setattr("acestep.audio.writing._lossy", refuse)
    monkeypatch.setattr("acestep.audio.writing.encoder", only_lossless)
    levels = {f.details["format"]: f.level for f in probes.codecs()}
    assert levels == {
        "wav": "ok", "wav24": "ok", "wav32": "ok", "flac": "ok", "mp3": "warning", "opus": "warning", "aac": "warning",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "size", "code"),
    [
        ((), "8", 0),
        ((), "abc", 1),
        (("--role", "plan"), "4", 1),  # no planner for that tier
        (("--role", "plan", "--set", "init_llm=true"), "4", 0),
        (("--set", "no_such_setting=1"), "8", 1),
    ],
)
def test_command_line(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], size: str, code: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MAX_CUDA_VRAM", size)
    done = CliRunner().invoke(command.app, ["--json", *arguments])
    assert done.exit_code == code, done.output
    made = json.loads(done.stdout)
    assert made["ok"] is (code == 0)
    if size == "8" and code == 0:
        assert made["settings"]["tier"] == "tier4"
        assert made["cards"][0]["tier"] == "tier4"
    if code:
        assert [f["text"] for f in made["findings"] if f["level"] == "error"]
    assert CliRunner().invoke(command.app, list(arguments)).exit_code == code
