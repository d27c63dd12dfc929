"""Files of the model hub, in Hugging Face's own cache and found there first, so that nothing is asked of the network
that is here already.

Addresses, tokens, proxies and offline mode are huggingface_hub's (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE).
The download itself is done here, for two reasons: huggingface_hub 2.4 starts a file again from nothing when the
process has ended in between, and it never compares what came with the hash that the hub names.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from lancet import names
from lancet.errors import DamagedError, LancetError, MissingError, UnknownName
from lancet.files import cache_dir, check_safetensors, read_json, write_json

Say = Callable[[str], None]
Progress = Callable[[str, int, int | None], None]  # (file, bytes so far, bytes in all)

TRIES = 5  # in a row without a single new byte
PIECE = 1 << 20
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


# ---- models ------------------------------------------------------------------------------------------------------


def local_model(repo: str) -> Path | None:
    """The folder of a model that is here as a whole, None where a part is missing."""
    for name in (repo, *names.old_ids(repo)):
        folder = snapshot(name)
        if folder is not None and _is_whole(folder):
            return folder
    return None


def snapshot(repo: str) -> Path | None:
    """The folder of what Hugging Face's cache holds of a repository's newest known commit, None where of none."""
    reference = storage(repo) / "refs" / "main"
    return storage(repo) / "snapshots" / reference.read_text("utf-8").strip() if reference.is_file() else None


def refer(repo: str, commit: str) -> None:
    """Notes in Hugging Face's cache which commit is the newest."""
    reference = storage(repo) / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit, encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    if (folder / INDEX).is_file():
        return all((folder / shard).is_file() for shard in _shards(folder / INDEX))
    return (folder / WEIGHTS).is_file()


def _shards(index: Path) -> list[str]:
    return sorted(set(read_json(index)["weight_map"].values()))


def model_folder(repo: str, say: Say, progress: Progress | None = None, known: Iterable[str] = ()) -> Path:
    """The folder of a model of the hub, fetching what is not here: config, tokenizer and safetensors, never a pickle.

    Args:
        repo: owner/name.
        progress: told of every piece that arrives.
        known: names to look for the nearest in where the hub has no such model.

    Raises:
        UnknownName: the hub has no such model.
        MissingError: no network, or a model whose terms must be accepted first; says how.
        DamagedError: what came is not what the hub promised (it is removed), or there are only pickles.
    """
    folder = local_model(repo) or _fetch_model(repo, say, progress, known)
    for file in folder.glob("model*.safetensors"):
        try:
            check_safetensors(file)
        except DamagedError as error:
            remove(file)
            raise DamagedError(f"{repo}: {error}; it was removed, and is fetched again next time") from error
    note(repo if storage(repo).is_dir() else next(iter(names.old_ids(repo)), repo))
    return folder


def used() -> list[str]:
    """The repositories that Lancet has opened models or SAEs of, as they are called in Hugging Face's cache."""
    file = cache_dir() / "hub.json"
    try:
        return [str(repo) for repo in read_json(file)] if file.is_file() else []
    except DamagedError:
        return []


def note(repo: str) -> None:
    """Keeps in mind that a repository was opened, for `lancet cache`."""
    if repo not in (known := used()):
        with suppress(LancetError):  # it only serves `lancet cache`
            write_json(cache_dir() / "hub.json", [*known, repo])


