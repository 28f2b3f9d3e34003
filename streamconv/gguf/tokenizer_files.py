"""Files of a tokenizer as transformers reads it, from the header of a GGUF file: `tokens.py` the other way.

Made are those of byte pairs that are cut by a rule of which all is known, added tokens included, and those of
sentencepiece that have a token for every byte. Others are left out, and a sentence says so and where to get them: a
header has no normalizer. Pieces of sentencepiece are merged by their scores, the best first (`bpe_model.cc`, and
`llm_tokenizer_spm` of llama.cpp): as merges in that order, transformers has them, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.gguf import Value
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError
from streamconv.gguf.pre_tokenizers import BuiltIn, built_in
from streamconv.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

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


_CONFIG = "tokenizer_config.json"
_IN_USE = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED)
_KINDS = (*_IN_USE, UNUSED)
_SPACE = "\u2581"
# Keys that llama.cpp takes to be so where the header of a tokenizer of pieces has none (`llama-vocab.cpp`).
_OF_PIECES: Mapping[str, Value] = MappingProxyType(
    {
        f"{_KEY}bos_token_id": 1,
        f"{_KEY}eos_token_id": 2,
        f"{_KEY}unknown_token_id": 0,
        f"{_KEY}add_bos_token": True,
        f"{_KEY}add_space_prefix": True,
    }
)
_NOT_TOLD = (
    "tokenizer.json is made of the pieces and scores in the header of the GGUF file, and cuts text as llama.cpp does;"
    " if the original model's normalizes text first, which a header does not tell, put its files into the output"
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Texts and types of tokens, by id; normal ones are all different."""

    texts: Sequence[str]
    types: Sequence[int]

    def of_kinds(self, *kinds: int) -> dict[str, int]:
        """Ids of those of some types."""
        pairs = enumerate(zip(self.texts, self.types, strict=True))
        return {text: number for number, (text, kind) in pairs if kind in kinds}


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
    if kind == "llama":
        pairs = {**_OF_PIECES, **pairs}
        pieces = _tokens(where, pairs, (*_KINDS, BYTE))
        if _are_whole(pieces):
            files = {
                "tokenizer.json": _of_pieces(where, pairs, pieces),
                _CONFIG: _config(where, pairs, pieces),
            }
            return MadeTokenizer({name: _as_json(content) for name, content in files.items()}, (_NOT_TOLD,))
    found = built_in(str(rule)) if kind == "gpt2" else None
    if found is None:
        what = "none" if kind is None else f"of the kind {shown(kind)}, cut by {shown(rule)}"
        note = (
            f"the tokenizer in the header of the GGUF file is {what}, from which transformers' files cannot be made"
            " faithfully: put tokenizer.json, tokenizer_config.json and tokenizer.model, if there is one, of the"
            " original model into the output, or beside the GGUF file before"
        )
        return MadeTokenizer(notes=(note,))
    pairs = {f"{_KEY}add_bos_token": found.adds_begin, **pairs}
    tokens = _tokens(where, pairs, _KINDS)
    fast, config = _of_byte_pairs(where, pairs, found, tokens), _config(where, pairs, tokens)
    return MadeTokenizer({"tokenizer.json": _as_json(fast), _CONFIG: _as_json(config)})


def _tokens(where: str, pairs: Mapping[str, Value], known: Collection[int]) -> Tokens:
    """Raises CheckpointError for lists of several lengths, and for types of tokens that are not `known`."""
    texts, types = _texts(where, pairs, "tokens"), pairs.get(f"{_KEY}token_type")
    is_right = isinstance(types, tuple) and len(types) == len(texts)
    if not is_right or not texts:
        raise CheckpointError(
            f"{where}: its header must have a type in {_KEY}token_type for each of {len(texts)} tokens;"
            " download it again"
        )
    assert isinstance(types, tuple)
    kinds = [each if isinstance(each, int) else 0 for each in types]
    if odd := [each for each in kinds if each not in known]:
        raise CheckpointError(
            f"{where}: its header has a token of the type {odd[0]} in {_KEY}token_type, which such a tokenizer does not"
            " have; download it again"
        )
    tokens = Tokens(texts, kinds)
    if len(tokens.of_kinds(NORMAL)) != kinds.count(NORMAL):
        raise CheckpointError(f"{where}: its header has a token twice in {_KEY}tokens; download it again")
    return tokens


def _texts(where: str, pairs: Mapping[str, Value], name: str) -> Sequence[str]:
    found = pairs.get(f"{_KEY}{name}")
    if not isinstance(found, tuple) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(
            f"{where}: its header must have a list of texts as {_KEY}{name}; download it again"
        )
    return [str(each) for each in found]


