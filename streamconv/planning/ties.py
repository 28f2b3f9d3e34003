"""Ties between embedding and head: which two share a tensor, by config and by what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Tie
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.checkpoint.config import language_levels
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Weight
from streamconv.formats.linear import HEAD_BY_FAMILY

_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MASKED = ("ForMaskedLM", "ForPreTraining")
# Tied heads under other names than `lm_head`, by family (`_tied_weights_keys` in the models of transformers 5.24):
# those that a skip list must name, and further ones.
_HEADS: Mapping[str, str] = MappingProxyType(
    {
        **HEAD_BY_FAMILY,
        **dict.fromkeys(("canary", "cohere_asr", "moonshine", "moonshine_streaming"), "proj_out"),
        **dict.fromkeys(
            ("bert-generation", "camembert", "data2vec-text", "esm", "gte", "ibert", "longformer", "mpnet"),
            "lm_head.decoder",
        ),
        **dict.fromkeys(
            ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"), "lm_head.decoder"
        ),
    }
)


def check_unknown_tie(
    weights: Mapping[str, Weight], config: Mapping[str, Any], touched: Iterable[str]
) -> None:
    """Raise UnsupportedError where the adapter changes what may be tied, and what is tied to what is not known."""
    if find_embedding(weights) is not None or True not in _declared_ties(config):
        return
    sizes = [level.get("vocab_size") for level in language_levels(config)]
    for name in touched:
        weight = weights.get(name)
        if weight is not None and len(weight.shape) == 2 and weight.shape[0] in sizes:
            raise UnsupportedError(
                f"the adapter changes {name}, and the base ties its embeddings, but which tensors it ties is not known "
                f"for the model type {config.get('model_type')!r}; merge it with PEFT's merge_and_unload"
            )


def _declared_ties(config: Mapping[str, Any]) -> list[Any]:
    return [level.get("tie_word_embeddings") for level in language_levels(config)]


def find_tie(weights: Mapping[str, Weight], config: Mapping[str, Any]) -> Tie | None:
    """Embedding and head that share one tensor, or None.

    They do where the config says so, and where a language model's head is not stored at all: saving leaves
    out what loading ties again, and the key is absent where it has the model's default. Of a head that is not stored
    the config of the whole model decides (`tie_weights` in `transformers/modeling_utils.py`); its text model's own may
    say otherwise.
    """
    embedding = find_embedding(weights)
    head = next((name for name in HEADS if name in weights), None)
    declared = _declared_ties(config)
    own = _head_of(config)
    head = own if own in weights else head
    is_tied_by_the_whole = head is None and declared[0] is True
    if embedding is None or (False in declared and not is_tied_by_the_whole):
        return None
    ends = _LANGUAGE if own is None else (*_LANGUAGE, *_MASKED)
    has_head = any(str(name).endswith(ends) for name in config.get("architectures") or ())
    if head is None and has_head:
        return Tie(embedding, own or "lm_head.weight")
    return Tie(embedding, head) if head is not None and True in declared else None


def without_shared_head(weights: dict[str, Weight], config: Mapping[str, Any]) -> dict[str, Weight]:
    """`weights` without a tied head that is stored in the embedding's own bytes, as pickles have it."""
    embedding = find_embedding(weights)
    head = next((name for name in HEADS if name in weights), None)
    if embedding is None or head is None or _place(weights[embedding]) != _place(weights[head]):
        return weights
    others = {name: weight for name, weight in weights.items() if name != head}
    return weights if find_tie(others, config) is None else others


def _place(weight: Weight) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(part.file.path, part.offset, part.shape) for part in weight.parts.values()]


def _head_of(config: Mapping[str, Any]) -> str | None:
    """The head of a family whose weight is not lm_head.weight."""
    module = _HEADS.get(str(config.get("model_type")))
    return None if module is None else f"{module}.weight"
