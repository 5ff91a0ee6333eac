"""The fields of `/release_task` as data: names, aliases and defaults of ACE-Step's server of June 2026; what newer ones added is known, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from acestep import words
from acestep.controls import GUIDANCE, SamplingControls
from acestep.request import MAX_PROMPT_CHARS, MAX_SEED

Kind = Literal["str", "text", "bool", "int", "float", "raw"]
METADATA_SOURCES = ("metas", "meta", "metadata", "user_metadata", "userMetadata")
_APG = GUIDANCE["apg_classic"]
_OF_APG = "The same as in guidance_params of apg_classic."


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        aliases: Other names, in order; the name itself goes first.
        low, high: Numbers outside are moved to the border, with a warning.
        choices: Other values are refused.
        no_effect: Why the field changes nothing here; said as a warning where it is sent with another value than the default.
        empty_is_value: An empty text in JSON is meant, not missing.
        read: Reads the value; what it cannot read is left out, with a warning.
        join: Between the entries of a list, for texts.
    """

    name: str
    kind: Kind
    default: Any = None
    aliases: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    no_effect: str = ""
    empty_is_value: bool = False
    about: str = ""
    read: Callable[[Any], Any] | None = None
    join: str = ", "


def _fields() -> Iterable[Field]:
    s: Kind = "str"
    b: Kind = "bool"
    i: Kind = "int"
    f: Kind = "float"
    # Text and mode
    t: Kind = "text"
    yield Field("prompt", t, "", ("caption",), about="Description of the music.")
    yield Field("lyrics", t, "", join="\n", about="Empty, [inst], (Instrumental), N/A: instrumental.")
    yield Field(
        "instrumental",
        b,
        False,
        ("isInstrumental", "is_instrumental", "makeInstrumental", "make_instrumental"),
        about="Nobody sings.",
    )
    yield Field("global_caption", t, "", about="The whole song, for tasks on single tracks.")
    yield Field("thinking", b, False, about="The planner writes audio codes first.")
    yield Field("sample_mode", b, False, ("sampleMode",), about="The planner writes the song's text.")
    yield Field(
        "sample_query", t, "", ("sampleQuery", "description", "desc"), about="What about; switches sample mode on."
    )
    yield Field("use_format", b, False, ("useFormat", "format"), about="The planner rewrites caption and lyrics.")
    yield Field(
        "vocal_language",
        s,
        None,
        ("vocalLanguage", "language"),
        read=words.read_language,
        about="Left out: the planner decides.",
    )
    yield Field("model", s, None, ("model_name", "modelName", "dit_model", "ditModel"))
    yield Field("task_type", s, "text2music", ("taskType",))
    yield Field("instruction", s, "")
    yield Field("track_name", s, None, ("trackName",))
    yield Field("track_classes", "raw", None, ("trackClasses", "instruments"))
    yield Field("analysis_only", b, False, ("analysisOnly",), about="Metadata only, no audio.")
    yield Field("full_analysis_only", b, False, ("fullAnalysisOnly",), about="Describe the source audio.")
    yield Field("extract_codes_only", b, False, ("extractCodesOnly",), about="Audio codes of the source audio.")
    # Music
    yield Field("bpm", i, None, low=30, high=300, read=words.read_bpm)
    yield Field("key_scale", s, None, ("keyscale", "keyScale", "key"), read=words.read_key)
    yield Field("time_signature", s, None, ("timesignature", "timeSignature"), read=words.read_time_signature)
    yield Field(
        "audio_duration",
        f,
        None,
        ("duration", "audioDuration", "target_duration", "targetDuration"),
        low=10,
        high=600,
        read=words.read_duration,
    )
    # Sampling
    yield Field("inference_steps", i, None, ("inferenceSteps",), low=1, high=200)
    yield Field("guidance_scale", f, None, ("guidanceScale",), low=1, high=30)
    yield Field("use_random_seed", b, True, ("useRandomSeed",))
    yield Field(
        "seed", "raw", -1, about="A number, or several separated by commas; used where use_random_seed is false."
    )
    yield Field("batch_size", i, 2, low=1, high=8)
    yield Field("shift", f, 3.0, low=0.1, high=10, about="Not used with timesteps.")
    yield Field("infer_method", s, "ode", ("inferMethod",), choices=("ode", "sde"))
    yield Field("timesteps", s, None, about="Falling numbers from 1 to 0, separated by commas.")
    yield Field("cfg_interval_start", f, 0.0, low=0, high=1)
    yield Field("cfg_interval_end", f, 1.0, low=0, high=1)
    yield Field("audio_format", s, "mp3", ("audioFormat",), choices=words.FORMATS, read=words.read_format)
    yield Field("sampler_mode", s, "euler", ("samplerMode",), choices=("euler", "heun"))
    # Source audio
    yield Field("reference_audio_path", s, None, ("ref_audio_path", "referenceAudioPath", "refAudioPath"))
    yield Field("src_audio_path", s, None, ("ctx_audio_path", "sourceAudioPath", "srcAudioPath", "ctxAudioPath"))
    yield Field("repainting_start", f, 0.0, words.WINDOW_START[1:], low=-600, high=600, read=words.read_seconds)
    yield Field("repainting_end", f, None, words.WINDOW_END[1:], low=-1, high=1200, read=words.read_seconds)
    yield Field(
        "audio_cover_strength", f, 1.0, ("audioCoverStrength", "cover_strength", "coverStrength"), low=0, high=1
    )
    yield Field("cover_noise_strength", f, 0.0, ("coverNoiseStrength",), low=0, high=1)
    yield Field("audio_code_string", "raw", "", ("audioCodeString", "audio_codes"))
    yield Field("chunk_mask_mode", s, "explicit", choices=("explicit", "auto"))
    yield Field(
        "repaint_latent_crossfade_frames",
        i,
        None,
        low=0,
        high=250,
        about="Not sent: by repaint_mode and repaint_strength.",
    )
    yield Field(
        "repaint_wav_crossfade_sec", f, None, low=0, high=10, about="Not sent: by repaint_mode and repaint_strength."
    )
    yield Field("repaint_mode", s, "balanced", choices=("conservative", "balanced", "aggressive"))
    yield Field("repaint_strength", f, 0.5)
    # Planner
    yield Field(
        "lm_backend", s, "vllm", choices=("vllm", "pt", "mlx"), no_effect="every planner here has its own engine"
    )
    yield Field("lm_model_path", s, None, about="Planner checkpoint: the one that was chosen when the server started.")
    yield Field(
        "lm_seed", i, None, low=0, high=MAX_SEED, about="Of a result's entry: with its seed, that song again alone."
    )
    yield Field("lm_temperature", f, 0.85, low=0, high=2)
    yield Field("lm_cfg_scale", f, 2.5, low=1, high=20)
    yield Field("lm_top_k", i, 0, low=0, high=1_000_000)
    yield Field("lm_top_p", f, 0.9)
    yield Field("lm_repetition_penalty", f, 1.0, low=0.1, high=10)
    yield Field("lm_negative_prompt", t, "NO USER INPUT", empty_is_value=True)
    yield Field("use_cot_metas", b, True, ("cot_metas", "cot-metas"))
    yield Field("use_cot_caption", b, True, ("cot_caption", "cot-caption"))
    yield Field("use_cot_language", b, True, ("cot_language", "cot-language"))
    yield Field(
        "constrained_decoding",
        b,
        True,
        ("constrainedDecoding", "constrained"),
        no_effect="decoding is always constrained",
    )
    yield Field(
        "constrained_decoding_debug", b, False, ("constrainedDecodingDebug",), no_effect="there is no debug output"
    )
    yield Field("is_format_caption", b, False, ("isFormatCaption",), no_effect="it never had one")
    yield Field(
        "allow_lm_batch", b, True, ("allowLmBatch", "parallel_thinking"), no_effect="the planner always batches"
    )
    yield Field(
        "enable_normalization", b, None, ("enableNormalization",),
        about="Peak at normalization_db. Not sent: yes, but not for repaint, lego, extract and complete.",
    )  # fmt: skip
    yield Field("normalization_db", f, None, ("normalizationDb",), low=-60, high=0, about="-1 where not sent.")
    yield Field(
        "mp3_bitrate",
        "raw",
        None,
        ("mp3Bitrate", "bitrate_kbps", "bitrate"),
        about="kbit/s of mp3, opus and aac; also as 128k.",
    )
    yield Field(
        "mp3_sample_rate",
        i,
        48000,
        ("mp3SampleRate", "sample_rate", "sampleRate"),
        about="48000 or 44100; opus has 48000 only.",
    )
    yield Field("fade_in_duration", f, 0.0, ("fadeInDuration", "fade_in"), low=0, high=60)
    yield Field("fade_out_duration", f, 0.0, ("fadeOutDuration", "fade_out"), low=0, high=60)
    # Extensions: adapters may be chosen by request here.
    yield Field("lora_path", s, None, about="An adapter for this song, instead of the one of /v1/lora/load.")
    yield Field("lora_scale", f, 1.0, low=0, high=4)
    yield Field("lora", "raw", None, about='Several adapters: [{"path": ..., "scale": ...}, ...].')
    yield Field("lm_lora", "raw", None, about="Adapters of the planner, likewise.")
    # Sent by newer clients
    yield Field("use_tiled_decode", b, True, ("useTiledDecode",), no_effect="tiles follow the card's memory")
    yield Field("eta", f, _APG["eta"].default, low=_APG["eta"].low, high=_APG["eta"].high, about=_OF_APG)
    yield Field(
        "momentum", f, _APG["momentum"].default, low=_APG["momentum"].low, high=_APG["momentum"].high, about=_OF_APG
    )
    yield from _controls()


def _controls() -> Iterable[Field]:
    """The fields of `SamplingControls`, with their names, defaults, limits and choices; as a model it knows them all."""
    properties = SamplingControls.model_json_schema()["properties"]
    for name, info in SamplingControls.model_fields.items():
        found = properties[name]
        kinds: dict[str, Kind] = {"boolean": "bool", "integer": "int", "number": "float", "string": "str"}
        schema = next((kind for kind in found.get("anyOf", ()) if kind.get("type") == "boolean"), found)
        kind = kinds.get(schema.get("type"), "raw")
        yield Field(
            name,
            "text" if kind == "str" and schema.get("maxLength", 0) >= MAX_PROMPT_CHARS else kind,
            info.default,
            (re.sub(r"_(\w)", lambda found: found[1].upper(), name),),
            low=schema.get("minimum"),
            high=schema.get("maximum"),
            choices=tuple(schema.get("enum", ())),
            join="\n" if name.endswith("lyrics") else ", ",
        )


FIELDS: dict[str, Field] = {f.name: f for f in _fields()}
KNOWN = frozenset(n for f in FIELDS.values() for n in (f.name, *f.aliases)).union(
    METADATA_SOURCES, ("param_obj", "ai_token")
)
