"""Whatever cannot end well is refused: with the right exit code, in one clear line, and without a trace.

Every case is a good base and a good adapter with one thing wrong. All cases run once, in process; the tests look
at what came of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig

import streamconv
from streamconv.cli import main
from streamconv.errors import (
    AdapterError,
    CheckpointError,
    InputError,
    OptionError,
    OutputError,
    ResourceError,
    StreamconvError,
    UnsupportedError,
    VerificationError,
)
from streamconv.output.journal import WORK_FOLDER
from streamconv.pipeline import Job, merge_options, prepare
from tests.checkpoint.files import raw_shard, write_index
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

PACKAGE = Path(streamconv.__file__).parent
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
CONV1D = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
SHARD = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")
DOWN_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@dataclass
class Place:
    """Inputs that a case may spoil; `base` is one file, `sharded` the same in several, `packed` the same in nf4."""

    folder: Path
    held: list[int] = field(default_factory=list)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def sharded(self) -> Path:
        return self.folder / "sharded"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def first_shard(self) -> Path:
        return min(self.sharded.glob("model-*.safetensors"))

    def weight_map(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.sharded / INDEX).read_text())["weight_map"]
        return found


Edit = Callable[[Place], object]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """`says` are pieces of the message: what it is about, then, where there is something to do, what."""

    error: type[StreamconvError]
    says: tuple[str, ...]
    edit: Edit = lambda place: None
    options: Options = field(default_factory=dict)
    run: Callable[[Place, Options], object] | None = None


def merge(place: Place, options: Options) -> object:
    """`base` and `adapter` among the options name others of the place's inputs."""
    inputs = {role: place.folder / options.get(role, role) for role in ("base", "adapter")}
    return streamconv.merge(**{**options, **inputs}, out=place.out)


def merge_into(name: str) -> Callable[[Place, Options], object]:
    def run(place: Place, options: Options) -> object:
        return streamconv.merge(place.base, place.adapter, place.folder / name, **options)

    return run


def prepare_without_adapter(place: Place, options: Options) -> object:
    given = merge_options(merge_base=options["merge_base"], max_vram="1GiB")
    return prepare(Job(str(place.base), None, given))


# -- one edit each ---------------------------------------------------------------------------------------------


def drop(path: str) -> Edit:
    return lambda place: (place.folder / path).unlink()


def put(path: str, content: bytes) -> Edit:
    return lambda place: (place.folder / path).write_bytes(content)


def config(**fields: Any) -> Edit:
    return lambda place: edit_json(place.adapter / CONFIG, **fields)


def base_config(**fields: Any) -> Edit:
    return lambda place: edit_json(place.base / "config.json", **fields)


def tensors(path: str, **changes: Any) -> Edit:
    return lambda place: edit_tensors(place.folder / path, **changes)


def with_values(path: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(place: Place) -> None:
        file = place.folder / path
        edit_tensors(file, put={name: change(read_tensors(file)[name].clone())})

    return edit


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 2] = torch.nan
    return tensor


def cut(path: str, nbytes: int) -> Edit:
    return lambda place: os.truncate(place.folder / path, (place.folder / path).stat().st_size - nbytes)


def lie(header: Mapping[str, Any], data_bytes: int) -> Edit:
    return put(f"base/{SHARD}", raw_shard(json.dumps(header), data_bytes))


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def remap(change: Callable[[dict[str, str]], Mapping[str, str]]) -> Edit:
    return lambda place: write_index(place.sharded, change(place.weight_map()))


def escape(place: Place) -> None:
    shutil.move(place.first_shard(), place.folder / "elsewhere.safetensors")
    first = place.first_shard().name.replace("00002", "00001")
    (place.sharded / first).symlink_to(place.folder / "elsewhere.safetensors")


def duplicate(place: Place) -> None:
    first, second, *_ = sorted(place.sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(read_tensors(second).items()))
    edit_tensors(first, put={name: tensor})


def shrink(place: Place) -> None:
    """An update that is small beside the steps of the grid."""
    factors = read_tensors(place.adapter / ADAPTER)
    edit_tensors(place.adapter / ADAPTER, put={name: factor / 50 for name, factor in factors.items()})


def only_pickles(place: Place) -> None:
    (place.base / SHARD).rename(place.base / "pytorch_model.bin")


