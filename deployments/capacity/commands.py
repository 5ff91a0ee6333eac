"""`acestep fleet`: which cards a traffic needs, and what a fleet would make of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from acestep.checkpoints.published import default_name
from acestep.checkpoints.resolve import check_name
from acestep.cli import output as out
from acestep.errors import InvalidRequest
from acestep.gpu_config import is_lm_model_size_allowed, planner_name
from deployments.capacity.catalogue import Offer, offers
from deployments.capacity.pools import PoolSpec
from deployments.config.args import ARGS_OF_ROLE, default_database_url, parse_args, role_of
from deployments.config.commands import checked
from deployments.config.validate import problems
from deployments.scheduling.pool import NODE_S

app = typer.Typer(
    help="Which cards a traffic needs, and what a fleet would make of it.", no_args_is_help=True, add_completion=False
)

Traffic = Annotated[
    str,
    typer.Option(
        help="A shipped mix (service, jingles, songs, studio, albums), a mix in a YAML file, or jobs in a JSONL file."
    ),
]
Rate = Annotated[
    float | None, typer.Option(min=0.1, max=100_000, help="Jobs an hour on average, in place of the mix's own.")
]
FromJobs = Annotated[
    str | None, typer.Option(help="Instead: what the job store was asked for within this time, such as 7d.")
]
DatabaseUrl = Annotated[str | None, typer.Option(help="Job store of --from-jobs, and of the config; left out: SQLite.")]
CardsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cards", help="These cards only: CARD, CARD=COUNT, CARD@PRICE, CARD=COUNT@PRICE; several with commas."
    ),
]
Prices = Annotated[Path | None, typer.Option(help="Prices in the shape of deployments/capacity/prices.json.")]
Planner = Annotated[
    str | None, typer.Option(help="Planner checkpoint; left out: the published default, or a smaller one that fits.")
]
Model = Annotated[str | None, typer.Option(help="Renderer checkpoint of jobs that name none.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command()
def plan(
    traffic: Traffic = "service",
    rate: Rate = None,
    from_jobs: FromJobs = None,
    database_url: DatabaseUrl = None,
    cards: CardsOption = None,
    prices: Prices = None,
    kept: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the jobs to be done within their deadline.")
    ] = 0.95,
    p95_wait: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds within which 95 of 100 jobs must begin.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.001, help="Dollars an hour, on average, that must not be exceeded.")
    ] = None,
    always_on: Annotated[bool, typer.Option("--always-on", help="No card comes and goes: cards of your own.")] = False,
    spot: Annotated[
        bool,
        typer.Option("--spot", help="All cards of a pool but the first may be spot cards, where they have a price."),
    ] = False,
    planner: Planner = None,
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the Serve config here.")] = None,
    files_url: Annotated[str | None, typer.Option(help="File store that all machines reach, for the config.")] = None,
    as_json: Json = False,
) -> None:
    """The cheapest mix of cards that keeps the goal, confirmed by simulation; -o writes its Serve config."""
    from deployments.capacity.plan import make_plan
    from deployments.capacity.report import groups, plan_text
    from deployments.capacity.solver import Choice
    from deployments.capacity.trial import Goal

    if output is not None:
        out.check(output)
        if files_url is None:
            raise InvalidRequest(
                "--files-url: say where songs go that all machines of the fleet reach: a shared folder, or s3://bucket/songs",
                field="files_url",
            )
    if planner:
        check_name(planner, "planner")
    if model:
        check_name(model, "renderer")
    day = _day(traffic, rate, from_jobs, database_url)
    offered, where = offers(prices, cards or ())
    choice = Choice(
        offered,
        _planner(planner, offered),
        model or default_name("renderer"),
        on_demand=not always_on,
        spot=spot,
        budget=budget,
    )
    goal = Goal(kept, p95_wait)
    made = make_plan(day, choice, goal, told=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps({"keeps": made.keeps, "gap": made.gap, "headroom": made.headroom, "bound": made.bound, "share": made.share,
                               "planner": choice.planner, "best": asdict(made.best), "cheaper": made.cheaper and asdict(made.cheaper),
                               "dearer": made.dearer and asdict(made.dearer)}))  # fmt: skip
    else:
        typer.echo(plan_text(made, choice, goal, where))
    if output is not None:
        out.write(output, config_text(made.best.specs, database_url, files_url).encode())
        sizes = " ".join(f"--group {tier}={least}-{most}" for tier, (least, most) in groups(made.best.specs).items())
        typer.echo(f"{output}: {len(made.best.specs)} pools. serve run {output}; on Kubernetes:", err=True)
        typer.echo(f"acestep k8s render fleet k8s/overlays/mine/fleet --serve-config {output}  # {sizes}", err=True)


@app.command()
def replay(
    fleet: Annotated[
        Path,
        typer.Argument(
            help="Serve config of the fleet, as `acestep fleet plan -o` or `acestep config build` writes it."
        ),
    ],
    traffic: Traffic = "service",
    rate: Rate = None,
    from_jobs: FromJobs = None,
    database_url: DatabaseUrl = None,
    cards: CardsOption = None,
    prices: Prices = None,
    spot: Annotated[
        bool,
        typer.Option(
            "--spot", help="All cards of a pool but the first are spot cards, one is taken away every ten minutes."
        ),
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, max=100_000, help="Jobs to simulate at most: a busier day is a shorter one.")
    ] = 10_000,
    svg: Annotated[Path | None, typer.Option(help="Draw jobs, waits and cards by the hour into this file.")] = None,
    as_json: Json = False,
) -> None:
    """What a fleet would make of a traffic: waits, deadlines kept, utilisation and cost, with a picture."""
    from deployments.capacity.picture import picture
    from deployments.capacity.report import trial_text
    from deployments.capacity.trial import RECLAIM_S, try_out

    if svg is not None:
        out.check(svg)
    data = checked(fleet)
    offered, _ = offers(prices, cards or ())
    specs = specs_of(data, offered, spot=spot)
    arrivals, hours = _day(traffic, rate, from_jobs, database_url)(jobs, 1)
    trial, result = try_out(specs, arrivals, hours, reclaim_s=RECLAIM_S if spot else None)
    typer.echo(json.dumps(asdict(trial)) if as_json else trial_text(trial))
    if svg is not None:
        name = from_jobs or traffic
        out.write(
            svg,
            picture(result, f"{name}: {trial.jobs} jobs, {trial.kept:.1%} in time, ${trial.cost:.2f} an hour").encode(),
        )


def _day(traffic: str, rate: float | None, from_jobs: str | None, database_url: str | None) -> Any:
    from deployments.capacity.recorded import read_jobs, read_traffic, seconds_of, window_of

    if from_jobs is None:
        return read_traffic(traffic, rate)
    if rate is not None:
        raise InvalidRequest("--rate: jobs of the job store come when they came; leave it out", field="rate")
    return window_of(read_jobs(database_url or default_database_url(), seconds_of(from_jobs)))


def _planner(asked: str | None, offered: list[Offer]) -> str:
    """The planner of the fleet: as asked, else the default, or the largest smaller one that some card can hold."""
    from acestep.gpu_config import get_gpu_config

    if asked:
        return asked
    held = {name for offer in offered for name in get_gpu_config(offer.tier).available_lm_models}
    default = default_name("planner")
    return default if is_lm_model_size_allowed(default, tuple(held)) or not held else planner_name("0.6B")


def config_text(specs: tuple[PoolSpec, ...], database_url: str | None, files_url: str | None) -> str:
    """The Serve config of a planned fleet."""
    from deployments.config.build import PoolSize, as_text, config_of

    pools = [
        PoolSize(
            s.name, "lm" if s.role == "plan" else "dit", s.tier, s.min_replicas, s.max_replicas,
            {"model": s.model, **({"drain_backlog_s": s.drain_s} if s.min_replicas != s.max_replicas else {})},
        )
        for s in specs
    ]  # fmt: skip
    grows = any(s.min_replicas != s.max_replicas and s.start_s for s in specs)
    data = config_of(pools, nodes_on_demand=grows, database_url=database_url, files_url=files_url, host="127.0.0.1")
    if found := problems(data):
        raise InvalidRequest("; ".join(found), field="config")
    return as_text(data)


def specs_of(data: dict[str, Any], offered: list[Offer], *, spot: bool = False) -> list[PoolSpec]:
    """The pools of a Serve config as the simulator has them: on the first card offered of each tier.

    Raises:
        InvalidRequest: a pool says no tier, or none of the cards is of its tier.
    """
    from acestep.sizing.profiles import find

    found = []
    for application in data["applications"]:
        role = role_of(application["import_path"])
        if role is None:
            continue
        args = parse_args(ARGS_OF_ROLE[role], application.get("args"), application["name"])
        if not args.tiers:
            raise InvalidRequest(
                f"application {application['name']!r}, args.tiers: a replay needs to know the tier of its cards",
                field="args.tiers",
            )
        tier = args.tiers[0]
        typical = find(tier=tier).name
        mine = [o for o in offered if o.tier == tier]
        offer = next((o for o in mine if o.card == typical), mine[0] if mine else None)
        if offer is None:
            raise InvalidRequest(
                f"--cards: none of them is of {tier}, which pool {application['name']} is for", field="cards"
            )
        if len(mine) == 1:
            offer = mine[0]
        fixed = args.num_replicas
        most, least = (args.max_replicas, args.min_replicas) if fixed is None else (fixed, fixed)
        found.append(
            PoolSpec(
                application["name"], role, offer.card, tier, args.model or default_name("planner" if role == "plan" else "renderer"), most, least,
                offer.price, offer.spot_price if spot else None, NODE_S if args.nodes_on_demand else 0.0, args.drain_backlog_s,
            )
        )  # fmt: skip
    if not any(s.role == "render" for s in found):
        raise InvalidRequest("the config has no renderer pool", field="applications")
    return found
