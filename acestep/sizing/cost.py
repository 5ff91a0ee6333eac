"""Seconds of work of a request on a card, known before the work starts.

A song of a known length has a known number of planner steps (5 codes per second of audio) and of renderer frames (25 per second), so a
handful of coefficients per card (`Profile`) is enough to weigh it. Profiles come from `acestep.sizing.profiles`; `Corrections` follows the
difference between what was foretold and what was measured. No torch, no Ray: routers and autoscalers import this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from acestep.checkpoints.published import default_name, expected_defaults
from acestep.gpu_config import get_lm_model_size
from acestep.plan import CODES_PER_SECOND, Plan
from acestep.request import SongRequest
from acestep.sizing.weights import renderer_size
from acestep.song import LATENT_FPS
from acestep.tasks import RULES, source_song_s

C = TypeVar("C")
NonNegative = Field(ge=0.0, allow_inf_nan=False)
Positive = Field(gt=0.0, allow_inf_nan=False)

DEFAULT_PLANNER, DEFAULT_RENDERER = default_name("planner"), default_name("renderer")

# What the planner is expected to do where the request leaves it open.
EXPECTED_DURATION_S = 150.0
LYRIC_CHARS_PER_S = 9.0  # three minutes of song have about 1,600 characters
METADATA_STEPS = 25  # sampled tokens of bpm, duration, key, language and time signature; forced runs take one step
CAPTION_STEPS = 120  # 60 to 250 seen; it is most of the reasoning block
PROMPT_TOKENS = 39  # what every prompt holds besides the caller's text
CHARS_PER_TOKEN = 3.0
SCORE_FIELDS, SCORE_FIELD_TOKENS = 5, 12  # bpm, duration, key, language and time signature are weighed each alone
CLIP_FRAMES = 500  # 20 s of audio; songs up to this share a renderer's steps
LISTEN_FORWARDS = (
    0.5  # of a forward: lyrics are followed by the first third of the layers, and their maps are worked out
)
REFERENCE_FRAMES = 750  # three 10 s crops of one reference recording


class PlannerCost(BaseModel):
    """Seconds of one planner (LM) checkpoint on one card.

    A decoding step over `rows` sequences of mean length `context` takes `step_s + rows * (row_s + context * kv_token_s)`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    step_s: float = Positive
    row_s: float = NonNegative
    kv_token_s: float = NonNegative
    prefill_token_s: float = NonNegative
    load_s: float = NonNegative

    def seconds_per_step(self, rows: float, context: float) -> float:
        return self.step_s + rows * (self.row_s + context * self.kv_token_s)


class RendererCost(BaseModel):
    """Seconds of one renderer (DiT + VAE) checkpoint on one card; frames are latent frames, 25 per second of audio.

    One forward over items of f1, f2, ... frames takes `max(floor_s, sum(step_s + f * frame_s + f^2 * frame2_s))`: `floor_s` is what
    launching the kernels costs however small the work is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    floor_s: float = NonNegative
    step_s: float = NonNegative
    frame_s: float = Positive
    frame2_s: float = NonNegative
    conditions_s: float = NonNegative
    condition_token_s: float = NonNegative
    detokenize_frame_s: float = NonNegative
    decode_frame_s: float = Positive
    encode_frame_s: float = NonNegative
    load_s: float = NonNegative

    def seconds_per_forward(self, frames: Iterable[float]) -> float:
        work = sum(self.step_s + f * (self.frame_s + f * self.frame2_s) for f in frames)
        return max(self.floor_s, work)


class Profile(BaseModel):
    """What a card does in a second, and how we know.

    Args:
        price: Relative price of an hour of this card. Only order and ratios matter: "cheapest" means the smallest.
        planners, renderers: By size: see `acestep.gpu_config.get_lm_model_size` and `acestep.sizing.weights.renderer_size`.
        output_s: Seconds of CPU per second of audio, by file format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(max_length=64)
    card: str = Field(max_length=128)
    source: Literal["calculated", "measured"]
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    provenance: str
    memory_gb: float = Positive
    price: float = Positive
    planners: dict[str, PlannerCost] = {}
    renderers: dict[str, RendererCost] = {}
    output_s: dict[str, float] = {}

    def planner(self, model: str | None) -> PlannerCost:
        return _by_size(self.planners, get_lm_model_size(model or DEFAULT_PLANNER), self.name, "planner")

    def renderer(self, model: str | None) -> RendererCost:
        return _by_size(self.renderers, renderer_size(model or DEFAULT_RENDERER), self.name, "renderer")


