"""Targets: for each kind of file, an honest one, how it is mutated, and what reads it.

`run` returns where the input was read, and raises a deliberate error where it was refused; anything else is a defect.
So is a merge that succeeds with other bytes than it should have made, and a damaged manifest that is believed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from streamconv.checkpoint.gguf import read_gguf
from streamconv.checkpoint.header import parse_header
from streamconv.checkpoint.index import read_index
from streamconv.cli import main
from streamconv.dtypes import GGML_TYPES
from streamconv.errors import OptionError
from streamconv.output.journal import Journal, Watermark
from streamconv.output.manifest import MANIFEST
from streamconv.pipeline import Prepared, build_job, prepare, run, verify
from streamconv.progress import StopRequest, quiet
from streamconv.storage import open_storage
from tools.fuzz.models import (
    IN_GGUF,
    QUANTIZED,
    READ_ONLY,
    SHARD,
    write_adapter,
    write_base,
    write_gguf,
    write_quantized,
)
from tools.fuzz.mutation import Mutate, mutated_bytes, mutated_json, mutated_lines, mutated_shard

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file made ready in a folder: honest contents, their mutation, and `run`, which reads one."""

    seeds: tuple[bytes, ...]
    mutate: Mutate
    run: Callable[[bytes], None]


def _header(folder: Path) -> Target:
    base = write_base(folder / "base")
    raw = (base / SHARD).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")

    def read(data: bytes) -> None:
        parse_header(data, len(data) + len(raw) - start, SHARD)

    return Target((raw[:start],), mutated_shard, read)


def _index(folder: Path) -> Target:
    base = write_base(folder / "base", shards=2)

    def read(data: bytes) -> None:
        (base / INDEX).write_bytes(data)
        read_index(open_storage(str(base)))

    return Target(((base / INDEX).read_bytes(),), mutated_json, read)


def _config(folder: Path) -> Target:
    """config.json, planned with for a merge into 4 bits, where most of it is looked at."""
    base, adapter = write_base(folder / "base"), write_adapter(folder / "adapter")

    def read(data: bytes) -> None:
        (base / "config.json").write_bytes(data)
        prepare(build_job(base, adapter, quant="nf4-dq"))

    return Target(((base / "config.json").read_bytes(),), mutated_json, read)


def _adapter_config(folder: Path) -> Target:
    base, adapter = write_base(folder / "base"), write_adapter(folder / "adapter")
    path = adapter / "adapter_config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        prepare(build_job(base, adapter))

    return Target((path.read_bytes(),), mutated_json, read)


def _adapter_tensors(folder: Path) -> Target:
    base, adapter = write_base(folder / "base"), write_adapter(folder / "adapter")
    path = adapter / "adapter_model.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _make(prepare(build_job(base, adapter)), folder / "out")

    return Target((path.read_bytes(),), mutated_shard, read)


def _journal(folder: Path) -> Target:
    """The journal of a run that stopped before anything was published, one shard done and one half done."""
    prepared, whole = _merged(folder)
    out = folder / "out"
    stopped = folder / "stopped"
    _stop(prepared, stopped)
    lines = (stopped / ".streamconv/journal.jsonl").read_bytes()

    def read(data: bytes) -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        (out / ".streamconv/journal.jsonl").write_bytes(data)
        run(prepared, out, quiet, StopRequest())
        assert _contents(out) == whole, "the run ended well with other bytes than an undisturbed one"

    return Target((lines,), mutated_lines, read)


def _plan(folder: Path) -> Target:
    """The record of whose the work folder is."""
    prepared, whole = _merged(folder)
    out, stopped = folder / "out", folder / "stopped"
    _stop(prepared, stopped)
    path = Path(".streamconv/plan.json")

    def read(data: bytes) -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        (out / path).write_bytes(data)
        run(prepared, out, quiet, StopRequest())
        assert _contents(out) == whole, "the run ended well with other bytes than an undisturbed one"

    return Target(((stopped / path).read_bytes(),), mutated_json, read)


def _manifest(folder: Path) -> Target:
    _, whole = _merged(folder)
    out = folder / "out"
    honest = whole[MANIFEST]

    def read(data: bytes) -> None:
        (out / MANIFEST).write_bytes(data)
        verify(out)
        assert data == honest, "verify believes a changed manifest"

    return Target((honest,), mutated_json, read)


def _recipe(suffix: str, text: bytes, mutate: Mutate, folder: Path) -> Target:
    """A recipe as the command line takes it."""
    path = folder / f"recipe{suffix}"
    command = ["plan", "--recipe", str(path), "--print-recipe"]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            main.main(command, prog_name="streamconv", standalone_mode=False)
        except (click.ClickException, SystemExit) as error:
            code = error.exit_code if isinstance(error, click.ClickException) else error.code
            assert code in {0, OptionError.exit_code}, f"exit code {code}"
            raise OptionError("refused") from error

    return Target((text,), mutate, read)


