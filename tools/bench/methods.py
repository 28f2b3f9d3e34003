"""What each adapter method costs on one large weight: a merge of its own process, beside one of plain LoRA.

The weight is [8192, 28672] in bf16, the widest of llama-70b, and adapters are bare tensors of the sizes that people
train. Times are less those of a command that imports as much and merges nothing; memory is anonymous, above an
interpreter with torch loaded. Processor time is what is compared, as it depends least on what else a machine does.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamconv.checkpoint.types import Shape
from tools.bench.models import WEIGHT_STD
from tools.bench.results import FOLDER, RESULTS, load, machine, save
from tools.measure import Cost, measure, torch_anon_bytes

OUT, IN = 8192, 28672
MODULE = "model.layers.0.mlp.down_proj"
PLAIN = "LoRA, r = 16"
TIME_LIMIT = 3.0
SLOW_S = 30  # of what takes longer, one pair tells
NO_RANK: Mapping[str, Any] = {"r": None, "lora_alpha": None}


@dataclass(frozen=True, slots=True)
class Case:
    """An adapter: shapes of its tensors below the module, or of all modules, and what its config has.

    `reason`: why it may take more than `TIME_LIMIT` times as long as plain LoRA. `max_ram` is what the merge may need.
    """

    peft_type: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Shape]
    shared: Mapping[str, Shape] = field(default_factory=dict)
    reason: str = ""
    max_ram: str = "2GiB"


@dataclass(frozen=True, slots=True)
class Measured:
    """One method. Times less start-up; `to_lora` of processor time, the median of pairs, each one after the other."""

    name: str
    peft_type: str
    wall_s: float
    cpu_s: float
    to_lora: float
    peak_bytes: int
    planned_bytes: int
    runs: int


def factors(a: str, b: str, rank: int) -> Mapping[str, Shape]:
    return {a: (rank, IN), b: (OUT, rank)}


LORA = factors("lora_A.weight", "lora_B.weight", 16)
VBLORA = {"topk": 2, "num_vectors": 256, "vector_length": 256, "lora_alpha": None}
CASES: Mapping[str, Case] = {
    PLAIN: Case("LORA", {"r": 16, "lora_alpha": 32}, LORA),
    "DoRA, r = 16": Case(
        "LORA",
        {"r": 16, "lora_alpha": 32, "use_dora": True},
        {**LORA, "lora_magnitude_vector": (OUT,)},
    ),
    "trainable tokens, 100": Case(
        "TRAINABLE_TOKENS",
        {"token_indices": list(range(100)), **NO_RANK},
        {"trainable_tokens_delta": (100, IN)},
    ),
    "AdaLoRA, r = 16": Case(
        "ADALORA",
        {"init_r": 16, "r": None, "lora_alpha": 32},
        {**factors("lora_A", "lora_B", 16), "lora_E": (16, 1)},
    ),
    "OFT, blocks of 32": Case(
        "OFT",
        {"oft_block_size": 32, "r": 0, "lora_alpha": None, "use_cayley_neumann": True}
        | {"num_cayley_neumann_terms": 5, "peft_version": "0.21.2"},
        {"oft_R.weight": (IN // 32, 32 * 31 // 2)},
    ),
    "IA3": Case("IA3", NO_RANK, {"ia3_l": (OUT, 1)}),
    "LoKr, r = 16": Case(
        "LOKR",
        {"r": 16, "alpha": 16, "lora_alpha": None},
        {"lokr_w1": (64, 128), "lokr_w2_a": (128, 16), "lokr_w2_b": (16, 224)},
    ),
    "LoHa, r = 16": Case(
        "LOHA",
        {"r": 16, "alpha": 16, "lora_alpha": None},
        {**factors("hada_w1_b", "hada_w1_a", 16), **factors("hada_w2_b", "hada_w2_a", 16)},
    ),
    "VeRA, r = 256": Case(
        "VERA",
        {"r": 256, "lora_alpha": None},
        {"vera_lambda_b": (OUT,), "vera_lambda_d": (256,)},
        {"vera_A": (256, IN), "vera_B": (OUT, 256)},
    ),
    "MiSS, r = 64": Case("MISS", {"r": 64, "lora_alpha": None}, {"miss_block": (64, OUT)}),
    "Bone bat, r = 64": Case(
        "BONE",
        {"r": 64, "lora_alpha": None, "init_weights": "bat"},
        {"bone_block": (OUT // 64, 64, 64)},
    ),
    "BOFT, blocks of 4": Case(
        "BOFT",
        {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, **NO_RANK},
        {"boft_R": (1, IN // 4, 4, 4), "boft_s": (OUT, 1)},
    ),
    "HRA, r = 8": Case("HRA", {"r": 8, "lora_alpha": None}, {"hra_u": (IN, 8)}),
    "FourierFT, n = 1000": Case(
        "FOURIERFT",
        {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, **NO_RANK},
        {"fourierft_spectrum": (1000,)},
        reason="every row is a Fourier transform of all its columns, of a sum over all frequencies",
    ),
    "RandLoRA, r = 32": Case(
        "RANDLORA",
        {"r": 32, "randlora_alpha": 640, "lora_alpha": None},
        {"randlora_lambda": (32, OUT // 32), "randlora_gamma": (OUT // 32, OUT)},
        {"randlora_A": (32, 1, OUT), "randlora_B": (IN, OUT // 32, 32)},
        reason="a product of full rank: 512 times the operations of LoRA of rank 16",
        max_ram="8GiB",
    ),
    "VB-LoRA, r = 4": Case(
        "VBLORA",
        {"r": 4, **VBLORA},
        {"vblora_logits_A": (4, IN // 256, 256), "vblora_logits_B": (OUT // 256, 4, 256)},
        {"vblora_vector_bank": (256, 256)},
    ),
    "SHiRA, r = 32": Case(
        "SHIRA",
        {"r": 32, "lora_alpha": None},
        {"shira_weight": (32 * (OUT + IN),), "shira_indices": (2, 32 * (OUT + IN))},
    ),
    "C3A, blocks of 64": Case(
        "C3A", {"block_size": 64, **NO_RANK}, {"c3a_kernel": (OUT // 64, IN // 64, 64)}
    ),
    "C3A, blocks of 256": Case(
        "C3A", {"block_size": 256, **NO_RANK}, {"c3a_kernel": (OUT // 256, IN // 256, 256)}
    ),
    "HiRA, r = 16": Case("HIRA", {"r": 16, "lora_alpha": None}, factors("hira_A", "hira_B", 16)),
    "DeLoRA, r = 16": Case(
        "DELORA",
        {"r": 16, "lora_alpha": None},
        {**factors("delora_A", "delora_B", 16), "delora_lambda": (1,), "delora_w_norm": (IN,)},
    ),
}


def write_base(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weight = torch.empty(OUT, IN, dtype=torch.bfloat16).normal_(0, WEIGHT_STD)
    save_file({f"{MODULE}.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(fields))


def write_adapter(folder: Path, case: Case) -> None:
    """Tensors of small normal values; what is listed by rows and columns is drawn from those there are."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    named = {f"base_model.model.{MODULE}.{role}": shape for role, shape in case.tensors.items()}
    named |= {f"base_model.{role}": shape for role, shape in case.shared.items()}
    save_file(
        {name: _drawn(name, shape) for name, shape in named.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": case.peft_type, "target_modules": ["down_proj"], **case.fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _drawn(name: str, shape: Shape) -> Tensor:
    if name.endswith("shira_indices"):
        places = torch.randperm(OUT * IN)[: shape[1]]
        return torch.stack([places // IN, places % IN]).int()
    found = 0.02 * torch.randn(shape)
    return found.abs() + 1 if "magnitude" in name or "norm" in name else found


def merge(folder: Path, case: Case) -> Cost:
    """A merge of `base` and `adapter` in a process of its own; its standard output is the result as JSON."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    paths = ("--base", str(folder / "base"), "--adapter", str(folder / "adapter"), "--out", str(out))
    options = (*paths, "--max-ram", case.max_ram, "--device", "cpu", "--json")
    return checked(measure((sys.executable, "-m", "streamconv", "merge", *options)))


def start() -> Cost:
    """A command that imports what `merge` does and reads nothing."""
    return checked(measure((sys.executable, "-c", "import streamconv.cli, streamconv.pipeline")))


def checked(cost: Cost) -> Cost:
    if cost.exit_code:
        sys.exit(f"{cost.stderr}\na merge ended with exit {cost.exit_code}")
    return cost


def time_case(name: str, folder: Path, torch_bytes: int, runs: int) -> Measured:
    """Up to `runs` pairs of plain LoRA and the method."""
    case, starts = CASES[name], list[Cost]()
    lora, own = list[Cost](), list[Cost]()
    for _ in range(runs):
        starts.append(start())
        for found, adapter in ((lora, CASES[PLAIN]), (own, case)):
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            write_adapter(folder / "adapter", adapter)
            found.append(merge(folder, adapter))
        if own[-1].cpu_s > SLOW_S:
            break
    start_s = min(cost.cpu_s for cost in starts)
    pairs = zip(own, lora, strict=True)
    return Measured(
        name=name,
        peft_type=case.peft_type,
        wall_s=statistics.median(cost.wall_s for cost in own) - min(cost.wall_s for cost in starts),
        cpu_s=statistics.median(cost.cpu_s for cost in own) - start_s,
        to_lora=statistics.median((one.cpu_s - start_s) / (other.cpu_s - start_s) for one, other in pairs),
        peak_bytes=max(0, max(cost.peak_anon_bytes for cost in own) - torch_bytes),
        planned_bytes=json.loads(own[-1].stdout)["planned_ram_bytes"],
        runs=len(own),
    )


HEADER = (
    "| method | time to that of LoRA | processor time | peak memory | planned | why longer |",
    "|---|--:|--:|--:|--:|---|",
)


def row(measured: Mapping[str, Any]) -> str:
    """One line of the table, from a result as it is stored."""
    cells = (
        measured["name"],
        f"{measured['to_lora']:.1f}",
        f"{measured['cpu_s']:.1f} s",
        f"{measured['peak_bytes'] / 2**20:.0f} MiB",
        f"{measured['planned_bytes'] / 2**20:.0f} MiB",
        CASES[measured["name"]].reason if measured["to_lora"] > TIME_LIMIT else "",
    )
    return "| " + " | ".join(cells) + " |"


def broken(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Methods that need more memory than was planned, or more time than is allowed without a reason."""
    for one in rows:
        if one["peak_bytes"] > one["planned_bytes"]:
            yield f"{one['name']}: over the plan's memory"
        if one["to_lora"] > TIME_LIMIT and not CASES[one["name"]].reason:
            yield f"{one['name']}: {one['to_lora']:.1f} times the time of LoRA, without a reason"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/methods", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER / "methods", help="2 GB")
    parser.add_argument("--method", action="append", choices=CASES, help="only this one; may be repeated")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="pairs of each; medians are shown")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-methods.json")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    write_base(options.folder / "base")
    torch_bytes, about = torch_anon_bytes(), {"machine": machine(options.folder)}
    found = {one["name"]: one for one in load(options.results).get("rows", ())}
    print("\n".join(HEADER), flush=True)
    for name in options.method or CASES:
        found[name] = asdict(time_case(name, options.folder, torch_bytes, options.runs))
        rows = [found[each] for each in CASES if each in found]
        save(options.results, "tools/bench/methods", {**about, "rows": rows})
        print(row(found[name]), flush=True)
    shutil.rmtree(options.folder)
    if over := list(broken([*found.values()])):
        sys.exit("\n".join(over))


if __name__ == "__main__":
    main()
