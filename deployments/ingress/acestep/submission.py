"""From the fields of `/release_task` to a job."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acestep.checkpoints.published import VariantDefaults, default_name, expected_defaults
from acestep.errors import InvalidRequest
from acestep.formats import check_formats
from acestep.request import INSTRUMENTAL, MAX_SEED, NO_USER_INPUT, Adjustment, Lora, SongRequest
from acestep.tasks import RULES
from acestep.words import is_instrumental, read_bitrate, split_names
from deployments.dispatch.texts import PREPARE
from deployments.ingress.acestep.controls import control_fields
from deployments.ingress.acestep.editing import source_fields
from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.acestep.values import Values
from deployments.ingress.bodies import parse_json

_LANGUAGE_NAMES = {
    "english": "en", "chinese": "zh", "mandarin": "zh", "japanese": "ja", "korean": "ko", "spanish": "es", "french": "fr",
    "german": "de", "italian": "it", "portuguese": "pt", "russian": "ru", "bengali": "bn", "hindi": "hi", "arabic": "ar",
    "thai": "th", "vietnamese": "vi", "indonesian": "id", "turkish": "tr", "dutch": "nl", "polish": "pl",
}  # fmt: skip
_WORDS_TOO = ("hi", "id", "it")  # codes that are everyday words as well
WRITTEN = ("prompt", "lyrics", "bpm", "key_scale", "time_signature", "audio_duration")  # by sample mode


@dataclass(frozen=True)
class Submission:
    """A job to be: its request, how far it goes, what the answer needs later, and what was changed."""

    request: SongRequest
    kind: str
    extra: dict[str, Any]
    warnings: tuple[Adjustment, ...]


@dataclass(frozen=True)
class Served:
    """What the fleet serves, as far as names matter here."""

    renderers: Mapping[str, VariantDefaults]
    planner: str | None


def build(v: Values, served: Served, loras: Sequence[Lora] = ()) -> Submission:
    """The job that the fields ask for.

    Args:
        loras: The caller's default, for a request that names no adapter.

    Raises:
        InvalidRequest, pydantic.ValidationError: a field is wrong in a way that cannot be put right.
    """
    for name, why in v.unread.items():
        if FIELDS[name].kind == "text":
            raise InvalidRequest(f"{name}: {why}", field=name)
    _voice(v)
    kind = "understand" if v["full_analysis_only"] else "codes" if v["extract_codes_only"] else "song"
    if kind == "song" and v["analysis_only"]:
        kind = "plan"
    fields = source_fields(v, kind)
    fields |= _text(v) | _music(v) | _planner(v, served) | _renderer(v, served, kind, loras)
    prepare = _prepare(v, fields)
    if kind in ("codes", "understand"):
        if fields.get("src_audio") is None and fields.get("audio_codes") is None:
            raise InvalidRequest("src_audio_path: this analysis needs source audio", field="src_audio_path")
        fields = {k: fields[k] for k in ("prompt", "lyrics", "src_audio", "audio_codes") if k in fields}
        fields["thinking"] = False
        prepare = []
    elif v["thinking"]:
        fields["thinking"] = _thinks(v, fields, kind)
    request = SongRequest.model_validate(fields)
    compat = {"kind": kind, "prompt": v["prompt"], "lyrics": v["lyrics"], "format": v["audio_format"]}
    extra: dict[str, Any] = {"compat": compat, **({PREPARE: prepare} if prepare else {})}
    return Submission(request, kind, extra, tuple(v.warnings))


def _thinks(v: Values, fields: dict[str, Any], kind: str) -> bool:
    if kind == "plan":
        reason = "analysis_only asks for metadata alone"
    elif not RULES[fields["task"]].metadata:
        reason = f"task {fields['task']} works on source audio"
    elif fields["flow_edit_morph"]:
        reason = "flow edit works on source audio"
    elif fields["audio_codes"] is not None:
        reason = "the request brings its codes"
    else:
        return True
    v.warn("thinking", True, False, reason)
    return False


def _text(v: Values) -> dict[str, Any]:
    instruction = v["instruction"].strip()
    if instruction == RULES["text2music"].instruction:  # what clients send as "the default": every task has its own
        instruction = ""
    return {"prompt": v["prompt"], "lyrics": v["lyrics"], "instruction": instruction or None}


def _voice(v: Values) -> None:
    """`instrumental` is a way to write lyrics."""
    if not v["instrumental"]:
        return
    if is_instrumental(v["lyrics"]):
        v.values["lyrics"] = v["lyrics"] or INSTRUMENTAL
    else:
        v.warn("instrumental", True, False, "the request brings its lyrics")


def _music(v: Values) -> dict[str, Any]:
    return {
        "duration": v["audio_duration"],
        "bpm": v["bpm"],
        "key_scale": v["key_scale"],
        "time_signature": v["time_signature"],
        "vocal_language": v["vocal_language"],
        "batch_size": v["batch_size"],
        "seed": _seed(v),
    }


def _seed(v: Values) -> int | tuple[int, ...] | None:
    """Seeds as given where `use_random_seed` is off; missing ones of a batch go on from the last."""
    asked = v["seed"]
    if v["use_random_seed"]:
        if asked not in (None, "", -1, "-1"):
            v.warn("seed", asked, None, "use_random_seed is true, which it is unless the request says otherwise")
        return None
    return _seeds(v, "seed", asked)


def _seeds(v: Values, field: str, asked: Any) -> tuple[int, ...] | None:
    seeds, bad = [], []
    for text in split_names(asked):
        if re.fullmatch(r"\d{1,19}(\.0+)?", text, re.ASCII) and (seed := int(text.partition(".")[0])) <= MAX_SEED:
            seeds.append(seed)
        elif text != "-1":
            bad.append(text)
    if bad:
        v.warn(field, ",".join(bad), None, f"not a number from 0 to {MAX_SEED}")
    if not seeds:
        return None
    size = v["batch_size"]
    if len(seeds) > size:
        v.warn(field, len(seeds), size, "more seeds than songs")
    while len(seeds) < size:
        seeds.append((seeds[-1] + 1) % (MAX_SEED + 1))
    return tuple(seeds[:size])


def _planner(v: Values, served: Served) -> dict[str, Any]:
    if v["lm_model_path"] and not _same(v["lm_model_path"], served.planner):
        v.warn("lm_model_path", v["lm_model_path"], served.planner, "this server's planner was chosen when it started")
    return {
        "thinking": v["thinking"],
        "use_cot_metas": v["use_cot_metas"] and not _wants_sample(v),
        "use_cot_caption": v["use_cot_caption"],
        "use_cot_language": v["use_cot_language"],
        "lm_seed": v["lm_seed"],
        "lm_temperature": v["lm_temperature"],
        "lm_cfg_scale": v["lm_cfg_scale"],
        "lm_top_k": v["lm_top_k"],
        "lm_top_p": _top_p(v),
        "lm_repetition_penalty": v["lm_repetition_penalty"],
        "lm_negative_prompt": v["lm_negative_prompt"],
        "lm_lora": _named(v, "lm_lora"),
    }


def _top_p(v: Values) -> float:
    """As ACE-Step's server, whatever its documents say: 0 and 1 do not switch it off."""
    asked: float = v["lm_top_p"]
    if 0.0 < asked < 1.0:
        return asked
    v.warn("lm_top_p", asked, 0.9, "must be above 0 and below 1")
    return 0.9


