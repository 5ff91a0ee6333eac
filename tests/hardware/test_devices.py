"""Cards from NVML and torch. NVML itself is stood in for by its own module with its calls replaced: no card is needed."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from acestep.errors import DeviceUnavailable, InvalidRequest
from acestep.gpu_config import tier_row
from acestep.hardware import devices, host, nvml
from acestep.hardware.cards import Device, cpu_device, list_cards, pick
from acestep.hardware.devices import list_devices
from acestep.settings.resolve import resolve
from acestep.units import GIB

MIB = 2**20


class Driver:
    """Three cards: an 8 GB one, one that fell off the bus, and an A100 cut into two slices."""

    CARDS = {
        0: ("NVIDIA GeForce RTX 4060", "GPU-aaaa", 8188, (8, 9)),
        1: ("NVIDIA broken", "GPU-bbbb", 0, (7, 5)),
        2: ("NVIDIA A100-SXM4-40GB", "GPU-cccc", 40960, (8, 0)),
    }
    SLICES = {
        (2, 0): ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-dddd", 19968),
        (2, 3): ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-eeee", 4864),
    }

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = 0
        for name in dir(self):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.CARDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return index

    def _of(self, handle: Any) -> tuple[Any, ...]:
        return self.SLICES[handle] if isinstance(handle, tuple) else self.CARDS[handle]

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return self._of(handle)[0]

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return self._of(handle)[1]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        size = self._of(handle)[2] * MIB
        return SimpleNamespace(total=size, free=size // 2)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        return self.CARDS[handle][3]

    def nvmlDeviceGetMigMode(self, handle: Any) -> tuple[int, int]:
        if handle == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return (1, 1) if handle == 2 else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, i: int) -> Any:
        if (handle, i) not in self.SLICES:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return (handle, i)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Driver(monkeypatch)


def test_every_card_and_slice_is_listed(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = list_cards({})
    assert [(d.index, d.kind, d.mig, d.total_bytes // MIB) for d in found[:-1]] == [
        (0, "cuda", None, 8188),
        (1, "cuda", "3g.20gb", 19968),
        (2, "cuda", "1g.5gb", 4864),
    ]
    assert found[-1].kind == "cpu"
    assert "card 1" in caplog.text
    assert driver.open == 0
    first = found[0]
    assert (first.capability, first.driver, first.free_bytes) == ((8, 9), "570.1", 4094 * MIB)
    assert [tier_row(d).tier for d in found] == ["tier4", "tier6", "tier2", "tier1"]


@pytest.mark.parametrize(
    ("mask", "uuids"),
    [
        ("0", ["GPU-aaaa"]),
        ("2,0", ["MIG-dddd", "GPU-aaaa"]),
        ("MIG-e,GPU-a", ["MIG-eeee", "GPU-aaaa"]),
        ("0,9,2", ["GPU-aaaa"]),
        ("", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices(driver: Driver, mask: str, uuids: list[str]) -> None:
    found = list_cards({"CUDA_VISIBLE_DEVICES": mask})[:-1]
    assert [d.uuid for d in found] == uuids
    assert [d.index for d in found] == list(range(len(uuids)))


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED), OSError("bad ELF"), KeyError(1)]
)
def test_a_missing_or_broken_driver_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert nvml.read_cards() == []
    assert [d.kind for d in list_cards({})] == ["cpu"]


def test_a_driver_that_breaks_after_its_start(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", fail)
    assert [d.kind for d in list_cards({})] == ["cpu"]
    assert driver.open == 0


@pytest.mark.parametrize("call", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
def test_a_library_that_answers_nonsense(driver: Driver, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def nonsense(*_: object) -> str:
        return b"\xff\xfe".decode()  # as pynvml does with what it gets

    monkeypatch.setattr(pynvml, call, nonsense)
    assert [d.kind for d in list_cards({})] == ["cpu"]
    assert driver.open == 0


def test_a_card_that_this_torch_cannot_use_is_listed_as_such(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_torch_cards", lambda known: [])
    found = list_devices(env={})
    assert [d.usable for d in found] == [False, False, False, True]
    assert pick(found, "auto").kind == "cpu"
    with pytest.raises(DeviceUnavailable, match="this torch cannot use it"):
        pick(found, "cuda")


def test_torch_and_nvml_see_one_card_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_86", "compute_90"])
    properties = SimpleNamespace(name="RTX 4060", uuid="aaaa", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    first, *rest = list_devices(env={"CUDA_VISIBLE_DEVICES": "0"})
    assert (first.total_bytes // MIB, first.usable, first.driver) == (8188, True, "570.1")
    assert [d.kind for d in rest] == ["cpu"]


def test_slice_under_the_id_of_its_card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Device(0, "cuda", "A100 MIG 3g.20gb", 19968 * MIB, 9000 * MIB, (8, 0), usable=True, uuid="cccc")
    monkeypatch.setattr(devices, "_torch_cards", lambda known: [seen])
    assert list_devices(env={"CUDA_VISIBLE_DEVICES": "MIG-dddd"})[:-1] == [seen]


def test_card_that_the_build_has_no_code_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_90"]
    capabilities = {(6, 1): False, (7, 0): False, (7, 5): True, (8, 0): True, (8, 9): True, (9, 0): True, (12, 0): True}
    assert {c: devices.built_for(c, builds) for c in capabilities} == capabilities
    assert not devices.built_for((12, 0), ["sm_75", "sm_90"])


def test_process_that_keeps_to_the_cpu_opens_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(known: object) -> list[Device]:
        raise AssertionError("torch was asked for its cards")

    monkeypatch.setattr(devices, "_torch_cards", fail)
    with monkeypatch.context() as patch:
        patch.setattr(devices.log, "warning", lambda *_: pytest.fail("torch was asked for its cards"))
        r = resolve("both", {"device": "cpu"}, env={})
    assert r.device.kind == "cpu"


def test_torch_that_fails_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(known: object) -> list[Device]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(devices, "_torch_cards", fail)
    monkeypatch.setattr(nvml, "read_cards", list)
    assert [d.kind for d in list_devices(env={})] == ["cpu"]


def test_simulation_without_a_card() -> None:
    card, cpu = list_devices(env={"MAX_CUDA_VRAM": "8", "CUDA_VISIBLE_DEVICES": ""})
    assert card.simulated
    assert card.is_card
    assert card.torch_name == "cpu"
    assert card.gib == 8
    assert card.memory_bytes == cpu.total_bytes
    assert tier_row(card).tier == "tier4"
    assert not cpu.is_card
    assert tier_row(cpu).tier == "tier1"
    for name in ("auto", "cuda", "cuda:0", "cpu"):
        assert pick([card, cpu], name) is card


def test_simulation_on_a_card(driver: Driver) -> None:
    card = list_cards({"MAX_CUDA_VRAM": "4", "CUDA_VISIBLE_DEVICES": "0"})[0]
    assert (card.kind, card.simulated, card.gib, card.physical_bytes) == ("cuda", True, 4.0, 8188 * MIB)
    assert card.memory_bytes == 4 * GIB
    larger = list_cards({"MAX_CUDA_VRAM": "80", "CUDA_VISIBLE_DEVICES": "0"})[0]
    assert tier_row(larger).tier == "unlimited"
    assert larger.memory_bytes == 8188 * MIB


@pytest.mark.parametrize(("size", "given", "reported"), [("15.7", "tier5", "tier6"), ("23.99", "tier6", "unlimited")])
def test_simulated_size_given_or_reported(size: str, given: str, reported: str) -> None:
    env = {"MAX_CUDA_VRAM": size, "CUDA_VISIBLE_DEVICES": ""}
    assert tier_row(list_cards(env)[0]).tier == given
    assert tier_row(list_cards({**env, "MAX_CUDA_VRAM_AS_DETECTED": "1"})[0]).tier == reported


@pytest.mark.parametrize("list_them", [list_cards, lambda env: list_devices(env=env)])
def test_simulation_that_is_no_number(list_them: Any) -> None:
    with pytest.raises(InvalidRequest, match="MAX_CUDA_VRAM"):
        list_them({"MAX_CUDA_VRAM": "abc"})


def test_pick_by_name() -> None:
    cards = [
        Device(0, "cuda", "a", GIB, GIB, usable=True),
        Device(1, "cuda", "b", GIB, GIB, usable=True),
        Device(0, "mps", "c", GIB, GIB, usable=True),
        cpu_device(),
    ]
    assert pick(cards, None).torch_name == "cuda:0"
    assert pick(cards, "cuda:1").name == "b"
    assert pick(cards, "mps").torch_name == "mps"
    assert pick(cards, "CPU").kind == "cpu"
    with pytest.raises(DeviceUnavailable, match=r"cuda:7.*cuda:0, cuda:1, mps, cpu"):
        pick(cards, "cuda:7")
    assert Device(1, "rocm", "MI", GIB, GIB).torch_name == "cuda:1"


def test_threads_do_not_depend_on_what_ray_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.cpu_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert host.cpu_threads() == before
    assert 1 <= before <= 8
    monkeypatch.setattr(host, "_cgroup_cpus", lambda: 1)
    assert host.cpu_threads() == 1


def test_host_memory_is_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cgroup_limit", lambda: (GIB, GIB // 4))
    assert host.memory() == (GIB, 3 * GIB // 4)
    monkeypatch.setattr(host, "_cgroup_limit", lambda: None)
    total, free = host.memory()
    assert 0 < free <= total


@pytest.mark.parametrize(
    ("limit", "used", "stat", "cached"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_files_that_the_kernel_caches_do_not_fill_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, used: str, stat: str, cached: str
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{GIB}\n")
    (tmp_path / used).write_text(f"{GIB - 1000}\n")
    (tmp_path / stat).write_text(f"anon 5\nactive_file 7\n{cached} {GIB // 2}\n")
    monkeypatch.setattr(host, "_CGROUP", str(tmp_path))
    assert host.memory() == (GIB, GIB // 2 + 1000)
    (tmp_path / stat).unlink()
    assert host.memory() == (GIB, 1000)


@pytest.mark.parametrize(
    ("fields", "able"),
    [
        ({"flags": "fpu avx512f avx512_bf16"}, True),
        ({"flags": "fpu avx2 amx_tile amx_bf16"}, True),
        ({"Features": "fp asimd bf16 i8mm"}, True),
        ({"flags": "fpu avx512f avx512_vnni"}, False),
        ({}, False),
    ],
)
def test_which_processors_multiply_bfloat16(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], able: bool
) -> None:
    monkeypatch.setattr(host, "_cpuinfo", lambda field: fields.get(field, ""))
    assert host.has_bfloat16() is able
