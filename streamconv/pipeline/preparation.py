"""Plan a job: everything is read that headers and configs tell, and nothing is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from streamconv.adapters.base import Adapter
from streamconv.adapters.dialects import read_config
from streamconv.adapters.embeddings import find_embedding
from streamconv.calibration.subject import Subject
from streamconv.checkpoint.container import CONFIG
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.errors import InputError, OptionError
from streamconv.gguf.names import EMBEDDING
from streamconv.output.gguf_tokenizer import donor_choice, gguf_tokenizer, header_choice, header_tokenizer
from streamconv.output.manifest import MANIFEST
from streamconv.output.place import folder_of
from streamconv.output.publish import INDEX
from streamconv.output.recipe import RECIPE
from streamconv.output.sidecars import (
    QUANTIZATION_COPIES,
    RESIDUAL_CONFIG,
    custom_code,
    files_beside_header,
    files_to_copy,
    notes_on_processors,
)
from streamconv.output.tokenizer import TokenizerChoice, choose_tokenizer, follow_end_token
from streamconv.pipeline.calibrating import read_calibration_facts
from streamconv.pipeline.mixture import deepen_once, open_adapters, read_adapters, tokenizer_storage
from streamconv.pipeline.named_base import base_notes, named_base
from streamconv.pipeline.passes import plan_passes
from streamconv.planning.apart import apart_for
from streamconv.planning.base import Base, read_base
from streamconv.planning.calibration import CalibrationFacts
from streamconv.planning.choices import options_alone
from streamconv.planning.devices import Device, resolve_device, within_memory
from streamconv.planning.gguf import with_donor, with_tokenizer
from streamconv.planning.options import Job, MergeOptions
from streamconv.planning.parts import check_parts
from streamconv.planning.plan import Plan
from streamconv.planning.planner import build_plans, facts_of
from streamconv.planning.reading import open_base, read_checkpoint
from streamconv.planning.unmerged import refuse_unmerged
from streamconv.storage.base import SourceFile, Storage
from streamconv.storage.file_set import FileSet
from streamconv.system_errors import translated

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job read and planned: no weight has been read, nothing written.

    `written` are small files like those copied, but made anew; `tokenizer_choice` are the tokenizer's, whether the
    output has them beside its weights or in their header; `end_token` is the id of an end token that the base's
    config does not have. `also` are the further outputs of the same run, each with the job that alone would make it.
    """

    job: Job
    base: Base
    adapter_storages: tuple[Storage, ...]
    adapter: Adapter | None
    plan: Plan
    copied: tuple[SourceFile, ...]
    tokenizer_choice: TokenizerChoice
    written: Mapping[str, bytes] = field(default_factory=dict)
    end_token: int | None = None
    also: tuple[Prepared, ...] = ()

    @property
    def adapter_storage(self) -> Storage | None:
        """Place of the one adapter, or of the first of several; None without one."""
        return next(iter(self.adapter_storages), None)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans of all outputs, the main one first."""
        return (self.plan, *(other.plan for other in self.also))

    def places(self, out: Path) -> tuple[tuple[Prepared, Path], ...]:
        """Every output with its folder, the main one, which goes to `out` itself, first."""
        return ((self, out), *((other, out / folder_of(other.job.options.quant)) for other in self.also))

    @property
    def generated(self) -> tuple[str, ...]:
        """Names of the small files the run writes beside the weights, in the order they appear."""
        has_config = self.plan.container.has_config
        index = (INDEX,) if len(self.plan.shards) > 1 and has_config else ()
        card = ("README.md",) if self.job.card else ()
        is_copied = self.plan.keeps_quantization or self.plan.quant not in QUANTIZATION_COPIES
        copies = () if is_copied else (QUANTIZATION_COPIES[self.plan.quant],)
        residual = (RESIDUAL_CONFIG,) if self.plan.residual_rank else ()
        config = (CONFIG,) if has_config else ()
        return (*self.written, *residual, *index, *card, RECIPE, MANIFEST, *copies, *config)

    @property
    def small_names(self) -> tuple[str, ...]:
        """Names of the files beside the weights that come of the inputs."""
        return (*self.written, *(file.name for file in self.copied))

    def downloads(self) -> tuple[tuple[Storage, tuple[SourceFile, ...]], ...]:
        """Files that must come from the Hub before the run can read them, by storage: of a base, mostly its shards."""
        base = self.base.index.storage
        storages = (base, *self.adapter_storages)
        files = [
            *self.small_files(),
            *(file for file in self._beside_tokenizer if file not in self.copied),
            *(shard.file for shard in self.base.index.shards),
        ]
        return tuple((storage, missing) for storage in storages if (missing := storage.missing(files)))

    def downloads_before(self) -> tuple[tuple[Storage, tuple[SourceFile, ...]], ...]:
        """Those that must be here when the run begins: all where its passes read the base several times."""
        shards = {shard.file for shard in self.base.index.shards} if self.streams else set()
        found = ((storage, tuple(f for f in files if f not in shards)) for storage, files in self.downloads())
        return tuple((storage, files) for storage, files in found if files)

    @property
    def streams(self) -> bool:
        """Whether shards of the base may come while the run goes on: nothing but its one pass reads them."""
        return not any(plan.passes for plan in self.plans)

    @property
    def tokenizer(self) -> FileSet:
        """Files of the result's tokenizer. Raises InputError where there is none."""
        base = self.base.index
        written = self.tokenizer_choice.written
        sources = self._beside_tokenizer
        files = {file.name: Path(file.path) for file in sources}
        if not any(name in _TOKENIZER_FILES for name in (*files, *written)):
            raise InputError(
                f"{base.storage.location} has no tokenizer beside its weights "
                f"({', '.join(_TOKENIZER_FILES)}); put its files there"
            )
        if not written and CONFIG in base.storage.names():
            home = Path(base.storage.file(CONFIG).path).parent
            if all(files[name].parent == home for name in _TOKENIZER_FILES if name in files):
                return FileSet(files, folder=home, sources=sources)
        config = json.dumps(dict(base.config)).encode()
        return FileSet(files, {CONFIG: config, **written}, sources=sources)

    @property
    def _beside_tokenizer(self) -> tuple[SourceFile, ...]:
        """Files that are copied, with the tokenizer's where the output has those in its header."""
        if self.plan.container.has_config:
            return self.copied
        choice = self.tokenizer_choice
        files = [place.file(name) for name, place in choice.files.items() if name not in choice.written]
        return (*self.copied, *files)

    @property
    def subject(self) -> Subject:
        """The job as passes see it. Raises InputError where a text is to be read and there is no tokenizer."""
        tokenizer = self.tokenizer if self.plan.calibration else None
        return Subject(self.base, self.adapter, self.plan, tokenizer)

    def small_files(self) -> tuple[SourceFile, ...]:
        """Files beside the weights: those copied, and the base's card, whose licence the new one inherits."""
        base = self.base.index.storage
        card = (base.file("README.md"),) if self.job.card and "README.md" in base.names() else ()
        return (*self.copied, *card)


