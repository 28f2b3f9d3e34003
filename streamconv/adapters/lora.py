"""LoRA: W + s·B A (Hu et al. 2021, arXiv 2106.09685, §4.1), and DoRA: m ⊙ V / ‖V‖ with V = W + s·B A
(Liu et al. 2024, arXiv 2402.09353, eq. 5), as `peft/tuners/lora/layer.py` and `dora.py` have them.

`nn.Linear` stores W as [out, in]. GPT-2's `Conv1D` stores it as [in, out]; A [r, in] and B [out, r] are the
same for both, so there the update is transposed, and the norms of DoRA, one an output, are those of columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from streamconv.adapters.base import Parameter, Update
from streamconv.adapters.lora_config import LoraSettings, read_settings
from streamconv.adapters.source import Base, Source
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """Parts `lora_A` [r, in], `lora_B` [out, r]; `transposed`: the weight is stored as [in, out]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool

    @property
    def reduces(self) -> bool:
        return False

    def reduce(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        raise AssertionError("nothing to learn of the weight before its rows are updated")

    def apply(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        """`cell` plus its rows of s·B A, in place; one rounding to the stored type happens later."""
        left, right = _factors(rows, parts, self.transposed)
        return torch.addmm(cell, left, right, alpha=self.scaling, out=cell)


@dataclass(frozen=True, slots=True)
class DoraUpdate:
    """Parts of LoRA and `magnitude` [out], the norm that each output's weights are given.

    Norms are summed in float64. An output whose weights are all zero has no direction: PEFT's live layer
    divides by zero and answers NaN, so here it is an error.
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool

    @property
    def reduces(self) -> bool:
        """Rows of a transposed weight are parts of all outputs, whose norms need every row first."""
        return self.transposed

    def reduce(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        """Sum of squares of each column so far, float64 [out]."""
        left, right = _factors(rows, parts, self.transposed)
        updated = torch.addmm(cell, left, right, alpha=self.scaling)
        squares = updated.double().square_().sum(dim=0)
        return squares if state is None else state + squares

    def apply(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        """`cell` as rows of m ⊙ V / ‖V‖, in place."""
        magnitude = parts["magnitude"].double()
        left, right = _factors(rows, parts, self.transposed)
        updated = torch.addmm(cell, left, right, alpha=self.scaling, out=cell)
        if self.transposed:
            assert state is not None
            return updated.mul_(self._gain(magnitude, state.sqrt(), 0))
        norms = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float64)
        gain = self._gain(magnitude[rows.start : rows.stop], norms, rows.start)
        return updated.mul_(gain.unsqueeze(1))

    def _gain(self, magnitude: Tensor, norms: Tensor, first: int) -> Tensor:
        """m / ‖V‖ in float32, for the outputs from `first` on."""
        if not bool(norms.all()):
            output = first + int((norms == 0).nonzero()[0])
            raise AdapterError(
                f"{self.parameter}: the weights of output {output} are all zero after the LoRA update, so"
                " DoRA cannot scale them; the adapter does not work unmerged either"
            )
        return magnitude.div(norms).float()


def _factors(rows: range, parts: Mapping[str, Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
    """Views of A and B whose product is `rows` of B A, or of its transpose."""
    a, b = parts["lora_A"], parts["lora_B"]
    if transposed:
        return a[:, rows.start : rows.stop].T, b.T
    return b[rows.start : rows.stop], a


# Keys ------------------------------------------------------------------------------------------------------

_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<factor>lora_[AB])\.weight|(?P<magnitude>lora_magnitude_vector(?:\.weight)?))"
)
_UNSUPPORTED = MappingProxyType(
    {
        r".+\.lora_embedding_[AB](\..+)?": "LoRA on an embedding is not supported yet",
        r".+\.lora_B\.bias": "a bias of lora_B is not supported yet",
        r".+\.(token_adapter\.)?trainable_tokens_delta": "trained embedding rows are not supported yet",
        r".+\.base_layer\.lora_[AB]\.weight": "LoRA on several parameters of one module is not supported yet",
    }
)
# Models of transformers that use Conv1D (`transformers/pytorch_utils.py`), and what they call such layers.
_CONV1D_MODELS = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def read_lora(source: Source, base: Base) -> tuple[Update, ...]:
    """The updates of a LORA adapter, checked against config and base.

    Raises AdapterError where tensors are missing or do not fit, UnsupportedError for what is not built.
    """
    settings = read_settings(source.config)
    modules = _by_module(source)
    return tuple(_update(module, parts, settings, base) for module, parts in modules.items())


def _by_module(source: Source) -> Mapping[str, Mapping[str, StoredTensor]]:
    """Tensors by role, by module; keys of another kind are left for others."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in source.tensors.items():
        for pattern, reason in _UNSUPPORTED.items():
            if re.fullmatch(pattern, key):
                raise UnsupportedError(f"{source.location}: {tensor.name}: {reason}")
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        parts = modules.setdefault(match["module"], {})
        role = match["factor"] or "magnitude"
        if role in parts:
            raise AdapterError(
                f"{source.location}: {tensor.name} and {parts[role].name} are the same thing twice"
            )
        parts[role] = tensor
    return modules


def _update(module: str, parts: Mapping[str, StoredTensor], settings: LoraSettings, base: Base) -> Update:
    _check_roles(module, parts, settings)
    a, b = parts["lora_A"], parts["lora_B"]
    parameter = base.get(f"{module}.weight", a.name)
    if len(parameter.shape) > 2:
        raise UnsupportedError(
            f"{a.name} is for {parameter.name}, which has shape {list(parameter.shape)}: LoRA on a"
            " convolution or on fused experts is not supported yet"
        )
    rank = _rank(module, a, b, settings)
    transposed = _is_transposed(parameter, a, b, settings, base)
    kind = DoraUpdate if settings.use_dora else LoraUpdate
    if settings.use_dora and parts["magnitude"].shape != b.shape[:1]:
        raise AdapterError(
            f"{parts['magnitude'].name} has shape {list(parts['magnitude'].shape)}, expected [{b.shape[0]}],"
            f" one number for each output of {parameter.name}"
        )
    scaling = settings.scaling(module, rank)
    return kind(parameter.name, parameter.shape, MappingProxyType(dict(parts)), scaling, transposed)


def _check_roles(module: str, parts: Mapping[str, StoredTensor], settings: LoraSettings) -> None:
    expected = ["lora_A", "lora_B"] + (["magnitude"] if settings.use_dora else [])
    for role in expected:
        if role not in parts:
            key = "lora_magnitude_vector" if role == "magnitude" else f"{role}.weight"
            there = ", ".join(tensor.name for tensor in parts.values())
            raise AdapterError(
                f"{module}.{key} is missing, though {there} is there; the file is not complete"
            )
    if "magnitude" in parts and not settings.use_dora:
        raise AdapterError(
            f"{parts['magnitude'].name} belongs to DoRA, but use_dora is not set in {settings.name}; set it"
            " if the adapter was trained with DoRA"
        )


def _rank(module: str, a: StoredTensor, b: StoredTensor, settings: LoraSettings) -> int:
    """The rank the tensors have, which must be the one the config gives this module."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, expected [r, in] and [out, r]"
        )
    rank, expected = a.shape[0], settings.rank(module)
    if rank != expected:
        raise AdapterError(
            f"{a.name} has rank {rank}, but {settings.name} gives {module} the rank {expected} (r and"
            " rank_pattern); config and tensors are not of one adapter"
        )
    return rank


def _is_transposed(
    parameter: Parameter, a: StoredTensor, b: StoredTensor, settings: LoraSettings, base: Base
) -> bool:
    """Whether the weight is stored as [in, out]: its shape says, or where it is square, the model does.

    `fan_in_fan_out` decides last. PEFT sets it to what the last layer it wrapped needed, and the bitsandbytes
    layers leave a wrong value as it is.
    """
    outputs, inputs = b.shape[0], a.shape[1]
    if parameter.shape not in {(outputs, inputs), (inputs, outputs)}:
        raise AdapterError(
            f"{parameter.name} of the base has shape {list(parameter.shape)}, which does not fit {a.name}"
            f" {list(a.shape)} and {b.name} {list(b.shape)}; was the adapter trained on this base?"
        )
    if outputs != inputs:
        return parameter.shape == (inputs, outputs)
    layer = parameter.name.split(".")[-2]
    if str(base.config.get("model_type")) in _CONV1D_MODELS:  # config.json may hold anything
        return layer in _CONV1D_LAYERS
    if settings.fan_in_fan_out:
        raise UnsupportedError(
            f"{parameter.name} is square, so its shape does not tell whether it is stored as [in, out], as"
            f" fan_in_fan_out in {settings.name} says; no model of type {base.config.get('model_type')!r} is"
            " known to store weights so: if its layers are nn.Linear, set fan_in_fan_out to false"
        )
    return False