def _renderer(v: Values, served: Served, kind: str, loras: Sequence[Lora]) -> dict[str, Any]:
    model = _model(v, served)
    model_or_first = model or next(iter(served.renderers), None)
    defaults = served.renderers[model_or_first] if model_or_first else expected_defaults(default_name("renderer"))
    steps = v["inference_steps"]
    if steps is not None and steps > defaults.max_steps and kind == "song":
        v.warn("inference_steps", steps, defaults.max_steps, "more bring nothing for this checkpoint")
        steps = defaults.max_steps
    start, end = v["cfg_interval_start"], v["cfg_interval_end"]
    if start > end:
        v.warn("cfg_interval_start", start, 0.0, "it is above cfg_interval_end")
        start = 0.0
    sampler = v["sampler_mode"]
    if sampler == "heun" and v["infer_method"] == "sde":
        v.warn("sampler_mode", "heun", "euler", "heun is a method for ode")
        sampler = "euler"
    timesteps = _timesteps(v, defaults.max_steps)
    return {
        "model": model,
        "steps": steps,
        "guidance_scale": v["guidance_scale"],
        "shift": v["shift"] if timesteps is None else None,
        "timesteps": timesteps,
        "infer_method": v["infer_method"],
        "sampler": sampler,
        "cfg_interval_start": start,
        "cfg_interval_end": end,
        "formats": (v["audio_format"],),
        **_file(v),
        "normalize": v["enable_normalization"],
        "normalization_db": v["normalization_db"],
        "lora": _loras(v, loras),
        **control_fields(v, lambda name, asked: _seeds(v, name, asked)),
    }


def _loras(v: Values, default: Sequence[Lora]) -> Any:
    """What `lora` names, else `lora_path`, else the caller's default; `SongRequest` checks it."""
    named, path = _named(v, "lora"), v["lora_path"]
    if named and path:
        v.warn("lora_path", path, None, "lora goes first")
    if v["lora_scale"] != 1.0 and (named or not path):
        v.warn("lora_scale", v["lora_scale"], None, "there is no lora_path")
    return named or ({"path": path, "scale": v["lora_scale"]} if path else tuple(default))


