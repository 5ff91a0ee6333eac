"""`acestep fleet`: from cards and a traffic to a config, its replay and its groups, and what is said of what it cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from acestep.cli import main as cli
from deployments.capacity import plan as plans
from deployments.k8s.render import GroupSize, read_sizes
from tests.k8s.conftest import K8S

DIT = "acestep-v15-turbo"
CLIPS = {"name": "clips", "share": 1, "duration": [10, 30], "deadline_s": 60}


@pytest.fixture(autouse=True)
def _short_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleets of few cards are told apart by a few hundred jobs."""
    monkeypatch.setattr(plans, "SEARCH_JOBS", 150)
    monkeypatch.setattr(plans, "CONFIRM_JOBS", 250)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`acestep ...` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["acestep", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return command


def test_from_cards_to_a_config_its_replay_and_its_groups(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "mix.yaml").write_text(json.dumps({"jobs_per_hour": 20, "by_hour": "flat", "kinds": [CLIPS]}))
    code, said, err = run(
        "fleet", "plan", "--traffic", "mix.yaml", "--cards", "rtx-3060-12=2@0.5,rtx-3090@0.9", "--always-on",
        "-o", "fleet.yaml", "--files-url", "/srv/songs",
    )  # fmt: skip
    assert code == 0, err
    assert "$1.0" in said, "two of the cheap card"
    assert "95%" in said
    assert run("config", "validate", "fleet.yaml")[0] == 0
    config = yaml.safe_load((tmp_path / "fleet.yaml").read_text())
    pools = {a["name"]: a["args"] for a in config["applications"] if a["name"] != "router"}
    assert {n: (a["tiers"], a["min_replicas"], a["max_replicas"]) for n, a in pools.items()} == {
        "lm-tier5": (["tier5"], 1, 1), "dit-tier5": (["tier5"], 1, 1)
    }  # fmt: skip
    assert pools["lm-tier5"]["model"] == "acestep-5Hz-lm-1.7B"
    code, said, err = run("fleet", "replay", "fleet.yaml", "--traffic", "mix.yaml", "--cards", "rtx-3060-12", "--jobs", "50", "--svg", "day.svg", "--json")  # fmt: skip
    assert code == 0, err
    trial = json.loads(said)
    assert trial["kept"] == 1.0
    assert [s["card"] for s in trial["specs"]] == ["rtx-3060-12", "rtx-3060-12"]
    drawing = ElementTree.fromstring((tmp_path / "day.svg").read_text())
    assert len(drawing.findall(".//{*}polyline")) == 3, "waits, and the cards of two pools"
    code, _, err = run(
        "k8s", "render", "fleet", "mine/fleet", "--serve-config", "fleet.yaml", "--components", str(K8S / "components")
    )
    assert code == 0, err
    assert read_sizes(tmp_path / "mine" / "fleet") == {"gpu-tier5": GroupSize(2, 2)}
    rendered = yaml.safe_load((tmp_path / "mine/fleet/serve_config.yaml").read_text())
    assert {a["name"] for a in rendered["applications"]} == {"router", "lm-tier5", "dit-tier5"}
    assert "planner:acestep-5Hz-lm-1.7B" in (tmp_path / "mine/fleet/models.properties").read_text()


def test_cards_that_are_paid_for_cost_nothing(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(json.dumps({"jobs_per_hour": 20, "by_hour": "flat", "kinds": [CLIPS]}))
    mine = ("fleet", "plan", "--traffic", "mix.yaml", "--cards", "rtx-3060-12=2@0", "--always-on")
    code, said, err = run(*mine)
    assert code == 0, err
    assert "for less than $0.000 an hour, whoever waits;" in said
    assert "the card costs nothing" in said
    code, said, err = run(*mine, "--json")
    assert code == 0, err
    assert json.loads(said)["gap"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--traffic", "song"], "Did you mean songs?"), (["plan", "--cards", "rtx-3900"], "no card 'rtx-3900', did you mean rtx-3090?"),
        (["plan", "--planner", "acestep-5Hz-lm-1.8B"], "did you mean acestep-5Hz-lm-1.7B?"), (["plan", "--planner", DIT], f"no planner is called '{DIT}'"),
        (["plan", "--model", "acestep-v15-trubo"], "did you mean acestep-v15-turbo?"), (["plan", "-o", "x.yaml"], "--files-url"),
        (["plan", "--from-jobs", "soon"], "--from-jobs"), (["plan", "--from-jobs", "1d", "--rate", "5"], "--rate"),
        (["plan", "--prices", "none.json"], "--prices"), (["replay", "none.yaml"], "none.yaml"),
    ],
)  # fmt: skip
def test_what_the_commands_cannot_use_is_named(
    run: Callable[..., tuple[int, str, str]], arguments: list[str], says: str
) -> None:
    code, _, err = run("fleet", *arguments)
    assert code == 1
    assert says in err
