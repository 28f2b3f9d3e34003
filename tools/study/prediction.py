"""The kept share of nearest rounding of T that is foretold from sizes alone, for a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamconv.analysis.prediction import predicted_kept
from streamconv.kernels.grids import NF4

# Below this share a fine-tune counts as erased; it is the default of --min-kept.
ERASED = 0.2


def predicted_share(weights: Sequence[Mapping[str, Any]]) -> float:
    """Mean over `weights` of the share foretold for each, by the squares of their deltas, as the kept delta is."""
    squares = [weight["delta_square"] for weight in weights]
    shares = [predicted_kept(weight["ratio"], NF4, weight["delta_kurtosis"]) for weight in weights]
    return float(np.average(shares, weights=squares))
