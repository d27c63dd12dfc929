"""Model names: the tutorial's and TransformerLens' own, and what they are called on the hub.

The table is read out of the installed transformer-lens' source without running it (importing it imports torch), once
for each version of the package, and kept in the cache.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lancet.errors import MissingError, UnknownName
from lancet.files import cache_dir, kept_json

LAYOUT = 1  # of the kept table; raise it when what is written changes

# Ids from before models had owners. The hub forwards the old ones; a cache filled by older programs still has them.
MOVED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
EMBEDDED = {  # Lancet's own short names, and the models that they are 4-bit copies of
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma3-270m": "google/gemma-3-270m",
}


def package_folder(package: str) -> Path:
    """Where an installed package lies, found without importing it.

    Raises:
        MissingError: it is not installed.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise MissingError(f"{name} is not installed, and its list is needed: pip install {name}")
    return Path(next(iter(found.submodule_search_locations)))


def kept(kind: str, package: str, layout: int) -> Path:
    """Where what was read out of a package's own list is kept: one file for each version of that package."""
    return cache_dir() / "catalogue" / f"{kind}-{layout}-{metadata.version(package.replace('_', '-'))}.json"


@cache
def table() -> dict[str, str]:
    """Lower-case name -> hub id, of every model that TransformerLens lists."""
    return kept_json(kept("models", "transformer_lens", LAYOUT), _read_table)


def _read_table() -> dict[str, str]:
    values = _literals(package_folder("transformer_lens") / "supported_models.py")
    found: dict[str, str] = {}
    listed: list[str] = values["OFFICIAL_MODEL_NAMES"]
    for official in listed:
        hub = MOVED.get(official, official)
        if "/" in hub:  # a few old names (llama-7b-hf) are folders that the user had to make, on no hub
            found |= {name.lower(): hub for name in (official, hub, *values["MODEL_ALIASES"].get(official, ()))}
    return found


def _literals(source: Path) -> dict[str, Any]:
    """The two tables of a Python file, which are plain literals."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise MissingError(
            f"cannot read transformer-lens' list of models ({error}); pip install -U transformer-lens"
        ) from error
    out = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        name, value = getattr(targets[0], "id", ""), getattr(node, "value", None)
        if name in ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES") and isinstance(value, ast.expr):
            out[name] = ast.literal_eval(value)
    if len(out) < 2:
        raise MissingError(f"{source} has no list of models where one was expected; pip install -U lancet-sae")
    return out


def hub_id(name: str) -> str | None:
    """The hub id of a model name: a known one, or `owner/name` as it is; None where neither."""
    if found := EMBEDDED.get(name.lower()) or table().get(name.lower()):
        return found
    parts = name.split("/")
    return name if len(parts) == 2 and all(parts) and name[0] not in "./~" and "\\" not in name else None


def check(name: str, more: tuple[str, ...] = ()) -> str:
    """The hub id of a model name.

    Args:
        more: other names that would have been accepted.

    Raises:
        UnknownName: neither a known name nor of the form owner/name.
    """
    found = hub_id(name)
    if found is None:
        raise UnknownName(
            "model",
            name,
            [*table(), *more],
            "`lancet saes` lists the models that have published SAEs; any model of the hub opens as owner/name, a "
            "folder by its path",
        )
    return found


def old_ids(hub: str) -> list[str]:
    """Under which other ids a cache may hold the same model."""
    return [old for old, new in MOVED.items() if new == hub]


def same(one: str, other: str) -> bool:
    """Whether two names are one model's."""
    return (hub_id(one) or one).lower() == (hub_id(other) or other).lower()
