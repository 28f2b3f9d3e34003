"""Updates of base parameters from the keys of a LORA adapter; keys and shapes are `peft/tuners/lora/layer.py`'s."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Parameter, Update
from streamconv.adapters.conv import ConvUpdate
from streamconv.adapters.experts_reader import Factors, read_experts, take_apart
from streamconv.adapters.folded import BlockLoraUpdate, PooledLoraUpdate
from streamconv.adapters.initial import InitialUpdate
from streamconv.adapters.lora import DoraUpdate, LoraBiasUpdate, LoraUpdate
from streamconv.adapters.lora_config import LORA_FIELDS, UNUSED, LoraSettings, read_settings
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, trained_shape
from streamconv.adapters.tokens import read_tokens
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

_KEY = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])(?:\.weight)?"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|(?P<diagonal>lora_diag)|(?P<bias>lora_B\.bias))"
)
# What belongs to a variant alone: its name, and the field that switches it on.
_SWITCHES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"magnitude": ("DoRA", "use_dora"), "diagonal": ("KaSA", "kasa_config")}
)

Parts = Mapping[str, StoredTensor]


def read_lora(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a LORA adapter, checked against config and base; trained rows last.

    Raises AdapterError where tensors are missing or do not fit, UnsupportedError for what is not built.
    """
    settings = read_settings(source.config)
    modules = take_apart(_by_module(source), base)
    factors = {
        module: Factors(parts["lora_A"], parts["lora_B"])
        for module, parts in modules.items()
        if parts.keys() == {"lora_A", "lora_B"}
    }
    of_experts, taken = read_experts(source, base, settings, factors)
    updates = [
        update
        for module, parts in modules.items()
        if module not in taken
        for update in _updates(module, parts, settings, source, base)
    ]
    return (*updates, *of_experts, *read_tokens(source, base))


def _by_module(source: Source) -> Mapping[str, Parts]:
    """Tensors by role, by module; keys of another kind are left for others."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in source.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        parts = modules.setdefault(match["module"], {})
        role = match["factor"] or (
            f"embedding_{match['embedding']}" if match["embedding"] else match.lastgroup
        )
        assert role is not None
        if role in parts:
            raise AdapterError(
                f"{source.location}: {tensor.name} and {parts[role].name} are the same thing twice"
            )
        parts[role] = tensor
    return modules


def _updates(
    module: str, parts: Parts, settings: LoraSettings, source: Source, base: BaseParameters
) -> list[Update]:
    is_embedding = not parts.keys().isdisjoint({"embedding_A", "embedding_B"})
    _check_roles(module, parts, settings, is_embedding)
    roles = {"embedding_A": "lora_A", "embedding_B": "lora_B"}
    factors = {roles.get(role, role): tensor for role, tensor in parts.items() if role != "bias"}
    a, b = factors["lora_A"], factors["lora_B"]
    parameter = base.get(f"{module}.weight", a.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    if len(shape) > 2:
        _check_plain(parameter, settings)
        updates: list[Update] = [_conv_update(module, factors, shape, settings, source, parameter)]
    else:
        layer = _layer(module, parameter, shape, factors, is_embedding, settings, source, base)
        under = source.tensors.get(f"{module}.base_layer.weight")
        updates = [*_initial(layer, under, settings, base), _update(layer, settings)]
    if "bias" in parts:
        scaling = settings.scaling(source.trained(module), a.shape[0])
        updates.append(_bias_update(module, parts["bias"], b, scaling, base))
    return updates


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer or an embedding: its weight in training, and the factors for it, which act on `inputs`."""

    parameter: Parameter
    shape: Shape
    factors: Parts
    inputs: int
    rank: int
    scaling: float
    is_embedding: bool
    transposed: bool


def _layer(
    module: str,
    parameter: Parameter,
    shape: Shape,
    factors: Parts,
    is_embedding: bool,
    settings: LoraSettings,
    source: Source,
    base: BaseParameters,
) -> _Layer:
    a, b = factors["lora_A"], factors["lora_B"]
    rank = check_rank(source.trained(module), a, b, settings)
    inputs = a.shape[1] if is_embedding else _inputs(shape, a, b, settings)
    if is_embedding:
        _check_embedding(parameter, shape, a, b)
    transposed = is_embedding or is_transposed(parameter, shape, b.shape[0], inputs, source.config, base)
    if transposed is None:
        raise _misfit(parameter, a, b)
    if "magnitude" in factors:
        _check_numbers(parameter, factors["magnitude"], (b.shape[0],), "output")
    if "diagonal" in factors:
        _check_numbers(parameter, factors["diagonal"], (rank,), "rank")
    scaling = settings.scaling(source.trained(module), rank)
    return _Layer(
        parameter, shape, MappingProxyType(dict(factors)), inputs, rank, scaling, is_embedding, transposed
    )


