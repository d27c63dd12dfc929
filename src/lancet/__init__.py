"""Lancet: a home lab for dissecting language models with sparse autoencoders.

    import lancet

    lab = lancet.open("smollm2")
    print(lab.read("The Golden Gate Bridge is located in San Francisco."))

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lancet.algebra import Direction as Direction
    from lancet.continuation import Continuation as Continuation
    from lancet.edit import Edit as Edit
    from lancet.effect import Effect as Effect
    from lancet.errors import LancetError as LancetError
    from lancet.evaluation.evaluate import evaluate as evaluate
    from lancet.features import Features as Features
    from lancet.generate import Sampling as Sampling
    from lancet.lab import Feature as Feature
    from lancet.lab import Lab as Lab
    from lancet.lab import open_lab as open  # noqa: F401
    from lancet.model import Model as Model
    from lancet.reading import Reading as Reading
    from lancet.sae import Sae as Sae
    from lancet.site import Site as Site
    from lancet.training.config import TrainConfig as TrainConfig
    from lancet.training.train import train as train

_HOMES = {
    "Continuation": "continuation",
    "Direction": "algebra",
    "Edit": "edit",
    "Effect": "effect",
    "Feature": "lab",
    "Features": "features",
    "Lab": "lab",
    "LancetError": "errors",
    "Model": "model",
    "Reading": "reading",
    "Sae": "sae",
    "Sampling": "generate",
    "Site": "site",
    "TrainConfig": "training.config",
    "evaluate": "evaluation.evaluate",
    "open": "lab",
    "train": "training.train",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lancet' has no attribute {name!r}")
    module = import_module(f"lancet.{_HOMES[name]}")
    return getattr(module, "open_lab" if name == "open" else name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
