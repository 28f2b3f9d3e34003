"""Containers: names, order and places of tensors, and what is in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from streamconv.checkpoint.container import SAFETENSORS, Gguf, is_gguf_output, stored_files
from streamconv.checkpoint.gguf_header import text
from streamconv.checkpoint.layout import ShardLayout, joined
from streamconv.checkpoint.types import PADDING, TensorSpec
from streamconv.dtypes import DTYPES, F16
from streamconv.errors import CheckpointError
from streamconv.storage.local import open_folder


@dataclass(frozen=True)
class Part:
    name: str
    shape: tuple[int, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.name, F16 if self.name else DTYPES["U8"], self.shape),)


def zeros(nbytes: int) -> Part:
    return Part(PADDING, (nbytes,))


def write(folder: Path, layout: ShardLayout[Part]) -> None:
    (folder / layout.name).write_bytes(layout.header + bytes(layout.size - len(layout.header)))


def test_names_of_files() -> None:
    gguf = Gguf("Q4_K_M")
    assert gguf.file_names(1) == ["model-Q4_K_M.gguf"]
    assert gguf.file_names(2) == ["model-Q4_K_M-00001-of-00002.gguf", "model-Q4_K_M-00002-of-00002.gguf"]
    assert gguf.completes(2) == "model-Q4_K_M-00001-of-00002.gguf"
    assert SAFETENSORS.completes(2) == "config.json"
    assert SAFETENSORS.file_names(1) == ["model.safetensors"]
    assert all(map(is_gguf_output, (*gguf.file_names(1), *gguf.file_names(2))))
    assert not any(
        map(is_gguf_output, ("Model-Q4_K.gguf", "model-q4.gguf", "model-F16.gguf.part", "model.gguf"))
    )


def test_parts_of_one_name_are_one_tensor_and_all_is_aligned(tmp_path: Path) -> None:
    parts = [Part("a", (3,)), Part("b", (1, 5, 7)), Part("b", (1, 5, 7)), Part("c", (16,))]
    (layout,) = Gguf("F16", {"general.architecture": text("llama")}).lay_out([parts], zeros)
    assert [placed.step.name for placed in layout.steps] == ["a", "", "b", "b", "", "c"]
    assert [placed.offset % 32 for placed in layout.steps if placed.step.name in ("a", "c")] == [0, 0]
    assert layout.steps[2].offset % 32 == 0
    assert layout.steps[3].offset == layout.steps[2].offset + 70
    assert (len(layout.header) + layout.size) % 32 == 0
    write(tmp_path, layout)
    found = stored_files(open_folder(str(tmp_path)), [layout.name])
    assert {name: spec.shape for name, spec in found.tensors.items()} == {
        "a": (3,),
        "b": (2, 5, 7),
        "c": (16,),
    }
    # Padding that is there is made anew, as when pairs are added.
    (again,) = Gguf("F16").lay_out([[placed.step for placed in layout.steps]], zeros)
    assert [placed.step for placed in again.steps] == [placed.step for placed in layout.steps]


def test_joined() -> None:
    specs = [TensorSpec("a", F16, (2, 3)), TensorSpec("a", F16, (5, 3))]
    assert joined(specs) == TensorSpec("a", F16, (7, 3))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    layouts = Gguf("F16").lay_out([[Part("a", (3,))], [Part("b", (3,))]], zeros)
    for layout in layouts:
        write(tmp_path, layout)
    names = [layout.name for layout in layouts]
    storage = open_folder(str(tmp_path))
    assert stored_files(storage, names).tensors.keys() == {"a", "b"}
    with pytest.raises(CheckpointError, match="says that it is file 1 of 2, counted from 0"):
        stored_files(storage, names[1:])
    (alone,) = Gguf("F16").lay_out([[Part("a", (3,))]], zeros)
    (tmp_path / names[1]).write_bytes(alone.header + bytes(alone.size - len(alone.header)))
    with pytest.raises(CheckpointError, match="says that it is file 0 of 1"):
        stored_files(storage, names)
