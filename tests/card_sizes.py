"""What a request for ten minutes in a batch of eight becomes on a card of each size, through a server and in process."""

from __future__ import annotations

from typing import Any, NamedTuple


class Size(NamedTuple):
    """Size in GiB, detected or given: tier, longest song, largest batch, planner on. Planner and renderer share the one card here, so where the
    planner is on the table's columns "planner on the same card" hold."""

    gib: float
    detected: bool
    tier: str
    longest: int
    batch: int
    planner: bool

    @property
    def env(self) -> dict[str, str]:
        return {"MAX_CUDA_VRAM": f"{self.gib:g}", "MAX_CUDA_VRAM_AS_DETECTED": "1" if self.detected else "0"}


SIZES = [
    Size(3, False, "tier1", 180, 1, False),
    Size(4, False, "tier1", 180, 1, False),
    Size(6, False, "tier2", 360, 1, False),
    Size(7.9, False, "tier3", 360, 2, False),
    Size(8, False, "tier4", 360, 4, False),
    Size(12, False, "tier5", 240, 2, True),
    Size(15.7, True, "tier6", 480, 4, True),
    Size(16, False, "tier6", 480, 4, True),
    Size(22.5, False, "tier6", 480, 4, True),
    Size(23.99, True, "unlimited", 600, 8, True),
    Size(24, False, "unlimited", 600, 8, True),
    Size(80, False, "unlimited", 600, 8, True),
]
SOME = [
    size for size in SIZES if size.gib in (6, 12, 23.99)
]  # for the real server: no planner, a small card with one, no limits
ARGS = {"engine": "simulated", "profile": "h100-sxm", "graceful_shutdown_s": 1}
ASKED = {"prompt": "a song", "duration": 600, "batch_size": 8, "seed": 1, "steps": 1}


def check_renderer(size: Size, told: dict[str, Any]) -> None:
    """What the renderer says of its card."""
    assert told["tier"] == size.tier
    assert (told["limits"]["max_duration"], told["limits"]["max_batch"]) == (size.longest, size.batch)


def check_answers(size: Size, job: dict[str, Any], strict: tuple[int, dict[str, Any]]) -> None:
    """What became of `ASKED`, and the status and body of the answer where it was asked for with `strict`."""
    assert job["request"]["duration"] == size.longest
    assert job["request"].get("batch_size", 1) == size.batch
    warnings = {w["field"]: w for w in job["warnings"]}
    assert ("duration" in warnings) == (size.longest < 600)
    assert ("batch_size" in warnings) == (size.batch < 8)
    assert ("thinking" in warnings) == (not size.planner)
    for warning in warnings.values():
        assert size.tier in warning["reason"], warning
    if size.longest < 600 or size.batch < 8:
        assert (strict[0], strict[1]["type"]) == (422, "urn:acestep:limit_exceeded")
    else:
        assert strict[0] == 202