def _inputs(shape: Shape, a: StoredTensor, b: StoredTensor, settings: LoraSettings) -> int:
    """Inputs that lora_A acts on: its columns, or so many for each as a variant in use folds into one."""
    columns = a.shape[1]
    expected = math.prod(shape) // max(b.shape[0], 1)
    return expected if expected in (columns * settings.blocks, columns * settings.group) else columns


def _update(layer: _Layer, settings: LoraSettings) -> Update:
    """Update by the factors, of the kind that their shapes call for. Raises AdapterError where they fit none."""
    a, b = layer.factors["lora_A"], layer.factors["lora_B"]
    common = (layer.parameter.name, layer.shape, layer.factors, layer.scaling)
    folds_a, folds_b = layer.inputs > a.shape[1], b.shape[1] < layer.rank
    if not folds_a and not folds_b:
        kind = DoraUpdate if settings.use_dora else LoraUpdate
        return kind(*common, layer.transposed)
    if settings.group > 1:
        return PooledLoraUpdate(*common, layer.transposed, settings.group)
    if (
        layer.transposed
        or (folds_a and folds_b)
        or layer.rank % settings.blocks
        or (folds_b and b.shape[0] % settings.blocks)
    ):
        raise _misfit(layer.parameter, a, b)
    return BlockLoraUpdate(*common, settings.blocks)


def _initial(
    layer: _Layer, under: StoredTensor | None, settings: LoraSettings, base: BaseParameters
) -> list[Update]:
    """Updates that come before the factors': none, or what their initialisation did to the base.

    `under` is the weight under the update where the file holds it, as its initialisation had left it.
    """
    if settings.initial is None or under is not None:
        return []
    parameter = layer.parameter
    if base.tie is not None and parameter.name == base.tie.head:
        raise UnsupportedError(
            f"{parameter.name} and {base.tie.embedding} are one tensor of the base, which the initialisation of this"
            f" adapter ({settings.initial}) changed for both, and the adapter does not hold it; save the adapter with"
            " PEFT's save_embedding_layers=True"
        )
    needs_linear = settings.use_dora or settings.initial == "kasa"
    if layer.is_embedding or (needs_linear and layer.transposed):
        _check_plain(parameter, settings)
    if settings.initial == "kasa" and layer.rank >= min(layer.shape):
        raise AdapterError(
            f"{layer.factors['lora_A'].name} has rank {layer.rank}, and KaSA drops as many singular values of"
            f" {parameter.name}, which has {min(layer.shape)}; was the adapter trained on this base?"
        )
    none: Mapping[str, StoredTensor] = MappingProxyType({})
    return [
        InitialUpdate(
            parameter.name,
            layer.shape,
            none,
            settings.initial,
            layer.rank,
            layer.scaling,
            layer.transposed,
            parameter.dtype,
        )
    ]


def _check_plain(parameter: Parameter, settings: LoraSettings) -> None:
    if settings.initial is not None:
        raise UnsupportedError(
            f"{settings.name}: what an adapter's initialisation by {settings.initial} did to the base is supported for"
            f" linear layers only, and by kasa or with use_dora not for Conv1D; {parameter.name} is another case"
        )


def _check_roles(module: str, parts: Parts, settings: LoraSettings, is_embedding: bool) -> None:
    keys = dict.fromkeys(("embedding_A", "embedding_B") if is_embedding else ("lora_A", "lora_B"), "")
    keys = {role: f"lora_{role}" if is_embedding else f"{role}.weight" for role in keys}
    if settings.use_dora:
        keys["magnitude"] = "lora_magnitude_vector"
    if settings.lora_bias and not is_embedding:
        keys["bias"] = "lora_B.bias"
    if settings.initial == "kasa" and not is_embedding:
        keys["diagonal"] = "lora_diag"
    for role, key in keys.items():
        if role not in parts:
            there = ", ".join(tensor.name for tensor in parts.values())
            of_quantized = "; PEFT trains quantized layers without KaSA: then set kasa_config to null"
            raise AdapterError(
                f"{module}.{key} is missing, though {there} is there; the file is not complete"
                f"{of_quantized if role == 'diagonal' else ''}"
            )
    for role, tensor in parts.items():
        if role in _SWITCHES and role not in keys:
            method, field = _SWITCHES[role]
            raise AdapterError(
                f"{tensor.name} belongs to {method}, but {field} is not set in {settings.name}; set it"
                f" if the adapter was trained with {method}"
            )
        if role not in keys:
            raise AdapterError(
                f"{tensor.name} has no place beside {next(iter(parts.values())).name}; {settings.name}"
                f" and the tensors are not of one adapter{' (lora_bias is not set)' if role == 'bias' else ''}"
            )