def _fetch_model(repo: str, say: Say, progress: Progress | None, known: Iterable[str]) -> Path:
    from huggingface_hub import HfApi

    with explained(repo, known=known):
        info = HfApi().model_info(repo, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        commit = str(info.sha)
        small = [name for name in SMALL_FILES if name in files]
        if INDEX in files:
            weights = _shards(bring(repo, INDEX, commit, progress))
        elif WEIGHTS in files:
            weights = [WEIGHTS]
        else:
            raise DamagedError(
                f"{repo} has no {WEIGHTS}; pickles (.bin, .pt) are never opened. Look for another copy of the model, "
                f"or convert it yourself and give the folder"
            )
        size = sum(files.get(name, 0) for name in weights)
        _check_space(storage(repo), size)
        say(f"fetching {repo} ({size / 1e6:,.0f} MB) from {urlsplit(endpoint()).netloc}")
        # The weights last: a folder that has them has the rest.
        files_here = [bring(repo, name, commit, progress) for name in (*small, *weights)]
        refer(repo, commit)
    return files_here[0].parent


# ---- one file ----------------------------------------------------------------------------------------------------


def fetch(repo: str, file: str, progress: Progress | None = None, revision: str = "main") -> Path:
    """One file of a repository: out of Hugging Face's cache, else fetched, resumed where it broke off and checked.

    Raises:
        MissingError, UnknownName, DamagedError: as `model_folder`.
    """
    with explained(repo, file):
        return bring(repo, file, revision, progress)


def bring(repo: str, file: str, revision: str, progress: Progress | None) -> Path:
    """As `fetch`, with huggingface_hub's own errors, which sae-lens' loaders expect."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    found = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(found, str):
        return Path(found)
    if found is not None:  # the cache knows that there is no such file
        raise EntryNotFoundError(f"{repo} has no {file}")
    url = hf_hub_url(repo, file, revision=revision)
    headers = build_hf_headers()
    told = get_hf_file_metadata(url, headers=headers)
    if told.etag:
        blob = storage(repo) / "blobs" / told.etag
        if not blob.is_file():
            location = told.location or url
            if urlsplit(location).netloc != urlsplit(url).netloc:
                headers.pop("authorization", None)  # a signed address elsewhere: the token is not for it
            with _locked(repo, told.etag):
                if not blob.is_file():
                    _download(location, headers, blob, told.size, file, progress)
    # It finds the blob and does the rest: the snapshot folder, links or copies, the reference.
    return Path(hf_hub_download(repo, file, revision=revision))


def _download(
    url: str, headers: dict[str, str], blob: Path, size: int | None, name: str, progress: Progress | None
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    session = get_session()
    http = import_module(type(session).__module__.split(".")[0])  # httpx, under whichever name the client has it
    part = blob.with_name(f"{blob.name}.part")
    blob.parent.mkdir(parents=True, exist_ok=True)
    _check_space(blob.parent, (size or 0) - (part.stat().st_size if part.is_file() else 0))
    tries = 0
    while True:
        done = part.stat().st_size if part.is_file() else 0
        if size is not None and done >= size:
            break
        asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        before = done
        try:
            with session.stream(
                "GET", url, headers=asked, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as answer:
                if answer.status_code == 416:  # what is here is longer than what is there
                    part.unlink(missing_ok=True)
                    raise http.ReadError("the file has changed")
                if answer.status_code >= 400:
                    answer.read()
                    hf_raise_for_status(answer)
                resumed = answer.status_code == 206
                with part.open("ab" if resumed else "wb") as out:
                    done = done if resumed else 0
                    for piece in answer.iter_bytes(PIECE):
                        out.write(piece)
                        done += len(piece)
                        if progress:
                            progress(name, done, size)
            if size is None or done >= size:
                break
            raise http.ReadError("the answer ended early")
        except http.TransportError:
            tries = 0 if done > before else tries + 1
            if tries >= TRIES:
                raise
            time.sleep(min(8.0, 0.25 * 2**tries))
    _check(part, blob.name, size, name)
    os.replace(part, blob)


def _check(path: Path, etag: str, size: int | None, name: str) -> None:
    """Compares a file with the hub's name for it: sha256 of a large file, git's sha1 of a small one."""
    got_size = path.stat().st_size
    if len(etag) == 64:
        digest = hashlib.sha256()
    elif len(etag) == 40:
        digest = hashlib.sha1(b"blob %d\0" % got_size, usedforsecurity=False)
    else:
        digest = None  # a mirror that names its files otherwise: the size is all there is to compare
    if digest is not None:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    if (size is not None and got_size != size) or (digest is not None and digest.hexdigest() != etag):
        path.unlink()
        raise DamagedError(
            f"{name} came damaged: {got_size} bytes"
            + (f" of {size}" if size is not None else "")
            + (f", hash {digest.hexdigest()[:12]}..., promised {etag[:12]}..." if digest is not None else "")
            + "; it was removed, try again (a mirror or proxy that alters files shows itself so)"
        )


def verify(folder: Path) -> None:
    """Compares every file of a snapshot folder with the hash that it is stored under.

    Raises:
        DamagedError: one differs; it is removed, so that the next fetch brings it again.
    """
    for file in folder.iterdir():
        blob = file.resolve()
        if blob.parent.name == "blobs":
            try:
                _check(blob, blob.name, None, file.name)
            except DamagedError:
                file.unlink(missing_ok=True)
                raise


def remove(file: Path) -> None:
    """Removes a file of a snapshot folder, and what it links to."""
    blob = file.resolve()
    file.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def blobs(repo: str) -> bool:
    """Whether Hugging Face's cache holds anything of a repository."""
    return (storage(repo) / "blobs").is_dir()


def files_of_blob(repo: str, digest: str) -> list[str]:
    """Under which paths a repository's snapshots here have the file of this hash."""
    snapshots = storage(repo) / "snapshots"
    if not (storage(repo) / "blobs" / digest).is_file():
        return []
    return [
        "/".join(file.relative_to(snapshots).parts[1:])
        for file in snapshots.rglob("*")
        if file.resolve().name == digest
    ]


def storage(repo: str) -> Path:
    """Where Hugging Face's cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


@contextmanager
def _locked(repo: str, etag: str) -> Iterator[None]:
    """The lock that huggingface_hub itself takes for this file, so that two programs do not fetch it at once."""
    from filelock import FileLock
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE) / ".locks" / storage(repo).name / f"{etag}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def _check_space(folder: Path, needed: int) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LancetError(
            f"not enough disk space: {needed / 1e6:,.0f} MB needed in {folder}, {free / 1e6:,.0f} MB free; free some "
            f"(`lancet cache` lists what lies there) or set HF_HOME to a folder on another disk"
        )


# ---- errors ------------------------------------------------------------------------------------------------------


@contextmanager
def explained(repo: str, file: str = "", known: Iterable[str] = ()) -> Iterator[None]:
    """Turns the hub client's errors into Lancet's, each with the next step."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    http = import_module(type(get_session()).__module__.split(".")[0])
    what = f"{repo}/{file}" if file else repo
    try:
        yield
    except LancetError:
        raise
    except errors.GatedRepoError as error:
        raise MissingError(_gated(repo)) from error
    except errors.RepositoryNotFoundError as error:
        status = getattr(error.response, "status_code", 404)
        close = [name for name in known if name != repo]
        private = " (a private model, and one whose terms you have not accepted, look the same: `hf auth login` first)"
        if status in (401, 403):
            raise MissingError(_gated(repo, sure=False)) from error
        raise UnknownName("model on the hub", repo, close, f"check the name at {endpoint()}{private}") from error
    except errors.RevisionNotFoundError as error:
        raise MissingError(f"{repo} has no such revision on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise MissingError(unreachable(f"{what} is not here", error)) from error
    except errors.EntryNotFoundError as error:
        raise MissingError(
            f"{repo} has no file {file or '(see the cause)'} on the hub; it may have been moved: look at "
            f"{endpoint()}/{repo}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise MissingError(_gated(repo, sure=False)) from error
        raise MissingError(
            f"the hub answered {status} for {what}; try again later"
            + (", or set HF_ENDPOINT to a mirror" if status >= 429 else "")
        ) from error
    except errors.HFValidationError as error:
        raise UnknownName("model on the hub", repo, known, "write it as owner/name") from error
    except (errors.OfflineModeIsEnabled, errors.FileMetadataError, http.TransportError) as error:
        raise MissingError(unreachable(f"{what} is not here", error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LancetError(
            f"the disk is full: {what} was not fetched; free some space, the rest is fetched next time"
        ) from error


def _gated(repo: str, sure: bool = True) -> str:
    told = "is gated" if sure else "is private or gated"
    return (
        f"{repo} {told}: log in with `hf auth login` (or set HF_TOKEN), accept its terms at {endpoint()}/{repo}, then "
        f"run the same command again"
    )


def unreachable(what: str, error: BaseException, to: str = "fetch it once") -> str:
    """Why the hub cannot be asked, as a sentence that begins with `what` is wrong and ends with the next step."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return f"{what} and offline mode is on; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to {to}"
    why = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"{what} and {endpoint()} cannot be reached ({why[:120]}); check the network, set HTTPS_PROXY for "
        f"a proxy or HF_ENDPOINT for a mirror (docs/mirrors.md)"
    )
