"""Make tests/golden/gptqmodel-dynamic-VERSION: settings that GPTQModel finds for single modules; see README.md.

python tests/golden/make_gptq_dynamic.py tests/golden
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gptqmodel
from gptqmodel.quantization.config import dynamic_get

USUAL = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 11, 21)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
]
# From the project's README and from what people publish: which rule counts, how much of a path it has to match.
RULES: dict[str, dict[str, Any]] = {
    "of the README": {
        r".*\.18\..*gate.*": {"bits": 4, "group_size": 32},
        r".*\.1\..*gate.*": {"bits": 8, "group_size": 64},
        r"-:.*\.21\..*gate.*": {},
        r"-:.*down.*": {},
    },
    "signs": {
        r"+:model\.layers\.1\.": {"bits": 8},
        r"model\.layers\.1": {"bits": 3},
        r"-:.*v_proj": {},
        r"+:.*v_proj": {"bits": 8, "sym": False},
    },
    "the first counts": {
        r"+:.*up_proj$": {"sym": False},
        r"+:.*mlp\..*": {"bits": 8},
        r".*": {"desc_act": True},
    },
    "only from the start": {r"mlp": {"bits": 8}, r"up_proj$": {"bits": 8}, r"": {"group_size": 64}},
    "whole paths": {
        r"^model\.layers\.0\.mlp\.up_proj$": {"bits": 8},
        r"^model\.layers\.1\.mlp\.up_proj": {"bits": 3},
        r"model.layers.1.mlp.up_proj": {"bits": 2},
    },
    "lookahead": {r"+:model\.layers\.(?!0\.)\d+\.mlp": {"bits": 8, "group_size": 32}},
    "none": {},
}


def found(rules: dict[str, dict[str, Any]], module: str) -> dict[str, Any]:
    return {key: dynamic_get(rules, module, key, usual) for key, usual in USUAL.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) / f"gptqmodel-dynamic-{gptqmodel.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    cases = {
        name: {"dynamic": rules, "modules": {module: found(rules, module) for module in MODULES}}
        for name, rules in RULES.items()
    }
    (folder / "rules.json").write_text(json.dumps({"usual": USUAL, "cases": cases}, indent=1) + "\n")
