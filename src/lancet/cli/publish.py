"""`lancet publish`: trained SAEs as a repository of the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.publishing.prepare import Prepared


def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `lancet train` wrote: an SAE, or several.")],
    repo: Annotated[
        str | None,
        typer.Argument(metavar="[USER/REPO]", help="Where it goes; left out, everything is prepared and nothing sent."),
    ] = None,
    scored: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="What `lancet eval --json` printed; its figures go on the card."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The model's name on the hub, where it was opened from a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the SAEs, as the hub writes it: mit, apache-2.0, ...")] = None,
    title: Annotated[str | None, typer.Option(help="The card's heading.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository, where there is none yet.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare and show it; the network is not touched.")
    ] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Take SAEs whose training was stopped.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where it is prepared; left out, DIR/hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md has its shape).")] = False,
) -> None:
    """Prepare trained SAEs as a repository of the model hub, with a card, and send it in one commit."""
    from lancet.publishing.prepare import prepare
    from lancet.publishing.send import check_ready, send

    sends = repo is not None and not dry_run
    if sends:
        check_ready()
    with show.working("preparing"):
        prepared = prepare(folder, repo, scored or (), base_model, license, title, out, unfinished)
    if not json:
        told(prepared, repo)
    sent = None
    if repo is not None and sends:
        show.say(f"sending {prepared.bytes / 1e6:,.1f} MB to {repo}; files of these names that differ are replaced")
        sent = send(prepared, repo, private, message, bars=sys.stderr.isatty())
    if json:
        from lancet.hub import endpoint

        out_of_it = {"sent": sent is not None, "url": sent and sent.url, "commit": sent and sent.commit}
        show.as_json({"repo": repo, "endpoint": endpoint()} | out_of_it | prepared.to_json())
    elif sent is not None:
        show.line(f"sent to {sent.url} (commit {sent.commit[:12]})")
        for sae in prepared.saes:
            show.line(f"--sae hf://{repo}/{sae.folder}")
    else:
        why = "--dry-run" if repo else "name USER/REPO to send it"
        show.line(f"prepared in {prepared.folder}; nothing was sent ({why})")


def told(prepared: Prepared, repo: str | None) -> None:
    """A table of what would be sent, and where."""
    from lancet.hub import endpoint

    rows = [[file.path, f"{file.bytes:,}", file.sha256[:12]] for file in prepared.files]
    show.table(["file", "bytes", "sha256"], rows, right=["bytes"])
    models = ", ".join(dict.fromkeys(sae.base for sae in prepared.saes))
    to = f" for {repo} at {endpoint()}" if repo else ""
    show.line(f"{len(rows)} files, {prepared.bytes / 1e6:,.1f} MB, of {models}{to}")
