"""What is rescaled together, of which models; and everything that is not known to fit is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from streamconv.equalization import FAMILIES
from streamconv.equalization.base import Heads, Producer
from streamconv.equalization.equalizer import COLUMNS, ROWS, Equalizer
from streamconv.equalization.pairs import Equalization, WeightPair, find_equalization, stored_scales
from streamconv.errors import UnsupportedError

HEADS = Heads(queries=4, keys=2, width=8)
LAYER = "model.layers.0"
SHAPES: Mapping[str, tuple[int, ...]] = {
    f"{LAYER}.input_layernorm.weight": (32,),
    f"{LAYER}.post_attention_layernorm.weight": (32,),
    f"{LAYER}.self_attn.q_proj.weight": (32, 32),
    f"{LAYER}.self_attn.k_proj.weight": (16, 32),
    f"{LAYER}.self_attn.v_proj.weight": (16, 32),
    f"{LAYER}.self_attn.v_proj.bias": (16,),
    f"{LAYER}.self_attn.o_proj.weight": (32, 32),
    f"{LAYER}.mlp.gate_proj.weight": (72, 32),
    f"{LAYER}.mlp.up_proj.weight": (72, 32),
    f"{LAYER}.mlp.down_proj.weight": (32, 72),
    "model.norm.weight": (32,),
    "vision.layers.0.odd.weight": (5, 6),
}
LINEARS = frozenset(name for name, shape in SHAPES.items() if len(shape) == 2 and name.startswith(LAYER))


def found(
    model_type: str = "llama",
    heads: Heads | None = HEADS,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    quantized: frozenset[str] = LINEARS,
) -> Equalization:
    return find_equalization("awq", "base", model_type, heads, shapes, LINEARS, quantized)


def test_pairs_of_a_layer() -> None:
    pairs = {pair.producer.removeprefix(f"{LAYER}."): pair for pair in found().pairs}
    assert list(pairs) == [
        "input_layernorm.weight",
        "self_attn.v_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.up_proj.weight",
    ]
    values = pairs["self_attn.v_proj.weight"]
    assert values.bias == f"{LAYER}.self_attn.v_proj.bias"
    assert (values.heads, values.scales, values.inputs) == ((2, 2, 8), 16, 32)
    assert pairs["mlp.up_proj.weight"].heads == (1, 1, 72)


def test_what_becomes_of_each_weight() -> None:
    equalizers = found().equalizers(SHAPES)
    roles = {name.removeprefix(f"{LAYER}."): equalizer.roles for name, equalizer in equalizers.items()}
    assert roles == {
        "input_layernorm.weight": (COLUMNS,),
        "post_attention_layernorm.weight": (COLUMNS,),
        "self_attn.q_proj.weight": (COLUMNS,),
        "self_attn.k_proj.weight": (COLUMNS,),
        "self_attn.v_proj.weight": (COLUMNS, ROWS),
        "self_attn.v_proj.bias": (COLUMNS,),
        "self_attn.o_proj.weight": (COLUMNS,),
        "mlp.gate_proj.weight": (COLUMNS,),
        "mlp.up_proj.weight": (COLUMNS, ROWS),
        "mlp.down_proj.weight": (COLUMNS,),
    }
    assert equalizers[f"{LAYER}.self_attn.v_proj.weight"].nbytes == 4 * (16 + 32)


ATTENTION = {name: shape for name, shape in SHAPES.items() if "mlp" not in name and "post" not in name}
FUSED = {
    f"{LAYER}.input_layernorm.weight": (32,),
    f"{LAYER}.post_attention_layernorm.weight": (32,),
    f"{LAYER}.self_attn.qkv_proj.weight": (64, 32),
    f"{LAYER}.self_attn.o_proj.weight": (32, 32),
    f"{LAYER}.mlp.gate_up_proj.weight": (144, 32),
    f"{LAYER}.mlp.down_proj.weight": (32, 72),
}
EXPERTS = ATTENTION | {
    f"{LAYER}.post_attention_layernorm.weight": (32,),
    f"{LAYER}.mlp.gate.weight": (2, 32),
    **{
        f"{LAYER}.mlp.experts.{number}.{part}.weight": (32, 16) if part == "down_proj" else (16, 32)
        for number in range(2)
        for part in ("gate_proj", "up_proj", "down_proj")
    },
}


def test_parts_of_fused_matrices_are_divided() -> None:
    """Values are the last rows of q, k and v; up is below gate. What is not divided is multiplied by 1."""
    pairs = {pair.producer.removeprefix(f"{LAYER}."): pair for pair in found("phi3", shapes=FUSED).pairs}
    values, up = pairs["self_attn.qkv_proj.weight"], pairs["mlp.gate_up_proj.weight"]
    assert (values.divided, values.heads, values.inputs) == (range(48, 64), (2, 2, 8), 32)
    assert (up.divided, up.inputs) == (range(72, 144), 72)
    factors = up.among_outputs(torch.full((72,), 3.0))
    assert factors.tolist() == [1.0] * 72 + [3.0] * 72
    with pytest.raises(UnsupportedError, match=r"qkv_proj\.weight is \[64, 32\] .* share the values of 1"):
        found("phi3", Heads(4, 1, 8), FUSED)


def test_a_router_and_all_experts_read_a_norm() -> None:
    all_pairs = found("qwen3_moe", shapes=EXPERTS, quantized=frozenset(EXPERTS)).pairs
    pairs = {pair.producer.removeprefix(f"{LAYER}."): pair for pair in all_pairs}
    assert {name for name in EXPERTS if ".mlp." in name and "down" not in name} == set(
        pairs["post_attention_layernorm.weight"].consumers
    )
    for number in range(2):
        pair = pairs[f"mlp.experts.{number}.up_proj.weight"]
        assert pair.consumers == (f"{LAYER}.mlp.experts.{number}.down_proj.weight",)
        assert pair.is_routed
    assert not pairs["post_attention_layernorm.weight"].is_routed
    # Some layers of a family are dense; the ones in this model are as Llama's.
    assert len(found("qwen3_moe").pairs) == 4
    without = {name: shape for name, shape in EXPERTS.items() if "experts.1.up" not in name}
    with pytest.raises(UnsupportedError, match=r"experts\.1\.up_proj\.weight is missing"):
        found("qwen3_moe", shapes=without)
    with pytest.raises(UnsupportedError, match=r"shared_expert\.up_proj\.weight is no weight that"):
        found("qwen3_moe", shapes=EXPERTS | {f"{LAYER}.mlp.shared_expert.up_proj.weight": (16, 32)})


def test_heads_that_share_values() -> None:
    """Query head h reads values of head h // 2: transformers' repeat_kv."""
    (values,) = [pair for pair in found().pairs if pair.kind is Producer.VALUES]
    scales = torch.arange(16.0)
    read = torch.repeat_interleave(scales.view(2, 8), 2, dim=0).flatten()
    assert torch.equal(values.spread(scales), read)
    assert torch.equal(values.gathered(read), scales)
    assert torch.equal(values.gathered(torch.arange(32.0))[:8], torch.arange(8.0) + 4)