def _by_size(costs: Mapping[str, C], size: str, profile: str, stage: str) -> C:
    try:
        return costs[size]
    except KeyError:
        raise ValueError(
            f"profile {profile} has no {stage} of size {size}, only {', '.join(costs) or 'none'}"
        ) from None


def forwards(request: SongRequest, model: str | None) -> float:
    """DiT forwards of one item, guidance counted as the second forward that it is."""
    defaults = expected_defaults(model or request.model or DEFAULT_RENDERER)
    steps = len(request.timesteps) if request.timesteps else request.steps or defaults.steps
    guidance = defaults.guidance_scale
    if (
        not defaults.distilled and request.guidance_scale is not None
    ):  # distilled checkpoints run without guidance, whatever is asked
        guidance = request.guidance_scale
    guided = request.cfg_interval_end - request.cfg_interval_start if guidance > 1.0 else 0.0
    if request.flow_edit_morph:
        first = min(int(steps * request.flow_edit_n_min), steps - 1)
        last = max(first, int(steps * request.flow_edit_n_max))
        return ((last - first) * 2.0 * request.flow_edit_n_avg + steps - last) * (1.0 + guided)
    own_words = {(r.prompt, r.lyrics) for r in request.regions if r.prompt is not None or r.lyrics is not None}
    per_step = 1.0 + len(own_words)  # each is evaluated for itself
    if request.sampler == "heun" and request.infer_method == "ode":
        per_step *= 2.0 - 1.0 / steps if defaults.distilled else 2.0
    return steps * per_step * (1.0 + guided)


def listens(request: SongRequest) -> float:
    """DiT forwards of one item that look for its lyrics."""
    if not request.listens or request.instrumental:
        return 0.0
    return LISTEN_FORWARDS * (2 if request.score else 1)  # a score asks the noise, too


def needs_metadata(request: SongRequest) -> bool:
    """Whether the planner fills in bpm, key, time signature, duration, caption or language."""
    if (
        request.plan is not None
        or not RULES[request.task].metadata
        or request.flow_edit_morph
        or not request.use_cot_metas
    ):
        return False
    return not all((request.bpm, request.key_scale, request.time_signature, request.duration))


def needs_codes(request: SongRequest) -> bool:
    """Whether the planner writes audio codes."""
    if not RULES[request.task].codes or request.flow_edit_morph or not request.thinking:
        return False
    return request.audio_codes is None and request.plan is None


def needs_planner(request: SongRequest) -> bool:
    return needs_metadata(request) or needs_codes(request)


