"""`lancet get`: fetches a model or an SAE ahead of its use."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

from lancet.cli import show


def run(name: str, accept_terms: bool) -> None:
    from lancet import addressed, catalogue, embedded, hub, names, published
    from lancet.loading import progress_of

    progress = progress_of(show.say)
    with show.working(f"fetching {name}"):
        if name in embedded.MODELS:
            folder = embedded.MODELS[name].get(show.say, lambda terms, where: accept_terms or _asked(terms, where))
        elif addressed.is_address(name):
            name, folder = addressed.fetch(name, show.say, progress)
            hub.verify(folder)
        elif catalogue.load().release_of(name):
            folder = published.ensure(catalogue.load().entry(name), show.say, progress)
        else:
            known = (*embedded.MODELS, *catalogue.load().releases)
            folder = hub.model_folder(names.check(name, known), show.say, progress, names.table().values())
            hub.verify(folder)
    show.line(f"{name} is ready in {folder}")


def _asked(terms: str, where: str) -> bool:
    """Shows the terms and takes a typed yes, nothing else."""
    show.line(plain_text(terms))
    show.line(f"\nThese are the model's own terms ({where}).")
    with show.paused():
        show.begin("Type yes to accept them: ", "bold")
        sys.stdout.flush()
        return sys.stdin.readline().strip().lower() == "yes"


def plain_text(html: str) -> str:
    """The article of a web page, as paragraphs; the whole page where it has none."""
    found = _Article()
    found.feed(html)
    text = "".join(found.inside or found.all)
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.split("\n\n")]
    return "\n\n".join(line for line in lines if line)


class _Article(HTMLParser):
    SKIPPED = ("script", "style", "head", "nav", "devsite-feedback")
    BREAKS = ("p", "li", "h1", "h2", "h3", "h4", "br", "tr", "div", "ol", "ul")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []
        self.inside: list[str] = []
        self._skipped = self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in self.SKIPPED
        if tag == "div" and (self._depth or "article-body" in (dict(attrs).get("class") or "")):
            self._depth += 1
        if tag in self.BREAKS:
            self._add("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in self.SKIPPED and self._skipped > 0
        if tag == "div" and self._depth:
            self._depth -= 1
        if tag in self.BREAKS:
            self._add("\n\n")

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, text: str) -> None:
        if not self._skipped:
            self.all.append(text)
            if self._depth:
                self.inside.append(text)
