"""A GPU whose memory is the host's: what is planned and done for GPUs, computed on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamconv.planning.devices import Device


@dataclass(frozen=True, slots=True)
class HostGpu(Device):
    """Device that is none of torch's CUDA devices, and a GPU to everything else."""

    name: str = "cuda:0"
    model: str = "Host"

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")
