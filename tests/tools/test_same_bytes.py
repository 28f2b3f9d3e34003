"""Comparison of two trees' outputs: every difference is seen, none is forgiven but versions, no case is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.adapters import ADAPTERS
from streamconv.checkpoint.container import SAFETENSORS
from streamconv.dtypes import DENSE
from streamconv.equalization import RESCALINGS
from streamconv.formats import FORMATS, container_of
from tools.format_page import format_rows
from tools.samebytes import __main__ as tool
from tools.samebytes import inputs
from tools.samebytes.cases import Case, all_cases, select
from tools.samebytes.judging import UNKNOWN_BASES, judge, table
from tools.samebytes.making import HERE, ROOT, key_of
from tools.samebytes.trees import compare
from tools.samebytes.worker import arguments

SHARD, MANIFEST = "model.safetensors", "streamconv.json"
CASE = Case("case", "llama")
MADE = {"outcome": "made", "says": "", "seconds": 0.0}
REFUSED = {"outcome": "refused", "says": "OptionError: no", "seconds": 0.0}
FAILED = {"outcome": "failed", "says": "Traceback\nKeyError: 'x'\n", "seconds": 0.0}


def write_output(folder: Path, version: str = "1.0", **fields: Any) -> None:
    """A shard, a config with the version in it as that of gptq, a manifest, a card, and an output of --also."""
    folder.mkdir(parents=True)
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4)}
    save_file(tensors, folder / SHARD, {"format": "pt"})
    config = {"quantization_config": {"meta": {"quantizer": [f"streamconv:{version}"]}}, "layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {
        "streamconv": version,
        "fingerprint": {"streamconv": version, "seed": 0},
        "digest": f"of {version}",
        "files": {"config.json": {"sha256": f"of {version}"}},
        "kept_delta": 0.5,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | fields))
    (folder / "README.md").write_text("# Model\n\nmerged\n")
    (folder / "nf4").mkdir()
    (folder / "nf4" / "config.json").write_text('{"bits": 4}')


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two folders that hold the same output."""
    for name in ("now", "rev"):
        write_output(tmp_path / name / "case")
    return tmp_path


def found(work: Path) -> tuple[str, ...]:
    return compare(work / "now" / "case", work / "rev" / "case").found


# -- comparing ---------------------------------------------------------------------------------------------------


def test_equal_trees(work: Path) -> None:
    differences = compare(work / "now" / "case", work / "rev" / "case")
    assert (differences.found, differences.files) == ((), 5)
    assert differences.nbytes == sum(p.stat().st_size for p in (work / "now").rglob("*") if p.is_file())


