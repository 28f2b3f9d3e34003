"""Contents of strangers' files: in messages, in the files that are made, in how these may be opened."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import streamconv
from tests.hostile.commands import Commands
from tests.tiny import edit_json, edit_tensors, llama_config, save_adapter, save_base

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("content")
    base = save_base(folder / "base", llama_config(), max_shard_size="20KB")
    save_adapter(folder / "adapter", base, LORA)
    for name in ("LICENSE", "modeling_own.py", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text("{}")
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    for number, file in enumerate(sorted(base.iterdir())):
        file.chmod((0o755, 0o600, 0o6777)[number % 3])
    return folder


# -- who may open what is made -------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_are_made_as_the_umask_says(folder: Path, tmp_path: Path, umask: int) -> None:
    out = tmp_path / "made" / "out"
    streamconv.merge(folder / "base", folder / "adapter", out, quant="nf4", also=["none"])
    streamconv.extract(folder / "base", out / "none", tmp_path / "made" / "adapter", rank=2)
    made = [tmp_path / "made", *(tmp_path / "made").rglob("*")]
    assert {"README.md", "LICENSE", "modeling_own.py", "config.json"} <= {path.name for path in made}
    for path in made:
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


# -- text ----------------------------------------------------------------------------------------------------------

EVIL = "x\x1b]0;owned\x07\x9b31m\u202egpj\nFAKE: all is well\r\u2028<script>`|*"
# A file's name has less room, and none for what ends names of folders.
EVIL_NAME = "x\x1b]0;owned\x07\x9b31m\u202egpj\nFAKE"
# With control characters of ASCII, none is copied.
EVIL_FILE = "x\x9b31m\u202egpj\u2028<script>`|*"


@pytest.fixture(scope="module")
def evil(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter that work, with such text wherever there may be text."""
    evil = tmp_path_factory.mktemp("evil") / EVIL_NAME
    base, adapter = (
        shutil.copytree(folder / name, evil / f"{name}{EVIL_NAME}") for name in ("base", "adapter")
    )
    edit_json(
        base / "config.json",
        architectures=[EVIL],
        _name_or_path=EVIL,
        transformers_version=EVIL,
        torch_dtype=EVIL,
        hidden_act="silu",
        auto_map={EVIL: f"{EVIL}--{EVIL}.{EVIL}", "AutoModel": "modeling_own.Own"},
        **{EVIL: EVIL},
    )
    for name in (f"LICENSE{EVIL_FILE}", f"{EVIL_FILE}.py", f"{EVIL_FILE}.txt"):
        (base / name).write_text(EVIL)
    (base / "README.md").write_text(f"---\nlicense: {json.dumps(EVIL)}\n---\n{EVIL}")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": EVIL, "chat_template": EVIL}))
    (base / "preprocessor_config.json").write_text(json.dumps({EVIL: 1}))
    (adapter / "preprocessor_config.json").write_text(json.dumps({EVIL: 2}))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": f"{EVIL}2", EVIL: EVIL}))
    edit_tensors(base / first_shard(base), put={f"{EVIL}.weight": torch.ones(4, 4)})
    index = base / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"][f"{EVIL}.weight"] = first_shard(base)
    index.write_text(json.dumps(found))
    edit_json(
        adapter / "adapter_config.json",
        base_model_name_or_path=EVIL,
        revision=EVIL,
        target_modules=["q_proj", "down_proj", EVIL],
        exclude_modules=[EVIL],
        modules_to_save=None,
        rank_pattern={"x\x1b\nFAKE": 3},
        auto_mapping={EVIL: EVIL},
    )
    unknown = shutil.copytree(adapter, evil / "unknown")
    edit_json(unknown / "adapter_config.json", **{EVIL: EVIL})
    return evil


def first_shard(base: Path) -> str:
    return min(file.name for file in base.glob("model-*.safetensors"))


def harmless(text: str) -> bool:
    lines = text.split("\n")
    return all(line.isprintable() for line in lines) and not any(line.startswith("FAKE") for line in lines)


