"""Adapters of a job: opened, read one by one against the same base, and made into the one that is merged."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter
from streamconv.adapters.combine import Mixture, combine
from streamconv.adapters.combined import Rule
from streamconv.adapters.dialects import read_config
from streamconv.adapters.embeddings import EMBEDDINGS, HEADS
from streamconv.adapters.replication import read_ranges
from streamconv.adapters.source import BaseParameters
from streamconv.errors import AdapterError
from streamconv.output.tokenizer_files import files_of
from streamconv.pipeline.job import parse_moe_layout
from streamconv.planning.base import Base
from streamconv.planning.depth import deepen
from streamconv.planning.options import Job, MergeOptions
from streamconv.storage import open_adapter
from streamconv.storage.base import Storage

_log = logging.getLogger(__name__)


def open_adapters(job: Job) -> tuple[Storage, ...]:
    """Places of the job's adapters, in their order; revision and subfolder are the same of all."""
    return tuple(open_adapter(each, job.adapter_revision, job.adapter_subfolder) for each in job.adapters)


def deepen_once(base: Base, storages: Sequence[Storage]) -> Base:
    """The base with the layers that its adapters were trained on. Raises AdapterError where these are not the same."""
    configs = [read_config(storage) for storage in storages]
    if not configs:
        return base
    for storage, config in zip(storages, configs, strict=True):
        if read_ranges(config) != read_ranges(configs[0]):
            raise AdapterError(
                f"{storages[0].location} and {storage.location} were trained on different layers (layer_replication in"
                " adapter_config.json), so no model is that of both; merge only adapters that repeat the same"
            )
    deeper = deepen(base, configs[0])
    if deeper.depth is not None:
        _log.info("the adapter repeats layers of the base: %s", deeper.depth)
    return deeper


def read_adapters(job: Job, base: Base, storages: Sequence[Storage]) -> Adapter | None:
    """The adapter that stands for all; None without any. Raises what `read_adapter` and `combine` do."""
    if not storages:
        return None
    parameters = {
        name: Parameter(name, weight.shape, weight.dtype, undecoded=weight.undecoded)
        for name, weight in base.weights.items()
    }
    config, moe = base.index.config, parse_moe_layout(job.options.moe_layout)
    adapters = []
    for place, storage in zip(job.adapters, storages, strict=True):
        read = read_adapter(
            storage,
            parameters,
            config,
            base.tie,
            moe,
            job.allow_pickle,
            job.options.ignore_extra,
            job.options.allow_missing,
        )
        adapters.append(read)
        _log.info("read the adapter %s: %d updates", place, len(adapters[-1].updates))
    return combine(
        adapters, mixture_of(job.options, len(adapters)), BaseParameters(parameters, config, base.tie)
    )


def mixture_of(options: MergeOptions, count: int) -> Mixture:
    """Weights and rule for so many adapters."""
    weights = options.weight or (1.0,) * count
    if options.combine is None:
        return Mixture(weights)
    density = 1.0 if options.density is None else options.density
    return Mixture(weights, Rule(options.combine, density, options.seed))


def tokenizer_storage(adapter: Adapter | None, storages: Sequence[Storage]) -> Storage | None:
    """The adapter whose tokenizer may be the output's: of several the one that trained the output's embedding or
    head, else the last that has a tokenizer, one first whose embedding is grown.
    """
    if adapter is None or len(storages) == 1:
        return next(iter(storages), None)
    vocabulary = [each for each in adapter.replaces if each.parameter.endswith((*EMBEDDINGS, *HEADS))]
    trained = {each.tensor.file.path for each in vocabulary if each.parameter not in adapter.records}
    recorded = {each.tensor.file.path for each in vocabulary}
    has_one = [each for each in storages if files_of(each)]
    return [
        storages[0],
        *has_one,
        *(each for each in has_one if _has_file(each, recorded)),
        *(each for each in storages if _has_file(each, trained)),
    ][-1]


def _has_file(storage: Storage, paths: Collection[str]) -> bool:
    return any(storage.file(name).path in paths for name in storage.names())
