"""The memory ledger: what a piece of work takes on a card at the peak of each stage, known before it starts.

Used for admission (`admit_render`: no work starts that cannot fit; it is first done in smaller groups and smaller VAE tiles) and printed
by doctor. Pure arithmetic over configurations (`acestep.sizing.weights`, `acestep.sizing.activations`), no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from acestep.condition_texts import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS
from acestep.errors import OutOfMemory
from acestep.plan import CODES_PER_SECOND
from acestep.sizing.activations import (
    CONTEXT_BYTES,
    SILENT_REFERENCE_FRAMES,
    SMALLEST_CORE_FRAMES,
    TILES,
    conditions_bytes,
    decode_bytes,
    denoise_bytes,
    encode_bytes,
    item_bytes,
    product_scores_bytes,
)
from acestep.sizing.weights import RENDERERS, Config, kv_bytes_per_token, planner_bytes, renderer_bytes, renderer_size
from acestep.song import LATENT_FPS
from acestep.stage_settings import PlannerSettings, RendererSettings
from acestep.units import GIB

UNGUIDED_PROMPT_TOKENS = 33  # of the planner's row without a caption
WORK_BYTES = 256 << 20  # the planner's logits, sampling and the activations of a prefill
PASS_FRAMES = 2_048  # what the renderer puts into one pass on a card where the settings leave it open
PCM_BYTES_PER_FRAME = 1_920 * 2 * 4
# What is moved together (acestep.dit.renderer), and what each stage needs of it.
_GROUPS = {
    "conditions": ("text_encoder", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer"),
    "dit": ("transformer",),
    "vae": ("vae",),
}
_GROUP_OF = {"conditions": "conditions", "denoise": "dit", "decode": "vae", "encode": "vae"}


@dataclass(frozen=True)
class RenderTask:
    """What decides the memory of a rendering.

    Attributes:
        seconds: Length of each song.
        songs: Songs asked for.
        guided: Two evaluations per song and step.
        condition_tokens: Lyrics, caption and timbre.
        references: Reference recordings.
        encodes_source: Source or reference audio goes through the VAE encoder.
        adapter_bytes: Adapters on the device, those of other songs included.
    """

    seconds: float
    songs: int = 1
    guided: bool = False
    condition_tokens: int = MAX_LYRIC_TOKENS + MAX_TEXT_TOKENS + 1
    references: int = 0
    encodes_source: bool = False
    adapter_bytes: int = 0

    @property
    def frames(self) -> int:
        return -int(-self.seconds * LATENT_FPS // 1)


@dataclass(frozen=True)
class Need:
    """Bytes on the device at the peak of each stage, weights that are there then included."""

    stages: Mapping[str, int]
    weights: Mapping[str, int]

    @property
    def stage(self) -> str:
        """The stage that takes most."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        return self.stages[self.stage]


@dataclass(frozen=True)
class RenderFit:
    """How a rendering fits: songs per pass, the VAE tile, and what that takes. `notes` say what was made smaller."""

    songs_per_pass: int
    vae_tile_frames: int
    need: Need
    notes: tuple[str, ...] = ()


def known_configs(model: str) -> dict[str, Config]:
    """Configurations of a published renderer by its name, for before it is downloaded."""
    return RENDERERS[renderer_size(model)]


