"""Conversion tables: those of the installed transformers, and the extract that stands in for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers

from streamconv.adapters import conversions
from streamconv.adapters.conversions import Conversion, Operation, find_table, fusions, renamings, table_keys
from tools.make_conversions import TARGET, extract, written


def test_the_extract_is_what_the_tested_version_has() -> None:
    committed = json.loads(TARGET.read_text())
    if transformers.__version__ != committed["transformers"]:
        pytest.skip(f"the extract is of transformers {committed['transformers']}")
    assert TARGET.read_text() == written(extract()), "run tools/make_conversions"


def test_the_extract_reads_as_the_installed_tables() -> None:
    """Line by line, so that a merge is the same with and without transformers."""
    tables = dict(conversions.parse_extract(json.loads(TARGET.read_text())))
    assert tables.keys() == table_keys()
    if transformers.__version__ == json.loads(TARGET.read_text())["transformers"]:
        assert [key for key, table in tables.items() if table != find_table(key)] == []


def test_the_extract_is_read_where_transformers_is_missing() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from streamconv.adapters.conversions import renamings\n"
        "print(*renamings('GPTNeoXForCausalLM')[0].targets)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lm_head."


def test_lines_that_rename_and_lines_that_fuse() -> None:
    assert renamings("mixtral") == (Conversion((".block_sparse_moe.",), (".mlp.",)),)
    merge, join = Operation("MergeModulelist", {"dim": 0}), Operation("Concatenate", {"dim": 1})
    gate_up, down = fusions("mixtral")
    assert gate_up.operations == (merge, join)
    assert gate_up.sources == (".experts.*.w1.weight", ".experts.*.w3.weight")
    assert (gate_up.targets, down.operations) == ((".experts.gate_up_proj",), (merge,))


def test_a_model_type_that_shares_the_table_of_another() -> None:
    assert fusions("qwen3_moe") == fusions("qwen2_moe") != ()


def test_no_table() -> None:
    assert find_table("llama") == ()
