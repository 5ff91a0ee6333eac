"""Files that are no adapter for the transformer, and what is said of them."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep.errors import InvalidRequest
from tests.adapters.written import (
    F32,
    FOREIGN,
    RANK,
    loaded,
    pairs,
    refused,
    same,
    state_as,
    write_peft,
)  # fmt: skip


def test_what_is_not_of_the_dit_is_left_out_and_named(transformer, tmp_path):
    weights = pairs(transformer)
    state = state_as(FOREIGN["kohya"], weights)
    state |= state_as("lora_{_}.lora_down.weight", {"te.layers.0.mlp.fc1": (torch.ones(4, 8), torch.ones(8, 4))})
    state["lora_te_layers_0_mlp_fc1.alpha"] = torch.tensor(4.0)
    save_file(state, tmp_path / "k.safetensors")
    adapter = loaded(tmp_path, transformer)
    same(adapter, weights)
    assert adapter.left_out == ("te_layers_0_mlp_fc1",)
    # The greater part of it, or any layer of the DiT, is another model's adapter.
    foreign = {f"encoder.layers.{i}.q_proj": (torch.ones(4, 8), torch.ones(8, 4)) for i in range(len(weights))}
    save_file(state_as(FOREIGN["peft"], {**weights, **foreign}), tmp_path / "k.safetensors")
    refused(tmp_path, transformer, "greater part no adapter of this renderer: encoder.layers.0.to_q")
    deeper = {**weights, "layers.9.mlp.up_proj": (torch.ones(4, 48), torch.ones(96, 4))}
    save_file(state_as(FOREIGN["kohya"], deeper), tmp_path / "k.safetensors")
    refused(tmp_path, transformer, "no linear layer layers_9_mlp_up_proj")


@pytest.mark.parametrize(
    ("part", "method"), [("hada_w1_a", "LoHa"), ("lora_mid.weight", "LoCon with Tucker factors"), ("lora_E", "AdaLoRA")]
)
def test_other_methods_are_refused_in_one_sentence(part, method, transformer, tmp_path):
    state = {f"lycoris_layers_0_self_attn_q_proj.{part}": torch.ones(2, 2)}
    state |= state_as(FOREIGN["peft"], pairs(transformer))
    save_file(state, tmp_path / "lokr_weights.safetensors")
    refused(tmp_path, transformer, f" is {method}; only LoRA, LoKr and DoRA are supported.$")


def test_numbers_that_do_not_fit_are_named(transformer, tmp_path):
    weights = pairs(transformer)
    good = state_as(FOREIGN["kohya"], weights)
    module = "lora_unet_layers_0_self_attn_q_proj"

    def changed(match, dtype=F32, **changes):
        save_file({**good, **{f"{module}.{k}": v for k, v in changes.items()}}, tmp_path / "a.safetensors")
        with pytest.raises(InvalidRequest, match=match):
            loaded(tmp_path, transformer, dtype)

    changed("not finite in float16", torch.float16, **{"lora_down.weight": torch.full((RANK, 48), 1e6)})
    changed("is int8, not one of bfloat16, float16", **{"lora_down.weight": torch.ones((RANK, 48), dtype=torch.int8)})
    changed(
        "is float4", **{"lora_down.weight": torch.zeros((RANK, 24), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    )
    changed(r"A \(\)", **{"lora_down.weight": torch.tensor(1.0)})
    changed(r"A \(4, 48, 1\)", **{"lora_down.weight": torch.ones(RANK, 48, 1)})
    changed(r"B \(64,\)", **{"lora_up.weight": torch.ones(64)})
    for alpha in (torch.ones(2), torch.tensor(float("nan")), torch.ones(0), torch.ones(1, dtype=torch.complex64)):
        changed(f"{module}.alpha in .* is not one finite number", alpha=alpha)
    twice = {"layers.0.self_attn.to_q.lora_A.weight": weights["layers.0.self_attn.to_q"][0].clone()}
    save_file({**good, **twice}, tmp_path / "a.safetensors")
    refused(tmp_path, transformer, "more than one adapter")


def test_pickles_are_never_loaded(transformer, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "executed").mkdir, ()

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, transformer, "pickle")
    refused(tmp_path / "adapter_model.bin", transformer, "pickle")
    (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, transformer, "no whole safetensors file")
    refused(tmp_path / "absent", transformer, "holds no")
    assert not (tmp_path / "executed").exists()


def test_what_does_not_fit_is_listed(transformer, tmp_path):
    folder = write_peft(tmp_path / "a", pairs(transformer))
    path = folder / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.model.layers.0.self_attn.q_proj"

    def changed(match, **changes):
        state = {**good, **{k.replace("__", "."): v for k, v in changes.items() if v is not None}}
        for name in [k for k, v in changes.items() if v is None]:
            del state[name]
        save_file(state, path)
        return refused(folder, transformer, match)

    wide = changed("layers.0.self_attn.to_q is 64×99, not 64×48", **{f"{key}.lora_A.weight": torch.zeros(RANK, 99)})
    assert wide.details["keys"] == ["layers.0.self_attn.to_q is 64×99, not 64×48"]
    changed("lacks lora_B", **{f"{key}.lora_B.weight": None})
    changed(r"A \(3, 48\) and B \(64, 4\)", **{f"{key}.lora_A.weight": torch.zeros(3, 48)})
    changed("not finite", **{f"{key}.lora_A.weight": torch.full((RANK, 48), float("nan"))})
    extra = {
        "base_model.model.layers.77.self_attn.q_proj.lora_A.weight": torch.zeros(RANK, 48),
        "base_model.model.layers.77.self_attn.q_proj.lora_B.weight": torch.zeros(64, RANK),
    }
    changed("no linear layer layers.77.self_attn.to_q", **extra)
    changed("no adapter of this model: magnitude", magnitude=torch.zeros(3))
    save_file({"x": torch.zeros(1)}, path)
    refused(folder, transformer, "x")
    save_file({}, path)
    refused(folder, transformer, "no adapter weights")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "LOHA"}, "LOHA; supported are LORA and LOKR"),
        ({"use_dora": True}, r"to_q lacks lora_magnitude_vector \(or dora_scale\)"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"lora_alpha": 0}, "lora_alpha in the adapter's config is 0"),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern of to_q .* is 0"),
        ({"modules_to_save": ["norm_out"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": {"to_q": "loud"}}, "to_q .* 'loud'"),
        ({"lora_alpha": "loud"}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(config, match, transformer, tmp_path):
    refused(write_peft(tmp_path, pairs(transformer), **config), transformer, match)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_broken_config_is_an_error(text, transformer, tmp_path):
    write_peft(tmp_path, pairs(transformer))
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, transformer, "config")
