"""Which devices a run uses, on machines with GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from streamconv.errors import OptionError, ResourceError
from streamconv.planning.devices import (
    CONTEXT_BYTES,
    Device,
    resolve_device,
    runs_on,
    short_of_memory,
    within_memory,
)

Machine = Callable[[Sequence[str]], None]
GIB = 2**30
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120"]  # of a wheel for CUDA 13
CAPABILITIES: Mapping[str, tuple[int, int]] = {"GTX 1080": (6, 1), "RTX 3060": (8, 6), "H100": (9, 0)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Has the GPUs whose models it is told."""

    def have(models: Sequence[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(models))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(models))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: models[index])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CAPABILITIES[models[index]])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)

    return have


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes free on each GPU, to be filled; of these 1000 are in torch's cache."""
    found: dict[str, int] = {}

    def ask(name: str) -> tuple[int, int]:
        if found[name] < 0:
            raise torch.AcceleratorError(
                "CUDA error: all CUDA-capable devices are busy or unavailable\nMore."
            )
        return found[name] - 1000, 24 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda name: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda name: 2000)
    return found


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_an_error(machine: Machine) -> None:
    machine([])
    assert resolve_device("auto") == resolve_device("cpu")
    assert resolve_device("cpu").is_cpu
    assert resolve_device("cpu").model.startswith("CPU ")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ResourceError, match=f"--device {name} .*use --device cpu"):
            resolve_device(name)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_all_gpus_like_the_first_share_the_work(machine: Machine, name: str) -> None:
    machine(["H100", "H100", "RTX 3060", "H100"])
    device = resolve_device(name)
    assert device == Device("cuda:0", "H100", ("cuda:1", "cuda:3"), ("cuda:2 (RTX 3060)",))
    assert device.names == ("cuda:0", "cuda:1", "cuda:3")
    assert str(device) == "cuda:0, cuda:1, cuda:3 (H100 each); not on cuda:2 (RTX 3060), another model"
    machine(["H100"])
    assert resolve_device(name) == Device("cuda:0", "H100")
    assert str(resolve_device(name)) == "cuda:0"


def test_one_gpu_by_its_number_is_used_alone(machine: Machine) -> None:
    machine(["H100", "RTX 3060"])
    assert resolve_device("cuda:1") == Device("cuda:1", "RTX 3060")
    assert resolve_device("cuda:0").names == ("cuda:0",)
    with pytest.raises(ResourceError, match="the last that torch sees is cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "mps"])
def test_other_names_are_refused(machine: Machine, name: str) -> None:
    machine(["H100"])
    with pytest.raises(OptionError, match=f"--device {name} is not known"):
        resolve_device(name)


# -- GPUs that torch sees and has no code for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "architecture", "does"),
    [
        ((8, 6), "sm_86", True),
        ((8, 9), "sm_86", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_86", False),
        ((12, 1), "sm_120", True),
        ((10, 0), "sm_90", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_100f", True),
        ((12, 0), "sm_100f", False),
        ((12, 0), "compute_90", True),
        ((8, 9), "compute_90", False),
        ((10, 0), "compute_90a", False),
        ((9, 0), "gfx90a", False),
    ],
)
def test_code_runs_on_its_major_version_and_ptx_on_all_later_ones(
    capability: tuple[int, int], architecture: str, does: bool
) -> None:
    assert runs_on(capability, architecture) == does


def test_auto_passes_over_a_gpu_that_torch_has_no_code_for(machine: Machine) -> None:
    machine(["GTX 1080"])
    device = resolve_device("auto")
    assert device.is_cpu
    assert device.model == resolve_device("cpu").model
    assert "; cuda:0 (GTX 1080) has compute capability 6.1, and torch" in str(device)
    machine(["GTX 1080", "H100", "RTX 3060", "H100"])
    assert resolve_device("auto").names == ("cuda:1", "cuda:3")
    assert "cuda:2 (RTX 3060), another model; cuda:0 (GTX 1080) has compute" in str(resolve_device("auto"))


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_asked_for_that_torch_has_no_code_for_is_refused(machine: Machine, name: str) -> None:
    machine(["GTX 1080", "H100"])
    with pytest.raises(ResourceError, match=r"6\.1, and torch .* sm_75, .*; use --device cpu, or install"):
        resolve_device(name)
    assert resolve_device("cuda:1").name == "cuda:1"


def test_a_build_that_does_not_tell_what_it_is_for_is_taken(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(["GTX 1080"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx1100"])
    assert resolve_device("auto").name == "cuda:0"


# -- GPUs whose memory is taken ----------------------------------------------------------------------------------


def test_what_cuda_takes_is_kept_free(machine: Machine, free: dict[str, int]) -> None:
    machine(["H100", "H100"])
    device = resolve_device("cuda")
    free.update({"cuda:0": GIB + CONTEXT_BYTES, "cuda:1": GIB + CONTEXT_BYTES - 1})
    assert list(short_of_memory(device, GIB)) == ["cuda:1"]
    assert not short_of_memory(device, GIB - 1)
    assert not short_of_memory(resolve_device("cpu"), 2**60)


def test_auto_does_without_gpus_whose_memory_is_taken(machine: Machine, free: dict[str, int]) -> None:
    machine(["H100", "H100", "H100"])
    free.update({"cuda:0": GIB, "cuda:1": 8 * GIB, "cuda:2": 3 * GIB})

    def needed(device: Device) -> int:
        """Two lanes more for the one that is left."""
        return 2 * GIB if len(device.names) > 1 else 4 * GIB

    assert within_memory("auto", resolve_device("auto"), lambda device: device, needed).names == (
        "cuda:1",
        "cuda:2",
    )
    free["cuda:2"] = GIB
    assert within_memory("auto", resolve_device("auto"), lambda device: device, needed).names == ("cuda:1",)
    free["cuda:1"] = -1
    device = within_memory("auto", resolve_device("auto"), lambda device: device, needed)
    assert device.is_cpu
    assert "cuda:0 (H100) has 1.07 GB of memory free, and 2.15 GB are planned and 268 MB kept" in str(device)
    assert "CUDA does not come up on cuda:1 (H100): CUDA error: all CUDA-capable devices are busy" in str(
        device
    )


def test_a_gpu_asked_for_whose_memory_is_taken_is_refused(machine: Machine, free: dict[str, int]) -> None:
    machine(["H100"])
    free["cuda:0"] = GIB
    device = resolve_device("cuda:0")
    with pytest.raises(
        ResourceError, match=r"--device cuda:0 .* 1\.07 GB of memory free.*smaller --max-vram"
    ):
        within_memory("cuda:0", device, lambda device: device, lambda _: GIB)
    assert within_memory("cuda:0", device, lambda device: device, lambda _: GIB // 2) is device
