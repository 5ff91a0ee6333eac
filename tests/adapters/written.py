"""Adapters as trainers write them, and what they must do."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from acestep.adapters.cache import LoraCache
from acestep.adapters.hooks import AdapterHooks
from acestep.adapters.load import load_adapter
from acestep.errors import InvalidRequest
from acestep.request import Lora

RANK, ALPHA = 4, 8
CPU, F32 = torch.device("cpu"), torch.float32
ATTENTION = tuple(
    f"layers.{i}.{kind}.{proj}" for i in (0, 1) for kind in ("self_attn", "cross_attn") for proj in ("to_q", "to_v")
)
TARGETS = (*ATTENTION, "layers.0.self_attn.to_out.0", "layers.1.mlp.down_proj", "condition_embedder")
ORIGINAL = {".to_q": ".q_proj", ".to_v": ".v_proj", ".to_out.0": ".o_proj"}


def pairs(transformer, seed=0, rank=RANK, targets=TARGETS):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in targets:
        module = transformer.get_submodule(name)
        down = torch.randn(rank, module.in_features, generator=generator) * 0.2
        up = torch.randn(module.out_features, rank, generator=generator) * 0.2
        found[name] = (down, up)
    return found


def original_name(name):
    for new, old in ORIGINAL.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def write_peft(folder, weights, **config):
    """As PEFT saves an adapter that upstream trained on the original DiT."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, (down, up) in weights.items():
        state[f"base_model.model.{original_name(name)}.lora_A.weight"] = down
        state[f"base_model.model.{original_name(name)}.lora_B.weight"] = up
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def inputs(count=3):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(count, *shape, generator=generator)

    times = torch.rand(count, generator=generator)
    return {
        "hidden_states": noise(20, 8),
        "timestep": times,
        "timestep_r": times,
        "encoder_hidden_states": noise(7, 32),
        "context_latents": noise(20, 16),
    }


@torch.inference_mode()
def run(transformer, **kwargs):
    return transformer(**kwargs, return_dict=False)[0]


def merged(transformer, weights, scale):
    """The reference: a copy of the model with scale · B A added to its weights."""
    model = copy.deepcopy(transformer)
    for name, (down, up) in weights.items():
        factor = scale[name] if isinstance(scale, dict) else scale
        model.get_submodule(name).weight += factor * (up @ down)
    return model


def active_of(transformer, path, scale=1.0):
    return LoraCache(transformer, CPU, F32).get([Lora(path=str(path), scale=scale)])


def applied(transformer, rows):
    return AdapterHooks(transformer).applied(rows)


def relative(a, b):
    return float((a - b).norm() / b.norm())


FOREIGN = {
    "peft": "base_model.model.{}.lora_A.weight",
    "peft with the adapter's name": "base_model.model.{}.lora_A.jazz.weight",
    "comfy": "diffusion_model.decoder.{}.lora_A.weight",
    "diffusers": "transformer.{}.lora.down.weight",
    "compiled": "base_model.model._orig_mod.decoder.{}.lora_A.weight",
    "kohya": "lora_unet_{_}.lora_down.weight",
    "kohya of the whole model": "lora_unet_decoder_{_}.lora_down.weight",
    "lycoris": "lycoris_{_}.lora_down.weight",
    "flat diffusers": "lora_transformer_{_}.lora_down.weight",
}
UP = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}


def state_as(form, weights, naming=original_name):
    """The weights under the keys of one of `FOREIGN`."""
    state = {}
    for name, (down, up) in weights.items():
        known = naming(name)
        key = form.replace("{}", known).replace("{_}", known.replace(".", "_"))
        first, second = next(pair for pair in UP.items() if pair[0] in key)
        state[key], state[key.replace(first, second)] = down, up
    return state


def loaded(path, transformer, dtype=F32):
    return load_adapter(path, transformer, device=CPU, dtype=dtype)


def same(adapter, weights, scale=1.0):
    assert set(adapter.layers) == set(weights)
    for name, (down, up) in weights.items():
        layer = adapter.layers[name]
        assert torch.equal(layer.change.down, down)
        assert torch.equal(layer.change.up, up)
        assert layer.scale == scale


def refused(path, transformer, match):
    with pytest.raises(InvalidRequest, match=match) as caught:
        active_of(transformer, path)
    assert caught.value.details["field"] == "lora.path"
    return caught.value