def expected_duration(request: SongRequest, plan: Plan | None = None) -> tuple[float, bool]:
    """(seconds of audio per item, whether that is known and not a guess)."""
    if (source_s := source_song_s(request)) is not None:
        return source_s, True
    if request.duration is not None:  # codes are cut or continued to it
        return request.duration, True
    plan = plan or request.plan
    if plan is not None and plan.duration is not None:
        return plan.duration, True
    if request.audio_codes is not None:
        return len(request.audio_codes) / CODES_PER_SECOND, True
    if plan is not None and plan.codes:
        return max(map(len, plan.codes)) / CODES_PER_SECOND, True
    if request.instrumental:
        return EXPECTED_DURATION_S, False
    return min(300.0, max(60.0, len(request.lyrics) / LYRIC_CHARS_PER_S)), False


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time of one stage of one job.

    Attributes:
        wall_s: From its start to its end, others working beside it as stated.
        work_s: What it takes from the replica: wall time less what others get done in it. Adds up to a backlog.
        parts: Where the wall time goes.
    """

    wall_s: float
    work_s: float
    parts: dict[str, float] = field(default_factory=dict)


NOTHING = Seconds(0.0, 0.0)


def plan_rows(request: SongRequest, slots: int) -> int:
    """Rows that a request takes at once in a planner of `slots` rows: two per item with guidance, at most half of the planner."""
    wanted = request.batch_size * (2 if request.lm_cfg_scale > 1.0 else 1) if needs_codes(request) else 1
    return min(wanted, max(2, slots // 2))


def plan_steps(request: SongRequest, duration: float) -> tuple[float, float]:
    """Expected decoding steps (for metadata, for codes)."""
    metadata = 0.0
    if needs_metadata(request):
        metadata = METADATA_STEPS + (CAPTION_STEPS if request.use_cot_caption else 0)
    return metadata, duration * CODES_PER_SECOND if needs_codes(request) else 0.0


def plan_seconds(
    request: SongRequest, cost: PlannerCost, duration: float, *, slots: int = 16, busy_rows: int | None = None
) -> Seconds:
    """Planning of all items of a request.

    Args:
        slots: Rows that the replica runs at once.
        busy_rows: Rows that others keep busy meanwhile; None means every other slot, the state of a loaded fleet.
    """
    if not needs_planner(request):
        return NOTHING
    metadata_steps, code_steps = plan_steps(request, duration)
    prompt = PROMPT_TOKENS + (len(request.prompt) + len(request.lyrics)) / CHARS_PER_TOKEN
    rows = plan_rows(request, slots)
    waves = math.ceil(plan_rows(request, 1 << 30) / rows)
    metadata_rows = 1 if request.lm_share_cot else min(request.batch_size, slots)
    others = max(0, slots - rows) if busy_rows is None else min(busy_rows, max(0, slots - rows))
    context = prompt + code_steps / 2

    prefill = cost.prefill_token_s * prompt * (2 if code_steps else 1)
    scores = score_seconds(request, cost, code_steps) if code_steps and request.score else 0.0
    metadata = metadata_steps * cost.seconds_per_step(others + metadata_rows, prompt)
    codes = waves * code_steps * cost.seconds_per_step(others + rows, context)
    # A full batch divides each step among its rows; the prefill is the request's own.
    full = max(slots, rows)
    work = (
        prefill
        + scores
        + (
            metadata_steps * cost.seconds_per_step(full, prompt) * metadata_rows
            + waves * code_steps * cost.seconds_per_step(full, context) * rows
        )
        / full
    )
    wall = prefill + metadata + codes + scores
    return Seconds(wall, work, {"prefill_s": prefill, "metadata_s": metadata, "codes_s": codes, "scores_s": scores})


def score_seconds(request: SongRequest, cost: PlannerCost, codes: float) -> float:
    """Weighing caption, lyrics and metadata of all items after their codes, and the texts once more without: prefills, and a step each."""
    texts = CAPTION_STEPS + len(request.lyrics) / CHARS_PER_TOKEN
    after = PROMPT_TOKENS + codes + texts + SCORE_FIELDS * SCORE_FIELD_TOKENS
    tokens = request.batch_size * after + PROMPT_TOKENS + texts
    forwards = request.batch_size * (SCORE_FIELDS + 3) + 3
    return tokens * cost.prefill_token_s + forwards * cost.step_s


def render_seconds(
    request: SongRequest,
    cost: RendererCost,
    duration: float,
    *,
    model: str | None = None,
    items: int = 1,
    output_s: Mapping[str, float] | None = None,
) -> Seconds:
    """Rendering of `items` items of a request together on one replica, from conditions to encoded files."""
    frames = duration * LATENT_FPS
    tokens = (len(request.prompt) + len(request.lyrics)) / CHARS_PER_TOKEN
    conditions = cost.conditions_s + tokens * cost.condition_token_s
    if request.src_audio is not None and not request.source_latents:
        conditions += frames * cost.encode_frame_s
    conditions += len(request.reference_audio) * REFERENCE_FRAMES * cost.encode_frame_s
    if needs_codes(request) or request.audio_codes is not None or (request.plan is not None and request.plan.codes):
        conditions += items * frames * cost.detokenize_frame_s
    made = bool(request.latents)  # before: they are only listened to
    denoise = (listens(request) + (0.0 if made else forwards(request, model))) * cost.seconds_per_forward(
        [frames] * items
    )
    decode = 0.0 if made else items * frames * cost.decode_frame_s
    output = 0.0 if made else items * duration * sum((output_s or {}).get(f, 0.0) for f in request.formats)
    parts = {"conditions_s": conditions, "denoise_s": denoise, "decode_s": decode, "encode_s": output}
    total = sum(parts.values())
    return Seconds(total, total, parts)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A request weighed on one card for each stage, alone and without waiting.

    Attributes:
        duration_s: Seconds of audio per item that the numbers hold for.
        plan: All items' planning.
        render_item: One item's rendering.
        render: All items' rendering on one replica.
    """

    duration_s: float
    items: int
    plan: Seconds
    render_item: Seconds
    render: Seconds

    @property
    def total_s(self) -> float:
        return self.plan.wall_s + self.render.wall_s


