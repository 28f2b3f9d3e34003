"""Files that torch.save wrote: tensors by their place in it, and what cannot be read so."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from streamconv.checkpoint.pickled import holds_plain_values, read_pickled
from streamconv.checkpoint.reader import TensorReader
from streamconv.errors import CheckpointError, ResourceError
from streamconv.storage import open_storage
from streamconv.storage.base import SourceFile
from tests.checkpoint.pickles import state, tensor, write_archive

NAME = "pytorch_model.bin"


def file_of(folder: Path) -> SourceFile:
    return open_storage(str(folder)).file(NAME)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError, match=NAME) as caught:
        read_pickled(file_of(folder))
    return str(caught.value)


def rewrite(
    folder: Path,
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes | None = None,
    pickled: bytes | None = None,
) -> None:
    path = folder / NAME
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            others = {"byteorder": byteorder, "data.pkl": pickled}
            archive.writestr(name, others.get(name.rpartition("/")[2]) or content)


def test_views_and_shared_memory_are_read_where_they_lie(tmp_path: Path) -> None:
    whole = torch.randn(6, 5)
    state = {
        "whole": whole,
        "rows": whole[2:4],
        "alone": torch.arange(7, dtype=torch.int64),
        "half": torch.randn(3, 4).to(torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False]),
    }
    torch.save(state, tmp_path / NAME)
    found = read_pickled(file_of(tmp_path))
    assert found["rows"].offset == found["whole"].offset + 2 * 5 * 4
    with TensorReader() as reader:
        for name, tensor in state.items():
            assert reader.load(found[name]).equal(tensor.detach()), name


def test_what_an_old_torch_wrote_is_refused_with_the_command_that_rewrites_it(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / NAME, _use_new_zipfile_serialization=False)
    said = refusal(tmp_path)
    assert 'python -c "import sys, torch' in said
    command = said.partition('python -c "')[2].partition('"')[0]
    subprocess.run([sys.executable, "-c", command, str(tmp_path / NAME)], check=True)
    assert list(read_pickled(file_of(tmp_path))) == ["x"]


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2000)}, tmp_path / NAME)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[: len(content) // 2])
    assert "cut short" in refusal(tmp_path)


def test_bytes_that_are_not_the_tensors_own_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2000)}, tmp_path / NAME)
    rewrite(tmp_path, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(tmp_path)
    rewrite(tmp_path, byteorder=b"big")
    assert "big-endian" in refusal(tmp_path)


def test_a_tensor_that_is_transposed_in_memory_is_named(tmp_path: Path) -> None:
    torch.save({"first": torch.ones(2), "turned": torch.ones(3, 4).T}, tmp_path / NAME)
    assert "the bytes of turned do not lie together" in refusal(tmp_path)


def test_a_file_without_tensors_is_called_so(tmp_path: Path) -> None:
    torch.save({}, tmp_path / NAME)
    assert "holds no tensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("value", "is_plain"),
    [
        ({"epoch": 1, "losses": [0.5, None], "run": ("a", True)}, True),
        ({}, True),
        ({"deep": {"weight": torch.ones(2)}}, False),
        (torch.ones(2), False),
        ({"weight": numpy.ones(2)}, False),
        ({"object": Path("a")}, False),
    ],
)
def test_a_file_of_settings_is_told_without_loading_it(tmp_path: Path, value: object, is_plain: bool) -> None:
    torch.save(value, tmp_path / NAME)
    assert holds_plain_values((tmp_path / NAME).read_bytes()) is is_plain
    assert not holds_plain_values((tmp_path / NAME).read_bytes()[:100])
    torch.save(value, tmp_path / NAME, _use_new_zipfile_serialization=False)
    assert not holds_plain_values((tmp_path / NAME).read_bytes())


def test_a_tensor_without_a_name_is_called_so(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / NAME)
    assert "found a tensor without a name" in refusal(tmp_path)


def test_a_damaged_pickle_is_refused_wherever_it_fails(tmp_path: Path) -> None:
    torch.save({f"{name}.weight": torch.ones(2, 3) for name in "ab"}, tmp_path / NAME)
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("data.pkl"))
        whole = archive.read(name)
    refused = 0
    for place in range(0, len(whole), 3):
        rewrite(tmp_path, pickled=whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            read_pickled(file_of(tmp_path))
        except CheckpointError:
            refused += 1
    assert refused > len(whole) // 12


@pytest.mark.parametrize("pickled", [b"\x80\x02h\x05.", b"\x80\x02]e.", b"\x80\x02K\x01Q.", b"\x80\x02."])
def test_steps_that_need_what_is_not_there(tmp_path: Path, pickled: bytes) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / NAME)
    rewrite(tmp_path, pickled=pickled)
    assert "cannot be read as a file of tensors that torch.save wrote" in refusal(tmp_path)


def test_names_are_texts(tmp_path: Path) -> None:
    torch.save({1: torch.ones(2), "1": torch.zeros(2)}, tmp_path / NAME)
    assert "must hold tensors by name, found 1 as a name" in refusal(tmp_path)


def test_a_pickle_without_measure_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / NAME)
    monkeypatch.setattr("streamconv.checkpoint.pickled.MAX_PICKLE_BYTES", 50)
    assert "in more than 50 bytes, which none needs" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"numel": 2**60}, "the bytes of a must be 4611686018427387904, and its place in the file has 64"),
        ({"numel": 32, "shape": (8, 4)}, "the bytes of a must be 128, and its place in the file has 64"),
        ({"numel": 8, "shape": (2, 4)}, "the bytes of a must be 32, and its place in the file has 64"),
        ({"offset": 2**62}, "a ends beyond its place in the file"),
        ({"offset": 1}, "a must be 68, and its place in the file has 64"),
        ({"stride": (1, 4)}, "the bytes of a do not lie together"),
        ({"stride": (2**50, 1)}, "the bytes of a do not lie together"),
        ({"shape": (2**30,), "stride": (0,)}, "the bytes of a do not lie together"),
        ({"shape": (2**32, 2**32), "stride": (2**32, 1)}, "overflow"),
        ({"shape": (-4, 4)}, "overflow"),
        ({"key": b"../../x"}, "failed locating file"),
    ],
    ids=str,
)
def test_a_lie_about_a_tensor(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    write_archive(tmp_path / NAME, state(tensor(**fields)), {"data/1": bytes(400)})
    assert says in refusal(tmp_path)


def test_a_value_that_is_another_than_its_bytes(tmp_path: Path) -> None:
    """Of a conjugate the file holds the bytes of the original."""
    torch.save({"x": torch.ones(3, dtype=torch.complex64).conj()}, tmp_path / NAME)
    assert "the bytes of x do not lie together" in refusal(tmp_path)


def test_a_directory_without_measure_is_not_read(tmp_path: Path) -> None:
    end = b"PK\x05\x06" + bytes(8) + (2 * 10**8).to_bytes(4, "little") + bytes(6)
    (tmp_path / NAME).write_bytes(b"PK\x03\x04" + bytes(100) + end)
    assert "has a directory of 200000000 bytes" in refusal(tmp_path)


def test_an_entry_without_measure_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / NAME, state(tensor()), {"extra/x": bytes(5000)})
    monkeypatch.setattr("streamconv.checkpoint.pickled.MAX_PICKLE_BYTES", 1000)
    assert "says archive/extra/x in more than 1000 bytes" in refusal(tmp_path)


@pytest.mark.parametrize("place", ["torch.load", "streamconv.checkpoint.pickled.check_opcodes"])
def test_a_want_of_memory_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / NAME)

    def fail(*given: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(place, fail)
    with pytest.raises(ResourceError, match="no more memory"):
        read_pickled(file_of(tmp_path))
