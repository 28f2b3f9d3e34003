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
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.adapters.source import BaseParameters, Source
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
        parameter = parameter or _recorded(key, recorded, updated)
        if parameter is None:
            continue
        tensor = source.tensors[key]
        if parameter in found:
            if not are_equal(found[parameter].tensor, tensor, digests):
                raise AdapterError(
                    f"{source.location}: {parameter} is saved twice, the second time as {key}, and the two differ;"
                    " remove the one that was not trained"
                )
            repeated.add(key)
            continue
        if parameter in updated and not is_record and not key.endswith(_UNDER):
            raise AdapterError(
                f"{source.location}: {key} of {tensor.file.name} replaces {parameter}, which also has an update; they"
                " are not of one training run"
            )
        if parameter not in of_head:
            _check_shape(tensor, base.get(parameter, tensor.name))
        found[parameter] = Replace(parameter, tensor)
        records |= {parameter} if is_record else set()
    for key in keys:
        original = _ORIGINAL.fullmatch(key)
        if original is not None and f"{original['module']}.{original['rest']}" in found:
            repeated.add(key)
    return Saved(tuple(found.values()), frozenset(records), frozenset(repeated))


def check_saved(source: Source, base: BaseParameters, replaces: Iterable[Replace]) -> None:
    """Raise AdapterError for an entry of modules_to_save that has no tensor in the file."""
    config, found = source.config, [source.trained(replace.parameter) for replace in replaces]
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


def _recorded(key: str, embeddings: Collection[str], updated: Collection[str]) -> str | None:
    """The parameter that `key` holds as it was when training began."""
    for under in _WEIGHTS_UNDER:
        if key.endswith(under):
            parameter = key.removesuffix(under) + ".weight"
            return parameter if parameter in updated else None
    if key.endswith(_BIAS_UNDER):
        module = key.removesuffix(_BIAS_UNDER)
        return f"{module}.bias" if f"{module}.weight" in updated else None
    return key if key in embeddings and key not in updated else None


def _is_inside(parameter: str, names: tuple[str, ...]) -> bool:
    """Whether it belongs to a module that PEFT would take for one of `names`: by the end of its path."""
    parts = parameter.split(".")
    return any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts)))


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
