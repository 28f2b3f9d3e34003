"""Renamings that match an adapter's names with the base's where the two were saved from different classes or versions.

A renaming is taken only if it gives every key of the adapter a place in the base, no two the same, and if it is the
only one that does: first by names that mean the same in transformers' conversion tables (`canonical.py`), then with
one prefix for another, as a class inside the base's or one around it has it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from streamconv.adapters.canonical import Lines, Names, canonical, read_names, rule_sets
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.heads import trained_task
from streamconv.adapters.method import Method
from streamconv.adapters.source import (
    SHARED_PREFIX,
    BaseParameters,
    MoeLayout,
    Renaming,
    Source,
    apart,
    by_key,
)
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

Places = Mapping[str, str]
"""Paths of the base's modules and parameters, by the name that an adapter may have for them."""

# Parts of a model that text adapters are not for, where the text model fits as well.
_SIDE = re.compile(r"vision|visual|image|video|audio|speech|talker|mtp|draft|teacher|code2wav")
# Names that PEFT's wrappers put around a weight of the base.
_AROUND = re.compile(r"(\.token_adapter)?\.base_layer(?=\.)|\.original_module(?=\.)")
# The head that reinforcement learning trains beside the language model (`AutoModelForCausalLMWithValueHead`).
_VALUE_HEAD = re.compile(r"(.+\.)?v_head\.summary\.(weight|bias)")
# Heads that PEFT saves for every task of labels, whatever modules_to_save was set to.
_CLASSIFIERS = frozenset({"score", "classifier", "qa_outputs"})


def read_source(
    location: str,
    config: AdapterConfig,
    tensors: Iterable[StoredTensor],
    base: BaseParameters,
    moe: MoeLayout,
    method: Method,
) -> Source:
    """The adapter's tensors in the names of the base. Raises AdapterError for keys that PEFT does not give."""
    trained, values = _without_value_head(tensors, base)
    own_tensors, common = apart(trained, method.shared)
    shared = by_key(location, common, method.shared, SHARED_PREFIX)
    keys = _without_modules(by_key(location, own_tensors, method.keys, indices=method.indices), base)
    ends = _ends(method)
    paths = {key: ends.sub("", key) for key in keys}
    own = _own_heads(config, keys)
    split = _Paths.of(paths, own)
    found = _placing_most(_find(base, split), split, base)

    def source(renaming: Renaming) -> Source:
        moved = {renaming.to_base(path) + key.removeprefix(path): keys[key] for key, path in paths.items()}
        ordered = MappingProxyType(dict(sorted(moved.items())))
        return Source(location, config, ordered, renaming, moe, _dumped(ordered, base), shared, values)

    if not found:  # as they are; what does not fit is refused with the names
        return Source(location, config, keys, None, moe, _dumped(keys, base), shared, values)
    if len(found) > 1:
        found = [each for each in found if _is_read(source(each), base, method)] or found
        found = _keeping_most(found)
    if len(found) > 1:
        raise AdapterError(_ambiguous(location, found))
    return source(found[0])


def _without_value_head(
    tensors: Iterable[StoredTensor], base: BaseParameters
) -> tuple[list[StoredTensor], tuple[str, ...]]:
    """Tensors without those of TRL's value head around the model, where the base has none; and the names of these."""
    found = list(tensors)
    names = {tensor.name for tensor in found if _VALUE_HEAD.fullmatch(tensor.name)}
    if not names or any(_VALUE_HEAD.fullmatch(name) for name in base.names()):
        return found, ()
    return [tensor for tensor in found if tensor.name not in names], tuple(sorted(names))


def _is_read(source: Source, base: BaseParameters, method: Method) -> bool:
    """Whether the method's tensors fit the weights that they come to be for, in shapes, too."""
    try:
        method.read(source, base)
    except AdapterError:
        return False
    except UnsupportedError:
        return True  # for another reason than names, which is given when the adapter is read
    return True


def _placing_most(found: Sequence[Renaming], paths: _Paths, base: BaseParameters) -> Sequence[Renaming]:
    """Renamings that give the most modules saved whole a place in the base, and then change the most of the new."""
    if len(found) < 2 or not paths.heads:
        return found
    counts = []
    for each in found:
        placed = sum(base.has_place(each.to_base(path)) for path in paths.heads)
        counts.append((placed, sum(each.to_base(path) != path for path in paths.heads)))
    return [each for each, count in zip(found, counts, strict=True) if count == max(counts)]


