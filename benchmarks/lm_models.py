"""Random planners of any size with the true vocabulary, made in memory: no checkpoint, no download."""

from __future__ import annotations

import torch
from tokenizers.pre_tokenizers import ByteLevel

from acestep.checkpoints.bpe import byte_level_bpe
from acestep.checkpoints.tiny_planner import SPECIAL_TOKENS
from acestep.lm.model import DecoderLayer, ModelConfig, PlannerModel
from acestep.lm.tokenizer import PlannerTokenizer

VOCAB_SIZE, TEXT_SIZE, AUDIO_TOKENS = 217_204, 151_643, 65_535


def config(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int) -> ModelConfig:
    return ModelConfig(hidden, mlp, layers, heads, kv_heads, head_dim, VOCAB_SIZE, 1e6, 1e-6, True, 40_960)


# A size that a CPU can step often, and the three that are published.
SIZES = {
    "mid": config(512, 8, 8, 4, 64, 1_536),
    "0.6B": config(1_024, 28, 16, 8, 128, 3_072),
    "1.7B": config(2_048, 28, 16, 8, 128, 6_144),
    "4B": config(2_560, 36, 32, 8, 128, 9_728),
}


def true_tokens() -> tuple[dict[str, int], dict[str, int]]:
    """Text tokens and added ones with their published ids; the text tokens beyond single bytes are fillers."""
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {f"filler{i}": i for i in range(len(vocab), TEXT_SIZE)}
    names = [*SPECIAL_TOKENS, *(f"<|audio_code_{n}|>" for n in range(AUDIO_TOKENS))]
    return vocab, {name: TEXT_SIZE + i for i, name in enumerate(names)}


def true_vocabulary() -> PlannerTokenizer:
    """A tokenizer of `true_tokens`."""
    vocab, added = true_tokens()
    return PlannerTokenizer(byte_level_bpe(vocab, []), added, source="benchmark")


def random_model(size: str, device: torch.device, dtype: torch.dtype, max_len: int) -> PlannerModel:
    c = SIZES[size]
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, device=device, dtype=dtype).normal_(0.0, 0.04, generator=generator)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    embedding = matrix(c.vocab_size, c.hidden_size)
    layers = [
        DecoderLayer(
            input_norm=ones(c.hidden_size),
            qkv=matrix((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden_size),
            qk_norm=ones(c.heads + c.kv_heads, c.head_dim),
            out=matrix(c.hidden_size, c.heads * c.head_dim),
            mlp_norm=ones(c.hidden_size),
            gate_up=matrix(2 * c.intermediate_size, c.hidden_size),
            down=matrix(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.layers)
    ]
    return PlannerModel(c, embedding, layers, ones(c.hidden_size), embedding, max_len)


def transformers_model(model: PlannerModel) -> torch.nn.Module:
    """transformers' own Qwen3 over the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    hf = Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        rope_theta=c.rope_theta, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=True, max_position_embeddings=c.max_positions,
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": model.embedding,
        "lm_head.weight": model.embedding,
        "model.norm.weight": model.norm,
    }
    queries, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv.split((queries, kv, kv))
        gate, up = layer.gate_up.chunk(2)
        parts = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.out,
            "self_attn.q_norm": layer.qk_norm[0], "self_attn.k_norm": layer.qk_norm[-1],
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
            "input_layernorm": layer.input_norm, "post_attention_layernorm": layer.mlp_norm,
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    with torch.device("meta"):
        reference = Qwen3ForCausalLM(hf)
    reference.load_state_dict(state, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(hf)  # its table is no weight: made outside of meta
    return reference.to(model.device).eval()
