"""The model card: metadata others understand, nothing private, and a loading snippet that runs as written."""

from __future__ import annotations

import getpass
import re
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import streamconv
from tests.parity.opening import tensors
from tests.tiny import VOCABULARY, edit_json, llama_config, logits, save_adapter, save_base

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
BASE_CARD = """\
---
license: other
license_name: own-license
license_link: LICENSE.md
language: [en, de]
datasets:
- org/data
pipeline_tag: text-generation
tags: [of-the-base]
library_name: mlx
model_name: Secret
---
# Base
"""


def metadata(card: str) -> dict[str, Any]:
    """As the Hub reads it."""
    return dict(ModelCard(card).data.to_dict())  # type: ignore[no-untyped-call]  # huggingface_hub leaves it without types


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    words = WordLevel({f"word{i}": i for i in range(VOCABULARY)}, unk_token="word0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="word0").save_pretrained(base)
    save_adapter(folder / "adapter", base, LORA)
    return folder


def merged(folder: Path, out: Path, **options: Any) -> str:
    """The card of a merge."""
    streamconv.merge(folder / "base", folder / "adapter", out, **options)
    return (out / "README.md").read_text()


def with_base_card(folder: Path, tmp_path: Path, content: str | bytes) -> Path:
    """The inputs, the base's card replaced."""
    copied = Path(shutil.copytree(folder, tmp_path / "inputs"))
    (copied / "base" / "README.md").write_bytes(content.encode() if isinstance(content, str) else content)
    return copied


def as_hub_snapshot(folder: Path, repo: Path) -> Path:
    snapshot = repo / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    return snapshot


# -- metadata ------------------------------------------------------------------------------------------------------


def test_metadata_of_a_local_merge(folder: Path, tmp_path: Path) -> None:
    data = metadata(merged(folder, tmp_path / "out"))
    assert data == {"library_name": "transformers", "tags": ["streamconv", "merge", "lora"]}


@pytest.mark.parametrize(("quant", "relation"), [("none", "finetune"), ("nf4", "quantized")])
def test_inputs_from_the_hub_are_named(folder: Path, tmp_path: Path, quant: str, relation: str) -> None:
    base = as_hub_snapshot(folder / "base", tmp_path / "models--org--base.v1")
    adapter = as_hub_snapshot(folder / "adapter", tmp_path / "models--me--my-lora")
    streamconv.merge(base, adapter, tmp_path / "out", quant=quant)
    data = metadata((tmp_path / "out" / "README.md").read_text())
    assert data["base_model"] == ["org/base.v1", "me/my-lora"]
    assert data["base_model_relation"] == relation


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("org/Llama-7B", "org/Llama-7B"),
        ("Llama-7B", None),
        ("/home/alice/llama", None),
        ("./llama/base", None),
        ("org/x\n---", None),
        (7, None),
    ],
)
def test_the_base_that_the_adapter_names_is_named(
    folder: Path, tmp_path: Path, named: object, found: str | None
) -> None:
    inputs = Path(shutil.copytree(folder, tmp_path / "inputs"))
    edit_json(inputs / "adapter" / "adapter_config.json", base_model_name_or_path=named)
    card = merged(inputs, tmp_path / "out", quant="nf4")
    data = metadata(card)
    assert data.get("base_model") == (found and [found])
    assert data.get("base_model_relation") == (found and "quantized")
    assert ("# Llama-7B, with a LoRA adapter merged in, nf4\n" in card) == (found is not None)