def render_need(
    task: RenderTask, configs: Mapping[str, Config], settings: RendererSettings, songs_per_pass: int = 1
) -> Need:
    """Bytes that the renderer takes for `task`, doing `songs_per_pass` songs in one evaluation of the DiT."""
    on_cpu = settings.device == "cpu"
    # Half precision on the CPU computes through float32 copies.
    working = "float32" if on_cpu else settings.dtype
    encoding = "float32" if working == "float16" else working  # acestep.dit.conditions
    weights = renderer_bytes(configs, settings.dtype, int8=settings.int8)
    groups = {name: sum(weights[part] for part in parts) for name, parts in _GROUPS.items()}
    offloaded = {"conditions", "vae"} if settings.offload == "stage" else set()
    if settings.offload_dit:
        offloaded.add("dit")
    resident = sum(size for name, size in groups.items() if name not in offloaded)
    base = 0 if on_cpu else CONTEXT_BYTES

    dit, vae = configs["transformer"], configs["vae"]
    rows = songs_per_pass * (2 if task.guided else 1)
    overlap = 2 * settings.vae_overlap_frames
    tile = min(max(settings.vae_tile_frames, overlap + SMALLEST_CORE_FRAMES), task.frames + overlap)
    kept = task.songs * item_bytes(dit, task.frames, working) + task.adapter_bytes
    lyrics = min(task.condition_tokens, MAX_LYRIC_TOKENS)
    working_bytes = {
        "conditions": conditions_bytes(
            configs["condition_encoder"], configs["text_encoder"], task.frames, lyrics, task.references, encoding
        ),
        "denoise": denoise_bytes(dit, task.frames, rows, task.condition_tokens, working, settings.attention),
        "decode": decode_bytes(vae, tile, working),
    }
    if on_cpu:
        working_bytes["conditions"] += product_scores_bytes(
            configs["condition_encoder"], max(lyrics, SILENT_REFERENCE_FRAMES)
        )
    if task.encodes_source:
        working_bytes["encode"] = encode_bytes(vae, tile, working)
    pcm = task.songs * task.frames * PCM_BYTES_PER_FRAME if on_cpu else 0
    stages = {}
    for stage, active in working_bytes.items():
        visiting = groups[_GROUP_OF[stage]] if _GROUP_OF[stage] in offloaded else 0
        stages[stage] = base + resident + visiting + kept + active + (pcm if stage == "decode" else 0)
    return Need(stages, weights)


def plan_need(
    seconds: float, songs: int, guided: bool, prompt_tokens: int, config: Config, settings: PlannerSettings
) -> Need:
    """Bytes that the planner takes to have all rows of a request in flight."""
    weights = planner_bytes(config, settings.dtype)
    per_token = kv_bytes_per_token(config, settings.dtype)
    codes = int(seconds * CODES_PER_SECOND) + 1
    unguided = min(UNGUIDED_PROMPT_TOKENS + codes, settings.max_len) if guided else 0
    tokens = songs * (min(prompt_tokens + codes, settings.max_len) + unguided)
    base = 0 if settings.device == "cpu" else CONTEXT_BYTES
    return Need({"plan": base + weights + WORK_BYTES + per_token * tokens}, {"planner": weights})


def admit_render(
    task: RenderTask, configs: Mapping[str, Config], settings: RendererSettings, device_bytes: int
) -> RenderFit:
    """How `task` fits into `device_bytes`: as the settings say, else in smaller groups, else with a smaller VAE tile.

    Raises:
        OutOfMemory: not even one song at a time with the smallest tile fits; `needed_bytes`, `free_bytes` and the stage say why.
    """
    available = min(device_bytes, settings.memory_bytes or device_bytes)
    if settings.device == "cpu":
        songs = 1
    else:
        songs = max(1, min(task.songs, (settings.max_batch_frames or PASS_FRAMES) // max(1, task.frames)))
    notes: list[str] = []
    while True:
        need = render_need(task, configs, settings, songs)
        if need.peak <= available:
            return RenderFit(songs, settings.vae_tile_frames, need, tuple(notes))
        smaller = [t for t in TILES if t < settings.vae_tile_frames]
        too_big = {stage for stage, size in need.stages.items() if size > available}
        if "denoise" in too_big and songs > 1:
            songs //= 2
            notes.append(f"{songs} songs per pass: more do not fit")
        elif too_big <= {"decode", "encode"} and smaller:
            settings = replace(settings, vae_tile_frames=smaller[0])
            notes.append(f"VAE tiles of {smaller[0]} frames: larger ones do not fit")
        else:
            break
    raise OutOfMemory(
        f"a song of {task.seconds:g} s needs {need.peak / GIB:.2f} GiB in the {need.stage} stage and there are "
        f"{available / GIB:.2f} GiB: ask for a shorter song, or use a larger card, offload or int8",
        needed_bytes=need.peak, free_bytes=available, stage=need.stage,
    )  # fmt: skip


def longest_song(
    configs: Mapping[str, Config], settings: RendererSettings, device_bytes: int, task: RenderTask
) -> float:
    """Seconds of the longest song, up to the task's own in steps of 10 s, that the ledger admits; 0 where none is."""
    for seconds in range(int(task.seconds), 0, -10):
        try:
            admit_render(replace(task, seconds=seconds), configs, settings, device_bytes)
        except OutOfMemory:
            continue
        return float(seconds)
    return 0.0
