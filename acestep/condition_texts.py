"""The two texts that the DiT is conditioned on, in the exact form it was trained with."""

from __future__ import annotations

from acestep.plan import Metadata
from acestep.request import INSTRUMENTAL, SongRequest

MAX_TEXT_TOKENS = 256
MAX_LYRIC_TOKENS = 2_048
LYRICS_END = "<|endoftext|>"
_LYRICS_BEGIN = "\n\n# Lyric\n"


def caption_text(
    request: SongRequest, metadata: Metadata, instruction: str, seconds: float, *, lego_sft: bool = False
) -> str:
    """Instruction, caption and metadata. What is not known is `N/A`; the duration is that of the whole song.

    Args:
        lego_sft: The checkpoint knows captions of the whole song and a part of it.
    """
    bpm = request.bpm or metadata.bpm or "N/A"
    time_signature = request.time_signature or metadata.timesignature or "N/A"
    key = request.key_scale or metadata.keyscale or "N/A"
    instruction = instruction if instruction.endswith(":") else f"{instruction}:"
    return (
        f"# Instruction\n{instruction}\n\n"
        f"# Caption\n{_caption(request, metadata, lego_sft)}\n\n"
        f"# Metas\n- bpm: {bpm}\n- timesignature: {time_signature}\n- keyscale: {key}\n- duration: {int(seconds)} seconds\n"
        "<|endoftext|>\n"
    )


def lyrics_text(request: SongRequest, metadata: Metadata) -> str:
    """Language and lyrics."""
    asked = request.vocal_language if request.vocal_language != "unknown" else None
    planned = metadata.language if request.use_cot_language else None
    lyrics = INSTRUMENTAL if request.instrumental else request.lyrics
    return f"# Languages\n{asked or planned or 'unknown'}{_LYRICS_BEGIN}{lyrics}{LYRICS_END}"


def lyrics_header(text: str) -> str:
    """What stands before the lyrics in a text of `lyrics_text`."""
    return text[: text.index(_LYRICS_BEGIN) + len(_LYRICS_BEGIN)]


def _caption(request: SongRequest, metadata: Metadata, lego_sft: bool) -> str:
    caption = metadata.caption if request.use_cot_caption and metadata.caption else request.prompt
    if not (lego_sft and request.global_caption):
        return caption
    # The form in which such models were trained: the whole song, then the part.
    control = "true" if request.chunk_mask_mode == "explicit" else "false"
    return f"Global: {request.global_caption}\nLocal: {caption}\nMask Control: {control}"