def _named(v: Values, field: str) -> Any:
    named = v[field]
    if not isinstance(named, str):
        return named
    try:  # in a form
        return parse_json(named.encode())
    except ValueError:
        raise InvalidRequest(f"{field}: must be a JSON list of objects with path and scale", field=field) from None


def _file(v: Values) -> dict[str, Any]:
    """How the file is written. What the format cannot have is left out, with a warning."""
    form, rate, asked = v["audio_format"], v["mp3_sample_rate"], v["mp3_bitrate"]
    bitrate = read_bitrate(asked) if asked not in (None, "") else None
    given: dict[str, Any] = {"sample_rate": rate, "bitrate_kbps": bitrate}
    if rate not in (48_000, 44_100):
        v.warn("mp3_sample_rate", rate, 48_000, "must be 48000 or 44100")
        given["sample_rate"] = 48_000
    if bitrate is not None and (isinstance(bitrate, bool) or not isinstance(bitrate, int)):
        v.warn("mp3_bitrate", asked, None, "not a whole number of kbit/s")
        given["bitrate_kbps"] = None
    for name, field, default in (("mp3_sample_rate", "sample_rate", 48_000), ("mp3_bitrate", "bitrate_kbps", None)):
        alone = {"sample_rate": 48_000, "bitrate_kbps": None, field: given[field]}
        try:
            check_formats((form,), **alone)
        except InvalidRequest as error:
            v.warn(name, v[name], default, error.message.partition(": ")[2])
            given[field] = default
    return {**given, **{name: v[name] for name in ("fade_in_duration", "fade_out_duration")}}


def _model(v: Values, served: Served) -> str | None:
    asked = (v["model"] or "").strip().rstrip("/").rpartition("/")[2]
    if not asked:
        return None
    for name in served.renderers:
        if _same(asked, name):
            return name
    default = next(iter(served.renderers), None)
    v.warn("model", v["model"], default, "not served here" if default else "no renderer has said yet what it serves")
    return None


def _same(asked: str, name: str | None) -> bool:
    def short(text: str) -> str:
        return text.rstrip("/").rpartition("/")[2].casefold()

    return name is not None and short(asked) == short(name)


def _timesteps(v: Values, most: int) -> tuple[float, ...] | None:
    if not v["timesteps"] or not v["timesteps"].strip():
        return None
    try:
        steps = [float(part) for part in v["timesteps"].strip("[]() ").split(",") if part.strip()]
    except ValueError:
        steps = []
    if steps and steps[-1] == 0.0:
        steps.pop()  # the end of every schedule; ours do not name it
    falling = all(b < a for a, b in itertools.pairwise(steps))
    if not steps or not falling or len(steps) > most or not all(0.0 < s <= 1.0 for s in steps):
        v.warn("timesteps", v["timesteps"], None, f"not up to {most} falling numbers from 1 to 0; steps and shift hold")
        return None
    return tuple(steps)


def _wants_sample(v: Values) -> bool:
    return bool(v["sample_mode"] or v["sample_query"].strip())


def _prepare(v: Values, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """What the planner writes before it plans."""
    sampling = {"temperature": v["lm_temperature"], "top_k": v["lm_top_k"], "top_p": fields["lm_top_p"]}
    steps: list[dict[str, Any]] = []
    if _wants_sample(v):
        query = v["sample_query"].strip() or NO_USER_INPUT
        instrumental, language = read_query(query)
        no_voice = bool(v["lyrics"].strip()) and is_instrumental(v["lyrics"])
        instrumental = instrumental or no_voice
        for name in WRITTEN:
            if v[name] not in (None, "") and not (name == "lyrics" and no_voice):
                v.warn(name, v[name], None, "sample mode writes its own")
        language = v["vocal_language"] or language
        wish = {"query": query, "instrumental": instrumental, "vocal_language": language, **sampling}
        steps.append({"ask": "inspire", "fields": wish})
    if v["use_format"]:
        if steps or v["prompt"].strip() or v["lyrics"].strip():
            steps.append({"ask": "format", "fields": sampling})
        else:
            v.warn("use_format", True, False, "there is neither a prompt nor lyrics")
    return steps


def read_query(query: str) -> tuple[bool, str | None]:
    """Whether a wish asks for music without voice, and the language it names."""
    text = query.lower().strip()
    instrumental = any(w in text for w in ("instrumental", "pure music", "pure instrument")) or text.endswith(" solo")
    words = re.findall(r"[a-z]+", text)
    for word in words:
        if word in _LANGUAGE_NAMES:
            return instrumental, _LANGUAGE_NAMES[word]
    codes = set(_LANGUAGE_NAMES.values()).difference(_WORDS_TOO)
    return instrumental, next((word for word in words if word in codes), None)