def check_rank(module: str, a: StoredTensor, b: StoredTensor, settings: LoraSettings) -> int:
    """The rank the tensors have, which must be the one the config gives this module."""
    ranks = {b.shape[-1], b.shape[-1] * settings.blocks} if b.shape else set()
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] not in ranks:
        raise AdapterError(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, expected [r, in] and [out, r]"
        )
    settings.check_rank(module, a, a.shape[0])
    return a.shape[0]


def _check_numbers(parameter: Parameter, numbers: StoredTensor, expected: Shape, of: str) -> None:
    if numbers.shape != expected:
        raise AdapterError(
            f"{numbers.name} has shape {list(numbers.shape)}, expected {list(expected)},"
            f" one number for each {of} of {parameter.name}"
        )


def _check_embedding(parameter: Parameter, shape: Shape, a: StoredTensor, b: StoredTensor) -> None:
    """An embedding is stored as [V, d]: one row for each input."""
    if len(shape) != 2 or shape[1] != b.shape[0]:
        raise _misfit(parameter, a, b)
    if shape[0] != a.shape[1]:
        raise AdapterError(
            f"{a.name} is for {a.shape[1]} tokens, but {parameter.name} has {shape[0]} rows; the vocabulary was"
            " resized in training, and the adapter does not hold the new embedding: resize the base in the same way"
            " and save it first"
        )


def _misfit(parameter: Parameter, a: StoredTensor, b: StoredTensor) -> AdapterError:
    return AdapterError(
        f"{parameter.name} of the base has shape {list(parameter.shape)}, which does not fit {a.name}"
        f" {list(a.shape)} and {b.name} {list(b.shape)}; was the adapter trained on this base?"
    )


def _bias_update(
    module: str, bias: StoredTensor, b: StoredTensor, scaling: float, base: BaseParameters
) -> LoraBiasUpdate:
    parameter = base.find(f"{module}.bias")
    if parameter is None:
        raise UnsupportedError(
            f"{bias.name} is added to {module}.bias, which the base does not have; a merge cannot give a layer a bias"
            " that its model class does not expect"
        )
    if not bias.shape == parameter.shape == b.shape[:1]:
        raise AdapterError(
            f"{bias.name} has shape {list(bias.shape)} and {parameter.name} of the base {list(parameter.shape)},"
            f" expected {list(b.shape[:1])} as {b.name} has it"
        )
    return LoraBiasUpdate(parameter.name, parameter.shape, MappingProxyType({"bias": bias}), scaling)


def _conv_update(
    module: str, factors: Parts, shape: Shape, settings: LoraSettings, source: Source, parameter: Parameter
) -> ConvUpdate:
    a, b = factors["lora_A"], factors["lora_B"]
    outputs, kernel = shape[0], shape[2:]
    if (
        len(a.shape) != len(shape)
        or len(b.shape) != len(shape)
        or a.shape[2:] != kernel
        or b.shape[0] != outputs
    ):
        raise _misfit(parameter, a, b)
    if a.shape[1] != shape[1] or b.shape[1] != a.shape[0]:
        raise UnsupportedError(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} adapt {parameter.name} {list(shape)}, a convolution"
            " in groups: lora_A sees channels that an output's kernel does not, so no merged weights are equal to"
            " it; serve it unmerged, with PEFT"
        )
    if any(size != 1 for size in b.shape[2:]):
        raise _misfit(parameter, a, b)
    if settings.use_dora:
        _check_numbers(parameter, factors["magnitude"], (1, outputs, *(1 for _ in kernel)), "output")
    settings.check_rank(source.trained(module), a, a.shape[0])
    scaling = settings.scaling(source.trained(module), a.shape[0])
    return ConvUpdate(parameter.name, shape, MappingProxyType(dict(factors)), scaling, settings.use_dora)


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")})
    return {
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "alpha": fields.get("lora_alpha"),
        "rslora": bool(fields.get("use_rslora")),
        "dora": bool(fields.get("use_dora")),
    }


LORA = Method(
    label="LoRA",
    read=read_lora,
    fields=LORA_FIELDS,
    keys=r"lora_\w+",
    neutral="zero (all lora_B, or all lora_A, or alpha)",
    formula="W + s · B A",
    layers=("Linear", "Conv1D", "convolutions", "Embedding", "experts"),
    unused=UNUSED,
    facts=_facts,
    orients=True,
)
