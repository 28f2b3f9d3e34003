"""What the benchmarks make, how they sum up, and that results of pieces come together."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import streamconv
from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Ticket
from streamconv.storage import open_storage
from tools.bench import encode, merge, outofcore
from tools.bench.encoder_rate import encoder_rate
from tools.bench.make_checkpoint import make, split
from tools.bench.merge import (
    COPY,
    RAW,
    RIVALS,
    STREAMCONV,
    Rival,
    Run,
    bound_s,
    busy,
    refusal,
    store,
    summarize,
    table,
)
from tools.bench.models import MODELS, Model, total_bytes
from tools.bench.outofcore import holds, memory_limit
from tools.bench.raw_io import raw_io
from tools.bench.results import load
from tools.bench.shard_loop import shard_loop
from tools.measure import Cost

TINY = MODELS["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of three shards and its adapter."""
    folder = tmp_path_factory.mktemp("bench")
    make(folder, dataclasses.replace(TINY, layers=5), 3_000_000, rank=4, seed=0)
    return folder


# -- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496), ("llama-405b", 405_853_388_800)],
)
def test_models_have_as_many_parameters_as_the_real_ones(name: str, parameters: int) -> None:
    assert MODELS[name].nbytes == 2 * parameters


def test_the_largest_has_a_trillion_parameters_in_90_000_tensors() -> None:
    tensors = MODELS["moe-1t"].tensors
    assert total_bytes(tensors) > 2 * 10**12
    assert len(tensors) > 90_000


def test_names_and_shapes_are_those_that_transformers_expects() -> None:
    config = transformers.AutoConfig.for_model(**TINY.config)
    with torch.device("meta"):
        expected = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    assert {tensor.name: tensor.shape for tensor in TINY.tensors} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }


@pytest.mark.parametrize("layers", [1, 9, 32])
def test_a_size_becomes_whole_layers(layers: int) -> None:
    model = dataclasses.replace(MODELS["llama-8b"], layers=layers)
    assert {model.of_size(model.nbytes + extra).layers for extra in (-(10**8), 0, 10**8)} == {layers}


def test_shards_keep_order_and_limit() -> None:
    tensors = [TensorSpec(str(place), BF16, (size,)) for place, size in enumerate([4, 4, 50, 1, 9, 10, 1])]
    shards = list(split(tensors, max_bytes=20))
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert [[int(tensor.name) for tensor in shard] for shard in shards] == [[0, 1], [2], [3, 4], [5], [6]]


def test_no_page_is_there_twice_or_empty(folder: Path) -> None:
    storage, pages = open_storage(str(folder / "base")), []
    for path in sorted((folder / "base").glob("*.safetensors")):
        data = path.read_bytes()[read_header(storage.file(path.name)).data_start :]
        pages += [data[start : start + 4096] for start in range(0, len(data) - 4095, 4096)]
    assert len(pages) > 1000
    assert len(set(pages)) == len(pages)
    assert not any(page.count(0) > 400 for page in pages)


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make(tmp_path, dataclasses.replace(TINY, layers=5), 3_000_000, rank=4, seed=0)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


# -- contenders --------------------------------------------------------------------------------------------------


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_shard_loop_merges_what_streamconv_merges(folder: Path, tmp_path: Path) -> None:
    shard_loop(folder / "base", folder / "adapter", tmp_path / "loop")
    streamconv.merge(folder / "base", folder / "adapter", tmp_path / "ours")
    loop, ours, base = map(all_tensors, (tmp_path / "loop", tmp_path / "ours", folder / "base"))
    assert loop.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(loop[name], tensor, atol=2**-9, rtol=2**-7)  # the loop rounds twice
    changed = [name for name in base if not torch.equal(ours[name], base[name])]
    assert len(changed) == 5 * len(TINY.linears)


def test_raw_reading_and_writing_moves_as_many_bytes_as_asked(folder: Path, tmp_path: Path) -> None:
    raw_io(folder / "base", tmp_path / "out", 1_234_567)
    assert (tmp_path / "out/raw").stat().st_size == 1_234_567


def test_a_rival_that_cannot_run_is_left_out_with_the_reason() -> None:
    rival = Rival("large", "none", Path("python"), ram_factor=1000)
    assert "it needs about 1000 GB of memory" in str(refusal(rival, 10**9))
    assert refusal(dataclasses.replace(rival, prepare=lambda: "pip is away"), 10) == "pip is away"
    assert refusal(rival, 10) is None


# -- sums --------------------------------------------------------------------------------------------------------


def test_the_ratio_is_taken_within_each_round() -> None:
    copies, merges = (1.0, 10.0, 4.0), (2.0, 11.0, 2.0)
    runs = [Run(COPY, number, wall, 0.0, 0) for number, wall in enumerate(copies)]
    runs += [Run(STREAMCONV, number, wall, 1.5, 7 + number) for number, wall in enumerate(merges)]
    copied, merged = summarize(runs, checkpoint_bytes=8 * 10**9)
    assert copied.to_copy == 1.0
    assert (merged.wall_s, merged.cpu_s, merged.peak_bytes, merged.gb_per_s) == (2.0, 1.5, 9, 4.0)
    # Of 2, 1.1 and 0.5; the ratio of the medians would be 0.5.
    assert (merged.to_copy, merged.fastest, merged.slowest) == (1.1, 0.5, 2.0)


