"""mergekit's `base+lora`, as one of the benchmark's contenders; runs in an environment of its own.

It writes the merged model twice: PEFT's result to a cache, which it then passes through.
"""

import shutil
import sys
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from tools.bench.synced import sync_folder


def mergekit_merge(base: Path, adapter: Path, out: Path) -> None:
    cache = out.with_name(f"{out.name}-cache")
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "passthrough",
            "models": [{"model": f"{base}+{adapter}"}],
            "dtype": "bfloat16",
        }
    )
    options = MergeOptions(
        lora_merge_cache=str(cache),
        lora_merge_dtype="bfloat16",
        copy_tokenizer=False,  # the benchmark's checkpoint has none
        out_shard_size=5 * 10**9,
        lazy_unpickle=True,
    )
    try:
        run_merge(config, str(out), options)
        sync_folder(out)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    mergekit_merge(*map(Path, sys.argv[1:4]))
