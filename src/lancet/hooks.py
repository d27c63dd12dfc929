"""Functions on the values that pass into and out of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Place(NamedTuple):
    """A module and the side of it on which a value lies."""

    module: torch.nn.Module
    side: Literal["input", "output"]


def hook(place: Place, function: Callable[[Tensor], Tensor | None]) -> Any:
    """Runs `function` on the value at a place in every pass; what it returns, if anything, takes the value's place.

    Returns:
        a handle with `remove()`.
    """
    from interp_engine.hooks import hidden_arg_index

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            new = function(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})
        index = hidden_arg_index(args)
        assert index is not None  # no block, norm or projection is called without the stream
        new = function(args[index])
        return None if new is None else ((*args[:index], new, *args[index + 1 :]), kwargs)

    def after(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            new = function(output[0])
            return None if new is None else (new, *output[1:])
        return function(output)

    if place.side == "input":
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(after)
