"""Classifier-free guidance in ACE-Step's variants: plain, APG and three of ADG. All per item, on unpadded frames."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from acestep.checkpoints.modules import MomentumBuffer, normalized_guidance
from acestep.checkpoints.published import VariantDefaults
from acestep.controls import GUIDANCE, GuidanceVariant
from acestep.request import Adjustment, SongRequest

_PARALLEL = 1e-3  # below this sine the two predictions count as parallel


class Guidance:
    """Guidance of one item; holds APG's momentum between its steps.

    Args:
        scale: Guidance scale; 1 and below means none.
        interval: Closed range of t in which guidance is applied (t runs from 1, noise, to 0).
        variant: A key of `acestep.controls.GUIDANCE`.
        params: Numbers of the variant; those left out are its defaults.
    """

    def __init__(
        self,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        variant: GuidanceVariant = "apg_classic",
        params: Mapping[str, float] | None = None,
    ) -> None:
        self.scale = scale
        # Times are float32, so its borders are: 0.8 includes the time that float32 has for 0.8.
        low, high = torch.tensor(interval, dtype=torch.float32).tolist()
        self.interval = (low, high)
        self.variant = variant
        self.params = with_defaults(variant, params)
        self.momentum = MomentumBuffer(momentum=self.params.get("momentum", 0.0))

    def wanted(self, t: float) -> bool:
        return self.scale > 1.0 and self.interval[0] <= t <= self.interval[1]

    def combine(self, x: Tensor, t: float, cond: Tensor, uncond: Tensor, corrector: bool = False) -> Tensor:
        """Guided velocity `[frames, channels]`.

        `corrector` marks Heun's second evaluation: APG then falls back to plain guidance, so that its momentum moves once per
        step, and so does ADG at t = 0, where it would divide by zero.
        """
        if self.variant == "cfg" or (corrector and self.variant == "apg_classic") or t <= 0.0:
            return uncond + self.scale * (cond - uncond)
        if self.variant != "apg_classic":
            clip = self.params.get("angle_clip")
            return angle_guidance(x, t, cond, uncond, self.scale, clip, keep_length=self.variant == "adg_w_norm")
        guided = normalized_guidance(
            pred_cond=cond[None],
            pred_uncond=uncond[None],
            guidance_scale=self.scale - 1.0,
            momentum_buffer=self.momentum,
            eta=self.params["eta"],
            norm_threshold=self.params["norm_threshold"],
            use_original_formulation=True,
            norm_dim=(1,),
        )
        return guided[0]


def angle_guidance(
    x: Tensor, t: float, cond: Tensor, uncond: Tensor, scale: float, clip: float | None, *, keep_length: bool = False
) -> Tensor:
    """Angle-based dynamic guidance: turn the conditional estimate of the song away from the unconditional one, frame by frame.

    The angle between both estimates is stretched by `scale - 1` and, unless `clip` is None, clipped to it (radians). `keep_length`
    brings each channel of the result back to the length over time that the conditional estimate has.
    """
    weight = max(scale - 1.0, 0.0) + 1e-3
    if x.device.type == "mps":  # no float64 there
        on_cpu = angle_guidance(x.cpu(), t, cond.cpu(), uncond.cpu(), scale, clip, keep_length=keep_length)
        return on_cpu.to(x.device)
    a, b = (x - t * cond).double(), (x - t * uncond).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-12).unsqueeze(-1)
    theta = torch.acos(cosine.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    turned = weight * theta if clip is None else (weight * theta).clamp(-clip, clip)
    difference = a - b
    along = (difference * b).sum(-1, keepdim=True) / (b.square().sum(-1, keepdim=True) + 1e-8) * b
    across = difference - along
    sine = theta.sin()
    factor = torch.where(sine > _PARALLEL, turned.sin() / sine.clamp_min(math.ulp(1.0)), weight)
    guided = turned.cos() * a + across * factor
    if keep_length:
        guided = guided * a.norm(dim=0, keepdim=True) / guided.norm(dim=0, keepdim=True).clamp_min(1e-12)
    return ((x.double() - guided) / t).to(cond.dtype)


def with_defaults(variant: GuidanceVariant, params: Mapping[str, float] | None) -> dict[str, float]:
    return {**{name: p.default for name, p in GUIDANCE[variant].items()}, **(params or {})}


def resolve(request: SongRequest, defaults: VariantDefaults, told: list[Adjustment]) -> float:
    """The scale; 1 is off, and what else was asked of guidance then has no effect."""
    scale = request.guidance_scale if request.guidance_scale is not None else defaults.guidance_scale
    reason = "guidance_scale 1 switches guidance off"
    if defaults.distilled:
        reason = "guidance is distilled into this checkpoint"
        if scale > 1.0:
            told.append(Adjustment(field="guidance_scale", asked=scale, given=1.0, reason=reason))
            scale = 1.0
    if scale <= 1.0:
        if request.use_adg:
            told.append(Adjustment(field="use_adg", asked=True, given=False, reason=reason))
        if request.guidance_variant != "apg_classic":
            told.append(Adjustment(field="guidance_variant", asked=request.guidance_variant, given=None, reason=reason))
        if request.guidance_params:
            told.append(Adjustment(field="guidance_params", asked=request.guidance_params, given=None, reason=reason))
    return scale