def test_every_byte_of_every_file_counts(work: Path) -> None:
    for path in sorted((work / "now").rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        for place in range(0, len(content), 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert len(found(work)) == 1, f"{path.name}, byte {place}"
        path.write_bytes(content[:-1])
        assert len(found(work)) == 1, f"{path.name}, cut"
        path.write_bytes(content)
    assert found(work) == ()


def change_tensor(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["b"][3] = 1e-30
    save_file(tensors, folder / SHARD, {"format": "pt"})


def add_header_field(folder: Path) -> None:
    save_file(load_file(folder / SHARD), folder / SHARD, {"format": "pt", "more": "x"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_tensor, f"{SHARD}: b"),
        (add_header_field, f"{SHARD}: header"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        (lambda folder: (folder / "nf4" / "config.json").unlink(), "nf4/config.json is missing"),
        (lambda folder: (folder / ".left").touch(), ".left is new"),
        (lambda folder: (folder / "nf4" / "x").touch(), "nf4/x is new"),
        (lambda folder: (folder / "README.md").write_text("# Model\n\nother\n"), "README.md: line 3"),
        (lambda folder: (folder / "README.md").write_text("# Model\n\nmerged"), "README.md: length"),
        (lambda folder: (folder / "nf4" / "config.json").write_text('{"bits": 8}'), "nf4/config.json: bits"),
        (
            lambda folder: (folder / "nf4" / "config.json").write_text('{"bits":4}'),
            "nf4/config.json: the same values, written otherwise",
        ),
        (
            lambda folder: (folder / "nf4" / "config.json").write_text("{"),
            "nf4/config.json: bytes; one of the two cannot be read",
        ),
    ],
)
def test_a_difference_is_named(work: Path, change: Callable[[Path], object], expected: str) -> None:
    change(work / "now" / "case")
    assert found(work) == (expected,)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kept_delta": 0.5000001}, "kept_delta"),
        ({"fingerprint": {"streamconv": "1.0", "seed": 1}}, "fingerprint.seed"),
        ({"digest": "other"}, "digest"),
        ({"files": {}}, "files.config.json (missing)"),
        ({"more": None}, "more (new)"),
    ],
)
def test_a_key_of_the_manifest_is_named(work: Path, fields: dict[str, Any], expected: str) -> None:
    shutil.rmtree(work / "now")
    write_output(work / "now" / "case", **fields)
    assert found(work) == (f"{MANIFEST}: {expected}",)


def test_versions_are_left_aside_and_nothing_else(work: Path) -> None:
    shutil.rmtree(work / "now")
    write_output(work / "now" / "case", "1.1")
    assert found(work) == ()
    shutil.rmtree(work / "now")
    write_output(work / "now" / "case", "1.1", kept_delta=0.4)
    assert found(work) == (f"{MANIFEST}: kept_delta",)
    config = work / "now" / "case" / "config.json"
    config.write_text(config.read_text().replace('"layers": 2', '"layers": 3'))
    assert found(work) == ("config.json: layers", f"{MANIFEST}: kept_delta")


# -- judging -----------------------------------------------------------------------------------------------------


def test_the_same_output_is_good(work: Path) -> None:
    row = judge(CASE, work, {"case": MADE}, {"case": MADE})
    assert (row.verdict, row.files, row.is_good) == ("same", 5, True)
    (work / "now" / "case" / "README.md").unlink()
    row = judge(CASE, work, {"case": MADE}, {"case": MADE})
    assert (row.verdict, row.what, row.is_good) == ("DIFFERS", "README.md is missing", False)


@pytest.mark.parametrize(
    ("now", "rev", "verdict"),
    [
        (FAILED, MADE, "FAILED"),
        (MADE, FAILED, "FAILED"),
        (FAILED, FAILED, "FAILED"),
        (None, MADE, "FAILED"),
        (MADE, None, "FAILED"),
        (REFUSED, MADE, "DIFFERS"),
        (MADE, REFUSED, "DIFFERS"),
        (REFUSED, REFUSED, "FAILED"),
    ],
)
def test_a_run_that_fails_is_a_difference(work: Path, now: Any, rev: Any, verdict: str) -> None:
    answers = [{} if answer is None else {"case": answer} for answer in (now, rev)]
    row = judge(CASE, work, answers[0], answers[1])
    assert (row.verdict, row.is_good) == (verdict, False)
    assert row.what


@pytest.mark.parametrize(
    ("now", "rev", "verdict"),
    [
        ("OptionError: no", "OptionError: no", "refused"),
        ("OptionError: never", "OptionError: no", "DIFFERS"),
        ("InputError: no", "InputError: no", "FAILED"),
        ("", "OptionError: no", "DIFFERS"),
        ("", "", "DIFFERS"),
    ],
)
def test_a_refusal_is_good_only_where_it_is_expected_of_both(
    work: Path, now: str, rev: str, verdict: str
) -> None:
    case = Case("case", "llama", refused="OptionError")
    ours, theirs = (REFUSED | {"says": said} if said else MADE for said in (now, rev))
    assert judge(case, work, {"case": ours}, {"case": theirs}).verdict == verdict


@pytest.mark.parametrize(
    ("now", "says", "verdict"),
    [
        (MADE, "UnsupportedError: x: adapter_config.json: OFT adapters are not supported yet; merge", "new"),
        (
            MADE,
            "UnsupportedError: x: adapter_config.json: LOHA adapters are not supported yet; merge",
            "DIFFERS",
        ),
        (MADE, "AdapterError: x: OFT adapters are not supported yet", "DIFFERS"),
        (MADE, "UnsupportedError: x: an OFT adapter of another kind", "DIFFERS"),
        (MADE, "OptionError: --quant fp8 is not known; use keep, none, or one of nf4", "new"),
        (MADE, "OptionError: --quant fp8 does not fit", "DIFFERS"),
        (REFUSED, "UnsupportedError: x: OFT adapters are not supported yet", "FAILED"),
        (FAILED, "UnsupportedError: x: OFT adapters are not supported yet", "FAILED"),
    ],
)
def test_an_output_is_new_where_rev_has_no_such_method(
    work: Path, now: dict[str, Any], says: str, verdict: str
) -> None:
    shutil.rmtree(work / "rev")
    case, rev = Case("case", "llama", "oft", method="OFT"), REFUSED | {"says": says}
    row = judge(case, work, {"case": now}, {"case": rev})
    assert (row.verdict, row.is_good) == (verdict, verdict == "new")
    assert (row.files > 0) == (verdict == "new")
    shutil.rmtree(work / "now")
    assert not judge(case, work, {"case": now}, {"case": rev}).is_good


def test_an_output_of_a_base_that_rev_cannot_make_is_new(work: Path) -> None:
    case = Case("case", "llama-fp8", "lora", {"quant": "keep"})
    assert judge(case, work, {}, {}).verdict == "FAILED"
    (work / UNKNOWN_BASES).write_text(json.dumps(["llama-fp8"]))
    assert judge(case, work, {}, {}).verdict == "new"


def test_nothing_written_by_either_is_no_equal_output(tmp_path: Path) -> None:
    assert judge(CASE, tmp_path, {"case": MADE}, {"case": MADE}).verdict == "FAILED"


@pytest.mark.parametrize(("breaks", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_and_the_table(
    work: Path, breaks: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = all_cases()[0].name
    for name in ("now", "rev"):
        (work / name / "case").rename(work / name / case)
    if breaks:
        change_tensor(work / "now" / case)
    monkeypatch.setattr(tool, "commit_of", lambda rev: rev * 40)
    monkeypatch.setattr(tool, "key_of", lambda commit: ".")
    monkeypatch.setattr(tool, "make_all", lambda *_: ({case: MADE}, {case: MADE}))
    assert tool.main(["a", "--only", case, "--keep", str(work)]) == code
    said = capsys.readouterr().out
    assert ("DIFFERS  model.safetensors: b" in said) is breaks
    assert f"{1 - breaks} of 1 outputs are the same as with {'a' * 12}" in said


def test_the_table_has_a_line_for_each_output(work: Path) -> None:
    lines = table([judge(CASE, work, {"case": MADE}, {"case": MADE})]).splitlines()
    assert [line.split()[0] for line in lines] == ["output", "case"]
    assert lines[1].endswith("same")


# -- cases -------------------------------------------------------------------------------------------------------


def quants(case: Case) -> set[str]:
    return {case.options.get("quant", "keep"), *case.options.get("also", ())}


def test_every_format_has_cases_by_every_rounding_it_can_have() -> None:
    """Those of GGUF files by any of them: all are rounded by the same code."""
    plain = [case for case in all_cases() if case.adapter and not case.refused]
    for row in format_rows({}):
        family = row.name.partition(":")[0]
        of_format = [case for case in plain if str(case.options.get("quant")).partition(":")[0] == family]
        assert row.name in {case.options.get("quant") for case in of_format}, f"no case writes {row.name}"
        asked = {case.options.get("rounding") for case in of_format}
        missing = [rounding for rounding in row.roundings if rounding not in asked]
        assert not missing, f"no case writes {row.name} by {missing}"


def test_every_target_and_every_quantized_base_has_cases() -> None:
    kept = {case.base for case in all_cases() if quants(case) == {"keep"} and case.adapter}
    assert any(
        base.endswith("-gguf:q4_k_m") for base in kept
    )  # types of GGUF files are kept by the same code
    for name, storage_format in FORMATS.items():
        if name in DENSE or container_of(storage_format) != SAFETENSORS:
            continue
        assert any(base.endswith(f"-{name}") for base in kept), f"no case keeps a base of {name}"
        if storage_format.load_in is not None:
            assert any(case.options.get("merge_base") == name for case in all_cases()), f"target {name}"


def test_every_rescaling_and_adapter_method_has_cases() -> None:
    assert set(RESCALINGS) == {case.options.get("rescale", "none") for case in all_cases()}
    merged = {case.method for case in all_cases() if case.adapter and not case.refused}
    assert set(ADAPTERS) == merged, (
        "add adapters of the method to tools/samebytes/inputs.py, and cases of them"
    )


def test_every_adapter_that_is_made_is_merged() -> None:
    bases, adapters = inputs.names_of_inputs()
    cases = all_cases()
    assert {case.adapter for case in cases if case.adapter} == set(adapters)
    assert set(bases) <= {case.base for case in cases}
    for case in cases:
        made = inputs.ADAPTERS.get(case.adapter or "")
        assert made is None or case.base == made.base or case.base.startswith(f"{made.base}-"), case.name
        derived = "BONE" if case.adapter == "bone" else "LORA"
        assert case.method == (made.method if made else derived), case.name


def test_names_are_folders_and_are_given_once() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name for name in names)


def test_patterns_select_cases() -> None:
    cases = [Case(name, "llama") for name in ("nf4, nearest", "nf4-dq, nearest", "int8, nearest")]
    assert select(cases, [], []) == cases
    assert select(cases, ["nf4*"], []) == cases[:2]
    assert select(cases, ["nf4*"], ["*-dq*"]) == cases[:1]


def test_what_is_kept_is_found_by_commit_and_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("a" * 40)
    assert before == key_of("a" * 40)
    assert before.startswith("a" * 12)
    assert before != key_of("b" * 40)
    monkeypatch.setattr("tools.samebytes.making.all_cases", lambda: [CASE])
    assert before != key_of("a" * 40)


# -- the worker --------------------------------------------------------------------------------------------------


def test_options_as_they_are_typed() -> None:
    job = Case("out", "llama", "lora", {"max_ram": "1GB", "ignore": ["a", "b"], "card": False}).job()
    given = " ".join(arguments(job))
    assert given == (
        "merge --base ../inputs/bases/llama -o out --adapter ../inputs/adapters/lora --device cpu --max-ram 1GB "
        "--ignore a --ignore b --no-card"
    )


def work_on(tree: Path, cases: list[Case], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the worker as the tool does, told that its tree is `tree`, with the modules that are here."""
    (folder / "jobs.json").write_text(json.dumps([case.job() for case in cases]))
    (folder / "now").mkdir()
    given = map(str, (tree, folder / "now", folder / "jobs.json", folder / "answers.json"))
    command = [sys.executable, "-P", str(HERE / "worker.py"), *given]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})


def test_another_trees_streamconv_is_not_used(tmp_path: Path) -> None:
    ended = work_on(tmp_path, [CASE], tmp_path)
    assert ended.returncode == 1
    assert f"which is not in {tmp_path}" in ended.stderr
    assert not (tmp_path / "answers.json").exists()


def test_refusals_and_bugs_are_told_apart(tmp_path: Path) -> None:
    cases = [Case("refused", "missing"), Case("failed", "missing", options={"no_such_option": 1})]
    ended = work_on(ROOT, cases, tmp_path)
    assert ended.returncode == 0, ended.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["refused"]["outcome"] == "refused"
    assert answers["refused"]["says"].startswith("CheckpointError: ")
    assert answers["failed"]["outcome"] == "failed"
    assert "no_such_option" in answers["failed"]["says"]


@pytest.mark.slow
def test_the_last_commit_is_compared_with_itself(tmp_path: Path) -> None:
    """The whole way with few outputs; what REV made is used a second time."""
    given = ["HEAD", "--keep", str(tmp_path), "--only", "dense bfloat16", "--only", "experts, not told"]
    assert tool.main(given) == 0
    (kept,) = tmp_path.iterdir()
    (kept / "rev" / "dense bfloat16" / "README.md").write_text("changed")
    assert tool.main(given) == 1
