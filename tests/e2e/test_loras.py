"""Adapters through the front door: listed, used, several at once, refused by name; and a server that lives on."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from acestep.checkpoints import resolve
from acestep.checkpoints.load import load_renderer
from acestep.cli.client import Client
from acestep.errors import InvalidRequest
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("the server")]
LAYERS = ("layers.0.self_attn.to_q", "layers.1.mlp.down_proj")


def lora(server: Server, seed: int, width: int = 0) -> dict[str, torch.Tensor]:
    """A kohya file's tensors; with `width` for another model."""
    model = load_renderer(
        resolve("tiny", "renderer", root=server.home / "checkpoints"), device="cpu", dtype=torch.float32
    ).transformer
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in LAYERS:
        out, inputs = model.get_submodule(name).weight.shape
        key = "lora_unet_" + name.replace("to_q", "q_proj").replace(".", "_")
        state[f"{key}.lora_down.weight"] = torch.randn(2, width or inputs, generator=generator)
        state[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        state[f"{key}.alpha"] = torch.tensor(2.0)
    return state


@pytest.fixture(scope="module")
def folder(server: Server) -> Path:
    """The LoRA folder of the server, with good and bad adapters."""
    root = server.home / "loras"
    root.mkdir()
    good = lora(server, 1)
    save_file(good, root / "jazz.safetensors", metadata={"ss_base_model_version": "acestep-v15"})
    (root / "rock" / "final").mkdir(parents=True)
    save_file(lora(server, 2), root / "rock" / "final" / "adapter_model.safetensors")
    key = "lycoris_layers_0_self_attn_q_proj"
    query = "lora_unet_layers_0_self_attn_q_proj"
    out, inputs = len(good[f"{query}.lora_up.weight"]), good[f"{query}.lora_down.weight"].shape[1]
    lokr = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.randn(out // 2, inputs // 2)}
    save_file({**lokr, f"{key}.alpha": torch.tensor(4.0)}, root / "lokr.safetensors")
    save_file(lora(server, 3, width=99), root / "other-model.safetensors")
    save_file({f"{key}.lokr_w1": torch.ones(2, 2)}, root / "half.safetensors")
    save_file({k: v * float("nan") if "up" in k else v for k, v in good.items()}, root / "nan.safetensors")
    save_file({k: v * 0 if "alpha" in k else v for k, v in good.items()}, root / "zero.safetensors")
    (root / "pickle").mkdir()
    (root / "pickle" / "adapter_model.bin").write_bytes(pickle.dumps({}))
    (root / "disguised.safetensors").write_bytes(pickle.dumps({}))
    (server.folder / "outside").mkdir()
    save_file(good, server.folder / "outside" / "a.safetensors")
    return root


def make(server: Server, lora: Any) -> bytes:
    """A song's audio."""
    with Client(server.url) as client:
        request = {"prompt": "calm piano", "duration": 10, "seed": 3, "steps": 2, "thinking": False, "lora": lora}
        item = client.wait(client.submit(request)["id"])["result"]["items"][0]
        return client.file(item["audio"][0]["url"])


def test_the_list_says_what_there_is_and_what_fits(server: Server, folder: Path) -> None:
    listed = httpx.get(f"{server.url}/v1/loras", timeout=60).json()
    found = {one["name"]: one for one in listed["loras"]}
    assert set(found) == {
        "jazz.safetensors", "rock", "lokr.safetensors", "other-model.safetensors", "half.safetensors", "nan.safetensors",
        "zero.safetensors", "disguised.safetensors",
    }  # fmt: skip
    jazz = found["jazz.safetensors"]
    assert (jazz["kind"], jazz["ranks"], jazz["layers"], jazz["base_model"]) == ("LoRA", [2], 2, "acestep-v15")
    assert jazz["bytes"] == (folder / "jazz.safetensors").stat().st_size
    assert [(fit["fits"], fit["problem"]) for fit in jazz["models"]] == [(True, None)]
    assert (found["lokr.safetensors"]["kind"], found["lokr.safetensors"]["ranks"]) == ("LoKr", [])
    assert "×99, not" in found["other-model.safetensors"]["models"][0]["problem"]
    assert "lacks lokr_w2" in found["half.safetensors"]["models"][0]["problem"]
    assert "no whole safetensors file" in found["disguised.safetensors"]["models"][0]["problem"]


def test_songs_with_one_and_with_several(server: Server, folder: Path) -> None:
    plain = make(server, None)
    jazz = make(server, {"path": "jazz.safetensors"})
    both = make(server, [{"path": "jazz.safetensors"}, {"path": "rock", "scale": 0.5}, {"path": "lokr.safetensors"}])
    turned = make(
        server,
        [{"path": "lokr.safetensors"}, {"path": str(folder / "rock"), "scale": 0.5}, {"path": "jazz.safetensors"}],
    )
    assert len({plain, jazz, both}) == 3
    assert turned == both, "the order does not matter"
    assert make(server, None) == plain


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("none", "there is no adapter 'none' in the renderers' LoRA folders"),
        ("../outside/a.safetensors", "there is no adapter"),
        ("/etc/passwd", "there is no adapter .*passwd"),
        ("pickle", "pickle files are never loaded"),
        ("disguised.safetensors", "no whole safetensors file"),
        ("other-model.safetensors", "does not fit this renderer: layers.0.self_attn.to_q is"),
        ("half.safetensors", "lacks lokr_w2"),
        ("nan.safetensors", "not finite"),
        ("zero.safetensors", "alpha in .* is 0"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_of_it_is_applied(
    path: str, match: str, server: Server, folder: Path
) -> None:
    with pytest.raises(InvalidRequest, match=match):
        make(server, [{"path": "jazz.safetensors"}, {"path": path}])
    answer = httpx.post(f"{server.url}/v1/lora/load", json={"lora_path": path}, timeout=60)
    if path not in ("nan.safetensors", "zero.safetensors"):  # only their numbers are wrong, which the first song reads
        assert (answer.status_code, "detail" in answer.json()) == (400, True), answer.text
    httpx.post(f"{server.url}/v1/lora/unload", timeout=60)
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_the_default_of_upstreams_api_is_looked_at_and_used(server: Server, folder: Path) -> None:
    loaded = httpx.post(f"{server.url}/v1/lora/load", json={"lora_path": "lokr.safetensors"}, timeout=60).json()
    try:
        assert loaded["data"]["message"] == "✅ LoRA loaded: lokr"
        assert httpx.get(f"{server.url}/v1/lora/status", timeout=60).json()["data"]["adapter_type"] == "lokr"
        task = httpx.post(
            f"{server.url}/release_task",
            json={
                "prompt": "calm piano",
                "audio_duration": 10,
                "inference_steps": 2,
                "batch_size": 1,
                "thinking": False,
            },
        ).json()["data"]["task_id"]
        with Client(server.url) as client:
            job = client.wait(task)
        assert [one["path"] for one in job["request"]["lora"]] == ["lokr.safetensors"]
    finally:
        httpx.post(f"{server.url}/v1/lora/unload", timeout=60)


def test_the_command_line(server: Server, folder: Path, tmp_path: Path) -> None:
    acestep = str(Path(sys.executable).with_name("acestep"))
    env = {**server.env, "ACESTEP_URL": server.url}
    listed = subprocess.run([acestep, "status", "--loras"], env=env, capture_output=True, text=True, check=True).stdout
    assert "jazz.safetensors" in listed
    wav = tmp_path / "song.wav"
    command = [
        acestep,
        "generate",
        "calm piano",
        "--duration",
        "10",
        "--no-thinking",
        "--steps",
        "2",
        "-o",
        str(wav),
        "--json",
    ]
    made = subprocess.run([*command, "--lora", "jazz.safetensors:0.5", "--lora", "rock"], env=env, capture_output=True, text=True, check=True)  # fmt: skip
    job = json.loads(made.stdout)
    assert job["request"]["lora"] == [{"path": "jazz.safetensors", "scale": 0.5}, {"path": "rock"}]
    bad = subprocess.run([*command, "--lora", "none"], env=env, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "there is no adapter 'none'" in bad.stderr
