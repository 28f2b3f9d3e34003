"""Devices that are there, and the choice of those that a run uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from streamconv.errors import OptionError, ResourceError
from streamconv.sizes import format_size
from streamconv.system_errors import first_line

T = TypeVar("T")

AUTO = "auto"
CONTEXT_BYTES = 256 * 2**20
"""Memory of a GPU that CUDA takes, once a run goes on, beside what it has when free memory is asked for and beside
tensors: code is loaded when it is first used, and libraries keep handles.
"""

# A kind of code that a build of torch has, as torch.cuda.get_arch_list names it: sm_90, sm_100a, compute_120.
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True, slots=True)
class Device:
    """Device that computes cells. `model` names what decides the last bits: CPU capability or GPU model.

    `others` are further GPUs that take their share of the shards, of the same model so that shards do not depend on
    who computes them; `left_out`, in words, are those that may not. `unfit` are GPUs that `auto` passed over, each with
    the reason.
    """

    name: str
    model: str
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.others)

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def __str__(self) -> str:
        used = ", ".join(self.names) + (f" ({self.model} each)" if self.others else "")
        of_another = (f"not on {', '.join(self.left_out)}, another model",) if self.left_out else ()
        return "; ".join((used, *of_another, *self.unfit))

    def without(self, unfit: Mapping[str, str]) -> Device:
        """The device with those of its GPUs left out that `unfit` names, in words; the CPU where none is left."""
        there = [name for name in self.names if name not in unfit]
        reasons = (*self.unfit, *unfit.values())
        if not there:
            return replace(_cpu(), unfit=reasons)
        return replace(self, name=there[0], others=tuple(there[1:]), unfit=reasons)


def resolve_device(name: str) -> Device:
    """The device for `auto`, `cpu`, `cuda` (every GPU like the first) or `cuda:N` (that one).

    `auto` takes GPUs that this build of torch has code for. Raises ResourceError if what was asked for is not there,
    or torch has no code for it.
    """
    if name == "cpu" or (name == AUTO and not torch.cuda.is_available()):
        return _cpu()
    kind, _, number = name.partition(":")
    if name != AUTO and (kind != "cuda" or not (number or "0").isdigit()):
        raise OptionError(f"--device {name} is not known; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ResourceError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    models = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if name == AUTO:
        return _automatic(models)
    index = int(number or "0")
    if index >= len(models):
        raise ResourceError(
            f"--device {name} was asked for, but the last that torch sees is cuda:{len(models) - 1}; use that, or cpu"
        )
    if (reason := _lacks_code(index, models[index])) is not None:
        raise ResourceError(
            f"--device {name} was asked for, but {reason}; use --device cpu, or install a build of torch for this GPU "
            "(pytorch.org/get-started lists them)"
        )
    return Device(f"cuda:{index}", models[index]) if number else _all_like(0, models)


def _cpu() -> Device:
    return Device("cpu", f"CPU {torch.backends.cpu.get_cpu_capability()}")


def _automatic(models: Sequence[str]) -> Device:
    """Every GPU like the first one that torch has code for; the CPU where there is none."""
    unfit: list[str] = []
    for index, model in enumerate(models):
        reason = _lacks_code(index, model)
        if reason is None:
            return replace(_all_like(index, models), unfit=tuple(unfit))
        unfit.append(reason)
    return replace(_cpu(), unfit=tuple(unfit))


def _all_like(first: int, models: Sequence[str]) -> Device:
    """The GPU `first`, with those after it that are of its model."""
    later = list(enumerate(models))[first + 1 :]
    others = tuple(f"cuda:{index}" for index, model in later if model == models[first])
    left_out = tuple(f"cuda:{index} ({model})" for index, model in later if model != models[first])
    return Device(f"cuda:{first}", models[first], others, left_out)


# -- code for a GPU ----------------------------------------------------------------------------------------------


def _lacks_code(index: int, model: str) -> str | None:
    """The reason why torch cannot compute on a GPU, though it sees it: this build has no code for its architecture.

    None where it can, and where torch does not say what it was built for, as for AMD's.
    """
    built = torch.cuda.get_arch_list()
    if not any(map(_ARCHITECTURE.fullmatch, built)):
        return None
    capability = torch.cuda.get_device_capability(index)
    if any(runs_on(capability, architecture) for architecture in built):
        return None
    major, minor = capability
    return (
        f"cuda:{index} ({model}) has compute capability {major}.{minor}, and torch {torch.__version__} has code for "
        f"{', '.join(built)} alone"
    )


def runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether a GPU of this compute capability runs code that was built for `architecture`: `sm_86`, `compute_90`.

    Binaries run on GPUs of the same major version and no lower minor one; those of `sm_90a` on that very one. PTX is
    compiled anew for every later GPU. Source: CUDA C++ Programming Guide, "Application Compatibility".
    """
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        return False
    built, kind, feature = (int(match[2]), int(match[3])), match[1], match[4]
    if feature == "a":
        return capability == built
    if kind == "compute" and not feature:
        return capability >= built
    return capability[0] == built[0] and capability >= built


# -- memory of a GPU ---------------------------------------------------------------------------------------------


def within_memory(asked: str, device: Device, make: Callable[[Device], T], needed: Callable[[T], int]) -> T:
    """The plan that `make` makes for `device`; where `asked` is auto and memory of its GPUs is taken, for what is left.

    `needed` tells the bytes that a plan needs on each GPU. Raises ResourceError where a GPU that was asked for has not
    got them.
    """
    while True:
        made = make(device)
        short = short_of_memory(device, needed(made))
        if not short:
            return made
        if asked != AUTO:
            raise no_room(asked, short)
        device = device.without(short)


def no_room(asked: str, short: Mapping[str, str]) -> ResourceError:
    """The ResourceError for a GPU that was asked for, and of which others have taken too much."""
    return ResourceError(
        f"--device {asked} was asked for, but {'; '.join(short.values())}. End other programs that use it, give a "
        "smaller --max-vram, or use --device cpu"
    )


def short_of_memory(device: Device, needed: int) -> Mapping[str, str]:
    """GPUs of `device` on which `needed` bytes and what CUDA takes beside them are not free, by name, in words.

    To ask a GPU brings CUDA up on it, as computing would.
    """
    if device.is_cpu or not torch.cuda.is_available():
        return {}
    found = {name: _shortage(name, device.model, needed) for name in device.names}
    return {name: reason for name, reason in found.items() if reason is not None}


def _shortage(name: str, model: str, needed: int) -> str | None:
    try:
        free, _ = torch.cuda.mem_get_info(name)
        # What torch holds of it and does not use is this process' own to use.
        free += torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
    except RuntimeError as error:  # its memory is too full for CUDA itself, or it is another program's alone
        return f"CUDA does not come up on {name} ({model}): {first_line(error).rstrip('. ')}"
    if free >= needed + CONTEXT_BYTES:
        return None
    return (
        f"{name} ({model}) has {format_size(free)} of memory free, and {format_size(needed)} are planned and "
        f"{format_size(CONTEXT_BYTES)} kept for CUDA"
    )
