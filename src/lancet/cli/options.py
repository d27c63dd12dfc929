"""The options that say which pair is opened, and how: to a command one parameter `choice`, to its user options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lancet.cli.opening import Choice

OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Option(
            help="smollm2, gpt2-small, owner/name on the hub, or a folder. Left out: the pair of `lancet use`."
        ),
    ],
    "sae": Annotated[
        list[str] | None,
        typer.Option(
            "--sae",
            help="RELEASE/ID (see `lancet saes`), a site, a folder, hf://USER/REPO/FOLDER; may be given several times.",
        ),
    ],
    "basis": Annotated[
        str | None, typer.Option(help="plain or centred: how the SAE's model was loaded, where nothing states it.")
    ],
    "anyway": Annotated[
        bool, typer.Option("--anyway", help="Open an SAE that was trained on another model, or fails its self-test.")
    ],
    "device": Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")],
    "dtype": Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")],
    "quantize": Annotated[
        str | None, typer.Option(help="8bit or 4bit weights: bitsandbytes on a card, torchao on a processor.")
    ],
    "device_map": Annotated[
        str | None,
        typer.Option(help="Spreads the model over devices: auto, balanced, ... (needs accelerate); without --device."),
    ],
    "sae_memory": Annotated[
        str,
        typer.Option(
            help="What SAEs may take on a card, such as 2GB; the rest stays on the CPU. auto: half of what is free."
        ),
    ],
}


def opens(command: Callable[..., None]) -> Callable[..., None]:
    """A command with OPTIONS in the place of its parameter `choice`, whose default gives theirs.

    A command whose default opens anything takes `--anyway` without a word about it.
    """
    return _with(command, OPTIONS)


def opens_many(command: Callable[..., None]) -> Callable[..., None]:
    """Like `opens` for a command whose arguments are SAEs: without `--sae`."""
    return _with(command, {name: option for name, option in OPTIONS.items() if name != "sae"})


def names_pair(command: Callable[..., None]) -> Callable[..., None]:
    """Like `opens` for a command that opens nothing: `--model` and `--sae` say whose files are meant."""
    return _with(command, {name: OPTIONS[name] for name in ("model", "sae")})


def _with(command: Callable[..., None], options: dict[str, Any]) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    default: Choice = signature.parameters["choice"].default
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name != "choice":
            parameters.append(parameter)
            continue
        for option, annotation in options.items():
            if option == "anyway" and default.anyway:
                annotation = Annotated[bool, typer.Option("--anyway", hidden=True)]
            value = None if option == "sae" else getattr(default, option)
            parameters.append(parameter.replace(name=option, annotation=annotation, default=value))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        own = {name: given.pop(name) for name in options if name in given}
        own["saes"] = tuple(own.pop("sae", None) or ())
        command(choice=Choice(**{"anyway": default.anyway, **own}), **given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return run
