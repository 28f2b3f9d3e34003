"""Trained weights in files of their own beside the adapter's, as trainers save what PEFT does not.

LLaVA and its heirs save `non_lora_trainables.bin`, `mm_projector.bin`, `non_lora_state_dict.bin`; LongLoRA
`trainable_params.bin`; others embeddings, heads, whole parts of a model. Every file of tensors in the adapter's folder
counts: its tensors replace the base's as those of modules_to_save do, or it is refused by name. Files that hold the
state of training, by their names or by those of their tensors, are no weights.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from streamconv.adapters.saved import find_vocabulary
from streamconv.adapters.source import PREFIX, BaseParameters, Source, plain_key
from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.pickled import MAX_PLAIN_BYTES, holds_plain_values, read_pickled
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError, CheckpointError, OptionError, UnsupportedError
from streamconv.storage.base import SourceFile, Storage

_PICKLES = (".bin", ".pt", ".pth")
_SAFETENSORS = ".safetensors"
# State of training, by the names of transformers' Trainer, accelerate, DeepSpeed and torch; other forms of the adapter
# and its earlier states; and what a tokenizer is called.
_NO_WEIGHTS = (
    *(
        "training_args*",
        "optimizer*",
        "optim.*",
        "optim_*",
        "scheduler*",
        "lr_scheduler*",
        "scaler*",
        "grad_scaler*",
    ),
    *(
        "rng_state*",
        "random_states*",
        "trainer_state*",
        "sampler*",
        "dataloader*",
        "dl_state*",
        "*_optim_states.pt",
        "extra_state_*",
    ),
    *("adapter_model*", "adapters.safetensors", "*_adapters.safetensors", "tokenizer*", "vocab*"),
)
# Folders below an adapter's that are something of their own: another adapter, a model, a state of training.
_OWN_CONFIGS = frozenset({"config.json", "adapter_config.json", "model_index.json", "params.json"})
_OF_TRAINING = (
    *(
        ".*",
        "checkpoint*",
        "global_step*",
        "step*",
        "epoch*",
        "optimizer*",
        "scheduler*",
        "pytorch_model_fsdp*",
    ),
    *("runs", "log*", "wandb", "tensorboard*"),
)
_OPTIMIZER = re.compile(r"(.+\.)?(exp_avg\w*|max_exp_avg\w*|momentum_buffer|step|square_avg|param_groups.*)")
# What PEFT's wrappers put before the name of a parameter that they hold.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Beside:
    """`tensors` by their key in a Source, spelled as of modules_to_save; `notes` on which files they are from."""

    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


def read_beside(
    storage: Storage,
    source: Source,
    base: BaseParameters,
    read: Collection[SourceFile],
    allow_pickle: bool,
    ignored: Collection[str],
) -> Beside:
    """Trained weights in all files beside those that were `read`, but for the `ignored`.

    Raises AdapterError for a file that the base has no place for, UnsupportedError for a pickle that is not allowed,
    OptionError where an ignored file is not there.
    """
    names = _names(storage)
    for name in ignored:
        if name not in names:
            raise OptionError(
                f"--ignore-extra {name}: {storage.location} has no such file; leave the option out"
            )
    found: dict[str, StoredTensor] = {}
    notes = [f"{name} beside the adapter is left out, as --ignore-extra says" for name in ignored]
    for name in _candidates(names, {file.name for file in read} | {*ignored}):
        tensors = _weights(_tensors(storage, name, allow_pickle))
        if not tensors:
            continue
        placed = _placed(storage, name, tensors, source, base)
        _check_once(name, placed, found)
        found |= placed
        notes.append(
            f"{name} beside the adapter holds trained weights, which replace {len(placed)} of the base's:"
            f" {_some(sorted(tensor.name for tensor in tensors))}"
        )
    return Beside(MappingProxyType(found), tuple(notes))


def _names(storage: Storage) -> list[str]:
    """Files of the adapter's folder, and of those below it that hold neither a model nor the state of training."""
    found = list(storage.names())
    for folder in storage.folders():
        inside = storage.names(folder)
        is_own = any(name.rpartition("/")[2] in _OWN_CONFIGS for name in inside)
        if not is_own and not any(fnmatch.fnmatchcase(folder.lower(), pattern) for pattern in _OF_TRAINING):
            found += inside
    return found


def with_beside(source: Source, beside: Beside) -> Source:
    """The adapter with the weights beside it among its tensors. Raises AdapterError for a key that both have."""
    if not beside.tensors:
        return source
    for key in source.tensors.keys() & beside.tensors.keys():
        raise AdapterError(
            f"{source.location}: {source.tensors[key].name} of {source.tensors[key].file.name} is in"
            f" {beside.tensors[key].file.name}, too; leave that out with --ignore-extra"
        )
    tensors = {**source.tensors, **beside.tensors}
    return replace(source, tensors=MappingProxyType(dict(sorted(tensors.items()))))


