"""Carries an extraction out: each parameter becomes a file of the work folder, and all of them one adapter."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from streamconv.calibration.tensor_files import write_tensors
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.own_files import identify, read_error
from streamconv.checkpoint.reader import TensorReader
from streamconv.dtypes import DENSE
from streamconv.errors import InputError, OutputError, Stopped
from streamconv.extraction.assembling import as_work_tensors, found_in, publish_adapter, work_file
from streamconv.extraction.checkpoints import Checkpoints
from streamconv.extraction.decomposition import (
    LowRank,
    Matrix,
    decompose,
    decompose_to_share,
    sum_of_squares,
)
from streamconv.extraction.differences import WeightDifference
from streamconv.extraction.options import ExtractOptions
from streamconv.extraction.pairs import DifferenceKind, ParameterPair, check_saved, new_parameters
from streamconv.extraction.result import ExtractedWeight, Extraction, total_residual
from streamconv.extraction.tensors import Extracted
from streamconv.output.journal import WORK_FOLDER, Journal, is_publishing
from streamconv.output.place import check_reachable
from streamconv.output.work_folder import check_entries
from streamconv.progress import Meter, OnProgress, StopRequest
from streamconv.running.device_use import in_use
from streamconv.storage.local import list_folder, real_path

_CHUNK_BYTES = 8 * 2**20


def run_extraction(
    subject: Checkpoints, options: ExtractOptions, out: Path, on_progress: OnProgress, stop: StopRequest
) -> Extraction:
    """See `extract`."""
    started = time.monotonic()
    _check_place(out, subject)
    for side in (subject.base, subject.finetuned):
        storage = side.index.storage
        storage.fetch(storage.missing(shard.file for shard in side.index.shards), lambda _: None)
    meter = Meter(sum(pair.nbytes for pair in subject.pairs), on_progress, not subject.device.is_cpu)
    meter.start(0)
    with Journal(out, _fingerprint(subject, options), options.resume) as journal, TensorReader() as reader:
        weights = _extract_all(subject, options, journal, reader, meter, stop)
        reader.check_unchanged()
        found = found_in(subject, journal)
        if not found:
            raise InputError(
                f"{subject.finetuned.index.storage.location} and {subject.base.index.storage.location} hold the same"
                " weights, so there is nothing to extract; give the fine-tuned model with --finetuned"
            )
        written = publish_adapter(subject, found, journal, out, DENSE[options.dtype].torch)
    return Extraction(
        out=str(out),
        base=subject.base.index.storage.location,
        finetuned=subject.finetuned.index.storage.location,
        residual=total_residual(weights.values()),
        weights=weights,
        saved=tuple(each.pair.name for each in found if each.rank is None),
        unchanged=len(subject.pairs) - len(found),
        notes=tuple(_notes(subject, found)),
        bytes_written=written,
        seconds=time.monotonic() - started,
        peak_ram_bytes=meter.peak,
    )


# -- one parameter after the other -----------------------------------------------------------------------------------


def _extract_all(
    subject: Checkpoints,
    options: ExtractOptions,
    journal: Journal,
    reader: TensorReader,
    meter: Meter,
    stop: StopRequest,
) -> dict[str, ExtractedWeight]:
    """LowRank of each pair in a file of its own; those that an earlier run finished are taken as they are."""
    with in_use(subject.device), torch.inference_mode():
        for pair in subject.pairs:
            if stop.signal_number is not None:
                raise Stopped(
                    f"stopped by signal {stop.signal_number}; the same command goes on where it was",
                    stop.signal_number,
                )
            if not _is_extracted(pair, journal):
                _extract(pair, subject, options, journal, reader)
            meter.add(pair.nbytes)
    sums = journal.progress.sums
    return {
        pair.name: ExtractedWeight(int(sums[pair.name][0]), *(value**0.5 for value in sums[pair.name][1:]))
        for pair in subject.pairs
        if pair.name in sums
    }


def _extract(
    pair: ParameterPair, subject: Checkpoints, options: ExtractOptions, journal: Journal, reader: TensorReader
) -> None:
    """Finish one pair: its factors, or that it is the same in both, or is to be saved whole."""
    if pair.kind is DifferenceKind.WHOLE or pair.before is None:
        if _differs(pair, reader):
            check_saved(pair)
            journal.finish(pair.name, "whole", {})
        else:
            journal.finish(pair.name, "same", {})
        return
    on = subject.device.torch
    difference = WeightDifference(reader, pair.before, pair.after, options.max_ram_bytes // 2, on).hold()
    factors = list(_factors(pair, difference, options, on))
    squares = sum(each.squares for each in factors)
    if not squares:
        journal.finish(pair.name, "same", {})
        return
    path = work_file(journal, pair)
    write_tensors(path, as_work_tensors(factors))
    sums = [float(factors[0].rank), squares, sum(each.left for each in factors)]
    found = identify(path, lambda _: None)
    if found is None:
        raise OutputError(f"{path} was removed while this run was at work; run the same command again")
    journal.finish(pair.name, found.sha256, {pair.name: sums})


def _is_extracted(pair: ParameterPair, journal: Journal) -> bool:
    """Whether an earlier run finished the pair, and its factors are still what they were."""
    sha256 = journal.progress.finished.get(pair.name)
    if sha256 in (None, "same", "whole"):
        return sha256 is not None
    found = identify(work_file(journal, pair), lambda _: None)
    return found is not None and found.sha256 == sha256


def _factors(
    pair: ParameterPair, difference: WeightDifference, options: ExtractOptions, on: torch.device
) -> Iterator[LowRank]:
    """LowRank of a matrix; of every expert, of one rank, where it is a parameter of experts."""
    matrices = [_matrix(difference, rows, pair, options, on) for rows in _parts(pair)]
    squares = [sum_of_squares(matrix) for matrix in matrices]
    if not sum(squares):
        yield from (LowRank(torch.empty(0, 0), torch.empty(0, 0), 0.0, 0.0) for _ in squares)
        return
    dtype, rank = DENSE[options.dtype].torch, options.rank
    if rank is None:
        found = [
            decompose_to_share(matrix, options.share, options.most, square, dtype)
            for matrix, square in zip(matrices, squares, strict=True)
        ]
        if len(found) == 1:
            yield found[0]
            return
        rank = max(each.rank for each in found)
    for matrix, square in zip(matrices, squares, strict=True):
        yield decompose(matrix, rank, square, dtype)


def _parts(pair: ParameterPair) -> Sequence[range]:
    """Rows of each matrix that is decomposed on its own."""
    shape = pair.after.shape
    if pair.kind is not DifferenceKind.EXPERTS:
        return [range(shape[0])]
    return [range(expert * shape[1], (expert + 1) * shape[1]) for expert in range(shape[0])]


def _matrix(
    difference: WeightDifference, rows: range, pair: ParameterPair, options: ExtractOptions, on: torch.device
) -> Matrix:
    digest = hashlib.sha256(f"{options.seed} {pair.name} {rows.start}".encode()).digest()
    seed = int.from_bytes(digest[:7], "little")
    return Matrix((len(rows), difference.columns), lambda: difference.tiles(rows), seed, on)


def _differs(pair: ParameterPair, reader: TensorReader) -> bool:
    """Whether any byte of a parameter's tensors differs, or where they are stored otherwise, any value."""
    if pair.before is None or pair.before.shape != pair.after.shape:
        return True
    if not pair.is_same_storage:
        difference = WeightDifference(reader, pair.before, pair.after, _CHUNK_BYTES, torch.device("cpu"))
        return any(bool(tile.any()) for _, tile in difference.tiles())
    return any(
        not reader.have_same_bytes(part, pair.after.parts[role]) for role, part in pair.before.parts.items()
    )


