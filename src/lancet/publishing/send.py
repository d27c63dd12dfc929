"""Sends a prepared repository to the hub, in one commit.

Addresses, tokens and offline mode are huggingface_hub's, as in `lancet.hub`. Its `upload_folder` may make several
commits, so that a reader could meet a half-sent repository; `create_commit` makes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from lancet import hub
from lancet.errors import LancetError, MissingError, UsageError
from lancet.publishing.prepare import Prepared

MESSAGE = "Sparse autoencoders, sent by Lancet"


@dataclass(frozen=True)
class Sent:
    """What came of it: the repository's address, and the commit."""

    url: str
    commit: str


def check_ready() -> None:
    """Tells before anything is prepared that nothing can be sent.

    Raises:
        MissingError: offline mode is on, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise MissingError(hub.unreachable("nothing can be sent", OSError(), "publish"))
    if not get_token():
        raise MissingError(_who())


def send(prepared: Prepared, repo: str, private: bool = False, message: str | None = None, bars: bool = False) -> Sent:
    """Makes the repository where it is not there yet, and adds the files in one commit.

    Files of the same names that differ are replaced; others stay. What was replaced stays in the repository's history.

    Args:
        repo: owner/name.
        private: make it a private one; one that is there stays as it is.
        message: the commit's.
        bars: show the hub client's bars on standard error.

    Raises:
        MissingError: no token, one that may not write there, no network, no such owner; each with the next step.
        UsageError: the hub refuses the card, or a file.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    check_ready()
    shown = not are_progress_bars_disabled()
    if shown and not bars:
        disable_progress_bars()
    try:
        with _told(repo):
            api = HfApi()
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            files = [CommitOperationAdd(file.path, prepared.folder / file.path) for file in prepared.files]
            made = api.create_commit(repo, files, commit_message=message or MESSAGE)
    finally:
        if shown and not bars:
            enable_progress_bars()
    return Sent(str(url), made.oid)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turns the hub client's errors into Lancet's, in the words of who sends; the rest is `hub.explained`'s."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    http = import_module(type(get_session()).__module__.split(".")[0])
    with hub.explained(repo):
        try:
            yield
        except LancetError:
            raise
        except Exception as raised:
            error = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
            if isinstance(error, errors.HfHubHTTPError):
                raise _answered(repo, error) from raised
            if isinstance(error, (errors.OfflineModeIsEnabled, http.TransportError)):
                raise MissingError(hub.unreachable(f"{repo} was not sent", error, "publish")) from raised
            if isinstance(error, ValueError):  # the card's front matter, or a large file that the hub will not have
                raise UsageError(f"the hub refuses what is sent to {repo}: {_brief(error)}") from raised
            if isinstance(error, RuntimeError):  # of the client's upload
                raise MissingError(f"{repo} was not sent: {_brief(error)}; the same command tries again") from raised
            raise


def _answered(repo: str, error: BaseException) -> LancetError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    said = getattr(error, "server_message", None) or ""
    why = f" ({_brief(said)})" if said else ""
    owner = repo.split("/")[0]
    if status == 401:
        return MissingError(f"the hub does not know the token that it was sent{why}; {_who()}")
    if status == 403:
        return MissingError(
            f"the token may not write to {repo}{why}; make one with write access to what {owner} owns, or publish "
            f"under a name of your own"
        )
    if status == 404:
        return MissingError(
            f"the hub has no {owner}, or does not show {repo} to this token{why}; check the name at {hub.endpoint()}"
        )
    if status == 400:
        return UsageError(f"the hub refuses what is sent to {repo}{why}")
    return MissingError(f"the hub answered {status} for {repo}{why}; nothing was committed, try again later")


def _who() -> str:
    return "set HF_TOKEN to a token with write access, or log in with `hf auth login`"


def _brief(text: object, most: int = 300) -> str:
    return " ".join(str(text).split())[:most]
