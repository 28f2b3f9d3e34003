"""Kinds of published files, the forms they have, and which files beside an output loaders would take for its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from streamconv.errors import CheckpointError
from streamconv.output import published
from streamconv.output.published import (
    JSON_OBJECT,
    TEXT,
    describe,
    describe_file,
    files_beside,
    form_of,
    lacks_form,
    may_be_edited,
)
from streamconv.storage import open_storage

INDEX = "model.safetensors.index.json"
SINGLE = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
SHARDED = ("config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.model")


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "LICENSE", "LICENSE.txt", "NOTICE.md", "USE_POLICY.md"),
        *("chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja"),
        *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    ],
)
def test_what_people_may_edit(name: str) -> None:
    assert may_be_edited(name)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", INDEX, "streamconv.json", "streamconv-recipe.json", "quantize_config.json"),
        *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "a.tiktoken"),
        *("modeling_x.py", "residual/adapter_config.json", "model.safetensors", "notes.txt"),
    ],
)
def test_what_decides_how_the_model_computes_and_reads(name: str) -> None:
    assert not may_be_edited(name)


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (b"{}", JSON_OBJECT),
        (b'{"a": NaN}', JSON_OBJECT),
        (b"[1]", TEXT),
        (b"", TEXT),
        ("ä".encode(), TEXT),
        ("ä".encode("latin-1"), None),
        (b"a\0b", None),
        (b"[" * 100_000, TEXT),
        (b"[" * 600_000, TEXT),
        (b'{"a":' * 100_000, TEXT),
        (b'{"a": 1, "a": 2}', TEXT),
    ],
)
def test_forms(content: bytes, form: str | None) -> None:
    assert form_of(content) == form
    assert (lacks_form(content, JSON_OBJECT) is None) == (form == JSON_OBJECT)
    assert (lacks_form(content, TEXT) is None) == (form is not None)


def test_a_file_is_described_as_its_content_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one a piece at a time; then without a form."""
    content = b'{"a": 1}' + b" " * 3000
    (tmp_path / "generation_config.json").write_bytes(content)
    file = open_storage(str(tmp_path)).file("generation_config.json")
    expected = {"size": 3008, "sha256": hashlib.sha256(content).hexdigest()}
    assert describe_file(file) == describe(file.name, content) == expected | {"form": "json"}
    assert describe("tokenizer.json", content) == expected
    monkeypatch.setattr(published, "CHUNK_BYTES", 1000)
    assert describe_file(file) == expected | {"form": "json"}
    monkeypatch.setattr(published, "EDITED_BYTES", 3007)
    assert describe_file(file) == describe(file.name, content) == expected
    (tmp_path / file.name).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        describe_file(file)


@pytest.mark.parametrize(
    ("ours", "name", "where"),
    [
        (SHARDED, "model.safetensors", "taken"),
        (SHARDED, "model.fp16.safetensors", "taken"),
        (SHARDED, "adapter_config.json", "taken"),
        (SHARDED, "adapter_model.safetensors", "others"),
        (SHARDED, "stray.safetensors", "others"),
        (SHARDED, "tokenizer.json", "taken"),
        (SHARDED, "added_tokens.json", "taken"),
        (SINGLE, "stray.safetensors", "taken"),
        (SINGLE, INDEX, "taken"),
        (SINGLE, "pytorch_model.bin", "others"),
        (SINGLE, "pytorch_model.bin.index.json", "others"),
        (SINGLE, "model.gguf", "others"),
        (SINGLE, "quantize_config.json", "others"),
        (SINGLE, "modeling_x.py", "others"),
        (SINGLE, "residual/adapter_config.json", "others"),
        (SINGLE, "residual/adapter_model.safetensors", "others"),
        (SINGLE, "chat_template.jinja", "added"),
        (SINGLE, "additional_chat_templates/rag.jinja", "added"),
        (SINGLE[:2], "tokenizer.json", "added"),
        (SINGLE, "LICENSE", None),
        (SINGLE, "notes.txt", None),
        (SINGLE, "config.json", None),
    ],
)
def test_files_beside_an_output(ours: tuple[str, ...], name: str, where: str | None) -> None:
    found = files_beside([*ours, name], ours)
    told = {"taken": found.taken, "added": found.added, "others": found.others}
    assert told == {kind: (name,) if kind == where else () for kind in told}
