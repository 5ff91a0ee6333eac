"""Which parts of a source are made anew (repaint, lego), in samples and in latent frames."""

from __future__ import annotations

from dataclasses import dataclass

from acestep.errors import InvalidRequest, LimitExceeded
from acestep.request import MAX_DURATION_S, SongRequest
from acestep.song import LATENT_FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from acestep.tasks import made_parts

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """What is made anew of a song, which may reach past its source on both sides (outpainting).

    Attributes:
        left, right: Samples added before and after the source.
        samples: Length of the whole song.
        parts: Each part that was asked for, in latent frames, in order.
        known: Frames that hold nothing but source.
    """

    left: int
    right: int
    samples: int
    parts: tuple[Span, ...]
    known: Span

    @property
    def spans(self) -> tuple[Span, ...]:
        """The parts, those that touch each other joined."""
        joined: list[Span] = []
        for start, end in self.parts:
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, end))
        return tuple(joined)

    @property
    def frames(self) -> int:
        return -(-self.samples // SAMPLES_PER_FRAME)

    @property
    def is_everything(self) -> bool:
        return self.spans == ((0, self.frames),)

    def samples_of(self, span: Span) -> slice:
        """A span in samples."""
        return slice(span[0] * SAMPLES_PER_FRAME, min(span[1] * SAMPLES_PER_FRAME, self.samples))


def keeps_source(request: SongRequest, window: Window) -> bool:
    """Whether samples of the source are put back around the window."""
    return not window.is_everything and request.repaint_mode != "aggressive"


def window_of(request: SongRequest, source_samples: int) -> Window:
    """The request's window on a source of `source_samples`.

    A part that starts where the source ends (to within a frame: files are rarely as long as they say) goes on from there.

    Raises:
        InvalidRequest: it leaves a gap after the source, or a part of it holds no frame.
        LimitExceeded: the song with its added parts is longer than the model can make.
    """
    source_s = source_samples / SAMPLE_RATE
    names = ("regions", "regions") if request.regions else ("repainting_start", "repainting_end")
    parts = [(start, source_s if end is None else end) for start, end in made_parts(request)]
    reach = source_s
    for start_s, end_s in parts:
        continues = end_s > reach and start_s < reach + 1 / LATENT_FPS
        if start_s >= reach and start_s > 0 and not continues:
            raise InvalidRequest(
                f"{names[0]}: {start_s:g} s is past the end of the source audio, {source_s:.3f} s.",
                field=names[0], asked=start_s, limit=source_s,
            )  # fmt: skip
        reach = max(reach, end_s)
    left = round(max(0.0, -parts[0][0]) * SAMPLE_RATE)
    right = max(0, round(max(end for _, end in parts) * SAMPLE_RATE) - source_samples)
    samples = left + source_samples + right
    if samples > MAX_DURATION_S * SAMPLE_RATE:
        raise LimitExceeded(
            f"{names[1]}: the song would be {samples / SAMPLE_RATE:.1f} s long; the model makes at most "
            f"{MAX_DURATION_S:g} s.",
            field=names[1], asked=samples / SAMPLE_RATE, limit=MAX_DURATION_S,
        )  # fmt: skip
    spans = tuple(_frames_of(start, end, left, samples) for start, end in parts)
    if empty := next((part for part, span in zip(parts, spans, strict=True) if span[1] <= span[0]), None):
        why = "is shorter than one latent frame, 0.04 s" if empty[1] > empty[0] else "must end after it begins"
        raise InvalidRequest(
            f"{names[1]}: the window from {empty[0]:g} to {empty[1]:g} s {why}.", field=names[1], asked=empty[1]
        )
    known = (-(-left // SAMPLES_PER_FRAME), (left + source_samples) // SAMPLES_PER_FRAME)
    return Window(left, right, samples, spans, known)


def _frames_of(start_s: float, end_s: float, left: int, samples: int) -> Span:
    shift = left / SAMPLE_RATE
    start = max(0, int((start_s + shift) * LATENT_FPS + 1e-6))
    last = round((end_s + shift) * SAMPLE_RATE)
    return start, -(-samples // SAMPLES_PER_FRAME) if last >= samples else int((end_s + shift) * LATENT_FPS + 1e-6)