def adapter_above(place: Place) -> None:
    """`out` would hold the adapter: as an experiment's folder holds its checkpoints."""
    place.out.mkdir()
    shutil.move(place.adapter, place.out / "adapter")
    (place.folder / "adapter").symlink_to(place.out / "adapter")


def filled(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("years of work")


def collection(place: Place) -> None:
    place.out.mkdir()
    shutil.copy(place.base / SHARD, place.out / "another.safetensors")


def locked(place: Place) -> None:
    (place.out / WORK_FOLDER).mkdir(parents=True)
    lock = os.open(place.out / WORK_FOLDER / "lock", os.O_RDWR | os.O_CREAT)
    os.write(lock, b"process 7 on elsewhere")
    fcntl.flock(lock, fcntl.LOCK_EX)
    place.held.append(lock)


def unfinished(place: Place) -> None:
    """What a run with another seed leaves that was stopped after its first shard."""
    options = merge_options(seed=7, max_vram="1GiB")
    plan = prepare(Job(str(place.base), str(place.adapter), options)).plan
    work = place.out / WORK_FOLDER
    work.mkdir(parents=True)
    (work / "plan.json").write_text(json.dumps(plan.fingerprint))
    line = {"finished": "model-00001-of-00002.safetensors", "sha256": "0" * 64, "sums": {}}
    (work / "journal.jsonl").write_text(json.dumps(line) + "\n")


STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
PACKED: Options = {"base": "packed"}
SHARDED: Options = {"base": "sharded"}
GPT2: Options = {"base": "gpt2", "adapter": "gpt2_adapter", "quant": "nf4"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"


def as_state(**fields: Any) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 32]} | fields
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