def _keeping_most(found: Sequence[Renaming]) -> list[Renaming]:
    """Renamings that take the least away from the adapter's names: what is an encoder there is none's decoder."""
    replaced = [max(path.count(".") for path, _ in each.heads) if each.heads else 0 for each in found]
    return [each for each, count in zip(found, replaced, strict=True) if count == min(replaced)]


def _without_modules(keys: Mapping[str, StoredTensor], base: BaseParameters) -> Mapping[str, StoredTensor]:
    """Keys without `module`, which wrappers put anywhere, where the base has none and no two become the same."""
    if not any("module" in key.split(".") for key in keys):
        return keys
    plain = {".".join(part for part in key.split(".") if part != "module"): keys[key] for key in keys}
    is_clear = len(plain) == len(keys) and not any("module" in name.split(".") for name in base.names())
    return MappingProxyType(dict(sorted(plain.items()))) if is_clear else keys


def _dumped(keys: Iterable[str], base: BaseParameters) -> frozenset[str]:
    """Parameters of the base if all of them are among `keys`, as in a dump of the whole model."""
    plain = {_AROUND.sub("", key) for key in keys}
    names = frozenset(base.parameters)
    return names if plain >= names else frozenset()


def read_translated(
    location: str,
    config: AdapterConfig,
    keyed: Mapping[str, StoredTensor],
    base: BaseParameters,
    moe: MoeLayout,
    method: Method,
) -> Source:
    """`read_source` of tensors whose keys are not their names in the file, which messages go on to use."""
    named = (replace(tensor, name=key) for key, tensor in keyed.items())
    source = read_source(location, config, named, base, moe, method)
    tensors = {key: keyed[tensor.name] for key, tensor in source.tensors.items()}
    return replace(source, tensors=MappingProxyType(tensors))


def _ends(method: Method) -> re.Pattern[str]:
    """Pattern of all that may follow the path of a module or parameter of the base in a key."""
    return re.compile(
        rf"(\.base_layer)*\.({method.keys}(\..+)?|token_adapter\..+|base_layer\.(weight|bias)|modules_to_save\..+"
        r"|original_module\..+)$"
    )


def _own_heads(config: AdapterConfig, keys: Iterable[str]) -> frozenset[str]:
    """Keys of modules saved whole for a task of labels: a base saved for another task may have no place for them."""
    if trained_task(config) is None:
        return frozenset()
    names = _CLASSIFIERS | frozenset(config.names("modules_to_save"))
    return frozenset(key for key in keys if not names.isdisjoint(key.split(".")))


# -- renamings that fit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Paths:
    """Paths of the adapter: those that need a place in the base, and those that a new head may have without one."""

    needed: Collection[str]
    heads: Collection[str]

    @classmethod
    def of(cls, paths: Mapping[str, str], own: Collection[str]) -> _Paths:
        """Split `paths` by key; keys in `own` may be of a new head."""
        needed = dict.fromkeys(path for key, path in paths.items() if key not in own)
        return cls(needed, [path for path in dict.fromkeys(paths.values()) if path not in needed])


@dataclass(frozen=True, slots=True)
class _Form:
    """Places of the base by name, and the name under which each path of the adapter is looked up there."""

    places: Places
    names: Mapping[str, str]
    heads: Mapping[str, str]


def _find(base: BaseParameters, paths: _Paths) -> list[Renaming]:
    """Renamings that give all of `paths` a place that need one, of the likeliest kind that there are.

    There are none if all have one as they are.
    """
    stored = read_names(base.names())
    as_it_is = _places(stored.names, stored.names)
    if all(path in as_it_is or base.has_place(path) for path in paths.needed):
        return []
    seen: list[Sequence[_Form]] = [[_Form(as_it_is, _alike(paths.needed), _alike(paths.heads))]]
    for lines in rule_sets(base.config):
        seen.append(list(_forms(stored, as_it_is, paths, lines)))
        if found := _distinct(_renaming(form, ("", ""), base) for form in seen[-1]):
            return found
    for forms in seen:
        candidates = [(pair, _renaming(form, pair, base)) for form in forms for pair in _pairs(form)]
        likely = _distinct(found for (_, within), found in candidates if not _SIDE.search(within))
        if found := likely or _distinct(found for _, found in candidates):
            return found
    return []


