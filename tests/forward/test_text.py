"""Windows of tokens: what is in them, and what is refused."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from streamconv.errors import InputError, OptionError
from streamconv.forward.text import load_tokenizer, read_windows
from tests.forward.texts import BOS, EOS, numbers, save_tokenizer, words, write_lines, write_text


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


def test_a_tokenizer_that_begins_with_a_token_it_lacks_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    begin = {"SpecialToken": {"id": "<nowhere>", "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [],
        "special_tokens": {},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot open the tokenizer"):
        load_tokenizer(tmp_path)


def put_library(monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> list[tuple[Any, ...]]:
    """A stand-in for the library `datasets` that answers with `rows`, and what it is asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, *, split: str, revision: str | None, streaming: bool) -> list[Any]:
        asked.append((name, split, revision, streaming))
        if name == "org/missing":
            raise FileNotFoundError("no such data set")
        return rows

    library = ModuleType("datasets")
    library.__spec__ = ModuleSpec("datasets", None)
    library.load_dataset = load_dataset  # type: ignore[attr-defined]  # a module is given its function
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def test_rows_of_a_data_set_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = {"messages": [{"role": "user", "content": "w5"}], "id": 1}
    asked = put_library(monkeypatch, [{"text": "w8 w9"}, chat, {"text": words(numbers(30))}])
    found = read_windows("org/texts", tokenizer(tmp_path), 1, 20)
    assert found[0].tolist() == [8, 9, EOS, BOS, 3, 5, *numbers(14)]
    read_windows("org/texts:test", tokenizer(tmp_path), 1, 20)
    read_windows("org/texts@v2:test", tokenizer(tmp_path), 1, 20)
    assert asked == [
        ("org/texts", "train", None, True),
        ("org/texts", "test", None, True),
        ("org/texts", "test", "v2", True),
    ]


def test_a_data_set_that_is_not_there_or_holds_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_library(monkeypatch, [{"prompt": "w1"}])
    with pytest.raises(InputError, match=r"org/texts:train, row 1 must be an object"):
        read_windows("org/texts", tokenizer(tmp_path), 1, 20)
    with pytest.raises(InputError, match=r"org/missing:train cannot be read: no such data set"):
        read_windows("org/missing", tokenizer(tmp_path), 1, 20)


def test_a_data_set_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.forward.text.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"pip install 'streamconv\[datasets\]'"):
        read_windows("org/texts", tokenizer(tmp_path), 1, 20)
