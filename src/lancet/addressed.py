"""SAEs of the hub that no list has, by their address: `hf://USER/REPO/FOLDER`, a folder in sae-lens' layout.

`lancet publish` makes such repositories. What is here is opened without asking the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lancet import hub
from lancet.errors import DamagedError, MissingError, UnknownName, UsageError
from lancet.files import check_safetensors
from lancet.hub import Progress, Say

PREFIX = "hf://"
CONFIG, WEIGHTS, FACTS = "cfg.json", "sae_weights.safetensors", "facts.safetensors"
RECORD = "training.json"  # of an SAE that `lancet train` made


@dataclass(frozen=True)
class Address:
    """A folder of a repository.

    Attributes:
        repo: owner/name.
        folder: its path there, "" for the repository itself or where none is named.
    """

    repo: str
    folder: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Of `hf://USER/REPO` or `hf://USER/REPO/FOLDER`.

        Raises:
            UsageError: it is neither.
        """
        parts = text.removeprefix(PREFIX).strip("/").split("/")
        inside = parts[2:]
        if not is_address(text) or any(part in ("", ".", "..") or "\\" in part for part in inside):
            raise UsageError(f"{text!r} is no address of an SAE; write hf://USER/REPO/FOLDER")
        return cls(check_repo("/".join(parts[:2])), "/".join(inside))

    def __str__(self) -> str:
        return PREFIX + "/".join(filter(None, (self.repo, self.folder)))


def is_address(name: str) -> bool:
    """Whether a name is the address of something on the hub."""
    return name.startswith(PREFIX)


def check_repo(repo: str) -> str:
    """The name of a repository, owner/name, as it is.

    Raises:
        UsageError: the hub has no repositories of such names.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise HFValidationError("it has two parts, an owner and a name")
        validate_repo_id(repo)
    except HFValidationError as error:
        why = str(error).splitlines()[0].split(", got")[0]
        raise UsageError(f"{repo!r} is no repository's name ({why}); write it as USER/REPO") from error
    return repo


def fetch(name: str, say: Say = lambda line: None, progress: Progress | None = None) -> tuple[str, Path]:
    """An SAE's full address and its folder, in Hugging Face's cache; what is not there is fetched.

    Args:
        name: its address; without a folder where the repository has one SAE.
        progress: told of every piece that arrives.

    Raises:
        UnknownName: no such repository, or no such SAE in it; tells those that it has.
        UsageError: it is no address, or the repository has several SAEs and none is named.
        MissingError: no network, or a repository whose terms must be accepted first; says how.
        DamagedError: what came is not what the hub promised; it is removed.
    """
    asked = Address.parse(name)
    found = asked if asked.folder and _is_here(asked) else _fetch(asked, say, progress)
    snapshot = hub.snapshot(found.repo)
    assert snapshot is not None
    folder = snapshot / found.folder
    try:
        check_safetensors(folder / WEIGHTS)
    except DamagedError as error:
        hub.remove(folder / WEIGHTS)
        raise DamagedError(f"{found}: {error}; it was removed, and is fetched again next time") from error
    hub.note(found.repo)
    return str(found), folder


def _is_here(address: Address) -> bool:
    snapshot = hub.snapshot(address.repo)
    return snapshot is not None and (snapshot / address.folder / WEIGHTS).is_file()


def _fetch(asked: Address, say: Say, progress: Progress | None) -> Address:
    from huggingface_hub import HfApi

    try:
        with hub.explained(asked.repo):
            info = HfApi().model_info(asked.repo)
            files = {file.rfilename for file in info.siblings or ()}
            found = _chosen(asked, _saes(files))
            if not _is_here(found):
                say(f"fetching {found}")
            # The weights last: a folder that has them has the rest.
            for file in (CONFIG, FACTS, WEIGHTS):
                path = "/".join(filter(None, (found.folder, file)))
                if path in files:
                    hub.bring(found.repo, path, str(info.sha), progress)
            hub.refer(found.repo, str(info.sha))
            return found
    except MissingError:
        if (only := _only_one_here(asked)) is None:
            raise
        return only


def _only_one_here(asked: Address) -> Address | None:
    """The SAE that is meant where the hub cannot be asked how many it has: the only one that was ever fetched."""
    snapshot = hub.snapshot(asked.repo)
    if asked.folder or snapshot is None:
        return None
    here = _saes({file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")})
    return Address(asked.repo, here[0]) if len(here) == 1 else None


def _saes(files: set[str]) -> list[str]:
    """The folders that hold both files of sae-lens' layout; "" for the repository itself."""
    held = [file.rpartition("/")[0] for file in files if file.rpartition("/")[2] == CONFIG]
    return sorted(folder for folder in held if "/".join(filter(None, (folder, WEIGHTS))) in files)


def _chosen(asked: Address, there: list[str]) -> Address:
    named = {str(Address(asked.repo, folder)): folder for folder in there}
    if asked.folder in there:
        return asked
    if not named:
        raise UsageError(
            f"{asked.repo} holds no SAE in sae-lens' layout ({CONFIG} and {WEIGHTS} in one folder); `lancet saes` "
            f"lists the published ones that are read in other layouts"
        )
    if asked.folder:
        raise UnknownName("SAE on the hub", str(asked), named, f"{asked.repo} has {len(named)}")
    if len(named) > 1:
        raise UsageError(f"{asked.repo} holds {len(named)} SAEs; name one of {_listed(named)}")
    return Address(asked.repo, there[0])


def _listed(names: Iterable[str], most: int = 20) -> str:
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")
