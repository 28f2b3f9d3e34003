"""The device seam: the same cell maths on the CPU and on CUDA, with nothing but these calls between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.errors import OptionError, ResourceError


@dataclass(frozen=True, slots=True)
class Device:
    """Where cells are computed. `model` names what decides the last bits: CPU capability or GPU model."""

    name: str
    model: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def host_buffer(self, nbytes: int) -> Tensor:
        """A uint8 buffer in host memory; pinned where a GPU will copy from or to it."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=not self.is_cpu)

    def upload(self, host: Tensor) -> Tensor:
        """`host` on the device, free to be overwritten when this returns; on the CPU the very same memory."""
        return host if self.is_cpu else host.to(self.torch)

    def output(self, host: Tensor) -> Tensor:
        """Where a tile that will end in `host` is computed; on the CPU `host` itself."""
        return host if self.is_cpu else torch.empty_like(host, device=self.torch)

    def download(self, computed: Tensor, host: Tensor) -> None:
        """Bring `computed` (from `output`) to `host`; when this returns, the bytes are there."""
        if not self.is_cpu:
            host.copy_(computed)


def resolve_device(name: str) -> Device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises ResourceError if it is not there."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return Device("cpu", f"CPU {torch.backends.cpu.get_cpu_capability()}")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise OptionError(f"--device {name} is not known; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ResourceError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    index = int(number or "0")
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ResourceError(
            f"--device {name} was asked for, but the last that torch sees is cuda:{count - 1}; use that, or cpu"
        )
    return Device(f"cuda:{index}", torch.cuda.get_device_name(index))
