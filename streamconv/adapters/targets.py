"""Whether the file holds what its config promises: factors for every target that the trained model had.

Matching follows PEFT (`check_target_module_exists` in `peft/tuners/tuners_utils.py`): a list names modules by
the end of their path, a string is a regular expression for the whole path. PEFT goes on where an entry matches nothing,
so an entry that the base has no module for is no loss; and which modules the trained class had is seen in the file: a
vision tower beside it need not have been there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from streamconv.adapters.config import AdapterConfig, is_empty
from streamconv.adapters.conversions import fusions
from streamconv.adapters.ranks import expression_of
from streamconv.adapters.source import BaseParameters, Source
from streamconv.adapters.views import names_of_parameter, other_names
from streamconv.checkpoint.config import language_levels
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import AdapterError

ALL_LINEAR = "all-linear"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_LAYER = re.compile(r"(?:.+?\.)??(?:layers|h|blocks)\.(?P<number>\d+)\.")
# The layer's number where layers_pattern names none: the first number in a path.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_OF_EXPERT = re.compile(r".+\.\d+\..+\.\d+\.[^.]+|.+\.\d+\..+s\.\d+")


@dataclass(frozen=True, slots=True)
class Reached:
    """Paths of modules in the names of the base: `adapted` by updates, in the adapter's class and as stored, `modules`
    these and those saved whole; `parameters` are the stored ones that updates change.
    """

    adapted: frozenset[str]
    parameters: frozenset[str]
    modules: frozenset[str]


def check_targets(
    source: Source, base: BaseParameters, reached: Reached, allow_missing: bool
) -> tuple[str, ...]:
    """Sentences on targets that matched nothing in this base, and where `allow_missing`, on those without factors.

    Raises AdapterError for a target of the base that the file has no factors for, unless that is allowed.
    """
    targets = source.config.fields.get("target_modules")
    if isinstance(targets, str):
        _check_pattern(source, targets, reached)
    missing = sorted(_missing(source, base, reached))
    absent, unmatched = _entries(source, base, reached)
    notes = _unmatched_notes("target_modules", unmatched)
    parameters, unmatched = _parameters(source, base, reached)
    notes += _unmatched_notes("target_parameters", unmatched)
    for field, entry, module in (
        *(("target_modules", *each) for each in absent.items()),
        *(("target_parameters", *each) for each in parameters.items()),
    ):
        of = f"{field} lists {entry!r}, but the adapter holds no tensors of it"
        if not allow_missing:
            raise AdapterError(
                f"{source.config.name}: {of}, and the base has {module}; the file is not complete: get it whole, or"
                " take the entry out, or leave the base's weights there as they are with --allow-missing"
            )
        notes.append(f"{of}; the base's stay as they are")
    if not missing:
        return tuple(notes)
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    if not allow_missing:
        raise AdapterError(
            f"{source.location}: the adapter holds no tensors for {shown}, though {source.config.name} targets them and"
            " it does for others of their kind; the file is not complete: get it whole, or leave the base's weights"
            " there as they are with --allow-missing"
        )
    return (
        *notes,
        f"the adapter holds no tensors for {shown}, which it targets; the base's stay as they are",
    )


def _unmatched_notes(field: str, entries: Collection[str]) -> list[str]:
    verb = "matches" if len(entries) == 1 else "match"
    names = ", ".join(sorted(entries))
    return [f"{names} in {field} {verb} nothing in this base that the adapter was trained on"] * bool(entries)


# -- entries of a list ---------------------------------------------------------------------------------------------


def _entries(
    source: Source, base: BaseParameters, reached: Reached
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Entries that the base has a module for and the file has not, with the module; and those that match nothing.

    An entry that modules_to_save or exclude_modules takes is neither.
    """
    config = source.config
    if isinstance(config.fields.get("target_modules"), str):
        return {}, ()
    absent: dict[str, str] = {}
    unmatched: list[str] = []
    ends = {end for module in reached.modules for end in _ends(source.trained(module))}
    names = [name for name in config.names("target_modules") if name not in ends]
    if names:  # others that the same modules have in another class
        ends = {end for module in reached.modules for each in _trained(module, source) for end in _ends(each)}
        names = [name for name in names if name not in ends]
    modules = list(_modules(base, _least_axes(base, reached))) if names else []
    for name in names:
        meant = [module for module in modules if any(name in _ends(e) for e in _trained(module, source))]
        lost = [module for module in meant if _must_be_there(module, source, base, reached)]
        if lost:
            absent[name] = lost[0]
        elif not any(_is_excluded(config, source.trained(module)) for module in meant):
            unmatched.append(name)
    return absent, tuple(unmatched)


