"""What the flags of `acestep serve` change in a Serve config."""

from __future__ import annotations

from typing import Any

import pytest
import typer
import yaml

from acestep.errors import InvalidRequest
from deployments.config.validate import problems
from deployments.launch.command import app
from deployments.launch.flags import changed
from deployments.launch.screen import local_url
from tests.server import ROOT

# As ACE-Step's own commands spell them.
UPSTREAM = (
    "--config_path", "--lm_model_path", "--use_flash_attention", "--offload_to_cpu", "--offload_dit_to_cpu", "--init_llm",
    "--device", "--backend", "--quantization", "--port", "--server-name", "--server_name", "--host", "--api-key", "--api_key",
)  # fmt: skip


@pytest.fixture
def config() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    return data


def args(config: dict[str, Any]) -> dict[str, Any]:
    return {a["name"]: a["args"] for a in config["applications"]}


def test_every_flag_of_ace_steps_own_commands_is_known_with_both_strokes() -> None:
    command: Any = typer.main.get_command(app)
    known = {name for parameter in command.params for name in parameter.opts}
    assert set(UPSTREAM) <= known
    assert {"--" + name[2:].replace("_", "-") for name in UPSTREAM} <= known


def test_settings_reach_both_stages_and_win_over_the_file(config: dict[str, Any]) -> None:
    config["applications"][2]["args"] = {"model": "tiny-xl", "settings": {"threads": 1, "device": "cuda"}}
    given = {
        "model": "acestep-v15-turbo",
        "lm_model": "acestep-5Hz-lm-0.6B",
        "device": "cpu",
        "int8": "int8_weight_only",
    }
    made = changed(config, given, host="0.0.0.0", port=8001)
    assert args(made)["router"] == {}
    assert args(made)["lm"] == {"settings": given, "model": "acestep-5Hz-lm-0.6B"}
    assert args(made)["dit"] == {"settings": {"threads": 1, **given}, "model": "acestep-v15-turbo"}
    assert made["http_options"]["port"] == 8001
    assert made["http_options"]["keep_alive_timeout_s"] == 620
    assert problems(made) == []
    assert args(config)["dit"]["model"] == "tiny-xl"  # the file's own is left alone
    assert local_url(made) == "http://127.0.0.1:8001"
    assert changed(config, {}) == config


def test_a_value_that_cannot_be_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="threads: 'many' is not possible"):
        changed(config, {"threads": "many"})
