"""Whole parameters in an adapter: trained ones (`modules_to_save`, `bias`), and records of what was trained on.

Keys of trained modules: `lm_head.weight` as PEFT saves them; `lm_head.modules_to_save.weight` and
`lm_head.modules_to_save.default.weight` as dumps of a training state dict have them. Of trained biases:
`q_proj.base_layer.bias` in an adapted module, `norm.bias` elsewhere. Of records: beside a LoRA on the head or the
embedding `lm_head.base_layer.weight`, and its bias; beside trained rows `embed_tokens.token_adapter.base_layer.weight`;
and after the vocabulary was resized `embed_tokens.weight` and `lm_head.weight`, though modules_to_save does not list
them. Then all that lies below a saved embedding is there, too: `lm_head.modules_to_save.weight` again, and the
untrained `lm_head.original_module.weight`, which nothing uses (`peft/utils/save_and_load.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from streamconv.adapters.base import Parameter, Replace
from streamconv.adapters.config import is_empty
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.adapters.source import COMPUTED, BaseParameters, Source
from streamconv.adapters.targets import is_trained
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError

_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(\.default)?\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
_WEIGHTS_UNDER = (".token_adapter.base_layer.weight", ".base_layer.weight")
_BIAS_UNDER = ".base_layer.bias"
_UNDER = (*_WEIGHTS_UNDER, _BIAS_UNDER)
# PEFT lists both for every classification task; a model has one of them (`peft/peft_model.py`).
_CLASSIFIERS = frozenset({"classifier", "score"})
# Classes of models with labels end so.
LABELLED = re.compile(r".+For(?P<task>\w*Classification|QuestionAnswering|SemanticSegmentation|CTC)\w*")


@dataclass(frozen=True, slots=True)
class Saved:
    """`replaces`: whole parameters; `records`: those among them that are what was trained on, not trained themselves;
    `repeated`: keys that only say the same again."""

    replaces: tuple[Replace, ...]
    records: frozenset[str]
    repeated: frozenset[str]


def read_saved(
    source: Source,
    base: BaseParameters,
    keys: Collection[str],
    updated: Collection[str],
    digests: Mapping[str, str],
    of_head: Collection[str] = (),
) -> Saved:
    """Replacements among `keys`, which no update has taken.

    `updated` are the parameters with updates, `digests` those of every tensor's bytes, `of_head` the parameters of a
    head of another task, which the base need not have. Keys that are neither are left for the caller to refuse. Raises
    AdapterError for a replacement that does not fit the base.
    """
    trained, recorded = saved_names(source, base), find_vocabulary(base) | source.dumped
    biases = str(source.config.fields.get("bias")).endswith(("all", "_only"))  # `lora_only`: its method's
    found: dict[str, Replace] = {}
    records: set[str] = set()
    repeated = set()
    for key in keys:
        parameter = saved_parameter(key, source.trained(key), trained) or (_bias(key) if biases else None)
        is_record = parameter is None
        parameter = parameter or _recorded(key, recorded, updated, base)
        if parameter is None:
            continue
        parameter, tensor = _stored_name(parameter, base), source.tensors[key]
        if parameter in found:
            _check_same(source, found[parameter], key, digests)
            repeated.add(key)
            continue
        if parameter in updated and not is_record and not key.endswith(_UNDER):
            raise AdapterError(
                f"{source.location}: {key} of {tensor.file.name} replaces {parameter}, which also has an update; they"
                f" are not of one training run{_way_out(tensor)}"
            )
        if parameter not in of_head:
            _check_shape(tensor, base.get(parameter, tensor.name))
        found[parameter] = Replace(parameter, tensor)
        records |= {parameter} if is_record else set()
    for key in keys:
        original = _ORIGINAL.fullmatch(key)
        if original is None:
            continue
        if _stored_name(f"{original['module']}.{original['rest']}", base) in found:
            repeated.add(key)
    return Saved(tuple(found.values()), frozenset(records), frozenset(repeated))


def _way_out(tensor: StoredTensor) -> str:
    """The option that leaves out a file beside the adapter's own, such as a copy of the whole model."""
    name = tensor.file.name
    is_own = name.startswith(("adapter_model", "adapters"))
    return (
        ""
        if is_own
        else f"; if {name} was not trained with the adapter, leave it out with --ignore-extra {name}"
    )


def _check_same(source: Source, before: Replace, key: str, digests: Mapping[str, str]) -> None:
    """Raise AdapterError if the tensor of `key` differs from the one that was found for the same parameter before."""
    if not are_equal(before.tensor, source.tensors[key], digests):
        raise AdapterError(
            f"{source.location}: {before.parameter} is saved twice, the second time as {key}, and the two differ;"
            " remove the one that was not trained"
        )


def check_saved(source: Source, base: BaseParameters, replaces: Iterable[Replace]) -> None:
    """Raise AdapterError for an entry of modules_to_save that has no tensor in the file."""
    config = source.config
    found = [name for replace in replaces for name in source.trained_names(replace.parameter)]
    for name in config.names("modules_to_save"):
        if any(_is_inside(parameter, (name,)) for parameter in found):
            continue
        in_base = any(_is_inside(source.trained(parameter), (name,)) for parameter in base.parameters)
        if name in _CLASSIFIERS and not in_base and (found or _is_labelled(base)):
            continue
        listed = (
            "; PEFT lists 'classifier' and 'score' for any task of labels, and saves no head of another name: where the"
            " model's has one, such as classification_head of T5 and BART, train with it in modules_to_save"
        )
        raise AdapterError(
            f"{config.name}: modules_to_save lists {name!r}, but the adapter holds no tensor of it; the file"
            f" is not complete, or the name is wrong{'' if in_base or name not in _CLASSIFIERS else listed}"
        )


