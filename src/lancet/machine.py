"""How much memory is free for an SAE: the card's where there is one, else the machine's. Without importing torch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Room:
    """Free and total bytes of one memory, and whose it is."""

    where: str
    free: int
    total: int

    def needs(self, size: int) -> str:
        """How much of it so many bytes take, and whether they fit, in few words."""
        told = f"needs {size / 1e9:.1f}"
        return told if size <= self.free else f"{told}, {self.free / 1e9:.1f} free: read from disk"

    def fits(self, size: int) -> str:
        """The same as a sentence that stands alone: "needs 3.1 GB of the card's 10.0"."""
        told = f"needs {size / 1e9:.1f} GB of the {self.where}'s {self.total / 1e9:.1f}"
        return (
            told if size <= self.free else f"{told}, of which {self.free / 1e9:.1f} are free: read from disk as needed"
        )


@cache
def room() -> Room:
    """The card's memory, as the driver's own tool tells it, or the machine's."""
    if tool := shutil.which("nvidia-smi"):
        asked = [tool, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
            free, total = (int(part) << 20 for part in said.split(","))
            return Room("card", free, total)
        except (OSError, subprocess.SubprocessError, IndexError, ValueError):
            pass
    import psutil

    memory = psutil.virtual_memory()
    return Room("machine", memory.available, memory.total)
