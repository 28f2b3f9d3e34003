"""read_index: layouts of checkpoints, and every way in which index and shards can disagree."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.storage import open_storage
from tests.checkpoint.files import index_of, ones, raw_shard, write_checkpoint, write_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards(folder: Path) -> Path:
    return write_checkpoint(folder, {FIRST: {"a": ones(2, 2), "b": ones(4)}, SECOND: {"c": ones(3)}})


def refusal(folder: Path, stem: str = "model", require_config: bool = True) -> CheckpointError:
    """The CheckpointError, of no subclass or sibling, with which the folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_index(open_storage(str(folder)), stem, require_config)
    assert str(folder) in str(caught.value) or str(caught.value).startswith("model-0000")
    return caught.value


def test_a_checkpoint_of_one_file(tmp_path: Path) -> None:
    index = index_of(write_checkpoint(tmp_path, {"model.safetensors": {"a": ones(2, 3), "b": ones(4)}}))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()} == {
        "a": (BF16, (2, 3)),
        "b": (BF16, (4,)),
    }
    assert [shard.file.name for shard in index.shards] == ["model.safetensors"]
    assert index.shards[0].metadata == {"format": "pt"}
    assert index.config == {"model_type": "llama"}


def test_a_sharded_checkpoint_of_the_hub_library_is_read_whole(tmp_path: Path) -> None:
    state = {f"layers.{i}.w": torch.randn(16, 8).to(torch.bfloat16) for i in range(12)}
    save_torch_state_dict(state, tmp_path, max_shard_size=1000)
    (tmp_path / "config.json").write_text("{}")
    index = index_of(tmp_path)
    assert len(index.shards) > 3
    with TensorReader() as reader:
        for name, tensor in state.items():
            assert torch.equal(reader.load(index.tensors[name]), tensor)


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    index = index_of(two_shards(tmp_path))
    for tensor in index.tensors.values():
        content = Path(tensor.file.path).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert content == load_file(tensor.file.path)[tensor.name].view(torch.uint8).numpy().tobytes()


def test_shards_are_in_number_order_and_tensors_in_file_order(tmp_path: Path) -> None:
    shards = {f"model-{i}-of-11.safetensors": {f"t{i}.z": ones(2), f"t{i}.a": ones(1)} for i in range(1, 12)}
    index = index_of(write_checkpoint(tmp_path, shards))
    assert [shard.file.name for shard in index.shards] == list(shards)
    by_file = [(tensor.file.name, tensor.offset) for tensor in index.tensors.values()]
    assert by_file == sorted(by_file, key=lambda place: (list(shards).index(place[0]), place[1]))


def test_a_model_may_be_the_only_file_under_any_name(tmp_path: Path) -> None:
    index = index_of(write_checkpoint(tmp_path, {"weights.fp16.safetensors": {"a": ones(1)}}))
    assert index.shards[0].file.name == "weights.fp16.safetensors"


def test_other_files_beside_the_named_one_are_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": {"a": ones(1)}})
    save_file({"x": ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    assert list(index_of(tmp_path).tensors) == ["a"]


def test_another_stem_needs_no_config(tmp_path: Path) -> None:
    save_file({"x": ones(1)}, tmp_path / "adapter_model.safetensors")
    index = read_index(open_storage(str(tmp_path)), "adapter_model", require_config=False)
    assert list(index.tensors) == ["x"]
    assert index.config == {}


@pytest.mark.parametrize("index", [{}, {"metadata": None}, {"metadata": {"total_size": 7}}], ids=str)
def test_the_metadata_of_an_index_is_not_relied_on(tmp_path: Path, index: dict[str, object]) -> None:
    two_shards(tmp_path)
    index["weight_map"] = {"a": FIRST, "b": FIRST, "c": SECOND}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(index_of(tmp_path).tensors) == {"a", "b", "c"}


def test_shards_in_a_subfolder_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    (tmp_path / "sub").mkdir()
    save_file({"a": ones(1)}, tmp_path / "sub" / "a.safetensors")
    write_index(tmp_path, {"a": "sub/a.safetensors"})
    assert index_of(tmp_path).tensors["a"].file.name == "sub/a.safetensors"


def test_an_index_of_one_shard_that_is_the_named_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": {"a": ones(1)}})
    write_index(tmp_path, {"a": "model.safetensors"})
    assert list(index_of(tmp_path).tensors) == ["a"]


def test_a_missing_shard_is_named_and_counted(tmp_path: Path) -> None:
    (two_shards(tmp_path) / SECOND).unlink()
    assert f"1 of 2 shards cannot be used, the first because: {tmp_path}: {SECOND} is missing" in str(
        refusal(tmp_path)
    )


def test_an_index_of_a_million_missing_shards_is_not_followed_to_its_end(tmp_path: Path) -> None:
    write_index(two_shards(tmp_path), {f"{i}": f"{i}" for i in range(50_000)})
    assert "1000 or more of 50000 shards cannot be used" in str(refusal(tmp_path))


def test_a_shard_that_is_a_dead_link_is_named(tmp_path: Path) -> None:
    (two_shards(tmp_path) / SECOND).unlink()
    (tmp_path / SECOND).symlink_to("gone")
    assert f"{SECOND} is a link to a file that is not there" in str(refusal(tmp_path))


def test_a_shard_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    (two_shards(tmp_path) / SECOND).unlink()
    os.mkfifo(tmp_path / SECOND)
    assert f"{SECOND} must be a regular file, found a named pipe" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/../../x", "C:x", "a\\..\\x", ".", ""]
)
def test_a_weight_map_that_leads_outside_is_refused(tmp_path: Path, shard: str) -> None:
    two_shards(tmp_path / "model")
    save_file({"c": ones(3)}, tmp_path / "x.safetensors")
    write_index(tmp_path / "model", {"a": FIRST, "b": FIRST, "c": shard})
    message = str(refusal(tmp_path / "model"))
    assert f"{shard!r} is not a file name inside the folder; refused" in message


def test_a_tensor_listed_but_in_no_shard(tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND, "ghost": SECOND})
    assert f"tensor 'ghost' is in {SECOND}, but it is in no shard" in str(refusal(tmp_path))


