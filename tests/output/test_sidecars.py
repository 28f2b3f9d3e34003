"""What is copied beside the weights, byte for byte, what never is, and how config.json changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

import streamconv
from streamconv.checkpoint.config import edit_config
from streamconv.errors import CheckpointError, OptionError
from streamconv.output.sidecars import (
    MODEL,
    NEVER,
    PROCESSORS,
    custom_code,
    files_to_copy,
    notes_on_processors,
)
from streamconv.output.tokenizer import TokenizerChoice
from streamconv.output.tokenizer_files import CHAT_TEMPLATES, TOKENIZER, files_of
from streamconv.storage import open_storage
from tests.tiny import llama_config, save_base

COPIED = {
    "LICENSE",
    "LICENSE.md",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "source.spm",
    "special_tokens_map.json",
    "spm.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
LEFT = {
    ".gitattributes",
    "LICENSE.bin",
    "README.md",
    "adapter_config.json",
    "config.json",
    "model-00001-of-00001.safetensors",
    "model.gguf",
    "model.safetensors.index.json",
    "modeling_own.py",
    "notes.txt",
    "optimizer.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "streamconv.json",
    "tokenizer.pkl",
    "training_args.bin",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / ".cache").mkdir(parents=True)
    (folder / "original").mkdir()
    (folder / "original" / "tokenizer.model").write_text("of another format")
    for name in COPIED | LEFT:
        (folder / name).write_text(json.dumps({"name": name}))
    return folder


def names(
    base: Path,
    config: Mapping[str, Any] | None = None,
    extra: tuple[str, ...] = (),
    tokenizer: Path | None = None,
) -> set[str]:
    storage = open_storage(str(base))
    chosen = TokenizerChoice(files_of(open_storage(str(tokenizer or base))))
    files = files_to_copy(storage, chosen, custom_code(storage, config or {}), extra)
    assert [file.name for file in files] == sorted(file.name for file in files)
    return {file.name for file in files}


# -- which files ---------------------------------------------------------------------------------------------------


def test_just_the_listed_files_are_copied(base: Path) -> None:
    assert names(base) == COPIED
    (base / "tokenizer_config.json").unlink()
    assert names(base) == COPIED - {"tokenizer_config.json"}


def code_notes(base: Path, config: Mapping[str, Any], extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    storage = open_storage(str(base))
    code = custom_code(storage, config)
    return code.notes(files_to_copy(storage, TokenizerChoice(files_of(storage)), code, extra))


STRANGE: tuple[Any, ...] = (3, True, [], {}, {"x": None}, {"x": [3, {}]}, "")
OWN = {"AutoModel": "modeling_own.Own"}
RUNS_OWN = (
    "custom code modeling_own.py is copied and was not run; loading the model needs trust_remote_code=True, which runs "
    "it: read it before"
)
LEAVES_OWN = "code modeling_own.py beside the base is not copied, as no config names it"
FETCHES = (
    "configs name code of org/repo, which is no part of the model; loading it needs trust_remote_code=True, which "
    "fetches that from the Hub and runs it"
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"auto_map": OWN}, (RUNS_OWN,)),
        ({"vision_config": {"auto_map": OWN}}, (RUNS_OWN,)),
        ({}, (LEAVES_OWN,)),
        ({"auto_map": {"AutoModel": "org/repo--modeling_own.Own"}}, (FETCHES, LEAVES_OWN)),
        ({"auto_map": OWN | {"AutoConfig": "org/repo--modeling_own.Own"}}, (RUNS_OWN, FETCHES)),
        *(({"auto_map": strange}, (LEAVES_OWN,)) for strange in STRANGE),
    ],
)
def test_what_becomes_of_code_is_said(
    base: Path, config: Mapping[str, Any], expected: tuple[str, ...]
) -> None:
    assert code_notes(base, config) == expected
    assert ("modeling_own.py" in names(base, config)) is (RUNS_OWN in expected)


@pytest.mark.parametrize("name", PROCESSORS)
def test_code_of_processors_goes_along(base: Path, name: str) -> None:
    (base / name).write_text(json.dumps({"auto_map": {"AutoProcessor": "modeling_own.Own"}}))
    assert code_notes(base, {}) == (RUNS_OWN,)
    (base / name).write_text("no JSON")
    assert code_notes(base, {}) == (LEAVES_OWN,)


def test_code_that_is_asked_for_is_said(base: Path) -> None:
    assert code_notes(base, {}, ("modeling_*",)) == (RUNS_OWN,)


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_code_goes_along_where_a_config_names_it(base: Path, where: str) -> None:
    if where == "config":
        config: dict[str, Any] = {"auto_map": {"AutoModel": "modeling_own.Own"}}
    else:
        config = {}
        (base / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["tokenization.Own", null]}}'
        )
    assert names(base, config) == COPIED | {"modeling_own.py"}


def test_further_files_on_request_but_no_weights_and_nothing_written_anew(base: Path) -> None:
    assert names(base, extra=("notes.*",)) == COPIED | {"notes.txt"}
    assert names(base, extra=("*",)) - COPIED == {".gitattributes", "modeling_own.py", "notes.txt"}
    for pattern in ("*.bin", "config.json", "README.md", "optimizer*", "original/*", "../*"):
        with pytest.raises(
            OptionError, match=r"--copy-extra .* matches no file of .*base that may be copied"
        ):
            names(base, extra=(pattern,))


def test_the_lists_do_not_contradict_each_other() -> None:
    assert not {*TOKENIZER, *MODEL} & set(NEVER)


def test_a_link_out_of_the_folder_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of someone else")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leads outside the folder"):
        names(base)


def test_a_link_within_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0f").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0f")
    assert names(snapshot) == {"tokenizer.json"}


@pytest.fixture
def templates(base: Path) -> Path:
    folder = base / CHAT_TEMPLATES
    folder.mkdir()
    (folder / "rag.jinja").write_text("documents")
    (folder / "notes.txt").write_text("no template")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "x.jinja").write_text("transformers looks at one level")
    return folder


def test_further_chat_templates_go_with_the_tokenizer(base: Path, templates: Path, tmp_path: Path) -> None:
    assert names(base) == COPIED | {f"{CHAT_TEMPLATES}/rag.jinja"}
    other = tmp_path / "adapter"
    (other / CHAT_TEMPLATES).mkdir(parents=True)
    (other / "tokenizer.json").write_text("{}")
    (other / CHAT_TEMPLATES / "tool_use.jinja").write_text("tools")
    found = names(base, tokenizer=other)
    assert {name for name in found if "/" in name} == {f"{CHAT_TEMPLATES}/tool_use.jinja"}


def test_chat_templates_may_not_be_linked_to_from_outside(
    base: Path, templates: Path, tmp_path: Path
) -> None:
    outside = templates.rename(tmp_path / "outside")
    templates.symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{CHAT_TEMPLATES}/rag\.jinja is a link that leads outside"):
        names(base)
    templates.unlink()
    templates.mkdir()
    (templates / "rag.jinja").symlink_to(outside / "rag.jinja")
    with pytest.raises(CheckpointError, match=rf"{CHAT_TEMPLATES}/rag\.jinja is a link that leads outside"):
        names(base)


def test_transformers_finds_all_chat_templates_in_the_output(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = {"default": "{{ 1 }}\n", "rag": "{{ 2 }}", "tool_use": "{{ 3 }}"}
    tokenizer.save_pretrained(base)
    assert (base / CHAT_TEMPLATES / "rag.jinja").is_file()
    streamconv.convert(base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    streamconv.convert(base, tmp_path / "out")  # it is the same output: nothing to do, nothing refused
    tokenizer.chat_template = {"default": "{{ 4 }}"}
    shutil.rmtree(base / CHAT_TEMPLATES)
    tokenizer.save_pretrained(base)
    streamconv.convert(base, tmp_path / "out", overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 4 }}"
    assert not (tmp_path / "out" / CHAT_TEMPLATES).exists()


def test_files_come_out_byte_for_byte(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config())
    odd = b'{"a":1.0,\r\n "a ": "\\u00e9\xc3\xa9"}\n\n'
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"):
        (base / name).write_bytes(odd)
    streamconv.convert(base, tmp_path / "out", copy_extra=["notes.txt"], card=False)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"):
        assert (tmp_path / "out" / name).read_bytes() == odd
        found.remove(name)
    assert found == {"config.json", "model.safetensors", "streamconv-recipe.json", "streamconv.json"}


# -- whose tokenizer -----------------------------------------------------------------------------------------------


def test_no_file_of_the_other_tokenizer_is_mixed_in(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer.json").write_text("grown")
    assert names(base, tokenizer=adapter) == {
        "LICENSE",
        "LICENSE.md",
        "NOTICE.txt",
        "USE_POLICY.md",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
    }


def test_other_settings_of_the_processor_are_said(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "preprocessor_config.json"
    (base / name).write_text('{"size": 336, "do_resize": true, "image_processor_type": "A"}')
    (adapter / name).write_text('{"size": 448, "do_resize": true, "image_processor_type": "AFast", "new": 1}')
    notes = notes_on_processors(open_storage(str(base)), [open_storage(str(adapter))] * 2)
    assert [note.partition(", and")[0] for note in notes] == [
        "preprocessor_config.json of the adapter has other values than the base's (size)"
    ]
    for same in ('{"size": 336, "image_processor_type": "AFast"}', "no JSON"):
        (adapter / name).write_text(same)
        assert notes_on_processors(open_storage(str(base)), [open_storage(str(adapter))]) == ()


def test_what_is_written_anew_is_not_copied(base: Path) -> None:
    storage = open_storage(str(base))
    written = {"generation_config.json": b"{}", "chat_template.jinja": b"x"}
    files = files_to_copy(storage, TokenizerChoice(files_of(storage), written), custom_code(storage, {}), ())
    assert {file.name for file in files} == COPIED - written.keys()


def test_a_file_with_a_hole_is_told_before_the_disk_is_full_of_it(base: Path) -> None:
    storage = open_storage(str(base))
    with (base / "LICENSE").open("wb") as file:
        file.truncate(8 * 10**12)
    with pytest.raises(
        CheckpointError, match=r"LICENSE has 8 TB, .* unasked is larger than 1 GB; .* LICENSE if"
    ):
        files_to_copy(storage, TokenizerChoice({}), custom_code(storage, {}), ())
    found = files_to_copy(storage, TokenizerChoice({}), custom_code(storage, {}), ("LICENSE",))
    assert max(file.size for file in found) == 8 * 10**12


# -- config.json ---------------------------------------------------------------------------------------------------


def test_another_end_token_stands_first() -> None:
    config = {"eos_token_id": 2, "text_config": {"eos_token_id": [7, 2], "model_type": "x"}}
    assert edited(config, end_token=7) == {
        "eos_token_id": [7, 2],
        "text_config": {"eos_token_id": [7, 2], "model_type": "x"},
    }
    assert edited({"text_config": {"eos_token_id": 2}}, end_token=7) == {
        "text_config": {"eos_token_id": [7, 2]}
    }
    assert edited({}, end_token=7) == {"eos_token_id": 7}
    assert edited(config) == config


def edited(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {"dtype": None, "quantization": None, "untie": False, "vocab_size": None}
    return edit_config(config, **{**nothing, **changes})


NESTED = {
    "architectures": ["OwnForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "unknown": {"deep": {"torch_dtype": "float32", "n": None}},
    "text_config": {
        "vocab_size": 40,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "quantization_config": {},
    },
    "vision_config": {"vocab_size": 7, "dtype": "bfloat16"},
    "quantization_config": {"quant_method": "bitsandbytes"},
    "_name_or_path": "/home/someone/models/secret",
    "vocab_size": 40,
}


def test_nothing_changes_but_what_must() -> None:
    plain = {"z": 1, "a": {"dtype": 5, "list": [1, {"dtype": "bfloat16"}]}, "dtype": "float16", "x": None}
    assert json.dumps(edited(plain)) == json.dumps(plain)


def test_the_config_given_is_left_as_it_is() -> None:
    before = json.dumps(NESTED)
    edited(NESTED, dtype="float16", untie=True, vocab_size=(40, 43), quantization={"quant_method": "x"})
    assert json.dumps(NESTED) == before


def test_dtype_changes_under_whichever_name_it_stands_at_every_level() -> None:
    found = edited(NESTED, dtype="float16")
    assert found["torch_dtype"] == "float16"
    assert "dtype" not in found
    assert found["text_config"]["dtype"] == found["vision_config"]["dtype"] == "float16"
    assert found["unknown"]["deep"]["torch_dtype"] == "float16"


def test_quantization_is_removed_at_every_level() -> None:
    found = edited(NESTED | {"compression_config": {}})
    assert "quantization_config" not in json.dumps(found)
    assert "compression_config" not in found
    assert list(found) == [key for key in NESTED if key != "quantization_config"]


def test_new_quantization_stands_at_the_top_alone() -> None:
    found = edited(NESTED, quantization={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert found["quantization_config"] == {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "quantization_config" not in found["text_config"]


def test_untying_holds_at_every_level() -> None:
    found = edited(NESTED, untie=True)
    assert found["tie_word_embeddings"] is False
    assert found["text_config"]["tie_word_embeddings"] is False
    assert "tie_word_embeddings" not in found["vision_config"]


def test_vocab_size_follows_where_it_was_the_embedding() -> None:
    found = edited(NESTED, vocab_size=(40, 43))
    sizes = [found["vocab_size"], found["text_config"]["vocab_size"], found["vision_config"]["vocab_size"]]
    assert sizes == [43, 43, 7]


def test_a_local_path_does_not_travel() -> None:
    assert edited(NESTED)["_name_or_path"] == ""


# -- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_the_quantized_config_is_what_transformers_saves(tmp_path: Path, quant: str) -> None:
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.bfloat16)
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quant == "nf4-dq",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=wanted, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    streamconv.convert(base, tmp_path / "ours", quant=quant)
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    skipped = ours["quantization_config"].pop("llm_int8_skip_modules")
    # null there means what a loader works out for itself: here, the head.
    assert (skipped, theirs["quantization_config"].pop("llm_int8_skip_modules")) == (["lm_head"], None)
    assert ours == theirs
    # Back to 16 bit, nothing of it is left.
    streamconv.convert(tmp_path / "ours", tmp_path / "back", quant="none")
    back = (tmp_path / "back" / "config.json").read_text()
    assert back == (base / "config.json").read_text()
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "back"), "quantization_config")


def test_total_size_of_the_index_is_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.bfloat16)
    streamconv.convert(base, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * sum(p.numel() for p in load(base).parameters())}
    assert set(index["weight_map"].values()) == {
        path.name for path in (tmp_path / "out").glob("*.safetensors")
    }


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model
