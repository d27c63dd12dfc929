"""Where an SAE's atlas lies unless another place is named."""

from __future__ import annotations

import re
from pathlib import Path

from lancet.files import data_dir


def slug(name: str) -> str:
    """A name as the name of a folder: `RELEASE/ID` and paths become one word."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "sae"


def default(sae_name: str) -> Path:
    """The folder of an SAE's atlas, by the SAE's name."""
    return data_dir() / "atlas" / slug(sae_name)
