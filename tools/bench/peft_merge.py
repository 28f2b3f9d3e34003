"""The usual way to merge, as one of the benchmark's contenders: load everything, merge, save; then sync to disk."""

import sys
from pathlib import Path

import transformers
from peft import PeftModel

from tools.bench.synced import sync_folder


def peft_merge(base: Path, adapter: Path, out: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="5GB")
    sync_folder(out)


if __name__ == "__main__":
    peft_merge(*map(Path, sys.argv[1:4]))
