"""The renderer on a card that is only pretended: everything is there when it is needed, the songs are those of the CPU, and no step makes
the host wait for the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acestep.checkpoints import Checkpoint
from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderWork
from acestep.plan import Plan
from acestep.request import Lora, SongRequest
from acestep.stage_settings import RendererSettings
from tests.adapters.written import pairs, write_peft
from tests.fake_card import FakeCard

LYRICS = "[verse]\nA light in the window\n[chorus]\nStay"
CODES = tuple(range(0, 60_000, 1_200))
EDIT = {"flow_edit_morph": True, "flow_edit_source_caption": "piano", "flow_edit_n_max": 0.7, "flow_edit_n_avg": 2}
REGIONS = ({"start": 1.0, "end": 3.0, "prompt": "drums"}, {"start": 4.0, "end": 5.5})

# Each is a request; `of` names the checkpoint, "source" and "lora" ask for files.
SONGS: dict[str, dict[str, Any]] = {
    "turbo": {},
    "xl": {"of": "tiny-xl"},
    "codes": {"audio_codes": CODES},
    "sde": {"infer_method": "sde"},
    "heun": {"sampler": "heun", "velocity_norm_threshold": 1.5, "velocity_ema_factor": 0.1},
    "another wavelet": {"dcw_wavelet": "db2"},
    "retake": {"retake_variance": 0.3, "retake_seed": 9},
    "listened to": {"timestamps": True, "score": True},
    "apg": {"of": "tiny-base", "guidance_scale": 5.0},
    "cfg in an interval": {
        "of": "tiny-base",
        "guidance_scale": 5.0,
        "guidance_variant": "cfg",
        "cfg_interval_start": 0.4,
    },
    "adg": {"of": "tiny-base", "guidance_scale": 5.0, "guidance_variant": "adg"},
    "adg_w_norm": {"of": "tiny-base", "guidance_scale": 5.0, "guidance_variant": "adg_w_norm", "sampler": "heun"},
    "cover": {"task": "cover", "source": True, "audio_cover_strength": 0.5, "cover_noise_strength": 0.3},
    "repaint": {"task": "repaint", "source": True, "repainting_start": 1.0, "repainting_end": 4.0},
    "extension": {"task": "repaint", "source": True, "repainting_start": 5.0, "repainting_end": 9.0},
    "regions": {"of": "tiny-base", "task": "repaint", "source": True, "regions": REGIONS, "guidance_scale": 3.0},
    "edit": {"of": "tiny-base", "source": True, "guidance_scale": 3.0, **EDIT},
    "lora": {"lora": True},
    "guided lora": {"of": "tiny-base", "guidance_scale": 3.0, "lora": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "eager": {"dtype": "float16", "attention": "eager"},
    "stage offload": {"offload": "stage"},
    "offload of all": {"offload": "stage", "offload_dit": True},
}


# Where the host may wait: while a song is prepared, and when it is walked.
BETWEEN_STEPS = {
    "dit/residency.py need", "dit/vae.py decode", "dit/sources.py encode", "dit/sources.py source",
    "dit/conditions.py _finite", "dit/conditions.py timbre_tokens", "dit/conditions.py text_tokens",
    "dit/conditions.py null", "dit/conditions.py silence_of", "adapters/load.py to", "dit/preparation.py _context",
    "dit/engine.py _check_latents", "dit/engine.py _check_maps", "dit/listening.py listen", "dit/attention_maps.py result",
    "dit/latents.py kept", "dit/runs.py begin_decoding",
}  # fmt: skip
OnCard = Callable[..., tuple[FakeCard, Renderer]]


@pytest.fixture
def work(
    song_file: Callable[..., Path], make_renderer: Any, load_parts: Any, tmp_path: Path
) -> Callable[..., RenderWork]:
    """A work of one of `SONGS` with so many steps."""

    def made(song: str, steps: int, **changes: Any) -> RenderWork:
        fields = {"prompt": "slow jazz", "lyrics": LYRICS, "duration": 10.0, "seed": 3, **SONGS[song], **changes}
        name, source = fields.pop("of", "tiny"), song_file(6.0) if fields.pop("source", False) else None
        if source is not None:
            fields |= {"src_audio": str(source), "duration": None}
        if fields.get("lora"):
            folder = tmp_path / "lora"
            if not folder.exists():
                write_peft(folder, pairs(load_parts(name).transformer))
            fields["lora"] = (Lora(path=str(folder)),)
        request = SongRequest(steps=steps, **fields)
        return RenderWork(
            request, Plan(codes=(request.audio_codes,)) if request.audio_codes else Plan(), src_audio=source
        )

    return made


@pytest.fixture(scope="module")
def on_card(checkpoints: dict[str, Checkpoint], renderers: dict[str, Renderer]) -> Iterator[OnCard]:
    """A renderer by checkpoint and settings, loaded onto the card as the service does it, and the card."""
    made: dict[str, Renderer] = {}
    with FakeCard() as card:

        def load(name: str = "tiny", **settings: Any) -> tuple[FakeCard, Renderer]:
            key = f"{name} {settings}"
            if key not in made:
                made[key] = Renderer.load(checkpoints[name], RendererSettings(device="cuda", compile=True, **settings))
            return card, made[key]

        yield load
        for renderer in made.values():
            renderer.close()


def rendered(renderer: Renderer, works: list[RenderWork]) -> list[Rendered]:
    return [ticket.result(120) for ticket in [renderer.submit(work) for work in works]]


def without_waiting(card: FakeCard, renderer: Renderer, works: list[RenderWork]) -> list[Rendered]:
    """Works, rendered; nobody waited in a step."""
    card.waits.clear()
    card.attention.clear()
    songs = rendered(renderer, works)
    assert {wait.partition(":")[0] for wait in card.waits} <= BETWEEN_STEPS
    # PyTorch's attention of a caption takes next to nothing; all else has a kernel that holds no scores.
    assert {call.partition(":")[0] for call in card.attention} <= {"dit/conditions.py text_tokens"}
    return songs


@pytest.mark.parametrize("song", SONGS)
def test_songs_are_those_of_the_cpu(
    on_card: OnCard, work: Any, renderers: dict[str, Renderer], rel: Any, song: str
) -> None:
    name = SONGS[song].get("of", "tiny")
    (made,) = without_waiting(*on_card(name), [work(song, 5)])
    (want,) = rendered(renderers[name], [work(song, 5)])
    assert rel(made.items[0].audio, want.items[0].audio) <= 1e-5


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(on_card: OnCard, work: Any, settings: str) -> None:
    without_waiting(*on_card(**SETTINGS[settings]), [work("turbo", 5)])


def test_lengths_and_adapters_that_share_steps(on_card: OnCard, work: Any) -> None:
    card, renderer = on_card(max_batch_frames=10_000, dtype="bfloat16")
    without_waiting(card, renderer, [work("turbo", 3), work("turbo", 3, duration=14.0), work("lora", 3, duration=12.5)])
    stats = renderer.stats()
    assert stats["denoise_rows"] == 3 * stats["denoise_steps"]
