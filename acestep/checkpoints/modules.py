"""All that the renderer takes from diffusers and transformers, imported here and nowhere else, one by one and without their chatter.

Importing them costs seconds, so only code that builds or loads models imports this module.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from acestep.checkpoints.lean import lean

with lean():
    from transformers.utils import logging as transformers_logging

# Optional accelerators complain while they are imported (kernels built for another torch, deprecated registrations).
# None of it can be acted upon by a user of this project.
_CHATTY = (
    "torchao", "torch.utils._pytree", "diffusers.quantizers", "diffusers.configuration_utils", "transformers", "accelerate", "peft",
)  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide third-party warnings and progress bars, not errors, for the duration of a block."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


with quiet(), lean():
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
    from diffusers.models.autoencoders.autoencoder_oobleck import (
        AutoencoderOobleck,
        OobleckDecoder,
        OobleckResidualUnit,
        Snake1d,
    )
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.ace_step_transformer import (
        AceStepAttention,
        AceStepAttnProcessor2_0,
        AceStepTransformer1DModel,
        _ace_step_rotary_freqs,
    )
    from diffusers.pipelines.ace_step.modeling_ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )
    from transformers import AutoTokenizer
    from transformers.initialization import no_init_weights
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

rotary_freqs = _ace_step_rotary_freqs

__all__ = [
    "AceStepAttention",
    "AceStepAttnProcessor2_0",
    "AceStepAudioTokenDetokenizer",
    "AceStepAudioTokenizer",
    "AceStepConditionEncoder",
    "AceStepTransformer1DModel",
    "AutoTokenizer",
    "AutoencoderOobleck",
    "MomentumBuffer",
    "OobleckDecoder",
    "OobleckResidualUnit",
    "Qwen3Model",
    "Snake1d",
    "apply_rotary_emb",
    "component_class",
    "no_init_weights",
    "normalized_guidance",
    "quiet",
    "rotary_freqs",
]

_CLASSES: dict[str, Any] = {
    "transformer": AceStepTransformer1DModel,
    "condition_encoder": AceStepConditionEncoder,
    "audio_tokenizer": AceStepAudioTokenizer,
    "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
    "vae": AutoencoderOobleck,
    "text_encoder": Qwen3Model,
}


def component_class(name: str) -> Any:
    """The class of a renderer component by its folder name."""
    return _CLASSES[name]
