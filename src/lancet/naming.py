"""The names that a user gives to features, blends and expressions, and the doses that were found for them.

Kept in the user's data folder, one file for each SAE (namefile.py), always whole and changed by one process at a time.
What a name stands for is kept in numbers alone (names that were used in it are replaced by what they stood for), so
that no later change of another name changes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import doses
from lancet.algebra import Direction, Expression, Ref, reads_files, substitute
from lancet.errors import DamagedError, MismatchError, UnknownName, UsageError
from lancet.files import changed_by_one, read_json, write_json
from lancet.namefile import NAME, Kept, Names, key, load, normal, parse, path, written
from lancet.units import short

if TYPE_CHECKING:
    from lancet.lab import Lab
    from lancet.sae import Sae


def check_name(name: str) -> str:
    """The name as it is kept.

    Raises:
        UsageError: edits could not hold it.
    """
    name = normal(name)
    if not NAME.fullmatch(name):
        better = re.sub(r"\W+", "_", name).strip("_")
        hint = f" (such as {better})" if NAME.fullmatch(better) else ""
        raise UsageError(f"{name!r} is not a name; use letters, digits and _, beginning with a letter{hint}")
    return name


def find(lab: Lab, ref: Ref) -> tuple[Sae, Kept]:
    """What a name stands for, and whose it is: the user's own first, then the concepts of the SAEs' cards.

    Raises:
        UnknownName: nothing has it; UsageError: its site is no open SAE's.
    """
    name = normal(ref.name)
    saes = lab.saes if ref.site is None else [lab.sae(ref.site)]
    own = [(sae, load(sae).entries) for sae in saes]
    for sae, entries in own:
        if name in entries:
            return sae, entries[name]
    known = lab.concepts(saes) if saes else {}
    if name not in known:
        told = [n for _, entries in own for n in entries]
        raise UnknownName("feature name", name, [*told, *known], "or give its number, such as #12")
    sae, entry = known[name]
    return sae, of_concept(entry)


def of_concept(entry: Mapping[str, Any]) -> Kept:
    """What the name of a concept of an SAE's card stands for."""
    blend = tuple((int(index), float(weight)) for index, weight in entry.get("blend") or ())
    return Kept(blend=blend) if blend else Kept(feature=entry["feature"])


def kept_of(lab: Lab, target: int | str | Direction | Sequence[tuple[int, float]]) -> tuple[Sae, Kept]:
    """What a name is to stand for, in numbers alone, and the SAE that it is kept with.

    Raises:
        UsageError, UnknownName: the target cannot be read, names something unknown or lies where no open SAE writes.
    """
    from lancet.grammar import parse_expression

    default = lab.sae()
    if isinstance(target, int):
        return default, Kept(feature=default.check_feature(target))
    if isinstance(target, Direction):
        return _owner(lab, target), _of_vector(target)
    if not isinstance(target, str):
        pairs = tuple((default.check_feature(index), float(weight)) for index, weight in target)
        if not pairs or not all(math.isfinite(weight) for _, weight in pairs):
            raise UsageError(f"a blend is one or more (feature, weight) pairs with finite weights, got {target!r}")
        return default, Kept(blend=pairs)
    expression = parse_expression(normal(target))
    direction = lab.direction(expression)  # tells everything that is wrong with it
    if isinstance(expression, Ref):
        if expression.name:
            owner, kept = find(lab, expression)
            return owner, replace(kept, dose="")
        owner = lab.sae(expression.site)
        return owner, Kept(feature=expression.index)
    owner = _owner(lab, direction)
    plain = _in_numbers(lab, expression, owner)
    if plain is None:
        return owner, _of_vector(direction)
    told = str(expression)
    return owner, Kept(expression=str(plain), said="" if told == str(plain) else told)


def _in_numbers(lab: Lab, expression: Expression, owner: Sae) -> Expression | None:
    """An expression of numbers alone, bare ones those of `owner`; None where it holds what is no feature's."""
    if reads_files(expression):
        return None
    vectors = []

    def by(ref: Ref) -> Expression:
        sae = lab.sae(ref.site)
        if ref.name:
            sae, kept = find(lab, ref)
            if kept.vector:
                vectors.append(ref)
                return ref
            if kept.feature is None:
                return substitute(
                    kept.expressed, lambda inner: placed(inner, lab.sae(inner.site) if inner.site else sae)
                )
            ref = Ref(index=kept.feature)
        return placed(ref, sae)

    def placed(ref: Ref, sae: Sae) -> Ref:
        return Ref(index=ref.index, site=None if sae is owner else sae.site)

    plain = substitute(expression, by)
    return None if vectors else plain


def _owner(lab: Lab, direction: Direction) -> Sae:
    for sae in lab.saes:
        if sae.writes == direction.site:
            return sae
    raise UsageError(f"no open SAE writes {direction.site}, and a name is kept with an SAE; open one of that site")


def _of_vector(direction: Direction) -> Kept:
    if not direction.norm:
        raise UsageError(f"{direction.recipe} is the zero vector and points nowhere; choose other parts")
    return Kept(vector=tuple(direction.vector.float().cpu().tolist()), said=direction.recipe)


