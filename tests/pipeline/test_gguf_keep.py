"""A GGUF base is kept: the same file, with what an adapter changes in its place, in the type that it had there."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, Qwen3MoeConfig

import streamconv
from streamconv.checkpoint.gguf import GgufFile, read_gguf
from streamconv.dtypes import GGML_TYPES
from streamconv.errors import OptionError, UnsupportedError
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.output.manifest import Report
from streamconv.pipeline import build_job, prepare
from streamconv.pipeline.shown import plan_as_text
from streamconv.rounding import ROUNDINGS
from streamconv.storage.local import open_folder
from tests.gguf.bases import fast_tokenizer, read_file, write_llama
from tests.models import Sizes, write_adapter
from tests.pipeline.test_gguf_blocks import save_letters
from tests.tiny import edit_json, save_base

SIZES = Sizes(hidden=256, inner=256, layers=2, vocabulary=300)
WRITTEN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "f16", "bf16", "f32")
READ_ONLY = tuple(name for name in BLOCK_TYPES if name not in WRITTEN)
# 16-bit floats in a super-block, of those types whose other bytes may be anything.
HALVES = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q6_k": (208,),
}


def matrices(layer: int) -> Iterator[str]:
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        yield f"blk.{layer}.{name}.weight"


@dataclass
class Rewritten:
    """A GGUF file written by hand after another: with other types, bytes, order, gaps, and keys of its own."""

    source: GgufFile
    types: Mapping[str, str]
    alignment: int = 32
    junk: bytes = b""
    version: int = 3
    pairs: Mapping[str, bytes] = field(default_factory=dict)
    file_type: int = 15

    def write(self, path: Path) -> Path:
        generator = torch.Generator().manual_seed(5)
        # The pairs as they are, before the list of tensors.
        pairs = self.source.raw[24 : self.source.raw.index(self._first)]
        own = _text("general.file_type") + struct.pack("<I", 4)
        pairs = pairs.replace(own + struct.pack("<I", 1), own + struct.pack("<I", self.file_type))
        count = struct.unpack_from("<Q", self.source.raw, 16)[0] + len(self.pairs)
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.source.tensors), count) + pairs
        head += b"".join(_text(key) + value for key, value in self.pairs.items())
        data, entries = b"", b""
        for name, tensor in reversed(list(self.source.tensors.items())):
            kind = BLOCK_TYPES[self.types.get(name, "f32")]
            raw = content(kind.name, tensor.shape, generator)
            data += (
                (self.junk * self.alignment)[: -len(data) % self.alignment]
                if self.junk
                else bytes(-len(data) % self.alignment)
            )
            entries += _text(name) + struct.pack(
                f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1]
            )
            entries += struct.pack("<IQ", kind.number, len(data))
            data += raw
        head += entries
        path.write_bytes(head + bytes(-len(head) % self.alignment) + data + self.junk)
        return path

    @property
    def _first(self) -> bytes:
        return _text(next(iter(self.source.tensors)))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def content(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> bytes:
    """Bytes of a tensor: any codes and integers, in no form that an encoder would have chosen; floats of both signs."""
    count = torch.Size(shape).numel()
    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return _bytes(torch.randn(count, generator=generator).mul(0.05).to(dtype))
    block = BLOCK_TYPES[kind]
    most = 256 if kind in HALVES else 32  # of others, no two bytes are a 16-bit float that is not finite
    raw = torch.randint(
        0, most, (count // block.super_block, block.bytes), generator=generator, dtype=torch.uint8
    )
    for place in HALVES.get(kind, ()):
        halves = (
            torch.randn(len(raw), 1, generator=generator)
            .mul(0.01 if block.super_block == 32 else 0.0002)
            .half()
        )
        raw[:, place : place + 2] = halves.view(torch.uint8)
    return _bytes(raw)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ours, and the model it was made of."""
    folder = tmp_path_factory.mktemp("gguf")
    streamconv.convert(write_llama(folder / "model", SIZES), folder / "f16", quant="gguf:f16", device="cpu")
    return folder / "f16"


