"""Answers of a reference to a text, kept in a folder: the next model is compared with it without a walk through it.

Kept are the hidden states that leave its last layer (a file `KEY.states`, as they lie in memory) and its greedy
continuations (`KEY-greedy-N.json`). Logits are made of the states anew, so that results are the same to the last bit.
The key stands for all that the states depend on; a file appears under its name once it is whole, and one that is not
what was recorded then is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from streamconv.checkpoint.own_files import read_own
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.recorded import RecordedFiles
from streamconv.checkpoint.strict_json import parse_object
from streamconv.checkpoint.writer import Bytes, write_file
from streamconv.errors import CheckpointError
from streamconv.forward.activations import map_file
from streamconv.output.journal import make_folder
from streamconv.planning.plan import Plan

_MAX_DRAFT_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Draft:
    """Greedy continuations [sequence, token], and how many walks it took to find them."""

    tokens: Tensor
    passes: int


@dataclass(frozen=True, slots=True)
class KeptReference:
    """One reference on one text. States have `shape` [sequence, token, hidden] and `dtype`.

    `is_of_subject`: the model that is compared is the reference itself, so that one walk serves both.
    """

    folder: Path
    key: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    is_of_subject: bool = False

    @property
    def _states_path(self) -> Path:
        return self.folder / f"{self.key}.states"

    def _draft_path(self, tokens: int) -> Path:
        return self.folder / f"{self.key}-greedy-{tokens}.json"

    def states(self) -> Tensor | None:
        """The states, mapped from their file; None where they are not kept yet.

        Raises OutputError where something else has the file's name, ResourceError where it cannot be mapped.
        """
        if not RecordedFiles(self.folder).is_whole(self._states_path):
            return None
        return map_file(self._states_path, self.shape, self.dtype, shared=False)

    def keep_states(self, states: Tensor) -> None:
        """Raises OutputError or ResourceError where they cannot be written."""
        self._keep(self._states_path, tensor_bytes(states))

    def _keep(self, path: Path, content: Bytes) -> None:
        make_folder(self.folder)
        RecordedFiles(self.folder).record({path.name: hashlib.sha256(content).hexdigest()})
        write_file(path, content)

    def draft(self, tokens: int) -> Draft | None:
        """Continuations of `tokens` tokens; None where they are not kept yet."""
        path = self._draft_path(tokens)
        content = read_own(path, _MAX_DRAFT_BYTES) if RecordedFiles(self.folder).is_whole(path) else None
        try:
            found = parse_object(content or b"", self.key)
            return Draft(torch.tensor(found["tokens"]), int(found["passes"]))
        except (CheckpointError, KeyError, TypeError, ValueError):  # damaged: it is made again
            return None

    def keep_draft(self, draft: Draft) -> None:
        """Raises OutputError or ResourceError where they cannot be written."""
        content = {"tokens": draft.tokens.tolist(), "passes": draft.passes}
        self._keep(self._draft_path(draft.tokens.shape[1]), json.dumps(content).encode())


def kept_reference(
    folder: Path, plan: Plan, windows: Tensor, hidden: int, dtype: torch.dtype
) -> KeptReference:
    """Folder of the answers to `windows` [sequence, token] of the reference that `plan` makes, present or to come."""
    identity: Sequence[object] = (
        plan.fingerprint,
        transformers.__version__,
        list(windows.shape),
        hashlib.sha256(tensor_bytes(windows.contiguous())).hexdigest(),
        str(dtype),
    )
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return KeptReference(folder, key, (windows.shape[0], windows.shape[1], hidden), dtype)