def _quantized_config(name: str, folder: Path) -> Target:
    base = write_quantized(folder / "base", name, write_base(folder / "dense"))

    def read(data: bytes) -> None:
        (base / "config.json").write_bytes(data)
        prepare(build_job(base, quant="none"))

    return Target(((base / "config.json").read_bytes(),), mutated_json, read)


def _quantized_tensors(name: str, folder: Path) -> Target:
    """The shard of a quantized base, codes, scales and tables, decoded to 16 bits."""
    base = write_quantized(folder / "base", name, write_base(folder / "dense"))

    def read(data: bytes) -> None:
        (base / SHARD).write_bytes(data)
        _make(prepare(build_job(base, quant="none")), folder / "out")

    return Target(((base / SHARD).read_bytes(),), mutated_shard, read)


def _gguf_header(folder: Path) -> Target:
    """Pairs and entries of tensors, before data that stay."""
    file = write_gguf(folder, "q8_0")
    raw = file.read_bytes()
    start = _data_start(file)

    def read(data: bytes) -> None:
        file.write_bytes(data + raw[start:])
        prepare(build_job(file, quant="none"))

    return Target((raw[:start],), mutated_bytes, read)


def _gguf_tensors(name: str, folder: Path) -> Target:
    """Data after an honest header, decoded to 16 bits."""
    file = write_gguf(folder, name)
    raw = file.read_bytes()
    start = _data_start(file)

    def read(data: bytes) -> None:
        file.write_bytes(raw[:start] + data)
        _make(prepare(build_job(file, quant="none")), folder / "out")

    return Target((raw[start:],), mutated_bytes, read)


def _data_start(file: Path) -> int:
    storage = open_storage(str(file.parent))
    found = read_gguf(storage.file(file.name), storage.read_start, GGML_TYPES)
    return min(tensor.offset for tensor in found.tensors.values())


_RECIPE_JSON = json.dumps(
    {"base": "org/base", "adapter": "me/lora", "quant": "nf4-dq", "max-ram": "1GiB"}
).encode()
_RECIPE_YAML = (
    b"base: org/base\nadapter: [me/lora]\nquant: nf4-dq\n# text\ncard: false\nmax-shard-size: '5GB'\n"
)

TARGETS: Mapping[str, Callable[[Path], Target]] = {
    "header": _header,
    "index": _index,
    "config": _config,
    "adapter-config": _adapter_config,
    "adapter-tensors": _adapter_tensors,
    "journal": _journal,
    "plan": _plan,
    "manifest": _manifest,
    "recipe-json": partial(_recipe, ".json", _RECIPE_JSON, mutated_json),
    "recipe-yaml": partial(_recipe, ".yaml", _RECIPE_YAML, mutated_bytes),
    **{f"config-{name}": partial(_quantized_config, name) for name in (*QUANTIZED, *READ_ONLY)},
    **{f"tensors-{name}": partial(_quantized_tensors, name) for name in (*QUANTIZED, *READ_ONLY)},
    "gguf-header": _gguf_header,
    **{f"gguf-{name}": partial(_gguf_tensors, name) for name in IN_GGUF},
}
"""Makers of targets by name, each given an empty folder of its own."""


def _make(prepared: Prepared, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    run(prepared, out, quiet, StopRequest())


def _merged(folder: Path) -> tuple[Prepared, Mapping[str, bytes]]:
    """A small merge of two shards, made in `out`, and what an undisturbed run leaves."""
    base, adapter = write_base(folder / "base", shards=2), write_adapter(folder / "adapter")
    prepared = prepare(build_job(base, adapter, max_shard_size=150_000))
    _make(prepared, folder / "out")
    return prepared, _contents(folder / "out")


def _contents(out: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _stop(prepared: Prepared, out: Path) -> None:
    """Leave in `out` what a run has that ended between its first shard and the second."""
    shards = prepared.plan.shards
    made = out.with_name("out")
    with Journal(out, prepared.plan.fingerprint, resume=True) as journal:
        first = made / shards[0].name
        shutil.copyfile(first, journal.finished(shards[0].name))
        journal.finish(shards[0].name, hashlib.sha256(first.read_bytes()).hexdigest(), {})
        begun = (made / shards[1].name).read_bytes()[: len(shards[1].header)]
        journal.partial(shards[1].name).write_bytes(begun)
        journal.watermark(shards[1].name, Watermark(len(begun), hashlib.sha256(begun).hexdigest()), {})
