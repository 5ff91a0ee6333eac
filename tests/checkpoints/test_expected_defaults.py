"""What a checkpoint says of itself goes before what its name suggests."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from acestep.checkpoints import variant_defaults
from acestep.checkpoints.published import expected_defaults
from deployments.ingress.service import defaults_of


@pytest.mark.parametrize(
    ("name", "turbo", "shift"),
    [
        ("acestep-v15-turbo", True, 3.0),
        ("ACE-Step/acestep-v15-turbo-shift1", True, 1.0),
        ("tiny-base", False, 1.0),
        ("acestep-v15-xl-sft", False, 1.0),
        ("mine", True, 3.0),
    ],
)
def test_a_name_suggests_defaults(name: str, turbo: bool, shift: float) -> None:
    expected = expected_defaults(name)
    assert (expected.distilled, expected.shift) == (turbo, shift)


def test_a_replica_knows_better() -> None:
    told = asdict(variant_defaults(False))
    assert defaults_of({"model": "mine", "defaults": told}) == variant_defaults(False)
    assert defaults_of({"model": "mine", "defaults": {**told, "of_a_newer_release": 1}}) == variant_defaults(False)
    assert defaults_of({"model": "mine"}) == variant_defaults(True)
