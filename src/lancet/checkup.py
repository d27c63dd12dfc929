"""What a self-test found, in words and figures, and the refusal that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lancet.errors import MismatchError


@dataclass(frozen=True)
class Finding:
    """One thing that was tested.

    Attributes:
        what: its name.
        got, wanted: in words and figures.
        fine: whether it is as it must be.
        why: the likely reason where it is not.
    """

    what: str
    got: str
    wanted: str
    fine: bool = True
    why: str = ""


@dataclass(frozen=True)
class Checkup:
    """The self-test's result.

    Attributes:
        pair: SAE, site and model, in words.
        figures: the numbers behind the findings; NaN where there was none to be had.
        findings: one for each thing tested, the most telling first.
    """

    pair: str
    figures: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def poor(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.fine]

    def refuse(self) -> None:
        """Raises MismatchError with the likeliest reason where something is wrong."""
        if self.poor:
            reason = next((f": {finding.why}" for finding in self.poor if finding.why), "")
            told = "; ".join(f"{f.what}: {f.got}, wanted {f.wanted}" for f in self.poor)
            raise MismatchError(
                f"{self.pair} fails its self-test{reason} ({told}). `lancet check` tells more; --anyway "
                f"(anyway=True) opens it all the same"
            )

    def to_json(self) -> dict[str, Any]:
        """{"pair", "fine", "figures", "findings": [{"what", "got", "wanted", "fine", "why"}]}; NaN becomes null."""
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        findings = [vars(finding) for finding in self.findings]
        return {"pair": self.pair, "fine": not self.poor, "figures": figures, "findings": findings}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Checkup:
        """Reads what `to_json` gave."""
        figures = {name: float("nan") if value is None else value for name, value in told["figures"].items()}
        return cls(told["pair"], figures, tuple(Finding(**finding) for finding in told["findings"]))

    def __str__(self) -> str:
        lines = [self.pair]
        for f in self.findings:
            lines.append(f"  {'fine' if f.fine else 'POOR'}  {f.what}: {f.got} (wanted {f.wanted}) {f.why}".rstrip())
        return "\n".join(lines)
