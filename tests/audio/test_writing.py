"""Every format is written, read back by independent decoders, and says where it comes from."""

import io
import json

import av
import numpy as np
import pytest
import soundfile
import torch
from mutagen.flac import FLAC
from mutagen.mp3 import MP3
from mutagen.mp4 import MP4
from mutagen.oggopus import OggOpus
from mutagen.wave import WAVE
from pydantic import ValidationError

from acestep.audio.tags import SongTags
from acestep.audio.writing import encode
from acestep.errors import InvalidOutput, InvalidRequest
from acestep.formats import FORMATS, check_formats, content_type, extension
from acestep.plan import Metadata
from acestep.request import SongRequest

RATE = 48_000
SAMPLES = 3 * RATE + 17  # no multiple of any frame size
TAGS = SongTags.titled(
    "calm piano, ré♭ and 雨, PEAK data",
    seed=7,
    model="tiny",
    plan=Metadata(bpm=90, keyscale="A minor"),
    notice="tiny checkpoint: noise, not music",
)


def sine(channels=2, samples=SAMPLES):
    t = np.arange(samples) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (c + 1) * t) for c in range(channels)]).astype(np.float32)


def decode(data):
    """With FFmpeg alone: float32 [channels, samples], rate, codec."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout=stream.layout.name, rate=stream.rate)
        blocks = [out.to_ndarray() for frame in container.decode(stream) for out in resampler.resample(frame)]
        return np.concatenate(blocks, axis=1), stream.rate, stream.codec_context.name


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("fmt", "subtype", "tolerance"),
    [("wav", "PCM_16", 2**-15), ("wav24", "PCM_24", 2**-23), ("wav32", "FLOAT", 0.0), ("flac", "PCM_24", 2**-23)],
)
def test_lossless_formats_keep_every_sample(fmt, subtype, tolerance, channels):
    audio = sine(channels)
    data = encode(audio, RATE, fmt, tags=TAGS)
    info = soundfile.info(io.BytesIO(data))
    assert (info.frames, info.samplerate, info.channels, info.subtype) == (SAMPLES, RATE, channels, subtype)
    back, rate = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    assert rate == RATE
    assert np.abs(back.T - audio).max() <= tolerance


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("fmt", "codec"), [("mp3", "mp3float"), ("opus", "opus"), ("aac", "aac")])
def test_lossy_formats_decode_to_the_same_length_and_sound(fmt, codec, channels):
    audio = sine(channels)
    back, rate, name = decode(encode(audio, RATE, fmt, tags=TAGS))
    assert (rate, name, back.shape[0]) == (RATE, codec, channels)
    assert 0 <= back.shape[1] - SAMPLES < 1_024  # aac cannot say where inside its last frame the song ends
    middle = slice(RATE, 2 * RATE)
    error = back[:, middle] - audio[:, middle]
    assert np.sqrt((error**2).mean()) < 0.02


def test_a_bitrate_changes_the_size_accordingly():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 5 * RATE)).astype(np.float32)
    for fmt in ("mp3", "opus", "aac"):
        sizes = [len(encode(noise, RATE, fmt, bitrate_kbps=kbps)) * 8 / 5 / 1000 for kbps in (64, 128, 256)]
        assert sizes == sorted(sizes)
        assert sizes[1] == pytest.approx(128, rel=0.15)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_same_song_is_the_same_file(fmt):
    audio = sine()
    assert encode(audio, RATE, fmt, tags=TAGS) == encode(torch.from_numpy(audio), RATE, fmt, tags=TAGS)


def _vorbis(tags):
    return {name: tags[name][0] for name in ("TITLE", "PROMPT", "SEED", "MODEL", "PLAN", "NOTICE")}


def _id3(tags):
    named = {frame.desc: str(frame) for frame in tags.getall("TXXX")}
    return {"TITLE": str(tags["TIT2"]), **named}


def _mp4(tags):
    named = {key.split(":")[-1]: value[0].decode() for key, value in tags.items() if key.startswith("----")}
    return {"TITLE": tags["\xa9nam"][0], **named}


READERS = {
    "wav": lambda b: _id3(WAVE(b).tags),
    "wav24": lambda b: _id3(WAVE(b).tags),
    "wav32": lambda b: _id3(WAVE(b).tags),
    "flac": lambda b: _vorbis(FLAC(b)),
    "mp3": lambda b: _id3(MP3(b).tags),
    "opus": lambda b: _vorbis(OggOpus(b)),
    "aac": lambda b: _mp4(MP4(b)),
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_tags_are_read_back(fmt):
    found = READERS[fmt](io.BytesIO(encode(sine(), RATE, fmt, tags=TAGS)))
    assert json.loads(found.pop("PLAN")) == {"bpm": 90, "keyscale": "A minor"}
    assert found == {
        "TITLE": TAGS.title,
        "PROMPT": TAGS.prompt,
        "SEED": "7",
        "MODEL": "tiny",
        "NOTICE": "tiny checkpoint: noise, not music",
    }


def test_wav_has_a_riff_info_chunk_too():
    with soundfile.SoundFile(io.BytesIO(encode(sine(), RATE, "wav", tags=TAGS))) as file:
        assert file.title == TAGS.title
        assert "seed: 7" in file.comment


def test_a_long_prompt_is_cut_in_the_title_only():
    tags = SongTags.titled("x" * 500, seed=1, model="m")
    assert len(tags.title) == 80
    assert len(tags.prompt) == 500
    assert SongTags.titled(" \n", seed=1, model="m").title == "Untitled"


def test_too_loud_is_clipped_and_never_wraps():
    back, _ = soundfile.read(io.BytesIO(encode(np.full((2, 100), 3.0, np.float32), RATE, "wav")))
    assert back.min() > 0.999


@pytest.mark.parametrize("audio", [np.zeros((2, 0)), np.full((2, 10), np.nan), np.full((2, 10), np.inf)])
def test_what_is_no_song_is_not_written(audio):
    with pytest.raises(InvalidOutput):
        encode(audio.astype(np.float32), RATE, "wav")


def test_bitrates_are_checked_before_anything_runs():
    check_formats(("wav", "mp3"), 320)
    check_formats(("opus", "aac"), 96)
    check_formats(("wav",), None)
    for formats, kbps in ((("mp3",), 100), (("wav", "flac"), 128), (("opus", "mp3"), 510), (("aac",), 16)):
        with pytest.raises(InvalidRequest, match="bitrate_kbps") as caught:
            check_formats(formats, kbps)
        assert caught.value.details["field"] == "bitrate_kbps"


def test_the_request_itself_refuses_an_impossible_bitrate():
    assert SongRequest(formats=("wav", "mp3"), bitrate_kbps=320).bitrate_kbps == 320
    with pytest.raises(ValidationError, match="bitrate_kbps: 100 is not possible for mp3; use 32, 40"):
        SongRequest(formats=("mp3",), bitrate_kbps=100)


def test_types_and_extensions():
    assert {f: (content_type(f), extension(f)) for f in ("wav24", "mp3", "opus", "aac")} == {
        "wav24": ("audio/wav", "wav"),
        "mp3": ("audio/mpeg", "mp3"),
        "opus": ("audio/ogg", "opus"),
        "aac": ("audio/mp4", "m4a"),
    }
