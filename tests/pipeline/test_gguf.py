"""Merges into GGUF files: what is in them, and that all that holds for safetensors holds for these."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv.errors import CheckpointError, OptionError, OutputError, UnsupportedError, VerificationError
from streamconv.output.manifest import Report
from streamconv.pipeline import build_job, prepare, runner
from streamconv.pipeline.shown import plan_as_json
from tests.gguf.bases import SIZES, as_rotated, fast_tokenizer, read_file, read_tensors, write_llama
from tests.models import write_adapter, write_base
from tests.tiny import edit_json
from tests.tiny import read_tensors as read_safetensors

FILES = {"model-F16.gguf", "README.md", "LICENSE", "streamconv.json", "streamconv-recipe.json"}
SPLIT = [f"model-F16-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def merge(self, out: Path, **options: Any) -> Report:
        return streamconv.merge(
            self.base, self.adapter, out, **{"quant": "gguf:f16", "device": "cpu", "dtype": "auto"} | options
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("gguf")
    adapter = write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "v_proj", "down_proj"))
    return Inputs(write_llama(folder / "base"), adapter)


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    inputs.merge(out)
    return out


def hashes(folder: Path) -> Mapping[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def test_files_are_the_model_with_its_manifest_card_recipe_and_licence(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == FILES


def test_tensors_are_those_of_the_merge_in_float16(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    inputs.merge(tmp_path / "dense", quant="float32", max_shard_size="1GB")
    dense = read_safetensors(tmp_path / "dense" / "model.safetensors")
    found = read_tensors(whole)
    assert len(found) == len(dense)
    q, k = (as_rotated(dense[f"model.layers.1.self_attn.{name}_proj.weight"]) for name in "qk")
    assert torch.equal(found["blk.1.attn_q.weight"], q.half())
    assert torch.equal(found["blk.1.attn_k.weight"], k.half())
    assert torch.equal(found["blk.0.ffn_down.weight"], dense["model.layers.0.mlp.down_proj.weight"].half())
    assert torch.equal(found["token_embd.weight"], dense["model.embed_tokens.weight"].half())
    norm = found["blk.1.ffn_norm.weight"]
    assert norm.dtype == torch.float32
    assert torch.equal(norm, dense["model.layers.1.post_attention_layernorm.weight"])


def test_the_header_has_hyperparameters_and_tokenizer(whole: Path) -> None:
    pairs = read_file(whole).pairs
    assert pairs["general.architecture"] == "llama"
    assert pairs["general.file_type"] == 1
    assert pairs["llama.block_count"] == SIZES.layers
    assert pairs["llama.rope.dimension_count"] == 24
    assert pairs["llama.vocab_size"] == 300
    tokens, kinds = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    assert isinstance(tokens, tuple)
    assert isinstance(kinds, tuple)
    assert (len(tokens), len(kinds)) == (300, 300)
    assert (tokens[278:281], kinds[277:281]) == (("<s>", "</s>", "[PAD280]"), (1, 3, 3, 5))
    assert pairs["tokenizer.ggml.pre"] == "llama-bpe"
    # The tokenizer says which token begins; config.json's number is of another.
    assert pairs["tokenizer.ggml.bos_token_id"] == 278
    assert (pairs["tokenizer.ggml.add_bos_token"], pairs["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert str(pairs["tokenizer.chat_template"]).startswith("{% for message")


def test_bfloat16_is_copied_where_nothing_changes_it(inputs: Inputs, tmp_path: Path) -> None:
    inputs.merge(tmp_path / "out", quant="gguf:bf16")
    job = build_job(inputs.base, inputs.adapter, quant="gguf:bf16", device="cpu")
    (shard,) = plan_as_json(prepare(job))["files"]["shards"]
    actions = {tensor["name"]: tensor["action"] for tensor in shard["tensors"]}
    assert actions["blk.0.attn_output.weight"] == actions["token_embd.weight"] == "copy"
    assert actions["blk.0.attn_k.weight"] == "rewrite"
    found = read_tensors(tmp_path / "out", ["model-BF16.gguf"])
    base = read_safetensors(inputs.base / "model-00001-of-00003.safetensors")
    assert torch.equal(found["token_embd.weight"], base["model.embed_tokens.weight"])


def test_several_files_name_each_other(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    inputs.merge(tmp_path / "out", max_shard_size="190kB")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"model-F16.gguf"} | {*SPLIT}
    found, expected = read_tensors(tmp_path / "out", SPLIT), read_tensors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    heads = [read_file(tmp_path / "out", name).pairs for name in SPLIT]
    assert [head["split.no"] for head in heads] == [0, 1, 2]
    assert {(head["split.count"], head["split.tensors.count"]) for head in heads} == {(3, len(expected))}
    assert [len(head) > 4 for head in heads] == [True, False, False]
    streamconv.verify(tmp_path / "out")
    (tmp_path / "out" / SPLIT[1]).rename(tmp_path / "elsewhere")
    with pytest.raises((CheckpointError, VerificationError), match=SPLIT[1]):
        streamconv.verify(tmp_path / "out")


def test_verify_computes_it_again_and_sees_a_flipped_bit(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    found = streamconv.verify(whole, full=True, base=inputs.base, adapter=inputs.adapter, device="cpu")
    assert found.exact
    assert found.tensors == 21
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out" / "model-F16.gguf"
    raw = bytearray(path.read_bytes())
    for place in (len(raw) - 5, 40):  # of the data, and of the header
        flipped = raw.copy()
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(VerificationError, match=r"model-F16\.gguf hashes to"):
            streamconv.verify(tmp_path / "out")


def test_a_further_output_is_what_a_run_of_its_own_gives(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    inputs.merge(tmp_path / "out", quant="none", also=["gguf:f16"])
    assert hashes(tmp_path / "out" / "gguf-f16") == hashes(whole)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    streamconv.verify(tmp_path / "out")
    # And the other way round.
    inputs.merge(tmp_path / "turned", also=["none"])
    assert hashes(tmp_path / "turned") == hashes(whole)
    assert hashes(tmp_path / "turned" / "none") == hashes(tmp_path / "out")


def test_a_finished_run_is_not_done_again(inputs: Inputs, tmp_path: Path) -> None:
    inputs.merge(tmp_path / "out")
    before = (tmp_path / "out" / "model-F16.gguf").stat().st_mtime_ns
    assert inputs.merge(tmp_path / "out").resumed
    assert (tmp_path / "out" / "model-F16.gguf").stat().st_mtime_ns == before


def test_overwrite_replaces_a_model_and_no_collection(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inputs.merge(out, quant="none")
    inputs.merge(out, overwrite=True)  # of another kind: its files all go
    assert hashes(out) == hashes(whole)
    (out / "theirs-Q4_K_M.gguf").write_bytes(b"GGUF")
    inputs.merge(out, overwrite=True, quant="gguf:bf16")
    assert {path.name for path in out.iterdir()} == FILES - {"model-F16.gguf"} | {
        "model-BF16.gguf",
        "theirs-Q4_K_M.gguf",
    }
    (out / "streamconv.json").unlink()
    with pytest.raises(OutputError, match=r"holds model-BF16\.gguf but no streamconv\.json"):
        inputs.merge(out, overwrite=True)


def test_nothing_completes_a_model_before_all_is_in_place(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    inputs.merge(out, max_shard_size="190kB", quant="gguf:f16")
    there = hashes(out)

    def fails(*arguments: object) -> None:
        raise VerificationError("as if the disk had lost it")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "verify_layout", fails)
        with pytest.raises(VerificationError, match="as if the disk"):
            inputs.merge(out, max_shard_size="190kB", overwrite=True)
    assert not (out / SPLIT[0]).exists()
    assert (out / SPLIT[1]).exists()
    inputs.merge(out, max_shard_size="190kB", overwrite=True)
    assert hashes(out) == there


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(inputs: Inputs, tmp_path: Path, **options: Any) -> Path:
    """A copy of the base that can be spoilt."""
    return Path(shutil.copytree(inputs.base, tmp_path / "base"))


def convert(base: Path, out: Path, **options: Any) -> Report:
    return streamconv.convert(base, out, **{"quant": "gguf:f16", "device": "cpu"} | options)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        (
            {"architectures": ["FalconForCausalLM"]},
            UnsupportedError,
            r"is a FalconForCausalLM, which is not written as GGUF.*convert_hf_to_gguf",
        ),
        ({"architectures": None}, UnsupportedError, "is a 'llama', which is not written as GGUF"),
        ({"num_attention_heads": None}, CheckpointError, "must have a whole number as num_attention_heads"),
        ({"num_attention_heads": 5}, CheckpointError, "5 heads of config.json do not divide them in pairs"),
        ({"hidden_act": "relu"}, UnsupportedError, "has hidden_act 'relu', and llama.cpp computes silu"),
        (
            {"rms_norm_eps": "tiny"},
            CheckpointError,
            "must have a number as rms_norm_eps for a GGUF file, found 'tiny'",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            UnsupportedError,
            "has rope_scaling.rope_type 'dynamic', and llama.cpp does not compute such rotary",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            CheckpointError,
            "a number as rope_scaling.factor for a GGUF",
        ),
        ({"rope_scaling": 7}, CheckpointError, "must have an object as rope_scaling for a GGUF"),
    ],
)
def test_a_config_that_llama_cpp_would_compute_otherwise(
    inputs: Inputs, tmp_path: Path, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    base = refused(inputs, tmp_path)
    edit_json(base / "config.json", **fields)
    with pytest.raises(error, match=says):
        convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_missing_or_does_not_fit(inputs: Inputs, tmp_path: Path) -> None:
    base = refused(inputs, tmp_path)
    (base / "tokenizer.json").write_text(json.dumps(fast_tokenizer(301)))
    with pytest.raises(CheckpointError, match=r"'</s>' has the id 300, and the embedding 300 rows"):
        convert(base, tmp_path / "out")
    (base / "tokenizer.json").write_text(json.dumps(fast_tokenizer(300)))
    convert(base, tmp_path / "fits")
    odd = fast_tokenizer() | {"pre_tokenizer": {"type": "Whitespace"}}
    (base / "tokenizer.json").write_text(json.dumps(odd))
    with pytest.raises(
        UnsupportedError, match="the rule by which it cuts text is none that is known of llama"
    ):
        convert(base, tmp_path / "out")
    (base / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_has_no_place(tmp_path: Path) -> None:
    shapes = SIZES.shapes | {"model.layers.0.self_attn.extra.weight": (8, 8)}
    base = write_llama(tmp_path / "base")
    config = (base / "config.json").read_text()
    write_base(base, shapes)
    (base / "config.json").write_text(config)
    (base / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    with pytest.raises(
        UnsupportedError, match=r"llama has no place for model\.layers\.0\.self_attn\.extra\.weight"
    ):
        convert(base, tmp_path / "out")


def test_options_that_are_not_for_these_files(inputs: Inputs, tmp_path: Path) -> None:
    for option, says in (
        ({"dtype": "float32"}, "says all of a GGUF file's types"),
        ({"rounding": "nearest"}, "the output is not quantized"),
        ({"group_size": 32}, "--group-size 32 does not fit gguf:f16"),
    ):
        with pytest.raises(OptionError, match=says):
            inputs.merge(tmp_path / "out", **option)
