"""The bench of formats has all of them, and works on what a file of theirs would hold."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch

from streamconv.formats import FORMATS, KEPT
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.running.workers import Workers
from tools.bench import owners
from tools.bench.format_weights import work_on
from tools.bench.formats import CASES, Row, table
from tools.bench.owners import OWNERS
from tools.bench.report import formats_block
from tools.bench.results import RESULTS, load

# Others have the same codes, differ in config.json, or are floats.
LEFT_OUT = {"gptq-v2", "nvfp4", "mxfp4", "gguf:f16", "gguf:bf16", "gguf:f32"}
SHAPE = (128, 256)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as found:
        yield found


def test_every_format_takes_part() -> None:
    known = {
        name
        for name in (*FORMATS, *KEPT)
        if name.startswith("gguf:") <= (name.removeprefix("gguf:") in BLOCK_TYPES)
    }
    assert known - LEFT_OUT <= {case.name for case in CASES}
    assert {f"gguf:{name}" for name, kind in BLOCK_TYPES.items() if kind.block > 1} <= {
        case.name for case in CASES
    }
    assert {case.owner for case in CASES} == set(OWNERS)
    measured = {row["format"] for row in load(RESULTS / "bench-formats.json")["medians"]}
    assert measured == {case.name for case in CASES}


@pytest.mark.parametrize(
    "name", ["float16", "nf4-dq", "w8a8", "gptq-asym", "awq", "mlx4", "nvfp4a16", "gguf:q4_k"]
)
def test_a_matrix_comes_back(name: str, workers: Workers) -> None:
    encoding, decoding = work_on(name, SHAPE, workers)
    assert encoding is not None
    decoding.out.fill_(torch.nan)
    decoding.run()
    wanted = encoding.weight.float()
    assert float((decoding.out - wanted).square().sum() / wanted.square().sum()) < 0.02
    assert encoding.nbytes < decoding.nbytes <= 8 * wanted.numel()


@pytest.mark.parametrize(
    "name",
    [
        "gptq, activation order",
        "gptq, 8 bit, activation order",
        "mlx3",
        "nvfp4, ModelOpt",
        "gpt-oss",
        "gguf:iq4_nl",
    ],
)
def test_what_is_read_only_is_decoded(name: str, workers: Workers) -> None:
    encoding, decoding = work_on(name, SHAPE, workers)
    decoding.out.fill_(torch.nan)
    decoding.run()
    assert not bool(decoding.out.isnan().all(1).any())
    assert (encoding is None) == (name == "gguf:iq4_nl")
    if encoding is not None:
        assert len(encoding.run()[1]) == len(encoding.encoder.parts) - 1


def test_an_owner_answers_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.argv", ["owners", "torch", "64", "64", "1", "wall"])
    monkeypatch.setattr("sys.stdin", io.StringIO("float16\nencode\ndecode\nbfloat16\nencode\n"))
    monkeypatch.setattr("sys.stdout", said)
    owners.main()
    able, *seconds, again, last = said.getvalue().splitlines()
    assert (able, again) == ("encode decode", "encode decode")
    assert len(seconds) == 2
    assert all(0 < float(each) < 10 for each in (*seconds, last))


def test_the_table_says_which_aim_is_met() -> None:
    rows = [
        Row("a", "encode", "O", 100, 9, 1000, 11.1, 0.1),
        Row("b", "decode", "O", 100, 90, 110, 1.1, 0.9),
        Row("c", "decode", "O", 100, None, 1000, None, 0.1),
    ]
    assert [row.is_met for row in rows] == [True, True, False]
    assert table(rows).splitlines()[2:] == [
        "| a | encode | 100 | O | 9 | 11.1 | 10% | met |",
        "| b | decode | 100 | O | 90 | 1.1 | 90% | met |",
        "| c | decode | 100 | O |  |  | 10% | **missed** |",
    ]
    results = load(RESULTS / "bench-formats.json")
    count = len(results["medians"])
    assert f" of {count} met." in formats_block(results)
