"""Opcodes of a pickle looked through before it is loaded: what it would make, and how long that would take.

torch's loader under `weights_only` runs no code of the file. But it makes sparse and quantized tensors, whose bytes do
not lie in the file as they are; it gives a file any memory it asks for (`bytearray`), and hashes keys of a dict
however often tuples inside hold each other. Opcodes are those of Python's `pickletools`; classes and functions those of
`torch/_weights_only_unpickler.py` (`_get_allowed_globals`) that tensors and their names need.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping
from types import MappingProxyType

from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError

# torch's module and name -> kind of tensor whose bytes are not read from their place.
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "_rebuild_sparse_tensor": "a sparse tensor",
        "_rebuild_sparse_csr_tensor": "a sparse tensor",
        "_rebuild_qtensor": "a quantized tensor",
        "_rebuild_nested_tensor": "a nested tensor",
        "_rebuild_meta_tensor_no_storage": "a tensor without values, of the device meta",
        "_rebuild_wrapper_subclass": "a tensor of a class of its own",
        "_rebuild_device_tensor_from_numpy": "a tensor of another device",
        "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    }
)
_NEEDED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.nn\.parameter (Parameter|Buffer)"
    r"|torch\.storage (TypedStorage|UntypedStorage)"
    r"|torch (Size|Tensor|device|\w+Storage)"
    r"|torch (bool|u?int\d+|b?float\d+\w*|complex\d+)"
)
# About 65 a tensor; and a file may hold many views of one storage.
_OPCODES_PER_ENTRY, _SPARE_OPCODES = 200, 400_000
_MAX_HASHED = 20_000_000


def check_opcodes(pickled: bytes, entries: int, file_name: str) -> None:
    """Raise CheckpointError for a pickle that makes more than tensors whose bytes lie in the file, or takes too long.

    `entries` are those of the archive it lies in. Raises what `pickletools` does for one that is damaged.
    """
    stack: list[int | None] = []
    memo: dict[object, int] = {}
    most = _SPARE_OPCODES + _OPCODES_PER_ENTRY * entries
    hashed = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        name = opcode.name
        if name == "GLOBAL":
            _check_global(str(argument), file_name)
        if name.endswith("PUT"):
            memo[argument] = stack[-1] or 0
            continue
        made = memo.get(argument, 0) if name.endswith("GET") else _made(opcode, stack)
        stack.extend(None if each is pickletools.markobject else made for each in opcode.stack_after)
        hashed += made
        if hashed > _MAX_HASHED or number > most:
            raise CheckpointError(
                f"{file_name} says what its tensors are in more steps than {entries} entries need; save it as"
                " safetensors"
            )


def _made(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """Take the opcode's operands off the stack; how many objects a hash of its result would visit."""
    before = opcode.stack_before
    taken: list[int] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) is not None:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() or 0 for _ in before]
    return 1 + sum(taken) if opcode.name.startswith("TUPLE") else 1


def _check_global(argument: str, file_name: str) -> None:
    kind = _ELSEWHERE.get(argument.rpartition(" ")[2])
    if kind is not None:
        raise CheckpointError(
            f"{file_name} holds {kind}, and only tensors whose bytes lie in the file one after another are read; make"
            " it dense, and save it as safetensors"
        )
    if not _NEEDED.fullmatch(argument):
        raise CheckpointError(
            f"{file_name} names {shown(argument.replace(' ', '.'))}, which a file of tensors by name does not need, and"
            " none of it is loaded; save its tensors alone, as safetensors"
        )
