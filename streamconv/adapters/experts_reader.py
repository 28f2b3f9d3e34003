"""Reading of a LoRA on parameters: the experts' weights that it is for, and the packing of its factors.

A key does not name the parameter: PEFT wraps a module once for every targeted parameter, in the order in which the
module registers them, so of k pairs of factors the one with k - 1 times `.base_layer` in its key belongs to the first.
Hub checkpoints of Mixtral, Qwen-MoE, DeepSeek and others store every expert apart, though transformers 5 fuses them
(`transformers/conversion_mapping.py`); the update is then split onto those weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType

from streamconv.adapters.base import Parameter, Update
from streamconv.adapters.experts import ExpertsUpdate
from streamconv.adapters.lora_config import LoraSettings
from streamconv.adapters.source import BaseParameters, Source
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

# In the order in which modules of transformers register them; the last three are DBRX's.
_REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")
# What the parts of a fused parameter are called where every expert is stored apart, in the order of their rows.
_APART: Mapping[str, Sequence[tuple[str, ...]]] = MappingProxyType(
    {
        "gate_up_proj": (("gate_proj", "up_proj"), ("fc1", "fc3")),
        "gate_proj": (("gate_proj",),),
        "up_proj": (("up_proj",),),
        "down_proj": (("down_proj",), ("fc2",)),
    }
)
# Modules with `is_transposed`: PEFT since 0.19 takes lora_A for the middle axis of these, and before, of all.
TRANSPOSED = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
# transformers 5 trains the transpose of what it stores of these, transformers 4 what is stored; both run PEFT 0.18.
_STORED_TRANSPOSED = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
# Those whose classes and files have [E, out, in] alike, without their `_text` (`gate_up_proj` in `modeling_*.py`).
_PLAIN = frozenset(
    {
        *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2"),
        *("deepseek_v3", "deepseek_v32", "diffusion_gemma", "dots1", "dots3_note", "ernie4_5_moe"),
        *("ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "glm4_moe", "glm4_moe_lite"),
        *("glm4v_moe", "glm5_next", "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid"),
        *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "jamba", "kimi_linear", "kolibri1"),
        *("laguna", "lfm2_moe", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2"),
        *("mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"),
        *("qwen3_omni_moe", "qwen4_exp", "solar_open", "step3p7", "zaya"),
    }
)


@dataclass(frozen=True, slots=True)
class Factors:
    """lora_A and lora_B as they are stored."""

    a: StoredTensor
    b: StoredTensor


@dataclass(frozen=True, slots=True)
class _Stored:
    """A fused parameter [E, d1, d2] as the base stores it: whole, or in pieces, expert after expert."""

    shape: Shape
    pieces: tuple[
        tuple[Parameter, int, int], ...
    ]  # the weight, its first expert, its first row in that expert


def read_experts(
    source: Source, base: BaseParameters, settings: LoraSettings, factors: Mapping[str, Factors]
) -> tuple[tuple[Update, ...], frozenset[str]]:
    """The updates of `target_parameters`, and the keys of `factors` they took.

    Raises AdapterError where tensors do not fit, UnsupportedError where the packing cannot be told.
    """
    updates: list[Update] = []
    taken: set[str] = set()
    for module, keys in _by_wrapped_module(factors).items():
        names = _targets_of(module, settings.target_parameters, source, base)
        if not names:
            continue
        if len(names) != len(keys):
            raise AdapterError(
                f"{factors[keys[-1]].a.name} is one of {len(keys)} pairs of factors of {module}, but"
                f" target_parameters in {settings.name} names {len(names)} of its parameters: {', '.join(names)};"
                " the file is not complete"
            )
        for name, key in zip(_in_order(names, source), keys, strict=True):
            updates += _updates(module, name, factors[key], settings, source, base)
        taken |= set(keys)
    return tuple(updates), frozenset(taken)


def take_apart(
    modules: Mapping[str, Mapping[str, StoredTensor]], base: BaseParameters
) -> Mapping[str, Mapping[str, StoredTensor]]:
    """`modules` with those of one projection of all experts, as Tinker trains them, in place of which each expert has
    its own.

    Their lora_A is [E, r, in] and lora_B [E, out, r], or for a factor that all experts share [1, ...]; the module is
    `experts.w1`. Raises AdapterError where they are not for the experts of the base.
    """
    found: dict[str, Mapping[str, StoredTensor]] = {}
    for module, parts in modules.items():
        place, _, name = module.rpartition(".")
        is_stacked = parts.keys() == {"lora_A", "lora_B"} and all(
            len(part.shape) == 3 for part in parts.values()
        )
        if not is_stacked or base.find(f"{module}.weight") or not base.find(f"{place}.0.{name}.weight"):
            found[module] = parts
            continue
        experts = _count(place, name, base)
        for part in parts.values():
            if part.shape[0] not in (1, experts):
                raise AdapterError(
                    f"{part.name} has shape {list(part.shape)}, expected [{experts}, ...], one for each expert of"
                    f" {place} of the base, or [1, ...] for all of them; was the adapter trained on this base?"
                )
        for expert in range(experts):
            own = {role: _matrix(part, expert % part.shape[0]) for role, part in parts.items()}
            found[f"{place}.{expert}.{name}"] = own
    return found


def _count(place: str, name: str, base: BaseParameters) -> int:
    """Number of experts that the base has at `place`."""
    return next(expert for expert in count() if base.find(f"{place}.{expert}.{name}.weight") is None)


def _matrix(tensor: StoredTensor, number: int) -> StoredTensor:
    """One of the matrices of a stored tensor [n, rows, columns], bytes of its own."""
    nbytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    return dataclasses.replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + number * nbytes)


def _by_wrapped_module(factors: Mapping[str, Factors]) -> Mapping[str, list[str]]:
    """Keys of the factors by the module they wrap, the innermost first."""
    modules: dict[str, list[str]] = {}
    for key in factors:
        module = key
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        modules.setdefault(module, []).append(key)
    return {module: sorted(keys, key=len, reverse=True) for module, keys in modules.items()}


def _targets_of(module: str, targets: Sequence[str], source: Source, base: BaseParameters) -> list[str]:
    """Names of the parameters of `module` among target_parameters; none where it is a layer that has but a weight.

    A target is the end of a parameter's path, so one without a path is that parameter of any module that has it.
    """
    trained, names = source.trained(module), []
    for target in targets:
        inside, _, name = target.rpartition(".")
        means = trained == inside or trained.endswith(f".{inside}") if inside else _has(module, name, base)
        if means and name not in names:
            names.append(name)
    if "gate_up_proj" in names:  # a class has that, or the two apart
        names = [name for name in names if name not in ("gate_proj", "up_proj")]
    if names == ["weight"]:
        found = base.find(f"{module}.weight")
        return names if found is not None and len(found.shape) == 3 else []
    return names


def _has(module: str, name: str, base: BaseParameters) -> bool:
    """Whether `module` has the parameter, fused or with every expert apart."""
    return base.find(f"{module}.{name}") is not None or _names_apart(module, name, base) is not None


def _names_apart(module: str, name: str, base: BaseParameters) -> Sequence[str] | None:
    """Names of the parameter's parts where the base has every expert apart; None where it has not."""
    for names in _APART.get(name, ()):
        if all(base.find(f"{module}.0.{each}.weight") is not None for each in names):
            return names
    return None