def check_saved_whole(
    source: Source,
    base: BaseParameters,
    replaces: Iterable[Replace],
    updated: Collection[str],
    allow_missing: bool,
) -> tuple[str, ...]:
    """Sentences on parameters of saved modules that the file lacks, though it has others of theirs, or the same of
    modules that differ by numbers alone.

    Raises AdapterError for such, unless `allow_missing`. `updated` are the parameters with updates.
    """
    names = source.config.names("modules_to_save")
    if not names or not is_empty(source.config.fields.get("layer_replication")):
        return ()
    found = {replace.parameter for replace in replaces}
    kinds = {_kind(module) for name in found if (module := _saved_module(source.trained(name), names))}
    missing = [
        name
        for name in base.parameters
        if name not in found | frozenset(updated)
        and _kind(_saved_module(source.trained(name), names)) in kinds
        and not _is_buffer(name, base)
        and is_trained(name, base)
    ]
    if not missing:
        return ()
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    if not allow_missing:
        raise AdapterError(
            f"{source.location}: the adapter holds no tensors for {shown}, though modules_to_save of"
            f" {source.config.name} lists them and it has others of their kind; the file is not complete: get it whole,"
            " or leave the base's there as they are with --allow-missing"
        )
    return (f"the adapter holds no tensors for {shown}, which it saves; the base's stay as they are",)


def _is_labelled(base: BaseParameters) -> bool:
    """Whether the base has a head of its own for labels, which may have another name than PEFT lists."""
    return any(LABELLED.fullmatch(str(name)) for name in base.config.get("architectures") or ())


def saved_names(source: Source, base: BaseParameters) -> tuple[str, ...]:
    """modules_to_save; under ensure_weight_tying PEFT saves the tied partner too and does not list it."""
    names = source.config.names("modules_to_save")
    if base.tie is None or not source.config.flag("ensure_weight_tying"):
        return names
    pair = (source.trained(base.tie.embedding), source.trained(base.tie.head))
    if any(_is_inside(parameter, names) for parameter in pair):
        names += tuple(parameter.rpartition(".")[0] for parameter in pair)
    return names


def find_vocabulary(base: BaseParameters) -> frozenset[str]:
    """The embedding and the head: the two parameters whose rows are the vocabulary."""
    found = {find_embedding(base.parameters), *(name for name in HEADS if base.find(name) is not None)}
    found |= {base.tie.head} if base.tie is not None else set()
    return frozenset(name for name in found if name is not None)


def saved_parameter(key: str, trained: str, names: tuple[str, ...]) -> str | None:
    """The parameter that `key`, `trained` in training, holds as modules_to_save has it; None if it is none."""
    if _ORIGINAL.fullmatch(key):
        return None
    spelled = _SAVED.fullmatch(key)
    if spelled:
        return f"{spelled['module']}.{spelled['rest']}"
    return key if not key.endswith(_UNDER) and _is_inside(trained, names) else None


def _bias(key: str) -> str | None:
    """The bias of the base that was trained where `bias` is `all` or `lora_only`."""
    if not key.endswith(".bias") or _ORIGINAL.fullmatch(key):  # of a saved module it is not the trained one
        return None
    return key.replace(_BIAS_UNDER, ".bias")


def _stored_name(parameter: str, base: BaseParameters) -> str:
    """The name that the base's file has for what other classes call `parameter`, as Mixtral's router is `mlp.gate`."""
    found = base.find(parameter)
    # The bias of a head that is tied to the embedding is kept under its own name: untied, both are stored.
    is_shared = base.tie is not None and parameter == base.tie.head.replace(".weight", ".bias")
    return parameter if found is None or is_shared else found.name


def _recorded(
    key: str, embeddings: Collection[str], updated: Collection[str], base: BaseParameters
) -> str | None:
    """The parameter that `key` holds as it was when training began."""
    for under in _WEIGHTS_UNDER:
        if key.endswith(under):
            parameter = key.removesuffix(under) + ".weight"
            return parameter if _stored_name(parameter, base) in updated else None
    if key.endswith(_BIAS_UNDER):
        module = key.removesuffix(_BIAS_UNDER)
        return f"{module}.bias" if _stored_name(f"{module}.weight", base) in updated else None
    return key if key in embeddings and key not in updated else None


def _is_inside(parameter: str, names: tuple[str, ...]) -> bool:
    """Whether it belongs to a module that PEFT would take for one of `names`: by the end of its path."""
    return bool(_saved_module(parameter, names))


def _saved_module(parameter: str, names: tuple[str, ...]) -> str:
    """The outermost module around it that PEFT would take for one of `names`; empty if there is none."""
    parts = parameter.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in paths if path.endswith(names)), "")


def _is_buffer(name: str, base: BaseParameters) -> bool:
    """Whether files of old versions have it and classes of the model may not: positions, or the mask of an attention,
    which is called its bias."""
    is_mask = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in base.parameters
    return is_mask or COMPUTED.search(name) is not None


def _kind(path: str) -> str:
    """`path` with a mark in place of each number."""
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def _check_shape(tensor: StoredTensor, parameter: Parameter) -> None:
    """A saved module may have more or fewer rows (a resized vocabulary), nothing else."""
    if tensor.shape == parameter.shape:
        return
    if (
        not parameter.shape
        or len(tensor.shape) != len(parameter.shape)
        or tensor.shape[1:] != parameter.shape[1:]
    ):
        raise AdapterError(
            f"{tensor.name} has shape {list(tensor.shape)}, which cannot replace {parameter.name} of the"
            f" base, {list(parameter.shape)}"
        )


def are_equal(one: StoredTensor, other: StoredTensor, digests: Mapping[str, str]) -> bool:
    return (one.dtype, one.shape, digests[one.name]) == (other.dtype, other.shape, digests[other.name])
