"""What the benchmark makes and how it sums up."""

import pytest
import torch

from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16
from tools.bench import encode
from tools.bench.make_checkpoint import layers_for, split, total_bytes, weights
from tools.bench.merge import COPY, STREAMCONV, Run, summarize


def test_32_layers_are_llama_3_8b() -> None:
    assert total_bytes(weights(32)) == 2 * 8_030_261_248  # parameters of meta-llama/Meta-Llama-3-8B, in bf16


@pytest.mark.parametrize("layers", [1, 9, 32])
def test_a_size_becomes_whole_layers(layers: int) -> None:
    size = total_bytes(weights(layers))
    assert {layers_for(size - 10**8), layers_for(size), layers_for(size + 10**8)} == {layers}


def test_shards_keep_order_and_limit() -> None:
    tensors = [TensorSpec(str(place), BF16, (size,)) for place, size in enumerate([4, 4, 50, 1, 9, 10, 1])]
    shards = list(split(tensors, max_bytes=20))
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert [[int(tensor.name) for tensor in shard] for shard in shards] == [[0, 1], [2], [3, 4], [5], [6]]


def test_the_ratio_is_taken_within_each_round() -> None:
    copies, merges = (1.0, 10.0, 4.0), (2.0, 11.0, 2.0)
    runs = [Run(COPY, number, wall, 0.0, 0) for number, wall in enumerate(copies)]
    runs += [Run(STREAMCONV, number, wall, 1.5, 7) for number, wall in enumerate(merges)]
    copy, merge = summarize(runs, checkpoint_bytes=8 * 10**9)
    assert copy.to_copy == 1.0
    assert (merge.wall_s, merge.cpu_s, merge.peak_bytes, merge.gb_per_s) == (2.0, 1.5, 7, 4.0)
    assert merge.to_copy == 1.1  # of 2, 1.1 and 0.5; the ratio of the medians would be 0.5


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
