"""Files of a tokenizer as transformers reads it, from the header of a GGUF file: `tokens.py` the other way.

Made are those of byte pairs that are cut by a rule of which all is known, added tokens included. Others are left out,
and a sentence says so and where to get them: a header has no normalizer, and of sentencepiece no merges.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.checkpoint.gguf import Value
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError
from streamconv.gguf.pre_tokenizers import BuiltIn, built_in
from streamconv.gguf.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_KEY = "tokenizer.ggml."
_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # so spelled in every file
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """Contents of files by name, none where they cannot be told, and sentences on that."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def made_tokenizer(where: str, pairs: Mapping[str, Value], names: Collection[str]) -> MadeTokenizer:
    """The tokenizer of a header; nothing where `names` of files beside it has one.

    Raises CheckpointError for tokens that contradict each other.
    """
    if any(name in names for name in _VOCABULARIES):
        return MadeTokenizer()
    kind, rule = pairs.get(f"{_KEY}model"), pairs.get(f"{_KEY}pre", "default")
    found = built_in(str(rule)) if kind == "gpt2" else None
    if found is None:
        what = "none" if kind is None else f"of the kind {shown(kind)}, cut by {shown(rule)}"
        note = (
            f"the tokenizer in the header of the GGUF file is {what}, from which transformers' files cannot be made"
            " faithfully: put tokenizer.json, tokenizer_config.json and tokenizer.model, if there is one, of the"
            " original model into the output, or beside the GGUF file before"
        )
        return MadeTokenizer(notes=(note,))
    texts, types = _tokens(where, pairs)
    fast = _fast(where, pairs, found, texts, types)
    config = _config(where, pairs, found, texts)
    return MadeTokenizer({"tokenizer.json": _as_json(fast), "tokenizer_config.json": _as_json(config)})


def _tokens(where: str, pairs: Mapping[str, Value]) -> tuple[Sequence[str], Sequence[int]]:
    texts, types = _texts(where, pairs, "tokens"), pairs.get(f"{_KEY}token_type")
    is_right = isinstance(types, tuple) and len(types) == len(texts)
    if not is_right or not texts:
        raise CheckpointError(
            f"{where}: its header must have a type in {_KEY}token_type for each of {len(texts)} tokens;"
            " download it again"
        )
    assert isinstance(types, tuple)
    kinds = [each if isinstance(each, int) else 0 for each in types]
    if odd := [each for each in kinds if each not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED)]:
        raise CheckpointError(
            f"{where}: its header has a token of the type {odd[0]} in {_KEY}token_type, which byte pairs do not have;"
            " download it again"
        )
    return texts, kinds


def _texts(where: str, pairs: Mapping[str, Value], name: str) -> Sequence[str]:
    found = pairs.get(f"{_KEY}{name}")
    if not isinstance(found, tuple) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(
            f"{where}: its header must have a list of texts as {_KEY}{name}; download it again"
        )
    return [str(each) for each in found]


def _fast(
    where: str, pairs: Mapping[str, Value], rule: BuiltIn, texts: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """Content of tokenizer.json."""
    vocabulary = {text: number for number, text in enumerate(texts) if types[number] == NORMAL}
    if len(vocabulary) != sum(kind == NORMAL for kind in types):
        raise CheckpointError(f"{where}: its header has a token twice in {_KEY}tokens; download it again")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": text, **plain, "special": types[number] != USER_DEFINED}
        for number, text in enumerate(texts)
        if types[number] not in (NORMAL, UNUSED)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rule.normalizer,
        "pre_tokenizer": rule.pre_tokenizer,
        "post_processor": _post_processor(where, pairs, rule, texts, level),
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignores_merges,
            "vocab": vocabulary,
            "merges": [_merge(where, each, vocabulary) for each in _texts(where, pairs, "merges")],
        },
    }


def _merge(where: str, rule: str, vocabulary: Mapping[str, int]) -> list[str]:
    """The two tokens of a merge; a space between them is the first that is not the first character."""
    place = rule.find(" ", 1)
    pair = [rule[:place], rule[place + 1 :]]
    if place < 0 or any(each not in vocabulary for each in (*pair, "".join(pair))):
        raise CheckpointError(
            f"{where}: its header has the merge {shown(rule)} in {_KEY}merges, expected two tokens with a space between"
            " that make a third; download it again"
        )
    return pair


def _post_processor(
    where: str, pairs: Mapping[str, Value], rule: BuiltIn, texts: Sequence[str], level: Mapping[str, Any]
) -> dict[str, Any]:
    """The rule by which begin and end are added to a text."""
    usual = {"bos": rule.adds_begin, "eos": False}
    adds = {side: pairs.get(f"{_KEY}add_{side}_token", usual[side]) is True for side in usual}
    tokens = {side: _token(where, pairs, side, texts) for side, wanted in adds.items() if wanted}
    if not tokens:
        return dict(level)
    ends = {
        side: [{"SpecialToken": {"id": token, "type_id": place}} for place in (0, 1)]
        for side, token in tokens.items()
    }
    single, pair = [], []
    for place, name in enumerate("AB"):
        parts = [
            *(ends[side][place] for side in ("bos",) if side in ends),
            {"Sequence": {"id": name, "type_id": place}},
            *(ends[side][place] for side in ("eos",) if side in ends),
        ]
        pair += parts
        single += parts if not place else []
    special = {
        token: {"id": token, "ids": [texts.index(token)], "tokens": [token]} for token in tokens.values()
    }
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    return {"type": "Sequence", "processors": [dict(level), template]}


def _token(where: str, pairs: Mapping[str, Value], role: str, texts: Sequence[str]) -> str:
    number = pairs.get(f"{_KEY}{role}_token_id")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(texts):
        raise CheckpointError(
            f"{where}: its header must have the id of a token as {_KEY}{role}_token_id, found {shown(number)}; download"
            " it again"
        )
    return texts[number]


def _config(where: str, pairs: Mapping[str, Value], rule: BuiltIn, texts: Sequence[str]) -> dict[str, Any]:
    """Content of tokenizer_config.json."""
    roles = {
        role: _token(where, pairs, name, texts)
        for role, name in _ROLES.items()
        if f"{_KEY}{name}_token_id" in pairs
    }
    template = pairs.get("tokenizer.chat_template")
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": pairs.get(f"{_KEY}add_bos_token", rule.adds_begin) is True,
        "add_eos_token": pairs.get(f"{_KEY}add_eos_token", False) is True,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    return found | ({"chat_template": template} if isinstance(template, str) else {})


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
