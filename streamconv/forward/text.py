"""Text as token windows of one length, by the model's own tokenizer: a .txt or .jsonl file, or a data set of the Hub.

The library `datasets` streams a data set (`storage/data_sets.py` says how they are named). Its rows are as the lines of
a .jsonl file: `text`, or `messages` that the chat template puts into words.

Documents are put one after the other and cut into windows; what does not fill the last one is left out. Where the
tokenizer puts a BOS token before a text, every window begins with it. The first token of a window is given, not
predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from streamconv.errors import InputError, OptionError
from streamconv.storage.data_sets import DataSet, data_set_of
from streamconv.system_errors import first_line, lacking

# More characters than any run of natural text has in a token: so much is enough, of however long a file.
_CHARACTERS_A_TOKEN = 64

_MAX_LINE = 32_000_000
"""Characters of a document: far more than any book has."""

Document = str | list[Any]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises InputError where transformers cannot make one of its files, or use it."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # what names a token that is not there is opened, and panics when it is used
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    # transformers and tokenizers raise all kinds, even plain Exception; a panic of Rust is not even that.
    except BaseException as error:
        raise lacking(error) or InputError(
            f"{folder}: transformers cannot open the tokenizer there: {first_line(error)}; a checkpoint must "
            "have its tokenizer's files beside it to be evaluated on text"
        ) from error


def read_windows(
    data: str | Path, tokenizer: Any, count: int, length: int, option: str = "--tokens"
) -> Tensor:
    """`count` windows of `length` tokens from the text `data`: [window, token].

    Raises InputError for a file that is not what its suffix says, and for one that is too short; `option` asks for
    fewer tokens. Raises OptionError for a data set where the library that reads it is missing.
    """
    begin = _begin(tokenizer)
    body = length - len(begin)
    needed = count * body
    ids: list[int] = []
    for document in _documents(data, needed * _CHARACTERS_A_TOKEN):
        ids += _tokens(document, tokenizer, data)
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise InputError(
            f"{data} has {len(ids)} tokens, and {count} sequences of {length} need {needed}; give a longer text, or "
            + (f"{option} {len(ids) // body * length}" if len(ids) >= body else "a smaller --sequence-length")
        )
    windows = torch.tensor(ids[:needed]).view(count, body)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), windows], dim=1)


def _begin(tokenizer: Any) -> list[int]:
    """The BOS token, if the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _documents(data: str | Path, characters: int) -> Iterator[Document]:
    named = data_set_of(data)
    return _rows(named) if named else _pieces(Path(data).expanduser(), characters)


def _rows(data_set: DataSet) -> Iterator[Document]:
    if find_spec("datasets") is None:
        raise OptionError(
            f"{data_set.name} is not a file, and to read it as a data set of the Hub needs the library datasets, not "
            "installed here; run pip install 'streamconv[datasets]', or give a .txt or .jsonl file"
        )
    try:
        load = import_module("datasets").load_dataset
        rows = load(data_set.name, split=data_set.split, revision=data_set.revision, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _document(row, f"{data_set}, row {number}")
    except InputError:
        raise
    except Exception as error:  # the library and the network raise all kinds
        raise lacking(error) or InputError(
            f"the data set {data_set} cannot be read: {first_line(error)}"
        ) from error


def _pieces(path: Path, characters: int) -> Iterator[Document]:
    try:
        if path.exists() and not path.is_file():  # to open a named pipe would wait for somebody to write
            raise InputError(
                f"{path} is no file; give a .txt, or a .jsonl with text or messages in every line"
            )
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                yield file.read(characters)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), ""), 1):
                    if len(line) > _MAX_LINE:
                        raise InputError(
                            f"{path}, line {number} has more than {_MAX_LINE} characters; give a document a line"
                        )
                    if line.strip():
                        yield _document(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
        else:
            raise InputError(
                f"{path}: text is read from .txt and .jsonl files; rename it if it is one of them"
            )
    except OSError as error:
        raise lacking(error) or InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where} is not JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _document(found: object, where: str) -> Document:
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return str(found["text"])
    if isinstance(found, dict) and isinstance(found.get("messages"), list):
        return list(found["messages"])
    raise InputError(f"{where} must be an object with text, a string, or messages, a list")


def _tokens(document: Document, tokenizer: Any, data: str | Path) -> list[int]:
    if isinstance(document, str):
        try:
            ids: list[int] = tokenizer(document, add_special_tokens=False).input_ids
        except Exception as error:  # halves of a character (\ud800), a tokenizer that was changed by hand
            raise lacking(error) or InputError(
                f"{data}: the tokenizer does not take its text: {first_line(error)}"
            ) from error
        ends = Path(data).suffix != ".txt" and tokenizer.eos_token_id is not None
        return [*ids, tokenizer.eos_token_id] if ends else ids
    try:
        chat: list[int] = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)
    except Exception as error:  # a template raises what it likes
        raise lacking(error) or InputError(
            f"{data}: the chat template of the tokenizer does not take its messages: {first_line(error)}"
        ) from error
    return chat
