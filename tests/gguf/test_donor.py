"""A donor of a GGUF header: its tokenizer is taken to the byte, and a file of another model is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.checkpoint.gguf import GgufFile, Value
from streamconv.checkpoint.gguf_header import GgufValue, f32, f32s, text, u32
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32
from streamconv.errors import CheckpointError, InputError, OptionError, OutputError, UnsupportedError
from streamconv.gguf.donor import donor_pairs
from streamconv.storage.base import SourceFile
from tests.gguf.bases import fast_tokenizer, read_file, write_llama
from tests.models import Sizes, write_adapter
from tests.tiny import edit_json

OURS = {
    "general.architecture": text("llama"),
    "general.file_type": u32(15),
    "llama.block_count": u32(2),
    "llama.rope.freq_base": f32(1e-05),
    "llama.factors": f32s([0.1, 0.2]),
}
SHAPES = {"token_embd.weight": (4, 2)}


def stored(number: float) -> float:
    found: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return found


THEIRS: Mapping[str, Value] = {
    "general.architecture": "llama",
    "general.name": "another",
    "general.file_type": 7,
    "llama.block_count": 2,
    "llama.rope.freq_base": stored(1e-05),
    "llama.factors": (stored(0.1), stored(0.2)),
    "llama.vocab_size": 4,
    "tokenizer.ggml.tokens": ("a", "b"),
    "tokenizer.ggml.model": "own",
    "quantize.imatrix.file": "x",
}


def file(pairs: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> GgufFile:
    """A header whose values have the bytes of 64-bit numbers, which we do not write."""
    place = SourceFile("x.gguf", "x.gguf", 1, "1")
    tensors = {name: StoredTensor(name, F32, shape, place, 0) for name, shape in shapes.items()}
    raw = b"".join(struct.pack("<IQ", 10, number) for number in range(len(pairs)))
    values = {key: range(12 * number, 12 * number + 12) for number, key in enumerate(pairs)}
    return GgufFile(pairs, tensors, raw, values)


def test_the_tokenizer_and_what_config_json_does_not_tell_are_taken_to_the_byte() -> None:
    """And nothing of the file itself: neither its name, nor its types, nor how it was made."""
    found = donor_pairs("x", [file(THEIRS)], OURS, SHAPES)
    places = {key: number for number, key in enumerate(THEIRS)}
    taken = ("llama.vocab_size", "tokenizer.ggml.tokens", "tokenizer.ggml.model")
    assert found == {key: GgufValue(10, struct.pack("<Q", places[key])) for key in taken}


@pytest.mark.parametrize(
    ("pairs", "shapes", "says"),
    [
        ({"general.architecture": "qwen2"}, {}, r"general\.architecture 'qwen2', and by .* it is 'llama'"),
        ({"general.type": "adapter"}, {}, r"general\.type 'adapter', expected a model"),
        ({"llama.block_count": 3}, {}, r"llama\.block_count 3, and by the base's config\.json it is 2"),
        ({"llama.rope.freq_base": 1.1e-05}, {}, r"llama\.rope\.freq_base 1\.1e-05, and by .* it is 1e-05"),
        ({"llama.factors": (0.1,)}, {}, r"llama\.factors \(0\.1,\)"),
        ({"llama.factors": (0.1, 0.3)}, {}, r"llama\.factors"),
        ({}, {"token_embd.weight": (5, 2)}, r"one of shape \[5, 2\] that is called token_embd\.weight"),
        ({}, {"output.weight": (4, 2)}, r"a tensor 'output\.weight', and the output has none"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_another_model_is_refused_by_its_first_difference(
    pairs: dict[str, Value], shapes: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"--gguf-donor x has {says}"):
        donor_pairs("x", [file({**THEIRS, **pairs}, {**SHAPES, **shapes})], OURS, SHAPES)


def test_a_file_without_tensors_or_a_tokenizer_is_no_donor() -> None:
    with pytest.raises(CheckpointError, match=r"has none that is called token_embd\.weight"):
        donor_pairs("x", [file(THEIRS, {})], OURS, SHAPES)
    others = {key: value for key, value in THEIRS.items() if not key.startswith("tokenizer.")}
    with pytest.raises(CheckpointError, match=r"has no tokenizer"):
        donor_pairs("x", [file(others)], OURS, SHAPES)


# -- from options to files -----------------------------------------------------------------------------------------

SMALL = Sizes(hidden=32, inner=64, layers=1, vocabulary=300)


def test_a_model_whose_tokenizer_is_not_known_has_that_of_the_donor(tmp_path: Path) -> None:
    donor_model, base = (write_llama(tmp_path / name, SMALL) for name in ("model", "base"))
    options: dict[str, Any] = {"quant": "gguf:f16", "device": "cpu"}
    streamconv.convert(donor_model, tmp_path / "donor", **options)
    donor = tmp_path / "donor" / "model-F16.gguf"
    odd = fast_tokenizer() | {"pre_tokenizer": {"type": "Whitespace"}}
    (base / "tokenizer.json").write_text(json.dumps(odd))
    adapter = write_adapter(tmp_path / "adapter", SMALL.shapes)
    with pytest.raises(UnsupportedError):
        streamconv.merge(base, adapter, tmp_path / "out", **options)
    options["gguf_donor"] = donor
    report = streamconv.merge(base, adapter, tmp_path / "out", **options)
    assert "tokenizer and chat template are those of the GGUF donor" in report.notes
    ours, theirs = (read_file(tmp_path / name) for name in ("out", "donor"))
    assert dict(ours.pairs) == dict(theirs.pairs)
    donor.unlink()  # what it gave stands in the output
    streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter, device="cpu")
    assert "donor" not in (tmp_path / "out" / "streamconv-recipe.json").read_text()


def test_a_donor_that_is_of_no_use_or_no_file(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", SMALL)
    given: dict[str, Any] = {"device": "cpu", "gguf_donor": tmp_path / "none.gguf"}
    with pytest.raises(OptionError, match=r"is for GGUF files that are written anew; add --quant gguf:"):
        streamconv.convert(base, tmp_path / "out", quant="none", **given)
    with pytest.raises(InputError, match=r"none\.gguf must be a GGUF file on this machine"):
        streamconv.convert(base, tmp_path / "out", quant="gguf:f16", **given)
    streamconv.convert(base, tmp_path / "f16", quant="gguf:f16", device="cpu")
    file = tmp_path / "f16" / "model-F16.gguf"
    with pytest.raises(OptionError, match=r"is for GGUF files that are written anew"):
        streamconv.convert(file, tmp_path / "out", gguf_donor=file, device="cpu")
    edit_json(base / "config.json", max_position_embeddings=64)
    with pytest.raises(CheckpointError, match=r"has llama\.context_length 128, and by .* it is 64"):
        streamconv.convert(base, tmp_path / "out", quant="gguf:f16", gguf_donor=file, device="cpu")
    edit_json(base / "config.json", max_position_embeddings=128)
    given = {"quant": "gguf:f16", "gguf_donor": file, "device": "cpu"}
    with pytest.raises(OutputError, match=r"and the GGUF donor .* overlap, and inputs are never written to"):
        streamconv.convert(base, tmp_path / "f16", overwrite=True, **given)
    adapter = write_adapter(tmp_path / "adapter", SMALL.shapes)
    (adapter / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    with pytest.raises(OptionError, match=r"--tokenizer adapter does not fit: with --gguf-donor"):
        streamconv.merge(base, adapter, tmp_path / "out", tokenizer="adapter", **given)
