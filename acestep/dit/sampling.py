"""The sampling options of one request, with the checkpoint's defaults filled in and every change accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from acestep.checkpoints.published import VariantDefaults
from acestep.dit.guidance import Guidance
from acestep.dit.schedule import timesteps
from acestep.request import Adjustment, SongRequest


@dataclass(frozen=True)
class Sampling:
    """How to walk from noise to a song.

    Attributes:
        times: Falling times with the final 0, float32 `[steps + 1]`.
        stochastic: SDE: fresh noise after each step.
        heun: Second order: two evaluations per step.
        asks_at_zero: Heun corrects its last step, too, which asks the model at t = 0. Distilled ones never saw that.
    """

    times: Tensor
    shift: float
    guidance_scale: float
    cfg_interval: tuple[float, float]
    adg: bool
    stochastic: bool
    heun: bool
    asks_at_zero: bool = True

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    def guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, self.cfg_interval, self.adg)

    def as_settings(self) -> dict[str, Any]:
        """For the manifest and the response."""
        return {
            "steps": self.steps,
            "shift": self.shift,
            "guidance_scale": self.guidance_scale,
            "use_adg": self.adg,
            "cfg_interval": list(self.cfg_interval),
            "infer_method": "sde" if self.stochastic else "ode",
            "sampler": "heun" if self.heun else "euler",
            "timesteps": [round(t, 6) for t in self.times.tolist()],
        }


def resolve(request: SongRequest, defaults: VariantDefaults) -> tuple[Sampling, list[Adjustment]]:
    """Options of a request for a checkpoint with `defaults`. Assumes that `checks.check` passed."""
    adjustments = []
    guidance = request.guidance_scale if request.guidance_scale is not None else defaults.guidance_scale
    if defaults.distilled:
        reason = "guidance is distilled into this checkpoint"
        if guidance > 1.0:
            adjustments.append(Adjustment(field="guidance_scale", asked=guidance, given=1.0, reason=reason))
            guidance = 1.0
        if request.use_adg:
            adjustments.append(Adjustment(field="use_adg", asked=True, given=False, reason=reason))
    shift = request.shift if request.shift is not None else defaults.shift
    if request.timesteps is not None:
        reason = "timesteps are given"
        for field in ("steps", "shift"):
            asked = getattr(request, field)
            if asked is not None:
                adjustments.append(Adjustment(field=field, asked=asked, given=None, reason=reason))
    sampling = Sampling(
        times=timesteps(request.steps or defaults.steps, shift, request.timesteps),
        shift=shift,
        guidance_scale=guidance,
        cfg_interval=(request.cfg_interval_start, request.cfg_interval_end),
        adg=request.use_adg and guidance > 1.0,
        stochastic=request.infer_method == "sde",
        heun=request.sampler == "heun",
        asks_at_zero=not defaults.distilled,
    )
    return sampling, adjustments
