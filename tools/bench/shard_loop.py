"""What people write when the model does not fit: load a shard, add to its weights, save it; then sync to disk.

One of the benchmark's contenders: as fast as such a loop gets without care for memory or for rounding only once.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tools.bench.synced import sync_folder


def shard_loop(base: Path, adapter: Path, out: Path) -> None:
    out.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    factors = load_file(adapter / "adapter_model.safetensors")
    for shard in sorted(base.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, weight in tensors.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in factors:
                a, b = (
                    factors[f"{key}.lora_{part}.weight"] for part in "AB"
                )  # float32, the fastest on a CPU
                tensors[name] = weight + (b @ a * scaling).to(weight.dtype)
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    for file in base.glob("*.json"):
        shutil.copy(file, out)
    sync_folder(out)


if __name__ == "__main__":
    shard_loop(*map(Path, sys.argv[1:4]))