def _in_order(names: Sequence[str], source: Source) -> Sequence[str]:
    if len(names) > 1 and not set(names) <= set(_REGISTERED):
        raise UnsupportedError(
            f"{source.config.name}: target_parameters names several parameters of one module ({', '.join(names)}), and"
            f" their order in it, which tells their tensors apart, is known only for {', '.join(_REGISTERED)}"
        )
    return sorted(names, key=_REGISTERED.index) if len(names) > 1 else names


# -- one parameter ---------------------------------------------------------------------------------------------------


def _updates(
    module: str, name: str, factors: Factors, settings: LoraSettings, source: Source, base: BaseParameters
) -> list[Update]:
    if settings.use_dora or settings.lora_bias or settings.initial:
        raise UnsupportedError(
            f"{settings.name}: target_parameters go with neither use_dora nor lora_bias nor an initialisation that"
            " changes the base"
        )
    stored = _find(module, name, factors.a, base)
    experts = stored.shape[0]
    a, b = factors.a, factors.b
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts:
        raise AdapterError(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, expected [E·r, ·] and [·, E·r] for the"
            f" {experts} experts of {module}.{name}"
        )
    rank, path = a.shape[0] // experts, f"{source.trained(module)}.{name}"
    settings.check_rank(path, a, rank)
    is_middle = _is_middle(module, name, stored.shape, factors, settings, source, base)
    order = source.moe.order or _usual_order(source, module)
    scaling = settings.scaling(path, rank)
    updates: list[Update] = []
    for parameter, first, offset in stored.pieces:
        is_whole = len(parameter.shape) == 3
        parts = {"lora_A": a if is_whole else _rows(a, first * rank, rank), "lora_B": b}
        height = parameter.shape[-2]
        updates.append(
            ExpertsUpdate(
                parameter.name,
                parameter.shape,
                MappingProxyType(parts),
                scaling,
                experts,
                first,
                height,
                offset,
                is_middle,
                order == "expert-major",
            )
        )
    return updates


