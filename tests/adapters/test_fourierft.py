"""FourierFT: against PEFT, by its formula, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.adapters.trials import check_fields, held, merge_on_other_bases, refuse
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.fourierft_spectrum"
OURS: dict[str, Any] = {
    "peft_type": "FOURIERFT",
    "scaling": 20,
    "random_loc_seed": 5,
    "target_modules": ["layer"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("fourierft") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "n_frequency": 60},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "n_frequency": 40,
            "scaling": 7.5,
            "random_loc_seed": 3,
            "n_frequency_pattern": {"q_proj": 1024, "model.layers.0.mlp.down_proj": 3, r"1\..*down_proj": 5},
        },
        {"target_modules": ["lm_head"], "n_frequency": 50, "modules_to_save": ["norm"]},
    ],
    ids=["all linear", "patterns", "head"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, FourierFTConfig(**options))


def test_conv1d_is_pefts(tmp_path: Path) -> None:
    """Square ones among them, whose orientation the model tells."""
    base = save_base(tmp_path / "base", gpt2_config())
    targets = ["c_attn", "c_proj", "c_fc"]
    config = FourierFTConfig(target_modules=targets, n_frequency=80, fan_in_fan_out=True)
    merge_as_peft(tmp_path, base, config, quantizes=False)


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(
        tmp_path, base, FourierFTConfig(target_modules=["q_proj", "down_proj"], n_frequency=50)
    )


@pytest.mark.parametrize("shape", [(70, 33), (5, 1), (1, 8), (64, 96)])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_any_shape_follows_the_formula(tmp_path: Path, shape: tuple[int, int], share: float) -> None:
    """Odd and even numbers of columns, every place of the spectrum or some; more of them than are added at a time."""
    torch.manual_seed(0)
    size = shape[0] * shape[1]
    spectrum, weight = torch.randn(max(1, int(share * size))), torch.randn(shape)
    config = OURS | {"n_frequency": len(spectrum)}
    folder = save_by_hand(tmp_path / "a", config, {"layer.fourierft_spectrum": spectrum})
    found = merged_by_hand(read_for(folder, {"layer.weight": shape}), {"layer.weight": weight})
    whole = torch.zeros(size, dtype=torch.float64)
    places = torch.randperm(size, generator=torch.Generator().manual_seed(5))
    whole[places[: len(spectrum)]] = spectrum.double()
    expected = weight + 20 * torch.fft.ifft2(whole.view(shape)).real.float()
    torch.testing.assert_close(found["layer.weight"], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    config = FourierFTConfig(target_modules=["q_proj"], n_frequency=30)
    return save_adapter(tmp_path / "adapter", base, config).path


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(30, 1), (1025,)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "fourierft_spectrum has shape .*trained on this base")
    edit_tensors(adapter / TENSORS, put={Q: torch.ones(0)})
    refuse(base, adapter, AdapterError, r"shape \[0\] .*fourierft_spectrum.*ZeRO-3")


def test_numbers_that_the_config_does_not_give_are_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, n_frequency=29)
    refuse(base, adapter, AdapterError, "has 30 frequencies, but .* gives 29")


@pytest.mark.parametrize("seed", [None, "777", 1.5, 2**64, True])
def test_a_seed_that_is_none_is_refused(base: Path, adapter: Path, seed: Any) -> None:
    edit_json(adapter / CONFIG, random_loc_seed=seed)
    refuse(base, adapter, AdapterError, "random_loc_seed must be the whole number")


def test_every_tensor_counts(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("spectrum", "other"): torch.ones(30)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, FourierFTConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, bias="some")
    refuse(base, adapter, UnsupportedError, "bias is")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(
        adapter / TENSORS, put={Q.replace(".0.", f".{layer}."): torch.zeros(30) for layer in range(2)}
    )
    refuse(base, adapter, AdapterError, r"every update is zero \(all fourierft_spectrum, or scaling\)")


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    """Python's part of it is not seen by torch's profiler."""
    folder = save_by_hand(
        tmp_path / "a", OURS | {"n_frequency": 10}, {"layer.fourierft_spectrum": torch.ones(10)}
    )
    ((update, peak),) = held(read_for(folder, {"layer.weight": (2**18, 3)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["frequencies"], found["scaling"]) == ("FOURIERFT", [30], 150.0)
