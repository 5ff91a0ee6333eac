"""A simulated fleet of unequal cards: scaling policy, routing, replicas and ETA, over the product's own pure functions.

    python -m benchmarks.fleet [--quick] [--json] [--plot fleet.svg]
    python -m benchmarks.fleet --mix albums [--quick] [--json]    # planned fleets for one mix alone
    python -m benchmarks.fleet --real [--json]       # the simulator against the service, a few minutes

Nothing here is a measurement of a card: times come from cost profiles. What is compared is what decisions make of the same cards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fleet_plans, fleet_real
from benchmarks.fleet_policies import RequestCount, RoundRobin
from deployments.capacity.pools import PoolSpec, Scaler
from deployments.capacity.result import Result, quantile
from deployments.capacity.scaling import OURS, Delays, SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.traffic import Arrival, Kind, arrivals, request_of, shipped

SMALL_LM, LM = "acestep-5Hz-lm-0.6B", "acestep-5Hz-lm-1.7B"
DIT = "acestep-v15-turbo"
SERVE = Delays()


RERENDERS = Kind(name="renders without planning", share=1, duration=(60, 240), batch=(1, 2, 4), thinking=False)


def day(jobs: int, *, seed: int = 1, hours: float = 24.0, burst_share: float = 0.25) -> list[Arrival]:
    """The shipped mix without deadlines that somebody asked for: late is what takes much longer than a typical card needs for it."""
    service = shipped()["service"]
    kinds = tuple(kind.model_copy(update={"deadline_s": None}) for kind in service.kinds)
    traffic = service.model_copy(update={"kinds": kinds, "burst_share": burst_share, "burst_jobs": (10, 60)})
    return arrivals(traffic, jobs=jobs, hours=hours, seed=seed)


def mixed_fleet(scale: int) -> list[PoolSpec]:
    """About ten times `scale` cards: many small ones, few large ones."""
    return [
        PoolSpec("lm-tier4", "plan", "rtx-3060-ti-8", "tier4", SMALL_LM, scale),
        PoolSpec("lm-tier5", "plan", "rtx-3060-12", "tier5", LM, scale),
        PoolSpec("lm-tier6", "plan", "rtx-4080", "tier6", LM, max(1, scale // 2)),
        PoolSpec("dit-tier4", "render", "rtx-3060-ti-8", "tier4", DIT, 2 * scale),
        PoolSpec("dit-tier5", "render", "rtx-3060-12", "tier5", DIT, 2 * scale),
        PoolSpec("dit-tier6", "render", "rtx-4080", "tier6", DIT, scale),
        PoolSpec("dit-24", "render", "rtx-4090", "unlimited", DIT, scale),
        PoolSpec("dit-80", "render", "h100-sxm", "unlimited", DIT, max(1, scale // 2)),
    ]


def autoscaling(jobs: int, scale: int, *, hours: float, thorough: bool) -> dict[str, Any]:
    """Late jobs against GPU hours for both policies on one day, at several settings of each."""
    jobs_of_day = day(jobs, hours=hours)
    specs = mixed_fleet(scale)

    def seconds(drain_s: float, down: float) -> Callable[[PoolSpec], Scaler]:
        return lambda pool: SecondsOfWork(pool, drain_s, Delays(1.0, down, 2 * down))

    def count(per_replica: float, delays: Delays) -> Callable[[PoolSpec], Scaler]:
        return lambda pool: RequestCount(pool, per_replica, delays)

    ours = [(15.0, 60.0), (30.0, 60.0), (60.0, 30.0)]
    if thorough:
        ours += [(10.0, 120.0), (30.0, 300.0), (120.0, 30.0)]
    counts = (1, 2, 4) if thorough else (2, 4)
    rows = [
        _row("seconds of work", f"{d:g} s, down {w:g} s", Simulator(specs, jobs_of_day, seconds(d, w)).run())
        for d, w in ours
    ]
    rows += [
        _row("request count, Serve's delays", f"{n} per replica", Simulator(specs, jobs_of_day, count(n, SERVE)).run())
        for n in counts
    ]
    rows += [
        _row("request count, our delays", f"{n} per replica", Simulator(specs, jobs_of_day, count(n, OURS)).run())
        for n in (counts if thorough else (1,))
    ]
    for unit in ("gpu_hours", "price"):
        curve = sorted((r[unit], r["late"]) for r in rows if r["policy"] == "seconds of work")
        for row in rows:
            row[f"late_of_ours_at_this_{unit}"] = _on_curve(curve, row[unit])
    return {"jobs": len(jobs_of_day), "hours": hours, "cards": sum(s.max_replicas for s in specs), "rows": rows}


def _row(policy: str, setting: str, result: Result) -> dict[str, Any]:
    return {
        "policy": policy, "setting": setting, "late": result.late, "gpu_hours": round(result.gpu_hours, 1),
        "price": round(result.cost, 1), "p50_s": round(result.latency(0.5), 1), "p95_s": round(result.latency(0.95), 1),
        "p99_s": round(result.latency(0.99), 1),
    }  # fmt: skip


def _on_curve(curve: Sequence[tuple[float, float]], at: float) -> int | None:
    """Late jobs at a cost, between two settings; None below the cheapest, the dearest setting's above it."""
    if at < curve[0][0]:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= at <= x1:
            return round(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return round(curve[-1][1])


def replicas(jobs: int) -> dict[str, Any]:
    """Throughput of 1, 2 and 4 renderer replicas when all work is there at once."""
    rng = random.Random(3)
    songs = [
        Arrival(0.0, request_of(RERENDERS, float(rng.choice((60, 120, 180))), 1, 6), "key", 120.0, 1e9)
        for _ in range(jobs)
    ]
    per_hour = {}
    for n in (1, 2, 4):
        spec = [PoolSpec("dit", "render", "rtx-4090", "unlimited", DIT, n)]
        per_hour[n] = 3600 * jobs / Simulator(spec, songs, None).run().span_s
    return {
        "songs_per_hour": {str(n): round(v) for n, v in per_hour.items()},
        "speedup": round(per_hour[4] / per_hour[1], 2),
    }


def eta(jobs: int, scale: int, *, hours: float) -> dict[str, Any]:
    """How far the time told was off, relative to the time taken, on a day with bursts: a third of the jobs come 10 to 60 at once."""
    jobs_of_day = day(jobs, burst_share=0.35, hours=hours)
    out: dict[str, Any] = {}
    fixed = Simulator(mixed_fleet(scale), jobs_of_day, None).run()
    scaled = Simulator(mixed_fleet(4 * scale), jobs_of_day, SecondsOfWork).run()
    for name, result in (("fixed", fixed), ("autoscaled", scaled)):
        errors: dict[str, list[float]] = {"at submit, length given": [], "at submit, all": [], "with the plan, all": []}
        for song in result.songs:
            if song.finished is None or song.eta_s is None or song.later_eta_s is None:
                continue
            taken = song.finished - song.arrival.at
            errors["at submit, all"].append(abs(song.eta_s - taken) / taken)
            errors["with the plan, all"].append(abs(song.later_eta_s - taken) / taken)
            if song.arrival.request.duration is not None:
                errors["at submit, length given"].append(errors["at submit, all"][-1])
        out[name] = {
            k: {"p50": round(quantile(v, 0.5), 3), "p90": round(quantile(v, 0.9), 3)} for k, v in errors.items()
        }
    return out


def routing(jobs: int, scale: int, *, hours: float) -> dict[str, Any]:
    """The same fixed fleet, jobs placed by cost or dealt out in turn."""
    jobs_of_day = day(jobs, hours=hours)
    specs = mixed_fleet(scale)
    rows = {}
    for name, simulator in (("cost", Simulator), ("round_robin", RoundRobin)):
        result = simulator(specs, jobs_of_day, None).run()
        rows[name] = {
            "late": result.late, "p50_s": round(result.latency(0.5), 1), "p95_s": round(result.latency(0.95), 1),
            "p99_s": round(result.latency(0.99), 1), "price_of_busy_time": round(result.busy_cost, 1),
        }  # fmt: skip
    return {"jobs": len(jobs_of_day), "cards": sum(s.max_replicas for s in specs), **rows}


def plot(result: dict[str, Any], path: Path) -> None:
    """Late jobs over GPU hours, as a picture of the kind that the path's suffix names."""
    from matplotlib.figure import Figure  # of the extra `dev`, for this option alone

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, int, str]]] = {}
    for row in result["rows"]:
        series.setdefault(row["policy"], []).append((row["gpu_hours"], row["late"], row["setting"]))
    for policy, points in series.items():
        hours, late, settings = zip(*sorted(points), strict=True)
        axes.plot(hours, late, "o-", label=policy)
        for point in zip(hours, late, settings, strict=True):
            axes.annotate(point[2], point[:2], textcoords="offset points", xytext=(6, 6), fontsize="small")
    axes.set(
        title=f"One simulated day, {result['jobs']} jobs: late jobs by GPU hours",
        xlabel="GPU hours",
        ylabel="late jobs",
    )
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def table(results: dict[str, Any]) -> str:
    """All results as text."""
    scaling = results["autoscaling"]
    lines = [
        f"Autoscaling: one day in {scaling['hours']:g} h, {scaling['jobs']} jobs, up to {scaling['cards']} cards of six kinds",
        f"{'policy':31} {'setting':15} {'late':>5} {'GPU h':>7} {'price':>7} {'p50 s':>6} {'p95 s':>6} {'p99 s':>6}"
        f"  late with ours at the same GPU hours, the same price",
    ]
    for r in scaling["rows"]:
        same = [r[f"late_of_ours_at_this_{unit}"] for unit in ("gpu_hours", "price")]
        lines.append(
            f"{r['policy']:31} {r['setting']:15} {r['late']:5} {r['gpu_hours']:7} {r['price']:7} {r['p50_s']:6} {r['p95_s']:6} "
            f"{r['p99_s']:6}  {' '.join('    -' if late is None else f'{late:5}' for late in same)}"
        )
    speed = results["replicas"]
    lines += ["", f"Replicas 1, 2, 4: {speed['songs_per_hour']} songs per hour, {speed['speedup']}x"]
    lines += ["", "ETA, |foretold - taken| / taken, on a day with bursts"]
    for fleet, errors in results["eta"].items():
        for which, e in errors.items():
            lines.append(f"  {fleet:10} {which:24} p50 {e['p50']:.1%}  p90 {e['p90']:.1%}")
    lines += ["", "Planned fleets", fleet_plans.text(results["plans"])]
    dealt = results["routing"]
    lines += ["", f"Routing: {dealt['jobs']} jobs on {dealt['cards']} cards that are always on"]
    for name in ("cost", "round_robin"):
        r = dealt[name]
        lines.append(
            f"  {name:12} late {r['late']:5}  p50 {r['p50_s']:6} s  p95 {r['p95_s']:6} s  p99 {r['p99_s']:6} s  price of busy time {r['price_of_busy_time']}"
        )
    return "\n".join(lines)