@translated()
def prepare(job: Job, facts: CalibrationFacts | None = None) -> Prepared:
    """Read headers and configs and plan the run. Raises whatever would make it fail, as far as can be known.

    `facts` are those of a calibration whose text is not at hand, for a plan that will not be carried out.
    """
    _check_part(job)
    index, weights = read_checkpoint(open_base(job.base, job.base_revision), job.allow_pickle)
    refuse_unmerged(index)
    base = read_base(index, weights)
    _log.info("read the base %s: %d weights in %d shards", job.base, len(base.weights), len(index.shards))
    adapter_storages = open_adapters(job)
    base = deepen_once(base, adapter_storages)
    base = apart_for(base, job.options, (job.options.quant, *job.also))
    adapter = read_adapters(job, base, adapter_storages)
    options = options_alone(facts_of(base, adapter), job.options, (job.options.quant, *job.also))
    is_recorded = facts is not None
    asked = next((each.calibration for each in options if each.calibration), None)
    if asked is not None and facts is None:
        facts = read_calibration_facts(base, asked)
    inputs = _Inputs(job, base, adapter_storages, adapter, options, facts, is_recorded)
    return within_memory(job.device, resolve_device(job.device), partial(_planned, inputs), _vram)


def _check_part(job: Job) -> None:
    """Raise OptionError for what parts of an output cannot be made with."""
    if job.part is None:
        return
    if job.also:
        raise OptionError(
            "--part is for one output, and --also makes several of one reading, which parts would each repeat; give "
            "each format a command and an --out of its own"
        )
    if job.low_disk:
        raise OptionError(
            "--low-disk with --part would have a worker remove shards of the base that another one still reads; leave "
            "one of them out"
        )
    if not job.resume:
        raise OptionError(
            "--no-resume with --part would have each worker discard what the others have made; leave it out, or, while "
            "nothing is at work there, delete the folder .streamconv in --out"
        )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A job with what was read for it. `is_recorded`: its facts are of a text that is not at hand."""

    job: Job
    base: Base
    adapter_storages: tuple[Storage, ...]
    adapter: Adapter | None
    options: Sequence[MergeOptions]
    facts: CalibrationFacts | None
    is_recorded: bool


def _vram(prepared: Prepared) -> int:
    """Bytes that a job needs on each of its GPUs."""
    return max(plan.peak_vram for plan in prepared.plans)


def _planned(inputs: _Inputs, device: Device) -> Prepared:
    """The job as it is carried out on `device`."""
    job, base, adapter, adapter_storages = inputs.job, inputs.base, inputs.adapter, inputs.adapter_storages
    index, storage = base.index, base.index.storage
    plans = build_plans(base, adapter, inputs.options, device, inputs.facts)
    check_parts(job.part, plans[0].shards)
    _check_donor(job, plans)
    tokenizer = _tokenizer(job, base, tokenizer_storage(adapter, adapter_storages), plans[0])
    processors = notes_on_processors(storage, adapter_storages)
    of_bases = _base_notes(job, base, adapter_storages)
    code = custom_code(storage, index.config)

    def prepared(plan: Plan) -> Prepared:
        is_stored, choice = plan.container.keeps_headers, _own_choice(plan, tokenizer, job, index)
        files = files_to_copy(storage, choice, code, job.copy_extra, plan.keeps_quantization)
        written, of_code = choice.written, code.notes(files)
        if not plan.container.has_config:
            plan = plan if is_stored else _with_tokenizer(plan, choice, job, index)
            files, written, of_code = files_beside_header(storage, job.copy_extra), {}, ()
        of_index = () if is_stored else index.notes  # on files that are made of the header
        notes = (*plan.notes, *of_index, *of_bases, *choice.notes, *processors, *of_code)
        return Prepared(
            replace(job, options=plan.options, also=()),
            base,
            adapter_storages,
            adapter,
            replace(plan, notes=notes),
            files,
            choice,
            written,
            choice.end_token,
        )

    main, *also = map(prepared, plans)
    if inputs.is_recorded:
        return main
    found = replace(_with_passes(main), also=tuple(map(_with_passes, also)))
    if job.low_disk and not found.streams and storage.missing(shard.file for shard in index.shards):
        raise OptionError(
            f"--low-disk reads every shard of {job.base} once, and this merge goes through the base several times"
            " (calibration, or scales that are measured first); leave --low-disk out, or choose another --rounding or"
            " --quant"
        )
    return found


def _own_choice(plan: Plan, choice: TokenizerChoice, job: Job, index: CheckpointIndex) -> TokenizerChoice:
    """The tokenizer of one output, whose header may have another than `choice`: the base's, or a donor's."""
    if plan.container.keeps_headers:
        return header_choice(choice, job.tokenizer, index)
    if job.gguf_donor is not None and not plan.container.has_config:
        return donor_choice(choice, job.tokenizer, index)
    return choice


def _check_donor(job: Job, plans: Sequence[Plan]) -> None:
    """Raise OptionError for a donor that no output has a use for."""
    takes = [not plan.container.has_config and not plan.container.keeps_headers for plan in plans]
    if job.gguf_donor is not None and not any(takes):
        raise OptionError(
            f"--gguf-donor {job.gguf_donor} is for GGUF files that are written anew; add --quant gguf:q4_k_m or another"
            " gguf: format, or leave it out"
        )


def _with_tokenizer(plan: Plan, choice: TokenizerChoice, job: Job, index: CheckpointIndex) -> Plan:
    """The plan with the tokenizer in the header of its GGUF file."""
    if job.gguf_donor is not None:
        return with_donor(plan, job.gguf_donor, job.tokenizer)
    rows, where = plan.tensors[EMBEDDING].shape[0], index.storage.location
    pairs = header_tokenizer(choice, index) or gguf_tokenizer(choice, where, index.config, rows)
    return with_tokenizer(plan, pairs, job.tokenizer)


def _tokenizer(job: Job, base: Base, adapter: Storage | None, plan: Plan) -> TokenizerChoice:
    """The output's tokenizer, and what of the base's settings follows from it."""
    storage = base.index.storage
    chosen = choose_tokenizer(job.tokenizer, storage, adapter, plan.vocab_size is not None, _rows(base, plan))
    _log.info(
        "tokenizer files: %s", ", ".join(f"{name} of {at.location}" for name, at in chosen.files.items())
    )
    made = {
        name: base.index.made[name]
        for name, at in chosen.files.items()
        if at is storage and name in base.index.made
    }
    chosen = replace(chosen, written={**made, **chosen.written})
    return follow_end_token(chosen, storage, base.index.config)


def _rows(base: Base, plan: Plan) -> int | None:
    """Rows of the output's embedding; None where it is not known."""
    if plan.vocab_size is not None:
        return plan.vocab_size[1]
    embedding = find_embedding(base.weights)
    return base.weights[embedding].shape[0] if embedding else None


def _base_notes(job: Job, base: Base, adapters: Sequence[Storage]) -> tuple[str, ...]:
    """Notes on the bases that adapters name; one that names another of them is trained on top of it."""
    index = base.index
    own = {*job.adapters, *(each.origin.repo for each in adapters if each.origin)}
    found: dict[str, None] = {}
    for adapter in adapters:
        fields = read_config(adapter).fields
        named = named_base(fields)
        if named is not None and named.name not in own:
            notes = base_notes(fields, index.storage, index.config, job.base, job.base_revision)
            found |= dict.fromkeys(notes)
    return tuple(found)


def _with_passes(prepared: Prepared) -> Prepared:
    """Add the passes to its plan. Raises ResourceError where a budget cannot hold what they need."""
    return replace(prepared, plan=replace(prepared.plan, passes=plan_passes(prepared.subject)))