def test_no_name_steers_a_terminal(evil: Path, commands: Commands, tmp_path: Path) -> None:
    base, adapter, out = (evil / f"{name}{EVIL_NAME}" for name in ("base", "adapter", "out"))
    inputs = ("--base", base, "--adapter", adapter)
    runs = {
        0: (
            ("inspect", base),
            ("inspect", adapter),
            ("inspect", adapter, "--json"),
            ("plan", *inputs),
            ("plan", *inputs, "--json", "-v"),
            ("merge", *inputs, "-o", out, "-v", "--copy-extra", "x*"),
            ("merge", *inputs, "-o", out),
            ("verify", out),
            ("convert", "--base", base, "-o", evil / "converted", "--quiet", "--json"),
            ("verify", evil / "converted", "--full", "--base", base),
            ("extract", "--base", base, "--finetuned", out, "--rank", "2", "-o", evil / "extracted"),
            ("analyze", *inputs, "--format", "nf4"),
            ("merge", *inputs, "-o", evil / "recipe", "--print-recipe"),
        ),
        2: (
            ("merge", *inputs, "-o", out, "--quant", EVIL),
            ("merge", *inputs, "-o", out, "--ignore", f"re:({EVIL}"),
            ("merge", *inputs, "-o", out, f"--{EVIL}"),
            (EVIL,),
        ),
        3: (
            ("inspect", evil / "missing"),
            ("plan", "--base", base, "--adapter", base),
            ("plan", "--base", base, "--adapter", evil / "unknown"),
            ("verify", base),
            ("push", base, "me/x"),
        ),
        4: (("merge", *inputs, "-o", out, "--quant", "nf4", "--quiet"),),
    }
    for code, each in runs.items():
        for arguments in each:
            found = commands.run(*arguments)
            assert harmless(found.text), (arguments[0], found.text)
            assert found.code == code, (arguments[0], found.text)
    notes = commands.run("plan", *inputs).text
    assert r"x\x1b]0;owned\x07\x9b31m\u202egpj\nFAKE: all is well" in notes
    for path in (out, evil / "converted"):
        assert harmless((path / "README.md").read_text())
        json.loads((path / "streamconv.json").read_text())


# -- paths of this machine -----------------------------------------------------------------------------------------


def test_no_path_of_this_machine_is_written(folder: Path, tmp_path: Path, commands: Commands) -> None:
    home = tmp_path / "tell-tale-user" / "tell-tale-project"
    for name in ("base", "adapter"):
        shutil.copytree(folder / name, home / f"tell-tale-{name}")
    inputs = ("--base", home / "tell-tale-base", "--adapter", home / "tell-tale-adapter")
    out, adapter = tmp_path / "out", tmp_path / "extracted"
    for arguments in (
        ("merge", *inputs, "-o", out, "--quant", "nf4", "--also", "none", "--ignore", "lm_head"),
        (
            "extract",
            "--base",
            home / "tell-tale-base",
            "--finetuned",
            out / "none",
            "--rank",
            "2",
            "-o",
            adapter,
        ),
    ):
        assert commands.run(*arguments).code == 0
    made = [path for folder in (out, adapter) for path in folder.rglob("*") if path.is_file()]
    assert len(made) > 20
    telling = [path for path in made if b"tell-tale" in path.read_bytes()]
    # As PEFT's own: how else would it find the base?
    assert telling == [adapter / "adapter_config.json"]


# -- regular expressions -------------------------------------------------------------------------------------------

BOMB = r"((\w+\.?)+)+!"
NESTED = "(" * 5000 + ")" * 5000


@pytest.mark.parametrize(
    "bomb", [BOMB, NESTED, "(a{9999}){9999}", "(a|a)*" * 3000], ids=lambda bomb: bomb[:8]
)
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"exclude_modules": None},
        {"rank_pattern": 3},
        {"alpha_pattern": 3},
        {"layers_pattern": None, "layers_to_transform": [0]},
        {"layers_pattern": [None], "layers_to_transform": [0]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_expressions_of_an_adapter_end_in_time(
    folder: Path, tmp_path: Path, commands: Commands, fields: dict[str, Any], bomb: str
) -> None:
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    name = next(iter(fields))
    value = {"rank_pattern": {bomb: 3}, "alpha_pattern": {bomb: 3}}.get(name, bomb)
    if name == "layers_pattern":  # it decides on modules without factors alone
        edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "down_proj", "o_proj"])
    edit_json(
        adapter / "adapter_config.json", **{**fields, name: [value] if fields[name] == [None] else value}
    )
    found = commands.run("plan", "--base", folder / "base", "--adapter", adapter)
    assert found.seconds < 5
    assert found.code in (0, 3), found.text
    if name == "target_modules" or (bomb == NESTED and name in ("rank_pattern", "alpha_pattern")):
        assert found.code == 3
        assert name in found.text
        assert len(found.text) < 1000


@pytest.mark.parametrize("unit", [".1", ".layers.1", "__", "9"])
def test_names_of_any_length_end_in_time(folder: Path, tmp_path: Path, commands: Commands, unit: str) -> None:
    for of, length, code in (("base", 500, 0), ("base", 501, 3), ("adapter", 500_000, 3)):
        copied = shutil.copytree(folder / of, tmp_path / f"{of}-{length}")
        name = "x" + (unit * length)[: length - 1]
        if of == "base":
            index = copied / "model.safetensors.index.json"
            found = json.loads(index.read_text())
            found["weight_map"][name] = first_shard(copied)
            index.write_text(json.dumps(found))
        file = copied / (first_shard(copied) if of == "base" else "adapter_model.safetensors")
        edit_tensors(file, put={name: torch.ones(4, 4)})
        inputs = {"base": folder / "base", "adapter": folder / "adapter"} | {of: copied}
        run = commands.run("plan", "--base", inputs["base"], "--adapter", inputs["adapter"])
        assert run.code == code, run.text
        assert run.seconds < 5
        assert (f"has a name of {length} characters" in run.text) is (code == 3)
        assert len(run.text) < 2000
