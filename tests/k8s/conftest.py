from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate.utils
import pytest
import yaml

from deployments.k8s import check
from deployments.k8s.check import rayservice_of
from deployments.k8s.schema import CRD_ENV, LOADER, find_crd, read_schema

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(p.name for p in (K8S / "overlays").iterdir() if (p / "kustomization.yaml").exists())
Document = dict[str, Any]


def tool(name: str) -> Path:
    """A program of tests/k8s/install_tools.sh, or one on the PATH."""
    own = ROOT / ".tools" / name
    found = own if own.exists() else shutil.which(name)
    if found is None or (name == "kubectl" and not _knows_components(str(found))):
        pytest.skip(f"{name} is not here, or too old: run tests/k8s/install_tools.sh")
    return Path(found)


@cache
def _knows_components(kubectl: str) -> bool:
    """Whether this kubectl has kustomize 5; Debian's has 2, which knows neither components nor replacements."""
    done = subprocess.run(
        [kubectl, "version", "--client", "--output=yaml"], capture_output=True, text=True, check=False
    )
    version = str((yaml.safe_load(done.stdout) or {}).get("kustomizeVersion", ""))
    return version.startswith("v") and int(version[1:].partition(".")[0]) >= 5


@cache
def build(overlay: str) -> str:
    """`kubectl kustomize` of an overlay."""
    done = subprocess.run(
        [str(tool("kubectl")), "kustomize", str(K8S / "overlays" / overlay)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _parsed(overlay: str) -> list[Document]:
    return [d for d in yaml.load_all(build(overlay), Loader=LOADER) if d]


@pytest.fixture(scope="session", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """kubernetes-validate and the CRD are megabytes for every object; hundreds of checks of one run share what was parsed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "read_schema", cache(read_schema))
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@pytest.fixture(scope="session")
def rendered() -> Callable[[str], list[Document]]:
    """Objects of an overlay by its name, fresh for every call."""

    def objects(overlay: str) -> list[Document]:
        return copy.deepcopy(_parsed(overlay))

    return objects


@pytest.fixture
def production(rendered: Callable[[str], list[Document]]) -> Document:
    """The RayService with most in it, to be broken by tests."""
    return copy.deepcopy(rayservice_of(rendered("production")))


@pytest.fixture(scope="session")
def schema() -> Document | None:
    """KubeRay's own schema of a RayService, where its CRD is here."""
    path = find_crd()
    return read_schema(path) if path else None


@pytest.fixture
def crd_schema(schema: Document | None) -> Document:
    if schema is None:
        pytest.skip(f"{CRD_ENV} does not name the folder of KubeRay's ray.io_rayservices.yaml")
    return schema
