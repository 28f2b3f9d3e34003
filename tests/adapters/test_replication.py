"""`layer_replication`: what is a list of ranges, and whether an adapter reaches every layer that it makes."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.lora_config import read_settings
from streamconv.adapters.replication import check_every_layer, read_ranges
from streamconv.adapters.source import Source
from streamconv.errors import AdapterError, UnsupportedError


def config(**fields: Any) -> AdapterConfig:
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    return AdapterConfig("somewhere: adapter_config.json", MappingProxyType(usual | fields), b"{}")


def test_ranges_as_they_stand() -> None:
    assert read_ranges(config(layer_replication=[[0, 4], [2, 5]])) == ((0, 4), (2, 5))


@pytest.mark.parametrize("value", [None, []])
def test_no_ranges(value: Any) -> None:
    assert read_ranges(config(layer_replication=value)) == ()
    assert read_ranges(config()) == ()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([[0, 4], [3, 3]], r"\[3, 3\]"),
        ([[4, 2]], r"\[4, 2\]"),
        ([[-1, 2]], r"\[-1, 2\]"),
        ([[0, 4], 2], "2"),
        ([[0, 1, 2]], r"\[0, 1, 2\]"),
        ([[0]], r"\[0\]"),
        ([[0, 2.0]], r"\[0, 2\.0\]"),
        ([[False, True]], r"\[False, True\]"),
        ([["0", "2"]], r"\['0', '2'\]"),
        ([None], "None"),
        ({"0": 4}, "no list"),
        ("0-4", "no list"),
        (False, "no list"),
        (3, "no list"),
        ([[0, 10**9]], "more than 10000 layers"),
    ],
)
def test_what_is_no_range_is_refused(value: Any, found: str) -> None:
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: layer_replication is .*{found}"):
        read_ranges(config(layer_replication=value))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_copies_that_changed_the_weights_they_share_are_refused(kind: str) -> None:
    fields: dict[str, Any] = {"init_lora_weights": kind, "layer_replication": [[0, 2], [0, 2]]}
    with pytest.raises(UnsupportedError, match=rf"adapter_config\.json: .*{kind}.*layer_replication"):
        read_settings(config(**fields))
    assert read_settings(config(**fields | {"layer_replication": None})).initial == kind


MODULES = [
    *(f"model.layers.{layer}.{name}" for layer in range(4) for name in ("mlp.up", "mlp.down", "norm")),
    "lm_head",
]
EVERY = {f"model.layers.{layer}.mlp.up" for layer in range(4)}


def check(covered: set[str], targets: Any = ("up",), **fields: Any) -> None:
    targets = list(targets) if isinstance(targets, tuple) else targets
    fields = {"layer_replication": [[0, 2], [0, 2]], "target_modules": targets} | fields
    check_every_layer(Source("here", config(**fields), MappingProxyType({})), MODULES, covered)


@pytest.mark.parametrize("targets", [("up",), ("mlp.up",), ("up", "lm_head"), "all-linear"])
def test_a_layer_without_tensors_is_refused(targets: Any) -> None:
    check(EVERY, targets)
    for missing in EVERY:
        with pytest.raises(AdapterError, match=f"here: layer_replication .*no tensors for {missing},"):
            check(EVERY - {missing}, targets)


@pytest.mark.parametrize("field", ["target_parameters", "modules_to_save"])
def test_so_it_is_where_others_than_targets_are_trained(field: str) -> None:
    check(EVERY, (), **{field: ["mlp.up"]})
    with pytest.raises(AdapterError, match=r"no tensors for model\.layers\.2\.mlp\.up,"):
        check(EVERY - {"model.layers.2.mlp.up"}, (), **{field: ["mlp.up"]})


def test_modules_differ_in_what_is_adapted() -> None:
    check(EVERY | {f"model.layers.{layer}.mlp.down" for layer in range(4)}, ("up", "down"))
    with pytest.raises(AdapterError, match=r"no tensors for model\.layers\.0\.mlp\.down,"):
        check(EVERY | {"model.layers.3.mlp.down"}, ("up", "down"))


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": r".*layers\.[03]\.mlp\.up"},
        {"targets": ("layers.0.mlp.up", "layers.3.mlp.up")},
        {"layers_to_transform": [0, 3]},
        {"layers_to_transform": 0},
        {"targets": (), "target_parameters": ["layers.0.mlp.up", "layers.3.mlp.up"]},
        {"targets": (), "modules_to_save": ["layers.0.mlp.up", "layers.3.mlp.up"]},
        {"exclude_modules": ["layers.1.mlp.up", "layers.2.mlp.up"]},
        {"layer_replication": None},
    ],
)
def test_some_layers_may_be_meant(fields: dict[str, Any]) -> None:
    check({"model.layers.0.mlp.up", "model.layers.3.mlp.up"}, **fields)
