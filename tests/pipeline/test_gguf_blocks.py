"""Merges into GGUF files of block types: which type every tensor has, what survives, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

import streamconv
from streamconv.errors import InputError, OptionError, UnsupportedError, VerificationError
from streamconv.formats.ggml_mixes import MIXES
from streamconv.formats.gguf_blocks import BLOCK_FORMATS
from streamconv.kernels.ggml import BLOCK_TYPES, block_kernels_for
from streamconv.output.manifest import Report
from streamconv.pipeline import build_job, prepare
from tests.gguf.bases import as_rotated, fast_tokenizer, read_file, write_llama
from tests.models import Sizes, write_adapter
from tests.tiny import read_tensors as read_safetensors
from tests.tiny import save_base

SIZES = Sizes(hidden=256, inner=512, layers=4, vocabulary=300)
NARROW = Sizes(hidden=32, inner=72, layers=1, vocabulary=300)


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def merge(self, out: Path, quant: str, **options: Any) -> Report:
        return streamconv.merge(self.base, self.adapter, out, quant=quant, device="cpu", **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("gguf")
    adapter = write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "v_proj", "down_proj"))
    return Inputs(write_llama(folder / "base", SIZES), adapter)


@pytest.fixture(scope="module")
def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    """The merge in float32."""
    out = tmp_path_factory.mktemp("merged") / "out"
    inputs.merge(out, "float32", max_shard_size="1GB")
    return read_safetensors(out / "model.safetensors")


def types_in(folder: Path, name: str) -> dict[str, str]:
    return {
        tensor: each.dtype.code for tensor, each in read_file(folder, f"model-{name}.gguf").tensors.items()
    }


def values_in(folder: Path, file: str) -> dict[str, Tensor]:
    """Values of all tensors of a file, as its types decode."""
    raw, found = (folder / file).read_bytes(), {}
    for name, tensor in read_file(folder, file).tensors.items():
        kind = BLOCK_TYPES[tensor.dtype.code.lower()]
        content = bytearray(raw[tensor.offset : tensor.offset + tensor.nbytes])
        stored = torch.frombuffer(content, dtype=torch.uint8).view(-1, kind.bytes)
        values = torch.empty(len(stored), kind.super_block)
        block_kernels_for(torch.device("cpu")).decode(kind, stored, values)
        found[name] = values.view(tensor.shape)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.fixture(scope="module")
def mixed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("mixed") / "out"
    return out, inputs.merge(out, "gguf:q4_k_m")


def test_values_and_types_are_those_of_the_mix(
    mixed: tuple[Path, Report], merged: Mapping[str, Tensor]
) -> None:
    out, _ = mixed
    types = types_in(out, "Q4_K_M")
    assert types["blk.3.attn_v.weight"] == types["blk.3.ffn_down.weight"] == types["output.weight"] == "Q6_K"
    assert (
        types["blk.0.attn_v.weight"] == types["token_embd.weight"] == types["blk.1.attn_q.weight"] == "Q4_K"
    )
    assert types["blk.0.attn_norm.weight"] == "F32"
    found = values_in(out, "model-Q4_K_M.gguf")
    limits = {"Q4_K": 0.006, "Q6_K": 0.0004}
    for ours, theirs in (("q_proj", "attn_q"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
        expected = merged[f"model.layers.3.self_attn.{ours}.weight"]
        expected = as_rotated(expected) if ours == "q_proj" else expected
        name = f"blk.3.{theirs}.weight"
        assert error(found[name], expected) < limits[types[name]]
    assert error(found["token_embd.weight"], merged["model.embed_tokens.weight"]) < limits["Q4_K"]
    pairs = read_file(out, "model-Q4_K_M.gguf").pairs
    assert pairs["general.file_type"] == MIXES["q4_k_m"].file_type
    assert pairs["general.quantization_version"] == 2


def test_what_survives_is_measured_on_what_was_written(
    inputs: Inputs, mixed: tuple[Path, Report], merged: Mapping[str, Tensor], tmp_path: Path
) -> None:
    out, report = mixed
    found = values_in(out, "model-Q4_K_M.gguf")
    streamconv.convert(inputs.base, tmp_path / "base", quant="float32", max_shard_size="1GB")
    base = read_safetensors(tmp_path / "base" / "model.safetensors")
    kept = delta = 0.0
    for layer in range(SIZES.layers):
        for ours, theirs in (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.down_proj", "ffn_down"),
        ):
            name = f"model.layers.{layer}.{ours}.weight"
            was, change = base[name], merged[name] - base[name]
            if theirs == "attn_q":
                was, change = as_rotated(was), as_rotated(change)
            kept += float(((found[f"blk.{layer}.{theirs}.weight"] - was).double() * change).sum())
            delta += float(change.double().square().sum())
    assert report.kept_delta == pytest.approx(kept / delta, rel=1e-3)
    with pytest.raises(
        VerificationError, match=r"of the fine-tune survives adaptive .*choose --rounding stochastic"
    ):
        inputs.merge(tmp_path / "out", "gguf:q4_k_m", min_kept=1.0)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize("quant", BLOCK_FORMATS)
def test_search_is_better_than_plain_nearest_for_every_format(
    inputs: Inputs, merged: Mapping[str, Tensor], tmp_path: Path, quant: str
) -> None:
    small = {name: tensor for name, tensor in merged.items() if "layers.0" in name or "layers" not in name}
    errors = []
    plan = prepare(build_job(inputs.base, inputs.adapter, quant=quant, device="cpu")).plan
    assert plan.rounding is not None
    assert plan.rounding.name == "adaptive"
    for rounding in ("search", "nearest"):
        inputs.merge(tmp_path / rounding, quant, rounding=rounding)
        found = values_in(tmp_path / rounding, f"model-{quant[5:].upper()}.gguf")
        errors.append(error(found["blk.0.ffn_up.weight"], small["model.layers.0.mlp.up_proj.weight"]))
    if quant == "gguf:q6_k":  # nearest rounding of it searches, as llama.cpp's does
        assert errors[0] == errors[1]
    else:
        assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize(("source", "quant"), [("gguf:q4_1", "gguf:q5_k"), ("gguf:q5_1", "gguf:q5_1")])
def test_an_update_of_a_base_that_was_expanded_from_a_quantized_file_is_kept(
    inputs: Inputs, tmp_path: Path, source: str, quant: str
) -> None:
    """Its weights lie on the output's grid, or near it, and nothing says so; searched scales find that grid."""
    streamconv.convert(inputs.base, tmp_path / "packed", quant=source, device="cpu")
    streamconv.convert(tmp_path / "packed", tmp_path / "base", quant="bfloat16", device="cpu")
    small = write_adapter(tmp_path / "small", SIZES.shapes, targets=("q_proj", "down_proj"), size=2e-4)
    found = {
        rounding: streamconv.merge(
            tmp_path / "base",
            small,
            tmp_path / rounding,
            quant=quant,
            rounding=rounding,
            min_kept=0.0,
            device="cpu",
        )
        for rounding in ("search", "auto")
    }
    assert found["auto"].rounding == "adaptive"
    kept = {rounding: report.kept_delta or 0.0 for rounding, report in found.items()}
    assert kept["search"] < 0.25
    assert 0.9 < kept["auto"] < 1.1


