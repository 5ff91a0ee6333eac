"""What a result says of an item is all that it takes to make that item again, alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from acestep.cli.local import Studio
from acestep.request import MAX_SEED, SongRequest

SONG: dict[str, Any] = {"prompt": "calm piano", "duration": 10, "steps": 1}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACESTEP_HOME", str(tmp_path_factory.mktemp("home")))
        with Studio({"device": "cpu"}) as studio:
            limits = replace(studio.settings.limits, max_batch=8)  # a CPU's own is one
            studio.settings = replace(studio.settings, limits=limits)
            yield studio


def make(studio: Studio, **fields: Any) -> Any:
    made = studio.make(SongRequest.model_validate({**SONG, **fields}))
    return json.loads(json.dumps(made.view()))  # as a caller reads it


def test_a_song_s_latents_are_a_source_here_too(studio: Studio, tmp_path: Path) -> None:
    song = studio.make(SongRequest(**{**SONG, "thinking": False, "use_cot_metas": False, "formats": ("wav32",)}))
    path = tmp_path / "latents"
    path.write_bytes(song.files[0, "latent"])
    asked = {
        "task": "repaint",
        "src_audio": str(path),
        "repainting_start": 2,
        "repainting_end": 3,
        "formats": ("wav32",),
    }
    edit = studio.make(SongRequest(**{**SONG, "duration": None, **asked}))
    was, now = [soundfile.read(io.BytesIO(made.files[0, "wav32"]))[0] for made in (song, edit)]
    assert np.abs(was[: 2 * 48_000] - now[: 2 * 48_000]).max() < 1e-6
    assert np.abs(was[3 * 48_000 :] - now[3 * 48_000 :]).max() < 1e-6
    assert "source_latents" not in edit.view()["request"]


@pytest.mark.parametrize(
    "asked",
    [
        {"seed": 5, "batch_size": 3},
        {"seed": [5, 77, 6], "batch_size": 3},
        {"seed": 5, "lm_seed": 100, "batch_size": 3},
        {"seed": MAX_SEED, "batch_size": 2},
        {"seed": 5, "lm_seed": MAX_SEED, "batch_size": 2},
        {"seed": 5, "batch_size": 2, "lm_share_cot": False},
        {"seed": [2**60 + 3, 1], "batch_size": 2, "lm_share_cot": False},
        {"batch_size": 2, "lm_seed": -1},
    ],
    ids=str,
)
def test_every_item_of_a_batch_is_made_again_by_its_own_seeds(studio: Studio, asked: dict[str, Any]) -> None:
    batch = make(studio, **asked)
    plan = batch["plan"]
    for i, item in enumerate(batch["result"]["items"]):
        again = {**asked, "batch_size": 1, "seed": item["seed"], "lm_seed": item["lm_seed"]}
        alone = make(studio, **again)
        assert alone["plan"]["metadata"] == (plan["item_metadata"] or [plan["metadata"]] * 9)[i]
        assert alone["plan"]["codes"] == [plan["codes"][i]]
        (song,) = alone["result"]["items"]
        assert song["audio"][0]["sha256"] == item["audio"][0]["sha256"]
        assert (song["seed"], song["lm_seed"]) == (item["seed"], item["lm_seed"])
    assert len({i["audio"][0]["sha256"] for i in batch["result"]["items"]}) == asked["batch_size"]


def test_numbers_stay_exact_in_every_client() -> None:
    request = SongRequest(seed=2**49, batch_size=8)
    assert all(int(float(seed)) == seed for seed in request.lm_seeds)
    assert request.codes_seeds == tuple(2**49 + i for i in range(8))
    assert set(request.metadata_seeds) == {2**49}
