"""From the fields of `/release_task` to the request's sampling controls. What has no use becomes a warning, as in all of this interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from acestep.controls import GuidanceVariant, SamplingControls, params_problem
from acestep.tasks import FLOW_EDIT_TASKS
from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.acestep.values import Values, as_object

Seeds = Callable[[str, Any], tuple[int, ...] | None]


def control_fields(v: Values, seeds: Seeds) -> dict[str, Any]:
    """Every field of `SamplingControls`; those of flow edit have been settled by `settle_flow_edit`.

    Args:
        seeds: Reads seeds of a field, one for each song.
    """
    fields = {name: v[name] for name in SamplingControls.model_fields}
    fields["dcw_wavelet"] = str(v["dcw_wavelet"]).strip().lower()
    if v["use_adg"] and v["guidance_variant"] == "cfg":
        v.warn("use_adg", True, False, "guidance_variant is cfg")
        fields["use_adg"] = False
    fields["guidance_params"] = _params(v)
    asked = v["retake_seed"]
    fields["retake_seed"] = None if asked in (None, "", -1, "-1") else seeds("retake_seed", asked)
    if v["flow_edit_n_min"] > v["flow_edit_n_max"]:
        v.warn("flow_edit_n_min", v["flow_edit_n_min"], 0.0, "it is above flow_edit_n_max")
        fields["flow_edit_n_min"] = 0.0
    return fields


def settle_flow_edit(v: Values, task: str, *, has_source: bool) -> bool:
    """Whether flow edit is on; what it has no use for is taken out of `v`."""
    if not v["flow_edit_morph"]:
        return False
    reason = ""
    if task not in FLOW_EDIT_TASKS:
        reason = f"it is for the tasks {', '.join(FLOW_EDIT_TASKS)}"
    elif not has_source:
        reason = "there is no source audio to edit"
    if reason:
        v.warn("flow_edit_morph", True, False, reason)
        v.values["flow_edit_morph"] = False
        return False
    unused = ["cover_noise_strength", "audio_cover_strength"] + (["audio_code_string"] if task == "text2music" else [])
    for name in unused:
        if v[name] != (default := FIELDS[name].default):
            v.warn(name, v[name], default, "flow edit has no use for it")
            v.values[name] = default
    return True


def _params(v: Values) -> dict[str, Any] | None:
    """`guidance_params`, with what the fields `eta` and `momentum` say of them."""
    asked = v["guidance_params"]
    params = dict(as_object(asked))
    if not params and asked not in (None, "", {}, "{}"):
        v.warn("guidance_params", asked, None, "not a JSON object")
    variant: GuidanceVariant = (
        "adg" if v["use_adg"] and v["guidance_variant"] == "apg_classic" else v["guidance_variant"]
    )
    if problem := params_problem(variant, params):
        v.warn("guidance_params", asked, None, problem)
        params = {}
    for name in ("eta", "momentum"):
        if v[name] == FIELDS[name].default:
            continue
        if variant != "apg_classic":
            v.warn(name, v[name], None, "it is of guidance_variant apg_classic")
        else:
            params.setdefault(name, v[name])
    return params or None
