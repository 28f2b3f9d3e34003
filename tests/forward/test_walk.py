"""Logits of a walk are those of the model, for families with all kinds of layers; others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.forward.activations import hold_activations
from streamconv.running.cells import WeightWork
from tests.forward.walking import WINDOWS, at_once, opened, walked
from tests.host_gpu import HostGpu
from tests.tiny import VOCABULARY, edit_json, edit_tensors, gpt2_config, llama_config, read_tensors, save_base

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Windows of 24 tokens slide over 8.
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, Any] = {
    "llama": llama_config(),
    "llama, tied": llama_config(tied=True),
    "gpt2": gpt2_config(),
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SIZES, **SLIDING, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2
    ),
    "deepseek_v3": DeepseekV3Config(**SIZES | LATENT),
    "opt, whose embedding is projected": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "bloom, whose layers return tuples": BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FAMILIES[family])
    expected = at_once(base)
    with opened(base) as walk:
        torch.testing.assert_close(walked(walk), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("walked") / "base", llama_config())


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_tiles_gives_the_same(tmp_path: Path, tied: bool) -> None:
    config = llama_config(tied=tied)
    config.vocab_size = 150
    base = save_base(tmp_path / "base", config)
    with opened(base) as walk:
        whole = walked(walk)
    with opened(base) as walk:  # tiles of whole cells: 64, 64 and 22 rows
        assert torch.equal(walked(walk, height=1), whole)


def test_every_weight_is_read_once(base: Path) -> None:
    read: list[int] = []
    with opened(base, read) as walk:
        walked(walk)
    assert sorted(read) == sorted(tensor.nbytes for tensor in stored(base).values())


def stored(base: Path) -> dict[str, torch.Tensor]:
    return read_tensors(base / "model.safetensors")


def test_nothing_stays_in_the_model(base: Path) -> None:
    """A layer's weights go when the next one's come."""
    with opened(base) as walk:
        seen = []

        def look(number: int, states: torch.Tensor) -> None:
            del states
            layers = list(walk.skeleton.layers.values())
            seen.append([any(not p.is_meta for p in layer.parameters()) for layer in layers])
            del number

        walk.run(WINDOWS, torch.empty(*WINDOWS.shape, walk.hidden), 1, look)
        assert seen == [[False, False]] * 2
        assert all(parameter.is_meta for parameter in walk.skeleton.model.parameters())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("last", [0, 1])
def test_walks_that_end_in_any_order_leave_grad_mode_as_it_was(base: Path, mode: bool, last: int) -> None:
    with opened(base) as one, opened(base) as other, torch.set_grad_enabled(mode):
        walks = (one, other)
        states = torch.zeros(*WINDOWS.shape, one.hidden)
        entered = [walk.entered(WINDOWS, [slice(0, 3)], lambda *_: None) for walk in walks]
        passings = [each.__enter__() for each in entered]
        for passing in passings:
            with passing.layer(0) as layer:
                assert not passing.through(layer, 0, states).requires_grad
        for each in (entered[1 - last], entered[last]):
            each.__exit__(None, None, None)
            assert torch.is_grad_enabled() is mode
        answers = [walk.logits(WINDOWS, states, 2, 4096) for walk in walks]
        for answer in answers:
            assert not next(answer)[2].requires_grad
            assert torch.is_grad_enabled() is mode
        for answer in (answers[1 - last], answers[last]):
            assert isinstance(answer, Generator)
            answer.close()
            assert torch.is_grad_enabled() is mode


@pytest.mark.parametrize("budget", [0, 2**20])
def test_activations_on_disk_are_those_in_memory(base: Path, budget: int, tmp_path: Path) -> None:
    with (
        opened(base) as walk,
        hold_activations((*WINDOWS.shape, walk.hidden), torch.float32, budget) as states,
    ):
        walk.run(WINDOWS, states, 2)
        found = torch.cat([logits for _, _, logits in walk.logits(WINDOWS, states, 2, 4096)])
    with opened(base) as walk:
        assert torch.equal(found, walked(walk))


def test_the_activations_file_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with hold_activations((4, 4), torch.float32, 0) as states:
        states.fill_(1)
        assert [path.stat().st_size for path in tmp_path.rglob("activations")] == [64]
    assert not list(tmp_path.iterdir())


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(base: Path) -> str:
    with pytest.raises(UnsupportedError) as caught, opened(base) as walk:
        walked(walk)
    return str(caught.value)


def test_hidden_states_of_another_kind_are_refused(tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        **SIZES,
        head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        sliding_window=8,
        num_kv_shared_layers=1,
        layer_types=SLIDING["layer_types"],
    )
    message = refused(save_base(tmp_path / "base", config))
    assert "Gemma3nForCausalLM cannot be run layer by layer" in message


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_device_that_fails_is_no_fault_of_the_model(
    base: Path, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with opened(base) as walk:
        layer = next(iter(walk.skeleton.layers.values()))
        monkeypatch.setattr(layer.mlp, "forward", fail)
        with pytest.raises(type(error)) as caught:
            walked(walk)
        assert caught.value is error


# -- weights on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "heights"),
    [(torch.float32, set()), (torch.bfloat16, {64, 128, 1024})],  # copied; all rows at once in whole cells
)
def test_weights_for_a_gpu_come_in_its_cells_and_are_not_looked_at_one_by_one(
    dtype: torch.dtype, heights: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are the same, where products are those of the CPU."""
    base = save_base(tmp_path / "base", llama_config(), dtype=dtype)
    with opened(base) as walk:
        expected = walked(walk)
    seen: list[tuple[int, bool]] = []

    def work(*args: Any) -> WeightWork:
        seen.append((args[6], args[7]))
        return WeightWork(*args)

    monkeypatch.setattr("streamconv.running.direct.WeightWork", work)
    monkeypatch.setattr("streamconv.forward.weights.cell_rows", lambda device, step: 1024)
    monkeypatch.setattr("streamconv.forward.weights.BUFFER_BYTES", 1000)  # of what is only copied, too
    with opened(base, device=HostGpu()) as walk:
        assert torch.equal(walked(walk), expected)
    assert {height for height, _ in seen} == heights
    assert all(defers for _, defers in seen)


