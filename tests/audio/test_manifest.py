"""The manifest is plain JSON, complete, and free of this machine's paths."""

import json
import math

from acestep.audio.loudness import Loudness
from acestep.audio.manifest import codes_hash, manifest
from acestep.plan import Metadata, Plan, UsedLora
from acestep.request import Lora, SongRequest


def facts(request, plan=None, **changed):
    kwargs = {
        "item": 1, "seed": 8, "model": "tiny", "model_hash": "ab", "device": "cpu", "notice": "noise",
        "settings": {"steps": 8, "shift": 3.0}, "level": Loudness(-1.0),
    }  # fmt: skip
    return manifest(request, plan or Plan(), **{**kwargs, **changed})


def test_everything_that_made_the_song_is_there():
    plan = Plan(
        metadata=Metadata(bpm=90), codes=((1, 2), (3, 4, 5)), lm_seeds=(10, 11), model="tiny-lm", model_hash="cd",
        lm_lora=(UsedLora(name="y", hash="01", kind="LoRA", scale=2.0),),
    )  # fmt: skip
    request = SongRequest(
        prompt="calm piano",
        batch_size=2,
        seed=7,
        duration=10,
        lora=Lora(path="/srv/loras/x"),
        lm_lora=Lora(path="/srv/y"),
    )
    lora = [{"name": "x", "hash": "ef", "kind": "LoRA", "scale": 0.5}]
    found = facts(request, plan, settings={"steps": 8, "lora": lora}, level=Loudness(-1.0, -14.004, True))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["seed"] == 8
    assert found["renderer"] == {"name": "tiny", "hash": "ab", "vae": "official", "device": "cpu"}
    assert found["planner"] == {
        "name": "tiny-lm",
        "hash": "cd",
        "seed": 11,
        "lora": [{"name": "y", "hash": "01", "kind": "LoRA", "scale": 2.0}],
    }
    assert found["lora"] == lora
    assert found["settings"] == {"steps": 8}
    assert found["plan"] == {"bpm": 90}
    assert found["codes"] == {"count": 3, "sha256": codes_hash((3, 4, 5))}
    assert found["level"] == {
        "peak_dbfs": -1.0, "lufs": -14.0, "limited_by_peak": True, "gain_db": 0.0, "made_gain_db": None,
    }  # fmt: skip
    assert found["request"] == {"prompt": "calm piano", "batch_size": 2, "duration": 10.0}
    assert set(found["versions"]) >= {"python", "torch", "diffusers"}


def test_paths_of_uploads_do_not_leave_the_machine():
    request = SongRequest(
        task="cover", src_audio="/srv/uploads/secret.wav", seed=1, reference_audio=("/srv/uploads/b",)
    )
    assert "/srv" not in json.dumps(facts(request))


def test_silence_has_no_peak():
    assert facts(SongRequest(seed=1), level=Loudness(-math.inf))["level"]["peak_dbfs"] is None


def test_own_codes_count_and_no_planner_is_none():
    found = facts(SongRequest(seed=1, audio_codes=(5, 6)))
    assert found["codes"] == {"count": 2, "sha256": codes_hash((5, 6))}
    assert found["planner"] is None
    assert facts(SongRequest(seed=1))["codes"] is None
