"""The JSON schema made from KubeRay's CRD agrees with what an API server does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from acestep.errors import InvalidRequest
from deployments.k8s import extra
from deployments.k8s.schema import CRD_FILE, check_rayservice, find_crd, rayservice_schema
from tests.k8s.conftest import Document


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(rayVersoin="2.60.0"), "rayVersoin"),
        (lambda c: c["autoscalerOptions"].update(version="v3"), "v3"),
        (lambda c: c["workerGroupSpecs"][0].update(maxReplicas="2"), "'2' is not of type"),
        (lambda c: c["workerGroupSpecs"][0].update(label={}), "label"),
        (lambda c: c["workerGroupSpecs"][0].pop("groupName"), "'groupName' is a required property"),
        (lambda c: c["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(imagePolicy="x"), "imagePolicy"),
        (lambda c: c["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(ports=[{"containerPort": "8000"}]), "'8000' is not of type"),
        (lambda c: c.pop("headGroupSpec"), "'headGroupSpec' is a required property"),
        (lambda c: c["headGroupSpec"].update(rayStartParams=None), "None is not of type"),
    ],
)  # fmt: skip
def test_unknown_and_mistyped_fields_are_found(
    edit: Any, says: str, production: Document, crd_schema: Document
) -> None:
    assert list(check_rayservice(production, crd_schema)) == []
    edit(production["spec"]["rayClusterConfig"])
    assert says in "\n".join(f.message for f in check_rayservice(production, crd_schema))


def test_what_the_server_fills_in_need_not_be_said(production: Document, crd_schema: Document) -> None:
    group = production["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    del group["minReplicas"], group["maxReplicas"]
    assert list(check_rayservice(production, crd_schema)) == []


def test_a_number_or_a_text_where_kubernetes_takes_both(production: Document, crd_schema: Document) -> None:
    limits = production["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ]
    limits["cpu"] = 2
    assert list(check_rayservice(production, crd_schema)) == []


def test_nullable_and_free_objects() -> None:
    crd = {
        "spec": {
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "properties": {
                                "maybe": {"type": "string", "nullable": True},
                                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"a": {"type": "integer"}}},
                                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                            },
                        }
                    },
                }
            ]
        }
    }  # fmt: skip
    schema = rayservice_schema(crd)
    base = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "x"}}
    schema["properties"]["kind"] = {}
    assert list(check_rayservice(base | {"maybe": None, "free": {"b": 1}, "map": {"k": "v"}}, schema)) == []
    wrong = list(check_rayservice(base | {"maybe": 1, "free": {"a": "x"}, "map": {"k": 1}}, schema))
    assert len(wrong) == 3


def test_a_crd_without_v1_is_too_old() -> None:
    with pytest.raises(InvalidRequest, match=r"KubeRay 1\.7"):
        rayservice_schema({"spec": {"versions": [{"name": "v1alpha1", "served": True}]}})


def test_where_the_crd_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERAY_CRD_DIR", raising=False)
    assert find_crd() is None
    with pytest.raises(InvalidRequest, match="Helm chart"):
        find_crd(tmp_path)
    (tmp_path / CRD_FILE).touch()
    monkeypatch.setenv("KUBERAY_CRD_DIR", str(tmp_path))
    assert find_crd() == find_crd(tmp_path) == tmp_path / CRD_FILE


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"acestep-serve\[k8s\]"):
        extra.needs("package_that_nobody_has.inside")
