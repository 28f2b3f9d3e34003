"""Plan a job: everything is read that headers and configs tell, and nothing is written."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter
from streamconv.adapters.config import read_config
from streamconv.calibration.subject import Subject
from streamconv.checkpoint.index import read_index
from streamconv.errors import InputError
from streamconv.formats import find_weights
from streamconv.output.manifest import MANIFEST
from streamconv.output.publish import CONFIG, INDEX
from streamconv.output.recipe import RECIPE
from streamconv.output.sidecars import (
    QUANTIZATION_COPIES,
    RESIDUAL_CONFIG,
    choose_tokenizer,
    files_to_copy,
)
from streamconv.pipeline.calibrating import read_calibration_facts
from streamconv.pipeline.job import parse_moe_layout
from streamconv.pipeline.passes import plan_passes
from streamconv.planning.base import Base, read_base
from streamconv.planning.calibration import CalibrationFacts
from streamconv.planning.choices import options_alone
from streamconv.planning.depth import deepen
from streamconv.planning.devices import resolve_device
from streamconv.planning.options import Job
from streamconv.planning.plan import Plan
from streamconv.planning.planner import build_plans, facts_of
from streamconv.storage import open_storage
from streamconv.storage.base import SourceFile, Storage

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job read and planned: no weight has been read, nothing written.

    `also` are the further outputs of the same run, each with the job that alone would make it.
    """

    job: Job
    base: Base
    adapter_storage: Storage | None
    adapter: Adapter | None
    plan: Plan
    copied: tuple[SourceFile, ...]
    also: tuple[Prepared, ...] = ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans of all outputs, the main one first."""
        return (self.plan, *(other.plan for other in self.also))

    def places(self, out: Path) -> tuple[tuple[Prepared, Path], ...]:
        """Every output with its folder, the main one, which goes to `out` itself, first."""
        return ((self, out), *((other, out / other.job.options.quant) for other in self.also))

    @property
    def generated(self) -> tuple[str, ...]:
        """Names of the small files the run writes beside the weights, in the order they appear."""
        index = (INDEX,) if len(self.plan.shards) > 1 else ()
        card = ("README.md",) if self.job.card else ()
        copies = (QUANTIZATION_COPIES[self.plan.quant],) if self.plan.quant in QUANTIZATION_COPIES else ()
        residual = (RESIDUAL_CONFIG,) if self.plan.residual_rank else ()
        return (*residual, *index, *card, RECIPE, MANIFEST, *copies, CONFIG)

    def downloads(self) -> tuple[tuple[Storage, tuple[SourceFile, ...]], ...]:
        """Files that must come from the Hub before the run can read them, by storage: of a base, mostly its shards."""
        base = self.base.index.storage
        storages = [storage for storage in (base, self.adapter_storage) if storage is not None]
        files = [*self.small_files(), *(shard.file for shard in self.base.index.shards)]
        return tuple((storage, missing) for storage in storages if (missing := storage.missing(files)))

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that the result's tokenizer lies in. Raises InputError where there is none."""
        found = [Path(file.path) for file in self.copied if file.name in _TOKENIZER_FILES]
        if not found:
            raise InputError(
                f"{self.base.index.storage.location} has no tokenizer beside its weights "
                f"({', '.join(_TOKENIZER_FILES)}); put its files there"
            )
        return found[0].parent

    @property
    def subject(self) -> Subject:
        """The job as passes see it. Raises InputError where a text is to be read and there is no tokenizer."""
        tokenizer = self.tokenizer_folder if self.plan.calibration else None
        return Subject(self.base, self.adapter, self.plan, tokenizer)

    def small_files(self) -> tuple[SourceFile, ...]:
        """Files beside the weights: those copied, and the base's card, whose licence the new one inherits."""
        base = self.base.index.storage
        card = (base.file("README.md"),) if self.job.card and "README.md" in base.names() else ()
        return (*self.copied, *card)


def prepare(job: Job, facts: CalibrationFacts | None = None) -> Prepared:
    """Read headers and configs and plan the run. Raises whatever would make it fail, as far as can be known.

    `facts` are those of a calibration whose text is not at hand, for a plan that will not be carried out.
    """
    storage = open_storage(job.base, job.base_revision)
    index = read_index(storage)
    base = read_base(index, find_weights(index))
    _log.info("read the base %s: %d weights in %d shards", job.base, len(base.weights), len(index.shards))
    adapter_storage = None
    if job.adapter is not None:
        adapter_storage = open_storage(job.adapter, job.adapter_revision, job.adapter_subfolder)
        base = deepen(base, read_config(adapter_storage))
        if base.depth is not None:
            _log.info("the adapter repeats layers of the base: %s", base.depth)
    adapter = None
    if adapter_storage is not None:
        parameters = {
            name: Parameter(name, weight.shape, weight.dtype) for name, weight in base.weights.items()
        }
        moe = parse_moe_layout(job.options.moe_layout)
        adapter = read_adapter(
            adapter_storage,
            parameters,
            base.index.config,
            base.tie,
            moe,
            job.allow_pickle,
            job.options.allow_missing,
        )
        _log.info("read the adapter %s: %d updates", job.adapter, len(adapter.updates))
    options = options_alone(facts_of(base, adapter), job.options, (job.options.quant, *job.also))
    is_recorded = facts is not None
    asked = next((each.calibration for each in options if each.calibration), None)
    if asked is not None and facts is None:
        facts = read_calibration_facts(base, asked)
    plans = build_plans(base, adapter, options, resolve_device(job.device), facts)
    is_resized = plans[0].vocab_size is not None
    tokenizer = choose_tokenizer(job.tokenizer, storage, adapter_storage, is_resized)
    _log.info("tokenizer files come from %s", tokenizer.location)
    copied = files_to_copy(storage, tokenizer, index.config, job.copy_extra)
    main, *also = (
        Prepared(replace(job, options=plan.options, also=()), base, adapter_storage, adapter, plan, copied)
        for plan in plans
    )
    if is_recorded:
        return main
    return replace(_with_passes(main), also=tuple(map(_with_passes, also)))


def _with_passes(prepared: Prepared) -> Prepared:
    """Add the passes to its plan. Raises ResourceError where a budget cannot hold what they need."""
    return replace(prepared, plan=replace(prepared.plan, passes=plan_passes(prepared.subject)))
