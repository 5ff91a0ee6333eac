"""The sampling options of one request, with the checkpoint's defaults filled in and every change accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from acestep.checkpoints.published import VariantDefaults
from acestep.controls import GuidanceVariant
from acestep.dit.schedule import timesteps
from acestep.dit.variants import dcw, flow_edit, guidance, latents, velocity
from acestep.dit.variants.dcw import Dcw
from acestep.dit.variants.flow_edit import FlowEdit
from acestep.dit.variants.guidance import Guidance
from acestep.dit.variants.latents import Latents
from acestep.dit.variants.velocity import Velocity
from acestep.request import Adjustment, SongRequest

_ANY_VELOCITY, _AS_MADE = Velocity(), Latents()


@dataclass(frozen=True)
class Sampling:
    """How to walk from noise to a song.

    Attributes:
        times: Falling times with the final 0, float32 `[steps + 1]`.
        stochastic: SDE: fresh noise after each step.
        heun: Second order: two evaluations per step.
        distilled: Heun does not correct the last step, which would ask the model at t = 0, where such a one never was; and SDE follows
            the schedule, where others go evenly.
        dcw: None is off.
        flow_edit: None is off.
    """

    times: Tensor
    shift: float
    guidance_scale: float
    cfg_interval: tuple[float, float]
    stochastic: bool
    heun: bool
    distilled: bool = False
    guidance_variant: GuidanceVariant = "apg_classic"
    guidance_params: Mapping[str, float] = field(default_factory=dict)
    dcw: Dcw | None = None
    velocity: Velocity = _ANY_VELOCITY
    latents: Latents = _AS_MADE
    flow_edit: FlowEdit | None = None

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    def guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, self.cfg_interval, self.guidance_variant, self.guidance_params)

    def as_settings(self) -> dict[str, Any]:
        """For the manifest and the response, under the names that a request has for them."""
        variant, params = self.guidance_variant, guidance.with_defaults(self.guidance_variant, self.guidance_params)
        return {
            "steps": self.steps,
            "shift": self.shift,
            "guidance_scale": self.guidance_scale,
            "use_adg": self.guided and variant == "adg",
            "guidance_variant": variant if self.guided else None,
            "guidance_params": params if self.guided else None,
            "cfg_interval": list(self.cfg_interval),
            "infer_method": "sde" if self.stochastic else "ode",
            "sampler": "heun" if self.heun else "euler",
            "timesteps": [round(t, 6) for t in self.times.tolist()],
            **(self.dcw.as_settings() if self.dcw else {"dcw_enabled": False}),
            **self.velocity.as_settings(),
            **self.latents.as_settings(),
            **(self.flow_edit.as_settings() if self.flow_edit else {}),
        }


def resolve(request: SongRequest, defaults: VariantDefaults) -> tuple[Sampling, list[Adjustment]]:
    """Options of a request for a checkpoint with `defaults`. Assumes that `checks.check` passed.

    Raises:
        InvalidRequest: see `dcw.resolve`.
    """
    told: list[Adjustment] = []
    edit = flow_edit.resolve(request, told)
    if edit is not None:
        request = flow_edit.without_the_rest(request)
    scale = guidance.resolve(request, defaults, told)
    shift = request.shift if request.shift is not None else defaults.shift
    if request.timesteps is not None:
        reason = "timesteps are given"
        for name in ("steps", "shift"):
            asked = getattr(request, name)
            if asked is not None:
                told.append(Adjustment(field=name, asked=asked, given=None, reason=reason))
    sampling = Sampling(
        times=timesteps(request.steps or defaults.steps, shift, request.timesteps),
        shift=shift,
        guidance_scale=scale,
        cfg_interval=(request.cfg_interval_start, request.cfg_interval_end),
        stochastic=request.infer_method == "sde",
        heun=request.sampler == "heun",
        distilled=defaults.distilled,
        guidance_variant=request.guidance,
        guidance_params=request.guidance_params or {},
        dcw=dcw.resolve(request, defaults, told),
        velocity=velocity.resolve(request),
        latents=latents.resolve(request),
        flow_edit=edit,
    )
    return sampling, told