def test_licence_and_language_are_inherited_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    data = metadata(merged(with_base_card(folder, tmp_path, BASE_CARD), tmp_path / "out"))
    assert data == {
        "license": "other",
        "license_name": "own-license",
        "license_link": "LICENSE.md",
        "language": ["en", "de"],
        "datasets": ["org/data"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["streamconv", "merge", "lora"],
    }


@pytest.mark.parametrize(
    "head",
    [
        "license: [",
        "a: b: c",
        "- a list",
        "license: !!python/object/apply:os.system [ls]",
        "base_model: 3",
        "self: 3",
        "license: 2024-99-99",
        "license: {deep: [er]}\nlanguage: [[en]]",
        "a: " + "[" * 600,
        "a: &a [x,x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join(['*a'] * 9)}]\n" for i in range(3))
        + "datasets: [*a2]",
        "\tlicense: mit",
        "license: " + "x" * 70_000,
    ],
    ids=lambda head: head[:20],
)
def test_a_strange_card_of_the_base_does_no_harm(folder: Path, tmp_path: Path, head: str) -> None:
    card = merged(with_base_card(folder, tmp_path, f"---\n{head}\n---\n# Base"), tmp_path / "out")
    assert metadata(card) == {
        "library_name": "transformers",
        "tags": ["streamconv", "merge", "lora"],
    }


@pytest.mark.parametrize(
    "content", [b"", b"# no metadata", b"\xff\xfe\x00", b"---\n", b"---\nlicense: mit\n"]
)
def test_a_card_without_metadata_gives_none(folder: Path, tmp_path: Path, content: bytes) -> None:
    data = metadata(merged(with_base_card(folder, tmp_path, content), tmp_path / "out"))
    assert "license" not in data


# -- body ----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_done(folder: Path, tmp_path: Path) -> None:
    card = merged(folder, tmp_path / "out", quant="nf4-dq", merge_base="nf4-dq")
    for piece in (
        "A LoRA adapter that updates 4 modules (down_proj, q_proj) was merged",
        "| weights | nf4-dq, ",
        "as QLoRA training saw it",
        "| rounding | adaptive: ",
        "| left in 16 bit | lm_head |",
        "| kept | ",
    ):
        assert piece in card
    streamconv.convert(folder / "base", tmp_path / "converted", quant="nf4")
    converted = (tmp_path / "converted" / "README.md").read_text()
    assert "# Converted model" in converted
    assert "adapter" not in converted


def test_the_card_is_the_same_each_time_and_says_nothing_of_this_machine(
    folder: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(folder, tmp_path / "home" / "alice" / "secret-project"))
    card = merged(folder, tmp_path / "one")
    assert card == merged(elsewhere, tmp_path / "two", max_ram="400MB")
    for private in ("alice", "secret", "/tmp", tmp_path.name, getpass.getuser(), socket.gethostname()):
        assert private not in card


HOSTILE_CLASS = "x import y\nimport os; os.system('id')  # ForX"


