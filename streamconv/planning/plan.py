"""Plan of a run: everything that it will do, known before it reads a weight.

A plan is plain data: it prints, compares, and its fingerprint tells a run that may be resumed from another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

from streamconv.adapters.base import Member, TaskHead, Update, UpdateAccess
from streamconv.checkpoint.container import SAFETENSORS, Container
from streamconv.checkpoint.layout import ShardLayout, joined
from streamconv.checkpoint.types import PADDING, StoredTensor, TensorSpec
from streamconv.equalization.equalizer import Equalizer
from streamconv.equalization.pairs import Equalization
from streamconv.formats.base import CELL_ROWS, Constant, Encoder, Weight, matrix_shape
from streamconv.formats.kinds import is_input_measured
from streamconv.kernels import kernels_for
from streamconv.planning.devices import Device
from streamconv.planning.options import MergeOptions
from streamconv.planning.scales import FRESH, PlannedScales
from streamconv.rounding.base import Rounding
from streamconv.rounding.feedback import FeedbackOptions
from streamconv.rounding.residual import FACTOR_DTYPE

DEFAULT_MIN_KEPT = 0.2
# Tiles in flight in a lane: being read, computed, written and hashed. Each has a buffer for what is read of it, and one
# for what is written.
SLOTS = 6
# Tiles of a lane that are on its GPU: being brought there, computed, and brought back.
DEVICE_TILES = 3
# Elements of a cell on a GPU. There an operation on few costs its launch, some microseconds, rather than its work.
GPU_CELL_ELEMENTS = 2**23
# Weights whose side parts and adapters are in memory: the one computed, and the next one being read.
WEIGHTS_HELD = 2


class Access(StrEnum):
    """Ways to read a weight: by rows; or once to learn something about all of it, or to hold it, and again by rows.

    What is calibrated is read with its decoder layer, in a pass before: in the plan's own pass it is only copied.
    """

    ROW = "row"
    REDUCE_THEN_ROW = "reduce-then-row"
    WHOLE = "whole"  # read twice, too, and held between
    CALIBRATED = "calibrated"


@dataclass(frozen=True, slots=True)
class Copy:
    """One stored tensor, byte for byte, under `name`; `spec`: as the output calls and shapes it, where it has another
    way.
    """

    name: str
    tensor: StoredTensor
    spec: TensorSpec | None = None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (self.spec or TensorSpec(self.name, self.tensor.dtype, self.tensor.shape),)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One weight read, updated, and written anew.

    `merge_base`: how the base is rounded before the update is added; None leaves it as it is. `scales`: whether those
    of the base stay, as far as the rounding leaves them. `calibrated`: its bytes are made before, with those of its
    decoder layer, and copied; `rounding` is for what that leaves, an expert that hardly any token came to. `equalizer`:
    what target and base are multiplied by before that, None where they are not. `waits`: its side parts are kept in
    memory until those of its stack are due (SideParts).
    """

    name: str
    weight: Weight
    updates: tuple[Update, ...]
    encoder: Encoder
    rounding: Rounding | None = None
    merge_base: Encoder | None = None
    scales: PlannedScales = FRESH
    calibrated: bool = False
    equalizer: Equalizer | None = None
    waits: bool = False

    @property
    def applied(self) -> tuple[Update, ...]:
        """All that is done to the base in turn, to make the target."""
        return self.updates if self.equalizer is None else (*self.updates, self.equalizer)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Parts that lie where the step is."""
        return self.encoder.parts[:1] if self.waits else self.encoder.parts

    @property
    def rows(self) -> int:
        return matrix_shape(self.weight.shape)[0]

    @property
    def columns(self) -> int:
        return matrix_shape(self.weight.shape)[1]

    @property
    def whole_bytes(self) -> int:
        """Peak bytes that whole-weight updates keep in memory."""
        whole = (update for update in self.updates if update.access is UpdateAccess.WHOLE)
        return max((update.held_bytes for update in whole), default=0)

    @property
    def solver_bytes(self) -> int:
        """Bytes of workspace that a GPU's solver takes for whole-weight updates, beside what these keep."""
        return max((update.solver_bytes for update in self.updates), default=0)

    @property
    def prepared_bytes(self) -> int:
        """Bytes held of what other updates prepare."""
        return sum(update.held_bytes for update in self.updates if update.access is not UpdateAccess.WHOLE)

    @property
    def searches_first(self) -> bool:
        """Whether scales are searched for all of the weight, and stored, before codes are chosen."""
        return (
            self.rounding is not None
            and self.rounding.searches_scales
            and self.encoder.nested
            and self.scales == FRESH
            and not self.calibrated
        )

    @property
    def access(self) -> Access:
        if self.calibrated:
            return Access.CALIBRATED
        needs_scales = self.merge_base is not None and (
            self.merge_base.nested or (self.scales != FRESH and self.encoder.nested)
        )
        asked = {update.access for update in self.updates}
        if UpdateAccess.WHOLE in asked:
            return Access.WHOLE
        reduces = needs_scales or self.searches_first or UpdateAccess.REDUCE_THEN_ROW in asked
        return Access.REDUCE_THEN_ROW if reduces else Access.ROW