@pytest.fixture(scope="module")
def mixed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all types that are written, in an order, with an alignment and with keys that we do not write."""
    names = [*matrices(0), *matrices(1)]
    types = {name: WRITTEN[number % len(WRITTEN)] for number, name in enumerate(names)}
    types |= {"token_embd.weight": "iq2_xxs", "output.weight": "tq1_0"}
    alignment = struct.pack("<II", 4, 64)
    odd = struct.pack("<IIQ3b", 9, 1, 3, -1, 2, -3)
    file = Rewritten(
        read_file(plain), types, 64, b"\x5a" * 7, 2, {"general.alignment": alignment, "made.by": odd}
    )
    return file.write(tmp_path_factory.mktemp("mixed") / "some-model.Q4_K_M.gguf")


def adapter_of(folder: Path, targets: tuple[str, ...], **options: Any) -> Path:
    return write_adapter(folder, SIZES.shapes, targets=targets, **options)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(tmp_path_factory.mktemp("adapter") / "adapter", ALL, size=0.01)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_effect(adapter_of(tmp_path_factory.mktemp("zero") / "adapter", ALL))


def without_effect(adapter: Path) -> Path:
    """The adapter with updates of zero, though neither factor is."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        (tensor[0] if ".lora_A." in name else tensor[:, 1:]).zero_()
    save_file(tensors, path)
    return adapter


def merge(base: Path, adapter: Path, out: Path, **options: Any) -> Report:
    return streamconv.merge(base, adapter, out, **{"quant": "keep", "device": "cpu"} | options)


def only_file(folder: Path) -> Path:
    (found,) = folder.glob("*.gguf")
    return found


def tensors_of(path: Path) -> dict[str, bytes]:
    storage = open_folder(str(path.parent))
    raw = path.read_bytes()
    found = read_gguf(storage.file(path.name), storage.read_start, GGML_TYPES)
    return {name: raw[each.offset : each.offset + each.nbytes] for name, each in found.tensors.items()}


def test_without_an_adapter_every_byte_stays(mixed: Path, tmp_path: Path) -> None:
    report = streamconv.convert(mixed, tmp_path / "out", device="cpu")
    found = only_file(tmp_path / "out")
    assert found.read_bytes() == mixed.read_bytes()
    assert (report.quant, report.notes) == ("gguf:q4_k_m", ())
    streamconv.verify(tmp_path / "out", full=True, base=mixed, device="cpu")


@pytest.mark.parametrize(
    "rounding", ["auto", *(name for name, each in ROUNDINGS.items() if not each.calibrated)]
)
def test_an_update_of_zero_leaves_every_byte(mixed: Path, zero: Path, tmp_path: Path, rounding: str) -> None:
    """In every type, whatever scales its blocks have, and though all of it is decoded."""
    report = merge(mixed, zero, tmp_path / "out", rounding=rounding)
    assert report.kept_delta is None
    found = tensors_of(only_file(tmp_path / "out"))
    for name, raw in tensors_of(mixed).items():
        assert found[name] == raw, name
    assert only_file(tmp_path / "out").read_bytes() == mixed.read_bytes()


def values_of(path: Path) -> dict[str, Tensor]:
    """Values of all tensors, as gguf-py decodes them."""
    return {
        each.name: torch.tensor(dequantize(each.data, each.tensor_type)).view(*each.shape[::-1].tolist())
        for each in GGUFReader(path).tensors
    }


def test_a_merge_is_near_the_merge_in_float32(mixed: Path, adapter: Path, tmp_path: Path) -> None:
    """Rows of q and k are turned back and forth, and types stay; what survives is what the file says."""
    report = merge(mixed, adapter, tmp_path / "out", rounding="nearest")
    for name, source in (("target", adapter), ("base", None)):
        options: Any = {"quant": "gguf:f16", "device": "cpu"}
        if source is None:
            streamconv.convert(mixed, tmp_path / name, **options)
        else:
            streamconv.merge(mixed, source, tmp_path / name, **options)
    found, target, base = (values_of(only_file(tmp_path / name)) for name in ("out", "target", "base"))
    kept = delta = 0.0
    for name in (*matrices(0), *matrices(1)):
        change = (target[name] - base[name]).double()
        share = float(((found[name] - base[name]) * change).sum() / change.square().sum())
        assert share == pytest.approx(1, abs=0.05), name
        kept, delta = kept + share * float(change.square().sum()), delta + float(change.square().sum())
    assert report.kept_delta == pytest.approx(1, abs=0.02)
    types = [
        {each.name: each.tensor_type for each in GGUFReader(path).tensors}
        for path in (only_file(tmp_path / "out"), mixed)
    ]
    assert types[0] == types[1]
    assert only_file(tmp_path / "out").name == "model-Q4_K_M.gguf"
    streamconv.verify(tmp_path / "out", full=True, base=mixed, adapter=adapter, device="cpu")


