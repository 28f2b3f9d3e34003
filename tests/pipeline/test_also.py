"""Further outputs of a run: what a run of its own gives each, from one reading; together or not at all."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import OptionError, OutputError, ResourceError, VerificationError
from streamconv.output import place
from streamconv.output.manifest import Report
from streamconv.output.publish import publish_output
from streamconv.pipeline import Prepared, build_job, prepare, runner
from streamconv.running.schedule import bytes_read
from streamconv.storage import open_storage
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=136, layers=2, vocabulary=80)
BIASES = {f"model.layers.{layer}.self_attn.q_proj.bias": (64,) for layer in range(SIZES.layers)}

Tree = Mapping[str, str]


@dataclass(frozen=True)
class Inputs:
    """A 16-bit base with biases, the same in nf4-dq, and adapters for some of the modules, the light one of tiny
    updates.
    """

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def merge(self, out: Path, adapter: str = "adapter", **options: Any) -> Report:
        return streamconv.merge(self.base, self.folder / adapter, out, device="cpu", **options)

    def prepared(self, **options: Any) -> Prepared:
        return prepare(build_job(self.base, self.adapter, device="cpu", **options))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("also")
    write_base(folder / "base", SIZES.shapes | BIASES)
    write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "up_proj"))
    write_adapter(folder / "light", SIZES.shapes, targets=("q_proj", "up_proj"), size=0.001)
    streamconv.convert(folder / "base", folder / "nf4-dq", quant="nf4-dq", device="cpu")
    return Inputs(folder)


@pytest.fixture
def base_read(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many bytes runs have read from the bases; planning reads a few of quantized ones."""
    bases = (inputs.base, inputs.folder / "nf4-dq")
    read = 0
    read_into = TensorReader.read_into

    def counting(reader: TensorReader, tensor: StoredTensor, start: int, out: memoryview) -> None:
        nonlocal read
        if threading.current_thread().name == "streamconv-reader" and Path(tensor.file.path).parent in bases:
            read += len(out)
        read_into(reader, tensor, start, out)

    monkeypatch.setattr(TensorReader, "read_into", counting)
    return lambda: read


def tree(folder: Path, *leave_out: str) -> Tree:
    """SHA-256 of every file by its path, but for those in the folders `leave_out`; folders end in a slash."""
    return {
        str(path.relative_to(folder)) + "/" * path.is_dir(): ""
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in leave_out
    }


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


# -- the same as alone -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Formats, the main one first, and what else is asked for."""

    formats: tuple[str, ...]
    base: str = "base"
    merges: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, inputs: Inputs, out: Path, quant: str, also: Sequence[str] = (), **options: Any) -> Report:
        given = {"quant": quant, "also": also, "device": "cpu", **self.options, **options}
        base = inputs.folder / self.base
        if self.merges:
            return streamconv.merge(base, inputs.adapter, out, **given)
        return streamconv.convert(base, out, **given)