@dataclass(frozen=True, slots=True)
class SideParts:
    """Part number `number` after the main one of each of `weights`, in turn: rewritten before, theirs wait for it.

    `spec` is all of it, along the first axis.
    """

    name: str
    weights: tuple[str, ...]
    number: int
    spec: TensorSpec

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


Step = Copy | Rewrite | SideParts | Constant
ShardPlan = ShardLayout[Step]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that a run needs at most, in bytes, above the interpreter with torch loaded.

    `buffer` bounds the bytes of a tile as it is read, `written` those that it is written as (None: as many), `workers`
    is how many threads share its cells, `lanes` how many shards are in work at once, on all GPUs together. `vram` is on
    each of them, without what CUDA itself takes.
    """

    ram: int
    vram: int
    buffer: int
    workers: int
    lanes: int = 1
    written: int | None = None

    @property
    def written_buffer(self) -> int:
        """Bytes of a buffer for what is written of a tile."""
        return self.buffer if self.written is None else self.written


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that passes before the plan's own need at most: memory as in Memory, disk for what they make and hold.

    `read` are bytes of the base that they read. `seconds` are about what they take, by assumed rates; 0 where nobody
    has counted.
    """

    ram: int
    vram: int
    disk: int
    read: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over the base before the plan's own, which finds what steps then use; no byte changes its place by it.

    `name` is its kind's, `folder` that in the work folder where it leaves what it made: `kept_bytes` at most, until the
    output is in place. `holds` and `remedy` say, where a budget is too small, what the memory is for and what would
    need less.
    """

    name: str
    folder: str
    need: Need
    kept_bytes: int
    holds: str
    remedy: str


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """Plan for calibrating the weights whose step says so.

    `data` is a file or a data set, `name` that without the folder; `sha256` is that of the file, or of the data set's
    commit. `tokens` and, of these, `gradient_tokens` are whole sequences. `threads` is how many threads torch shares a
    matrix product between, which decides its last bits. `options` are None where the text chooses scales alone, by
    `equalization`, which is None where it chooses none.
    """

    data: str
    name: str
    sha256: str
    is_data_set: bool
    tokens: int
    sequence_length: int
    options: FeedbackOptions | None
    threads: int
    transformers: str
    gradient_tokens: int = 0
    equalization: Equalization | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data: all of it that decides bytes."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "options": asdict(self.options) if self.options else None,
            "threads": self.threads,
            "transformers": self.transformers,
            "gradient_tokens": self.gradient_tokens,
            # Only where there is one, so that what was made before there were any is still known.
            **({"rescale": self.equalization.name} if self.equalization else {}),
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """Choice that was made and its reason, in words for people."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Depth:
    """Layers of an output that repeats those of its base: `before` in number, now those in `ranges` [start, end)."""

    before: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def sources(self) -> tuple[int, ...]:
        """Layers of the base that the output's layers are, by number of the output's layer."""
        return tuple(layer for start, end in self.ranges for layer in range(start, end))

    def __str__(self) -> str:
        ranges = ", ".join(f"[{start}, {end})" for start, end in self.ranges[:8])
        more = ", ..." if len(self.ranges) > 8 else ""
        return f"{self.before} layers become {len(self.sources)}: {ranges}{more}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run will do. `quant` names the output's format of quantized weights, None if it has none; `group_size`
    is how many elements share a scale, where that can be chosen. `formats`: weights by what `stored_as` calls their
    format, where they have several, and else none. `skipped` is what the config says of modules left in
    16 bit; `unfit` are the paths of those that are only because the format cannot store their shape. `method` names
    the adapter's, None without one.

    `memory` is what its own pass needs; `passes` are those before it, in their order, none before a job is prepared.
    `calibration` tells of the text that some of these go by, None where there is none. `depth` is None where the output
    has the layers of the base. `notes` are sentences on what a merge leaves out, replaces or chooses, for people.
    `members` are the adapters where there are several, or one that is weighed. `container` is what the shards are.
    `keeps_quantization`: whether the base's settings of its quantization, in config.json and beside it, are those of
    the output.
    """

    options: MergeOptions
    device: Device
    shards: tuple[ShardPlan, ...]
    memory: Memory
    quant: str | None
    target: Choice
    rounding: Choice | None
    calibration: CalibrationPlan | None
    quantized: tuple[str, ...]
    skipped: tuple[str, ...]
    unfit: tuple[str, ...]
    group_size: int | None
    formats: Mapping[str, tuple[str, ...]]
    method: str | None
    adapted: Mapping[str, int]
    replaced: tuple[str, ...]
    renamed: str | None
    depth: Depth | None
    untied: bool
    dtype: str | None
    vocab_size: tuple[int, int] | None
    fingerprint: Mapping[str, Any]
    passes: tuple[Pass, ...] = ()
    notes: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()
    head: TaskHead | None = None
    container: Container = SAFETENSORS
    keeps_quantization: bool = False

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def stored_as(self) -> str:
        """Formats of the weights in words, with the number of those in each where there are several."""
        if self.formats:
            return "; ".join(f"{len(names)} in {name}" for name, names in self.formats.items())
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.quant or self.dtype or 'dtype of the base'}{groups}"

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Tensors of the output by name; parts of one name are one."""
        parts: dict[str, list[TensorSpec]] = {}
        for spec in (spec for shard in self.shards for placed in shard.steps for spec in placed.step.specs):
            if spec.name != PADDING:
                parts.setdefault(spec.name, []).append(spec)
        return {name: joined(specs) for name, specs in parts.items()}

    @property
    def completes(self) -> str:
        """File that makes the output's folder a model."""
        return self.container.completes(len(self.shards))

    @property
    def kernels(self) -> str | None:
        """Kernels that quantize, `compiled` or `torch`; None where nothing is quantized. They change no byte."""
        return kernels_for(self.device.torch).name if self.rounding else None

    @property
    def peak_ram(self) -> int:
        """Bytes of memory at most, in any pass."""
        return max(self.memory.ram, self.passes_need.ram)

    @property
    def peak_vram(self) -> int:
        return max(self.memory.vram, self.passes_need.vram)

    @property
    def passes_need(self) -> Need:
        """Bytes that `passes` need at most, one after another; what one has made stays while the next is at work."""
        needs = [each.need for each in self.passes]
        before = accumulate((each.kept_bytes for each in self.passes), initial=0)
        return Need(
            ram=max((need.ram for need in needs), default=0),
            vram=max((need.vram for need in needs), default=0),
            disk=max((kept + need.disk for kept, need in zip(before, needs, strict=False)), default=0),
            read=sum(need.read for need in needs),
            seconds=sum(need.seconds for need in needs),
        )

    @property
    def calibrated(self) -> tuple[Rewrite, ...]:
        """The steps whose bytes come from the calibration pass."""
        steps = (placed.step for shard in self.shards for placed in shard.steps)
        return tuple(step for step in steps if isinstance(step, Rewrite) and step.calibrated)

    @property
    def measured(self) -> tuple[Rewrite, ...]:
        """The steps that store a scale of their inputs which a text is to tell."""
        steps = (placed.step for shard in self.shards for placed in shard.steps)
        return tuple(step for step in steps if isinstance(step, Rewrite) and is_to_be_measured(step))

    @property
    def equalizers(self) -> Mapping[str, Equalizer]:
        """Equalizers by weight."""
        steps = (placed.step for shard in self.shards for placed in shard.steps)
        return {step.name: step.equalizer for step in steps if isinstance(step, Rewrite) and step.equalizer}

    @property
    def equalizer_bytes(self) -> int:
        """Bytes of the factors of all equalizers."""
        return sum(equalizer.nbytes for equalizer in self.equalizers.values())

    @property
    def disk(self) -> int:
        """Bytes on disk at most: what passes made stays until all is in place, what they hold goes with them."""
        kept = sum(each.kept_bytes for each in self.passes)
        return max(self.passes_need.disk, kept + self.size + self.residual_bytes)

    @property
    def calibrated_bytes(self) -> int:
        """Bytes that come from the calibration pass."""
        codes = sum(spec.nbytes for step in self.calibrated for spec in step.encoder.parts)
        return codes + self.residual_bytes

    @property
    def residual_rank(self) -> int:
        """Rank of the adapter that is written beside the weights; 0 where there is none."""
        options = self.calibration.options if self.calibration else None
        return options.residual_rank if options else 0

    @property
    def residual_bytes(self) -> int:
        """Bytes of that adapter's tensors."""
        rank, each = self.residual_rank, FACTOR_DTYPE.itemsize
        return sum(rank * each * (step.rows + step.columns) for step in self.calibrated) if rank else 0

    @property
    def is_lossless_unmerged(self) -> bool:
        """Whether the base's own codes with the adapter as it is are the target: the output's grid is that of the base,
        or of the base as training saw it.
        """
        steps = [step for step in self.calibrated if step.updates]
        origins = [step.merge_base.format if step.merge_base else step.weight.format for step in steps]
        return bool(steps) and all(
            origin == step.encoder.format for origin, step in zip(origins, steps, strict=True)
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()

    @property
    def min_kept(self) -> float:
        """The gate; 0 where a rounding was asked for by name and no limit with it."""
        if self.options.min_kept is not None:
            return self.options.min_kept
        return DEFAULT_MIN_KEPT if self.options.rounding == "auto" else 0.0


def is_to_be_measured(step: Rewrite) -> bool:
    """Whether it stores a scale of its inputs that is not known yet."""
    return is_input_measured(step.encoder) and not step.encoder.is_measured


def cell_rows(device: Device, step: Rewrite) -> int:
    """Rows of a cell. Bytes may depend on it, so only the kind of device, the width and the blocks' height decide it.

    Of several steps of one weight, the greatest is a multiple of all.
    """
    if device.is_cpu:
        return step.encoder.cell_rows
    return max(1, GPU_CELL_ELEMENTS // max(step.columns, 1) // CELL_ROWS) * step.encoder.cell_rows


def tile_rows(step: Rewrite, buffer: int, cell: int, written: int | None = None) -> int:
    """Rows of a tile: whole cells of `cell` rows whose bytes fit in `buffer` as read, and in `written` as written.

    None: these fit in `buffer` as well.
    """
    rows = step.rows
    read_fit = buffer * rows // max(step.weight.decoder.row_offset(rows), 1)
    written_fit = (buffer if written is None else written) * rows // max(step.encoder.row_offset(rows), 1)
    return max(cell, min(read_fit, written_fit) // cell * cell)