@pytest.mark.parametrize(
    ("architectures", "own", "loader"),
    [
        ([HOSTILE_CLASS], None, "AutoModel"),
        (["LlamaForCausalLM\nimport os"], None, "AutoModel"),
        (["__import__('os')"], None, "AutoModel"),
        (["x; ForCausalLM"], None, "AutoModelForCausalLM"),
        (["LlamaForSequenceClassification"], None, "LlamaForSequenceClassification"),
        (
            ["OwnForX"],
            {"AutoModel\n": "x.Y", "AutoModelForImageTextToText": "x.Y"},
            "AutoModelForImageTextToText",
        ),
        (["OwnForX"], {"import os; os": "x.Y"}, "AutoModel"),
    ],
)
def test_only_a_class_stands_in_the_code(
    folder: Path, tmp_path: Path, architectures: list[str], own: dict[str, str] | None, loader: str
) -> None:
    base = shutil.copytree(folder / "base", tmp_path / "base")
    edit_json(base / "config.json", architectures=architectures, **({"auto_map": own} if own else {}))
    streamconv.convert(base, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"from transformers import {', '.join(sorted((loader, 'AutoTokenizer')))}\n" in card
    assert f"\nmodel = {loader}.from_pretrained(" in card
    assert "os" not in re.findall(r"\w+", card)


def test_names_do_nothing_in_markdown_and_yaml(folder: Path, tmp_path: Path) -> None:
    """Hub ids come from folders' names, which anyone may have chosen."""
    evil = "x`|<img src=y>[z](javascript:w) --- # Heading\x1b]0;t\x07\u202e__b__: {a: 1}"
    base = as_hub_snapshot(folder / "base", tmp_path / f"models--org--{evil}")
    head = 'license: |\n  mit\n  ---\n  # Heading\nlanguage: "en\\n---\\nfr"\n'
    (base / "README.md").write_text(f"---\n{head}---\n")
    streamconv.merge(base, folder / "adapter", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(char.isprintable() or char == "\n" for char in card)
    body = card.partition("\n---\n")[2]
    assert "base_model" not in metadata(card)
    assert "license" not in metadata(card)
    assert "language" not in metadata(card)
    assert [line for line in card.split("\n") if line.startswith("#")] == ["# Merged model", "## Load it"]
    assert "<img" not in body
    assert not re.search(r"(?<!\\)[\[`|]", body.split("| base |")[1].split(" at commit")[0])


def test_no_card_if_not_wanted(folder: Path, tmp_path: Path) -> None:
    streamconv.merge(folder / "base", folder / "adapter", tmp_path / "out", card=False)
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_card_says_what_was_replaced(folder: Path, tmp_path: Path) -> None:
    only_head = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", folder / "base", only_head).path
    streamconv.merge(folder / "base", adapter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "updates 2 modules (q_proj) and replaces lm_head.weight was merged" in card


def run_snippet(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's one snippet defines, run as written in the folder."""
    snippets = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 1
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as complaints:
        exec(snippets[0], names)
    assert not complaints
    return names


@pytest.mark.parametrize(
    "options", [{}, {"quant": "nf4-dq", "merge_base": "nf4-dq"}], ids=["16 bit", "nf4-dq"]
)
def test_the_snippet_loads_the_model_as_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    merged(folder, tmp_path / "out", **options)
    names = run_snippet(tmp_path / "out", monkeypatch)
    assert logits(names["model"].eval()).isfinite().all()
    assert names["tokenizer"].convert_ids_to_tokens([3]) == ["word3"]


def test_a_chat_is_shown_where_there_is_a_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = Path(shutil.copytree(folder, tmp_path / "inputs"))
    template = "{% for message in messages %}word3 {{ message.content }}{% endfor %}"
    (inputs / "base" / "chat_template.jinja").write_text(template)
    assert "apply_chat_template" in merged(inputs, tmp_path / "out")
    assert "apply_chat_template" not in merged(folder, tmp_path / "plain")
    run_snippet(tmp_path / "out", monkeypatch)
    assert capsys.readouterr().out.startswith("word")  # its own words went in, and others came out


def test_a_classifier_is_loaded_with_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no tokenizer, where there is none."""
    base = save_base(tmp_path / "base", llama_config(), auto_class=AutoModelForSequenceClassification)
    streamconv.convert(base, tmp_path / "out")
    names = run_snippet(tmp_path / "out", monkeypatch)
    assert torch.equal(names["model"].score.weight, tensors(base)["score.weight"])
    assert "tokenizer" not in names


@pytest.mark.parametrize(
    ("kind", "library", "says"),
    [
        (
            "modelopt-0.47.0/nvfp4",
            "transformers",
            "Its weights are stored as its base's, by ModelOpt: for vLLM",
        ),
        ("mlx-lm-0.32.2/affine_4_64", "mlx", "mlx_lm.generate --model . --prompt"),
        ("mlx-lm-0.32.2/affine_4_32_experts", "mlx", "mlx_lm.generate --model . --prompt"),
        ("transformers-5.23.0/fp8_block", "transformers", "Needs transformers. With this folder"),
    ],
)
def test_a_kept_base_is_for_the_programs_that_open_its_layout(
    kind: str, library: str, says: str, tmp_path: Path
) -> None:
    streamconv.convert(GOLDEN / kind, tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"library_name: {library}\n" in card
    assert says in card
    assert "compressed-tensors" not in card


def test_code_of_its_own_is_asked_for(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "inputs"))
    (copied / "base" / "own.py").write_text("")
    edit_json(
        copied / "base" / "config.json", architectures=["Own"], auto_map={"AutoModelForCausalLM": "own.Own"}
    )
    card = merged(copied, tmp_path / "out")
    assert 'AutoModelForCausalLM.from_pretrained(".", dtype="auto", trust_remote_code=True)' in card
