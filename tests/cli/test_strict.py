"""A strict request has no warnings: it is done as asked, or fails saying why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from acestep.cli.local import Studio
from acestep.errors import LimitExceeded
from acestep.request import SongRequest

SONG: dict[str, Any] = {"prompt": "calm piano", "duration": 10, "steps": 1}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACESTEP_HOME", str(tmp_path_factory.mktemp("home")))
        with Studio({"device": "cpu"}) as studio:
            yield studio


def test_a_caption_of_the_planner_that_would_be_cut_fails_saying_why(studio: Studio) -> None:
    song = {**SONG, "seed": 2, "lm_temperature": 2.0}
    long = studio.make(SongRequest.model_validate(song))
    assert "prompt" in {a.field for a in long.adjustments}, "the tiny planner's caption is not long"
    with pytest.raises(LimitExceeded, match=r"^prompt: .*at most 256 tokens.*strict"):
        studio.make(SongRequest.model_validate({**song, "strict": True}))


def test_a_caption_of_the_planner_that_loops_gives_way_to_the_prompt_or_fails(studio: Studio) -> None:
    greedy = {**SONG, "seed": 1, "lm_temperature": 0}  # the tiny planner's likeliest word follows itself
    made = studio.make(SongRequest.model_validate(greedy))
    assert [a.field for a in made.adjustments] == ["plan.metadata.caption"]
    assert made.song.plan.metadata.caption is None
    with pytest.raises(LimitExceeded, match=r"^plan\.metadata\.caption: .*repeats itself.*strict"):
        studio.make(SongRequest.model_validate({**greedy, "strict": True}))


@pytest.mark.parametrize(
    ("field", "song"),
    [
        ("prompt", {"prompt": "many words " * 150, "use_cot_caption": False}),
        ("lyrics", {"lyrics": "la la " * 600, "thinking": False}),
        ("guidance_scale", {"guidance_scale": 7.0, "thinking": False}),
    ],
)
def test_what_would_be_changed_later_fails_saying_why(studio: Studio, field: str, song: dict[str, Any]) -> None:
    asked = {**SONG, "seed": 1, "use_cot_metas": False, **song}
    assert field in {a.field for a in studio.make(SongRequest.model_validate(asked)).adjustments}
    with pytest.raises(LimitExceeded, match=f"^{field}: .*strict") as refused:
        studio.make(SongRequest.model_validate({**asked, "strict": True}))
    assert refused.value.details["field"] == field
