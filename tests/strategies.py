"""Hypothesis strategies for what a safetensors file may hold."""

from __future__ import annotations

from hypothesis import strategies as st

from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import DTYPES

# Any text that UTF-8 can hold, control characters and emoji included.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
tensor_names = texts.filter(lambda name: name not in {"", "__metadata__"})
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
metadata = st.dictionaries(texts, texts, max_size=3)
tensor_lists = st.lists(
    st.builds(TensorSpec, tensor_names, st.sampled_from(sorted(DTYPES.values(), key=str)), shapes),
    max_size=8,
    unique_by=lambda tensor: tensor.name,
)