def test_off_every_grid_adaptive_rounding_is_search(inputs: Inputs, tmp_path: Path) -> None:
    for rounding in ("search", "adaptive"):
        inputs.merge(tmp_path / rounding, "gguf:q4_k_m", rounding=rounding)
    first, second = (values_in(tmp_path / each, "model-Q4_K_M.gguf") for each in ("search", "adaptive"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_files_further_outputs_and_verification(
    inputs: Inputs, mixed: tuple[Path, Report], tmp_path: Path
) -> None:
    inputs.merge(tmp_path / "out", "gguf:q4_k_m", max_shard_size="700kB", also=["gguf:q8_0", "none"])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.gguf"))
    assert len(files) == 3
    whole = values_in(mixed[0], "model-Q4_K_M.gguf")
    parts = {name: each for file in files for name, each in values_in(tmp_path / "out", file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    streamconv.verify(tmp_path / "out", full=True, base=inputs.base, adapter=inputs.adapter, device="cpu")
    further = tmp_path / "out" / "gguf-q8_0"
    assert {path.name[:10] for path in further.glob("*.gguf")} == {"model-Q8_0"}
    streamconv.verify(tmp_path / "out" / "gguf-q8_0")


def test_modules_are_left_out_or_have_a_type_of_their_own(inputs: Inputs, tmp_path: Path) -> None:
    rules = {"lm_head": "gguf:q8_0", "re:.*layers.1.mlp.up_proj": "none", "self_attn.q_proj": "gguf:bf16"}
    inputs.merge(tmp_path / "out", "gguf:q4_0", ignore=["k_proj"], quant_for=rules)
    types = types_in(tmp_path / "out", "Q4_0")
    assert types["output.weight"] == "Q8_0"
    assert types["blk.1.ffn_up.weight"] == types["blk.2.attn_k.weight"] == "F16"
    assert types["blk.1.attn_q.weight"] == "BF16"
    assert types["blk.0.ffn_up.weight"] == types["blk.2.attn_v.weight"] == "Q4_0"
    inputs.merge(tmp_path / "whole", "gguf:bf16", quant_for={"mlp": "gguf:q8_0"})
    types = types_in(tmp_path / "whole", "BF16")
    assert (types["blk.0.ffn_up.weight"], types["blk.0.attn_q.weight"]) == ("Q8_0", "BF16")


def save_letters(folder: Path, text: Path) -> Path:
    """A tokenizer to which each letter is a token, and a text of such."""
    letters = [chr(33 + number) for number in range(94)]
    vocabulary = {letter: number for number, letter in enumerate((*letters, "\u0120"))}
    tokenizer = fast_tokenizer()
    tokenizer["model"] |= {"vocab": vocabulary, "merges": []}
    tokenizer["added_tokens"] = [
        each | {"id": 95 + place} for place, each in enumerate(tokenizer["added_tokens"])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text.write_text("".join(letters[(place * place + 3 * place) % 89] for place in range(2000)))
    return text


def test_text_chooses_codes_of_experts_that_are_one_tensor(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    text = save_letters(base, tmp_path / "text.txt")
    given = {"calibration": text, "calibration_sequence_length": 32, "calibration_tokens": 512}
    reports = {}
    for rounding in ("search", "auto"):
        out = tmp_path / rounding
        options: dict[str, Any] = {"quant": "gguf:q4_0", "rounding": rounding, "device": "cpu", **given}
        reports[rounding] = streamconv.convert(base, out, **options)
        streamconv.verify(out)
    assert reports["auto"].rounding == "feedback"
    lost = {
        name: sum(each["relative_error"] for each in report.calibrated.values())
        for name, report in reports.items()
    }
    assert lost["auto"] < 0.9 * lost["search"]
    streamconv.convert(base, tmp_path / "whole", quant="gguf:bf16", device="cpu")
    whole = values_in(tmp_path / "whole", "model-BF16.gguf")
    found = values_in(tmp_path / "auto", "model-Q4_0.gguf")
    for name in (f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")):
        assert len(whole[name]) == 2
        for mine, other in zip(found[name], whole[name], strict=True):
            assert error(mine, other) < 0.05
    with pytest.raises(
        OptionError, match=r"codes in a GGUF file that a text chose .* give it with --calibration"
    ):
        streamconv.verify(tmp_path / "auto", full=True, base=base, device="cpu")
    assert streamconv.verify(tmp_path / "auto", full=True, base=base, calibration=text, device="cpu").exact


# -- refusals ----------------------------------------------------------------------------------------------------


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", NARROW)
    plan = prepare(build_job(base, None, quant="gguf:q4_k", device="cpu")).plan
    assert plan.unfit == ("model.layers.0.mlp.down_proj",)  # 72 columns
    streamconv.convert(base, tmp_path / "out", quant="gguf:q4_k", device="cpu")
    types = types_in(tmp_path / "out", "Q4_K")
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q5_0")
    with pytest.raises(OptionError, match=r"down_proj\.weight has shape \[32, 72\], whose rows are no whole"):
        streamconv.convert(base, tmp_path / "no", quant="gguf:q4_k", quant_for={"mlp": "gguf:q8_0"})
    odd = write_llama(tmp_path / "odd", Sizes(hidden=40, inner=72, layers=1, vocabulary=300))
    with pytest.raises(OptionError, match=r"would quantize nothing: model.embed_tokens.weight has shape"):
        streamconv.convert(odd, tmp_path / "no", quant="gguf:q8_0")


def test_options_that_fit_no_file_of_this_kind(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a GGUF file has types of its own, and w4a16 is none"):
        inputs.merge(tmp_path / "out", "gguf:q4_0", quant_for={"lm_head": "w4a16"})
    with pytest.raises(OptionError, match="leave every matrix in 16 bit"):
        inputs.merge(tmp_path / "out", "gguf:q4_0", ignore=["re:.*"])
    with pytest.raises(OptionError, match="--group-size 32 does not fit gguf:q4_0"):
        inputs.merge(tmp_path / "out", "gguf:q4_0", group_size=32)


@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize(
    ("value", "quant"), [(1e6, "gguf:q8_0"), (1e6, "gguf:q4_k"), (torch.nan, "gguf:q6_k")]
)
def test_values_that_no_scale_can_hold(tmp_path: Path, value: float, quant: str, rounding: str) -> None:
    base = write_llama(tmp_path / "base", Sizes(hidden=256, inner=256, layers=1, vocabulary=300), shards=1)
    (path,) = base.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 7] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight|blk\.0\.ffn_up\.weight"):
        streamconv.convert(base, tmp_path / "out", quant=quant, device="cpu", rounding=rounding)
    assert not list((tmp_path / "out").glob("*.gguf"))
