"""Which devices a run uses, on machines with GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from streamconv.errors import OptionError, ResourceError
from streamconv.planning.devices import Device, resolve_device

Machine = Callable[[Sequence[str]], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Has the GPUs whose models it is told."""

    def have(models: Sequence[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(models))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(models))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: models[index])

    return have


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
