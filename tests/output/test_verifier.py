"""The check right after a run, and the comparison with the maths, tensor by tensor."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.checkpoint.header import build_header, read_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.errors import CheckpointError, InputError, OutputError, ResourceError, VerificationError
from streamconv.output.verifier import hash_file, read_manifest, verify_exactly, verify_layout
from streamconv.pipeline import Job, Prepared, merge_options, prepare, run
from streamconv.progress import StopRequest
from streamconv.storage import open_storage
from tests.models import Sizes, write_adapter, write_base

SHAPES = Sizes(hidden=64, inner=96, layers=1, vocabulary=300).shapes


def ignore(*told: int) -> None:
    del told


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    """A merge that was planned and run."""
    folder = tmp_path_factory.mktemp("verifier")
    options = merge_options(quant="nf4-dq", merge_base="nf4-dq", max_vram="1GiB", max_shard_size="50KB")
    base, adapter = write_base(folder / "base", SHAPES), write_adapter(folder / "adapter", SHAPES)
    prepared = prepare(Job(str(base), str(adapter), options, "cpu"))
    run(prepared, folder / "out", ignore, StopRequest())
    return prepared, folder / "out"


@pytest.fixture
def copy(done: tuple[Prepared, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[1], tmp_path / "copy"))


def first(out: Path) -> Path:
    return min(out.glob("model-*.safetensors"))


def test_a_good_output_passes_both(done: tuple[Prepared, Path]) -> None:
    prepared, out = done
    verify_layout(out, prepared.plan)
    seen: list[int] = []
    verify_exactly(out, prepared.plan, seen.append, StopRequest())
    assert sum(seen) == sum(shard.size - len(shard.header) for shard in prepared.plan.shards)


def test_searched_scales_are_found_again(tmp_path: Path) -> None:
    """They need a pass of their own before codes are chosen, here as in the run."""
    base, adapter = write_base(tmp_path / "base", SHAPES), write_adapter(tmp_path / "adapter", SHAPES)
    options = merge_options(
        quant="nf4-dq",
        rounding="search",
        merge_base="nf4-dq",
        min_kept=0.0,
        max_vram="1GiB",
        max_shard_size="50KB",
    )
    prepared = prepare(Job(str(base), str(adapter), options, "cpu"))
    run(prepared, tmp_path / "out", ignore, StopRequest())
    verify_exactly(tmp_path / "out", prepared.plan, ignore, StopRequest())


def test_a_file_of_another_size_is_named(done: tuple[Prepared, Path], copy: Path) -> None:
    """Though its header agrees with it."""
    file = open_storage(str(copy)).file(first(copy).name)
    *kept, last = read_header(file).tensors
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in kept]
    header = build_header([*specs, TensorSpec(last.name, last.dtype, (*last.shape[:-1], 0))], {})
    data = first(copy).read_bytes()[read_header(file).data_start :][: last.start]
    first(copy).write_bytes(header + data)
    with pytest.raises(VerificationError, match=rf"{first(copy).name} has \d+ bytes, expected {file.size};"):
        verify_layout(copy, done[0].plan)


def test_a_tensor_of_another_shape_is_named(done: tuple[Prepared, Path], copy: Path) -> None:
    """Same bytes, same size of the file, another shape in the header."""
    file = open_storage(str(copy)).file(first(copy).name)
    found = read_header(file)
    specs = [
        TensorSpec(tensor.name, tensor.dtype, (1, *tensor.shape) if place == 1 else tensor.shape)
        for place, tensor in enumerate(found.tensors)
    ]
    header = build_header(specs, {"format": "pt"})
    assert len(header) == found.data_start
    first(copy).write_bytes(header + first(copy).read_bytes()[found.data_start :])
    with pytest.raises(VerificationError, match=rf"tensor {found.tensors[1].name} is not stored as planned"):
        verify_layout(copy, done[0].plan)
    with pytest.raises(VerificationError, match=rf"{first(copy).name}: its header is not as planned"):
        verify_exactly(copy, done[0].plan, ignore, StopRequest())


def test_a_file_that_is_missing_is_named(done: tuple[Prepared, Path], copy: Path) -> None:
    first(copy).unlink()
    with pytest.raises(CheckpointError, match=rf"{first(done[1]).name} is missing"):
        verify_layout(copy, done[0].plan)


def test_a_byte_of_any_tensor_is_noticed_and_the_tensor_named(
    done: tuple[Prepared, Path], copy: Path
) -> None:
    header = read_header(open_storage(str(copy)).file(first(copy).name))
    descriptor = os.open(first(copy), os.O_RDWR)
    for number, tensor in enumerate(header.tensors):
        place = (
            header.data_start + (tensor.start, (tensor.start + tensor.end) // 2, tensor.end - 1)[number % 3]
        )
        right = os.pread(descriptor, 1, place)
        os.pwrite(descriptor, bytes([right[0] ^ 64]), place)
        with pytest.raises(VerificationError, match=rf"copy: tensor {tensor.name} differs from what base"):
            verify_exactly(copy, done[0].plan, ignore, StopRequest())
        os.pwrite(descriptor, right, place)
    os.close(descriptor)
    verify_exactly(copy, done[0].plan, ignore, StopRequest())


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (Path.unlink, "cannot be read: No such file"),
    "a folder": (put_folder, "must be a regular file"),
    "a named pipe": (put_pipe, "must be a regular file"),
    "a link to itself": (put_loop, "cannot be read: Too many"),
    "a longer file": (grow, r"has \d+ bytes, expected"),
    "a shorter file": (shrink, r"has \d+ bytes, expected"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_in_the_place_of_a_shard_is_told(done: tuple[Prepared, Path], copy: Path, place: str) -> None:
    """And nothing is waited for."""
    put, says = PLACES[place]
    put(first(copy))
    with pytest.raises(VerificationError, match=f"{first(done[1]).name} {says}"):
        verify_exactly(copy, done[0].plan, ignore, StopRequest())


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.EIO, CheckpointError, "cannot be read: Input/output error"),
        (
            errno.ENOENT,
            VerificationError,
            "cannot be read: No such file or directory; do not use this output",
        ),
        (errno.ENOMEM, ResourceError, "no more memory"),
    ],
)
def test_an_error_of_the_disk_is_told(
    done: tuple[Prepared, Path],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[Exception],
    says: str,
) -> None:
    """But a disk that fails, or a want of memory, says nothing of the output."""

    def fail(*given: int) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(kind, match=says):
        verify_exactly(done[1], done[0].plan, ignore, StopRequest())


def test_a_complete_output_that_the_disk_does_not_give_is_not_to_be_made_again(
    done: tuple[Prepared, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise CheckpointError("a cannot be read") from OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("streamconv.pipeline.runner.verify_output", fail)
    with pytest.raises(OutputError, match="a cannot be read; once it can be read, run the same command"):
        run(*done, ignore, StopRequest())


@pytest.mark.parametrize("put", [put_folder, put_pipe, put_loop])
def test_only_files_are_hashed(tmp_path: Path, put: Callable[[Path], None]) -> None:
    (tmp_path / "odd").touch()
    put(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="odd"):
        hash_file(str(tmp_path / "odd"), ignore)


def test_a_folder_without_a_manifest_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no streamconv\.json, so it is no finished output"):
        read_manifest(open_storage(str(tmp_path)), "streamconv.json")