CASES: dict[str, Case] = {
    # -- options
    "quant unknown": Case(OptionError, ("--quant nf5", "use keep, none"), options={"quant": "nf5"}),
    "rounding unknown": Case(
        OptionError, ("--rounding up", "use auto"), options={"quant": "nf4", "rounding": "up"}
    ),
    "merge base unknown": Case(
        OptionError, ("--merge-base fp8", "use original"), options={"merge_base": "fp8"}
    ),
    "dtype unknown": Case(OptionError, ("--dtype fp17", "use auto, float32"), options={"dtype": "fp17"}),
    "quant against dtype": Case(
        OptionError,
        ("--quant float16 and --dtype bfloat16", "give one of them"),
        options={"quant": "float16", "dtype": "bfloat16"},
    ),
    "rounding of nothing": Case(
        OptionError, ("--rounding nearest", "add --quant"), options={"rounding": "nearest"}
    ),
    "merge base of a quantized base": Case(
        OptionError,
        ("--merge-base nf4-dq", "leave the option out"),
        options={**PACKED, "merge_base": "nf4-dq"},
    ),
    "merge base of no adapter": Case(
        OptionError,
        ("--merge-base nf4", "there is no adapter", "leave it out"),
        options={"merge_base": "nf4"},
        run=prepare_without_adapter,
    ),
    "size without unit": Case(OptionError, ("--max-ram", "write for example 5GB"), options={"max_ram": "5"}),
    "size of nothing": Case(
        OptionError, ("--max-shard-size", "not a positive size"), options={"max_shard_size": "0GB"}
    ),
    "share above one": Case(OptionError, ("--min-kept 20", "between 0 and 1"), options={"min_kept": 20}),
    "device unknown": Case(OptionError, ("--device tpu", "use auto, cpu, cuda"), options={"device": "tpu"}),
    "ignore names nothing": Case(
        OptionError,
        ("--ignore down_porj", "give part of a module path"),
        options={"quant": "nf4", "ignore": ["down_porj"]},
    ),
    "ignore is no pattern": Case(
        OptionError, ("--ignore re:[", "regular expression"), options={"quant": "nf4", "ignore": ["re:["]}
    ),
    "tokenizer unknown": Case(
        OptionError, ("--tokenizer mine", "use one of auto, base, adapter"), options={"tokenizer": "mine"}
    ),
    "tokenizer not there": Case(
        InputError, ("--tokenizer adapter", "holds no tokenizer files"), options={"tokenizer": "adapter"}
    ),
    "nothing to copy": Case(
        OptionError, ("--copy-extra *.txt", "matches no file", "/base"), options={"copy_extra": ["*.txt"]}
    ),
    "out is an unset variable": Case(
        OptionError,
        ("--out is empty", "name the folder"),
        run=lambda place, _: streamconv.merge("b", "a", ""),
    ),
    # -- the base
    "base missing": Case(
        CheckpointError, ("/base", "no such folder"), lambda place: shutil.rmtree(place.base)
    ),
    "base is a file": Case(
        CheckpointError,
        (f"base/{SHARD}", "give its folder"),
        options={"base": f"base/{SHARD}"},
    ),
    "base no id of the hub": Case(
        OptionError,
        ("'hf://org/model/file'", "expected org/name"),
        run=lambda place, _: streamconv.merge("hf://org/model/file", place.adapter, place.out),
    ),
    "base with two revisions": Case(
        OptionError,
        ("org/model@v1 has a revision already", "v2"),
        run=lambda place, _: streamconv.merge("org/model@v1", place.adapter, place.out, base_revision="v2"),
    ),
    "base is an adapter": Case(
        CheckpointError, ("/adapter is an adapter", "give it with --adapter"), options={"base": "adapter"}
    ),
    "config missing": Case(CheckpointError, ("config.json is missing",), drop("base/config.json")),
    "config torn": Case(
        CheckpointError, ("config.json", "not valid JSON"), put("base/config.json", b'{"model_type":')
    ),
    "weights missing": Case(CheckpointError, ("no weights found", SHARD), drop(f"base/{SHARD}")),
    "weights are pickles": Case(
        UnsupportedError, ("pytorch_model.bin", "convert them to safetensors"), only_pickles
    ),
    "shard is a pointer": Case(CheckpointError, (SHARD, "git lfs pull"), put(f"base/{SHARD}", LFS_POINTER)),
    "shard cut short": Case(
        CheckpointError, (SHARD, "cut short", "download it again"), cut(f"base/{SHARD}", 5)
    ),
    "header overlaps": Case(
        CheckpointError,
        (SHARD, "'b'", "overlaps"),
        lie({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12),
    ),
    "header claims more": Case(
        CheckpointError, (SHARD, "'a'", "takes 16 bytes"), lie({"a": entry(0, 8, [4])}, 8)
    ),
    "header names a type": Case(
        CheckpointError, (SHARD, "'a'", "dtype must be one of"), lie({"a": entry(0, 8, [2], "Q4")}, 8)
    ),
    "header repeats a tensor": Case(
        CheckpointError,
        (SHARD, "'a' stands twice"),
        put(f"base/{SHARD}", raw_shard(f'{{"a":{json.dumps(entry(0, 4, [1]))},"a":{{}}}}', 4)),
    ),
    "index missing": Case(
        CheckpointError, (INDEX, "download it as well"), drop(f"sharded/{INDEX}"), options=SHARDED
    ),
    "one shard missing": Case(
        CheckpointError,
        ("1 of ", "model-00001-of", "is missing"),
        lambda place: place.first_shard().unlink(),
        options=SHARDED,
    ),
    "index escapes": Case(
        CheckpointError,
        ("'../base/model.safetensors'", "not a file name inside the folder"),
        remap(lambda names: dict.fromkeys(names, f"../base/{SHARD}")),
        options=SHARDED,
    ),
    "shard links away": Case(
        CheckpointError, ("model-00001-of", "leads outside the folder"), escape, options=SHARDED
    ),
    "index names a tensor": Case(
        CheckpointError,
        ("'ghost'", "in no shard"),
        remap(lambda names: names | {"ghost": next(iter(names.values()))}),
        options=SHARDED,
    ),
    "tensor in two shards": Case(
        CheckpointError, ("is in two shards", "model-00001"), duplicate, options=SHARDED
    ),
    "NaN in the base": Case(
        InputError,
        (f"{Q_PROJ}: the value at row 1, column 2 is nan", "look for NaN"),
        with_values(f"base/{SHARD}", Q_PROJ, poison),
    ),
    "quant method unknown": Case(
        UnsupportedError,
        ("config.json says", "exl3", "give the 16-bit base"),
        base_config(quantization_config={"quant_method": "exl3"}),
    ),
    "GPTQ codes alone": Case(
        CheckpointError,
        ("q_proj.qweight", "incomplete", "download it again"),
        tensors(f"base/{SHARD}", rename={Q_PROJ: Q_PROJ.replace("weight", "qweight")}),
    ),
    "packed without a state": Case(
        CheckpointError,
        (Q_PROJ, "quant_state", "incomplete"),
        tensors(f"packed/{SHARD}", drop=[STATE]),
        options=PACKED,
    ),
    "packed without scales": Case(
        CheckpointError,
        (f"{Q_PROJ}.absmax is missing", "download it again"),
        tensors(f"packed/{SHARD}", drop=[f"{Q_PROJ}.absmax"]),
        options=PACKED,
    ),
    "state of another shape": Case(
        CheckpointError,
        (Q_PROJ, "expected"),
        tensors(f"packed/{SHARD}", put={STATE: as_state(shape=[64, 32])}),
        options=PACKED,
    ),
    "scale is infinite": Case(
        CheckpointError,
        (f"{Q_PROJ}: a stored scale is NaN or infinite", "damaged"),
        with_values(f"packed/{SHARD}", f"{Q_PROJ}.absmax", lambda scales: scales * torch.inf),
        options=PACKED,
    ),
    "Conv1D quantized": Case(
        UnsupportedError, ("c_attn.weight is a Conv1D", "choose a 16-bit output"), options=GPT2
    ),
    # -- the adapter
    "adapter missing": Case(
        CheckpointError, ("/adapter", "no such folder"), lambda place: shutil.rmtree(place.adapter)
    ),
    "adapter is a model": Case(
        AdapterError, ("this is a model, not an adapter", "--base"), options={"adapter": "base"}
    ),
    "adapter config missing": Case(
        AdapterError, (f"{CONFIG} is missing", "give the folder of a PEFT adapter"), drop(f"adapter/{CONFIG}")
    ),
    "adapter config torn": Case(
        AdapterError, (CONFIG, "not valid JSON"), put(f"adapter/{CONFIG}", b"{'peft_type': 'LORA'}")
    ),
    "adapter weights missing": Case(
        CheckpointError, ("no weights found", ADAPTER), drop(f"adapter/{ADAPTER}")
    ),
    "method unknown": Case(
        UnsupportedError, (CONFIG, "'QUANTUM'", "supported are LORA"), config(peft_type="QUANTUM")
    ),
    "method of prompts": Case(
        UnsupportedError, ("PROMPT_TUNING", "serve it unmerged"), config(peft_type="PROMPT_TUNING")
    ),
    "method not built": Case(UnsupportedError, ("GLORA", "merge_and_unload"), config(peft_type="GLORA")),
    "method not built that PEFT converts": Case(
        UnsupportedError, ("GRALORA", "convert_to_lora", "merge_and_unload"), config(peft_type="GRALORA")
    ),
    "randomized PiSSA": Case(
        UnsupportedError,
        ("init_lora_weights is 'pissa_niter_4'", "path_initial_model_for_weight_conversion"),
        config(init_lora_weights="pissa_niter_4"),
    ),
    "aLoRA": Case(
        UnsupportedError,
        ("alora_invocation_tokens", "serve it unmerged"),
        config(alora_invocation_tokens=[1, 2]),
    ),
    "field unknown": Case(
        UnsupportedError, (CONFIG, "'use_magic'", "remove it from the file"), config(use_magic=True)
    ),
    "rank of text": Case(AdapterError, (CONFIG, "r must be a positive whole number", "'4'"), config(r="4")),
    "rank of another adapter": Case(
        AdapterError,
        (LORA_A.replace("self_attn.q_proj", "mlp.down_proj"), "has rank 4", "not of one adapter"),
        config(r=8),
    ),
    "key left over": Case(
        AdapterError,
        ("1 tensors would not be used", "extra.gate"),
        tensors(f"adapter/{ADAPTER}", put={"base_model.model.extra.gate": torch.ones(2)}),
    ),
    "key not of PEFT": Case(
        AdapterError,
        ("the tensor lora_A", "save_pretrained"),
        tensors(f"adapter/{ADAPTER}", rename={LORA_A: "lora_A"}),
    ),
    "target unmatched": Case(
        AdapterError,
        (CONFIG, "'up_proj'", "holds no tensors of it", "--allow-missing"),
        config(target_modules=["q_proj", "down_proj", "up_proj"]),
    ),
    "module not in the base": Case(
        AdapterError,
        ("model.layers.9.self_attn.q_proj.weight", "does not have", "is this the base"),
        tensors(
            f"adapter/{ADAPTER}",
            rename={name: name.replace("layers.0", "layers.9") for name in (LORA_A, LORA_B)},
        ),
    ),
    "half a pair": Case(
        AdapterError,
        ("q_proj.lora_B.weight is missing", "not complete"),
        tensors(f"adapter/{ADAPTER}", drop=[LORA_B]),
    ),
    "shapes of another base": Case(
        AdapterError,
        ("mlp.down_proj.weight of the base", DOWN_A, "trained on this base"),
        with_values(f"adapter/{ADAPTER}", DOWN_A, lambda a: a[:, :-1]),
    ),
    "base of another family": Case(
        AdapterError,
        ("does not have", "is this the base the adapter was trained on"),
        options={"base": "gpt2"},
    ),
    "integers in the adapter": Case(
        AdapterError,
        (LORA_A, "stored as I8", "saved in floating point"),
        with_values(f"adapter/{ADAPTER}", LORA_A, lambda a: a.to(torch.int8)),
    ),
    "NaN in the adapter": Case(
        AdapterError,
        (ADAPTER, LORA_A, "holds NaN", "take an earlier checkpoint"),
        with_values(f"adapter/{ADAPTER}", LORA_A, poison),
    ),
    "adapter untrained": Case(
        AdapterError,
        ("/adapter", "would change nothing"),
        lambda place: edit_tensors(
            place.adapter / ADAPTER,
            put={
                name: torch.zeros_like(tensor)
                for name, tensor in read_tensors(place.adapter / ADAPTER).items()
                if "lora_B" in name
            },
        ),
    ),
    "module not saved": Case(
        AdapterError, (CONFIG, "modules_to_save", "'lm_head'"), config(modules_to_save=["lm_head"])
    ),
    "magnitude without DoRA": Case(
        AdapterError,
        ("lora_magnitude_vector", "use_dora is not set"),
        tensors(
            f"adapter/{ADAPTER}",
            put={LORA_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
        ),
    ),
    # -- the output folder
    "out inside the base": Case(
        OutputError, ("the base", "overlap", "choose another --out"), run=merge_into("base/merged")
    ),
    "out is the adapter": Case(
        OutputError, ("the adapter", "overlap", "choose another --out"), run=merge_into("adapter")
    ),
    "out above the adapter": Case(
        OutputError, ("the adapter", "overlap", "choose another --out"), adapter_above
    ),
    "out not empty": Case(OutputError, ("/out is not empty", "thesis.tex", "--overwrite"), filled),
    "out is a collection": Case(
        OutputError,
        ("/out holds another.safetensors but no config.json", "choose another --out"),
        collection,
        {"overwrite": True},
    ),
    "out is of other things": Case(
        OutputError,
        ("/out holds thesis.tex and no model", "choose another --out"),
        filled,
        {"overwrite": True},
    ),
    "out is a file": Case(OutputError, ("/out is not a folder", "choose another --out"), put("out", b"text")),
    "out in a file": Case(
        OutputError,
        ("base/config.json/out", "Not a directory", "choose another --out"),
        run=lambda place, _: streamconv.merge(
            place.sharded, place.adapter, place.base / "config.json" / "out"
        ),
    ),
    "out of a long name": Case(
        OutputError, ("File name too long", "choose another --out"), run=merge_into("x" * 300)
    ),
    "out in use": Case(
        OutputError, ("in use by another run (process 7 on elsewhere)", "wait for it"), locked
    ),
    "out of another run": Case(
        OutputError,
        ("unfinished run", "options.seed: then 7, now 0", "--no-resume to discard it"),
        unfinished,
    ),
    # -- resources, quality
    "memory too small": Case(
        ResourceError, ("--max-ram is too small", "MiB; allow that much"), options={"max_ram": "64MB"}
    ),
    "no such GPU": Case(ResourceError, ("--device cuda:63", "use "), options={"device": "cuda:63"}),
    "fine-tune lost": Case(
        VerificationError,
        ("of the fine-tune survives", "--rounding stochastic"),
        shrink,
        {"merge_base": "nf4", "quant": "nf4", "rounding": "nearest", "min_kept": 0.9},
    ),
}


@dataclass(frozen=True)
class Outcome:
    error: BaseException | None
    before: Mapping[str, str]
    after: Mapping[str, str]

    @property
    def message(self) -> str:
        return str(self.error)

    def raised_at(self) -> str:
        """File and line, inside the package, of the raise."""
        assert self.error is not None
        frames = [
            frame
            for frame in traceback.extract_tb(self.error.__traceback__)
            if Path(frame.filename).is_relative_to(PACKAGE)
        ]
        return f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}"


def hashes(folder: Path) -> dict[str, str]:
    """Content by name of all that lies in `folder`, work folders aside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and WORK_FOLDER not in path.parts
    }


def outcome(case: Case, good: Path, folder: Path) -> Outcome:
    place = Place(Path(shutil.copytree(good, folder)))
    case.edit(place)
    before = hashes(folder)
    error: BaseException | None = None
    try:
        (case.run or merge)(place, case.options)
    except Exception as caught:  # what kind it is, the test of this case tells
        error = caught
    finally:
        for descriptor in place.held:
            os.close(descriptor)
    return Outcome(error, before, hashes(folder))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs with nothing wrong."""
    folder = tmp_path_factory.mktemp("good")
    base = save_base(folder / "base", llama_config())
    save_base(folder / "sharded", llama_config(), max_shard_size="30KB")
    streamconv.convert(base, folder / "packed", quant="nf4", card=False)
    save_adapter(folder / "adapter", base, LORA)
    (folder / "adapter" / "README.md").unlink()
    save_adapter(folder / "gpt2_adapter", save_base(folder / "gpt2", gpt2_config()), CONV1D)
    return folder


@pytest.fixture(scope="module")
def outcomes(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    folder = tmp_path_factory.mktemp("cases")
    return {
        name: outcome(case, good, folder / str(number)) for number, (name, case) in enumerate(CASES.items())
    }


def test_the_inputs_are_good_before_they_are_spoiled(good: Path, tmp_path: Path) -> None:
    for number, base in enumerate(("base", "sharded", "packed")):
        streamconv.merge(good / base, good / "adapter", tmp_path / str(number))
    streamconv.merge(good / "gpt2", good / "gpt2_adapter", tmp_path / "gpt2")


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_clear_line(name: str, outcomes: Mapping[str, Outcome]) -> None:
    case, found = CASES[name], outcomes[name]
    assert isinstance(found.error, StreamconvError), "".join(
        traceback.format_exception(found.error) if found.error else ["nothing was raised"]
    )
    assert type(found.error) is case.error
    assert found.message.isprintable(), "one line, nothing for the terminal to obey"
    assert len(found.message) < 700
    places = [found.message.find(piece) for piece in case.says]
    assert -1 not in places, f"{case.says} in: {found.message}"
    assert places == sorted(places), "what it is about comes first, what to do last"


@pytest.mark.parametrize("name", CASES)
def test_it_leaves_no_trace(name: str, outcomes: Mapping[str, Outcome]) -> None:
    assert outcomes[name].after == outcomes[name].before


@pytest.mark.parametrize("name", CASES)
def test_the_exit_code_says_whose_turn_it_is(name: str, outcomes: Mapping[str, Outcome]) -> None:
    codes = {OptionError: 2, InputError: 3, OutputError: 4, ResourceError: 5, VerificationError: 7}
    expected = next(code for kind, code in codes.items() if issubclass(CASES[name].error, kind))
    error = outcomes[name].error
    assert isinstance(error, StreamconvError)
    assert error.exit_code == expected


def test_they_are_many(outcomes: Mapping[str, Outcome]) -> None:
    """By the line that raises: different words for one check count once."""
    places = {found.raised_at() for found in outcomes.values()}
    assert len(places) >= 60, sorted(places)


# -- as a script sees it ---------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "streamconv", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_a_script_sees_the_code_and_one_line(good: Path, tmp_path: Path) -> None:
    found = command("merge", "--base", good / "base", "--adapter", good / "base", "-o", tmp_path / "out")
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr.startswith("Error: ")
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_it_was_raised(good: Path, tmp_path: Path) -> None:
    found = command("plan", "--base", good / "base", "--quant", "nf5", "--debug")
    assert found.returncode != 0
    assert "Traceback" in found.stderr
    assert found.stderr.rstrip().rpartition("\n")[2].startswith("streamconv.errors.OptionError: --quant nf5")


def test_a_name_in_a_file_cannot_break_the_line(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good / "base", tmp_path / "base"))
    name = "\x1b[2Jgone\nError: all is well.qweight"
    edit_tensors(folder / SHARD, rename={Q_PROJ: name})
    found = CliRunner().invoke(main, ["inspect", str(folder)])
    assert found.exit_code == 3
    assert found.stderr.count("\n") == 1
    assert "\\x1b[2Jgone\\nError" in found.stderr
