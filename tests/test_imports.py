"""What each process imports: nothing of the heavy libraries that it does not run. Asked of sys.modules, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT, free_port, tiny_checkpoints

COMPILER = ("torch._dynamo.convert_frame", "torch._inductor")
TRAINING = ("accelerate.test_utils", "botocore", "datasets", "peft", "torchao", "scipy", "sklearn", "pandas")
SERVICE = ("ray", "fastapi", "starlette", "sqlalchemy", "alembic")


def imported(code: str, home: Path, then: str = "") -> set[str]:
    """Names in sys.modules after `code`, in a new interpreter, which then runs `then`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACESTEP_")} | {
        "ACESTEP_HOME": str(home), "ACESTEP_CHECKPOINTS": str(tiny_checkpoints()), "ACESTEP_DEVICE": "cpu",
    }  # fmt: skip
    told = "\nimport json, sys; print(json.dumps(sorted(n for n, m in sys.modules.items() if m is not None)))"
    done = subprocess.run(
        [sys.executable, "-c", code + told + "\n" + then], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def found(names: set[str], unwanted: tuple[str, ...]) -> list[str]:
    return sorted(n for n in names if any(n == u or n.startswith(u + ".") for u in unwanted))


LOAD_RENDERER = """
from acestep.checkpoints import resolve as checkpoint
from acestep.dit.renderer import Renderer
from acestep.settings.resolve import resolve
Renderer.load(checkpoint("tiny", "renderer"), resolve("render").renderer).close()
"""
LOAD_PLANNER = """
from acestep.checkpoints import resolve as checkpoint
from acestep.lm.planner import Planner
from acestep.settings.resolve import resolve
path = checkpoint("tiny-lm", "planner").path
Planner.load(path, resolve("plan").planner, name="tiny-lm", model_hash=None).close()
"""
EVERYTHING = """
from acestep.checkpoints import modules
import diffusers, torch
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.hooks import HookRegistry
import peft, scipy.signal
assert diffusers.AutoencoderOobleck is modules.AutoencoderOobleck
assert diffusers.AceStepTransformer1DModel is modules.AceStepTransformer1DModel
assert diffusers.AceStepPipeline.__call__
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
assert MomentumBuffer is modules.MomentumBuffer
assert torch.distributed.is_available() and torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


def test_a_renderer_has_the_modules_it_runs_and_no_others_of_diffusers_and_transformers(tmp_path: Path) -> None:
    """What was left out can be imported afterwards, and is the same."""
    names = imported(LOAD_RENDERER, tmp_path, then=EVERYTHING)
    assert {"diffusers.models.transformers.ace_step_transformer", "transformers.models.qwen3.modeling_qwen3"} <= names
    assert not found(names, (*COMPILER, *TRAINING, *SERVICE))
    for package in ("diffusers.guiders", "diffusers.hooks", "diffusers.models.autoencoders", "diffusers.pipelines"):
        assert len(found(names, (package,))) <= 3, found(names, (package,))
    assert [n for n in names if n.startswith("transformers.models.") and "modeling_" in n and ".auto." not in n] == [
        "transformers.models.qwen3.modeling_qwen3"
    ]


def test_a_planner_has_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    names = imported(LOAD_PLANNER, tmp_path)
    assert "torch" in names
    assert not found(names, ("diffusers", "transformers", "accelerate", *COMPILER, *TRAINING, *SERVICE))


@pytest.mark.parametrize(
    "before",
    [
        "from transformers import Qwen3ForCausalLM",
        "import diffusers, peft, scipy.signal, torch._dynamo\nfrom diffusers import AutoencoderOobleck" + EVERYTHING,
    ],
    ids=["transformers", "diffusers"],
)
def test_a_process_that_has_imported_the_libraries_before_loads_a_renderer_all_the_same(
    tmp_path: Path, before: str
) -> None:
    assert "acestep.dit.renderer" in imported(f"{before}\n{LOAD_RENDERER}", tmp_path)


def test_builders_import_no_engine_no_database_and_no_encoder(tmp_path: Path) -> None:
    """FastAPI comes with `ray.serve` itself."""
    names = imported("from deployments.app import dit, lm, router\nfor build in (router, lm, dit): build({})", tmp_path)
    assert not found(names, ("torch", "transformers", "diffusers", "sqlalchemy", "alembic", "av", "soundfile"))
    assert not found(names, ("deployments.ingress.router", "deployments.ingress.app", "acestep.lm", "acestep.dit"))


def test_the_router_has_no_torch(tmp_path: Path) -> None:
    names = imported("import deployments.ingress.router", tmp_path)
    assert "deployments.dispatch.dispatcher" in names
    assert not found(names, ("torch", "transformers", "diffusers", "scipy", "pandas", "mcp", "sse_starlette"))


@pytest.mark.parametrize("command", ["--help", "status"])
def test_the_command_line_imports_what_a_command_needs(tmp_path: Path, command: str) -> None:
    code = f"import sys; sys.argv = ['acestep', {command!r}]\nfrom acestep.cli.main import main\n"
    names = imported(code + "try: main()\nexcept SystemExit: pass\n", tmp_path)
    assert not found(
        names, (*SERVICE, "torch", "transformers", "numpy", "deployments.k8s.commands", "acestep.settings")
    )


def test_preparing_the_tiny_checkpoint_asks_neither_torch_nor_a_database(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "serve_config.yaml").read_text().replace("8000", str(free_port())))
    code = f"import sys; sys.argv = ['acestep', 'prepare', {str(config)!r}]\nfrom acestep.cli.main import main\n"
    names = imported(code + "try: main()\nexcept SystemExit as end: assert not end.code\n", tmp_path)
    assert not found(names, ("torch", "transformers", "diffusers", "sqlalchemy", "alembic", "kubernetes"))