def _rows(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Consecutive rows of a stored matrix, which are bytes of their own."""
    nbytes = tensor.shape[1] * tensor.dtype.itemsize
    return dataclasses.replace(tensor, shape=(count, tensor.shape[1]), offset=tensor.offset + first * nbytes)


def _find(module: str, name: str, key: StoredTensor, base: BaseParameters) -> _Stored:
    """The parameter where the base has it: fused, or every expert apart."""
    whole = base.find(f"{module}.{name}")
    if whole is not None:
        whole = base.get(whole.name, key.name)
        if len(whole.shape) == 2:
            return _Stored((1, *whole.shape), ((whole, 0, 0),))
        if len(whole.shape) == 3:
            return _Stored(whole.shape, ((whole, 0, 0),))
        raise UnsupportedError(f"{key.name} is for {whole.name}, which has shape {list(whole.shape)}")
    names = _names_apart(module, name, base)
    if names is not None:
        return _apart(module, names, base)
    raise AdapterError(
        f"{key.name} is for {module}.{name}, which the base model does not have, neither fused nor expert by expert; is"
        " this the base the adapter was trained on?"
    )


def _apart(place: str, names: Sequence[str], base: BaseParameters) -> _Stored:
    pieces: list[tuple[Parameter, int, int]] = []
    expert, height, width = 0, 0, 0
    while base.find(f"{place}.{expert}.{names[0]}.weight") is not None:
        offset = 0
        for name in names:
            parameter = base.get(f"{place}.{expert}.{name}.weight", f"{place}.{expert}.{names[0]}.weight")
            if len(parameter.shape) != 2 or (width and parameter.shape[1] != width):
                raise UnsupportedError(
                    f"{parameter.name} has shape {list(parameter.shape)}, expected a matrix as wide as in other experts"
                )
            pieces.append((parameter, expert, offset))
            offset, width = offset + parameter.shape[0], parameter.shape[1]
        if height and offset != height:
            raise UnsupportedError(
                f"{place}.{expert} has {offset} rows, other experts {height}; they must be alike"
            )
        height = offset
        expert += 1
    return _Stored((expert, height, width), tuple(pieces))


# -- how the factors are packed ----------------------------------------------------------------------------------


def _is_middle(
    module: str,
    name: str,
    shape: Shape,
    factors: Factors,
    settings: LoraSettings,
    source: Source,
    base: BaseParameters,
) -> bool:
    """Whether lora_A runs along the middle axis: shapes say, else PEFT's version and the model, else the user."""
    ends = (factors.a.shape[1], factors.b.shape[0])
    fits = {"last": ends == (shape[2], shape[1]), "middle": ends == (shape[1], shape[2])}
    if not any(fits.values()):
        raise AdapterError(
            f"{module}.{name} of the base has shape {list(shape)}, which does not fit {factors.a.name}"
            f" {list(factors.a.shape)} and {factors.b.name} {list(factors.b.shape)}; was the adapter trained on this"
            " base?"
        )
    asked = source.moe.axis
    if asked is not None and not fits[asked]:
        raise AdapterError(
            f"--moe-layout {asked} does not fit {factors.a.name}: its shape {list(factors.a.shape)} is for the"
            f" {'last' if fits['last'] else 'middle'} axis of {module}.{name} {list(shape)}"
        )
    if not all(fits.values()):
        return fits["middle"]
    if len(shape) == 3 and shape[0] == 1 and asked is None:
        return False
    if asked is not None:
        return asked == "middle"
    return _usual_axis(module, name, shape, settings, base) == "middle"


def _usual_axis(module: str, name: str, shape: Shape, settings: LoraSettings, base: BaseParameters) -> str:
    """Axis that lora_A runs along in a square parameter, as PEFT of the adapter's version has it for such a model.

    Raises UnsupportedError where that cannot be told.
    """
    version, model_type = settings.peft_version, str(base.config.get("model_type"))
    if version is not None and version < (0, 19) and model_type not in _STORED_TRANSPOSED:
        return "middle"
    # 0.19.0 may do one or the other; a fused parameter of a model that is not known may be stored transposed.
    if version is not None and version >= (0, 19, 1):
        if model_type in TRANSPOSED:
            return "middle"
        if base.find(f"{module}.{name}") is None or not _PLAIN.isdisjoint(_model_types(base)):
            return "last"
    raise UnsupportedError(
        f"{module}.{name} has square experts, {list(shape)}, so shapes do not tell along which axis lora_A runs, and"
        f" neither do peft_version in {settings.name} and the model's type; say it with --moe-layout last or middle"
        " (PEFT before 0.19: middle)"
    )


def _model_types(base: BaseParameters) -> Iterator[str]:
    """Types of the model and of those in it, without the `_text` of a text model's own."""
    for section in (base.config, *base.config.values()):
        if isinstance(section, Mapping):
            yield str(section.get("model_type")).removesuffix("_text")


def _usual_order(source: Source, module: str) -> str:
    if "unsloth" not in source.config.raw.decode(errors="replace").lower():
        return "rank-major"
    raise UnsupportedError(
        f"{source.config.name} names Unsloth, whose versions before September 2026 trained {module} with lora_B packed"
        " expert-major, and nothing in the file tells; say it with --moe-layout expert-major, or rank-major for"
        " adapters of other tools and later versions"
    )