def _forms(stored: Names, as_it_is: Places, paths: _Paths, lines: Lines) -> Iterator[_Form]:
    """Names of the base made canonical, of the adapter, and of both: either may have them already."""
    places = _places(canonical(stored, lines), stored.names)
    alike, heads = _alike(paths.needed), _alike(paths.heads)
    names, heads_names = _canonical_paths(paths.needed, lines), _canonical_paths(paths.heads, lines)
    yield _Form(places, alike, heads)
    if names != alike:
        yield _Form(places, names, heads_names)
        yield _Form(as_it_is, names, heads_names)
        # Lines of one part change names of another that are canonical already.
        mixed = {path: path if path in places else name for path, name in names.items()}
        yield _Form(places, mixed, heads_names)


def _alike(paths: Iterable[str]) -> Mapping[str, str]:
    return {path: path for path in paths}


def _canonical_paths(paths: Collection[str], lines: Lines) -> Mapping[str, str]:
    """The canonical name of each path: that of a weight there, as some lines end in a parameter's name."""
    weights = canonical(read_names(f"{path}.weight" for path in paths), lines)
    return {path: name.removesuffix(".weight") for path, name in zip(paths, weights, strict=True)}


def _places(names: Sequence[str], stored: Sequence[str]) -> Places:
    """Paths of all parameters of the base and of all modules that hold some, by `names` for those that are stored.

    A name that would stand for two places is left out.
    """
    found: dict[str, str] = {}
    unclear = set()
    for name, place in zip(names, stored, strict=True):
        while name and place and found.get(name) != place:
            if found.setdefault(name, place) != place:
                unclear.add(name)
            name, _, last = name.rpartition(".")  # noqa: PLW2901
            place, _, same = place.rpartition(".")  # noqa: PLW2901
            if last != same:
                break
    return {name: place for name, place in found.items() if name not in unclear}


def _place(name: str, places: Places, base: BaseParameters) -> str | None:
    """The path of `name` in the base: a place, or what another class has in one; None if there is neither."""
    above, below = name, ""
    while above and above not in places:
        above, _, last = above.rpartition(".")
        below = f".{last}{below}"
    if not above:
        return None
    path = places[above] + below
    return path if not below or base.has_place(path) else None


def _pairs(form: _Form) -> Iterator[tuple[str, str]]:
    """Prefixes of the adapter's names, each with one that the base has in its stead, as far as one name tells.

    Whatever comes before the number of a layer may differ, but for the last module before it.
    """
    name = max(form.names.values(), key=lambda name: (_layer(name) is not None, name))
    number = _layer(name)
    while not (found := list(_pairs_of(name, form))) and number is not None and name.count(".") > number + 1:
        name = name.rpartition(".")[0]  # of another class: what holds it is in the base
    yield from found


def _pairs_of(name: str, form: _Form) -> Iterator[tuple[str, str]]:
    modules = name.split(".")
    number = _layer(name)
    for skipped in range(len(modules) if number is None else number):
        rest = ".".join(modules[skipped:])
        prefix = name.removesuffix(rest)
        for place in form.places:
            if place.endswith(rest) and place[: -len(rest)][-1:] in ("", "."):
                within = place.removesuffix(rest)
                if within != prefix and _layer(within) is None:
                    yield prefix, within


def _layer(name: str) -> int | None:
    """Position of the first number among the modules of a path."""
    return next((place for place, module in enumerate(name.split(".")) if module.isdecimal()), None)


