"""The tiny planner: random weights in the published layout, so that every line of the real path runs without a download.

It has the true vocabulary's order (byte-level BPE, Qwen's special tokens, audio codes, unused audio codes) at a thousandth of its
size. It makes noise, not music; `"acestep_tiny": true` in its `config.json` says so to whoever loads it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

# Qwen3's special tokens, in the order of their ids.
SPECIAL_TOKENS = tuple(
    """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call>
<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>
<think> </think>
""".split()  # noqa: SIM905
)
TINY_CODES = 2_000
TINY_PADDING_CODES = range(64_000, 64_032)  # audio tokens that exist in the vocabulary and are never valid output

# Byte-level spelling: "Ġ" is a space, "Ċ" a newline. Each word becomes a token, and so do its prefixes.
_MERGED_WORDS = """
bpm caption duration keyscale language timesignature genres minor major Ġminor Ġmajor Caption Lyric Instruction Generate
audio Ġaudio semantic tokens based given conditions system user assistant instrumental Ġthe Ġand Ġof Ġa Ġwith Ġpiano
Ġdrums Ġvoice Verse Chorus false true .Ċ ,Ċ ĊĊ ]Ċ ĠĠ ``
""".split()  # noqa: SIM905

_HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP = 64, 2, 4, 2, 16, 128
_STD = 0.08  # of every matrix; gives logits with a spread of about 0.6
_SHARED = 0.6  # what every position has in its first dimension, which no layer changes
_NEWLINE = 2.5  # what newlines have there beyond it, which makes them likely: a caption ends after some dozen tokens, as a trained planner's


def write_tiny_planner(folder: Path, *, seed: int = 0) -> None:
    """Write a random Qwen3 planner checkpoint of about 1 MB. The same seed gives the same bytes.

    Raises:
        OSError: `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = _bpe()
    audio = [f"<|audio_code_{n}|>" for n in (*range(TINY_CODES), *TINY_PADDING_CODES)]
    added = {token: len(vocab) + i for i, token in enumerate((*SPECIAL_TOKENS, *audio))}
    write_tokenizer(folder, vocab, merges, added)
    vocab_size = len(vocab) + len(added)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "acestep_tiny": True,
        "vocab_size": vocab_size,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 40_960,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": added["<|endoftext|>"],
        "eos_token_id": added["<|im_end|>"],
        "pad_token_id": added["<|endoftext|>"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    from safetensors.numpy import save_file

    weights = _weights(vocab_size, seed, newline=vocab["Ċ"], never=_half_characters(vocab))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte alphabet, then every prefix of the merged words."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _MERGED_WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return vocab, merges


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, int]) -> None:
    """Write the tokenizer's files: byte-level BPE, and `added` tokens by name."""
    from acestep.checkpoints.bpe import byte_level_bpe

    document = json.loads(byte_level_bpe(vocab, merges).to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"] = [{"id": id, "content": token, **flags} for token, id in added.items()]

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text + "\n", encoding="utf-8")

    write("tokenizer.json", json.dumps(document, ensure_ascii=False))
    write("vocab.json", json.dumps(vocab, ensure_ascii=False))
    write("merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]))
    write("added_tokens.json", json.dumps(added))
    write(
        "tokenizer_config.json",
        json.dumps({
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 40_960,
        }),
    )  # fmt: skip


def _half_characters(vocab: dict[str, int]) -> list[int]:
    """Ids of the bytes that are no character of their own: 0x80 and above."""
    from acestep.checkpoints.bpe import byte_level_bpe

    decode = byte_level_bpe(vocab, []).decode
    return [id for id in vocab.values() if decode([id]) == "\ufffd"]


def _weights(vocab_size: int, seed: int, *, newline: int, never: list[int]) -> dict[str, np.ndarray]:
    """`never`: ids that are read and not written, as a trained planner writes whole characters."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(_STD)

    embedding = matrix(vocab_size, _HIDDEN)
    embedding[:, 0], embedding[never, 0] = _SHARED, -50 * _SHARED  # tied: they lie far from every position
    embedding[newline, 0] += _NEWLINE
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(_LAYERS):
        p = f"model.layers.{layer}."
        weights |= {
            p + "self_attn.q_proj.weight": matrix(_HEADS * _HEAD_DIM, _HIDDEN),
            p + "self_attn.k_proj.weight": matrix(_KV_HEADS * _HEAD_DIM, _HIDDEN),
            p + "self_attn.v_proj.weight": matrix(_KV_HEADS * _HEAD_DIM, _HIDDEN),
            p + "self_attn.o_proj.weight": matrix(_HIDDEN, _HEADS * _HEAD_DIM),
            p + "mlp.gate_proj.weight": matrix(_MLP, _HIDDEN),
            p + "mlp.up_proj.weight": matrix(_MLP, _HIDDEN),
            p + "mlp.down_proj.weight": matrix(_HIDDEN, _MLP),
        }
        norms = {"self_attn.q_norm": _HEAD_DIM, "self_attn.k_norm": _HEAD_DIM,
                 "input_layernorm": _HIDDEN, "post_attention_layernorm": _HIDDEN}  # fmt: skip
        weights |= {f"{p}{name}.weight": np.ones(size, np.float32) for name, size in norms.items()}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{p}{name}.weight"][0] = 0.0
    weights["model.norm.weight"] = np.ones(_HIDDEN, np.float32)
    return weights