def estimate(
    request: SongRequest,
    profile: Profile,
    duration: float | None = None,
    *,
    planner: str | None = None,
    renderer: str | None = None,
) -> Estimate:
    """Weigh a request on a machine that does both stages.

    Args:
        duration: Seconds of audio; None takes the request's, else what is expected of the planner.
        planner, renderer: Checkpoint names.
    """
    seconds = expected_duration(request)[0] if duration is None else duration
    cost = profile.renderer(renderer or request.model)
    plan = NOTHING
    if needs_planner(request):
        plan = plan_seconds(request, profile.planner(planner), seconds, busy_rows=0)

    def render(items: int) -> Seconds:
        return render_seconds(
            request, cost, seconds, model=renderer or request.model, items=items, output_s=profile.output_s
        )

    return Estimate(seconds, request.batch_size, plan, render(1), render(request.batch_size))


class Corrections:
    """How much longer things take than the profile says, by (pool, stage), learnt while serving.

    An exponentially weighted mean of log(measured / predicted), each observation clamped, so that one stall or one cached run does not
    move it far. The first observations count more, so that a wrong profile is corrected within a few songs.

    Args:
        half_life: Observations after which an old one counts half.
        limit: No factor leaves [1 / limit, limit].
    """

    def __init__(self, half_life: float = 20.0, limit: float = 32.0) -> None:
        self.half_life = half_life
        self.limit = limit
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}  # (mean log ratio, observations)

    def factor(self, pool: str, stage: str) -> float:
        """Multiply a prediction by this. 1.0 where nothing was observed."""
        seen = self._seen.get((pool, stage))
        return math.exp(seen[0]) if seen else 1.0

    def refine(self, pool: str, stage: str, predicted_s: float, measured_s: float) -> float:
        """Take in one observation; `predicted_s` is the profile's own, without the factor. Returns the new factor.

        Observations that say nothing (a prediction or a measurement of zero or less, or not finite) are left out.
        """
        if not (0.0 < predicted_s < math.inf and 0.0 < measured_s < math.inf):
            return self.factor(pool, stage)
        bound = math.log(self.limit)
        ratio = min(bound, max(-bound, math.log(measured_s) - math.log(predicted_s)))
        mean, count = self._seen.get((pool, stage), (0.0, 0.0))
        weight = max(1.0 / (count + 1.0), 1.0 - 0.5 ** (1.0 / self.half_life))
        if count >= 3:  # once there is an opinion, an outlier moves it by at most a factor of two
            ratio = min(mean + math.log(2.0), max(mean - math.log(2.0), ratio))
        self._seen[pool, stage] = (mean + weight * (ratio - mean), count + 1.0)
        return self.factor(pool, stage)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """`{pool: {stage: factor}}`, for `/v1/cluster`."""
        out: dict[str, dict[str, float]] = {}
        for (pool, stage), (mean, _) in self._seen.items():
            out.setdefault(pool, {})[stage] = math.exp(mean)
        return out
