"""Uploads: what is read, and what is refused before it can do harm."""

import io
import struct
import time
import tracemalloc

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.audio.reading import ReadLimits, audio_seconds, read_audio
from acestep.audio.writing import encode
from acestep.errors import InvalidRequest
from acestep.formats import FORMATS

RATE = 48_000
SECONDS = 2
STREAMINFO_TOTAL = slice(18, 26)  # rate, channels, bits and 36 bits of total samples, in a FLAC file


def tone(rate=RATE, channels=2, seconds=SECONDS, hz=440.0):
    t = np.arange(int(rate * seconds)) / rate
    return np.repeat(0.5 * np.sin(2 * np.pi * hz * t)[None], channels, axis=0).astype(np.float32)


def written(audio, rate, container, subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.T, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def claiming(flac, samples):
    data = bytearray(flac)
    value = int.from_bytes(data[STREAMINFO_TOTAL], "big")
    data[STREAMINFO_TOTAL] = (value >> 36 << 36 | samples).to_bytes(8, "big")
    return bytes(data)


def refused(data, **limits):
    with pytest.raises(InvalidRequest, match=r"^src_audio: ") as caught:
        read_audio(data, field="src_audio", limits=ReadLimits(**limits))
    assert caught.value.details["field"] == "src_audio"
    with pytest.raises(InvalidRequest) as counted:  # by counting as by reading
        audio_seconds(data, field="src_audio", limits=ReadLimits(**limits))
    assert counted.value.message == caught.value.message
    return caught.value


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_that_is_written_is_read(fmt):
    audio = tone()
    back = read_audio(encode(audio, RATE, fmt), field="src_audio")
    assert back.dtype == np.float32
    assert back.shape[0] == 2
    assert 0 <= back.shape[1] - audio.shape[1] < 1_024
    inside = slice(RATE // 2, RATE)
    assert np.abs(back[:, inside] - audio[:, inside]).max() < 0.1
    assert audio_seconds(encode(audio, RATE, fmt), field="src_audio") == pytest.approx(back.shape[1] / RATE, abs=0.01)


def test_counting_a_long_file_keeps_none_of_it():
    data = written(np.zeros((2, 120 * RATE), np.float32), RATE, "FLAC")
    tracemalloc.start()
    assert audio_seconds(data, field="src_audio") == 120.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # all of it is 46 MB


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 96_000])
def test_any_rate_becomes_48_khz_stereo(rate, channels):
    back = read_audio(written(tone(rate, channels), rate, "FLAC"), field="src_audio")
    assert back.shape == (2, SECONDS * RATE)
    expected = tone()
    inside = slice(RATE // 2, 3 * RATE // 2)
    assert np.abs(back[:, inside] - expected[:, inside]).max() < 1e-3


def test_surround_is_mixed_down_by_its_layout():
    audio = np.zeros((6, RATE), np.float32)
    audio[0] = tone(channels=1, seconds=1)[0]  # front left
    back = read_audio(written(audio, RATE, "WAV"), field="src_audio")
    assert back.shape == (2, RATE)
    assert np.abs(back[0]).max() > 0.1
    assert np.abs(back[1]).max() == 0.0


def test_the_name_of_a_file_says_nothing(tmp_path):
    path = tmp_path / "song.txt"
    path.write_bytes(written(tone(), RATE, "OGG"))
    assert read_audio(path, field="src_audio").shape == (2, SECONDS * RATE)
    path.write_bytes(b"just text, whatever the name may be" * 100)
    with pytest.raises(InvalidRequest):
        read_audio(path.rename(tmp_path / "song.wav"), field="src_audio")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_audio(tmp_path / "absent.wav", field="src_audio")


def test_audio_of_a_video_container_is_read():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libopus", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(tone().T.reshape(1, -1).copy(), format="flt", layout="stereo")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_audio(buffer.getvalue(), field="src_audio").shape[1] == pytest.approx(SECONDS * RATE, abs=1_024)


def test_a_small_file_that_claims_ten_hours_is_refused_unread():
    begin = time.monotonic()
    header = struct.pack("<IHHIIHH", 16, 1, 1, 8_000, 8_000, 1, 8)
    wav = b"RIFF" + struct.pack("<I", 2**31) + b"WAVEfmt " + header + b"data" + struct.pack("<I", 8_000 * 36_000)
    assert "cut short" in refused(wav + bytes(900)).message
    flac = written(tone(), RATE, "FLAC")
    error = refused(claiming(flac, RATE * 36_000)[:1000])
    assert "36000.0 s" in error.message
    assert error.details["limit"] == 600.0
    assert time.monotonic() - begin < 60  # never a decode of hours


def test_decoding_stops_at_the_limit_whatever_the_file_claims():
    bomb = written(np.zeros((1, RATE * 900), np.float32), RATE, "FLAC")
    assert len(bomb) < 200_000
    assert "900.0 s" in refused(bomb).message
    assert "decodes to more" in refused(claiming(bomb, 0)).message  # 0: unknown
    looks_short = read_audio(claiming(bomb, RATE), field="src_audio")
    assert looks_short.shape[1] <= 600 * RATE


def test_limits_are_named():
    data = written(tone(), RATE, "WAV")
    assert refused(data, max_bytes=1000).details["limit"] == 1000
    assert refused(data, max_duration_s=1.0).details["limit"] == 1.0
    assert refused(written(np.zeros((12, 10)), RATE, "WAV")).details["asked"] == 12
    assert "100 Hz" in refused(written(np.zeros((1, 10)), 100, "WAV")).message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc" * 1000,
        b"\x89PNG\r\n\x1a\n" + bytes(1000),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        written(np.zeros((2, 0)), RATE, "WAV"),
        written(np.full((2, 10), np.nan), RATE, "WAV", "FLOAT"),
    ],
    ids=["empty", "junk", "picture", "playlist", "concat", "sdp", "no samples", "nan"],
)
def test_what_is_no_audio_is_an_error_and_never_silence(data):
    refused(data)