T = {"merge_base": "nf4-dq"}
FINE = {
    "rounding": "stochastic",
    "seed": 5,
    "dtype": "float16",
    "max_shard_size": "30KB",
    "ignore": ["up_proj"],
}
CASES = {
    "onto the original": Case(("keep", "nf4-dq", "int8")),
    "onto the base of training": Case(("nf4-dq", "none", "nf4", "int8"), options=T),
    "a quantized base": Case(("keep", "none", "int8"), "nf4-dq"),
    "without an adapter": Case(("none", "nf4", "fp4-dq"), merges=False),
    "every option": Case(("none", "nf4", "int8"), options=FINE),
    "two types": Case(("bfloat16", "float32")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_what_a_run_of_its_own_gives(
    inputs: Inputs, tmp_path: Path, base_read: Callable[[], int], name: str
) -> None:
    """The whole folder: shards, index, config, card, manifest, recipe, copied files. And the base is read once."""
    case = CASES[name]
    main, *also = case.formats
    report = case.run(inputs, tmp_path / "out", main, also)
    read = base_read()
    alone = []
    for quant in case.formats:
        # Alone, what is not quantized cannot be rounded.
        rounds = quant not in ("none", "keep") or "rounding" not in case.options
        single = case.run(
            inputs, tmp_path / "alone" / quant, quant, **({} if rounds else {"rounding": "auto"})
        )
        alone.append(single.bytes_read)
        mine = report if quant == main else report.also[quant]
        assert mine.shards == single.shards
        assert mine.kept_by_weight == single.kept_by_weight
        assert (mine.quant, mine.rounding, mine.bytes_written) == (
            single.quant,
            single.rounding,
            single.bytes_written,
        )
    for quant in also:
        assert tree(tmp_path / "out" / quant) == tree(tmp_path / "alone" / quant)
        streamconv.verify(tmp_path / "out" / quant)
    assert tree(tmp_path / "out", *also) == tree(tmp_path / "alone" / main)
    assert list(report.also) == also
    # Scales of a quantized base are read by the output that copies them, and for those that need them to decode.
    tensors = read_index(open_storage(str(inputs.folder / case.base))).tensors
    scales = sum(tensor.nbytes for name, tensor in tensors.items() if ".weight." in name)
    assert max(alone) <= read <= max(alone) + scales
    assert read < 0.7 * sum(alone)
    assert report.bytes_read == read


def test_a_rounding_that_no_output_could_use_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nearest chooses codes, but the output is not quantized"):
        inputs.merge(tmp_path / "out", also=["float32"], rounding="nearest")


@pytest.mark.parametrize(
    ("quant", "also", "message"),
    [
        ("nf4", ["nf4"], "--also nf4 would give the same files as nf4"),
        ("keep", ["none"], "--also none would give the same files as keep"),
        ("none", ["int8", "bfloat16"], "--also bfloat16 would give the same files as none"),
        ("none", ["nf4", "NF4"], "--also nf4 stands twice"),
        ("none", ["keep"], "--also keep is not known; use none, or a format"),
        ("none", ["../nf4"], r"--also \.\./nf4 is not known"),
    ],
)
def test_an_output_that_would_be_made_twice_or_is_not_known_is_refused(
    inputs: Inputs, tmp_path: Path, quant: str, also: list[str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        inputs.merge(tmp_path / "out", quant=quant, also=also)
    assert not (tmp_path / "out").exists()


# -- budgets -----------------------------------------------------------------------------------------------------


def test_memory_and_reading_are_planned_for_all_together(inputs: Inputs) -> None:
    alone, together = inputs.prepared(), inputs.prepared(also=["nf4-dq", "int8"])
    assert len({plan.memory for plan in together.plans}) == 1
    assert together.plan.memory.ram > alone.plan.memory.ram
    assert together.plan.digest == alone.plan.digest  # but it is the same output
    assert bytes_read(together.plans) == bytes_read(alone.plans)


def test_a_budget_that_is_enough_for_each_but_not_for_all_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """At plan time: no folder is made."""
    with pytest.raises(ResourceError, match=r"--max-ram is too small.* at least \d+MiB") as caught:
        inputs.prepared(also=["nf4-dq", "int8"], max_ram="50MiB")
    least = int(str(caught.value).split("at least ")[1].split("MiB")[0])
    options: dict[str, Any] = {"also": ["nf4-dq", "int8"], "max_ram": f"{least - 1}MiB"}
    for quant in ("none", "nf4-dq", "int8"):
        inputs.prepared(quant=quant, max_ram=options["max_ram"])
    with pytest.raises(ResourceError, match="--max-ram is too small"):
        inputs.merge(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    inputs.prepared(**options | {"max_ram": f"{least}MiB"})


def test_a_disk_that_has_room_for_each_but_not_for_all_is_refused(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [plan.size for plan in inputs.prepared(also=["int8"]).plans]
    needed = sum(sizes) + 2 * place.SPARE_DISK_BYTES
    monkeypatch.setattr(place, "free_bytes", lambda path: needed - 1)
    with pytest.raises(ResourceError, match=r"int8 with the other outputs needs .*: 1 B are missing"):
        inputs.merge(tmp_path / "out", also=["int8"])
    monkeypatch.setattr(place, "free_bytes", lambda path: needed)
    inputs.merge(tmp_path / "out", also=["int8"])


# -- the place ---------------------------------------------------------------------------------------------------


def test_what_is_there_already_is_not_made_again(
    inputs: Inputs, tmp_path: Path, base_read: Callable[[], int]
) -> None:
    """Whichever of the outputs an earlier run has made, in whatever way."""
    out = tmp_path / "out"
    inputs.merge(out)
    before = tree(out)
    report = inputs.merge(out, also=["int8"])
    assert (report.resumed, report.seconds, report.also["int8"].resumed) == (True, 0.0, False)
    assert tree(out, "int8") == before
    inputs.merge(tmp_path / "other" / "nf4", quant="nf4")
    report = inputs.merge(tmp_path / "other", also=["nf4"])
    assert (report.resumed, report.also["nf4"].resumed) == (False, True)
    assert tree(tmp_path / "other", "nf4") == before
    read = base_read()
    report = inputs.merge(tmp_path / "other", also=["nf4"])
    assert report.resumed
    assert report.also["nf4"].resumed
    assert base_read() == read


def test_the_folder_of_each_output_must_be_empty_or_its_own(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "out" / "int8").mkdir(parents=True)
    inputs.prepared(also=["int8"])
    (tmp_path / "out" / "int8" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"out/int8 is not empty \(thesis\.tex\)"):
        inputs.merge(tmp_path / "out", also=["int8"])
    assert tree(tmp_path / "out").keys() == {"int8/", "int8/thesis.tex"}
    inputs.merge(tmp_path / "out", also=["nf4"])  # which it is not in the way of
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "nf4").write_text("no folder")
    for also in ([], ["nf4"]):
        with pytest.raises(OutputError, match=r"file is not empty \(nf4\)"):
            inputs.merge(tmp_path / "file", also=also)


def test_overwriting_replaces_the_outputs_that_are_asked_for(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inputs.merge(out, also=["int8", "nf4"])
    old = tree(out)
    with pytest.raises(OutputError, match="out is not empty"):
        inputs.merge(out, also=["nf4"], dtype="float16")
    inputs.merge(out, also=["nf4"], dtype="float16", overwrite=True)
    assert {name for name in old if tree(out)[name] == old[name]} >= {
        name for name in old if name.startswith("int8/")
    }
    assert config_of(out)["dtype"] == config_of(out / "nf4")["dtype"] == "float16"
    assert config_of(out / "int8")["dtype"] == "bfloat16"


def test_links_must_not_make_outputs_meet(inputs: Inputs, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    for target in (".", "int8", "..", "int8/nf4", ".streamconv"):
        (out / "nf4").unlink(missing_ok=True)
        (out / "nf4").symlink_to(target)
        with pytest.raises(OutputError, match=r"outputs must lie apart|is not empty"):
            inputs.merge(out, also=["int8", "nf4"])
        assert not (out / "config.json").exists()
    (out / "nf4").unlink()
    (out / "nf4").symlink_to(elsewhere)  # another disk, say
    inputs.merge(out, also=["int8", "nf4"])
    assert config_of(elsewhere)["quantization_config"]["load_in_4bit"]


def test_an_input_within_an_output_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    base = write_base(tmp_path / "out" / "none", SIZES.shapes)
    before = tree(tmp_path)
    for options in ({"quant": "nf4"}, {"quant": "nf4", "also": ["none"]}):
        with pytest.raises(OutputError, match="overlap, and inputs are never written to"):
            streamconv.merge(base, inputs.adapter, tmp_path / "out", overwrite=True, **options)
    assert tree(tmp_path) == before


# -- together or not at all --------------------------------------------------------------------------------------


def test_interrupted_between_two_it_publishes_the_rest(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_read: Callable[[], int]
) -> None:
    """The main output comes last: where it is, all are."""
    out = tmp_path / "out"
    published: list[Path] = []

    def fail(folder: Path, *given: Any) -> None:
        if len(published) == 2:
            raise KeyboardInterrupt
        published.append(folder)
        publish_output(folder, *given)

    monkeypatch.setattr(runner, "publish_output", fail)
    with pytest.raises(KeyboardInterrupt):
        inputs.merge(out, also=["nf4", "int8"])
    assert not (out / "config.json").exists()
    assert {out / "nf4", out / "int8"} == set(published)
    monkeypatch.setattr(runner, "publish_output", publish_output)
    read = base_read()
    report = inputs.merge(out, also=["nf4", "int8"])
    assert base_read() == read
    assert report.resumed
    inputs.merge(tmp_path / "again", also=["nf4", "int8"])
    assert tree(out) == tree(tmp_path / "again")


LOSSY: Mapping[str, Any] = {"adapter": "light", "merge_base": "nf4", "rounding": "nearest", "min_kept": 0.5}


def test_one_that_lost_the_fine_tune_keeps_all_from_being_published(
    inputs: Inputs, tmp_path: Path, base_read: Callable[[], int]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match=r"rounding to nf4 .* so nothing was published") as caught:
        inputs.merge(out, also=["nf4", "int8"], **LOSSY)
    assert f"--quant keep -o {out}; --quant int8 -o {out}/int8" in str(caught.value)
    assert not [name for name in tree(out) if ".streamconv" not in name and not name.endswith("/")]
    # What passed need not be computed again, whether it is asked for alone or with the others.
    read = base_read()
    inputs.merge(out / "int8", quant="int8", **LOSSY)
    inputs.merge(out, also=["int8"], **LOSSY)
    assert base_read() == read
    inputs.merge(tmp_path / "again", also=["int8"], **LOSSY)
    assert tree(out, "nf4") == tree(tmp_path / "again")
    with pytest.raises(VerificationError, match="rounding to nf4 "):
        inputs.merge(out, also=["nf4", "int8"], **LOSSY)
    # And what was refused makes way for something better.
    report = inputs.merge(out, also=["nf4"], **{**LOSSY, "rounding": "auto"})
    assert report.resumed
    assert (report.also["nf4"].kept_delta or 0) > 0.9


def test_every_output_that_lost_it_is_named(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(VerificationError) as caught:
        inputs.merge(tmp_path / "out", quant="nf4", also=["nf4-dq"], **LOSSY)
    assert "nearest rounding to nf4 (" in str(caught.value)
    assert "nearest rounding to nf4-dq (" in str(caught.value)
    assert "a run of its own" not in str(caught.value)


def test_an_unfinished_run_of_others_is_not_discarded(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of a further output as in any."""

    def fail(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "publish_output", fail)
    with pytest.raises(KeyboardInterrupt):
        inputs.merge(tmp_path / "out", also=["nf4"], seed=1)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="out holds an unfinished run with other inputs or options"):
        inputs.merge(tmp_path / "out", also=["nf4"], seed=2)
    with pytest.raises(OutputError, match="nf4 holds an unfinished run with other inputs or options"):
        inputs.merge(tmp_path / "out" / "nf4", quant="nf4", seed=2)
    inputs.merge(tmp_path / "out", also=["nf4"], seed=2, resume=False)
    assert json.loads((tmp_path / "out" / "nf4" / "streamconv-recipe.json").read_text())["seed"] == 2
