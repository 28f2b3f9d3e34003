"""What `--quant keep` promises of every format: where nothing changes, not one byte does.

Each format that says it can be kept is in here by itself, and foreign ones that are only passed through.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

import streamconv
from streamconv.dtypes import BF16
from streamconv.formats import FORMATS, KEPT, find_weights
from streamconv.formats.base import Format, InputScaled
from streamconv.formats.linear import module_of
from streamconv.formats.mlx import MlxFormat
from tests import foreign_bases
from tests.checkpoint.files import index_of
from tests.foreign_bases import read_raw, write_foreign
from tests.formats.stored import stored
from tests.gguf.bases import write_llama
from tests.models import Sizes, write_adapter
from tests.tiny import edit_tensors, read_tensors

SIZES = Sizes(hidden=256, inner=512, layers=1, vocabulary=300)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OF_MLX = [name for name, kind in KEPT.items() if isinstance(kind, MlxFormat)]
MADE_ANEW = {"README.md", "streamconv.json", "streamconv-recipe.json"}
"""Files that tell of the merge itself."""

# One of each way to store weights: floats in blocks, groups with a scale of scales, pairs of numbers, codebooks,
# metadata in headers, and what no library is known for.
FOREIGN = (
    "deepseek ue8m0",
    "gpt-oss mxfp4",
    "nvfp4 of modelopt",
    "torchao",
    "hqq",
    "aqlm",
    "of no known method, with every type",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plain") / "base", SIZES, shards=2)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on every linear layer that changes none: an update that is 0 throughout is refused, so one entry of
    one factor is of a size that no type of a weight can show.
    """
    folder = write_adapter(tmp_path_factory.mktemp("zero") / "adapter", SIZES.shapes, targets=LINEAR, size=0)
    file = folder / "adapter_model.safetensors"
    factors = read_tensors(file)
    assert len(factors) == 2 * len(LINEAR) * SIZES.layers
    entry = factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    entry[0, 0] = 1e-30
    edit_tensors(file, put=factors)
    return folder


def is_measured(kind: Format) -> bool:
    """Whether it takes a text to write it; such files of its owner are merged in `tests/pipeline/test_measured.py`."""
    return isinstance(kind, InputScaled) and kind.measures_inputs


def differing(before: Path, after: Path) -> list[str]:
    """Tensors of which not every byte is the same, in files that are alike in all else."""
    found, expected = read_raw(after), read_raw(before)
    assert found.metadata == expected.metadata
    assert {key: raw[:2] for key, raw in found.tensors.items()} == {
        key: raw[:2] for key, raw in expected.tensors.items()
    }
    return [key for key, raw in expected.tensors.items() if found.tensors[key] != raw]


def called(file: Path) -> str:
    """A file's name; GGUF files are called after what their headers say of types, of which they may have several."""
    return file.suffix if file.suffix == ".gguf" else file.name


def assert_same(base: Path, out: Path) -> None:
    """All tensors with their types, shapes and bytes are the same, and so is every file beside them."""
    before, after = (
        {called(path): path for path in folder.iterdir() if path.is_file()} for folder in (base, out)
    )
    assert before.keys() - MADE_ANEW == after.keys() - MADE_ANEW
    for name in before.keys() - MADE_ANEW:
        if name.endswith(".safetensors"):  # their order, and what fills a header up to a block, are ours
            assert differing(before[name], after[name]) == []
        else:
            assert after[name].read_bytes() == before[name].read_bytes(), name


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not is_measured(kind)])
def test_a_zero_adapter_leaves_every_byte_of_what_was_written(
    name: str, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    streamconv.convert(plain, base, quant=name, device="cpu")
    streamconv.merge(base, adapter, out, quant="keep", device="cpu")
    assert_same(base, out)


@pytest.mark.parametrize("name", OF_MLX)
def test_a_zero_adapter_leaves_every_byte_of_what_is_only_kept(
    name: str, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    base, out = written_by_hand(name, plain, tmp_path / "base"), tmp_path / "out"
    streamconv.merge(base, adapter, out, quant="keep", device="cpu")
    assert_same(base, out)


def written_by_hand(name: str, plain: Path, folder: Path) -> Path:
    """A base in one of MLX's storages: that of 8 bits, with the words of another number of bits in its place."""
    streamconv.convert(plain, folder, quant="mlx8", device="cpu")
    dense = {
        key: tensor for file in plain.glob("*.safetensors") for key, tensor in read_tensors(file).items()
    }
    kind = KEPT[name]
    assert isinstance(kind, MlxFormat)
    for file in folder.glob("*.safetensors"):
        quantized = [key for key in dense if f"{module_of(key)}.scales" in read_tensors(file)]
        put: dict[str, Tensor] = {}
        for key in quantized:
            put |= stored(kind.encoder(key, tuple(dense[key].shape), BF16), dense[key].float())
        assert put
        edit_tensors(file, put=put)
    settings = {"group_size": kind.group_size, "bits": kind.bits, "mode": "affine"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization": settings, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = find_weights(index_of(folder))
    assert {each.format for each in weights if each.is_quantized} == {name}
    return folder


@pytest.mark.parametrize("name", FOREIGN)
def test_an_adapter_beside_it_leaves_every_byte_of_a_foreign_format(name: str, tmp_path: Path) -> None:
    base, out = write_foreign(tmp_path / "base", name), tmp_path / "out"
    shapes, targets = foreign_bases.SIZES.shapes, ("q_proj", "o_proj")
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=targets)
    streamconv.merge(base, adapter, out, quant="keep", device="cpu")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    changed = {key for file in files for key in differing(base / file, out / file)}
    assert changed == {key for key in shapes if module_of(key).endswith(targets)}
    settings = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert settings[0] == settings[1]
