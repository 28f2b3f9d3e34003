"""The usual way to merge, as the benchmark's other contender: load everything, merge, save; then sync to disk."""

import os
import sys
from pathlib import Path

import transformers
from peft import PeftModel


def peft_merge(base: Path, adapter: Path, out: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="5GB")
    for path in (*out.iterdir(), out):  # the others sync too
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    peft_merge(*map(Path, sys.argv[1:4]))
