"""Heads of other tasks: an adapter trained as a classifier brings the head that a language model lacks.

PEFT saves the head of AutoModelForSequenceClassification and its like whole, under modules_to_save. With it the result
is a model of that class: the head is added, that of the language model left out, and config.json names both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import TaskHead
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.saved import LABELLED, find_vocabulary, saved_names, saved_parameter
from streamconv.adapters.source import BaseParameters, Source
from streamconv.checkpoint.types import Shape
from streamconv.errors import AdapterError, UnsupportedError

# Classes of transformers end so, and its AutoModels are called after it.
_TASKS = MappingProxyType(
    {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "QUESTION_ANS": "QuestionAnswering",
    }
)
# The task whose labels are tokens, as many as config.json gives in vocab_size.
_TOKENS = "CTC"
# What follows the family's name in a class.
_ENDS = re.compile(r"(For(?!mer)[A-Z]\w*|WithLMHeadModel|LMHeadModel|ModelWithLMHead|Model)$")
# Language models that have the name of the whole which they are a part of, and classifiers with one of their own.
_FAMILIES = MappingProxyType({"gemma3_text": "Gemma3Text", "qwen3_5_text": "Qwen3_5Text"})
# Modules that only one task needs, at the top of a model: those of all classes of transformers that have a classifier.
_HEADS = frozenset(
    {
        *("lm_head", "embed_out", "output_projection", "final_logits_bias", "lm_loss", "pred_layer", "cls"),
        *("predictions", "sop_classifier", "entity_predictions", "projection_head", "embedding_decoder"),
        *("generator_lm_head", "generator_predictions", "discriminator_predictions", "lm_predictions"),
        *("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        *("classifier", "score", "qa_outputs", "classification_head"),
    }
)
_DECODER_IS_HEAD = frozenset({"modernbert", "modernbert-decoder"})
# Modules beside the classifier that the base may lack, and that PEFT does not save unless it is told to.
_BESIDE: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "SequenceClassification": {
            **dict.fromkeys(("bert", "big_bird", "megatron-bert"), ("bert.pooler",)),
            **{
                name: (f"{name}.pooler",)
                for name in ("albert", "canine", "ernie", "fnet", "layoutlm", "luke")
            },
            **{name: (f"{name}.pooler",) for name in ("markuplm", "mobilebert", "nomic_bert", "rembert")},
            **{name: (f"{name}.pooler",) for name in ("roc_bert", "tapas")},
            **dict.fromkeys(("deberta", "deberta-v2"), ("pooler",)),
            **dict.fromkeys(("flaubert", "xlm"), ("sequence_summary",)),
            "squeezebert": ("transformer.pooler",),
            "distilbert": ("pre_classifier",),
            "eurobert": ("dense",),
            "xlnet": ("sequence_summary", "logits_proj"),
        },
        "ImageClassification": {
            "beit": ("beit.pooler",),
            "data2vec-vision": ("data2vec_vision.pooler",),
        },
    }
)
# The last module of a head of several, whose rows are the labels.
_LAST = ("out_proj", "classifier", "score", "qa_outputs", "logits_proj")


def find_head(source: Source, base: BaseParameters) -> TaskHead | None:
    """The head that the adapter brings, or that it gives another number of labels; None where it does neither.

    Raises AdapterError where the head lacks a module, UnsupportedError where the class that has it cannot be told.
    """
    task = trained_task(source.config)
    shapes = dict(_new_shapes(source, base)) if task is not None else {}
    if task is None or not shapes:
        return None
    labels = _labels(source, shapes)
    architecture = _trained_class(source, base, task)
    _check_names(source, architecture)
    left_out = tuple(name for name in base.parameters if name not in shapes and _is_head(name, base.config))
    _check_complete(source, base, task, {*shapes, *base.parameters} - {*left_out})
    return TaskHead(architecture, labels, tuple(sorted(shapes)), left_out, are_tokens=task == _TOKENS)


def _check_names(source: Source, architecture: str) -> None:
    """Raise UnsupportedError where the class has its body under a name that the base's has not, as loaders see it.

    A class opens a base without a name around its body, and one with its own; under another it finds nothing and draws
    every weight at random, in training, too.
    """
    heads = source.renaming.heads if source.renaming is not None else ()
    for base, trained in heads:
        if (trained, base) == ("transformer.", "model."):
            raise UnsupportedError(
                f"{source.location}: {architecture} has its weights under {trained!r}, and the base under {base!r},"
                " where transformers does not look for them when it opens that class: it draws them at random; save the"
                f" base with the names of {architecture}, train on that, and merge into it"
            )


def notes_on_head(head: TaskHead | None) -> tuple[str, ...]:
    """A sentence on what a head makes of the model."""
    if head is None:
        return ()
    brought = ", ".join(sorted({name.partition(".")[0] for name in head.parameters}))
    labels = f"{head.labels} label{'' if head.labels == 1 else 's'}"
    told = f"the adapter holds the head {brought} of {labels}, so the output is a {head.architecture}"
    left = sorted({name.partition(".")[0] for name in head.left_out})
    is_or_are = "is" if len(left) == 1 else "are"
    gone = (
        f"; {', '.join(left)} of the base, which that class does not have, {is_or_are} left out"
        if left
        else ""
    )
    return (told + gone,)


def trained_task(config: AdapterConfig) -> str | None:
    """The task, as classes of transformers are called, that the adapter was trained for; None for those of language."""
    named = _auto_class(config)
    match = LABELLED.fullmatch(named) if named else None
    return match["task"] if match else _TASKS.get(str(config.fields.get("task_type")))


def _auto_class(config: AdapterConfig) -> str | None:
    """The class that was trained, which PEFT writes down where it is given no task."""
    auto = config.fields.get("auto_mapping")
    name = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    return name if isinstance(name, str) else None


def _new_shapes(source: Source, base: BaseParameters) -> Iterator[tuple[str, Shape]]:
    """Saved parameters that the base lacks or has with another number of rows, but for those of the vocabulary."""
    names, vocabulary = saved_names(source, base), find_vocabulary(base)
    for key, tensor in source.tensors.items():
        parameter = saved_parameter(key, source.trained(key), names)
        if parameter is None or parameter in vocabulary:
            continue
        found = base.find(parameter)
        if found is None or (found.shape != tensor.shape and found.shape[1:] == tensor.shape[1:]):
            yield parameter, tensor.shape


def _labels(source: Source, shapes: Mapping[str, Shape]) -> int:
    """Rows of the last module. Raises UnsupportedError where that is not clear."""
    modules = {
        name.removesuffix(".weight"): shape[0]
        for name, shape in shapes.items()
        if len(shape) >= 2 and name.endswith(".weight")
    }
    for last in (*_LAST, ""):
        found = [rows for module, rows in modules.items() if not last or module.split(".")[-1] == last]
        if len(found) == 1:
            return found[0]
    raise UnsupportedError(
        f"{source.location}: which module of the saved head ({', '.join(sorted(shapes))}) gives the labels cannot be"
        " told; merge it with PEFT's merge_and_unload"
    )


def _trained_class(source: Source, base: BaseParameters, task: str) -> str:
    """The class of transformers that was trained. Raises UnsupportedError where nothing tells it."""
    auto = source.config.fields.get("auto_mapping")
    named = _auto_class(source.config)
    library = auto.get("parent_library") if isinstance(auto, Mapping) else None
    if named is not None and str(library).partition(".")[0] == "transformers":
        return named
    code = base.config.get("auto_map")
    if isinstance(code, Mapping) and code:
        own = code.get(f"AutoModelFor{task}")
        if isinstance(own, str):
            return own.rpartition(".")[2]
    elif str(base.config.get("model_type")) in _FAMILIES:
        return f"{_FAMILIES[str(base.config['model_type'])]}For{task}"
    elif base.config.get("architectures"):
        architecture = str(base.config["architectures"][0])
        if (family := _ENDS.sub("", architecture)) not in ("", architecture):
            return f"{family}For{task}"
    raise UnsupportedError(
        f"{source.location}: the adapter holds a head for {task}, which the base model does not have, and neither"
        f" auto_mapping in {source.config.name} nor architectures and auto_map in the base's config.json tell the class"
        " that has it; name it in architectures, or merge the adapter with PEFT's merge_and_unload"
    )


def _is_head(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a parameter of the base belongs to the head of its own task."""
    top = name.partition(".")[0]
    is_decoder = top == "decoder" and config.get("model_type") in _DECODER_IS_HEAD
    return top in _HEADS or is_decoder or name.endswith(".lm_head.weight")


def _check_complete(source: Source, base: BaseParameters, task: str, names: set[str]) -> None:
    """Raise AdapterError for a module that the class has too and that is in neither file: it was drawn at random."""
    for module in _BESIDE.get(task, {}).get(str(base.config.get("model_type")), ()):
        plain = module.partition(".")[2] or module  # of a base without the prefix
        if not any(name.startswith((f"{module}.", f"{plain}.")) for name in names):
            raise AdapterError(
                f"{source.location}: a {task} model of this family has {module} before its head, and neither the base"
                f" nor the adapter holds it: training drew it at random and did not save it; train with {plain!r} in"
                " modules_to_save"
            )
