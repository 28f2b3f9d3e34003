"""Forms of a base on disk: pickles, their shards, variants; the output is as that of the same model in safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import streamconv
from streamconv.checkpoint.index import CheckpointIndex, read_index
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.pipeline.inspection import inspect
from streamconv.storage import open_storage
from tests.hub_stub import Hub
from tests.hubs import hub
from tests.tiny import Adapter, gpt2_config, llama_config, logits, save_adapter, save_base

__all__ = ["hub"]
SHARD_SIZE = "30KB"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter]:
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base", llama_config(), max_shard_size=SHARD_SIZE)
    return base, save_adapter(folder / "adapter", base, LoraConfig(target_modules=["q_proj", "v_proj"]))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def without_weights(base: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(base / name, folder)
    return folder


def write_shards(folder: Path, shards: Iterable[dict[str, Tensor]], name: str, index: str) -> None:
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        torch.save(tensors, folder / name.format(number))
        weight_map |= dict.fromkeys(tensors, name.format(number))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def one_pickle(base: Path, folder: Path) -> None:
    torch.save(tensors_of(base), folder / "pytorch_model.bin")


def sharded_pickles(base: Path, folder: Path) -> None:
    shards = [load_file(path) for path in sorted(base.glob("*.safetensors"))]
    write_shards(folder, shards, "pytorch_model-{:05d}-of-00009.bin", "pytorch_model.bin.index.json")


def pickle_of_a_variant(base: Path, folder: Path) -> None:
    torch.save(tensors_of(base), folder / "pytorch_model.fp16.bin")


def shards_of_a_variant(base: Path, folder: Path) -> None:
    shards = [load_file(path) for path in sorted(base.glob("*.safetensors"))]
    write_shards(
        folder, shards, "pytorch_model.bf16-{:05d}-of-00009.bin", "pytorch_model.bin.index.bf16.json"
    )


def variant(base: Path, folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, variant="fp16")


def sharded_variant(base: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder, variant="fp16", max_shard_size=SHARD_SIZE)


def variant_with_numbers_before_it(base: Path, folder: Path) -> None:
    """As transformers named them before 4.45."""
    weight_map: dict[str, str] = {}
    for path in sorted(base.glob("*.safetensors")):
        name = path.name.replace(".safetensors", ".fp16.safetensors")
        shutil.copy(path, folder / name)
        weight_map |= dict.fromkeys(load_file(path), name)
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))


FORMS = [
    one_pickle,
    sharded_pickles,
    pickle_of_a_variant,
    shards_of_a_variant,
    variant,
    sharded_variant,
    variant_with_numbers_before_it,
]


@pytest.mark.parametrize("write", FORMS)
def test_a_base_in_another_form_is_merged_as_in_safetensors(
    write: Callable[[Path, Path], None], made: tuple[Path, Adapter], tmp_path: Path
) -> None:
    base, adapter = made
    usual, other = tmp_path / "usual", without_weights(base, tmp_path / "base")
    streamconv.merge(base, adapter.path, usual)
    write(base, other)
    is_pickle = "pickle" in write.__name__ or bool(list(other.glob("*.bin")))
    if is_pickle:
        with pytest.raises(UnsupportedError, match=r"pytorch_model.+--allow-pickle.+streamconv convert"):
            streamconv.merge(other, adapter.path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    streamconv.merge(other, adapter.path, tmp_path / "out", allow_pickle=is_pickle)
    expected, found = tensors_of(usual), tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), adapter.logits(), rtol=1e-4, atol=1e-5)
    checked = streamconv.verify(
        tmp_path / "out", full=True, base=other, adapter=adapter.path, allow_pickle=is_pickle
    )
    assert checked.exact


def test_convert_inspect_and_eval_read_pickles_as_well(made: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, _ = made
    other = without_weights(base, tmp_path / "base")
    one_pickle(base, other)
    streamconv.convert(other, tmp_path / "out", allow_pickle=True)
    expected, found = tensors_of(base), tensors_of(tmp_path / "out")
    assert all(found[name].equal(expected[name]) for name in expected)
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    facts = inspect(other, allow_pickle=True)
    assert facts["parameters"] == inspect(base)["parameters"]
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        inspect(other)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_in_a_pickle_is_one_with_the_embedding(tmp_path: Path, tied: bool) -> None:
    """`torch.save(model.state_dict())` has both names, which share their bytes."""
    config = (
        llama_config(tied=True) if tied else gpt2_config()
    )  # GPT-2 is tied, and its config may not say so
    base = save_base(tmp_path / "base", config)
    embedding = "model.embed_tokens" if tied else "transformer.wte"
    adapter = save_adapter(
        tmp_path / "adapter", base, LoraConfig(target_modules=[embedding.rpartition(".")[2]])
    )
    other = without_weights(base, tmp_path / "pickled")
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert {f"{embedding}.weight", "lm_head.weight"} <= state.keys()
    torch.save(state, other / "pytorch_model.bin")
    streamconv.merge(base, adapter.path, tmp_path / "usual")
    streamconv.merge(other, adapter.path, tmp_path / "out", allow_pickle=True)
    expected, found = tensors_of(tmp_path / "usual"), tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_head_with_bytes_of_its_own_is_kept(made: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, _ = made
    other = without_weights(base, tmp_path / "base")
    one_pickle(base, other)
    streamconv.convert(other, tmp_path / "out", allow_pickle=True)
    assert "lm_head.weight" in tensors_of(tmp_path / "out")


# -- which form is taken ---------------------------------------------------------------------------------------------


def index_of(folder: Path, allow_pickle: bool = False) -> CheckpointIndex:
    return read_index(open_storage(str(folder)), allow_pickle=allow_pickle)


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_safetensors_come_before_pickles_and_usual_names_before_variants(
    made: tuple[Path, Adapter], tmp_path: Path, allow_pickle: bool
) -> None:
    base = Path(shutil.copytree(made[0], tmp_path / "base"))
    (base / "pytorch_model.bin").write_bytes(b"not looked at")
    (base / "model.fp16.safetensors").write_bytes(b"not looked at")
    (base / "model.safetensors.index.bf16.json").write_bytes(b"not looked at")
    found = index_of(base, allow_pickle)
    assert found.variant is None
    assert {shard.file.name for shard in found.shards} == {path.name for path in made[0].glob("model-*")}


def test_a_variant_in_safetensors_comes_before_pickles(made: tuple[Path, Adapter], tmp_path: Path) -> None:
    base = without_weights(made[0], tmp_path / "base")
    variant(made[0], base)
    one_pickle(made[0], base)
    found = index_of(base, allow_pickle=True)
    assert (found.variant, found.shards[0].file.name) == ("fp16", "model.fp16.safetensors")


def test_pickles_of_the_usual_name_come_before_safetensors_of_any_other(
    made: tuple[Path, Adapter], tmp_path: Path
) -> None:
    base = without_weights(made[0], tmp_path / "base")
    one_pickle(made[0], base)
    shutil.copy(next(made[0].glob("model-*")), base / "value_head.safetensors")
    assert [shard.file.name for shard in index_of(base, True).shards] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    "names",
    [
        ("model.fp16.safetensors", "model.bf16.safetensors"),
        ("model.safetensors.index.fp16.json", "model.bf16.safetensors"),
        ("pytorch_model.fp16.bin", "pytorch_model.bin.index.fp32.json"),
    ],
)
def test_of_several_variants_none_is_guessed(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="several variants") as caught:
        index_of(tmp_path, allow_pickle=True)
    assert all(name in str(caught.value) for name in names)
    assert "rename the one that is to" in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "model.fp16-00001-of-00002.safetensors",
        "model-00001-of-00002.fp16.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.fp16-00001-of-00002.bin",
    ],
)
def test_a_shard_without_its_index_is_not_the_model(shard: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / shard).touch()
    with pytest.raises(CheckpointError, match=rf"index\.json is missing, and {shard}"):
        index_of(tmp_path, allow_pickle=True)


def test_a_model_in_its_makers_own_form_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(UnsupportedError, match=r"consolidated\.00\.pth is the model in its maker's own form"):
        index_of(tmp_path, allow_pickle=True)


# -- the Hub ---------------------------------------------------------------------------------------------------------


def test_pickles_of_the_hub_are_downloaded_on_request_alone(
    hub: Hub, made: tuple[Path, Adapter], tmp_path: Path
) -> None:
    base = without_weights(made[0], tmp_path / "base")
    one_pickle(made[0], base)
    hub.add("org/old", base)
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        streamconv.merge("org/old", made[1].path, tmp_path / "out")
    assert "pytorch_model.bin" not in hub.downloaded()
    streamconv.merge("org/old", made[1].path, tmp_path / "out", allow_pickle=True)
    assert "pytorch_model.bin" in hub.downloaded()
    streamconv.merge(made[0], made[1].path, tmp_path / "usual")
    expected, found = tensors_of(tmp_path / "usual"), tensors_of(tmp_path / "out")
    assert all(found[name].equal(expected[name]) for name in expected)