@pytest.mark.parametrize("row", [3, 70, 149])
@pytest.mark.parametrize("height", [1, 100, 4096])
def test_a_value_that_is_not_finite_is_found_in_any_tile_of_a_head(
    tmp_path: Path, row: int, height: int
) -> None:
    config = llama_config()
    config.vocab_size = 150
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    head = read_tensors(base / "model.safetensors")["lm_head.weight"]
    head[row, 5] = torch.inf
    edit_tensors(base / "model.safetensors", put={"lm_head.weight": head})
    with (
        opened(base, device=HostGpu()) as walk,
        pytest.raises(InputError, match=r"lm_head.weight: a value in rows \d+ to \d+ is NaN, infinite"),
    ):
        walked(walk, height=height)


def copied(base: Path, folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


@pytest.mark.parametrize("model_type", ["own", "t5", None])
def test_a_model_that_is_no_causal_language_model_of_transformers(
    base: Path, tmp_path: Path, model_type: str | None
) -> None:
    edit_json(copied(base, tmp_path) / "config.json", model_type=model_type)
    assert str(model_type) in refused(tmp_path)


def test_code_of_the_model_is_not_run(base: Path, tmp_path: Path) -> None:
    copied(base, tmp_path)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('this ran')")
    edit_json(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with opened(tmp_path) as walk, opened(base) as plain:
        assert torch.equal(walked(walk), walked(plain))
    edit_json(tmp_path / "config.json", model_type="own")
    assert "never run" in refused(tmp_path)


def test_layers_that_see_the_text_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(base) as walk:
        forward = walk.skeleton.model.model.rotary_emb.forward

        def of_the_text(hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
            cosine, sine = forward(hidden, position_ids)
            return cosine + hidden.mean(), sine

        monkeypatch.setattr(walk.skeleton.model.model.rotary_emb, "forward", of_the_text)
        states = torch.empty(*WINDOWS.shape, walk.hidden)
        with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM.*depends on the text"):
            walk.run(WINDOWS, states, 1)


@pytest.mark.parametrize("fault", ["between", "order"])
def test_models_that_do_more_than_run_their_layers_are_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with opened(base) as walk:
        inner = walk.skeleton.model.model

        def forward(input_ids: torch.Tensor, **keywords: Any) -> Any:
            hidden = inner.embed_tokens(input_ids)
            positions = torch.arange(input_ids.shape[1])[None]
            embeddings = inner.rotary_emb(hidden, positions)
            first, second = inner.layers
            layers = (first, second) if fault == "between" else (first, first)
            for layer in layers:
                hidden = layer(hidden, position_embeddings=embeddings) * (2 if fault == "between" else 1)
            return hidden

        monkeypatch.setattr(inner, "forward", forward)
        message = "between its layers" if fault == "between" else "in order"
        with pytest.raises(UnsupportedError, match=message):
            walk.run(WINDOWS, torch.empty(*WINDOWS.shape, walk.hidden), 1)


@pytest.mark.parametrize(
    "missing",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
def test_a_missing_weight_is_named(base: Path, tmp_path: Path, missing: str) -> None:
    copied(base, tmp_path)
    edit_tensors(tmp_path / "model.safetensors", drop=[missing])
    with pytest.raises(CheckpointError, match=missing), opened(tmp_path) as walk:
        walked(walk)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FAMILIES["mixtral"])
    (name,) = [name for name in stored(base) if "layers.1" in name and "experts.1.w2" in name]
    edit_tensors(base / "model.safetensors", drop=[name])
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.down_proj"), opened(base) as walk:
        walked(walk)


def test_config_and_weights_of_two_models(base: Path, tmp_path: Path) -> None:
    copied(base, tmp_path)
    config = json.loads((base / "config.json").read_text())
    edit_json(tmp_path / "config.json", intermediate_size=config["intermediate_size"] + 8)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight has shape"), opened(tmp_path) as walk:
        walked(walk)


def test_a_token_beyond_the_embedding(base: Path) -> None:
    with opened(base) as walk, pytest.raises(InputError, match=f"token {VOCABULARY + 9}"):
        walked(walk, torch.full((1, 16), VOCABULARY + 9))


def test_experts_that_are_stored_fused(tmp_path: Path) -> None:
    config = GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **SLIDING, rope_parameters=None
    )
    base = save_base(tmp_path / "base", config)
    with opened(base) as walk:
        torch.testing.assert_close(walked(walk), at_once(base), rtol=1e-5, atol=1e-5)
