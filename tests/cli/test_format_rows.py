"""Facts on formats: from the formats themselves, and from what programs opened."""

from __future__ import annotations

from dataclasses import replace

from streamconv.cli.format_rows import FormatRow, read_rows
from streamconv.formats import FORMATS
from streamconv.planning.choices import can_calibrate
from streamconv.rounding import ROUNDINGS
from tools.format_page import format_rows


def row_of(name: str, *opened: str) -> FormatRow:
    (found,) = (row for row in format_rows({name: opened}) if row.name == name)
    return found


def test_every_format_has_a_row() -> None:
    rows = read_rows()
    assert [row.name for row in rows] == list(FORMATS)
    assert all(row.layout and row.loaders and row.uses for row in rows)


def test_roundings_are_those_that_choose_codes_of_the_format() -> None:
    for row in format_rows({}):
        calibrated = {name for name in row.roundings if ROUNDINGS[name].calibrated}
        assert bool(row.roundings) == (FORMATS[row.name].grid is not None)
        assert bool(calibrated) == row.takes_calibration == can_calibrate(FORMATS[row.name])
    assert row_of("nf4").chosen_by == "all"
    assert row_of("int8").chosen_by == "all but feedback"
    assert row_of("bfloat16").chosen_by == "-"


def test_every_format_is_kept_where_a_base_has_it() -> None:
    """GGUF's as the base's own file (`pipeline/test_gguf_keep.py`)."""
    assert {row.uses for row in format_rows({})} == {"read, write, keep"}


def test_a_program_that_was_run_is_not_documented_as_well() -> None:
    documented = row_of("gptq")
    assert documented.documented == ("transformers with optimum and GPTQModel", "vLLM", "SGLang")
    run = row_of("gptq", "transformers 5.23.0 with GPTQModel 7.7.0", "vLLM 0.32.0 on a CPU")
    assert run == replace(documented, opened=run.opened, documented=("SGLang",))
    assert run.loaders == "transformers 5.23.0 with GPTQModel 7.7.0, vLLM 0.32.0 on a CPU; documented: SGLang"
    assert row_of("mlx4", "mlx-lm 0.32.2").loaders == "mlx-lm 0.32.2"


def test_vllm_is_named_only_where_it_opens_files() -> None:
    """Its 0.32 refuses GPTQ with zero points, and opens neither bitsandbytes nor GGUF."""
    named = {row.name for row in read_rows() if "vLLM" in row.loaders}
    assert not named & {"gptq-asym", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "mlx4", "mlx8", "gguf:f16"}
    run = {row.name for row in read_rows() if any("vLLM" in each for each in row.opened)}
    assert run == {"bfloat16", "w4a16", "w4a16-asym", "w8a8", "gptq", "awq", "awq-asym", "fp8"}
