"""Initialisations that take something off the base, for training to add to the rest: PiSSA (Meng et al. 2024, arXiv
2404.02948) its r greatest singular components, KaSA (Wang et al. 2024, arXiv 2412.06071) the r smallest, OLoRA
(Büyükakyüz 2024, arXiv 2406.01775) s times the first r factors of its QR decomposition (`pissa_init`, `olora_init` in
`peft/tuners/lora/layer.py`, `KasaLinearVariant` in `variants.py`).

    PiSSA: W - Σ_{k≤r} σ_k u_k v_kᵀ        KaSA: W - Σ_{k>n-r} σ_k u_k v_kᵀ        OLoRA: W - s·Q[:, :r] R[:r]

The products are the same whatever signs a library gives the vectors; the difference is rounded to the weight's type,
as in training. An adapter that was converted by PEFT on saving (`path_initial_model_for_weight_conversion`) is an
ordinary LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from streamconv.adapters.base import Parts, WholeWeight
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.dtypes import Dtype


@dataclass(frozen=True, slots=True)
class InitialUpdate(WholeWeight):
    """Turns the base's weight into the one trained on; no parts. `kind` is a key of INITIAL."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    kind: str
    rank: int
    scaling: float
    transposed: bool
    dtype: Dtype

    @property
    def held_bytes(self) -> int:
        """Weight, copy, factors, workspace and product of a decomposition in float32."""
        return 4 * (4 * math.prod(self.shape) + 6 * min(self.shape) ** 2)

    @property
    def solver_bytes(self) -> int:
        """Those of cuSOLVER's gesvdj, twice the matrix."""
        return 8 * math.prod(self.shape)

    @property
    def needs_original(self) -> bool:
        """It was decomposed before it was quantized."""
        return True

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        """The weight trained on."""
        weight = whole.T if self.transposed else whole
        return whole.sub_(self._taken_off(weight)).to(self.dtype.torch).float()

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return False

    def _taken_off(self, weight: Tensor) -> Tensor:
        left, right = INITIAL[self.kind](weight, self.rank, self.scaling)
        return right.T @ left.T if self.transposed else left @ right


def _pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    del scaling  # PEFT divides the factors by it
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def _kasa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    del scaling  # what is dropped does not depend on what is trained
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, -rank:] * s[-rank:], vh[-rank:]


def _olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return scaling * q[:, :rank], r[:rank]


INITIAL: Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"pissa": _pissa, "olora": _olora, "kasa": _kasa}
)
