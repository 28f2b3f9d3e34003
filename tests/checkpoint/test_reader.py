"""TensorReader: ranges, whole tensors, and files that change while they are read."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamconv import disk
from streamconv.checkpoint import reader as reader_module
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.reader import TensorReader, placed, tensor_bytes
from streamconv.dtypes import DTYPES
from streamconv.errors import CheckpointError
from streamconv.storage.base import SourceFile
from streamconv.storage.local import open_file
from tests.checkpoint.files import index_of, raw_shard, write_checkpoint


def counting_checkpoint(folder: Path) -> CheckpointIndex:
    """Two tensors of known bytes: `a` is 0..255, `b` 255..0, U8."""
    counting = torch.arange(256).to(torch.uint8)
    return index_of(write_checkpoint(folder, {"model.safetensors": {"a": counting, "b": counting.flip(0)}}))


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    return counting_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def lasting_index(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return counting_checkpoint(tmp_path_factory.mktemp("model"))


def read(reader: TensorReader, index: CheckpointIndex, name: str, start: int, length: int) -> list[int]:
    buffer = bytearray(length)
    reader.read_into(index.tensors[name], start, memoryview(buffer))
    return list(buffer)


def test_a_range_counts_from_the_start_of_the_tensor(index: CheckpointIndex) -> None:
    with TensorReader() as reader:
        assert read(reader, index, "a", 10, 3) == [10, 11, 12]
        assert read(reader, index, "b", 0, 2) == [255, 254]
        assert read(reader, index, "b", 254, 2) == [1, 0]
        assert read(reader, index, "a", 256, 0) == []


@given(st.tuples(st.integers(0, 256), st.integers(0, 256)).map(sorted))
def test_any_range_is_that_slice(lasting_index: CheckpointIndex, bounds: Sequence[int]) -> None:
    start, stop = bounds
    with TensorReader() as reader:
        assert read(reader, lasting_index, "a", start, stop - start) == list(range(start, stop))


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 257), (256, 1), (300, 0)])
def test_a_range_outside_the_tensor_is_our_own_fault(index: CheckpointIndex, start: int, length: int) -> None:
    with TensorReader() as reader, pytest.raises(ValueError, match=r"^a: bytes"):
        read(reader, index, "a", start, length)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("code", DTYPES)
def test_a_tensor_of_any_type_is_loaded_as_saved(tmp_path: Path, code: str, shape: Sequence[int]) -> None:
    count = torch.Size(shape).numel()
    raw = torch.arange(count * DTYPES[code].itemsize, dtype=torch.uint8) % 2
    tensor = raw.view(DTYPES[code].torch).reshape(shape)
    index = index_of(write_checkpoint(tmp_path, {"model.safetensors": {"t": tensor}}))
    with TensorReader() as reader:
        loaded = reader.load(index.tensors["t"])
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert bytes(tensor_bytes(loaded)) == bytes(tensor_bytes(tensor))


def test_a_loaded_tensor_has_its_own_memory(index: CheckpointIndex) -> None:
    with TensorReader() as reader:
        reader.load(index.tensors["a"]).zero_()
        assert reader.load(index.tensors["a"]).sum() == 255 * 128


def test_a_buffer_of_any_type_and_shape_is_filled(index: CheckpointIndex) -> None:
    tensor = torch.zeros(2, 8, dtype=torch.bfloat16)
    with TensorReader() as reader:
        reader.read_into(index.tensors["a"], 32, tensor_bytes(tensor))
        assert list(tensor_bytes(tensor)) == list(range(32, 64))
        reader.read_into(index.tensors["a"], 0, tensor.view(torch.int16).numpy().data)
        assert list(tensor_bytes(tensor)) == list(range(32))
        reader.read_into(index.tensors["a"], 0, torch.zeros(0, 4, dtype=torch.uint8).numpy().data)


def test_bool_bytes_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    header = '{"mask":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(raw_shard(header) + b"\x01\x02")
    with (
        TensorReader() as reader,
        pytest.raises(CheckpointError, match=r"model\.safetensors: tensor mask is BOOL"),
    ):
        reader.load(index_of(tmp_path).tensors["mask"])


def test_a_file_cut_short_while_in_use_is_an_error(index: CheckpointIndex) -> None:
    tensor = index.tensors["b"]
    with TensorReader() as reader:
        read(reader, index, "b", 0, 1)
        os.truncate(tensor.file.path, tensor.offset + 100)
        assert read(reader, index, "b", 90, 10) == list(range(165, 155, -1))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor b: .* 56 bytes too early"):
            read(reader, index, "b", 90, 66)


def test_a_file_that_changed_before_it_was_opened_is_not_read(index: CheckpointIndex) -> None:
    os.truncate(index.tensors["b"].file.path, 300)
    with TensorReader() as reader, pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        read(reader, index, "a", 0, 1)


def test_check_unchanged_sees_writes_replacement_and_removal(index: CheckpointIndex) -> None:
    path = Path(index.tensors["a"].file.path)
    with TensorReader(max_open=1) as reader:
        reader.check_unchanged()
        read(reader, index, "a", 0, 1)
        reader.check_unchanged()
        content = path.read_bytes()
        path.with_suffix(".new").write_bytes(content)
        os.utime(path.with_suffix(".new"), ns=(1, 1))
        path.with_suffix(".new").replace(path)
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
            reader.check_unchanged()
        path.unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors vanished"):
            reader.check_unchanged()


def test_check_unchanged_sees_a_blob_rewritten_in_place(tmp_path: Path) -> None:
    """Its version is the blob's id, which names what the content should be, not what it is."""
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = write_checkpoint(repo / "snapshot", {"model.safetensors": {"a": torch.ones(8)}})
    (repo / "snapshots").mkdir()
    snapshot = snapshot.rename(repo / "snapshots" / "abc")
    (snapshot / "model.safetensors").rename(repo / "blobs" / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    index = index_of(snapshot)
    assert index.shards[0].file.version == "blob:f00d"
    with TensorReader() as reader:
        reader.load(index.tensors["a"])
        reader.check_unchanged()
        with (repo / "blobs" / "f00d").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(repo / "blobs" / "f00d", ns=(1, 1))
        with pytest.raises(CheckpointError, match=r"model\.safetensors was written to"):
            reader.check_unchanged()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_few_files_are_open_at_once_and_none_after(tmp_path: Path) -> None:
    shards = {f"model-{i}-of-9.safetensors": {f"t{i}": torch.tensor([i])} for i in range(1, 10)}
    index = index_of(write_checkpoint(tmp_path, shards))
    before = open_descriptors()
    with TensorReader(max_open=3) as reader:
        for _ in range(2):
            for i in (1, 2, 3, 4, 5, 1, 6, 7, 8, 9):
                assert reader.load(index.tensors[f"t{i}"]).item() == i
                assert open_descriptors() <= before + 3
        reader.check_unchanged()
    assert open_descriptors() == before


def test_a_file_in_use_stays_open_while_others_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"model-{i}-of-5.safetensors": {f"t{i}": torch.tensor([i])} for i in range(1, 6)}
    index = index_of(write_checkpoint(tmp_path, shards))
    opened: list[str] = []

    def watch_open(file: SourceFile) -> int:
        opened.append(file.name[:7])
        return open_file(file)

    monkeypatch.setattr(reader_module, "open_file", watch_open)
    with TensorReader(max_open=2) as reader:
        for i in (1, 2, 1, 3, 1, 4, 1, 5):
            reader.load(index.tensors[f"t{i}"])
    assert opened == ["model-1", "model-2", "model-3", "model-4", "model-5"]


