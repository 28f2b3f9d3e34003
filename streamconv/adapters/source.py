"""An adapter's tensors by the name of the module they belong to, and the base parameters they are for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Parameter, Tie
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.views import (
    ParameterView,
    find_stored,
    find_view,
    is_unembedding,
    names_at,
    other_form,
    spellings,
)
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.dtypes import DENSE, WHOLE
from streamconv.errors import AdapterError, UnsupportedError

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
_DTYPES = frozenset(DENSE.values())
_INDICES = _DTYPES | frozenset(WHOLE.values())


@dataclass(frozen=True, slots=True)
class BaseParameters:
    """Parameters of the base model by name, its config.json, and what it ties."""

    parameters: Mapping[str, Parameter]
    config: Mapping[str, Any]
    tie: Tie | None

    def names(self) -> Iterator[str]:
        """Names of parameters that are stored, or tied; `find` knows more."""
        yield from self.parameters
        if self.tie is not None and self.tie.embedding in self.parameters:
            yield self.tie.head

    def find(self, name: str) -> Parameter | None:
        """The parameter `name`; a tied head need not be stored and then has the embedding's shape.

        What another class calls otherwise comes with the name that is stored. What is a part of stored parameters, or
        made of several, comes as `name`, which is not stored: `view` tells where it lies.
        """
        if self.tie is not None and (name == self.tie.head or is_unembedding(name)):
            embedding = self.parameters.get(self.tie.embedding)
            return None if embedding is None else Parameter(self.tie.head, embedding.shape)
        stored = find_stored(name, self.parameters)
        if stored is None and self.tie is not None and name == self.tie.head.replace(".weight", ".bias"):
            # BERT's head shares the bias that is stored one level up, too.
            stored = self.parameters.get(name.replace(".decoder.bias", ".bias"))
        if stored is not None:
            return stored
        view = find_view(name, self.parameters, self.config)
        return None if view is None else view.parameter

    def view(self, name: str) -> ParameterView | None:
        """Find where `name` of another class lies in stored parameters; None if it is stored itself, or not there."""
        if find_stored(name, self.parameters) is not None:
            return None
        return find_view(name, self.parameters, self.config)

    def has_place(self, path: str) -> bool:
        """Whether `path` is a module or a parameter of another class, to be found in stored parameters."""
        return any(self.find(name) is not None for name in names_at(path))

    def get(self, name: str, key: str) -> Parameter:
        """The parameter `name`, for the adapter's tensor `key`. Raises AdapterError with the nearest name, and
        UnsupportedError where it is stored in a way that is not decoded.
        """
        found = self.find(name)
        stored = self.parameters.get(found.name if found else other_form(name, self.parameters) or "")
        if stored is not None and stored.undecoded is not None:
            raise UnsupportedError(f"{key} is for {stored.name}, which is not decoded: {stored.undecoded}")
        if found is None:
            raise AdapterError(f"{key} is for {name}, which the base model does not have{self._hint(name)}")
        return found

    def without(self, names: Collection[str]) -> BaseParameters:
        """All but `names`; a tie to one of them is none any more, nor is one to a head that was not stored."""
        kept = {name: parameter for name, parameter in self.parameters.items() if name not in names}
        return BaseParameters(MappingProxyType(kept), self.config, None)

    def _hint(self, name: str) -> str:
        """Another form of the same, or names that differ by a prefix only, as of another class of the same model."""
        fused = other_form(name, self.parameters)
        if fused is not None:
            model = self.config.get("model_type")
            return (
                f", but it has {fused} {list(self.parameters[fused].shape)}: one of adapter and base has fused what"
                f" the other has apart, and in which order is not known here for {model!r} models; save the base in"
                " the form that the adapter was trained on"
            )
        for other in self.parameters:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                return (
                    f", but it has {other}: the adapter was trained on a class without {prefix!r} in its names, as"
                    " AutoModel, but not all of its tensors fit the base with it"
                )
            if name.endswith(f".{other}"):
                prefix = name.removesuffix(other)
                return (
                    f", but it has {other}: the adapter has {prefix!r} more in this name, but not all of its tensors"
                    " fit the base without it"
                )
        unknown = [other for other, parameter in self.parameters.items() if parameter.undecoded is not None]
        if unknown:
            return (
                f"; {len(unknown)} of its weights are stored in ways that are not decoded, such as {unknown[0]}: if it"
                " is one of them under another name, give the 16-bit base model instead"
            )
        return "; is this the base the adapter was trained on, and of the same class?"


@dataclass(frozen=True, slots=True)
class MoeLayout:
    """Packing of the factors of fused experts; None leaves it to shapes, PEFT's version and the model.

    `axis`: the axis of the parameter that lora_A runs along, `last` or `middle`. `order`: what runs slowest in the
    columns of lora_B, `rank-major` or `expert-major`.
    """

    axis: str | None = None
    order: str | None = None


@dataclass(frozen=True, slots=True)
class Renaming:
    """Paths of the adapter's modules and parameters in the base and in training, where these differ.

    `bases` has the path in the base of each that the adapter is for; `trained` has the path in training by that in
    the base, of others too as far as known, and `heads` the beginnings of those that are not, longest first.
    """

    reason: str
    bases: Mapping[str, str]
    trained: Mapping[str, str]
    heads: tuple[tuple[str, str], ...] = ()

    def to_base(self, path: str) -> str:
        return self.bases.get(path, path)

    def to_trained(self, path: str) -> str:
        """The path in training of a module or parameter of the base, or of one below it."""
        above, below = path, ""
        while above and above not in self.trained:
            above, _, last = above.rpartition(".")
            below = f".{last}{below}"
        if above:
            return self.trained[above] + below
        for base, trained in self.heads:
            if path.startswith(base):
                return trained + path.removeprefix(base)
        return path


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter. `tensors` by their key without `base_model.model.`, in the names of the base, sorted; `shared` are
    those that belong to all modules, by their key without `base_model.`.

    `dumped`: parameters of the base, where the file is a dump of the whole model that was trained, with all of them;
    `left_out`: names of tensors of what was trained around the model and is no part of it.
    """

    location: str
    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]
    renaming: Renaming | None = None
    moe: MoeLayout = MoeLayout()
    dumped: frozenset[str] = frozenset()
    shared: Mapping[str, StoredTensor] = field(default_factory=lambda: MappingProxyType({}))
    left_out: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        dumped = "the adapter's file holds the whole model; its weights are taken in place of the base's"
        valued = (
            f"{', '.join(self.left_out)} in the adapter's file are of a value head, which reinforcement learning trains"
            " beside a language model and which is no part of it; they are left out"
        )
        return (*([dumped] if self.dumped else ()), *([valued] if self.left_out else ()))

    def trained(self, module: str) -> str:
        """The path that `module` of the base had in training, for which the config's patterns are meant."""
        return module if self.renaming is None else self.renaming.to_trained(module)

    def trained_names(self, parameter: str) -> tuple[str, ...]:
        """Names that `parameter` of the base may have had in training: Mixtral's `w1` is `gate_proj` elsewhere."""
        return tuple(dict.fromkeys(spellings(self.trained(parameter))))


