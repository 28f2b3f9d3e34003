"""From the keys of a LORA adapter to updates of base parameters; keys and shapes are `peft/tuners/lora/layer.py`'s."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from streamconv.adapters.base import Parameter, Update
from streamconv.adapters.conv import ConvUpdate
from streamconv.adapters.experts_reader import Factors, read_experts
from streamconv.adapters.initial import InitialUpdate
from streamconv.adapters.lora import DoraUpdate, LoraBiasUpdate, LoraUpdate
from streamconv.adapters.lora_config import LoraSettings, read_settings
from streamconv.adapters.source import Base, Source, trained_shape
from streamconv.adapters.tokens import read_tokens
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

_KEY = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])(?:\.weight)?"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|(?P<bias>lora_B\.bias))"
)
# Models of transformers that use Conv1D (`transformers/pytorch_utils.py`), and what they call such layers.
_CONV1D_MODELS = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})

Parts = Mapping[str, StoredTensor]


def read_lora(source: Source, base: Base) -> tuple[Update, ...]:
    """The updates of a LORA adapter, checked against config and base; trained rows last.

    Raises AdapterError where tensors are missing or do not fit, UnsupportedError for what is not built.
    """
    settings = read_settings(source.config)
    modules = _by_module(source)
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


def _updates(module: str, parts: Parts, settings: LoraSettings, source: Source, base: Base) -> list[Update]:
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
        rank = check_rank(source.trained(module), a, b, settings)
        if is_embedding:
            _check_embedding(parameter, shape, a, b)
        transposed = is_embedding or _is_transposed(parameter, shape, a, b, settings, base)
        if settings.use_dora:
            _check_magnitude(parameter, parts["magnitude"], (b.shape[0],))
        kind = DoraUpdate if settings.use_dora else LoraUpdate
        scaling = settings.scaling(source.trained(module), rank)
        updates = _initial(
            module, parameter, shape, settings, rank, scaling, transposed, is_embedding, source, base
        )
        updates += [kind(parameter.name, shape, MappingProxyType(factors), scaling, transposed)]
    if "bias" in parts:
        scaling = settings.scaling(source.trained(module), a.shape[0])
        updates.append(_bias_update(module, parts["bias"], b, scaling, base))
    return updates


def _initial(
    module: str,
    parameter: Parameter,
    shape: Shape,
    settings: LoraSettings,
    rank: int,
    scaling: float,
    transposed: bool,
    is_embedding: bool,
    source: Source,
    base: Base,
) -> list[Update]:
    """What comes before the update: nothing, or what its initialisation did to the base.

    Where the file holds the weight under the update, that is the weight after its initialisation.
    """
    if settings.initial is None or f"{module}.base_layer.weight" in source.tensors:
        return []
    if base.tie is not None and parameter.name == base.tie.head:
        raise UnsupportedError(
            f"{parameter.name} and {base.tie.embedding} are one tensor of the base, which the initialisation of this"
            f" adapter ({settings.initial}) changed for both, and the adapter does not hold it; save the adapter with"
            " PEFT's save_embedding_layers=True"
        )
    if is_embedding or (settings.use_dora and transposed):
        _check_plain(parameter, settings)
    none: Mapping[str, StoredTensor] = MappingProxyType({})
    return [
        InitialUpdate(
            parameter.name, shape, none, settings.initial, rank, scaling, transposed, parameter.dtype
        )
    ]


def _check_plain(parameter: Parameter, settings: LoraSettings) -> None:
    if settings.initial is not None:
        raise UnsupportedError(
            f"{settings.name}: init_lora_weights is {settings.initial!r}, which is supported for linear layers only,"
            f" and with use_dora not for Conv1D; {parameter.name} is another case"
        )


def _check_roles(module: str, parts: Parts, settings: LoraSettings, is_embedding: bool) -> None:
    keys = dict.fromkeys(("embedding_A", "embedding_B") if is_embedding else ("lora_A", "lora_B"), "")
    keys = {role: f"lora_{role}" if is_embedding else f"{role}.weight" for role in keys}
    if settings.use_dora:
        keys["magnitude"] = "lora_magnitude_vector"
    if settings.lora_bias and not is_embedding:
        keys["bias"] = "lora_B.bias"
    for role, key in keys.items():
        if role not in parts:
            there = ", ".join(tensor.name for tensor in parts.values())
            raise AdapterError(
                f"{module}.{key} is missing, though {there} is there; the file is not complete"
            )
    for role, tensor in parts.items():
        if role == "magnitude" and role not in keys:
            raise AdapterError(
                f"{tensor.name} belongs to DoRA, but use_dora is not set in {settings.name}; set it"
                " if the adapter was trained with DoRA"
            )
        if role not in keys:
            raise AdapterError(
                f"{tensor.name} has no place beside {next(iter(parts.values())).name}; {settings.name}"
                f" and the tensors are not of one adapter{' (lora_bias is not set)' if role == 'bias' else ''}"
            )


def check_rank(module: str, a: StoredTensor, b: StoredTensor, settings: LoraSettings) -> int:
    """The rank the tensors have, which must be the one the config gives this module."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, expected [r, in] and [out, r]"
        )
    settings.check_rank(module, a, a.shape[0])
    return a.shape[0]


def _check_magnitude(parameter: Parameter, magnitude: StoredTensor, expected: Shape) -> None:
    if magnitude.shape != expected:
        raise AdapterError(
            f"{magnitude.name} has shape {list(magnitude.shape)}, expected {list(expected)},"
            f" one number for each output of {parameter.name}"
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
    module: str, bias: StoredTensor, b: StoredTensor, scaling: float, base: Base
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
        _check_magnitude(parameter, factors["magnitude"], (1, outputs, *(1 for _ in kernel)))
    settings.check_rank(source.trained(module), a, a.shape[0])
    scaling = settings.scaling(source.trained(module), a.shape[0])
    return ConvUpdate(parameter.name, shape, MappingProxyType(dict(factors)), scaling, settings.use_dora)


def _is_transposed(
    parameter: Parameter, shape: Shape, a: StoredTensor, b: StoredTensor, settings: LoraSettings, base: Base
) -> bool:
    """Whether the weight is stored as [in, out]: its shape says, or where it is square, the model does.

    `fan_in_fan_out` decides last. PEFT sets it to what the last layer it wrapped needed, and the bitsandbytes
    layers leave a wrong value as it is.
    """
    outputs, inputs = b.shape[0], a.shape[1]
    if shape not in {(outputs, inputs), (inputs, outputs)}:
        raise _misfit(parameter, a, b)
    if outputs != inputs:
        return shape == (inputs, outputs)
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
