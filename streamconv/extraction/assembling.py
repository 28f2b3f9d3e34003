"""Puts an adapter together from what is finished in the work folder, and publishes it, its config last."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from streamconv.adapters.experts_reader import TRANSPOSED
from streamconv.calibration.residual_adapter import write_adapter
from streamconv.calibration.tensor_files import stored_in, write_tensors
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.extraction.checkpoints import Checkpoints
from streamconv.extraction.decomposition import LowRank
from streamconv.extraction.pairs import DifferenceKind, ParameterPair, task_of
from streamconv.extraction.tensors import (
    Extracted,
    adapter_config,
    expert_tensors,
    factor_tensors,
    inner_experts,
    saved_name,
    tied_head_tensors,
)
from streamconv.formats.linear import may_be_linear, module_of
from streamconv.output.journal import Journal, make_folder
from streamconv.output.publish import put_content, put_copy, put_file
from streamconv.output.tokenizer_files import files_of

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def work_file(journal: Journal, pair: ParameterPair) -> Path:
    """Path of the factors of one parameter, once it is finished."""
    return journal.finished(f"factors-{hashlib.sha256(pair.name.encode()).hexdigest()[:32]}.safetensors")


def as_work_tensors(factors: Sequence[LowRank]) -> Mapping[str, Tensor]:
    """Tensors of a work file: factors [experts, m, r] and [experts, r, n], one expert where there are none."""
    return {
        "up": torch.stack([each.up for each in factors]).cpu(),
        "down": torch.stack([each.down for each in factors]).cpu(),
    }


def found_in(subject: Checkpoints, journal: Journal) -> tuple[Extracted, ...]:
    """The parameters that differ."""
    ranks = {name: int(sums[0]) for name, sums in journal.progress.sums.items()}
    return tuple(
        Extracted(pair, ranks.get(pair.name))
        for pair in subject.pairs
        if journal.progress.finished[pair.name] != "same"
    )


def publish_adapter(
    subject: Checkpoints, found: Sequence[Extracted], journal: Journal, out: Path, dtype: torch.dtype
) -> int:
    """Put the adapter together and under its final names, its config last; return its bytes."""
    config = _config(subject, found)
    journal.publish()
    parts = journal.finished("parts")
    make_folder(parts)
    tensors = list(_tensors(subject, found, journal, parts, dtype))
    whole = journal.finished(_TENSORS)
    write_adapter(whole, tensors)
    size = whole.stat().st_size
    put_file(journal, whole, out / _TENSORS)
    tokenizer = files_of(subject.finetuned.index.storage)
    for file in (tokenizer[name].file(name) for name in sorted(tokenizer)):
        target = out / file.name
        if target.parent != out:
            make_folder(target.parent)
        put_copy(journal, file, target)
    put_content(journal, config, out / _CONFIG)
    journal.remove()
    return size


def _config(subject: Checkpoints, found: Sequence[Extracted]) -> bytes:
    storage, config = subject.base.index.storage, subject.finetuned.index.config
    linear = [
        module_of(name)
        for name, weight in subject.base.weights.items()
        if may_be_linear(name, weight.shape, has_experts=True)
    ]
    base = storage.origin.repo if storage.origin else storage.location
    return adapter_config(found, base, task_of(config), subject.tie, linear)


def _tensors(
    subject: Checkpoints, found: Sequence[Extracted], journal: Journal, folder: Path, dtype: torch.dtype
) -> Iterator[StoredTensor]:
    """All tensors of the adapter, where their bytes are: in the work folder, or in the fine-tuned model."""
    targets = {each.pair.module for each in found if each.rank is not None}
    inner = inner_experts(found)
    transposed = str(subject.finetuned.index.config.get("model_type")) in TRANSPOSED
    tie = subject.tie
    with TensorReader() as reader:
        for number, each in enumerate(found):
            pair = each.pair
            if each.rank is None:
                part = pair.after.parts[pair.after.decoder.main]
                yield dataclasses.replace(part, name=saved_name(each, targets))
                if tie is not None and pair.name == tie.embedding:
                    yield dataclasses.replace(
                        part, name=saved_name(each, targets).replace(pair.name, tie.head)
                    )
                continue
            factors = _loaded(work_file(journal, pair), reader)
            if pair.kind is DifferenceKind.EXPERTS:
                named = expert_tensors(pair, factors, transposed, pair.name in inner)
            else:
                named = factor_tensors(pair, factors[0])
            if tie is not None and pair.name == tie.embedding:
                named = {**named, **tied_head_tensors(tie, factors[0])}
            path = folder / f"{number:06}.safetensors"
            write_tensors(path, {name: tensor.to(dtype) for name, tensor in named.items()})
            yield from stored_in(path)[0].values()


def _loaded(path: Path, reader: TensorReader) -> Sequence[LowRank]:
    tensors = stored_in(path)[0]
    ups, downs = (reader.load(tensors[role]) for role in ("up", "down"))
    return [LowRank(up, down, 0.0, 0.0) for up, down in zip(ups, downs, strict=True)]
