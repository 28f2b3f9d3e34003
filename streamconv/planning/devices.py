"""Devices that are there, and the choice of those that a run uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamconv.errors import OptionError, ResourceError


@dataclass(frozen=True, slots=True)
class Device:
    """Device that computes cells. `model` names what decides the last bits: CPU capability or GPU model.

    `others` are further GPUs that take their share of the shards, of the same model so that shards do not depend on
    who computes them; `left_out`, in words, are those that may not.
    """

    name: str
    model: str
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

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
        return used + (f"; not on {', '.join(self.left_out)}, another model" if self.left_out else "")


def resolve_device(name: str) -> Device:
    """The device for `auto`, `cpu`, `cuda` (every GPU like the first) or `cuda:N` (that one).

    Raises ResourceError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return Device("cpu", f"CPU {torch.backends.cpu.get_cpu_capability()}")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise OptionError(f"--device {name} is not known; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ResourceError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    models = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not number:
        return _all_like_the_first(models)
    index = int(number)
    if index >= len(models):
        raise ResourceError(
            f"--device {name} was asked for, but the last that torch sees is cuda:{len(models) - 1}; use that, or cpu"
        )
    return Device(f"cuda:{index}", models[index])


def _all_like_the_first(models: Sequence[str]) -> Device:
    others = tuple(f"cuda:{index}" for index, model in enumerate(models) if index and model == models[0])
    left_out = tuple(f"cuda:{index} ({model})" for index, model in enumerate(models) if model != models[0])
    return Device("cuda:0", models[0], others, left_out)
