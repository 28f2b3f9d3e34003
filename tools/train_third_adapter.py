"""The third adapter of the study: QLoRA of another rank and other layers, on the demo base with another text.

Text: the lexicon of the Jargon File 4.4.7 (public domain) from the Debian package jargon-text. Its lines are
joined to paragraphs; lists of headwords and drawings are left out. Of every `HELD_OUT_EVERY` sections one is held
out; the others train, and the first of them are the calibration text. Training is QLoRA as bitsandbytes and PEFT
do it: a frozen nf4 base with double-quantized scales, the adapter in float32, stored in bfloat16.
"""

import argparse
import hashlib
import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

from tools.make_demo_base import make_demo_base
from tools.perplexity import be_quiet, load_in_nf4_dq

PACKAGE = "jargon-text"
MEMBER = "./usr/share/doc/jargon-text/jargon.txt.gz"
TEXT_SHA256 = "40dfb4b98191a670a09a183d5798d50f243d23fdbd1495dcc0aca2ce5895ba97"
SECTION_CHARACTERS = 2500
HELD_OUT_EVERY = 13
CALIBRATION_CHARACTERS = 280_000

NAME_OF_BASE = "SmolLM2-135M-Instruct"
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
STEPS, WARM_UP, LEARNING_RATE, SEED = 90, 6, 5e-4, 6
WINDOWS, TOKENS = 2, 512  # of one step


def download(work: Path) -> str:
    """Fetch the Debian package by name, unpack it into `work` and return its text."""
    subprocess.run(["apt-get", "-qq", "download", PACKAGE], cwd=work, check=True)
    (package,) = work.glob(f"{PACKAGE}_*.deb")
    files = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    packed = subprocess.run(["tar", "-xO", MEMBER], input=files, check=True, capture_output=True).stdout
    text = subprocess.run(["gzip", "-dc"], input=packed, check=True, capture_output=True).stdout
    if (found := hashlib.sha256(text).hexdigest()) != TEXT_SHA256:
        raise ValueError(
            f"{MEMBER} of the Debian package {PACKAGE} has SHA-256 {found}, expected {TEXT_SHA256}"
        )
    return text.decode()


def paragraphs(text: str) -> Iterator[str]:
    """The lexicon, one line a paragraph, without drawings and without the lists of headwords."""
    text = text.replace("\xa0", " ")
    lexicon = text[text.index("\n  A\n") : text.index("\nAppendix A. Hacker Folklore")]
    blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", lexicon)]
    for is_list, run in itertools.groupby(blocks, key=lambda block: "\n" not in block and len(block) < 60):
        found = list(run)
        # An entry is a headword and, some lines on, what it means: more headwords in a row are a list.
        kept = found[-1:] if is_list and len(found) > 2 else found
        for block in kept:
            joined = " ".join(line.strip() for line in block.splitlines())
            if not re.search(r" {3}|[│║═_]{3}", joined):
                yield joined


def split(text: str) -> tuple[str, str]:
    """Return what trains and what is held out of `text`: sections of whole paragraphs, every so many held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    length = 0
    for paragraph in paragraphs(text):
        is_held_out = length // SECTION_CHARACTERS % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        parts[is_held_out].append(paragraph)
        length += len(paragraph)
    training, held_out = ("\n\n".join(part) + "\n" for part in parts)
    return training, held_out


def calibration(training: str) -> str:
    """The beginning of the training text, to the end of a paragraph."""
    return training[: training.index("\n\n", CALIBRATION_CHARACTERS) + 1]


def batches(tokenizer: Any, training: str) -> Iterator[Tensor]:
    """Windows [WINDOWS, TOKENS] of the training text, in a random order that the seed fixes, for ever."""
    ids = tokenizer(training, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order[: len(order) // WINDOWS * WINDOWS].view(-1, WINDOWS):
            yield windows[chosen]


def train(base: Path, training: str, out: Path, steps: int) -> None:
    """Train the adapter on `training` and save it to `out`."""
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **load_in_nf4_dq())
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARM_UP, steps)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    started = time.monotonic()
    for step, ids in enumerate(itertools.islice(batches(tokenizer, training), steps)):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"[{time.monotonic() - started:5.0f} s] step {step + 1}/{steps} loss {loss:.3f}", flush=True)
    model.peft_config["default"].base_model_name_or_path = NAME_OF_BASE
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "README.md").unlink()  # an empty form


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/train_third_adapter", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path(".demo/base"), help="made where it is missing")
    parser.add_argument("--out", type=Path, default=Path("tests/data"))
    parser.add_argument("--steps", type=int, default=STEPS, help="0: write the texts only")
    parser.add_argument("--threads", type=int, default=2, help="results depend on it in the last bits")
    options = parser.parse_args(arguments)
    be_quiet()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        training, held_out = split(download(Path(folder)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "jargon.valid.txt").write_text(held_out, encoding="utf-8")
    (options.out / "jargon.calibration.txt").write_text(calibration(training), encoding="utf-8")
    if options.steps:
        make_demo_base(options.base)
        train(options.base, training, options.out / "jargon-qlora", options.steps)


if __name__ == "__main__":
    main()
