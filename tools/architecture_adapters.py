"""Tiny models of tools/architecture_models.py with adapters by whatever PEFT and transformers are installed.

    python -m tools.architecture_adapters FOLDER FORM[,FORM] ARCHITECTURE ...

Each architecture's folder gets `base/`, and for each form a folder with `adapter/`, `merged/` (what PEFT's own merge
saves) and `expected.safetensors` (inputs, and the logits of the
base and of the live model). One that an environment does not know,
or a form that it cannot train, is left out, with the reason in `left_out.txt`. Nothing of streamconv is imported:
versions of libraries that it does not work with are meant to run this.
"""

from __future__ import annotations

import argparse
import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.architecture_models import ARCHITECTURES, EXPERTS, VOCABULARY, Architecture

Inputs = dict[str, Tensor]


def text(generator: torch.Generator) -> Inputs:
    return {"input_ids": torch.randint(6, VOCABULARY, (2, 8), generator=generator)}


def sequences(generator: torch.Generator) -> Inputs:
    return text(generator) | {"decoder_input_ids": text(generator)["input_ids"]}


def speech(generator: torch.Generator) -> Inputs:
    features = torch.randn(2, 16, 40, generator=generator)
    return {"input_features": features, "decoder_input_ids": text(generator)["input_ids"]}


def image(generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}


def waves(generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(2, 400, generator=generator)}


INPUTS: Mapping[str, Callable[[torch.Generator], Inputs]] = {
    function.__name__: function for function in (text, sequences, speech, image, waves)
}


def save_base(folder: Path, model_type: str, architecture: Architecture) -> None:
    config = transformers.AutoConfig.for_model(model_type, **architecture.config, **architecture.parts)
    loader = getattr(transformers, architecture.loader)
    build = loader.from_config if hasattr(loader, "from_config") else loader
    torch.manual_seed(0)
    model = build(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def open_model(folder: Path, architecture: Architecture) -> Any:
    loader = getattr(transformers, architecture.loader)
    return loader.from_pretrained(folder, torch_dtype=torch.float32).eval()


def fused_experts(model: nn.Module) -> list[str]:
    """Parameters that hold a matrix for each expert, as `target_parameters` names them: by the end of their path."""
    return sorted(
        {
            ".".join(f"{path}.{name}".split(".")[-3:])
            for path, module in model.named_modules()
            if not isinstance(module, nn.Conv1d)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and len(parameter) == EXPERTS["num_experts"]
        }
    )


def lora_config(form: str, architecture: Architecture, model: nn.Module) -> Any:
    """The adapter of a form; raises ValueError where the model has nothing that the form is about."""
    targets: Any = "all-linear" if form == "all-linear" else list(architecture.targets)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    if form == "parameters":
        options["target_parameters"] = [*architecture.flat_experts, *fused_experts(model)]
        options["target_modules"] = [name for name in architecture.targets if name in ("q_proj", "Wqkv", "q")]
        if not options["target_parameters"]:
            raise ValueError("no parameter of this model holds the matrices of several experts")
    return peft.LoraConfig(**options)


def save_adapter(folder: Path, base: Path, form: str, architecture: Architecture) -> None:
    model = open_model(base, architecture)
    inputs = INPUTS[architecture.inputs](torch.Generator().manual_seed(2))
    with torch.no_grad():
        base_logits = model(**inputs).logits
    live = peft.get_peft_model(model, lora_config(form, architecture, model)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    live.save_pretrained(folder / "adapter")
    with torch.no_grad():
        logits = live(**inputs).logits
    answers = {"base_logits": base_logits.contiguous(), "logits": logits.contiguous()}
    save_file(inputs | answers, folder / "expected.safetensors")
    live.merge_and_unload().save_pretrained(folder / "merged")


def make(folder: Path, model_type: str, forms: list[str]) -> None:
    """`base/` and a folder for each form of adapter; the reason why there is none in `left_out.txt`."""
    architecture = ARCHITECTURES[model_type]
    for name, save in _steps(folder, model_type, forms, architecture):
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save()
        except Exception as error:  # whatever stops this library on this model is a finding
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:300]
            place = f"{Path(last.filename).name}:{last.lineno}"
            (folder / name / "left_out.txt").write_text(f"{type(error).__name__}: {said} ({place})\n")
            if name == "base":
                return


def _steps(
    folder: Path, model_type: str, forms: list[str], architecture: Architecture
) -> Iterator[tuple[str, Callable[[], None]]]:
    base = folder / "base"
    yield "base", partial(save_base, base, model_type, architecture)
    for form in forms:
        yield form, partial(save_adapter, folder / form, base, form, architecture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools.architecture_adapters")
    parser.add_argument("folder", type=Path)
    parser.add_argument("forms")
    parser.add_argument("architectures", nargs="+")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: str(module.__version__) for module in (peft, torch, transformers)}
    (arguments.folder / "versions.json").write_text(json.dumps(versions) + "\n")
    for model_type in arguments.architectures:
        make(arguments.folder / model_type, model_type, arguments.forms.split(","))


if __name__ == "__main__":
    main()