# -- what is checked and said ----------------------------------------------------------------------------------------


def _check_place(out: Path, subject: Checkpoints) -> None:
    """Raise OutputError where `out` is an input or holds anything but an unfinished extraction."""
    check_reachable(out)
    real = real_path(out)
    for role, side in (("base", subject.base), ("fine-tuned model", subject.finetuned)):
        place = real_path(side.index.storage.location)
        if real == place or place in real.parents or real in place.parents:
            raise OutputError(
                f"--out {out} and the {role} {place} overlap, and inputs are never written to; choose another --out"
            )
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is not a folder; choose another --out")
    try:
        others = sorted({path.name for path in list_folder(out)} - {WORK_FOLDER}) if out.is_dir() else []
    except OSError as error:
        raise read_error(error, out) from error
    check_entries(out / WORK_FOLDER)
    if others and not is_publishing(out):
        raise OutputError(f"{out} is not empty ({', '.join(others[:3])}); choose another --out")


def _fingerprint(subject: Checkpoints, options: ExtractOptions) -> Mapping[str, Any]:
    return {
        "streamconv": version("streamconv"),
        "extract": {"rank": options.rank, "share": options.share, "most": options.most, "seed": options.seed},
        "dtype": options.dtype,
        "device": subject.device.model,
        **({} if subject.device.is_cpu else {"float32": "ieee"}),
        "base": _files(subject.base.index),
        "finetuned": _files(subject.finetuned.index),
    }


def _files(index: CheckpointIndex) -> Mapping[str, Any]:
    config = hashlib.sha256(json.dumps(dict(index.config), sort_keys=True).encode()).hexdigest()
    shards = {
        shard.file.name: [shard.file.size, shard.header_sha256, shard.file.version] for shard in index.shards
    }
    return {"config": config, "shards": shards}


def _notes(subject: Checkpoints, found: Iterable[Extracted]) -> Iterator[str]:
    new = new_parameters(each.pair for each in found)
    if new:
        yield f"the base does not have {', '.join(new)}; the adapter holds them whole"
    grown = [
        each.pair.name
        for each in found
        if each.pair.before is not None and each.pair.before.shape != each.pair.after.shape
    ]
    if grown:
        yield f"{', '.join(grown)} changed in size; the adapter holds them whole"
    tie = subject.tie
    if tie is not None and tie.embedding in {each.pair.name for each in found}:
        yield f"{tie.embedding} and {tie.head} are one tensor; the adapter changes both (ensure_weight_tying)"