def _parameters(
    source: Source, base: BaseParameters, reached: Reached
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Entries of target_parameters in the same way."""
    absent: dict[str, str] = {}
    unmatched: list[str] = []
    names = list(source.config.names("target_parameters"))
    for name in names:
        if any(_means(name, each, source) for each in reached.parameters):
            continue
        lost = next((each for each in base.names() if _means(name, each, source)), None)
        if lost is None:
            unmatched.append(name)
        else:
            absent[name] = lost
    return absent, tuple(unmatched)


def _means(target: str, name: str, source: Source) -> bool:
    """Whether target_parameters' entry is the end of what the parameter `name` of the base may be in training."""
    return any(f".{each}".endswith(f".{target}") for each in names_of_parameter(source.trained(name)))


def _must_be_there(module: str, source: Source, base: BaseParameters, reached: Reached) -> bool:
    """Whether the trained class had the module, as far as can be told, and PEFT would have adapted it.

    Experts of the base may have been one parameter in training, and of a class with other names nothing is known but
    the stacks of layers that the adapter reaches.
    """
    trained = source.trained(module)
    if module in reached.modules or _OF_EXPERT.fullmatch(module) or not is_trained(module, base):
        return False
    if _is_excluded(source.config, trained) or not _is_in_layers(source.config, trained):
        return False
    if _is_joined_in_training(module, base):
        return False
    return source.renaming is None or _stack(module) in {_stack(each) for each in reached.modules}


def _is_joined_in_training(module: str, base: BaseParameters) -> bool:
    """Whether transformers joins the module's weight with others when it loads the base, so that PEFT sees no such
    module: gate_proj and up_proj of MiniMax-M3-VL."""
    lines = fusions(str(base.config.get("model_type")))
    joined = [line for line in lines if any(operation.name == "Concatenate" for operation in line.operations)]
    return any(re.search(source, f"{module}.weight") for line in joined for source in line.sources)


# -- modules of one kind -------------------------------------------------------------------------------------------


def _missing(source: Source, base: BaseParameters, reached: Reached) -> Iterator[str]:
    """Modules that are targets and have no factors, though others have that differ from them by numbers alone."""
    config = source.config
    if not is_empty(config.fields.get("layer_replication")):  # `check_every_layer` knows more
        return
    kinds = {_kind(module) for module in reached.adapted}
    parameters = {_kind(name) for name in reached.parameters if _is_by_parameter(name, source)}
    seen = set()
    for module in _candidates(base, reached, kinds):
        if module in reached.modules or module in seen or not is_trained(module, base):
            continue
        trained = _trained(module, source)
        means = _kind(f"{module}.weight") in parameters or any(_is_target(config, each) for each in trained)
        if means and not any(_is_excluded(config, each) for each in trained):
            seen.add(module)
            yield module
    for name in base.names():
        if _kind(name) in parameters and name not in reached.parameters and is_trained(name, base):
            module = name.removesuffix(".weight")
            if module not in seen:
                yield module


def _candidates(base: BaseParameters, reached: Reached, kinds: Collection[str]) -> Iterator[str]:
    """Modules of `kinds` that the base has; those of another class are looked for where the adapter reaches some."""
    virtual = {_kind(module) for module in reached.adapted if f"{module}.weight" not in base.parameters}
    touched = {_kind(name) for name in reached.parameters}
    for name in base.names():
        module = name.removesuffix(".weight")
        if module != name and _kind(module) in kinds:
            yield module
        if not virtual or _kind(name) not in touched:
            continue
        for other in other_names(base.parameters[name]) if name in base.parameters else ():
            module = other.removesuffix(".weight")
            if module in reached.modules or module == other or _kind(module) not in virtual:
                continue
            if base.find(other) is not None:
                yield module


def _is_by_parameter(name: str, source: Source) -> bool:
    """Whether a changed parameter of the base is one that target_parameters chose, in every layer alike."""
    names = source.config.names("target_parameters")
    if not names or any(part.isdigit() for target in names for part in target.split(".")):
        return False
    trained = source.trained(name)
    return not _is_target(source.config, trained.removesuffix(".weight"))


def _kind(path: str) -> str:
    """`path` with a mark in place of each number."""
    return _NUMBER.sub("#", path)


def _stack(module: str) -> str:
    """Path before the first number: `model.language_model.layers`."""
    found = _NUMBER.search(module)
    return module[: found.start()] if found else ""


def _modules(base: BaseParameters, axes: int) -> Iterator[str]:
    """Paths of layers that may be adapted: their weight has so many axes or more."""
    for name in base.names():
        parameter = base.find(name)
        if name.endswith(".weight") and parameter is not None and len(parameter.shape) >= axes:
            yield name.removesuffix(".weight")


def _least_axes(base: BaseParameters, reached: Reached) -> int:
    """Axes that weights have which the method adapts: two, but where it adapts norms."""
    found = [base.parameters[name] for name in reached.parameters if name in base.parameters]
    return min((len(each.shape) for each in found if each.name.endswith(".weight")), default=2)


def is_trained(path: str, base: BaseParameters) -> bool:
    """Whether classes of the model have it: no layer for predicting further tokens, which files have after the others,
    nor keys and values of layers that share those of earlier ones."""
    found = _LAYER.match(path)
    config = language_levels(base.config)[-1]
    count, shared = (config.get(field) for field in ("num_hidden_layers", "num_kv_shared_layers"))
    if found is None or type(count) is not int or "vision" in path or "visual" in path:
        return True
    number = int(found["number"])
    shares = type(shared) is int and shared > 0 and number >= count - shared
    return number < count and not (shares and path.removesuffix(".weight").endswith((".k_proj", ".v_proj")))


# -- PEFT's rules --------------------------------------------------------------------------------------------------


def _is_target(config: AdapterConfig, module: str) -> bool:
    """Whether target_modules means the module, by its path in training."""
    targets = config.fields.get("target_modules")
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or _matches(config, "target_modules", targets, module)
    names = config.names("target_modules")
    if module in names:
        return True
    return any(module.endswith(f".{name}") for name in names) and _is_in_layers(config, module)


def _is_in_layers(config: AdapterConfig, module: str) -> bool:
    """Whether the module is in a layer that layers_to_transform lists, or that is not set.

    Raises AdapterError where that field or layers_pattern has another form than PEFT gives it.
    """
    layers = config.fields.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    listed = [layers] if isinstance(layers, int) else layers
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise AdapterError(
            f"{config.name}: layers_to_transform must be the numbers of layers, found {shown(layers)}"
        )
    field = "layers_pattern"
    patterns = config.fields.get(field) or ()
    each = (patterns,) if isinstance(patterns, str) else config.names(field)
    numbers = [
        expression_of(config, field, one, rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\.").group("idx", module)
        for one in each
    ]
    first = _ANY_LAYER.match(module) if not each else None
    found = first["idx"] if first else next(filter(None, numbers), None)
    return found is not None and int(found) in listed


def _is_excluded(config: AdapterConfig, module: str) -> bool:
    """Whether exclude_modules or modules_to_save takes the module; `all-linear` lists such, too."""
    if any(
        module == name or module.endswith(f".{name}") or f".{name}." in f".{module}."
        for name in config.names("modules_to_save")
    ):
        return True
    if isinstance(config.fields.get("exclude_modules"), str):
        pattern = config.text("exclude_modules")
        return _matches(config, "exclude_modules", pattern, module)
    return not frozenset(config.names("exclude_modules")).isdisjoint(_ends(module))


def _trained(module: str, source: Source) -> tuple[str, ...]:
    """Paths that `module` of the base may have had in training."""
    return tuple(name.removesuffix(".weight") for name in source.trained_names(f"{module}.weight"))


def _ends(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]


def _matches(config: AdapterConfig, field: str, pattern: str, module: str) -> bool:
    return expression_of(config, field, pattern, pattern).fits_all_of(module)


def _check_pattern(source: Source, pattern: str, reached: Reached) -> None:
    """Raise AdapterError where a regular expression matches none of the adapted modules."""
    config = source.config
    adapted = (name for module in reached.adapted for name in _trained(module, source))
    if pattern.lower() == ALL_LINEAR:
        found = bool(reached.adapted)
    else:
        found = any(_matches(config, "target_modules", pattern, module) for module in adapted)
    if not found:
        raise AdapterError(
            f"{config.name}: target_modules is {shown(pattern)}, but no module in the adapter matches it; the file"
            " is not complete"
        )
