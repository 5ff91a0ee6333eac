"""How long source and reference audio may be, in every interface."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from acestep.cli.local import Studio
from acestep.errors import InvalidRequest, LimitExceeded
from acestep.request import SongRequest

from .conftest import Site, fleet_view

RATE = 8_000
TASKS = ("cover", "cover-nofsq", "repaint", "lego", "extract", "complete")


def audio(samples: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(np.arange(samples) / 9), RATE, format="FLAC")
    return buffer.getvalue()


async def uploaded(site: Site, samples: int) -> str:
    sent = await site.client.post("/v1/files", files={"file": ("a.flac", audio(samples))})
    assert sent.status_code == 201, sent.text
    return str(sent.json()["id"])


@pytest.fixture
def base(build: Any) -> Site:
    site: Site = build(view=fleet_view(model="acestep-v15-base"))
    return site


@pytest.mark.parametrize("task", TASKS)
async def test_a_source_below_a_second_is_refused_and_a_short_one_is_said(base: Site, task: str) -> None:
    song = {"prompt": "x", "task": task}
    for samples in (1, RATE // 20, RATE - 1):
        refused = await base.client.post("/v1/music", json={**song, "src_audio": await uploaded(base, samples)})
        assert refused.status_code == 422, (samples, refused.text)
        assert (refused.json()["field"], refused.json()["limit"]) == ("src_audio", 1.0)
    for seconds, said in ((1, True), (9.5, True), (10, False)):
        source = await uploaded(base, int(seconds * RATE))
        taken = await base.client.post("/v1/music", json={**song, "src_audio": source})
        assert taken.status_code == 202, taken.text
        assert any(w["field"] == "src_audio" and "short" in w["reason"] for w in taken.json()["warnings"]) == said


async def test_the_other_interfaces_refuse_it_too(base: Site) -> None:
    fields = {"prompt": "x", "task_type": "cover"}
    compat = await base.client.post("/release_task", data=fields, files={"src_audio": ("a.flac", audio(RATE // 2))})
    part = {"data": base64.b64encode(audio(RATE // 2)).decode(), "format": "flac"}
    content = [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": part}]
    chat = await base.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "task_type": "cover"}
    )
    asked = await base.client.post("/v1/understand", json={"src_audio": await uploaded(base, RATE // 2)})
    for answer, status in ((compat, 400), (chat, 400), (asked, 422)):
        assert answer.status_code == status, answer.text
        assert "src_audio: it is 0.500 s long; source audio has at least 1 s" in answer.text


async def test_a_long_reference_is_taken_and_said(site: Site) -> None:
    long = await uploaded(site, 661 * RATE)
    assert (await site.client.get(f"/v1/files/{long}")).json()["duration"] == 661.0
    song = {"prompt": "x", "reference_audio": [long]}
    taken = await site.client.post("/v1/music", json=song)
    assert taken.status_code == 202, taken.text
    (told,) = (w for w in taken.json()["warnings"] if w["field"] == "reference_audio")
    assert (told["asked"], told["given"]) == (661.0, 600.0)
    strict = await site.client.post("/v1/music", json={**song, "strict": True})
    assert (strict.status_code, strict.json()["field"]) == (422, "reference_audio")
    source = await site.client.post("/v1/music", json={"prompt": "x", "task": "cover", "src_audio": long})
    assert (source.status_code, source.json()["field"], source.json()["limit"]) == (422, "src_audio", 600.0)


def test_in_this_process_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path))
    (tmp_path / "short.flac").write_bytes(audio(RATE // 2))
    (tmp_path / "long.flac").write_bytes(audio(661 * RATE))
    long, song = str(tmp_path / "long.flac"), {"prompt": "x", "steps": 1, "duration": 10, "thinking": False}
    with Studio() as studio:
        with pytest.raises(InvalidRequest, match="at least 1 s"):
            studio.make(
                SongRequest.model_validate({**song, "task": "cover", "src_audio": str(tmp_path / "short.flac")})
            )
        with pytest.raises(InvalidRequest, match="at most 600 s"):
            studio.make(SongRequest.model_validate({**song, "task": "cover", "src_audio": long}))
        with pytest.raises(LimitExceeded, match="reference_audio"):
            studio.make(SongRequest.model_validate({**song, "reference_audio": [long], "strict": True}))
        made = studio.make(SongRequest.model_validate({**song, "reference_audio": [long]}))
    assert [a.field for a in made.adjustments if a.asked == 661.0] == ["reference_audio"]