def test_reading_goes_on_after_a_part_and_stops_at_an_error(
    index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems return part of what was asked for, and fail."""
    whole = os.preadv

    def in_parts(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return whole(descriptor, [buffers[0][:7]], offset)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with TensorReader() as reader:
        monkeypatch.setattr(os, "preadv", in_parts)
        assert read(reader, index, "a", 3, 100) == list(range(3, 103))
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: tensor a cannot be read: Input/output"
        ):
            read(reader, index, "a", 3, 100)


def test_dropping_the_cache_leaves_the_bytes(index: CheckpointIndex) -> None:
    with TensorReader() as reader:
        reader.drop_cache(index.tensors["b"], 0, 100)
        assert read(reader, index, "b", 0, 2) == [255, 254]


def test_the_bytes_of_a_tensor_are_a_view() -> None:
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    tensor_bytes(tensor)[:] = bytes([0x80, 0x3F] * 3)
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert list(tensor_bytes(torch.tensor(1, dtype=torch.int32))) == [1, 0, 0, 0]
    assert len(tensor_bytes(torch.nn.Parameter(torch.zeros(2)))) == 8
    with pytest.raises(ValueError, match="contiguous"):
        tensor_bytes(torch.zeros(4, 4).T[1:])


# -- past the page cache -------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointIndex:
    """Two tensors of some blocks each, in a file that is on the disk alone."""
    monkeypatch.setattr(disk, "DIRECT_BYTES", 1000)
    monkeypatch.setattr(disk, "is_cached", lambda descriptor, offset, nbytes: False)
    values = torch.arange(30_000, dtype=torch.int32)
    return index_of(write_checkpoint(tmp_path, {"model.safetensors": {"a": values, "b": values.flip(0)}}))


def placed_read(reader: TensorReader, index: CheckpointIndex, name: str, start: int, length: int) -> bytes:
    tensor = index.tensors[name]
    memory = torch.ones(length + disk.BLOCK, dtype=torch.uint8)
    raw = placed(memory, tensor.offset + start, length)
    reader.read_into(tensor, start, tensor_bytes(raw))
    kept = torch.ones_like(memory)
    begin = raw.storage_offset()
    kept[begin : begin + length] = raw
    assert torch.equal(kept, memory), "memory beside the place was written to"
    return bytes(tensor_bytes(raw))


def note_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each direct call has read."""
    made: list[int] = []
    read_direct = disk.read_direct

    def noting(descriptor: int, offset: int, view: memoryview) -> int:
        made.append(read_direct(descriptor, offset, view))
        return made[-1]

    monkeypatch.setattr(disk, "read_direct", noting)
    return made


@pytest.mark.parametrize(("start", "length"), [(0, 120_000), (8, 5000), (4096, 8192), (64_000, 56_000)])
def test_a_large_range_comes_directly_from_the_disk(
    large: CheckpointIndex, monkeypatch: pytest.MonkeyPatch, start: int, length: int
) -> None:
    made = note_direct(monkeypatch)
    with TensorReader() as reader:
        for name in ("a", "b"):
            whole = bytes(tensor_bytes(reader.load(large.tensors[name])))
            del made[:]
            assert placed_read(reader, large, name, start, length) == whole[start : start + length]
            assert made == [length]


def test_what_is_cached_small_or_lies_otherwise_is_not(
    large: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = note_direct(monkeypatch)
    with TensorReader() as reader:
        placed_read(reader, large, "a", 0, 999)
        memory = torch.ones(disk.BLOCK + 5000, dtype=torch.uint8)
        raw = placed(memory, large.tensors["a"].offset + 16, 5000)
        reader.read_into(large.tensors["a"], 0, tensor_bytes(raw))
        monkeypatch.setattr(disk, "is_cached", lambda descriptor, offset, nbytes: True)
        placed_read(reader, large, "a", 0, 5000)
    assert not made


def test_direct_reading_that_fails_is_made_good(
    large: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with TensorReader() as reader:
        good = placed_read(reader, large, "b", 0, 120_000)
        read_direct = disk.read_direct
        monkeypatch.setattr(
            disk, "read_direct", lambda descriptor, offset, view: read_direct(descriptor, offset, view[:4096])
        )
        assert placed_read(reader, large, "b", 0, 120_000) == good
        monkeypatch.setattr(disk, "read_direct", refusing)
        assert placed_read(reader, large, "b", 0, 120_000) == good
        monkeypatch.setattr(disk, "open_direct", lambda *given: None)
        with TensorReader() as other:
            assert placed_read(other, large, "b", 0, 120_000) == good


def test_a_file_cut_short_shows_in_direct_reading(large: CheckpointIndex) -> None:
    last = max(large.tensors.values(), key=lambda tensor: tensor.offset)
    with TensorReader() as reader:
        placed_read(reader, large, last.name, 0, 8192)
        os.truncate(last.file.path, last.offset + 60_000)
        with pytest.raises(CheckpointError, match="the file ends at byte"):
            placed_read(reader, large, last.name, 0, 120_000)


def test_all_descriptors_are_closed(large: CheckpointIndex) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with TensorReader() as reader:
        placed_read(reader, large, "a", 0, 8192)
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
