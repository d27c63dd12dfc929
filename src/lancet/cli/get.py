"""`lancet get`: fetches a model or an SAE ahead of its use."""

from __future__ import annotations

from lancet.cli import show


def run(name: str) -> None:
    from lancet import catalogue, embedded, hub, names, published
    from lancet.loading import progress_of

    progress = progress_of(show.say)
    with show.working(f"fetching {name}"):
        if name == embedded.NAME:
            folder = embedded.get(show.say)
        elif catalogue.load().release_of(name):
            folder = published.ensure(catalogue.load().entry(name), show.say, progress)
        else:
            known = (embedded.NAME, *catalogue.load().releases)
            folder = hub.model_folder(names.check(name, known), show.say, progress, names.table().values())
            hub.verify(folder)
    show.line(f"{name} is ready in {folder}")
