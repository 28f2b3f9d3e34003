"""The view of a base whose layers are repeated: order, names, config, and what is refused. Made of bare tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import streamconv
from streamconv.adapters.config import read_config
from streamconv.checkpoint.index import read_index
from streamconv.errors import AdapterError, CheckpointError, StreamconvError, UnsupportedError
from streamconv.formats import find_weights
from streamconv.pipeline import Job, prepare
from streamconv.pipeline.shown import plan_as_json, plan_as_text
from streamconv.planning.base import Base, read_base
from streamconv.planning.depth import deepen
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, Depth
from streamconv.running.schedule import bytes_read
from streamconv.storage import open_storage
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json, read_tensors

SIZES = Sizes(hidden=64, inner=72, layers=3, vocabulary=40)
RANGES = [[0, 2], [1, 3]]
SOURCES = (0, 1, 1, 2)

Shapes = Mapping[str, tuple[int, ...]]


def deeper(shapes: Shapes, sources: tuple[int, ...], stack: str = "model.layers") -> Shapes:
    """Shapes of the model with the layers `sources`, in no order to rely on."""
    found = {name: shape for name, shape in shapes.items() if not name.startswith(f"{stack}.")}
    for number, source in enumerate(sources):
        start = f"{stack}.{source}."
        found |= {
            f"{stack}.{number}.{name.removeprefix(start)}": shape
            for name, shape in shapes.items()
            if name.startswith(start)
        }
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "base", SIZES.shapes)
    edit_json(folder / "config.json", num_hidden_layers=3)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "adapter", deeper(SIZES.shapes, SOURCES))
    edit_json(folder / "adapter_config.json", layer_replication=RANGES)
    return folder


def read(folder: Path) -> Base:
    index = read_index(open_storage(str(folder)))
    return read_base(index, find_weights(index))


def view(base: Path, adapter: Path) -> Base:
    return deepen(read(base), read_config(open_storage(str(adapter))))


def test_layers_stand_where_those_of_the_base_do_by_their_new_number(base: Path, adapter: Path) -> None:
    found = view(base, adapter)
    assert found.depth == Depth(3, ((0, 2), (1, 3)))
    assert dict(found.weights).keys() == deeper(SIZES.shapes, SOURCES).keys()
    # safetensors sorts names in a file, and the base is in three.
    names = [name for name in found.weights if ".layers." in name]
    layers = [int(name.split(".")[2]) for name in names]
    assert layers == sorted(layers)
    before = [name for name in read(base).weights if ".layers." not in name]
    assert [name for name in found.weights if ".layers." not in name] == before


def test_copies_have_the_bytes_of_their_source(base: Path, adapter: Path) -> None:
    stored, found = read(base).weights, view(base, adapter).weights
    for number, source in enumerate(SOURCES):
        here, there = (f"model.layers.{n}.mlp.up_proj.weight" for n in (number, source))
        (part,), (original,) = found[here].parts.values(), stored[there].parts.values()
        assert (found[here].name, part.name) == (here, here)
        assert (part.file, part.offset, part.shape) == (original.file, original.offset, original.shape)


def test_a_config_of_the_deeper_model(base: Path, adapter: Path) -> None:
    before = json.loads((base / "config.json").read_text())
    assert view(base, adapter).index.config == before | {"num_hidden_layers": 4}
    edit_json(base / "config.json", layer_types=["a", "b", "c"], no_rope_layers=[1, 1, 0])
    config = view(base, adapter).index.config
    assert config["layer_types"] == ["a", "b", "b", "c"]
    assert config["no_rope_layers"] == [1, 1, 1, 0]
    assert json.loads((base / "config.json").read_text())["layer_types"] == ["a", "b", "c"]


def test_every_layer_once_in_order_is_the_base(base: Path, adapter: Path) -> None:
    for ranges in (None, [], [[0, 3]], [[0, 1], [1, 3]]):
        edit_json(adapter / "adapter_config.json", layer_replication=ranges)
        assert view(base, adapter).depth is None


def test_plan_card_and_inspection_say_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    prepared = prepare(Job(str(base), str(adapter), MergeOptions(), "cpu"))
    assert "layers    3 layers become 4: [0, 2), [1, 3)" in plan_as_text(prepared).splitlines()
    assert plan_as_json(prepared)["layers"] == {"before": 3, "sources": [0, 1, 1, 2]}
    streamconv.merge(base, adapter, tmp_path / "out")
    assert "| depth | 3 layers become 4: [0, 2), [1, 3) |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["layers"] == [0, 1, 1, 2]
    assert streamconv.inspect(adapter)["layer_replication"] == RANGES
    assert streamconv.inspect(tmp_path / "out")["layers"] == 4


def test_many_ranges_are_cut_short_in_words() -> None:
    text = str(Depth(2, ((0, 1),) * 30))
    assert text.startswith("2 layers become 30: [0, 1), [0, 1)")
    assert text.endswith(", ...")
    assert len(text) < 100


def test_shards_are_filled_anew(base: Path, adapter: Path) -> None:
    """Not those of the base, which would grow by the copies."""
    assert len(prepare(Job(str(base), str(adapter), MergeOptions(), "cpu")).plan.shards) == 1
    options = MergeOptions(max_shard_bytes=30_000)
    plan = prepare(Job(str(base), str(adapter), options, "cpu")).plan
    assert all(shard.size - len(shard.header) <= 30_000 for shard in plan.shards)
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    assert sorted(step.name for step in steps) == sorted(deeper(SIZES.shapes, SOURCES))
    copied = [step.tensor for step in steps if isinstance(step, Copy)]
    assert len({(tensor.file.name, tensor.offset) for tensor in copied}) < len(copied)
    assert bytes_read([plan]) == plan.size - sum(len(shard.header) for shard in plan.shards)


# -- refused -----------------------------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path, error: type[StreamconvError]) -> str:
    with pytest.raises(error) as caught:
        prepare(Job(str(base), str(adapter), MergeOptions(), "cpu"))
    return str(caught.value)


@pytest.mark.parametrize("ranges", [[[0, 2], [1, 4]], [[3, 5]], [[0, 10**12]]])
def test_ranges_beyond_the_base(base: Path, adapter: Path, ranges: list[list[int]]) -> None:
    edit_json(adapter / "adapter_config.json", layer_replication=ranges)
    found = refusal(base, adapter, AdapterError)
    assert "adapter_config.json: layer_replication" in found
    assert "10000 layers" in found or f"[{ranges[-1][0]}, {ranges[-1][1]})" in found


def edit_base(base: Path, **fields: Any) -> None:
    edit_json(base / "config.json", **fields)


REFUSALS: Mapping[str, tuple[Callable[[Path], None], type[StreamconvError], tuple[str, ...]]] = {
    "unknown family": (
        lambda base: edit_base(base, model_type="zamba2"),
        UnsupportedError,
        ("layer_replication", "zamba2", "llama"),
    ),
    "no family": (lambda base: edit_base(base, model_type=None), UnsupportedError, ("layer_replication",)),
    "kinds by number": (
        lambda base: edit_base(base, model_type="gemma2"),
        UnsupportedError,
        ("config.json", "layer_types", "is missing", "3 layers"),
    ),
    "windows by number": (
        lambda base: edit_base(base, model_type="qwen2", use_sliding_window=True, max_window_layers=2),
        UnsupportedError,
        ("config.json", "layer_types", "3 layers"),
    ),
    "kinds of another number of layers": (
        lambda base: edit_base(base, layer_types=["full_attention"] * 4),
        UnsupportedError,
        ("config.json", "layer_types", "3 layers"),
    ),
    "dense layers by number": (
        lambda base: edit_base(base, model_type="qwen3_moe", mlp_only_layers=[0]),
        UnsupportedError,
        ("config.json", "mlp_only_layers", "[0]"),
    ),
    "experts by number": (
        lambda base: edit_base(base, model_type="qwen3_moe", decoder_sparse_step=2),
        UnsupportedError,
        ("config.json", "decoder_sparse_step", "2"),
    ),
    "no number of layers": (
        lambda base: edit_base(base, num_hidden_layers=None),
        CheckpointError,
        ("config.json", "num_hidden_layers", "is missing", "3 layers"),
    ),
    "more layers than the config has": (
        lambda base: edit_base(base, num_hidden_layers=2),
        CheckpointError,
        ("config.json", "num_hidden_layers", "is 2", "model.layers.2"),
    ),
    "fewer layers than the config has": (
        lambda base: edit_base(base, num_hidden_layers=4),
        CheckpointError,
        ("config.json", "num_hidden_layers", "is 4", "model.layers.2"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bases_whose_copies_could_be_other_layers(base: Path, adapter: Path, case: str) -> None:
    spoil, error, words = REFUSALS[case]
    spoil(base)
    found = refusal(base, adapter, error)
    assert str(base) in found
    assert all(word in found for word in words), found


def renamed(tmp_path: Path, old: str, new: str) -> Path:
    """A base whose names have `new` for `old`."""
    shapes = {name.replace(old, new): shape for name, shape in SIZES.shapes.items()}
    folder = write_base(tmp_path / "renamed", shapes)
    edit_json(folder / "config.json", num_hidden_layers=3)
    return folder


def test_layers_where_peft_does_not_look(tmp_path: Path, adapter: Path) -> None:
    base = renamed(tmp_path, "model.layers", "model.decoder.layers")
    assert "finds none" in refusal(base, adapter, UnsupportedError)


def test_two_places_of_layers(base: Path, adapter: Path) -> None:
    shard = next(base.glob("*-00001-*"))
    weights = read_tensors(shard)
    (name, *_) = (name for name in weights if ".layers." in name)
    save_file(weights | {f"h.0.{name.rpartition('.')[0]}": weights[name].clone()}, shard)
    index = base / "model.safetensors.index.json"
    entries = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=entries | {f"h.0.{name.rpartition('.')[0]}": shard.name})
    assert "finds them at h and at model.layers" in refusal(base, adapter, UnsupportedError)


def test_a_layer_that_is_not_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    base = renamed(tmp_path, "model.layers.1.", "model.layers.7.")
    assert "3 layers up to model.layers.7" in refusal(base, adapter, CheckpointError)


# -- an adapter of another model ---------------------------------------------------------------------------------


def test_an_adapter_of_the_base_as_it_is(base: Path, adapter: Path) -> None:
    write_adapter(adapter, SIZES.shapes)
    edit_json(adapter / "adapter_config.json", layer_replication=RANGES)
    found = refusal(base, adapter, AdapterError)
    assert "layer_replication" in found
    assert "no tensors for model.layers.3." in found


def test_an_adapter_of_more_layers(base: Path, adapter: Path) -> None:
    write_adapter(adapter, deeper(SIZES.shapes, (0, 1, 2, 0, 1)))
    edit_json(adapter / "adapter_config.json", layer_replication=RANGES)
    assert "model.layers.4." in refusal(base, adapter, AdapterError)


def test_an_adapter_that_does_not_say_that_it_repeats(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", layer_replication=None)
    assert "model.layers.3." in refusal(base, adapter, AdapterError)
