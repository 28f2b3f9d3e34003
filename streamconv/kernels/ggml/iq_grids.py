"""Lookup tables of the iq types, which the `gguf` package carries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from streamconv.errors import UnsupportedError

# Type -> the class of `gguf.quants` that has its table.
_OWNERS = {
    "iq2_xxs": "IQ2_XXS",
    "iq2_xs": "IQ2_XS",
    "iq2_s": "IQ2_S",
    "iq3_xxs": "IQ3_XXS",
    "iq3_s": "IQ3_S",
    "iq1_s": "IQ1_S",
    "iq1_m": "IQ1_S",
}
IQ_TYPES = tuple(_OWNERS)


@functools.cache
def iq_grid(name: str) -> Tensor:
    """Table of an iq type: float32 [entries, 8], or [entries, 4] of iq3. UnsupportedError without `gguf`."""
    try:
        from gguf import quants
    except ImportError as error:
        raise UnsupportedError(
            f"weights of type {name} are looked up in a table that the gguf package has, not installed here; run "
            "pip install 'streamconv[gguf]', or give the model in another type or as safetensors"
        ) from error
    owner = getattr(quants, _OWNERS[name])
    owner.init_grid()
    return torch.from_numpy(owner.grid.reshape(owner.grid_shape).copy())
