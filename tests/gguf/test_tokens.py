"""Tokenizers as pairs of a header."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamconv.checkpoint.gguf_header import Pairs
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from streamconv.gguf.tokens import TokenizerSource, tokenizer_pairs
from tests.gguf.bases import fast_tokenizer
from tests.gguf.pieces import model_bytes

SPACE = "\u2581"
PIECES = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    ("<0x00>", 0.0, BYTE),
    (SPACE, -2.0, NORMAL),
    ("a", -3.0, NORMAL),
    ("b", -4.0, NORMAL),
    ("ab", -1.0, NORMAL),
    (f"{SPACE}ab", -0.5, NORMAL),
]


def source(fast: dict[str, Any] | None = None, model: bytes | None = None, **fields: Any) -> TokenizerSource:
    ids: dict[str, int] = {}
    if fast is not None:
        ids = dict(fast["model"]["vocab"]) | {each["content"]: each["id"] for each in fast["added_tokens"]}
    elif model is not None:
        ids = {text: number for number, (text, _, _) in enumerate(PIECES)}
    usual = TokenizerSource(
        "here", fast, model, {}, {}, ids, {"bos_token": "<s>", "eos_token": "</s>"}, {}, None
    )
    return replace(usual, **fields)


def value(pairs: Pairs, key: str) -> Any:
    return pairs[f"tokenizer.ggml.{key}"].value


def merged_pieces() -> dict[str, Any]:
    """The tokenizer.json that transformers makes of PIECES."""
    special = {"special": True, "normalized": False}
    return {
        "added_tokens": [{"id": number, "content": PIECES[number][0], **special} for number in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}]},
        "pre_tokenizer": None,
        "post_processor": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {text: number for number, (text, _, _) in enumerate(PIECES)},
            "merges": [f"{SPACE} ab", "a b"],
        },
    }


def test_byte_pairs() -> None:
    pairs = tokenizer_pairs(source(fast_tokenizer()), 290)
    assert value(pairs, "model") == "gpt2"
    assert value(pairs, "merges")[:2] == ["\u0100 \u0101", "\u0101 \u0102"]
    assert value(pairs, "tokens")[278:281] == ["<s>", "</s>", "[PAD280]"]
    assert value(pairs, "token_type")[277:281] == [NORMAL, CONTROL, CONTROL, UNUSED]
    assert (value(pairs, "bos_token_id"), value(pairs, "eos_token_id")) == (278, 279)
    assert "tokenizer.chat_template" not in pairs
    assert "tokenizer.ggml.scores" not in pairs


def test_pieces_of_a_model() -> None:
    added = {"<extra>": 9, f"{SPACE}{SPACE}": 10}
    pairs = tokenizer_pairs(source(model=model_bytes(PIECES), added=added), 12)
    assert value(pairs, "model") == "llama"
    assert value(pairs, "tokens") == [*(text for text, _, _ in PIECES), "<extra>", "  ", "[PAD11]"]
    assert value(pairs, "scores") == [*(score for _, score, _ in PIECES), -1000.0, -1000.0, -10000.0]
    assert value(pairs, "token_type") == [
        *(kind for _, _, kind in PIECES),
        USER_DEFINED,
        USER_DEFINED,
        UNUSED,
    ]
    assert value(pairs, "add_space_prefix") is True
    assert "tokenizer.ggml.add_bos_token" not in pairs  # llama.cpp adds one to such


def test_scores_of_merges_stand_in_the_order_of_those_of_the_model() -> None:
    pairs = tokenizer_pairs(source(merged_pieces()), 9)
    assert value(pairs, "token_type") == [kind for _, _, kind in PIECES]
    scores = value(pairs, "scores")
    assert scores[8] > scores[7]  # as in PIECES
    assert value(pairs, "add_space_prefix") is True
    assert value(pairs, "add_bos_token") is False  # no post-processor adds one
    without = merged_pieces() | {"normalizer": None}
    assert value(tokenizer_pairs(source(without), 9), "add_space_prefix") is False
    metaspace = without | {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}
    assert value(tokenizer_pairs(source(metaspace), 9), "add_space_prefix") is True
    never = without | {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}
    assert value(tokenizer_pairs(source(never), 9), "add_space_prefix") is False


def test_begin_and_end_are_added_as_the_config_or_the_post_processor_says() -> None:
    fast = fast_tokenizer()
    assert value(tokenizer_pairs(source(fast), 290), "add_bos_token") is True
    assert value(tokenizer_pairs(source(fast), 290), "add_eos_token") is False
    pairs = tokenizer_pairs(source(fast, config={"add_bos_token": False, "add_eos_token": True}), 290)
    assert (value(pairs, "add_bos_token"), value(pairs, "add_eos_token")) == (False, True)
    inside = fast | {"post_processor": {"type": "Sequence", "processors": [fast["post_processor"]]}}
    assert value(tokenizer_pairs(source(inside), 290), "add_bos_token") is True
    assert (
        value(tokenizer_pairs(source(fast | {"post_processor": {"type": "ByteLevel"}}), 290), "add_bos_token")
        is False
    )


def test_ids_of_config_json_count_where_the_tokenizer_names_none() -> None:
    pairs = tokenizer_pairs(source(fast_tokenizer(), roles={}, stated={"eos_token": 5}), 290)
    assert value(pairs, "eos_token_id") == 5
    assert "tokenizer.ggml.bos_token_id" not in pairs


def test_added_tokens_that_look_special_are() -> None:
    fast = fast_tokenizer()
    plain = {"special": False, "normalized": False}
    fast["added_tokens"] += [
        {"id": 280, "content": "<|im_start|>", **plain},
        {"id": 281, "content": "word", **plain},
        {"id": 282, "content": "<unused7>", **plain},
    ]
    pairs = tokenizer_pairs(source(fast), 290)
    assert value(pairs, "token_type")[280:283] == [CONTROL, USER_DEFINED, CONTROL]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "Unigram", "vocab": {}}}, "its model is 'Unigram', expected BPE"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "end_of_word_suffix": "</w>"}},
            "it has end_of_word_suffix '</w>'",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "the rule by which it cuts text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the rule by which it cuts text"),
    ],
)
def test_a_tokenizer_that_llama_cpp_may_not_have(change: dict[str, Any], says: str) -> None:
    fast = fast_tokenizer() | change
    with pytest.raises(UnsupportedError, match=says):
        tokenizer_pairs(replace(source(fast_tokenizer()), fast=fast), 290)


def test_files_that_contradict_each_other() -> None:
    fast = fast_tokenizer()
    fast["model"]["merges"].append("a b c")
    with pytest.raises(CheckpointError, match="has the merge 'a b c', expected two tokens"):
        tokenizer_pairs(source(fast), 290)
    pieces = merged_pieces()
    pieces["model"]["merges"].append("b b")
    with pytest.raises(CheckpointError, match="merges 'b' and 'b', and what they make is no"):
        tokenizer_pairs(source(pieces), 9)
    with pytest.raises(CheckpointError, match="has the id 8, and the embedding 5 rows"):
        tokenizer_pairs(source(model=model_bytes(PIECES), ids={}), 5)
    half = fast_tokenizer()
    half["added_tokens"][0]["content"] = "\ud800"
    with pytest.raises(CheckpointError, match="half a character"):
        tokenizer_pairs(source(half), 290)
    odd = fast_tokenizer() | {"added_tokens": [{"id": "x", "content": "a"}]}
    with pytest.raises(CheckpointError, match="is no added token"):
        tokenizer_pairs(replace(source(fast_tokenizer()), fast=odd), 290)
    with pytest.raises(UnsupportedError, match=r"its tokenizer\.model is no BPE model"):
        tokenizer_pairs(source(model=model_bytes(PIECES, kind=1)), 9)