def trained_shape(source: Source, parameter: Parameter, key: str) -> Shape:
    """The shape of `parameter` in training: that of the weight under the adapter, where it is saved as `key`."""
    under = source.tensors.get(key)
    return parameter.shape if under is None else under.shape


def by_module(source: Source, pattern: re.Pattern[str]) -> Mapping[str, Mapping[str, StoredTensor]]:
    """Tensors by role, by module: the groups `role` and `module` of `pattern`. Keys of another kind are left."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in source.tensors.items():
        if match := pattern.fullmatch(key):
            modules.setdefault(match["module"], {})[match["role"]] = tensor
    return modules


def check_roles(
    module: str, parts: Mapping[str, StoredTensor], roles: Iterable[str], before: str = ""
) -> None:
    """Raise AdapterError for the first of `roles` without a tensor; in keys, `before` stands before it."""
    for role in roles:
        if role not in parts:
            there = next(iter(parts.values())).name
            raise AdapterError(
                f"{module}.{before}{role} is missing, though {there} is there; the file is not complete"
            )


def apart(tensors: Iterable[StoredTensor], shared: str) -> tuple[list[StoredTensor], list[StoredTensor]]:
    """Tensors of single modules, and those that all share: `base_model.` and what the expression `shared` matches."""
    found: tuple[list[StoredTensor], list[StoredTensor]] = ([], [])
    pattern = re.compile(rf"{re.escape(SHARED_PREFIX)}({shared})(\.default)?")
    for tensor in tensors:
        is_shared = bool(shared) and pattern.fullmatch(plain_key(tensor.name)) is not None
        found[is_shared].append(tensor)
    return found


def by_key(
    location: str, tensors: Iterable[StoredTensor], keys: str, prefix: str = PREFIX, indices: str = ""
) -> Mapping[str, StoredTensor]:
    """Tensors by the key that PEFT's save_pretrained would have given them, without its prefix.

    `keys` is the regular expression of the method's own tensors, `indices` of those that may be stored as whole
    numbers. Raises AdapterError for other keys and element types, and for the tensors of several adapters.
    """
    trained = [tensor for tensor in tensors if not COMPUTED.search(tensor.name)]
    plain = {tensor.name: plain_key(tensor.name) for tensor in trained}
    named = _adapter_name(location, plain.values(), keys)
    before = _prefix(plain.values(), keys) if prefix == PREFIX else prefix
    found: dict[str, StoredTensor] = {}
    for tensor in sorted(trained, key=lambda tensor: tensor.name):
        name = plain[tensor.name]
        if not name.startswith(before):
            raise AdapterError(
                f"{location}: the tensor {tensor.name} does not belong to a PEFT adapter, whose names start"
                f" with {PREFIX!r}; save the adapter with PEFT's save_pretrained"
            )
        is_index = bool(indices) and re.search(rf"\.({indices})$", name) is not None
        is_index |= name.endswith(
            ".num_batches_tracked"
        )  # which batch norm counts; a saved module holds it, too
        if tensor.dtype not in (_INDICES if is_index else _DTYPES):
            raise AdapterError(
                f"{location}: {tensor.name} is stored as {tensor.dtype}, expected F32, F16 or BF16; a"
                " quantized adapter must be saved in floating point first"
            )
        key = named.sub(r".\1", f".{name.removeprefix(before)}")[1:]
        if key in found:
            raise AdapterError(
                f"{location}: {found[key].name} and {tensor.name} are the same thing twice; keep one of them"
            )
        found[key] = tensor
    return MappingProxyType(dict(sorted(found.items())))


# Buffers that a model computes by itself, which dumps of old versions have; training changes none.
COMPUTED = re.compile(r"\.((original_)?inv_freq|position_ids|masked_bias)$")
# What wrappers put into names when a state dict is saved without unwrapping: torch.compile, FSDP, activation
# checkpointing anywhere, DataParallel and DeepSpeed before all else.
_WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_key(name: str) -> str:
    """`name` without what wrappers put into it."""
    return _WRAPPERS.sub("", name) if "module" in name or "_orig_mod" in name else name


def _prefix(names: Collection[str], keys: str) -> str:
    """All that names have before the module's path: PEFT's prefix, once or more, after the name of a module around it.

    It is empty where no name has PEFT's prefix and all are of the method's own tensors.
    """
    if not any(PREFIX in name for name in names):
        own = re.compile(rf"\.({keys})(\.|$)")
        return "" if all(own.search(name) for name in names) else PREFIX
    around = {name.partition(PREFIX)[0] for name in names if PREFIX in name}
    before = (around.pop() if len(around) == 1 else "") + PREFIX
    while all(name.startswith(before + PREFIX) for name in names):
        before += PREFIX
    return before


def _adapter_name(location: str, names: Iterable[str], keys: str) -> re.Pattern[str]:
    """Pattern of the adapter's own name in keys, as a state dict has it (`lora_A.default.weight`).

    A name other than `default` is one if all of the method's tensors have it. Raises AdapterError for several names.
    """
    own = re.compile(rf"\.(?:{keys})\.(?!(?:weight|bias)$)([^.]+)(?:\.weight|\.bias)?$|\.(?:{keys})(?:\.|$)")
    found = {match[1] for name in names if (match := own.search(name))}
    if len(found) > 1 and None not in found:
        listed = ", ".join(sorted(found))
        raise AdapterError(
            f"{location}: the file holds several adapters ({listed}), which are not merged at once; choose one and save"
            " it alone, with PEFT's save_pretrained(..., selected_adapters=[NAME])"
        )
    name = found.pop() if len(found) == 1 else None
    if name is None or name == "default":
        return re.compile(rf"\.({keys}|trainable_tokens_delta)\.default(?=\.|$)")
    return re.compile(rf"\.({keys}|trainable_tokens_delta|modules_to_save)\.{re.escape(name)}(?=\.|$)")
