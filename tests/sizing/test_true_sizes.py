"""The ledger at the published sizes: what the encoders allocate there, counted on tensors that have shapes and no memory."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config

from acestep.checkpoints.modules import component_class, quiet
from acestep.dit.renderer import set_encoder_attention
from acestep.sizing.activations import CODED_FRAMES, SILENT_REFERENCE_FRAMES, conditions_bytes
from acestep.sizing.ledger import known_configs

META = torch.device("meta")
ENCODERS = ("condition_encoder", "audio_tokenizer", "audio_token_detokenizer")


class Peak(TorchDispatchMode):
    """Most bytes at once of what is made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What goes in was there before, or was counted when it was made.
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and id(storage := made.untyped_storage()) not in known | self._known:
                self._known.add(id(storage))
                self.held += storage.nbytes()
                self.bytes = max(self.bytes, self.held)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return out

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.held -= size


def test_the_meter_measures() -> None:
    with Peak() as peak:
        kept = torch.zeros(1000, device=META)
        for _ in range(3):
            kept = kept[:500].view(5, 100).reshape(-1) + 1.0
        del kept
    assert peak.bytes == 4000 + 2000
    assert peak.held == 0


@pytest.fixture(scope="module", params=["acestep-v15-turbo", "acestep-v15-xl-turbo"])
def published(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Any]:
    """Configurations and the encoders of a published renderer, without numbers."""
    configs = known_configs(request.param)
    with quiet(), META:
        parts = {name: component_class(name).from_config(dict(configs[name])) for name in ENCODERS}
        sizes = {k: v for k, v in configs["text_encoder"].items() if not k.startswith("_")}
        parts["text_encoder"] = component_class("text_encoder")(Qwen3Config(**sizes, attn_implementation="sdpa"))
    # It sorts one token of each reference by numbers, which there are none of.
    parts["condition_encoder"].timbre_encoder.unpack_timbre_embeddings = lambda packed, order: (packed[None], None)
    return configs, SimpleNamespace(**{name: part.bfloat16().eval() for name, part in parts.items()})


@pytest.mark.parametrize("lyrics", [2048, 400])
@pytest.mark.parametrize("references", [0, 3])
@pytest.mark.parametrize("frames", [0, CODED_FRAMES])
def test_the_encoders(published: tuple[dict[str, Any], Any], lyrics: int, references: int, frames: int) -> None:
    configs, parts = published
    set_encoder_attention(parts, "sdpa", META, torch.bfloat16)
    encoder = configs["condition_encoder"]
    options: Any = {"device": META, "dtype": torch.bfloat16}
    with torch.inference_mode(), Peak() as peak:
        looked_up = torch.empty(1, lyrics, encoder["text_hidden_dim"], **options)
        timbre = torch.empty(max(1, references), SILENT_REFERENCE_FRAMES, encoder["timbre_hidden_dim"], **options)
        order = torch.zeros(len(timbre), dtype=torch.long, device=META)
        read = parts.condition_encoder.lyric_encoder(inputs_embeds=looked_up, attention_mask=None)
        text = parts.text_encoder(input_ids=torch.zeros(1, 256, dtype=torch.long, device=META)).last_hidden_state
        caption = parts.condition_encoder.text_projector(text)
        heard = parts.condition_encoder.timbre_encoder(timbre, order)[0]
        hints = (
            parts.audio_token_detokenizer(torch.empty(1, frames // 5, encoder["hidden_size"], **options))
            if frames
            else None
        )
        kept = (read, caption, heard, hints)
    assert len(kept) == 4
    foretold = conditions_bytes(encoder, configs["text_encoder"], frames, lyrics, references, "bfloat16")
    assert peak.bytes <= foretold <= 2.5 * peak.bytes