def test_a_tensor_listed_in_another_shard_than_its_own(tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_index(tmp_path, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert f"tensor 'b' is in {SECOND}, but it is in {FIRST}" in str(refusal(tmp_path))


def test_a_tensor_in_a_shard_but_not_listed(tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_index(tmp_path, {"a": FIRST, "c": SECOND})
    assert f"tensor 'b' in {FIRST} is not listed in the index" in str(refusal(tmp_path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file({"c": ones(3), "a": ones(2, 2)}, tmp_path / SECOND)
    assert f"tensor 'a' is in two shards, {FIRST} and {SECOND}" in str(refusal(tmp_path))


def test_index_and_single_file_are_ambiguous(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file({"a": ones(1)}, tmp_path / "model.safetensors")
    assert "both stand for the model" in str(refusal(tmp_path))


def test_shards_without_their_index(tmp_path: Path) -> None:
    (two_shards(tmp_path) / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json is missing" in str(refusal(tmp_path))


def test_several_files_that_could_be_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    for name in ("x", "y"):
        save_file({"a": ones(1)}, tmp_path / f"{name}.safetensors")
    assert "the model could be any of x.safetensors, y.safetensors" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], "x", {"a": 1}, {"a": None}, {"a": ["x.safetensors"]}], ids=str
)
def test_a_weight_map_of_the_wrong_kind(tmp_path: Path, weight_map: object) -> None:
    two_shards(tmp_path)
    write_index(tmp_path, weight_map)
    assert "model.safetensors.index.json" in str(refusal(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' stands twice"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_json_files_that_are_not(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (two_shards(tmp_path) / name).write_bytes(content)
    message = str(refusal(tmp_path))
    assert name in message
    assert says in message


def test_config_json_may_have_infinity_and_the_index_may_not(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert index_of(tmp_path).config["time_step_limit"] == [0.0, float("inf")]
    write_index(tmp_path, {"a": float("nan")})
    assert "NaN" in str(refusal(tmp_path))


def test_a_missing_config(tmp_path: Path) -> None:
    (two_shards(tmp_path) / "config.json").unlink()
    assert "config.json is missing" in str(refusal(tmp_path))
    assert read_index(open_storage(str(tmp_path)), require_config=False).config == {}


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_not_a_base(tmp_path: Path, with_config: bool) -> None:
    save_file({"a": ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    assert "is an adapter" in str(refusal(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "tf_model.h5"])
def test_weights_in_other_formats_are_named(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {})
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedError, match=rf"model\.safetensors is missing.*{name}"):
        index_of(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    assert "no weights found" in str(refusal(tmp_path))
    (tmp_path / "x.safetensors").touch()  # for another stem any name will not do
    assert "no weights found, neither adapter_model" in str(refusal(tmp_path, "adapter_model"))


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(raw_shard("{}"))
    assert "model.safetensors holds no tensors" in str(refusal(tmp_path))


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    (two_shards(tmp_path) / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert str(refusal(tmp_path)).startswith(f"{SECOND} must be a safetensors file, found a Git LFS pointer")


def test_ninety_thousand_tensors_are_indexed_in_seconds(tmp_path: Path) -> None:
    """405B mixtures have as many: anything quadratic takes hours. CPU time, as others use this machine."""
    weight_map: dict[str, str] = {}
    for shard in range(200):
        name = f"model-{shard + 1:05}-of-00200.safetensors"
        tensors = [
            TensorSpec(f"layers.{shard}.experts.{i}.up_proj.weight", BF16, (4096, 4096)) for i in range(450)
        ]
        header = build_header(tensors, {"format": "pt"})
        with (tmp_path / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
    write_index(tmp_path, weight_map)
    storage = open_storage(str(tmp_path))
    start = time.process_time()
    index = read_index(storage, require_config=False)
    assert time.process_time() - start < 5
    assert len(index.tensors) == 90_000