def test_only_what_the_adapter_changes_is_touched(mixed: Path, tmp_path: Path) -> None:
    """Of a header, nothing; keys and their types are those of the file."""
    adapter = adapter_of(tmp_path / "adapter", ("k_proj",))
    merge(mixed, adapter, tmp_path / "out")
    before, after = tensors_of(mixed), tensors_of(only_file(tmp_path / "out"))
    assert {name for name in before if before[name] != after[name]} == {
        "blk.0.attn_k.weight",
        "blk.1.attn_k.weight",
    }
    ours, theirs = GGUFReader(only_file(tmp_path / "out")), GGUFReader(mixed)
    assert [*ours.fields] == [*theirs.fields]
    assert "made.by" in ours.fields
    for name, found in ours.fields.items():
        assert [part.tobytes() for part in found.parts] == [
            part.tobytes() for part in theirs.fields[name].parts
        ]


def test_rows_without_an_update_keep_their_bytes(mixed: Path, adapter: Path, tmp_path: Path) -> None:
    """Whatever scales a rounding chooses for others."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor[::2] = 0
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(tensors, tmp_path / "adapter" / path.name)
    merge(mixed, tmp_path / "adapter", tmp_path / "out", rounding="search")
    before, after = tensors_of(mixed), tensors_of(only_file(tmp_path / "out"))
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"):
        rows = SIZES.inner if name.endswith("up.weight") else SIZES.hidden
        one, other = (
            torch.frombuffer(bytearray(each[name]), dtype=torch.uint8).view(rows, -1)
            for each in (before, after)
        )
        assert torch.equal(one[::2], other[::2]), name
        assert not (one[1::2] == other[1::2]).all(1).any(), name


def test_one_expert_of_those_that_are_stacked(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=3, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    base = save_base(tmp_path / "model", config, dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text(json.dumps(fast_tokenizer(90)))
    streamconv.convert(base, tmp_path / "base", quant="gguf:q5_1", device="cpu")
    file = only_file(tmp_path / "base")
    shapes = {"model.layers.0.mlp.experts.1.up_proj.weight": (32, 64)}
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("up_proj",))
    edit_json(adapter / "adapter_config.json", target_modules=["experts.1.up_proj"])
    merge(file, adapter, tmp_path / "out")
    before, after = tensors_of(file), tensors_of(only_file(tmp_path / "out"))
    name = "blk.0.ffn_up_exps.weight"
    assert {each for each in before if before[each] != after[each]} == {name}
    size = len(before[name]) // 3
    differs = [before[name][at : at + size] != after[name][at : at + size] for at in range(0, 3 * size, size)]
    assert differs == [False, True, False]
    merge(base, adapter, tmp_path / "target", quant="gguf:f16")
    found, target = (values_of(only_file(tmp_path / each))[name] for each in ("out", "target"))
    assert float((found - target).square().sum() / target.square().sum()) < 2e-3


def test_a_norm_that_the_adapter_holds_whole_is_stored_as_the_file_has_it(tmp_path: Path) -> None:
    """Of Gemma, 1 more than it is; a matrix, in blocks."""
    config = Gemma2Config(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=32, max_position_embeddings=64,
    )  # fmt: skip
    base = save_base(tmp_path / "model", config, dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text(json.dumps(fast_tokenizer(90)))
    streamconv.convert(base, tmp_path / "base", quant="gguf:q8_0", device="cpu")
    file = only_file(tmp_path / "base")
    shapes = {"model.layers.0.mlp.up_proj.weight": (64, 64)}
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("up_proj",))
    edit_json(adapter / "adapter_config.json", modules_to_save=["norm", "gate_proj"])
    path = adapter / "adapter_model.safetensors"
    norm, gate = torch.randn(64), torch.randn(64, 64)
    whole = {"norm": norm, "layers.0.mlp.gate_proj": gate}
    tensors = load_file(path) | {
        f"base_model.model.model.{name}.weight": each for name, each in whole.items()
    }
    save_file(tensors, path)
    merge(file, adapter, tmp_path / "out")
    found = values_of(only_file(tmp_path / "out"))
    assert torch.equal(found["output_norm.weight"], norm + 1)
    assert torch.allclose(found["blk.0.ffn_gate.weight"], gate, atol=0.02)
    assert (
        tensors_of(only_file(tmp_path / "out"))["blk.0.attn_norm.weight"]
        == tensors_of(file)["blk.0.attn_norm.weight"]
    )


def test_several_files_stay_several(plain: Path, adapter: Path, tmp_path: Path) -> None:
    streamconv.convert(plain, tmp_path / "base", quant="gguf:q8_0", device="cpu", max_shard_size="900kB")
    files = sorted((tmp_path / "base").glob("*.gguf"))
    assert len(files) == 2
    merge(files[0], adapter, tmp_path / "merged")
    streamconv.convert(tmp_path / "base", tmp_path / "same", device="cpu")
    for file in files:
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
        found = tmp_path / "merged" / file.name
        assert found.stat().st_size == file.stat().st_size
        assert found.read_bytes() != file.read_bytes()
    streamconv.verify(tmp_path / "merged", full=True, base=files[1], adapter=adapter, device="cpu")


def test_a_further_output_leaves_the_file_what_it_is_alone(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(plain, adapter, tmp_path / "out", also=["gguf:q8_0"])
    assert (tmp_path / "out" / "gguf-q8_0" / "model-Q8_0.gguf").exists()
    merge(plain, adapter, tmp_path / "kept")
    assert only_file(tmp_path / "out").read_bytes() == only_file(tmp_path / "kept").read_bytes()


def test_a_text_chooses_codes_and_leaves_what_does_not_change(tmp_path: Path) -> None:
    """An update of zero keeps the file though scales would be chosen anew, and another is verified by the text."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    base = save_base(tmp_path / "model", config, dtype=torch.bfloat16)
    text = save_letters(base, tmp_path / "text.txt")
    streamconv.convert(base, tmp_path / "base", quant="gguf:q5_1", device="cpu")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "base")
    file = only_file(tmp_path / "base")
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (32, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
    }
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("up_proj", "q_proj"))
    given = {"calibration": text, "calibration_sequence_length": 32, "calibration_tokens": 128}
    report = merge(file, adapter, tmp_path / "out", **given)
    assert report.rounding == "feedback"
    assert report.kept_delta == pytest.approx(1, abs=0.2)
    changed = {"blk.0.ffn_up.weight", "blk.0.attn_q.weight"}
    before, after = tensors_of(file), tensors_of(only_file(tmp_path / "out"))
    assert {name for name in before if before[name] != after[name]} == changed
    merge(file, without_effect(adapter), tmp_path / "zero", **given)
    assert only_file(tmp_path / "zero").read_bytes() == file.read_bytes()


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, r"--dtype float16 does not fit: .* is a GGUF file, which --quant keep leaves"),
        ({"group_size": 64}, r"--group-size 64 does not fit"),
        ({"quant_for": ["lm_head=gguf:q8_0"]}, r"--quant-for lm_head=gguf:q8_0 does not fit"),
        ({"max_shard_size": "1GB"}, r"--max-shard-size does not fit"),
        ({"tokenizer": "adapter"}, r"--tokenizer adapter does not fit: --quant keep leaves the header"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_options_that_would_change_types_or_header(
    mixed: Path, adapter: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    with pytest.raises(OptionError, match=says):
        merge(mixed, tmp_path / "adapter", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_type_that_is_only_read_is_not_changed(mixed: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", modules_to_save=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.randn(SIZES.vocabulary, SIZES.hidden)}
    save_file(load_file(path) | head, path)
    says = r"adapter changes lm_head\.weight, whose type TQ1_0 is read but not written; choose --quant none, or --quant"
    with pytest.raises(UnsupportedError, match=says):
        merge(mixed, tmp_path / "adapter", tmp_path / "out")
    more = {name: torch.randn(310, SIZES.hidden) for name in head}
    more["base_model.model.model.embed_tokens.weight"] = torch.randn(310, SIZES.hidden)
    save_file(load_file(path) | more, path)
    edit_json(tmp_path / "adapter" / "adapter_config.json", modules_to_save=["lm_head", "embed_tokens"])
    with pytest.raises(
        UnsupportedError, match=r"changes the vocabulary: .* and the file's header stays as it is"
    ):
        merge(mixed, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_header_s_tokenizer_stays_and_it_is_said(mixed: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "another"}
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(settings))
    options: Any = {"quant": "keep", "device": "cpu"}
    prepared = prepare(build_job(mixed, tmp_path / "adapter", **options))
    (note,) = prepared.plan.notes
    assert note.startswith(
        "tokenizer and chat template stay those in the file's header; the adapter has others: "
    )
    copied = len(tensors_of(mixed)) - 14
    assert f"14 rewritten, {copied} tensors copied" in plan_as_text(prepared)  # gaps are none
