"""Shards the adapter leaves alone: equal to the base's files, whose blocks they share where the disk can do that."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

import streamconv
from streamconv.checkpoint.writer import ShardWriter
from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from tests.models import SHARD, Sizes, write_adapter, write_base
from tests.tiny import edit_json

SIZES = Sizes(hidden=64, inner=96, layers=3, vocabulary=300)
FICLONE = 0x40049409  # linux/fs.h: file systems are asked to share blocks with it
FIRST, LAST = SHARD.format(1, 3), SHARD.format(3, 3)


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A base of three shards, and an adapter for weights of its last layer, which is in the last shard alone."""
    base = write_base(folder / "base", SIZES.shapes)
    last = {name: shape for name, shape in SIZES.shapes.items() if ".layers.2." in name}
    assert all(name in load_file(base / LAST) for name in last if "down_proj" in name)
    adapter = write_adapter(folder / "adapter", last, targets=("down_proj",))
    edit_json(adapter / "adapter_config.json", layers_to_transform=[2])
    return base, adapter


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_the_adapter_leaves_alone_is_the_bases_own_file(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path)
    report = streamconv.merge(base, adapter, tmp_path / "out")
    assert report.shards[FIRST] == sha256(tmp_path / "out" / FIRST) == sha256(base / FIRST)
    assert report.shards[LAST] != sha256(base / LAST)
    streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter)


@pytest.mark.parametrize("change", ["rewritten", "split"])
def test_a_shard_of_other_tensors_gets_a_layout_of_its_own(tmp_path: Path, change: str) -> None:
    base, adapter = write_inputs(tmp_path)
    options = MergeOptions(
        dtype="float32" if change == "rewritten" else "auto",
        max_shard_bytes=50_000 if change == "split" else None,
    )
    plan = prepare(Job(str(base), str(adapter), options, "cpu")).plan
    assert all(shard.same_as is None for shard in plan.shards)


def test_interrupted_and_resumed_it_is_the_same(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path)
    shard = prepare(Job(str(base), str(adapter), MergeOptions(), "cpu")).plan.shards[0]
    body = (base / FIRST).read_bytes()[len(shard.header) :]
    path = tmp_path / "shard"
    with ShardWriter.create(path, shard.header, shard.size, shard.same_as) as writer:
        writer.write(body[:1000])
        digest = writer.sync()
    resumed = ShardWriter.resume(path, shard.header, shard.size, len(shard.header) + 1000, digest)
    assert resumed is not None
    with resumed:
        resumed.write(body[1000:])
        assert resumed.finish() == sha256(base / FIRST)
    assert path.read_bytes() == (base / FIRST).read_bytes()


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A small file system that can share blocks."""
    if os.geteuid() or shutil.which("mkfs.xfs", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("needs root and mkfs.xfs")
    image, folder = tmp_path / "image", tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(400 << 20)
    folder.mkdir()
    subprocess.run(["mkfs.xfs", "-q", image], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin"})
    if subprocess.run(["mount", "-o", "loop", image, folder], check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_blocks_are_shared_where_the_disk_can(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_inputs(xfs)
    written: list[str] = []
    pwrite = os.pwrite

    def noting(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    streamconv.merge(base, adapter, xfs / "out")
    assert not [name for name in written if name.startswith(FIRST)]
    assert [name for name in written if name.startswith(LAST)]
    assert sha256(xfs / "out" / FIRST) == sha256(base / FIRST)
    shared = subprocess.run(
        ["filefrag", "-v", xfs / "out" / FIRST], capture_output=True, text=True, check=True
    )
    assert "shared" in shared.stdout


def test_without_such_a_disk_the_bytes_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_inputs(tmp_path)
    asked: list[int] = []

    def refusing(descriptor: int, request: int, source: int) -> int:
        asked.append(request)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refusing)
    streamconv.merge(base, adapter, tmp_path / "out")
    assert asked == [FICLONE] * 2
    assert sha256(tmp_path / "out" / FIRST) == sha256(base / FIRST)