def run(*, quick: bool) -> dict[str, Any]:
    began = time.perf_counter()
    jobs, scale, hours = (1_000, 16, 2.5) if quick else (12_000, 24, 24.0)
    results: dict[str, Any] = {
        "autoscaling": autoscaling(jobs, scale, hours=hours, thorough=not quick),
        "replicas": replicas(200 if quick else 2_000),
        "eta": eta(jobs, max(1, scale // 4), hours=hours),
        "routing": routing(jobs, max(1, scale // 4), hours=hours),
    }
    results["plans"] = fleet_plans.marks(quick=quick)
    results["wall_s"] = round(time.perf_counter() - began, 1)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller day, within 50 s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--plot", type=Path, help="draw late jobs over GPU hours into this file (.svg, .png)")
    parser.add_argument("--mix", choices=sorted(shipped()), help="only fleets planned for this mix, and spot cards")
    parser.add_argument(
        "--real", action="store_true", help="instead: the same jobs through the service, with simulated engines"
    )
    options = parser.parse_args(arguments)
    if options.real:
        compared = fleet_real.compare()
        print(json.dumps(compared) if options.json else fleet_real.text(compared))
        return 0
    if options.mix:
        planned = fleet_plans.marks(quick=options.quick, mixes=[options.mix])
        print(json.dumps(planned) if options.json else fleet_plans.text(planned))
        return 0
    results = run(quick=options.quick)
    if options.plot:
        plot(results["autoscaling"], options.plot)
    print(json.dumps(results) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
