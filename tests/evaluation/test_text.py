"""Windows of tokens: what is in them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import InputError
from streamconv.evaluation.text import load_tokenizer, read_windows
from tests.evaluation.texts import BOS, EOS, numbers, save_tokenizer, words, write_lines, write_text


def tokenizer(folder: Path, *, begins: bool = False) -> Any:
    save_tokenizer(folder, begins=begins)
    return load_tokenizer(folder)


def test_a_text_is_cut_from_its_beginning(tmp_path: Path) -> None:
    found = read_windows(write_text(tmp_path / "a.txt"), tokenizer(tmp_path), 3, 20)
    assert found.tolist() == [numbers(60)[first : first + 20] for first in (0, 20, 40)]


def test_every_window_begins_as_a_text_does(tmp_path: Path) -> None:
    found = read_windows(write_text(tmp_path / "a.txt"), tokenizer(tmp_path, begins=True), 2, 20)
    assert found.tolist() == [[BOS, *numbers(19)], [BOS, *numbers(38)[19:]]]


def test_documents_follow_each_other(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]}
    path = write_lines(tmp_path / "a.jsonl", {"text": "w8 w9"}, chat, {"text": words(numbers(30))})
    found = read_windows(path, tokenizer(tmp_path), 1, 20)
    assert found[0].tolist() == [8, 9, EOS, BOS, 3, 5, 6, 3, 7, *numbers(11)]


def test_too_short_a_text(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", 55)
    with pytest.raises(InputError, match=r"a\.txt has 55 tokens, and 3 sequences of 20 need 60.*--tokens 40"):
        read_windows(path, tokenizer(tmp_path), 3, 20)
    with pytest.raises(InputError, match="a smaller --sequence-length"):
        read_windows(path, tokenizer(tmp_path), 1, 200)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{}", r"a\.json: text is read from \.txt and \.jsonl"),
        ("a.txt", b"w1 \xff", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "w1"}\n{', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1 must be an object"),
        ("a.jsonl", b'{"prompt": "w1"}', r"a\.jsonl, line 1 must be an object"),
        ("a.jsonl", b'{"messages": [1]}', r"a\.jsonl: the chat template"),
    ],
)
def test_a_file_that_is_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_windows(tmp_path / name, tokenizer(tmp_path), 1, 20)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.txt cannot be read"):
        read_windows(tmp_path / "nothing.txt", tokenizer(tmp_path), 1, 20)


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot open the tokenizer"):
        load_tokenizer(tmp_path)
