"""What the DiT is told: texts, timbre, codes; and where diffusers 0.42.1 tells it something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acestep.checkpoints.load import RendererComponents
from acestep.checkpoints.modules import quiet
from acestep.condition_texts import caption_text, lyrics_text
from acestep.dit import conditions
from acestep.dit.conditions import Conditions, reference_excerpt, restore_timbre_token
from acestep.dit.preparation import song_samples
from acestep.dit.renderer import Renderer, set_encoder_attention
from acestep.dit.work import RenderWork
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest

with quiet():
    from diffusers.pipelines.ace_step import modeling_ace_step

CPU = torch.device("cpu")
CAPTION, LYRICS = "# Caption\nslow", "# Lyric\nla"


def conditions_of(parts: RendererComponents) -> Conditions:
    return Conditions(parts, CPU, torch.float32)


def from_pipeline(pipeline: Any, **metadata: Any) -> torch.Tensor:
    text, text_mask, lyric, lyric_mask = pipeline.encode_prompt(
        prompt="slow jazz", lyrics="la la", device=CPU, vocal_language="de", **metadata
    )
    encoder = pipeline.condition_encoder
    with torch.no_grad():
        packed, mask = encoder(
            text, text_mask, lyric, lyric_mask, encoder.silence_latent[:, :750], torch.zeros(1, dtype=torch.long)
        )
    assert mask.all()
    return packed[0]


def ours(parts: RendererComponents) -> torch.Tensor:
    request = SongRequest(prompt="slow jazz", lyrics="la la", vocal_language="de", bpm=80, seed=1)
    instruction = "Fill the audio semantic mask based on the given conditions:"
    return conditions_of(parts).encode(
        caption_text(request, Metadata(), instruction, 30.5), lyrics_text(request, Metadata())
    )


@pytest.mark.parametrize("name", ["tiny", "tiny-base"])
def test_equal_to_the_pipelines(
    load_parts: Callable[..., RendererComponents], pipelines: Any, name: str, rel: Any
) -> None:
    assert rel(ours(load_parts(name)), from_pipeline(pipelines[name], audio_duration=30.5, bpm=80)) <= 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_long_lyrics_are_read_without_scores_of_all_pairs(
    load_parts: Callable[..., RendererComponents], rel: Any, monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    parts, lyrics = load_parts("tiny"), "la la la " * 80
    expected = conditions_of(parts).encode("p", lyrics)  # with diffusers' masks
    set_encoder_attention(parts, attention, CPU, torch.float32)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask over all pairs was built")

    monkeypatch.setattr(modeling_ace_step, "_create_4d_mask", refuse)
    assert len(expected) > 700
    assert rel(conditions_of(parts).encode("p", lyrics), expected) <= 1e-5


def test_parts_of_a_song_are_coded_as_the_whole(
    load_parts: Callable[..., RendererComponents], rel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = conditions_of(load_parts("tiny"))
    latents = torch.randn((103, 8), generator=torch.Generator().manual_seed(1))
    codes, hints = made.codes_of(latents), made.through_codes(latents)
    monkeypatch.setattr(conditions, "CODED_FRAMES", 25)
    assert made.codes_of(latents) == codes
    assert rel(made.through_codes(latents), hints) <= 1e-6
    assert rel(made.hints(codes, 103), hints) <= 1e-6


def test_xl_has_its_timbre_token(load_parts: Callable[..., RendererComponents], pipelines: Any, rel: Any) -> None:
    # diffusers loads the learned first token of XL's timbre encoder and never uses it.
    parts = load_parts("tiny-xl")
    got, without = ours(parts), from_pipeline(pipelines["tiny-xl"], audio_duration=30.5, bpm=80)
    differs = [i for i in range(len(got)) if not torch.allclose(got[i], without[i], atol=1e-5)]
    lyric_tokens = conditions_of(parts).tokenize(
        "", lyrics_text(SongRequest(lyrics="la la", vocal_language="de"), Metadata())
    )
    assert differs == [lyric_tokens.lyric_tokens]  # the one timbre token, right after the lyrics

    encoder = load_parts("tiny-xl").condition_encoder.timbre_encoder
    frames = parts.condition_encoder.silence_latent[:, :750]
    with torch.no_grad():
        states = torch.cat([encoder.special_token, encoder.embed_tokens(frames)], dim=1)
        encoder.embed_tokens = torch.nn.Identity()
        expected, _ = encoder(states, torch.zeros(1, dtype=torch.long))
    assert rel(got[differs[0]], expected[0, 0]) <= 1e-6


def test_the_timbre_token_is_restored_once(load_parts: Callable[..., RendererComponents]) -> None:
    parts = load_parts("tiny-xl")
    restore_timbre_token(parts)
    Conditions(parts, CPU, torch.float32)
    assert len(parts.condition_encoder.timbre_encoder.embed_tokens._forward_hooks) == 1
    plain = load_parts("tiny")
    Conditions(plain, CPU, torch.float32)
    assert not plain.condition_encoder.timbre_encoder.embed_tokens._forward_hooks


def test_variants_of_a_prompt_are_encoded_once(load_parts: Callable[..., RendererComponents]) -> None:
    parts = load_parts("tiny")
    conditions = conditions_of(parts)
    calls: dict[str, int] = {"text": 0, "timbre": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            calls[name] += 1

        return hook

    parts.text_encoder.register_forward_hook(count("text"))
    parts.condition_encoder.timbre_encoder.register_forward_hook(count("timbre"))
    first = conditions.encode(CAPTION, LYRICS)
    assert conditions.encode(CAPTION, LYRICS) is first
    assert calls == {"text": 1, "timbre": 1}
    conditions.encode(CAPTION + "er", LYRICS)
    assert calls == {"text": 2, "timbre": 1}  # the timbre of "no reference" is the same for every song
    with_reference = conditions.encode(CAPTION, LYRICS, [torch.zeros(750, 8)], key="r")
    assert len(with_reference) == len(first)
    assert not torch.equal(with_reference, first)


class TestCodes:
    def test_short_ones_end_in_silence(self, load_parts: Callable[..., RendererComponents]) -> None:
        # In a batch, diffusers continues shorter lists with code 0, which is a sound.
        conditions = conditions_of(load_parts("tiny"))
        whole = conditions.hints((5, 6, 7), 15)
        longer = conditions.hints((5, 6, 7), 40)
        assert torch.equal(longer[:15], whole)
        assert torch.equal(longer[15:], conditions.silence_of(25))
        assert torch.equal(conditions.hints((5, 6, 7), 11), whole[:11])

    def test_round_trip_of_codes(self, load_parts: Callable[..., RendererComponents]) -> None:
        conditions = conditions_of(load_parts("tiny"))
        latents = torch.randn(23, 8, generator=torch.Generator().manual_seed(0))
        codes = conditions.codes_of(latents)
        assert len(codes) == 5
        assert torch.allclose(conditions.through_codes(latents), conditions.hints(codes, 23), atol=1e-6)

    def test_unequal_lengths_in_one_request(self, make_renderer: Any, renderers: dict[str, Renderer], rel: Any) -> None:
        request = SongRequest(prompt="p", seed=1, steps=2, batch_size=2)
        plan = Plan(codes=(tuple(range(50)), tuple(range(60))))
        batched = make_renderer("tiny", max_batch_frames=10_000).submit(RenderWork(request, plan)).result(60)
        assert [item.audio.shape[1] for item in batched.items] == [10 * 48_000, 12 * 48_000]
        alone = renderers["tiny"].submit(RenderWork(request, plan, items=(0,))).result(60)
        assert rel(batched.items[0].audio, alone.items[0].audio) <= 1e-6


def test_silence_beyond_what_is_stored_repeats(load_parts: Callable[..., RendererComponents]) -> None:
    conditions = conditions_of(load_parts("tiny"))
    silence = conditions.silence_of(15_010)
    assert torch.equal(silence[15_000:], conditions.silence[:10])


@pytest.mark.parametrize(
    ("fields", "plan", "seconds"),
    [
        ({}, Plan(), 60.0),
        ({"duration": 12.34}, Plan(), 12.34),
        ({}, Plan(metadata=Metadata(duration=17)), 17.0),
        ({}, Plan(metadata=Metadata(duration=17), codes=((1,) * 52,)), 17.0),
        ({"duration": 20}, Plan(codes=((1,) * 52,)), 20.0),
        ({"audio_codes": (1,) * 55}, Plan(), 11.0),
    ],
)
def test_length_of_a_song(fields: dict[str, Any], plan: Plan, seconds: float) -> None:
    work = RenderWork(SongRequest(seed=1, **fields), plan)
    codes = work.request.audio_codes or plan.codes_of(0)
    assert song_samples(work, codes, None) == round(seconds * 48_000)


class TestPrompts:
    INSTRUCTION = "Do:"

    def caption(
        self, metadata: Metadata = Metadata(), seconds: float = 30.0, lego_sft: bool = False, **fields: Any
    ) -> str:
        request = SongRequest(**{"prompt": "mine", "seed": 1, **fields})
        return caption_text(request, metadata, self.INSTRUCTION, seconds, lego_sft=lego_sft)

    def test_form(self) -> None:
        assert self.caption() == (
            "# Instruction\nDo:\n\n# Caption\nmine\n\n# Metas\n- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n"
            "- duration: 30 seconds\n<|endoftext|>\n"
        )

    def test_the_requests_values_come_before_the_plans(self) -> None:
        metadata = Metadata(bpm=90, caption="planned", keyscale="D major", timesignature="3")
        text = self.caption(metadata, bpm=100)
        assert "# Caption\nplanned\n" in text
        assert "- bpm: 100\n- timesignature: 3\n- keyscale: D major" in text
        assert "# Caption\nmine\n" in self.caption(metadata, use_cot_caption=False)

    def test_stem_caption(self) -> None:
        fields = {"global_caption": "whole", "task": "lego", "src_audio": "x"}
        text = self.caption(**fields, lego_sft=True)
        assert "# Caption\nGlobal: whole\nLocal: mine\nMask Control: true\n" in text
        assert "Mask Control: false\n" in self.caption(**fields, lego_sft=True, chunk_mask_mode="auto")
        assert "# Caption\nmine\n" in self.caption(**fields)  # no other checkpoint has seen that form

    def test_a_caption_of_the_whole_song_without_a_model_for_it_is_said(
        self, renderers: dict[str, Renderer], song_file: Callable[..., Path]
    ) -> None:
        request = SongRequest(task="lego", src_audio="x", prompt="p", global_caption="whole", seed=1, steps=1)
        rendered = renderers["tiny-base"].submit(RenderWork(request, src_audio=song_file(2.0))).result(60)
        assert [(a.field, a.asked, a.given) for a in rendered.adjustments] == [("global_caption", "whole", "")]

    @pytest.mark.parametrize(
        ("codes", "said"),
        [(49, []), (50, []), (51, []), (30, ["continued with silence"]), (80, ["cut to it"])],
    )
    def test_codes_that_are_not_as_long_as_asked(
        self, renderers: dict[str, Renderer], codes: int, said: list[str]
    ) -> None:
        request = SongRequest(prompt="p", duration=10, audio_codes=(1,) * codes, seed=1, steps=1)
        rendered = renderers["tiny"].submit(RenderWork(request)).result(60)
        assert rendered.items[0].audio.shape == (2, 480_000)
        assert [a.reason.rpartition("codes are ")[2] for a in rendered.adjustments] == said

    def test_language_of_the_plan_reaches_the_model(self) -> None:
        def lyrics(language: str | None, **fields: Any) -> str:
            return lyrics_text(
                SongRequest(seed=1, lyrics="la", vocal_language=language, **fields), Metadata(language="fr")
            )

        assert lyrics(None) == lyrics("unknown") == "# Languages\nfr\n\n# Lyric\nla<|endoftext|>"
        assert lyrics("de").startswith("# Languages\nde\n")
        assert lyrics(None, use_cot_language=False).startswith("# Languages\nunknown\n")

    @pytest.mark.parametrize("lyrics", ["", "[inst]", " [Instrumental] "])
    def test_no_lyrics(self, lyrics: str) -> None:
        assert lyrics_text(SongRequest(lyrics=lyrics), Metadata()).endswith("# Lyric\n[Instrumental]<|endoftext|>")

    def test_duration_is_that_of_the_codes(self, renderers: dict[str, Renderer], monkeypatch: Any) -> None:
        # diffusers writes its default of 60 seconds into the prompt of a song whose length the codes decide.
        seen: list[str] = []
        encode = Conditions.encode
        monkeypatch.setattr(
            Conditions, "encode", lambda self, caption, *rest, **more: (seen.append(caption), encode(self, caption, *rest, **more))[1]
        )  # fmt: skip
        request = SongRequest(prompt="p", seed=1, steps=1)
        renderers["tiny"].submit(RenderWork(request, Plan(codes=((1,) * 20,)))).result(60)
        assert len(seen) == 1
        assert "- duration: 4 seconds\n" in seen[0]
        assert "# Instruction\nGenerate audio semantic tokens based on the given conditions:\n" in seen[0]

    def test_what_is_cut_is_said(self, renderers: dict[str, Renderer]) -> None:
        request = SongRequest(prompt="many words " * 150, lyrics="x" * 3000, duration=10, seed=1, steps=1)
        rendered = renderers["tiny"].submit(RenderWork(request)).result(60)
        assert {a.field: a.given for a in rendered.adjustments} == {"prompt": "256 tokens", "lyrics": "2048 tokens"}


def test_reference_excerpt() -> None:
    second = 48_000
    ramp = torch.arange(90 * second, dtype=torch.float32).repeat(2, 1)
    excerpt = reference_excerpt(ramp)
    assert excerpt.shape == (2, 30 * second)
    starts = [float(excerpt[0, part * 10 * second]) / second for part in range(3)]
    assert starts == [0.0, 30.0, 80.0]
    assert reference_excerpt(ramp[:, : 7 * second]).shape == (2, 30 * second)


def test_a_named_source_must_be_there(renderers: dict[str, Renderer], song_file: Callable[..., Path]) -> None:
    request = SongRequest(task="cover", src_audio="named", duration=30, seed=1, steps=1)
    rendered = renderers["tiny"].submit(RenderWork(request, src_audio=song_file(4.0))).result(60)
    assert [(a.field, a.asked, a.given) for a in rendered.adjustments] == [("duration", 30.0, 4.0)]
