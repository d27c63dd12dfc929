"""What `auto` stands for: the recommended amounts of a target, one for each operation that a dose was found for.

0.45rn              add 0.45rn
0.45rn; = 3x        add 0.45rn, or set to 3x
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lancet.errors import UsageError
from lancet.units import Amount

if TYPE_CHECKING:
    from lancet.algebra import Expression
    from lancet.edit import Edit
    from lancet.lab import Lab
    from lancet.sae import Sae

Doses = Mapping[str, Amount]  # sign of the operation, "+=" or "=" -> amount
DOSED = ("+=", "=")


def parse(text: str) -> dict[str, Amount]:
    """Doses out of their text.

    Raises:
        UsageError: not doses.
    """
    out: dict[str, Amount] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        sign = next((sign for sign in DOSED if part.startswith(sign)), "")
        amount = Amount.parse(part.removeprefix(sign))
        if amount.unit == "auto":
            raise UsageError("a dose is an amount such as 0.45rn, got auto")
        out[sign or "+="] = amount
    return out


def written(doses: Doses) -> str:
    """Doses as text."""
    return "; ".join(f"{'' if sign == '+=' else f'{sign} '}{doses[sign]}" for sign in DOSED if sign in doses)


def owner(lab: Lab, target: Expression) -> Sae:
    """The SAE that a target's doses are kept with.

    Raises:
        UsageError, UnknownName: there is no such target, or it lies where no open SAE writes.
    """
    from lancet import naming
    from lancet.algebra import Ref

    if isinstance(target, Ref):
        return naming.find(lab, target)[0] if target.name else lab.sae(target.site)
    return lab.sae(lab.direction(target).site)


def recommended(lab: Lab, edit: Edit) -> Amount:
    """The amount that `auto` stands for in an edit.

    Raises:
        UsageError: no dose was found for its target and operation.
    """
    from lancet import naming
    from lancet.algebra import Direction
    from lancet.edit import SIGNS

    sign = next(sign for sign, operation in SIGNS.items() if operation == edit.operation)
    if isinstance(edit.target, Direction):
        raise UsageError(f"auto needs a target that a dose is kept with; name {edit.target.recipe} (lab.name) first")
    sae = owner(lab, edit.target)
    known = parse(naming.dose_of(sae, edit.target, lab.facts(sae).concepts) or "")
    if sign in known:
        return known[sign]
    told = " or ".join(f"{edit.target} {other} auto" for other in known)
    do = f"write {told}, for which there is one" if told else f"find it with `lancet dose '{edit.target}'`"
    raise UsageError(f"no dose of {edit.target} is known for {sign}; {do}, or give an amount such as 0.4rn")
