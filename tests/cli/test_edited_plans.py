"""An edited plan, through both stages: the song, its tags' plan, its manifest and its record say the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import soundfile

from acestep.cli.local import Studio
from acestep.errors import LimitExceeded
from acestep.lm.flows import _as_coded
from acestep.plan import Metadata
from acestep.request import SongRequest

PLAN: dict[str, Any] = {
    "metadata": {"bpm": 80, "duration": 10, "keyscale": "C major", "language": "en"},
    "codes": [[5] * 50],
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACESTEP_HOME", str(tmp_path_factory.mktemp("home")))
        with Studio({"device": "cpu"}) as studio:
            yield studio


@pytest.mark.parametrize(
    ("asked", "edited", "seconds", "fields"),
    [
        ({}, {}, 10, set()),
        ({}, {"duration": 20}, 20, {"plan.codes"}),
        ({"duration": 30}, {}, 30, {"plan.metadata.duration", "plan.codes"}),
        ({}, {"duration": 12.5}, 12.5, {"plan.codes"}),
        ({"bpm": 200, "vocal_language": "fr"}, {}, 10, {"plan.metadata.bpm", "plan.metadata.language"}),
        ({}, {"duration": 5}, 5, {"plan.codes"}),
    ],
)
def test_song_and_record_agree(
    studio: Studio, asked: dict[str, Any], edited: dict[str, Any], seconds: float, fields: set[str]
) -> None:
    plan = {**PLAN, "metadata": {**PLAN["metadata"], **edited}}
    song = {"prompt": "calm piano", "steps": 1, "seed": 1, **asked, "plan": plan}
    made = studio.make(SongRequest.model_validate(song))
    assert len(soundfile.read(io.BytesIO(made.files[0, "wav"]))[0]) == round(seconds * 48_000)
    metadata = made.song.plan.metadata
    assert (metadata.duration, metadata.bpm) == (seconds, asked.get("bpm", 80))
    assert metadata.language == asked.get("vocal_language", "en")
    assert [a.field for a in made.adjustments].count("plan.codes") == ("plan.codes" in fields)
    assert {a.field for a in made.adjustments} == fields
    assert len((made.song.plan.codes or ())[0]) == min(50, seconds * 5)
    if fields:
        with pytest.raises(LimitExceeded):
            studio.make(SongRequest.model_validate({**song, "strict": True}))


def test_what_was_written_without_grammar_is_as_long_as_its_song() -> None:
    assert _as_coded(Metadata(duration=150.0, bpm=90), (1,) * 37) == Metadata(duration=7.4, bpm=90)
    assert _as_coded(Metadata(duration=12.34), (1,) * 61).duration == 12.34
    assert _as_coded(Metadata(), (1,) * 37).duration is None
