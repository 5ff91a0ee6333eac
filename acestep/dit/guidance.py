"""Classifier-free guidance as ACE-Step uses it: APG on the way, ADG on request. All per item, on unpadded frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from acestep.checkpoints.modules import MomentumBuffer, normalized_guidance

APG_MOMENTUM = -0.75
APG_NORM_THRESHOLD = 2.5
ADG_MAX_ANGLE = 3.14 / 6  # upstream's literal
_PARALLEL = 1e-3  # below this sine the two predictions count as parallel


class Guidance:
    """Guidance of one item; holds APG's momentum between its steps.

    Args:
        scale: Guidance scale; 1 and below means none.
        interval: Closed range of t in which guidance is applied (t runs from 1, noise, to 0).
        angle: ADG in place of APG.
    """

    def __init__(self, scale: float, interval: tuple[float, float] = (0.0, 1.0), angle: bool = False) -> None:
        self.scale = scale
        # Times are float32, so its borders are: 0.8 includes the time that float32 has for 0.8.
        low, high = torch.tensor(interval, dtype=torch.float32).tolist()
        self.interval = (low, high)
        self.angle = angle
        self._momentum = MomentumBuffer(momentum=APG_MOMENTUM)

    def wanted(self, t: float) -> bool:
        return self.scale > 1.0 and self.interval[0] <= t <= self.interval[1]

    def combine(self, x: Tensor, t: float, cond: Tensor, uncond: Tensor, corrector: bool = False) -> Tensor:
        """Guided velocity `[frames, channels]`.

        `corrector` marks Heun's second evaluation: APG then falls back to plain guidance, so that its momentum moves once per
        step, and so does ADG at t = 0, where it would divide by zero.
        """
        if (corrector and not self.angle) or t <= 0.0:
            return uncond + self.scale * (cond - uncond)
        if self.angle:
            return angle_guidance(x, t, cond, uncond, self.scale)
        guided = normalized_guidance(
            pred_cond=cond[None],
            pred_uncond=uncond[None],
            guidance_scale=self.scale - 1.0,
            momentum_buffer=self._momentum,
            eta=0.0,
            norm_threshold=APG_NORM_THRESHOLD,
            use_original_formulation=True,
            norm_dim=(1,),
        )
        return guided[0]


def angle_guidance(x: Tensor, t: float, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Angle-based dynamic guidance: turn the conditional estimate of the song away from the unconditional one, frame by frame.

    The angle between both estimates is stretched by `scale - 1` and clipped to 30 degrees.
    """
    weight = max(scale - 1.0, 0.0) + 1e-3
    if x.device.type == "mps":  # no float64 there
        return angle_guidance(x.cpu(), t, cond.cpu(), uncond.cpu(), scale).to(x.device)
    a, b = (x - t * cond).double(), (x - t * uncond).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-12).unsqueeze(-1)
    theta = torch.acos(cosine.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    turned = (weight * theta).clamp(-ADG_MAX_ANGLE, ADG_MAX_ANGLE)
    difference = a - b
    along = (difference * b).sum(-1, keepdim=True) / (b.square().sum(-1, keepdim=True) + 1e-8) * b
    across = difference - along
    sine = theta.sin()
    factor = torch.where(sine > _PARALLEL, turned.sin() / sine.clamp_min(math.ulp(1.0)), weight)
    guided = turned.cos() * a + across * factor
    return ((x.double() - guided) / t).to(cond.dtype)