def test_only_what_eases_a_rounding() -> None:
    """Nothing is divided for layers that stay in 16 bit; of those that share an input with others, all are rescaled."""
    down = found(quantized=frozenset({f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.mlp.gate_proj.weight"}))
    assert [pair.producer for pair in down.pairs] == [
        f"{LAYER}.post_attention_layernorm.weight",
        f"{LAYER}.mlp.up_proj.weight",
    ]
    assert set(down.equalizers(SHAPES)) == {
        f"{LAYER}.{name}.weight"
        for name in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(
    ("given", "shapes", "message"),
    [
        ({"model_type": "gpt2"}, {}, "the model type 'gpt2' can be rescaled together; it knows llama, mistral"),
        ({}, {f"{LAYER}.self_attn.g_proj.weight": (32, 32)}, r"self_attn\.g_proj\.weight is no weight that"),
        ({}, {f"{LAYER}.input_layernorm.bias": (32,)}, r"input_layernorm\.bias is no weight that"),
        ({}, {f"{LAYER}.self_attn.k_norm.weight": (8,)}, r"k_norm\.weight is no weight that the layers of a llama"),
        ({}, {f"{LAYER}.mlp.down_proj.weight": (32, 64)}, r"down_proj\.weight is \[32, 64\], and \S+up_proj\S+, \[72"),
        ({}, {f"{LAYER}.input_layernorm.weight": (16,)}, r"q_proj\.weight is \[32, 32\], and \S+norm\S+, \[16\]"),
        ({}, {f"{LAYER}.mlp.gate_proj.weight": None}, r"gate_proj\.weight is missing"),
        ({"heads": Heads(4, 4, 8)}, {}, r"v_proj\.weight is \[16, 32\] and \S+o_proj\.weight \[32, 32\]"),
        ({"heads": Heads(4, 2, 16)}, {}, "4 heads that share the values of 2, 16 wide"),
        ({"heads": Heads(4, 3, 8)}, {}, "4 heads that share the values of 3, 8 wide"),
        ({"heads": None}, {}, r"config\.json does not tell the heads"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(
    given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...] | None], message: str
) -> None:
    changed = {name: shape for name, shape in {**SHAPES, **shapes}.items() if shape is not None}
    with pytest.raises(UnsupportedError, match=message):
        found(**given, shapes=changed)


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="--rescale awq has nothing to do"):
        found(quantized=frozenset({"lm_head.weight"}))


def test_families_know_their_own_modules() -> None:
    dense = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "glm4"}
    assert set(FAMILIES) == dense | {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"}
    for name, family in FAMILIES.items():
        for form in family:
            assert len({pair.producer for pair in form.pairs}) == len(form.pairs)
            assert len(form.pairs) == 4 or name not in dense


@pytest.mark.parametrize("kind", [Producer.NORM, Producer.NORM_OF_ONE_MORE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_consumers_are_given_what_storing_left_of_a_norm(kind: Producer, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = WeightPair("norm", None, ("layer",), kind, (1, 1, 400), range(400), 400)
    norm = (torch.randn(400, generator=generator) * 3).to(dtype).float()
    wanted = torch.exp(torch.randn(400, generator=generator))
    scales = stored_scales(pair, norm, wanted, dtype)
    equalizer = Equalizer("norm", (400,), (COLUMNS,), pair.shift)
    cell = equalizer.apply(norm.clone()[None], range(1), {COLUMNS: scales.reciprocal()}, ())[0]
    stored = cell.to(dtype).double() + pair.shift
    before = norm.double() + pair.shift
    # Divided and multiplied again it is what it was, though it was rounded between.
    torch.testing.assert_close(stored * scales.double(), before, rtol=1e-6, atol=1e-6)
    assert bool((scales / wanted - 1).abs().median() < 0.01)


def test_a_channel_that_storing_would_spoil_keeps_its_size() -> None:
    pair = WeightPair("norm", None, ("layer",), Producer.NORM_OF_ONE_MORE, (1, 1, 4), range(4), 4)
    # 1 + w near 0, where bfloat16 has steps of 2^-8: what is wanted is not to be had.
    norm = torch.tensor([-1.0, -0.99609375, 0.0, 1.0])
    scales = stored_scales(pair, norm, torch.full((4,), 3.0), torch.bfloat16)
    assert scales[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(scales[2:], torch.full((2,), 3.0), rtol=0.02, atol=0)
    plain = WeightPair("norm", None, ("layer",), Producer.NORM, (1, 1, 2), range(2), 2)
    assert stored_scales(plain, torch.tensor([0.0, 1.0]), torch.full((2,), 3.0), torch.bfloat16)[0] == 1.0
