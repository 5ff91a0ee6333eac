"""Adapters in a renderer's songs: each in its own, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from renderer_requests import Make, work_of
from safetensors.torch import load_file, save_file

from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderWork
from acestep.errors import InvalidRequest
from acestep.request import Lora
from acestep.worker import Ticket


class TestLora:
    @staticmethod
    def write(folder: Path, renderer: Renderer) -> Path:
        transformer: Any = renderer._thread.engine._denoiser.transformer  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name in ("layers.0.self_attn.to_q", "layers.1.cross_attn.to_k", "layers.1.cross_attn.to_v"):
            module = transformer.get_submodule(name)
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def test_changes_its_own_request_and_no_other(self, make_renderer: Make, tmp_path: Path, rel: Any) -> None:
        renderer = make_renderer("tiny-base", max_batch_frames=10_000)
        adapter = Lora(path=str(self.write(tmp_path / "style", renderer)), scale=0.7)
        plain = renderer.submit(work_of()).result(60).items[0].audio
        changed = renderer.submit(work_of(lora=adapter)).result(60)
        assert rel(changed.items[0].audio, plain) > 1e-3
        assert changed.settings["lora"][0]["name"] == "style"
        assert torch.equal(renderer.submit(work_of()).result(60).items[0].audio, plain)
        tickets: list[Ticket[RenderWork, Rendered]] = [
            renderer.submit(work_of(lora=x)) for x in (adapter, None, adapter)
        ]
        with_it, without, again = (ticket.result(60).items[0].audio for ticket in tickets)
        assert rel(with_it, changed.items[0].audio) <= 1e-6
        assert rel(again, changed.items[0].audio) <= 1e-6
        assert rel(without, plain) <= 1e-6

    def test_what_is_left_out_is_said(self, make_renderer: Make, tmp_path: Path) -> None:
        renderer = make_renderer("tiny")
        file = self.write(tmp_path / "style", renderer) / "adapter_model.safetensors"
        text = {f"lora_te_fc1.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
        save_file({**load_file(file), **text}, file)
        (said,) = (
            a
            for a in renderer.submit(work_of(lora=Lora(path=str(file.parent)))).result(60).adjustments
            if "lora" in a.field
        )
        assert (said.field, said.asked, said.given) == ("lora.path", "style", "3 of 4 layers")
        assert "te_fc1" in said.reason

    def test_an_absent_adapter_is_refused(self, renderers: dict[str, Renderer], tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="lora"):
            renderers["tiny"].submit(work_of(lora=Lora(path=str(tmp_path)))).result(60)