def _candidates(names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    """Files that may hold weights."""
    for name in names:
        last = name.rpartition("/")[2].lower()
        is_state = any(fnmatch.fnmatchcase(last, pattern) for pattern in _NO_WEIGHTS)
        if name.endswith((_SAFETENSORS, *_PICKLES)) and name not in known and not is_state:
            yield name


def _tensors(storage: Storage, name: str, allow_pickle: bool) -> Collection[StoredTensor]:
    """All tensors of a file, from its header; none of a pickle of settings, as trainers save their state."""
    file = storage.file(name)
    try:
        if name.endswith(_SAFETENSORS):
            header = read_header(file, storage.read_start)
            storage.fetch((file,), lambda _: None)
            return [
                StoredTensor(each.name, each.dtype, each.shape, file, header.data_start + each.start)
                for each in header.tensors
            ]
        if file.size <= MAX_PLAIN_BYTES and holds_plain_values(storage.read_start(file, file.size)):
            return ()
        if not allow_pickle:
            raise UnsupportedError(
                f"{storage.location}: {name} beside the adapter may hold weights that training changed, and is a"
                " pickle, which may run code when loaded: let it be read with --allow-pickle, which opens it so that it"
                f" can hold nothing but tensors, or leave it out with --ignore-extra {name}"
            )
        storage.fetch((file,), lambda _: None)
        return read_pickled(file).values()
    except CheckpointError as error:
        raise AdapterError(
            f"{storage.location}: {name} beside the adapter may hold weights that training changed, but {error}; leave"
            f" it out with --ignore-extra {name} if it holds none"
        ) from error


def _weights(tensors: Collection[StoredTensor]) -> list[StoredTensor]:
    """Those that training may have changed: numbers that are not whole, of more than one element in all, no state."""
    found = [tensor for tensor in tensors if tensor.dtype.is_float and not _OPTIMIZER.fullmatch(tensor.name)]
    has_name = any("." in tensor.name for tensor in found)
    return found if has_name or any(tensor.nbytes > tensor.dtype.itemsize for tensor in found) else []


def _placed(
    storage: Storage, name: str, tensors: Collection[StoredTensor], source: Source, base: BaseParameters
) -> dict[str, StoredTensor]:
    """Tensors of a file by key; all of them have one, or the file is refused."""
    plain = _by_plain_name(storage, name, tensors)
    stem = name.partition("/" if "/" in name else ".")[0]
    for parameters in _namings(plain, stem, source, base):
        fit = all(_fits(tensor, parameter, base) for parameter, tensor in parameters.items())
        if fit and len(parameters) == len(plain):
            known = {
                *source.tensors,
                *(tensor.name.removeprefix(PREFIX) for tensor in source.tensors.values()),
            }
            keys = {_key(parameter, known): tensor for parameter, tensor in parameters.items()}
            # Named by their key, as other files may have the same names.
            return {key: replace(tensor, name=PREFIX + key) for key, tensor in keys.items()}
    missing = [key for key, tensor in plain.items() if not _fits(tensor, key, base)]
    raise AdapterError(
        f"{storage.location}: {name} beside the adapter holds weights that training changed, and the base has no place"
        f" for {len(missing)} of its {len(plain)} tensors ({_some(missing)}), by name and shape; give the base that the"
        f" adapter was trained on, or leave the file out with --ignore-extra {name}"
    )


def _by_plain_name(
    storage: Storage, name: str, tensors: Collection[StoredTensor]
) -> Mapping[str, StoredTensor]:
    """Tensors of a file by their plain names. Raises AdapterError where two of them have one."""
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if ".original_module." in tensor.name:
            continue
        other = found.setdefault(_plain(tensor.name), tensor)
        if other is not tensor:
            raise AdapterError(
                f"{storage.location}: {name} beside the adapter holds {other.name} and {tensor.name}, which are for the"
                " same parameter of the base; remove the one that was not trained, or leave the file out with"
                f" --ignore-extra {name}"
            )
    return found


def _plain(name: str) -> str:
    """The name of a parameter without what PEFT and other wrappers put into it."""
    return _WRAPPED.sub("", plain_key(name).removeprefix(PREFIX))


def _namings(
    plain: Mapping[str, StoredTensor], stem: str, source: Source, base: BaseParameters
) -> Iterator[Mapping[str, StoredTensor]]:
    """Tensors by what they may be called in the base: renamed as the adapter's are, as they are, with one prefix more
    or less, under the name of the file. Of prefixes there must be one that fits.
    """
    if source.renaming is not None:
        yield {source.renaming.to_base(name): tensor for name, tensor in plain.items()}
    yield plain
    yield {f"{stem}.{name}": tensor for name, tensor in plain.items()}
    fitting = [
        changed
        for changed in _with_other_prefixes(plain, base)
        if all(_fits(tensor, name, base) for name, tensor in changed.items())
    ]
    yield from fitting if len(fitting) == 1 else ()


def _with_other_prefixes(
    plain: Mapping[str, StoredTensor], base: BaseParameters
) -> Iterator[Mapping[str, StoredTensor]]:
    first = next(iter(plain), "")
    for other in base.names():
        if "." in first and other.endswith(f".{first}"):
            prefix = other.removesuffix(first)
            yield {prefix + name: tensor for name, tensor in plain.items()}
        elif first.endswith(f".{other}"):
            prefix = first.removesuffix(other)
            yield {name.removeprefix(prefix): tensor for name, tensor in plain.items()}


def _fits(tensor: StoredTensor, parameter: str, base: BaseParameters) -> bool:
    """Whether the base has such a parameter; of the vocabulary rows may be more or fewer."""
    found = base.find(parameter)
    if found is None or len(found.shape) != len(tensor.shape):
        return False
    return found.shape == tensor.shape or (
        parameter in find_vocabulary(base) and found.shape[1:] == tensor.shape[1:]
    )


def _key(parameter: str, known: Collection[str]) -> str:
    """The key of a parameter in an adapter whose module was trained whole: in the second of PEFT's two spellings where
    the adapter has the first itself, so that neither hides the other.
    """
    module, _, last = parameter.rpartition(".")
    key = f"{module}.modules_to_save.{last}"
    return key if key not in known else f"{module}.modules_to_save.default.{last}"


def _check_once(name: str, placed: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor]) -> None:
    """Raise AdapterError for a parameter that two files beside the adapter hold."""
    for key in placed.keys() & found.keys():
        raise AdapterError(
            f"{name} and {found[key].file.name} beside the adapter both hold {found[key].name.removeprefix(PREFIX)};"
            " leave one of them out with --ignore-extra"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
