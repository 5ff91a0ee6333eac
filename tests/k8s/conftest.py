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

from deployments.k8s.manifests import LOADER, Manifest, cluster_of, groups_of, rayservice_of

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


def kustomize(folder: Path) -> list[Document]:
    """The objects that `kubectl kustomize` makes of a folder."""
    return [d for d in yaml.load_all(_text(folder), Loader=LOADER) if d]


def _text(folder: Path) -> str:
    done = subprocess.run([str(tool("kubectl")), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def build(overlay: str) -> str:
    """`kubectl kustomize` of an overlay, as text."""
    return _text(K8S / "overlays" / overlay)


@cache
def _parsed(overlay: str) -> list[Document]:
    return [d for d in yaml.load_all(build(overlay), Loader=LOADER) if d]


@pytest.fixture(scope="session", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """kubernetes-validate reads its files, megabytes, for every object."""
    with pytest.MonkeyPatch.context() as patch:
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
    return dict(rayservice_of(rendered("production")))


def autoscaling_config(service: Manifest) -> dict[str, Any]:
    """The node types, resources and labels that Ray's autoscaler reads from a RayService. Ray has no public reader of them."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    metadata = {"name": service["metadata"]["name"], "namespace": "acestep"}
    spec = {**cluster_of(service), "workerGroupSpecs": groups_of(service)}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    return config
