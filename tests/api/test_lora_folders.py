"""The renderers' LoRA folders over HTTP: a renderer of the tiny checkpoint answers, called in this process instead of by Ray."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from acestep.plan import Plan
from acestep.request import SongRequest
from deployments.stages.renderer import RendererDeployment
from tests.api.conftest import Build, Site
from tests.api.test_made_as_asked import Stages

LAYERS = ("layers.0.self_attn.to_q", "layers.1.mlp.down_proj")


def lora(stage: RendererDeployment, seed: int = 0, width: int = 0) -> dict[str, torch.Tensor]:
    """A kohya file's tensors; with `width` for another model."""
    assert stage.engine.adapter_target is not None
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in LAYERS:
        out, inputs = stage.engine.adapter_target.shapes[name]
        key = "lora_unet_" + name.replace("to_q", "q_proj").replace(".", "_")
        state[f"{key}.lora_down.weight"] = torch.randn(2, width or inputs, generator=generator)
        state[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        state[f"{key}.alpha"] = torch.tensor(2.0)
    return state


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> RendererDeployment:
    folder = tmp_path_factory.mktemp("loras")
    os.environ["ACESTEP_HOME"] = str(tmp_path_factory.getbasetemp() / "acestep-home")
    made = RendererDeployment(
        {"model": "tiny", "num_gpus": 0, "lora_roots": [str(folder / "one"), str(folder / "two")]}
    )
    one, two, outside = folder / "one", folder / "two", folder / "outside"
    for path in (one / "rock" / "final", one / "deep" / "er", one / "pickle", two, outside):
        path.mkdir(parents=True)
    good = lora(made)
    save_file(good, one / "jazz.safetensors", metadata={"ss_base_model_version": "acestep-v15"})
    save_file(lora(made, 1), one / "rock" / "final" / "adapter_model.safetensors")
    save_file(good, one / "deep" / "er" / "a.safetensors")
    save_file(good, one / "deep" / "er" / "b.safetensors")
    save_file(lora(made, width=99), two / "other.safetensors")
    save_file(good, two / "jazz.safetensors")
    save_file({k: v * float("nan") for k, v in good.items() if "alpha" not in k}, two / "nan.safetensors")
    save_file({k: v * 0 if "alpha" in k else v for k, v in good.items()}, two / "still.safetensors")
    key = "lycoris_layers_0_self_attn_q_proj"
    save_file({f"{key}.lokr_w1": torch.ones(2, 2)}, two / "half.safetensors")
    (two / "broken.safetensors").write_bytes(pickle.dumps({}))
    (one / "pickle" / "adapter_model.bin").write_bytes(pickle.dumps({}))
    save_file(good, outside / "secret.safetensors")
    (one / "link.safetensors").symlink_to(outside / "secret.safetensors")
    return made


@pytest.fixture
async def site(build: Build, stage: RendererDeployment, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = build()
    monkeypatch.setattr(site.service.fleet, "handle", Stages({"render": stage}).handle)
    return site


async def test_the_list_says_what_there_is_and_what_fits(site: Site) -> None:
    answer = (await site.client.get("/v1/loras")).json()
    found = {one["name"]: one for one in answer["loras"]}
    assert list(found) == [
        "broken.safetensors", "deep/er/a.safetensors", "deep/er/b.safetensors", "half.safetensors", "jazz.safetensors", "nan.safetensors",
        "other.safetensors", "rock", "still.safetensors",
    ]  # fmt: skip
    jazz = found["jazz.safetensors"]
    assert (jazz["kind"], jazz["ranks"], jazz["layers"], jazz["base_model"]) == ("LoRA", [2], 2, "acestep-v15")
    assert jazz["bytes"] > 1000
    assert jazz["models"] == [{"model": "acestep-v15-turbo", "fits": True, "problem": None}]
    problems = {name: one["models"][0]["problem"] for name, one in found.items() if not one["models"][0]["fits"]}
    assert set(problems) == {"broken.safetensors", "half.safetensors", "other.safetensors"}
    assert "×99, not" in problems["other.safetensors"]
    assert "lacks lokr_w2" in problems["half.safetensors"]
    assert "no whole safetensors file" in problems["broken.safetensors"]
    assert answer["unknown"] == []


REFUSED = [
    ("none", "there is no adapter 'none' in the renderers' LoRA folders"),
    ("../outside/secret.safetensors", "there is no adapter '../outside/secret.safetensors'"),
    ("/etc/passwd", "passwd' in the renderers' LoRA folders"),
    ("link.safetensors", "it is a link that leads out of them"),
    ("pickle", "pickle files are never loaded"),
    ("broken.safetensors", "no whole safetensors file"),
    ("other.safetensors", "does not fit this renderer: layers.0.self_attn.to_q is"),
    ("half.safetensors", "lacks lokr_w2"),
    ("nan.safetensors", "layers.0.self_attn.to_q holds numbers that are not finite"),
    ("still.safetensors", "alpha in still.safetensors is 0"),
]


@pytest.mark.parametrize(("path", "text"), REFUSED)
async def test_what_cannot_be_used_is_refused_by_name_when_it_is_loaded(path: str, text: str, site: Site) -> None:
    answer = await site.client.post("/v1/lora/load", json={"lora_path": path})
    assert (answer.status_code, text in answer.json()["detail"]) == (400, True), answer.text
    assert (await site.client.get("/v1/lora/status")).json()["data"]["lora_loaded"] is False


async def test_what_fits_is_loaded(site: Site) -> None:
    answer = (await site.client.post("/v1/lora/load", json={"lora_path": "rock"})).json()
    assert answer["data"] == {"message": "✅ LoRA loaded: rock", "lora_path": "rock"}
    status = (await site.client.get("/v1/lora/status")).json()["data"]
    assert (status["adapter_type"], status["active_adapter"]) == ("lora", "rock")


async def rendered(stage: RendererDeployment, lora: Any) -> dict[str, Any]:
    """The last message of a song of the stage, as the dispatcher hears it."""
    request = SongRequest(prompt="x", duration=10, seed=1, steps=1, thinking=False, lora=lora)
    messages = [
        m async for m in stage.render("a" * 8, request.model_dump(mode="json"), Plan().model_dump(mode="json"), (0,))
    ]
    return messages[-1]


@pytest.mark.parametrize(("path", "text"), REFUSED)
async def test_a_song_with_it_fails_by_name_and_the_next_one_does_not(
    path: str, text: str, stage: RendererDeployment
) -> None:
    failed = await rendered(stage, [{"path": "jazz.safetensors"}, {"path": path}])
    assert (failed["error"]["type"], text in failed["error"]["message"]) == ("invalid_request", True), failed
    assert "result" in await rendered(stage, {"path": "jazz.safetensors"})
