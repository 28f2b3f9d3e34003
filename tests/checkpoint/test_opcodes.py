"""Pickles that do no harm to a loader of tensors, and those that are refused before one sees them."""

from __future__ import annotations

import io
import time
import zipfile
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch

from streamconv.checkpoint.opcodes import check_opcodes
from streamconv.errors import CheckpointError
from tests.checkpoint.pickles import called, hash_bomb, state, tensor


def pickle_of(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def refusal(pickled: bytes) -> str:
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"^m\.bin ") as caught:
        check_opcodes(pickled, 4, "m.bin")
    assert time.process_time() - began < 5
    return str(caught.value)


def test_what_training_saves_passes() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.note = "of its own"  # type: ignore[attr-defined]
    layer = torch.nn.Linear(2, 2).state_dict()  # with the versions of its modules beside it
    found = {
        **{str(dtype): torch.ones(2).to(dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool)},
        **{str(dtype): torch.ones(2).to(dtype) for dtype in (torch.float8_e4m3fn, torch.uint16)},
        "parameter": parameter,
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "scalar": torch.tensor(1.0),
    }
    for content in (found, OrderedDict(found), layer, {"deep": {"deeper": [found, (1, (2, (3,)))]}}):
        check_opcodes(pickle_of(content), 4, "m.bin")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a sparse tensor", torch.eye(3).to_sparse()),
        ("a tensor without values", torch.empty(3, device="meta")),
        ("'collections.defaultdict'", defaultdict(int)),
    ],
)
def test_what_is_no_plain_tensor_is_named(name: str, content: Any) -> None:
    said = refusal(pickle_of({"x": content}))
    assert name in said
    assert said.endswith("safetensors")


@pytest.mark.parametrize("name", ["_rebuild_qtensor", "_rebuild_nested_tensor", "_rebuild_wrapper_subclass"])
def test_tensors_that_hold_tensors_are_named(name: str) -> None:
    assert "holds a " in refusal(state(called("torch._utils", name, 1)))


@pytest.mark.parametrize(("module", "name"), [("builtins", "bytearray"), ("os", "system"), ("torch", "load")])
def test_nothing_else_is_called(module: str, name: str) -> None:
    assert f"names '{module}.{name}', which" in refusal(state(called(module, name, 2**40)))


@pytest.mark.parametrize("wide", [2, 1000])
def test_a_key_that_takes_for_ever_to_hash(wide: int) -> None:
    assert "in more steps than 4 entries need" in refusal(hash_bomb(wide=wide))
    check_opcodes(hash_bomb(wide=1), 4, "m.bin")  # nothing but deep: forty steps


def test_steps_have_a_measure() -> None:
    many = b"\x80\x02](" + b"}" * 600_000 + b"e."
    assert "in more steps than 4 entries need" in refusal(many)
    check_opcodes(many, 1500, "m.bin")


def test_tensors_by_the_thousand_need_no_more() -> None:
    content = {f"model.layers.{number}.weight": torch.ones(2, 3) for number in range(10_000)}
    pickled = pickle_of(content)
    check_opcodes(pickled, 10_000, "m.bin")
    check_opcodes(pickled, 1_000, "m.bin")


def test_a_tensor_by_hand_is_as_torch_writes_it() -> None:
    check_opcodes(state(tensor()), 4, "m.bin")
