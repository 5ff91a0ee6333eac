"""Sound of a song that is still made: the same bytes as its file where the level is known, else at most as loud; all of it, from the start."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
import torch

from acestep.audio.live import PROVISIONAL, LiveItem, Sound
from acestep.audio.provisional import Limiter, ProvisionalMaster
from acestep.dit.finish import Finish, Maker
from acestep.dit.work import Rendered, RenderedItem
from acestep.formats import AudioFormat
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import RenderTimings

RATE = 48_000
MAKER = Maker("model", None, "cpu", None)
LIVE: tuple[AudioFormat, ...] = ("wav", "mp3", "opus")


def song(seconds: float, level: float = 0.05, seed: int = 1) -> torch.Tensor:
    return level * torch.randn(2, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def pieces(item: LiveItem, audio: torch.Tensor, seconds: float = 2.0) -> None:
    for first in range(0, audio.shape[1], round(seconds * RATE)):
        item.piece(audio.shape[1], audio[:, first : first + round(seconds * RATE)])


def whole(sound: Sound) -> bytes:
    """All of it, once it is whole, in pieces as a listener reads it."""
    for _ in range(6_000):
        if sound.closed:
            break
        time.sleep(0.01)
    assert sound.closed
    data = b""
    while piece := sound.read(len(data), 10_001):
        data += piece
    assert len(data) == sound.length
    return data


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        to = av.AudioResampler(format="fltp", layout="stereo", rate=stream.rate)
        return np.concatenate(
            [out.to_ndarray() for frame in container.decode(stream) for out in to.resample(frame)], axis=1
        )


def finished(request: SongRequest, audio: torch.Tensor, item: LiveItem) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    rendered = Rendered((RenderedItem(0, request.seeds[0], audio),), RenderTimings(), {})
    with Finish(request, Plan(), MAKER, files.__setitem__, live={0: item}) as finishing:
        finishing.song(rendered)
    return files


@pytest.mark.parametrize("fmt", LIVE)
@pytest.mark.parametrize("more", [{}, {"loudness_lufs": -18.0, "fade_out_duration": 1.0}])
def test_what_a_listener_hears_of_a_decoded_song_is_its_file(fmt: AudioFormat, more: dict[str, float]) -> None:
    """While a file is encoded, its bytes so far are the beginning of the file; a format that is no file of the song is made like one."""
    request = SongRequest(prompt="x", seed=3, formats=(fmt,), **more)
    other = SongRequest(prompt="x", seed=3, formats=("flac",), **more)
    audio = song(5.3)
    heard: list[bytes] = []

    class Noted(LiveItem):
        """Notes what a listener could have heard, before the file is stored."""

        def file(self, fmt: AudioFormat) -> Callable[[bytes], None] | None:
            told = super().file(fmt)

            def ready(data: bytes) -> None:
                assert told is not None
                told(data)
                heard.append(data)

            return ready

    item = Noted(request, 600.0, lambda: None)
    pieces(item, audio)
    files = finished(request, audio, item)
    sound = item.sound(fmt)
    assert sound is not None
    name = next(n for n in files if f"0-{fmt}." in n)
    assert (sound.final, sound.closed, sound.stored) == (True, True, name)
    assert b"".join(heard) == files[name]
    assert len(heard) > 4
    # not a file of the song: from the same samples, with the same settings
    asked: list[Sound | None] = []

    class Asked(LiveItem):
        """A listener asks as soon as the level is known."""

        def final(self, *made: Any) -> None:
            super().final(*made)
            asked.append(self.sound(fmt))

    finished(other, audio, Asked(other, 600.0, lambda: None))
    assert asked[0] is not None
    assert whole(asked[0]) == files[name]


@pytest.mark.parametrize("fmt", LIVE)
def test_before_the_peak_is_known_the_level_is_provisional_and_the_length_exact(fmt: AudioFormat) -> None:
    request = SongRequest(prompt="x", seed=3, sample_rate=48_000 if fmt == "opus" else 44_100)
    audio = torch.cat([song(4), song(2, level=0.9, seed=2), song(3.01, seed=3)], dim=1)
    item = LiveItem(request, 0.0, lambda: None)
    assert item.sound(fmt) is None
    item.piece(audio.shape[1], audio[:, : 2 * RATE])
    sound = item.sound(fmt)
    assert sound is not None
    for _ in range(3_000):
        if sound.length > 1_000:
            break
        time.sleep(0.01)
    assert sound.length > 1_000  # there is sound while most of the song is not made
    assert not sound.final
    assert item.sound(fmt) is sound  # for a second listener, too
    pieces(item, audio[:, 2 * RATE :])
    samples = decoded(whole(sound))
    rate = 48_000 if fmt == "opus" else 44_100
    assert abs(samples.shape[1] - round(audio.shape[1] * rate / RATE)) < 2
    # decoders of lossy formats overshoot
    assert 0.3 < np.abs(samples).max() < (10 ** (-1 / 20) + 1e-4 if fmt == "wav" else 1.3)
    assert PROVISIONAL.encode() in sound.read(0, 10_000) or PROVISIONAL.encode() in sound.read(
        sound.length - 10_000, 10_000
    )
    item.end(well=True)
    assert item.sound(fmt) is sound  # who listens may come to its end
    item.end(well=False)
    assert item.sound(fmt) is None


def test_patience_decides_between_the_two() -> None:
    request, audio = SongRequest(prompt="x", seed=3), song(6)
    patient, none = LiveItem(request, 600.0, lambda: None), LiveItem(request, 0.0, lambda: None)
    assert patient.patience_left_s is None
    for item in (patient, none):
        item.piece(audio.shape[1], audio[:, :RATE])
    assert 590 < (patient.patience_left_s or 0) <= 600
    assert (patient.sound("mp3"), none.patience_left_s) == (None, 0.0)
    patient.piece(audio.shape[1], audio[:, RATE:])
    assert patient.patience_left_s is None  # all of it is there: the level will be
    assert patient.sound("mp3") is None
    none.end(well=False)


def test_a_song_that_fails_ends_what_is_made_for_listeners() -> None:
    before = {t for t in threading.enumerate() if t.name.startswith("live-")}
    told = threading.Event()
    item = LiveItem(SongRequest(prompt="x", seed=3), 0.0, told.set)
    audio = song(6)
    item.piece(audio.shape[1], audio[:, :RATE])
    assert item.sound("mp3") is not None
    mine = {t for t in threading.enumerate() if t.name.startswith("live-")} - before
    told.clear()
    item.end(well=False)
    assert told.wait(10)
    for thread in mine:
        thread.join(30)
        assert not thread.is_alive()
    assert item.over
    assert item.extra_bytes == 0


def test_a_sound_is_read_from_anywhere_and_not_beyond() -> None:
    sound = Sound(final=True)
    data = np.random.default_rng(0).bytes(1_000)
    for first in range(0, 1_000, 130):
        sound.append(data[first : first + 130])
    sound.append(b"")
    assert sound.length == 1_000
    for at in (0, 1, 129, 130, 131, 999, 1_000, 2_000):
        for most in (1, 130, 131, 5_000):
            assert sound.read(at, most) == data[at : at + most]


def test_the_limiter_keeps_peaks_down_and_leaves_the_rest() -> None:
    rng = np.random.default_rng(0)
    audio = (0.1 * rng.standard_normal((2, 5 * RATE))).astype(np.float32)
    audio[:, 100_000:101_000] *= 40
    for step in (1, 7_777, 5 * RATE):
        limiter = Limiter(0.5, RATE)
        parts: list[np.ndarray] = []
        firsts = range(0, audio.shape[1] if step > 1 else 300, step)
        parts.extend(limiter.write(audio[:, first : first + step]) for first in firsts)
        parts.append(limiter.close())
        out = np.concatenate(parts, axis=1)
        assert out.shape[1] == (audio.shape[1] if step > 1 else 300)
        assert np.abs(out).max() <= 0.5
        if step > 1:
            assert np.array_equal(out[:, :99_000], np.clip(audio[:, :99_000], -0.5, 0.5))
            assert np.allclose(out[:, 120_000:], np.clip(audio[:, 120_000:], -0.5, 0.5))


def test_a_song_that_begins_silent_is_not_turned_up_without_end() -> None:
    shaper = ProvisionalMaster(SongRequest(prompt="x"), RATE, 2 * RATE)
    quiet = np.full((2, RATE), 1e-6, np.float32)
    out = np.concatenate(
        [shaper.write(quiet), shaper.write(np.full((2, RATE), 0.1, np.float32)), shaper.close()], axis=1
    )
    assert np.abs(out[:, :RATE]).max() < 1e-5
    assert out.shape[1] == 2 * RATE
