"""Tokenizers of headers as transformers' files: ids against a plain loop, and the tokenizers that they were made of."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

import streamconv
from streamconv.checkpoint.gguf import Value
from streamconv.errors import CheckpointError
from streamconv.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from streamconv.gguf.tokenizer_files import made_tokenizer
from tests.gguf.bases import write_llama

SPACE = "\u2581"
KEY = "tokenizer.ggml."
LETTERS = [SPACE, "a", "b", "c", "\u00e9", "\n"]


def words() -> list[tuple[str, float]]:
    """Letters, and texts of several letters that pairs of others make, with scores as training gives them."""
    draw, texts = random.Random(0), list(LETTERS)
    while len(texts) < 30:
        made = draw.choice(texts) + draw.choice(texts)
        if made not in texts and len(made) < 7:
            texts.append(made)
    order = draw.sample(range(24), 24)
    return [(text, -float(place)) for text, place in zip(texts, [*range(30, 36), *order], strict=True)]


def header(*, adds_space: bool = True, **more: Value) -> dict[str, Value]:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [(text, score, NORMAL) for text, score in words()]
    pieces += [("<user>", -1000.0, USER_DEFINED), ("[PAD290]", -1e4, UNUSED), ("<turn>", -1000.0, CONTROL)]
    texts, scores, types = zip(*pieces, strict=True)
    given: dict[str, Value] = {"tokens": texts, "scores": scores, "token_type": types, "model": "llama"}
    given |= {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": adds_space} | more
    return {KEY + name: value for name, value in given.items()}


def tokenizer(pairs: dict[str, Value]) -> Any:
    made = made_tokenizer("here", pairs, ())
    return Tokenizer.from_str(made.files["tokenizer.json"].decode())


WITH_SPACE, WITHOUT = tokenizer(header()), tokenizer(header(adds_space=False))


def merged(text: str, *, adds_space: bool) -> list[int]:
    """Ids as sentencepiece finds them: of all pairs of neighbours, the one with the best score is merged first."""
    texts = header()[f"{KEY}tokens"]
    assert isinstance(texts, tuple)
    scores = dict(words())
    parts = list((SPACE + text if adds_space and text else text).replace(" ", SPACE))
    while True:
        pairs = [
            (-scores[one + other], at)
            for at, (one, other) in enumerate(pairwise(parts))
            if one + other in scores
        ]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    known = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [texts.index(each) for part in known for each in part]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(f" {SPACE}aabbcc\u00e9\n\t\u65e5\U0001f642"), max_size=24))
def test_texts_are_cut_as_sentencepiece_cuts_them(text: str) -> None:
    for adds_space, found in ((True, WITH_SPACE), (False, WITHOUT)):
        assert found.encode(text, add_special_tokens=False).ids == merged(text, adds_space=adds_space)


def test_begin_end_and_added_tokens() -> None:
    """A space is put behind added tokens, too, as llama.cpp does; begin is added where a header says nothing of it."""
    ids = WITH_SPACE.encode("a<user>b<turn>").ids
    assert ids == [1, *merged("a", adds_space=True), 289, *merged("b", adds_space=True), 291]
    both = tokenizer(header(add_bos_token=False, add_eos_token=True))
    assert both.encode("").ids == [2]
    text = "  ab c\u65e5 a"
    assert WITH_SPACE.decode(WITH_SPACE.encode(text).ids) == text
    assert WITHOUT.decode(WITHOUT.encode(text).ids) == text


def test_what_a_header_leaves_out_is_what_llamacpp_takes() -> None:
    names = ("bos_token_id", "eos_token_id", "add_space_prefix")
    pairs = {key: value for key, value in header().items() if key.removeprefix(KEY) not in names}
    assert (
        made_tokenizer("here", pairs, ()).files["tokenizer.json"]
        == made_tokenizer("here", header(), ()).files["tokenizer.json"]
    )


def test_a_model_written_as_gguf_and_back_has_the_same_tokenizer(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    made = made_tokenizer("here", header() | {"tokenizer.chat_template": "{{ messages }}"}, ())
    for name, content in made.files.items():
        (base / name).write_bytes(content)
    streamconv.convert(base, tmp_path / "gguf", quant="gguf:bf16", device="cpu")
    streamconv.convert(tmp_path / "gguf", tmp_path / "back", quant="none", device="cpu")
    before, after = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (base, tmp_path / "back")
    )
    assert after == before
    live = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert live("ab \u65e5").input_ids == [1, *merged("ab \u65e5", adds_space=True)]
    assert (live.bos_token, live.eos_token, live.unk_token) == ("<s>", "</s>", "<unk>")
    assert live.chat_template == "{{ messages }}"


@pytest.mark.parametrize("scores", [None, (0.0,), (float("nan"),) * 292])
def test_scores_that_are_missing_are_refused(scores: Value) -> None:
    pairs = header()
    del pairs[f"{KEY}scores"]
    with pytest.raises(CheckpointError, match="a finite score"):
        made_tokenizer("here", pairs | ({} if scores is None else {f"{KEY}scores": scores}), ())


def test_pieces_without_a_token_for_every_byte_are_left_out() -> None:
    pairs = header()
    texts = pairs[f"{KEY}tokens"]
    assert isinstance(texts, tuple)
    made = made_tokenizer(
        "here", pairs | {f"{KEY}tokens": tuple(str(each).replace("<0x41>", "<0x4x>") for each in texts)}, ()
    )
    assert not made.files
    assert "put tokenizer.json" in made.notes[0]


@pytest.mark.parametrize("is_first", [True, False])
def test_added_tokens_among_byte_pairs_have_their_ids(is_first: bool) -> None:
    """Those that do not go on from the ids of the others: before them, or behind unused ones."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    texts = ["<|begin|>", "<x>", *letters] if is_first else [*letters, "[PAD257]", "<|begin|>", "<x>"]
    types = tuple(
        {"<|begin|>": CONTROL, "<x>": USER_DEFINED, "[PAD257]": UNUSED}.get(each, NORMAL) for each in texts
    )
    given: dict[str, Value] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tuple(texts),
        "token_type": types,
        "merges": ("a b",),
    }
    found = tokenizer({KEY + name: value for name, value in given.items()})
    assert found.encode("ab<x>b<|begin|>").ids == [
        texts.index(each) for each in ("ab", "<x>", "b", "<|begin|>")
    ]
