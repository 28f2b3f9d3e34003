"""Files in every format for `tools/study/formats`: ours, their values, and what owners' libraries make of the same.

Values are float32 tensors of a whole model by name, as streamconv decodes its own files; `tools/foreign` shows that the
programs that open the files decode them to the same.
"""

from __future__ import annotations

import functools
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

import streamconv
from streamconv.dtypes import DENSE
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import Grouped, InputScaled
from streamconv.forward.weights import WeightSource
from streamconv.pipeline.job import build_job
from streamconv.pipeline.preparation import prepare
from streamconv.planning.devices import resolve_device
from tools.bench.results import ROOT
from tools.study.beds import Bed, read_tensors
from tools.study.run import deltas

# The greatest usual group of which all rows of the beds are whole: 576 and 704 columns are no multiple of 128.
GROUP = 64
Values = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Made:
    """A file's content: `quantized` are the names of weights that it does not hold in 16 bits, `bits` what each of
    their elements takes of it, or of all matrices where there are none. `rounding` and `kept_delta` are the report's.
    """

    values: Values
    quantized: tuple[str, ...]
    bits: float
    rounding: str | None = None
    kept_delta: float | None = None


# -- ours ----------------------------------------------------------------------------------------------------


def is_quantized(name: str) -> bool:
    return FORMATS[name].grid is not None


def group_options(name: str) -> dict[str, Any]:
    quant = FORMATS[name]
    return {"group_size": GROUP} if isinstance(quant, Grouped) and GROUP in quant.group_sizes else {}


def measures_inputs(name: str) -> bool:
    """Whether files of a format need text by which scales of activations are measured, however codes are chosen."""
    quant = FORMATS[name]
    return isinstance(quant, InputScaled) and quant.measures_inputs


def calibration(bed: Bed) -> dict[str, Any]:
    """Options of calibration with the bed's text, but that errors of all outputs count alike, for time."""
    return {
        "calibration": bed.calibration,
        "calibration_tokens": bed.calibration_tokens,
        "calibration_sequence_length": bed.calibration_length,
        "calibration_gradient_tokens": 0,
    }


def merged(bed: Bed, base: Path, out: Path, **options: Any) -> Made:
    """What `streamconv merge` writes with `options`; the folder `out` is left, for what is kept of it."""
    shutil.rmtree(out, ignore_errors=True)
    report = streamconv.merge(base, bed.adapter, out, card=False, **options)
    return opened(out, report.rounding, report.kept_delta)


def converted(base: Path, out: Path, **options: Any) -> Made:
    shutil.rmtree(out, ignore_errors=True)
    report = streamconv.convert(base, out, card=False, **options)
    return opened(out, report.rounding, report.kept_delta)


def opened(folder: Path, rounding: str | None = None, kept_delta: float | None = None) -> Made:
    """Values of a file of ours, and the bytes of its parts."""
    prepared = prepare(build_job(str(folder), quant="none", dtype="float32"))
    with WeightSource(prepared.plan, resolve_device("cpu"), lambda _: None) as source:
        values = {name: source.read(name) for name in source.names}
    weights = find_weights(prepared.base.index)
    quantized = [each for each in weights if each.format not in DENSE]
    counted = quantized or [each for each in weights if len(each.shape) > 1]
    taken = sum(part.nbytes for each in counted for part in each.parts.values())
    held = sum(values[each.name].numel() for each in counted)
    return Made(values, tuple(each.name for each in quantized), 8 * taken / held, rounding, kept_delta)


# -- theirs --------------------------------------------------------------------------------------------------


class OwnerError(Exception):
    """An owner's library did not make a file."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A library that writes a format: `module` of tools/owners asks it, in `environment` of tools/foreign_environment
    or, where that is None, in streamconv's own. `label` goes into tables.
    """

    module: str
    label: str
    environment: str | None
    scales: str = "bfloat16"


BITSANDBYTES = Owner("by_bitsandbytes", "bitsandbytes", None)
COMPRESSED_TENSORS = Owner("by_compressed_tensors", "compressed-tensors", "transformers")
FORMULA = Owner("by_formula", "the method's formula", None)
LLAMACPP = Owner("by_llamacpp", "llama.cpp", "llamacpp")
MLX = Owner("by_mlx", "MLX", "mlx")
TRANSFORMERS = Owner("by_transformers", "transformers", "transformers")
_BY_PREFIX = {
    "nf4": BITSANDBYTES,
    "fp4": BITSANDBYTES,
    "int8": BITSANDBYTES,
    "gptq": FORMULA,
    "awq": FORMULA,
    "fp8-block": TRANSFORMERS,
    "mlx": MLX,
    "gguf:": LLAMACPP,
}