def test_the_bound_is_what_takes_longer() -> None:
    assert bound_s(raw_s=2.0, input_bytes=3 * 10**9, encoder_bytes_per_s=1e9) == 3.0
    assert bound_s(raw_s=4.0, input_bytes=3 * 10**9, encoder_bytes_per_s=1e9) == 4.0


def test_pieces_come_together_and_a_later_run_replaces_an_earlier(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for kind, size, more, mark in (
        ("bf16-nf4", "1", {}, 0),
        ("bf16-bf16", "2", {}, 1),
        ("bf16-bf16", "1", {"load": 2}, 4),
        ("bf16-bf16", "1", {"load": 0}, 2),
        ("bf16-nf4", "1", {"load": 0}, 3),
    ):
        store(path, {"kind": kind, "size": size, "mark": mark, **more})
    assert [group["mark"] for group in load(path)["groups"]] == [2, 4, 1, 3]


def test_a_load_is_there_as_long_as_it_is_asked_for() -> None:
    def children() -> list[str]:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    before = children()
    with busy(2):
        assert len(children()) == len(before) + 2
    assert children() == before


class Bench:
    """Stands for `measure`: notes the commands, writes what a contender would, and takes a second each time."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def __call__(self, command: Sequence[str]) -> Cost:
        self.commands.append(" ".join(command))
        if "-o" in command:
            out = Path(command[command.index("-o") + 1])
            out.mkdir()
            (out / "model.safetensors").write_bytes(bytes(1000))
        return Cost(0, "2e9", "", wall_s=2.0, cpu_s=1.0, peak_anon_bytes=3 * 2**20)


def test_all_rounds_of_a_kind_are_run_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    monkeypatch.setattr(merge, "measure", bench)
    monkeypatch.setattr(merge, "torch_anon_bytes", lambda: 2**20)
    given = "--model tiny --unit 4MB --sizes 1 --kinds bf16-bf16,nf4-nf4,bf16-nf4 --rivals loop --runs 2"
    merge.main([*given.split(), "--folder", str(tmp_path), "--results", str(tmp_path / "results.json")])
    stored = load(tmp_path / "results.json")["groups"]
    assert [group["kind"] for group in stored] == ["bf16-bf16", "bf16-nf4", "nf4-nf4"]
    assert [row["contender"] for row in stored[0]["medians"]] == [
        COPY,
        STREAMCONV,
        RIVALS["loop"].name,
    ]
    assert [row["contender"] for row in stored[1]["medians"]] == [COPY, RAW, STREAMCONV]
    assert stored[1]["to_bound"] == 1.0
    assert stored[0]["medians"][1]["peak_bytes"] == 2 * 2**20
    order = [run["contender"] for run in stored[0]["runs"]]
    assert order == [
        COPY,
        STREAMCONV,
        RIVALS["loop"].name,
        STREAMCONV,
        COPY,
        RIVALS["loop"].name,
    ]
    assert table(stored[0]) in capsys.readouterr().out
    assert any("--base " + str(tmp_path / "1x/base-nf4") in command for command in bench.commands)
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]  # nothing is left behind


def test_the_proof_stores_every_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outofcore, "measure", Bench())
    monkeypatch.setattr(outofcore, "torch_anon_bytes", lambda: 2**20)
    given = ["--model", "tiny", "--size", "4MB", "--limit", "256MiB", "--folder", str(tmp_path / "work")]
    outofcore.main([*given, "--results", str(tmp_path / "results.json")])
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [proof["output"] for proof in stored["proofs"]] == ["nf4-dq", "bf16"]
    assert {proof["anon_above_torch_bytes"] for proof in stored["proofs"]} == {2 * 2**20}
    assert stored["limited_by"] in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_a_limit_that_does_not_hold_is_not_taken() -> None:
    with memory_limit(256 * 2**20) as limit:
        assert holds(limit, 256 * 2**20)
    assert not holds(dataclasses.replace(limit, wrap=lambda command: command), 256 * 2**20)


def test_experts_have_layers_of_their_own() -> None:
    model = Model(256, 64, heads=2, key_value_heads=1, vocabulary=512, layers=1, experts=3)
    assert sum("experts" in name for name in model.linears) == 9
    assert "model.layers.0.mlp.gate.weight" in {tensor.name for tensor in model.tensors}


# -- encoders ----------------------------------------------------------------------------------------------------


def test_encoders_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(65, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = encode.measure(weight, encode.Case("nf4"), threads=1, rounds=1)
    assert [row.contender for row in found] == [encode.BNB, encode.TORCH, encode.COMPILED]
    assert found[0].to_bitsandbytes == 1.0
    assert "| nf4, nearest | 1 | bitsandbytes |" in encode.table(found)
    monkeypatch.setattr(
        encode, "quantize_as_bitsandbytes", lambda weight, case: (torch.zeros(1), torch.zeros(1))
    )
    with pytest.raises(SystemExit, match="nf4, nearest: the bytes differ"):
        encode.measure(weight, encode.Case("nf4"), threads=1, rounds=1)


def test_the_rate_of_the_encoder_is_that_of_its_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    moved: list[int] = []
    rewrite = WeightWork.rewrite

    def counted(work: WeightWork, raw: torch.Tensor, rows: range, out: torch.Tensor) -> Ticket:
        moved.append(raw.numel())
        return rewrite(work, raw, rows, out)

    monkeypatch.setattr(WeightWork, "rewrite", counted)
    try:
        rate = encoder_rate(str(folder / "base"), "nf4", seconds=0.2)
    finally:
        torch.set_num_threads(threads)
    assert 0 < rate <= sum(moved[1:]) / 0.2  # the first tile is not timed
