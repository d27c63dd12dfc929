"""`lancet names ask`: which features are asked about, what is told on the way, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lancet.cli import show
from lancet.cli.names import listing, numbers, shown
from lancet.errors import LancetError, UsageError

if TYPE_CHECKING:
    from lancet.atlas.asking import Named
    from lancet.atlas.atlas import Atlas
    from lancet.atlas.completions import Server
    from lancet.atlas.survey import Answers, Survey

DENSE = 0.1  # of all tokens: a feature that fires on more is seldom about anything
TOP = 20  # features asked about where none are chosen


def run(
    atlas: Atlas,
    where: tuple[str, str, str | None, float],
    what: tuple[str | None, int | None, str | None],
    budget: int | None,
    concurrency: int,
    answer_tokens: int,
    language: str,
    again: bool,
    json: bool,
) -> None:
    """Asks, and tells.

    Args:
        where: the endpoint, the model, the variable that holds its key, the timeout in seconds.
        what: --features, --top and --score.
    """
    from lancet.atlas import survey
    from lancet.atlas.completions import Budget, Server, key_from

    endpoint, model, variable, timeout = where
    given = named_before(atlas, what[2])
    features = chosen(atlas, what[0], what[1], given)
    if budget is not None and budget <= 0:
        raise UsageError(f"--budget is a number of tokens above 0, got {budget}")
    spent = Budget(budget)
    key = atlas.manifest.key
    server = Server(endpoint, model, key_from(variable), timeout, spent, say=show.say)
    failed: LancetError | None = None
    came: list[Named] = []

    def tell(named: Named, done: int, of: int) -> None:
        came.append(named)
        show.say.step(f"asking {model}", done, of)

    try:
        with survey.answers(key, again) as held:
            show.say(f"asking {model} at {server.host} about {len(features):,} features")
            try:
                found = survey.survey(
                    atlas, features, server, held, answer_tokens, concurrency, language, given, came=tell
                )
            except LancetError as error:  # told after what was got
                failed, found = error, survey.Survey(sorted(came, key=lambda n: n.feature))
                found.left = len(features) - len(came)
            finally:
                show.say.step(f"asking {model}", 1, 1)
            if given:
                keep_scores(atlas, what[2] or "", found)
            report(found, server, held, json)
    finally:
        server.close()
    if failed is not None:
        kept = sum(1 for named in came if named.text)
        raise type(failed)(f"{failed}; {kept:,} names are kept, and the same command goes on from there") from failed


def report(found: Survey, server: Server, held: Answers, json: bool) -> None:
    """What came: a table, and what it took."""
    from lancet.atlas.explanations import CHANCE, Explanation

    budget = server.budget
    if json:
        show.as_json(
            {
                "model": server.model,
                "host": server.host,
                "names": shown(found),
                "chance": CHANCE,
                "requests": budget.requests,
                "reused": held.reused,
                "tokens": budget.spent,
                "estimated": budget.estimated,
                "silent": found.silent,
                "left": found.left,
                "stopped": found.stopped,
            }
        )
        return
    source = f"ask: {server.model}"
    listing([Explanation(n.feature, n.text, source, n.score, n.asked) for n in found.named if n.text])
    for named in [named for named in found.named if named.why][:5]:
        what = "its name is not scored" if named.text else "no name"
        show.say(f"#{named.feature}: {what}, no answer made sense: {named.why}")
    scores = sorted(named.score for named in found.named if named.score is not None)
    if scores:
        show.say(f"median detection {scores[len(scores) // 2]:.2f} of {len(scores):,} names")
    reused = f", {held.reused:,} answers were here from before" if held.reused else ""
    guessed = f" ({budget.estimated:,} estimated)" if budget.estimated else ""
    show.say(f"{budget.requests:,} answers, {budget.spent:,} tokens{guessed}{reused}")
    if found.silent:
        show.say(f"{len(found.silent):,} features never fired and were not asked about")
    if found.stopped:
        bare = sum(named.score is None and bool(named.text) for named in found.named)
        unscored = f" and {bare:,} names are not scored" if bare else ""
        show.say(f"stopped by {found.stopped}: {found.left:,} features are left{unscored}; run it again to go on")


def chosen(atlas: Atlas, listed: str | None, top: int | None, given: dict[int, str] | None) -> list[int]:
    """The features that are asked about.

    Raises:
        UsageError: both ways of choosing at once, or none is left.
    """
    if listed is not None and top is not None:
        raise UsageError("give either --features or --top")
    if listed is not None:
        found = numbers(listed, len(atlas))
    else:
        if top is not None and top < 1:
            raise UsageError(f"--top is a number of features from 1 on, got {top}")
        rows = atlas.query(
            "SELECT feature FROM features WHERE fired > 0 AND density <= ? ORDER BY fired DESC, feature", [DENSE]
        )
        most = top or (len(rows) if given else TOP)
        found = [row[0] for row in rows if given is None or row[0] in given][:most]
    found = [feature for feature in found if given is None or feature in given]
    if not found:
        raise UsageError("none of these features " + ("has a name of that source" if given else "fires in the atlas"))
    return found


def named_before(atlas: Atlas, source: str | None) -> dict[int, str] | None:
    """The names of a source, for --score; None where new ones are asked for.

    Raises:
        UsageError: there are none.
    """
    from lancet.atlas import explanations

    if source is None:
        return None
    kept = explanations.load(atlas.manifest.key)
    out = {i: e.text for i, some in kept.items() for e in some if e.source == source}
    if not out:
        known = sorted({e.source for some in kept.values() for e in some})
        raise UsageError(f"no names of source {source!r}; there are {', '.join(map(repr, known)) or 'none at all'}")
    return out


def keep_scores(atlas: Atlas, source: str, found: Survey) -> None:
    """Writes scores beside the names that were scored."""
    from dataclasses import replace

    from lancet.atlas import explanations

    kept = explanations.load(atlas.manifest.key)
    scored = {named.feature: named for named in found.named if named.score is not None}
    explanations.keep(
        atlas.manifest.key,
        [
            replace(e, score=scored[i].score, asked=scored[i].asked) if e.text == scored[i].text else e
            for i in scored
            for e in kept.get(i, [])
            if e.source == source
        ],
    )