def owner_of(name: str) -> Owner:
    """Who has the say on a quantized format; most are compressed-tensors'."""
    return next(
        (owner for prefix, owner in _BY_PREFIX.items() if name.startswith(prefix)), COMPRESSED_TENSORS
    )


def requantized(name: str, target: Values, like: Made, work: Path, template: Path) -> tuple[Made, str]:
    """`target` as the owner of a format quantizes it by nearest rounding, and with which versions.

    What is quantized is what `like`, our file of the format, quantizes; all else is as it is there. `template` is that
    file's folder.
    """
    owner = owner_of(name)
    asked, answered = work / "asked.safetensors", work / "answered.safetensors"
    names = target if owner is LLAMACPP else like.quantized
    safetensors.torch.save_file({each: target[each].contiguous() for each in names}, asked)
    question = [str(asked), str(answered), name, "--group-size", str(GROUP), "--scales", owner.scales]
    if owner is LLAMACPP:
        (file,) = template.glob("*.gguf")
        question += ["--template", str(file)]
    _ask(owner, shlex.join(question))
    found = safetensors.torch.load_file(answered)
    values = {**like.values, **{each: found[each] for each in like.quantized}}
    with safe_open(answered, framework="pt") as file:
        said = file.metadata()
    taken = int(said.pop("bytes"))
    held = sum(values[each].numel() for each in like.quantized)
    asked.unlink()
    answered.unlink()
    return Made(values, like.quantized, 8 * taken / held), ", ".join(
        f"{key} {said[key]}" for key in sorted(said)
    )


def _ask(owner: Owner, question: str) -> None:
    """Have the library answer; its messages are on stderr."""
    process = _asking(owner)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{question}\n")
    process.stdin.flush()
    while (line := process.stdout.readline()) != "done\n":
        if not line:
            _asking.cache_clear()
            raise OwnerError(f"{owner.label} did not answer {question}; its message is above")


@functools.cache
def _asking(owner: Owner) -> subprocess.Popen[str]:
    """A process that has the library open and ends when this one does."""
    python = sys.executable
    if owner.environment is not None:
        command = [str(ROOT / "tools/foreign_environment"), owner.environment]
        python = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return subprocess.Popen(
        [python, "-m", f"tools.owners.{owner.module}"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def give_awq_its_owners_grid(folder: Path, base: Values) -> None:
    """Write an AWQ file of ours anew as AutoAWQ would: scales are greatest magnitudes over 7, and ours over 7.5."""
    (path,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    for name in [name.removesuffix("qweight") for name in tensors if name.endswith("qweight")]:
        weight = base[f"{name}weight"]
        groups = weight.view(weight.shape[0], -1, GROUP)
        scales = (groups.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 7).half()
        codes = ((groups / scales.float()).round() + 8).clamp(0, 15).view(weight.shape).T.int()
        words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
        for shift, place in enumerate(_AWQ_PLACES):
            words |= codes[:, place::8] << 4 * shift
        tensors[f"{name}qweight"] = words
        tensors[f"{name}scales"] = scales.squeeze(-1).T.contiguous()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


# -- both ----------------------------------------------------------------------------------------------------


def with_update(values: Values, bed: Bed) -> Values:
    """`values` with the adapter's update added, in float32, by torch."""
    found = dict(values)
    for module, delta in deltas(bed.adapter):
        found[f"{module}.weight"] = found[f"{module}.weight"] + delta
    return found


def dense_base(bed: Bed) -> Values:
    return {name: each.float() for name, each in read_tensors(bed.base).items()}


def kept_of(result: Values, base: Values, bed: Bed) -> float:
    """Kept delta as the report of a merge has it: <result - base, D> / ||D||^2 over all adapted weights together."""
    along = square = 0.0
    for module, delta in deltas(bed.adapter):
        name, wide = f"{module}.weight", delta.double()
        along += float(((result[name] - base[name]).double() * wide).sum())
        square += float(wide.square().sum())
    return along / square


def squared_error(result: Values, target: Values, names: Sequence[str]) -> float:
    """Of the weights `names` together, beside the sum of their squares."""
    error = sum(float((result[name] - target[name]).double().square().sum()) for name in names)
    return error / sum(float(target[name].double().square().sum()) for name in names)


def digest(values: Values) -> str:
    """Of all values together, to find files that say the same."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        whole.update(name.encode())
        whole.update(values[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
