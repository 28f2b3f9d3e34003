"""OFT: against PEFT and float64, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import OFTConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.adapters.oft import Cayley
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.parity.opening import tensors
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"
BODY = ["q_proj", "down_proj"]
EXACT = {"use_cayley_neumann": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("oft") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": BODY, **EXACT},
        {"target_modules": BODY, "block_share": True},
        {"target_modules": BODY, "coft": True, "eps": 0.3},
        {"target_modules": BODY, "coft": True, "eps": 0.3, "block_share": True, **EXACT},
        {"target_modules": BODY, "coft": True, "eps": 1e3},
        {"target_modules": BODY, "r": 4, "oft_block_size": 0},
        {"target_modules": BODY, "oft_block_size": 7},
        {"target_modules": ["embed_tokens", "lm_head"]},
        *({"target_modules": ["q_proj"], "num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6, 9)),
    ],
    ids=str,
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, OFTConfig(**{"oft_block_size": 8, **options}))


def test_biases_that_were_trained_replace_the_bases(tmp_path: Path) -> None:
    config = llama_config()
    config.attention_bias = True
    base = save_base(tmp_path / "base", config)
    merge_as_peft(tmp_path, base, OFTConfig(oft_block_size=8, target_modules=["q_proj"], bias="oft_only"))


class Convolutions(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 10, kernel)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


@pytest.mark.parametrize("options", [{}, EXACT, {"block_share": True}], ids=str)
def test_pointwise_convolutions_are_pefts(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Convolutions(1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    live = get_peft_model(
        model, OFTConfig(oft_block_size=4, target_modules=["conv"], init_weights=False, **options)
    )
    live.save_pretrained(tmp_path)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    x = torch.randn(2, 12, 5, 5)
    expected = live(x)
    torch.testing.assert_close(nn.functional.conv2d(x, found["conv.weight"], found["conv.bias"]), expected)
    torch.testing.assert_close(live.merge_and_unload().state_dict()["conv.weight"], found["conv.weight"])


def test_larger_kernels_are_refused_because_peft_trains_another_model(tmp_path: Path) -> None:
    """Even before it is trained, which is why its own merge cannot be right."""
    torch.manual_seed(0)
    model, x = Convolutions(3), torch.randn(1, 12, 7, 7)
    before, shape = model(x), tuple(model.conv.weight.shape)
    live = get_peft_model(model, OFTConfig(oft_block_size=4, target_modules=["conv"]))
    assert (live(x) - before).abs().max() > 0.5
    live.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"kernel of 3 x 3: .* no merged weights are equal"):
        read_for(tmp_path, {"conv.weight": shape, "conv.bias": (10,)})


def by_hand(**fields: Any) -> dict[str, Any]:
    return {
        "peft_type": "OFT",
        "peft_version": "0.21.2",
        "oft_block_size": 5,
        "target_modules": ["c_fc"],
        "use_cayley_neumann": False,
        **fields,
    }


@pytest.mark.parametrize("shape", [(70, 130), (70, 70)])
@pytest.mark.parametrize("shared", [False, True])
def test_conv1d_follows_the_formula(tmp_path: Path, shape: tuple[int, int], shared: bool) -> None:
    """PEFT trains none: inputs are rotated before they meet W [in, out]; blocks of 5 lie across cells of 64."""
    torch.manual_seed(0)
    triangles, weight = torch.randn(1 if shared else 14, 10), torch.randn(shape)
    config = by_hand(block_share=shared, fan_in_fan_out=True)
    folder = save_by_hand(tmp_path / "a", config, {"h.c_fc.oft_R.weight": triangles})
    adapter = read_for(folder, {"h.c_fc.weight": shape}, "gpt2")
    found = merged_by_hand(adapter, {"h.c_fc.weight": weight})["h.c_fc.weight"]
    blocks = Cayley(None, None).blocks(triangles, 5)
    rotation = torch.block_diag(*blocks.expand(14, 5, 5))  # type: ignore[no-untyped-call]  # torch leaves it without types
    torch.testing.assert_close(found, (rotation @ weight.double()).float(), rtol=1e-5, atol=1e-6)


def test_an_exact_transform_is_orthogonal_and_a_series_near_its_inverse() -> None:
    torch.manual_seed(0)
    triangles = 0.05 * torch.randn(3, 28)
    exact = Cayley(None, None).blocks(triangles, 8)
    torch.testing.assert_close(exact @ exact.mT, torch.eye(8).double().expand(3, 8, 8))
    series = Cayley(40, None).blocks(triangles, 8)
    torch.testing.assert_close(series, exact.mT)
    assert torch.equal(Cayley(1, None).blocks(triangles, 8), torch.eye(8).double().expand(3, 8, 8))


def test_coft_bounds_the_norm_of_a_block() -> None:
    torch.manual_seed(0)
    triangles = torch.cat([torch.randn(1, 10), torch.zeros(1, 10)])
    free, bound = (Cayley(2, norm).blocks(triangles, 5) for norm in (None, 0.1))
    one = torch.eye(5).double()
    assert torch.linalg.matrix_norm(bound - one).tolist() == pytest.approx([0.2, 0])
    direction = (free[0] - one) / torch.linalg.matrix_norm(free[0] - one)
    torch.testing.assert_close(bound[0] - one, 0.2 * direction)


def test_wide_weights_follow_the_formula(tmp_path: Path) -> None:
    """More columns than are rotated at a time."""
    torch.manual_seed(0)
    triangles, weight = torch.randn(1800, 10), torch.randn(70, 9000)
    folder = save_by_hand(tmp_path / "a", by_hand(), {"c_fc.oft_R.weight": triangles})
    found = merged_by_hand(read_for(folder, {"c_fc.weight": (70, 9000)}), {"c_fc.weight": weight})
    blocks = Cayley(None, None).blocks(triangles, 5)
    expected = torch.einsum("nbi,boi->nbo", weight.double().view(70, 1800, 5), blocks).reshape(70, 9000)
    torch.testing.assert_close(found["c_fc.weight"], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(
        tmp_path / "adapter", base, OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    ).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(4, 27), (28,), (0, 28), (4, 28, 1)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "upper triangles of")
    for shape in [(3, 28), (1, 28), (4, 36)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "does not fit .*trained on this base")


def test_another_block_size_than_the_configs_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, oft_block_size=16)
    refuse(base, adapter, AdapterError, "blocks of 8 rows, but .* gives 16")
    edit_json(adapter / CONFIG, oft_block_size=0, r=8)
    refuse(base, adapter, AdapterError, "blocks of 8 rows, but .* gives 4")


def test_blocks_that_are_not_shared_are_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, block_share=True)
    refuse(base, adapter, AdapterError, "with this block_share")


@pytest.mark.parametrize("key", ["oft_r", "oft_r.default", "oft_s"])
def test_the_layout_of_before_is_refused(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("oft_R.weight", key): torch.ones(4, 8, 8)})
    refuse(base, adapter, UnsupportedError, r"holds .*oft_\w.*, as those of PEFT 0\.15\.2 and before")


def test_a_config_of_before_is_refused(base: Path, adapter: Path) -> None:
    fields = (adapter / CONFIG).read_text().replace('"oft_block_size": 8,', "")
    (adapter / CONFIG).write_text(fields)
    refuse(base, adapter, UnsupportedError, r"has no oft_block_size, as those of PEFT 0\.15\.2")


@pytest.mark.parametrize("version", [None, "0.17.1", "0.9.0", "0.17.2.dev0@unknown"])
def test_the_series_of_before_is_refused(base: Path, adapter: Path, version: str | None) -> None:
    edit_json(adapter / CONFIG, peft_version=version)
    refuse(base, adapter, UnsupportedError, "Cayley-Neumann series of PEFT .* changed in 0.18")
    edit_json(adapter / CONFIG, use_cayley_neumann=False)
    streamconv.merge(base, adapter, adapter.parent / "out")


def test_a_config_that_does_not_name_the_transform_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, use_cayley_neumann=None)
    refuse(base, adapter, AdapterError, "use_cayley_neumann must be true or false")


@pytest.mark.parametrize("key", ["oft_Q.weight", "oft_R.bias", "lora_A.weight"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("oft_R.weight", key): torch.ones(4, 28)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


@pytest.mark.parametrize(
    ("field", "value"), [("layer_replication", [[0, 2]]), ("alpha", 2), ("bias", "some")]
)
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str, value: Any) -> None:
    edit_json(adapter / CONFIG, **{field: value})
    refuse(base, adapter, UnsupportedError, field)


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {Q.replace(".0.", f".{layer}."): torch.zeros(4, 28) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, "every update is a rotation by nothing")


def test_a_square_weight_of_an_unknown_model_is_refused_with_fan_in_fan_out(tmp_path: Path) -> None:
    folder = save_by_hand(
        tmp_path / "a", by_hand(fan_in_fan_out=True), {"c_fc.oft_R.weight": torch.ones(2, 10)}
    )
    with pytest.raises(UnsupportedError, match="set fan_in_fan_out to false"):
        read_for(folder, {"c_fc.weight": (10, 10)})


@pytest.mark.parametrize(("blocks", "size"), [(1, 512), (2, 256), (40, 64), (1, 1024)])
@pytest.mark.parametrize("cayley", [Cayley(None, None), Cayley(None, 0.1), Cayley(5, None)], ids=str)
def test_what_is_held_is_counted(tmp_path: Path, cayley: Cayley, blocks: int, size: int) -> None:
    """Tensors that are alive at once while rotations are made, as torch's profiler counts them."""
    config = by_hand() | {"oft_block_size": size, "use_cayley_neumann": cayley.terms is not None}
    config |= {"num_cayley_neumann_terms": cayley.terms or 5}
    config |= {"coft": cayley.norm is not None, "eps": (cayley.norm or 1) * math.sqrt(blocks)}
    triangles = torch.full((blocks, size * (size - 1) // 2), 1e-4)
    folder = save_by_hand(tmp_path / "a", config, {"c_fc.oft_R.weight": triangles})
    (update,) = read_for(folder, {"c_fc.weight": (40, blocks * size)}).updates
    peak = peak_bytes(lambda: update.prepare({"triangles": triangles}, torch.device("cpu")))
    assert update.held_bytes / 2 < peak <= update.held_bytes
    (whole,) = read_for(folder, {"c_fc.weight": (blocks * size, 40)}).updates
    assert whole.held_bytes == update.held_bytes + 2 * 4 * blocks * size * 40


def peak_bytes(work: Callable[[], object]) -> int:
    """Greatest sum of allocations, less what was given back, of all operations in `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    del kept
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(peft.OFTConfig)} <= set(ADAPTERS["OFT"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["block_size"], found["coft"]) == ("OFT", [8], False)


def test_conv1d_is_merged_from_files_to_files(tmp_path: Path) -> None:
    """Held whole between two passes; its square weight is told apart by the model."""
    base = save_base(tmp_path / "base", gpt2_config())
    before = tensors(base)
    triangles = {
        f"transformer.h.0.attn.{name}.oft_R.weight": torch.randn(4, 28) for name in ("c_attn", "c_proj")
    }
    config = by_hand(oft_block_size=8, target_modules=["0.attn.c_attn", "0.attn.c_proj"], fan_in_fan_out=True)
    streamconv.merge(base, save_by_hand(tmp_path / "adapter", config, triangles), tmp_path / "out")
    after = tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {key.replace("oft_R.", "") for key in triangles}
    for key, stored in triangles.items():
        name = key.replace("oft_R.", "")
        blocks = Cayley(None, None).blocks(stored, 8)
        expected = (blocks @ before[name].double().view(4, 8, -1)).flatten(0, 1)
        torch.testing.assert_close(after[name], expected.float(), rtol=1e-5, atol=1e-6)
