"""Element types, options, tokenizers, a resized vocabulary: through the public API, opened with transformers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import streamconv
from streamconv.errors import AdapterError, InputError, OptionError, ResourceError, UnsupportedError
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import (
    VOCABULARY,
    Adapter,
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    load_base,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONV1D = LoraConfig(
    r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
)
NORM = "model.norm.weight"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- element types -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, tuple[Path, Adapter]]:
    """A base in every type, each with an adapter of its own."""
    found = {}
    for dtype in DTYPES:
        folder = tmp_path_factory.mktemp(name_of(dtype))
        base = save_base(folder / "base", llama_config(), dtype=dtype, max_shard_size="30KB")
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        found[dtype] = base, save_adapter(folder / "adapter", base, config)
    return found


@pytest.mark.parametrize("stored", DTYPES, ids=name_of)
@pytest.mark.parametrize("asked", [None, *DTYPES], ids=str)
def test_conversion_is_one_rounding(
    stored: torch.dtype,
    asked: torch.dtype | None,
    adapted: dict[torch.dtype, tuple[Path, Adapter]],
    tmp_path: Path,
) -> None:
    base, _ = adapted[stored]
    streamconv.convert(str(base), str(tmp_path / "out"), dtype="auto" if asked is None else name_of(asked))
    expected = {name: tensor.to(asked or stored) for name, tensor in tensors(base).items()}
    found = tensors(tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert open_model(tmp_path / "out").dtype == (asked or stored)


@pytest.mark.parametrize("stored", DTYPES, ids=name_of)
@pytest.mark.parametrize("asked", [None, *DTYPES], ids=str)
def test_a_merge_rounds_its_float32_result_once(
    stored: torch.dtype,
    asked: torch.dtype | None,
    adapted: dict[torch.dtype, tuple[Path, Adapter]],
    tmp_path: Path,
) -> None:
    base, adapter = adapted[stored]
    streamconv.merge(
        str(base), str(adapter.path), str(tmp_path / "out"), dtype="auto" if asked is None else name_of(asked)
    )
    streamconv.merge(str(base), str(adapter.path), str(tmp_path / "float32"), dtype="float32")
    found, exact = tensors(tmp_path / "out"), tensors(tmp_path / "float32")
    for name, tensor in exact.items():
        assert found[name].dtype == (asked or stored)
        assert torch.equal(found[name], tensor.to(found[name].dtype))
    # The live model computes in its own type; made float32, it has the very weights that are merged.
    live = copy.deepcopy(adapter.live).float()
    assert logits_differ_by(open_model(tmp_path / "float32"), logits(live)) < 1e-4


@pytest.mark.parametrize("value", [70000.0, -65520.0])
def test_what_float16_cannot_hold_is_refused_by_name(value: float, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.float32)
    norm = tensors(base)[NORM]
    norm[3] = value
    edit_tensors(base / "model.safetensors", put={NORM: norm})
    with pytest.raises(InputError, match=NORM):
        streamconv.convert(str(base), str(tmp_path / "out"), dtype="float16")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    streamconv.convert(str(base), str(tmp_path / "other"), dtype="bfloat16")
    norm[3] = 65519.0 if value > 0 else -65519.0  # rounds to 65504
    edit_tensors(base / "model.safetensors", put={NORM: norm})
    streamconv.convert(str(base), str(tmp_path / "fits"), dtype="float16")
    assert float(tensors(tmp_path / "fits")[NORM].abs().max()) == 65504


def test_what_bfloat16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.float32)
    norm = tensors(base)[NORM]
    norm[3] = torch.finfo(torch.float32).max
    edit_tensors(base / "model.safetensors", put={NORM: norm})
    with pytest.raises(InputError, match=NORM):
        streamconv.convert(str(base), str(tmp_path / "out"), dtype="bfloat16")


def test_a_merge_that_overflows_float16_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.float16)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    file = adapter.path / "adapter_model.safetensors"
    edit_tensors(file, put={key: tensor.float() * 1000 for key, tensor in read_tensors(file).items()})
    with pytest.raises(InputError, match=f"{name}.*float16"):
        streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"))
    streamconv.merge(str(base), str(adapter.path), str(tmp_path / "wide"), dtype="bfloat16")
    assert bool(tensors(tmp_path / "wide")[name].isfinite().all())


# -- GPT-2 with every option -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter, Path]:
    """A base of several cells a weight, an adapter, and their plain merge."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = gpt2_config()
    config.n_embd = 144
    base = save_base(folder / "base", config, max_shard_size="400KB")
    (base / "notes.txt").write_text("kept only when asked for")
    adapter = save_adapter(folder / "adapter", base, CONV1D)
    streamconv.merge(str(base), str(adapter.path), str(folder / "plain"))
    assert logits_differ_by(open_model(folder / "plain"), adapter.logits()) < 1e-4
    return base, adapter, folder / "plain"


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "none"},
        {"quant": "float32"},
        {"dtype": "float32"},
        {"max_ram": "100MiB"},
        {"max_ram": 2**31},
        {"max_shard_size": "150KB"},
        {"max_shard_size": 10**9},
        {"card": False, "verify": False, "resume": False},
        {"tokenizer": "base", "copy_extra": ["*.txt"]},
        {"seed": 3, "min_kept": 0.9, "device": "cpu", "ignore": ["c_fc"], "overwrite": True},
    ],
    ids=str,
)
def test_options_that_change_no_value(
    options: dict[str, Any], gpt2: tuple[Path, Adapter, Path], tmp_path: Path
) -> None:
    base, adapter, plain = gpt2
    out = tmp_path / "out"
    streamconv.merge(str(base), str(adapter.path), str(out), **options)
    found, expected = tensors(out), tensors(plain)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert logits_differ_by(open_model(out), adapter.logits()) < 1e-4
    assert (out / "notes.txt").exists() is ("copy_extra" in options)
    assert (out / "README.md").exists() is options.get("card", True)
    largest = max(file.stat().st_size for file in out.glob("*.safetensors"))
    assert options.get("max_shard_size") != "150KB" or len(list(out.glob("*.safetensors"))) > 5
    assert options.get("max_shard_size") != 10**9 or largest > 10**6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_other_types_round_the_plain_merge(
    dtype: torch.dtype, gpt2: tuple[Path, Adapter, Path], tmp_path: Path
) -> None:
    base, adapter, plain = gpt2
    streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"), dtype=name_of(dtype))
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in tensors(plain).items())
    assert open_model(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant": "nf4"}, UnsupportedError, r"h\.0\.attn\.c_attn\.weight"),
        ({"quant": "nf4-dq", "ignore": ["attn"]}, UnsupportedError, r"h\.0\.mlp\.c_fc\.weight"),
        ({"merge_base": "nf4"}, UnsupportedError, r"h\.0\.attn\.c_attn\.weight"),
        ({"rounding": "nearest"}, OptionError, "--rounding nearest"),
        ({"quant": "float16", "dtype": "float32"}, OptionError, "--dtype float32"),
        ({"max_ram": "1MiB"}, ResourceError, "--max-ram"),
        ({"tokenizer": "adapter"}, InputError, "adapter"),
        ({"copy_extra": ["*.safetensors"]}, OptionError, "--copy-extra"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    gpt2: tuple[Path, Adapter, Path],
    tmp_path: Path,
) -> None:
    base, adapter, _ = gpt2
    with pytest.raises(error, match=message):
        streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


# -- beside the weights --------------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
CHAT = [{"role": "user", "content": "word3 word4"}, {"role": "assistant", "content": "word5"}]


def save_tokenizer(folder: Path, words: int = VOCABULARY) -> None:
    vocabulary = {"user": 0, "assistant": 1} | {f"word{i}": i for i in range(2, words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="word2"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word2", eos_token="word7")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def chat(folder: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    ids: Tensor = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=False)
    return ids


def greedy(model: torch.nn.Module, prompt: Tensor) -> Tensor:
    answer: Tensor = model.generate(  # type: ignore[operator]  # it has what any causal model has
        input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0
    )
    return answer


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-dq"])
def test_the_result_chats(quant: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(tied=True))
    save_tokenizer(base)
    GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=VOCABULARY - 1).save_pretrained(base)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    out = tmp_path / "out"
    streamconv.merge(str(base), str(adapter.path), str(out), quant=quant)
    prompt = chat(out)
    assert torch.equal(prompt, chat(base))
    assert prompt.tolist() == [[0, 3, 4, 1, 5]]
    answer = greedy(open_model(out), prompt)
    assert answer.shape[1] <= prompt.shape[1] + 5
    assert torch.equal(answer[:, :5], prompt)
    if quant == "none":
        assert torch.equal(answer, greedy(adapter.live, prompt))
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def save_grown_adapter(folder: Path, base: Path, words: int) -> Adapter:
    """An adapter trained after resize_token_embeddings, with embedding and head saved."""
    model = load_base(base)
    model.resize_token_embeddings(words, mean_resizing=False)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings|embedding)"
        )
        live = get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        live.save_pretrained(folder)
    return Adapter(folder, live)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_grown_vocabulary_comes_with_its_tokenizer(tied: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(tied=tied))
    save_tokenizer(base)
    adapter = save_grown_adapter(tmp_path / "adapter", base, VOCABULARY + 3)
    with pytest.raises(InputError, match="tokenizer"):
        streamconv.merge(str(base), str(adapter.path), str(tmp_path / "refused"))
    save_tokenizer(adapter.path, VOCABULARY + 3)
    out = tmp_path / "out"
    streamconv.merge(str(base), str(adapter.path), str(out))
    model = open_model(out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == VOCABULARY + 3
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 3
    assert logits_differ_by(model, adapter.logits()) < 1e-4
    assert len(AutoTokenizer.from_pretrained(out)) == VOCABULARY + 3


@pytest.mark.parametrize("lost", ["lm_head", "embed_tokens"])
def test_half_a_grown_vocabulary_is_refused(lost: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config())
    save_tokenizer(base)
    adapter = save_grown_adapter(tmp_path / "adapter", base, VOCABULARY + 3)
    save_tokenizer(adapter.path, VOCABULARY + 3)
    file, kept = (
        adapter.path / "adapter_model.safetensors",
        "embed_tokens" if lost == "lm_head" else "lm_head",
    )
    edit_tensors(file, drop=[name for name in read_tensors(file) if f".{lost}." in name])
    edit_json(adapter.path / "adapter_config.json", modules_to_save=[kept])
    with pytest.raises(
        AdapterError, match=r"embed_tokens\.weight would have 4[03] rows and lm_head\.weight 4[30]"
    ):
        streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"))


def test_a_classifier_of_more_classes_has_them_all(tmp_path: Path) -> None:
    config = llama_config()
    config.num_labels, config.pad_token_id = 3, 0
    base = save_base(tmp_path / "base", config, auto_class=AutoModelForSequenceClassification)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapter = save_adapter(tmp_path / "adapter", base, lora, auto_class=AutoModelForSequenceClassification)
    score = "base_model.model.score.weight"
    edit_tensors(adapter.path / "adapter_model.safetensors", put={score: torch.ones(5, config.hidden_size)})
    streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"))
    merged = load_base(tmp_path / "out", AutoModelForSequenceClassification)
    assert merged.config.num_labels == 5
    assert torch.equal(merged.get_parameter("score.weight").data, torch.ones(5, config.hidden_size))
