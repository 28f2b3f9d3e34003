"""What PiSSA, KaSA and OLoRA take off the base: against float64, for any shape and either orientation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import streamconv
from streamconv.adapters.base import State, UpdateAccess
from streamconv.adapters.initial import INITIAL, InitialUpdate
from streamconv.dtypes import BF16, F32, Dtype
from streamconv.errors import UnsupportedError
from tests.tiny import edit_tensors, llama_config, save_adapter, save_base

SHAPES = [(96, 40), (40, 96), (64, 64), (130, 7)]


def concluded(weight: Tensor, kind: str, rank: int, transposed: bool, dtype: Dtype = F32) -> Tensor:
    """The weight trained on, its cells read in order and returned in another."""
    shape = (weight.shape[0], weight.shape[1])
    update = InitialUpdate("w", shape, {}, kind, rank, 0.5, transposed, dtype)
    assert update.access is UpdateAccess.WHOLE
    cells = [range(i, min(i + 64, shape[0])) for i in range(0, shape[0], 64)]
    state: State = ()
    for rows in cells:
        state = update.reduce(weight[rows.start : rows.stop], rows, {}, state)
    state = update.conclude({}, state)
    out = torch.empty_like(weight)
    for rows in reversed(cells):
        out[rows.start : rows.stop] = update.apply(weight[rows.start : rows.stop].clone(), rows, {}, state)
    return out


def exact(weight: Tensor, kind: str, rank: int) -> Tensor:
    full = weight.double()
    if kind == "pissa":
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        rest: Tensor = full - (u[:, :rank] * s[:rank]) @ vh[:rank]
        return rest
    if kind == "kasa":
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        kept: Tensor = (u[:, :-rank] * s[:-rank]) @ vh[:-rank]
        return kept
    q = torch.linalg.qr(full[:, :rank])[0]  # the projection onto the first columns of W
    projected: Tensor = full - 0.5 * q @ (q.T @ full)
    return projected


def spread(shape: tuple[int, int]) -> Tensor:
    """Singular values well apart: where two are close, float32 and float64 share their vectors out otherwise."""
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    found: Tensor = (u * (8 * 0.95 ** torch.arange(min(shape)))) @ vh
    return found


@pytest.mark.parametrize("kind", sorted(INITIAL))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_rest_is_that_of_float64(kind: str, shape: tuple[int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    weight = spread(shape).float()
    stored = weight.T.contiguous() if transposed else weight
    found = concluded(stored, kind, 5, transposed)
    expected = exact(weight, kind, 5).float()
    torch.testing.assert_close(found, expected.T if transposed else expected, rtol=0, atol=2e-5)
    assert (stored - found).abs().max() > 0.05


@pytest.mark.parametrize("kind", sorted(INITIAL))
def test_it_is_rounded_to_the_type_it_was_trained_in(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32).bfloat16().float()
    found = concluded(weight, kind, 3, False, BF16)
    assert torch.equal(found, found.bfloat16().float())
    assert not torch.equal(found, concluded(weight, kind, 3, False))


def test_memory_is_counted_for_the_larger_side() -> None:
    for shape in SHAPES:
        update = InitialUpdate("w", shape, {}, "pissa", 3, 1.0, False, F32)
        assert update.held_bytes > 4 * 4 * math.prod(shape)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_a_tied_head_whose_embedding_changed_unseen_is_refused(tmp_path: Path) -> None:
    """PEFT saves a head it adapts unless told not to; the embedding it is tied to changed with it."""
    base = save_base(tmp_path / "base", llama_config(tied=True))
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, lora).path
    edit_tensors(adapter / "adapter_model.safetensors", drop=["base_model.model.lm_head.base_layer.weight"])
    with pytest.raises(
        UnsupportedError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor"
    ):
        streamconv.merge(base, adapter, tmp_path / "out")
