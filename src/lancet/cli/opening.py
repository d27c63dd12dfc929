"""What `--model`, `--sae` and their kin say, and opening it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.lab import Lab
    from lancet.model import Model
    from lancet.sae import Sae


@dataclass(frozen=True)
class Choice:
    """The options that say which pair is opened, and how.

    Attributes:
        model: None for the pair of `lancet use`.
        saes: none for the model's default.
    """

    model: str | None = None
    saes: tuple[str, ...] = ()
    basis: str | None = None
    anyway: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    device_map: str | None = None
    sae_memory: str = "auto"

    def named(self) -> Choice:
        """The same with the default pair filled in where no model is named."""
        from dataclasses import replace

        from lancet import settings

        if self.model is not None:
            return self
        pair = settings.default()
        return replace(self, model=pair.model, saes=self.saes or pair.saes)

    def open(self) -> Lab:
        """Opens the pair, telling on standard error what takes long."""
        from lancet.lab import open_lab

        return self._opened(open_lab)

    def open_each(self) -> tuple[Model, list[Sae]]:
        """The same without a lab around them: several SAEs may be of one site."""
        from lancet.lab import open_parts

        model, pairs = self._opened(open_parts)
        return model, [sae for sae, _ in pairs]

    def _opened(self, by: Callable[..., Any]) -> Any:
        full = self.named()
        assert full.model is not None
        with show.working(f"opening {full.model}"):
            return by(
                full.model,
                full.saes or None,
                full.device,
                full.dtype,
                show.say,
                full.basis,
                full.anyway,
                full.sae_memory,
                full.quantize,
                full.device_map,
            )