def _added(tokens: Tokens) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": text, **plain, "special": kind != USER_DEFINED}
        for number, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True))
        if kind not in (NORMAL, UNUSED, BYTE)
    ]


def _follow(added: Sequence[Mapping[str, Any]], count: int) -> bool:
    """Whether ids of added tokens go on from those of the vocabulary: else they are read from it (`tokenizers`)."""
    return [each["id"] for each in added] == list(range(count, count + len(added)))


def _of_byte_pairs(where: str, pairs: Mapping[str, Value], rule: BuiltIn, tokens: Tokens) -> dict[str, Any]:
    """Content of tokenizer.json."""
    vocabulary, added = tokens.of_kinds(NORMAL), _added(tokens)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rule.normalizer,
        "pre_tokenizer": rule.pre_tokenizer,
        "post_processor": _post_processor(where, pairs, tokens, level),
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
            "vocab": vocabulary if _follow(added, len(vocabulary)) else tokens.of_kinds(*_IN_USE),
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
    where: str, pairs: Mapping[str, Value], tokens: Tokens, level: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The rule by which begin and end are added to a text, after `level`; None where there is nothing to do."""
    adds = {side: pairs.get(f"{_KEY}add_{side}_token") is True for side in ("bos", "eos")}
    added = {side: _token(where, pairs, side, tokens.texts) for side, wanted in adds.items() if wanted}
    if not added:
        return None if level is None else dict(level)
    ends = {
        side: [{"SpecialToken": {"id": token, "type_id": place}} for place in (0, 1)]
        for side, token in added.items()
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
        token: {"id": token, "ids": [tokens.texts.index(token)], "tokens": [token]}
        for token in added.values()
    }
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    return template if level is None else {"type": "Sequence", "processors": [dict(level), template]}


def _token(where: str, pairs: Mapping[str, Value], role: str, texts: Sequence[str]) -> str:
    number = pairs.get(f"{_KEY}{role}_token_id")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(texts):
        raise CheckpointError(
            f"{where}: its header must have the id of a token as {_KEY}{role}_token_id, found {shown(number)}; download"
            " it again"
        )
    return texts[number]


def _config(where: str, pairs: Mapping[str, Value], tokens: Tokens) -> dict[str, Any]:
    """Content of tokenizer_config.json."""
    roles = {
        role: _token(where, pairs, name, tokens.texts)
        for role, name in _ROLES.items()
        if f"{_KEY}{name}_token_id" in pairs
    }
    template = pairs.get("tokenizer.chat_template")
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": pairs.get(f"{_KEY}add_bos_token") is True,
        "add_eos_token": pairs.get(f"{_KEY}add_eos_token", False) is True,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    return found | ({"chat_template": template} if isinstance(template, str) else {})


# -- sentencepiece -------------------------------------------------------------------------------------------------


def _are_whole(tokens: Tokens) -> bool:
    """Whether any text can be cut: by an unknown token, and one for every byte."""
    return UNKNOWN in tokens.types and {*tokens.of_kinds(BYTE)} == {f"<0x{byte:02X}>" for byte in range(256)}


def _of_pieces(where: str, pairs: Mapping[str, Value], tokens: Tokens) -> dict[str, Any]:
    """Content of tokenizer.json.

    llama.cpp puts a space before whatever stands at the beginning, or behind an added token.
    """
    adds_space = pairs.get(f"{_KEY}add_space_prefix") is True
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}, spaces] if adds_space else [spaces]
    back = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _post_processor(where, pairs, tokens, None),
        "decoder": {"type": "Sequence", "decoders": [*back, strip] if adds_space else back},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens.texts[tokens.types.index(UNKNOWN)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": tokens.of_kinds(*_IN_USE, BYTE),
            "merges": _merges(tokens.of_kinds(NORMAL), _scores(where, pairs, len(tokens.texts))),
        },
    }


def _scores(where: str, pairs: Mapping[str, Value], count: int) -> Sequence[float]:
    found = pairs.get(f"{_KEY}scores")
    scores = [each for each in found if isinstance(each, float)] if isinstance(found, tuple) else []
    if len(scores) != count or not all(map(math.isfinite, scores)):
        raise CheckpointError(
            f"{where}: its header must have a finite score in {_KEY}scores for each of {count} tokens; download it"
            " again"
        )
    return scores


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """All pairs of tokens that make a third, those of the best first; of one token, those with a longer left part."""
    found = [
        (-scores[number], -place, text)
        for text, number in vocabulary.items()
        for place in range(1, len(text))
        if text[:place] in vocabulary and text[place:] in vocabulary
    ]
    return [[text[:-back], text[-back:]] for _, back, text in sorted(found)]


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