@pytest.mark.parametrize("fmt", ["wav", "flac", "mp3", "aac"])
def test_a_file_cut_in_half_is_refused(fmt):
    data = encode(tone(seconds=5), RATE, fmt)
    refused(data[: len(data) // 2])


@pytest.mark.parametrize("container", ["RF64", "AIFF"])
def test_other_uncompressed_files_cut_in_half_are_refused(container):
    data = written(tone(), RATE, container)
    assert read_audio(data, field="src_audio").shape == (2, SECONDS * RATE)
    assert "cut short" in refused(data[: len(data) // 2]).message


def test_a_wav_from_a_pipe_has_no_length_and_is_read():
    data = bytearray(encode(tone(), RATE, "wav"))
    data[4:8] = data[40:44] = b"\xff" * 4
    assert read_audio(bytes(data), field="src_audio").shape == (2, SECONDS * RATE)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**31), st.integers(1, 200))
def test_damaged_files_are_read_or_refused_but_never_crash(fmt, seed, damage):
    data = np.frombuffer(encode(tone(seconds=0.2), RATE, fmt), np.uint8).copy()
    rng = np.random.default_rng(seed)
    data[rng.integers(0, len(data), damage)] = rng.integers(0, 256, damage)
    try:
        back = read_audio(data.tobytes(), field="src_audio")
    except InvalidRequest:
        return
    assert back.shape[0] == 2
    assert np.isfinite(back).all()


ORDER = {"AIFF": "big", "AU": "big", "CAF": "big"}


def size_field(data, container):
    """Offset and width of what the file says of the size of its audio, and the bytes of it that are no samples."""
    if container == "AU":
        return 8, 4, 0
    if container == "RF64":
        return data.index(b"ds64") + 16, 8, 0
    name, width, more = {"AIFF": (b"SSND", 4, 8), "W64": (b"data\xf3", 8, 24), "CAF": (b"data", 8, 4)}.get(
        container, (b"data", 4, 0)
    )
    return data.rindex(name) + (16 if container == "W64" else 4), width, more


@pytest.mark.parametrize("channels", [1, 2, 4])  # libsndfile reads two, FFmpeg more
@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "AIFF", "AU", "W64", "CAF"])
def test_a_size_that_cannot_be_means_that_it_is_not_known(container, channels):
    data = written(tone(channels=channels), RATE, container, "PCM_16")
    expected = read_audio(data, field="src_audio")
    assert expected.shape == (2, SECONDS * RATE)
    at, width, more = size_field(data, container)
    order = ORDER.get(container, "little")
    true = SECONDS * RATE * channels * 2 + more
    assert int.from_bytes(data[at : at + width], order) == true
    lies = [0, true + 44, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFF9B, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]
    for lie in lies:
        if lie < 256**width:
            told = data[:at] + lie.to_bytes(width, order) + data[at + width :]
            assert np.array_equal(read_audio(told, field="src_audio"), expected), hex(lie)
            assert audio_seconds(told, field="src_audio") == SECONDS
    assert "cut short" in refused(data[:at] + (true + 100_000).to_bytes(width, order) + data[at + width :]).message
    assert "cut short" in refused(data[: len(data) // 2]).message
    if container in ("WAV", "RF64", "AIFF"):
        for lie in (0, 1, 0x7FFFF024, 0xFFFFFFFF):  # of the whole file
            told = data[:4] + lie.to_bytes(4, order) + data[8:]
            assert np.array_equal(read_audio(told, field="src_audio"), expected), hex(lie)


def test_other_places_that_tell_a_length_are_believed_no_more():
    aiff = written(tone(channels=4), RATE, "AIFF", "PCM_16")
    at = aiff.index(b"COMM") + 10
    for lie in (0, 1, RATE * 20, 0x7FFFFFFF, 0xFFFFFFFF):
        told = aiff[:at] + lie.to_bytes(4, "big") + aiff[at + 4 :]
        assert read_audio(told, field="src_audio").shape == (2, SECONDS * RATE), hex(lie)
    for channels in (2, 4):
        flac = written(tone(channels=channels), RATE, "FLAC")
        for lie in (0, 2**36 - 1):
            assert read_audio(claiming(flac, lie), field="src_audio").shape == (2, SECONDS * RATE)
    rf64 = written(tone(), RATE, "RF64")
    assert read_audio(b"BW64" + rf64[4:], field="src_audio").shape == (2, SECONDS * RATE)


def test_audio_of_no_size_before_other_chunks_is_no_audio():
    wav = written(tone()[:, :0], RATE, "WAV", "PCM_16")
    assert "no audio" in refused(wav + b"LIST\x04\x00\x00\x00INFO").message
    with_tags = written(tone(), RATE, "W64", "PCM_16") + b"junk\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a" + (1024).to_bytes(8, "little") + bytes(1000)  # fmt: skip
    assert read_audio(with_tags, field="src_audio").shape == (2, SECONDS * RATE)


def test_a_file_of_nothing_but_chunks_is_not_walked_through():
    """Both decoders would; what each chunk costs is little, what millions of them cost is not."""
    count = 1_000_000
    wav, aiff, caf = (written(tone(), RATE, kind, "PCM_16") for kind in ("WAV", "AIFF", "CAF"))
    mp4 = encode(tone(), RATE, "aac")
    empty, wide = b"junk" + bytes(4), b"junk" + bytes(8)
    for data in (
        wav[:12] + empty * count + wav[12:],
        wav + empty * count,
        b"RIFF\0\0\0\0WAVE" + empty * count,
        aiff[:12] + empty * count + aiff[12:],
        caf[:8] + wide * count + caf[8:],
        caf + wide * count,
        mp4 + b"\0\0\0\x08free" * count,
    ):
        error = refused(data)
        assert "chunks" in error.message
        assert error.details["limit"] == 20_000
    refused(b"FORM\0\0\0\x008SVX" + empty * count)  # a kind that nobody asked for, in which libsndfile never ends
    assert read_audio(wav[:12] + empty * 1000 + wav[12:] + empty * 1000, field="src_audio").shape == (2, SECONDS * RATE)


def test_the_beginning_of_what_is_too_long():
    limits = ReadLimits(max_duration_s=2.5)
    long = tone(seconds=7.25)
    for fmt in ("wav", "flac", "mp3", "aac"):
        data = encode(long, RATE, fmt)
        with pytest.raises(InvalidRequest, match=r"7\.2 s"):
            read_audio(data, field="src_audio", limits=limits)
        begun = read_audio(data, field="src_audio", limits=limits, beginning=True)
        assert begun.shape == (2, int(2.5 * RATE))
        assert audio_seconds(data, field="src_audio", limits=limits, beginning=True) == pytest.approx(7.25, abs=0.1)
    endless = claiming(written(long, RATE, "FLAC"), 0)
    assert 2.5 < audio_seconds(endless, field="src_audio", limits=limits, beginning=True) < 4