# ---- changing them ---------------------------------------------------------------------------------------------------


def give(sae: Sae, name: str, kept: Kept, force: bool = False) -> None:
    """Keeps a name.

    Raises:
        UsageError: not a name, or one that stands for something else already.
    """
    name = check_name(name)
    with _changing(sae) as names:
        old = names.entries.get(name)
        if old is not None and old.same(kept):
            return
        if old is not None and not force:
            raise UsageError(
                f"{name} is taken: it stands for {old}; choose another name, or --force (force=True) to give it away"
            )
        _forget_doses(names, name)
        names.entries[name] = kept


def remove(sae: Sae, name: str) -> Kept:
    """Takes a name away and returns what it stood for.

    Raises:
        UnknownName: there is no such name.
    """
    with _changing(sae) as names:
        if normal(name) not in names.entries:
            raise UnknownName("name", name, names.entries, "`lancet name --list` shows yours")
        _forget_doses(names, normal(name))
        return names.entries.pop(normal(name))


def export(sae: Sae, file: Path) -> int:
    """Writes the names of an SAE to a JSON file and returns how many there are."""
    names = load(sae)
    write_json(file, written(names, sae))
    return len(names.entries)


def take_in(sae: Sae, file: Path, force: bool = False) -> list[str]:
    """Takes in the names and doses of a file, all or none of them, and returns the names.

    Args:
        force: where a name stands for something else already, the file's meaning replaces it.

    Raises:
        UsageError: no such file, or names that are taken.
        DamagedError: the file does not hold names.
        MismatchError: it holds another SAE's names.
    """
    if not file.is_file():
        raise UsageError(f"no file {file}; give one that `lancet name --export` wrote")
    told = read_json(file)
    if isinstance(told, dict) and isinstance(told.get("key"), str) and told["key"] != key(sae):
        raise MismatchError(
            f"{file} holds names of another SAE ({told.get('sae')} at {told.get('site')}), whose numbers mean other "
            f"features than those of {sae.name} at {sae.site}; open that one with --sae"
        )
    try:
        new = parse(told, sae)
    except ValueError as error:
        raise DamagedError(f"{file} does not hold names: {error}; nothing was taken in") from error
    with _changing(sae) as names:
        taken = [n for n, kept in new.entries.items() if n in names.entries and not names.entries[n].same(kept)]
        if taken and not force:
            told = "; ".join(f"{n} stands for {names.entries[n]}, there for {new.entries[n]}" for n in taken[:3])
            raise UsageError(
                f"{len(taken)} of the names in {file} are taken: {told}; remove them, or --force (force=True) to "
                f"take the file's"
            )
        for name in taken:
            _forget_doses(names, name)
        names.entries.update(new.entries)
        names.doses.update(new.doses)
    return list(new.entries)


# ---- doses -----------------------------------------------------------------------------------------------------------


def keep_dose(sae: Sae, target: int | str | Expression, amount: str) -> None:
    """Keeps the recommended amount (such as `0.4rn`, see doses.py) of a feature, name or expression; "" forgets it.

    Raises:
        UsageError: not an amount, or the target cannot be read.
    """
    amount = doses.written(doses.parse(amount))
    with _changing(sae) as names:
        where = _dose_key(names, target)
        if where in names.entries:
            names.entries[where] = replace(names.entries[where], dose=amount)
        elif amount:
            names.doses[where] = amount
        else:
            names.doses.pop(where, None)


def dose_of(sae: Sae, target: int | str | Expression, concepts: Mapping[str, Any] | None = None) -> str | None:
    """The recommended amount of a feature, name or expression, None where there is none.

    Args:
        concepts: `Facts.concepts`; the doses of the card's blends stand where the user found none.
    """
    names = load(sae)
    where = _dose_key(names, target)
    found = names.entries[where].dose if where in names.entries else names.doses.get(where, "")
    if not found and where not in names.entries and concepts and "dose_rn" in concepts.get(where, {}):
        found = f"{short(concepts[where]['dose_rn'])}rn"
    return found or None


def _dose_key(names: Names, target: int | str | Expression) -> str:
    from lancet.grammar import parse_expression

    if isinstance(target, int):
        return f"#{target}"
    expression = parse_expression(normal(target)) if isinstance(target, str) else target
    if isinstance(expression, Ref):
        kept = names.entries.get(expression.name)
        if kept is not None and kept.feature is not None:
            return f"#{kept.feature}"
        return expression.name or f"#{expression.index}"
    return str(names.expanded(expression))


def _forget_doses(names: Names, name: str) -> None:
    """Drops doses of expressions that hold a name whose meaning changes (only those of bare vectors still do)."""
    for text in [text for text in names.doses if text != name and name in NAME.findall(text)]:
        del names.doses[text]


@contextmanager
def _changing(sae: Sae) -> Iterator[Names]:
    """The names of an SAE, written back when the block ends without an error; one process at a time."""
    where = path(sae)
    with changed_by_one(where):
        before = load(sae)
        names = Names(dict(before.entries), dict(before.doses))
        yield names
        if names != before:
            write_json(where, written(names, sae))
