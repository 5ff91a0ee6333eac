"""DCW, correction in the wavelet domain (arXiv 2604.16044): each step is pushed on, more in the low band of time than in the high one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from acestep.checkpoints.published import VariantDefaults
from acestep.controls import DcwMode
from acestep.errors import InvalidRequest
from acestep.hardware.upload import send
from acestep.request import Adjustment, SongRequest


@dataclass(frozen=True)
class Dcw:
    """Of one item.

    Attributes:
        scaler: Of the low band, or of the only one that the mode has.
        high_scaler: Of the high band in mode double.
        wavelet: PyWavelets' name.
    """

    mode: DcwMode
    scaler: float
    high_scaler: float
    wavelet: str

    def correct(self, x: Tensor, clean: Tensor, t: float) -> Tensor:
        """`x` after the step that began at time `t`, whose first velocity pointed to `clean`; all `[frames, channels]` in float32."""
        difference = x - clean
        if self.mode == "pix":
            return x + self.scaler * difference
        low = 0.0 if self.mode == "high" else t * self.scaler
        high = {"low": 0.0, "high": self.scaler, "double": self.high_scaler}[self.mode] * (1.0 - t)
        bands = _haar_bands if self.wavelet == "haar" else _bands
        return x + bands(difference, low, high, self.wavelet)

    def as_settings(self) -> dict[str, Any]:
        rest = {"dcw_high_scaler": self.high_scaler} if self.mode == "double" else {}
        wavelet = {} if self.mode == "pix" else {"dcw_wavelet": self.wavelet}
        return {"dcw_enabled": True, "dcw_mode": self.mode, "dcw_scaler": self.scaler, **rest, **wavelet}


def resolve(request: SongRequest, defaults: VariantDefaults, told: list[Adjustment]) -> Dcw | None:
    """What a request wants of a checkpoint with `defaults`; None is off.

    Raises:
        InvalidRequest: the wavelet needs a package that is not here.
    """
    wanted = defaults.dcw if request.dcw_enabled is None else request.dcw_enabled
    both = request.dcw_mode == "double"
    unused = {"dcw_high_scaler": not both, "dcw_wavelet": request.dcw_mode == "pix"}
    for name in ("dcw_mode", "dcw_scaler", "dcw_high_scaler", "dcw_wavelet"):
        asked = getattr(request, name)
        if asked != SongRequest.model_fields[name].default and (not wanted or unused.get(name)):
            on = "dcw_enabled is false" if request.dcw_enabled is False else "this checkpoint needs dcw_enabled for it"
            reason = f"dcw_mode {request.dcw_mode} has no use for it" if wanted else on
            told.append(Adjustment(field=name, asked=asked, given=None, reason=reason))
    if not wanted or not (request.dcw_scaler or (both and request.dcw_high_scaler)):
        return None
    if request.dcw_mode != "pix" and request.dcw_wavelet != "haar":
        _filters(request.dcw_wavelet)
    return Dcw(request.dcw_mode, request.dcw_scaler, request.dcw_high_scaler, request.dcw_wavelet)


def _haar_bands(x: Tensor, low: float, high: float, wavelet: str = "haar") -> Tensor:
    """`_bands` for haar, where they are means and halved differences of pairs of frames; a missing last partner is zero."""
    first, second = x[0::2], functional.pad(x[1::2], (0, 0, 0, len(x) % 2))
    mean, half = (first + second) * (low / 2), (first - second) * (high / 2)
    return torch.stack((mean + half, mean - half), dim=1).flatten(0, 1)[: len(x)]


def _bands(x: Tensor, low: float, high: float, wavelet: str) -> Tensor:
    """`low` times the low band of `x` along time plus `high` times the high one; orthonormal filters, zeros beyond both ends."""
    filters = _filters_on(wavelet, x.device, x.dtype)  # [4, 1, taps]: to the low and to the high band, and back
    taps, frames = filters.shape[-1], len(x)
    coefficients = (frames + taps - 1) // 2
    padded = functional.pad(x.T[:, None], (taps - 2, 2 * coefficients - frames))
    out = torch.zeros_like(x.T[:, None])
    for scale, there, back in ((low, filters[0:1], filters[2:3]), (high, filters[1:2], filters[3:4])):
        if scale:
            band = functional.conv1d(padded, there, stride=2)
            whole = functional.conv_transpose1d(band, back, stride=2)
            out = out + scale * whole[..., taps - 2 : taps - 2 + frames]
    return out[:, 0].T


@cache
def _filters_on(wavelet: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return send(_filters(wavelet).to(dtype), device)  # once: every step asks for them


@cache
def _filters(wavelet: str) -> Tensor:
    try:
        import pywt
    except ImportError:
        raise InvalidRequest(
            f"dcw_wavelet: {wavelet} needs PyWavelets, which is not installed where songs are rendered: install "
            "acestep-serve[wavelets] there, or take haar.",
            field="dcw_wavelet", asked=wavelet, allowed=["haar"],
        ) from None  # fmt: skip
    low, high, back_low, back_high = pywt.Wavelet(wavelet).filter_bank
    # A convolution here does not turn its filter round, as a transform's does.
    return torch.tensor([low[::-1], high[::-1], back_low, back_high], dtype=torch.float64)[:, None]