def _renaming(form: _Form, pair: tuple[str, str], base: BaseParameters) -> Renaming | None:
    """The renaming by a form and a pair of prefixes; None if it leaves a path without a place, or two with one."""
    prefix, within = pair
    bases = {}
    for path, name in form.names.items():
        moved = within + name.removeprefix(prefix) if name.startswith(prefix) else name
        place = _place(moved, form.places, base)
        if place is None and not prefix and "." not in name:
            place = form.places.get(name)  # a head stands beside what has the prefix
        if place is None:
            return None
        bases[path] = place
    bases |= dict(_head_places(form, pair, base))
    if len(set(bases.values())) < len(bases) or _parts_a_stack(bases):
        return None
    trained = {place: path for path, place in bases.items()}
    if all(path == name for path, name in form.names.items()):  # other modules had names of the same kind
        others = {
            place: prefix + name.removeprefix(within) if name.startswith(within) else name
            for name, place in form.places.items()
        }
        trained = others | trained
    heads = _heads(bases)
    usual = tuple(sorted(((base, path) for path, base in heads), key=lambda pair: -len(pair[0])))
    return Renaming(_reason(heads), MappingProxyType(bases), MappingProxyType(trained), usual)


def _parts_a_stack(bases: Mapping[str, str]) -> bool:
    """Whether layers of one stack of the base, by its path before their number, have several names in the adapter: no
    class calls them so, but a key that was changed does.
    """
    pairs = set()
    for path, place in bases.items():
        own, number = _layer(path), _layer(place)
        if own is not None and number is not None:
            pairs.add((tuple(place.split(".")[:number]), tuple(path.split(".")[:own])))
    return len({stack for stack, _ in pairs}) < len(pairs)


def _head_places(form: _Form, pair: tuple[str, str], base: BaseParameters) -> Iterator[tuple[str, str]]:
    """Paths of modules that the base may lack, with their places: what is new there stands where it stood."""
    prefix, within = pair
    for path, name in form.heads.items():
        is_within = bool(prefix) and name.startswith(prefix)
        moved = within + name.removeprefix(prefix) if is_within or not prefix else name
        place = _place(moved, form.places, base) or _place(name, form.places, base)
        yield path, place or (moved if is_within else path)


def _distinct(renamings: Iterable[Renaming | None]) -> list[Renaming]:
    """Renamings that are some, without those that do the same as an earlier one."""
    found: dict[tuple[tuple[str, str], ...], Renaming] = {}
    for renaming in renamings:
        if renaming is not None:
            found.setdefault(tuple(renaming.bases.items()), renaming)
    return list(found.values())


# -- words ------------------------------------------------------------------------------------------------


def _heads(bases: Mapping[str, str]) -> list[tuple[str, str]]:
    """Beginnings that differ, of paths in training and in the base, the most frequent first."""
    count: dict[tuple[str, str], int] = {}
    for path, place in bases.items():
        pair = _beginnings(path, place)
        if pair[0] != pair[1]:
            count[pair] = count.get(pair, 0) + 1
    return sorted(count, key=lambda pair: -count[pair])


def _beginnings(path: str, place: str) -> tuple[str, str]:
    """Both without the modules at their ends that are the same, and with a dot where there are some."""
    trained, base = path.split("."), place.split(".")
    while trained and base and trained[-1] == base[-1]:
        trained.pop()
        base.pop()
    return "".join(f"{module}." for module in trained), "".join(f"{module}." for module in base)


def _reason(heads: Sequence[tuple[str, str]]) -> str:
    """A sentence on how names differ; layers are shown as N."""
    shown = dict.fromkeys((_numberless(path), _numberless(place)) for path, place in heads)
    parts = []
    for path, place in list(shown)[:3]:
        if not place:
            parts.append(f"the adapter's have {path!r} before")
        elif not path:
            parts.append(f"the base's have {place!r} before")
        else:
            parts.append(f"{path!r} of the adapter is {place!r} of the base")
    return ", ".join(parts) + (", ..." if len(shown) > 3 else "")


def _numberless(name: str) -> str:
    return ".".join("N" if module.isdecimal() else module for module in name.split("."))


def _ambiguous(location: str, found: Sequence[Renaming]) -> str:
    path = next(path for path in found[0].bases if len({each.to_base(path) for each in found}) > 1)
    places = " or ".join(sorted({each.to_base(path) for each in found}))
    return (
        f"{location}: the adapter is for {path}, which could be {places} of the base, and names and shapes do not tell"
        " which was trained; put the names of the base into the adapter's tensors"
    )
