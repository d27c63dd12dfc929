"""The self-test of a pair: does this SAE belong to this place in this model, and is the model fed as it was trained.

Everything is measured on a few texts. The SAE must explain the values at its site, and explain them better there than
at the same place of other blocks and in other bases; the model must go on predicting text with the reconstruction
spliced in; the start of text must be the one that costs the least; a cached pass must equal an uncached one. What a
release states of an SAE is compared; what it does not state counts as unknown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lancet.errors import MismatchError, UsageError
from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae

TOKENS = 128  # of each text
QUICK_TEXTS = 4
WORK = 3e11  # multiplications that comparing places may take: a few seconds of a laptop
EXPLAINED, RECOVERED, START, RANDOM = 0.3, 0.5, 0.05, 0.9
WRONG_BLOCK, WRONG_BASIS = 0.85, 0.99  # what another place or basis leaves, over what this one does
STATED_L0, STATED_EXPLAINED = 2.5, 0.25
KL = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Finding:
    """One thing that was tested.

    Attributes:
        what: its name.
        got, wanted: in words and figures.
        fine: whether it is as it must be.
        why: the likely reason where it is not.
    """

    what: str
    got: str
    wanted: str
    fine: bool = True
    why: str = ""


@dataclass(frozen=True)
class Checkup:
    """The self-test's result.

    Attributes:
        pair: model, SAE and site, in words.
        figures: the numbers behind the findings.
        findings: one for each thing tested.
    """

    pair: str
    figures: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def poor(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.fine]

    def refuse(self) -> None:
        """Raises MismatchError with the likeliest reason where something is wrong."""
        if self.poor:
            first = next((finding for finding in self.poor if finding.why), self.poor[0])
            told = "; ".join(f"{f.what} {f.got}, wanted {f.wanted}" for f in self.poor)
            reason = f": {first.why}" if first.why else ""
            raise MismatchError(f"{self.pair} fails its self-test{reason} ({told}). `--anyway` goes on (anyway=True)")

    def to_json(self) -> dict[str, Any]:
        """{"pair", "fine", "figures", "findings": [{"what", "got", "wanted", "fine", "why"}]}."""
        findings = [vars(finding) for finding in self.findings]
        return {"pair": self.pair, "fine": not self.poor, "figures": self.figures, "findings": findings}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Checkup:
        """Reads what `to_json` gave."""
        return cls(told["pair"], told["figures"], tuple(Finding(**finding) for finding in told["findings"]))

    def __str__(self) -> str:
        lines = [self.pair]
        for f in self.findings:
            lines.append(f"  {'fine' if f.fine else 'POOR'}  {f.what}: {f.got} (wanted {f.wanted}) {f.why}".rstrip())
        return "\n".join(lines)


def check(model: Model, sae: Sae, texts: Sequence[str] | None = None, quick: bool = False) -> Checkup:
    """Tests a pair.

    Args:
        texts: what to measure on; ten bundled texts of different kinds where none are given.
        quick: on a few texts, beside the neighbouring blocks alone, without what is a fact of the model alone (start of
            text, cache); what looks poor then is tested in full.

    Raises:
        UsageError: no text has two tokens.
    """
    rows = [model.tokenize(text, most=min(model.context, TOKENS)).ids for text in texts or kinds_of_text()]
    if not any(len(row) > 2 for row in rows):
        raise UsageError("the texts are too short to test anything on; give some sentences")
    rows = [row for row in rows if len(row) > 2]
    if quick:
        glance = _run(model, sae, rows[:QUICK_TEXTS], quick=True)
        if not glance.poor:
            return glance
    return _run(model, sae, rows, quick=False)


def _run(model: Model, sae: Sae, rows: Sequence[Sequence[int]], quick: bool) -> Checkup:
    figures: dict[str, float] = {}
    findings: list[Finding] = []
    findings += _predicts(model, rows, figures)
    if not quick:
        findings += [*_start(model, rows, figures), *_cached(model, rows, figures)]
    findings += _places(model, sae, rows, figures, 2 if quick else model.n_layers)
    findings += [*_spliced(model, sae, rows, figures), *_stated(model, sae, rows, figures)]
    return Checkup(f"{sae.name} at {sae.site} of {model.name}", figures, tuple(findings))


def first(model: Model, sae: Sae) -> Checkup:
    """The quick test at the first opening of a pair; what it found is kept."""
    from lancet.facts import fingerprint
    from lancet.files import cache_dir, kept_json

    path = cache_dir() / "checks" / f"{fingerprint(model, sae)}.json"
    return Checkup.from_json(kept_json(path, lambda: check(model, sae, quick=True).to_json()))


def kinds_of_text() -> list[str]:
    """One passage out of each volume of the bench, and some code."""
    import random

    from lancet import bench

    rng = random.Random(0)
    texts = [bench.expand(rng.choice(lines), rng) for lines in bench.passages().values()]
    return [
        *texts,
        "def mean(values):\n    if not values:\n        return None\n    return sum(values) / len(values)\n",
    ]


# ---- the model ---------------------------------------------------------------------------------------------------


def _loss(model: Model, rows: Sequence[Sequence[int]], skip: int) -> float:
    """Nats a token over all tokens but the first `skip` of each row; none has padding."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        with torch.inference_mode():
            scores = model.forward(ids)[0, skip - 1 : -1].float()
            total += float(torch.nn.functional.cross_entropy(scores, ids[0, skip:], reduction="sum"))
        count += len(row) - skip
    return total / count


def _predicts(model: Model, rows: Sequence[Sequence[int]], figures: dict[str, float]) -> Iterator[Finding]:
    uniform = math.log(model.d_vocab)
    figures["loss"] = loss = _loss(model, rows, 2)
    yield Finding(
        "the model predicts text",
        f"{loss:.2f} nats a token",
        f"under {RANDOM * uniform:.2f} (a blind guess: {uniform:.2f})",
        loss < RANDOM * uniform,
        ""
        if loss < RANDOM * uniform
        else "the model does not predict text: its weights are random, or another model's",
    )


def _start(model: Model, rows: Sequence[Sequence[int]], figures: dict[str, float]) -> Iterator[Finding]:
    tokenizer, own = model.tokenizer, model.start_plain
    content = [list(row if own is None or row[0] != own else row[1:]) for row in rows]
    doubled = own is not None and any(row[0] == own for row in content)
    yield Finding(
        "one start of text", "two" if doubled else "none" if own is None else "one", "at most one", not doubled
    )
    ids = {own, None, *(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(i, int))}
    cost = {
        each: _loss(model, [[*([] if each is None else [each]), *c] for c in content], 1 + (each is not None))
        for each in ids
    }
    best = min(cost, key=lambda each: cost[each])

    def told(each: int | None) -> str:
        return "none" if each is None else repr(model.decode([each]))

    figures |= {f"loss, start {told(each)}": value for each, value in cost.items()}
    fine = cost[own] <= cost[best] + START
    yield Finding(
        "start of text",
        f"{told(own)}, {cost[own]:.2f} nats a token",
        f"the one that costs the least ({told(best)}, {cost[best]:.2f})",
        fine,
        "" if fine else f"the text begins with {told(own)}, and the model was trained to see {told(best)} there",
    )


def _cached(model: Model, rows: Sequence[Sequence[int]], figures: dict[str, float]) -> Iterator[Finding]:
    import torch

    row = max(rows, key=len)
    ids, half = torch.tensor([row], device=model.device), len(row) // 2
    with torch.inference_mode():
        whole = model.forward(ids)[0, half:].double().log_softmax(-1)
        cache = model.new_cache(1)
        model.forward(ids[:, :half], cache=cache)
        positions = torch.arange(half, len(row), device=model.device)[None]
        mask = torch.ones_like(ids)
        later = model.forward(ids[:, half:], mask, positions, cache)[0].double().log_softmax(-1)
    figures["cached KL"] = kl = float((whole.exp() * (whole - later)).sum(-1).mean())
    bar = KL[str(model.dtype).removeprefix("torch.")]
    yield Finding("cached equals uncached", f"KL {kl:.1e}", f"at most {bar:.0e}", kl <= bar)


# ---- the SAE at its place ----------------------------------------------------------------------------------------


def _places(
    model: Model, sae: Sae, rows: Sequence[Sequence[int]], figures: dict[str, float], most: int
) -> Iterator[Finding]:
    """What is left unexplained here, at the same place of other blocks, and in other bases."""
    tried: dict[str, tuple[Sae, Site, Site]] = {"here": (sae, sae.site, sae.writes)}
    bases = _other_bases(model, sae)
    tried |= {name: (other, sae.site, sae.writes) for name, other in bases.items()}
    blocks = {f"at {read}": (sae, read, write) for read, write in _other_blocks(model, sae, sum(map(len, rows)), most)}
    left = _left(model, rows, tried | blocks)
    shares = {name: sum(error for error, _ in texts) / total for name, (texts, total) in left.items()}
    figures["explained"] = 1 - shares["here"]
    figures |= {f"explained, {name}": 1 - share for name, share in shares.items() if name != "here"}
    why = ""
    best = min(blocks, key=lambda name: shares[name], default="here")
    if shares[best] < min(WRONG_BLOCK * shares["here"], 1 - EXPLAINED):
        why = f"it explains {1 - shares[best]:.3f} {best}: it is at the wrong layer"
    for name in bases:
        # Centring moves values little in some models; on every single text it is no accident all the same.
        always = all(mine[0] > other[0] for mine, other in zip(left["here"][0], left[name][0], strict=True))
        if always and shares[name] < min(WRONG_BASIS * shares["here"], 1 - EXPLAINED, shares[best]):
            why = f"it explains {1 - shares[name]:.3f} {name}: it is read in the wrong basis (`--basis` sets it)"
    if not why and shares["here"] > 1 - EXPLAINED:
        why = (
            "it explains no place of this model: it was trained on another model, or on another training stage of it "
            "(base against instruct)"
        )
    wanted = f"over {EXPLAINED}, and the best over blocks and bases"
    yield Finding("explained variance", f"{1 - shares['here']:.3f}", wanted, not why, why)


def _other_blocks(model: Model, sae: Sae, tokens: int, most: int) -> Iterator[tuple[Site, Site]]:
    """The same place in other blocks, the nearest first, at most so many and as WORK allows."""
    most = min(most, max(2, int(WORK / (2 * sae.d_in * sae.d_sae * tokens))))
    others = sorted(set(range(model.n_layers)) - {sae.site.layer}, key=lambda layer: abs(layer - sae.site.layer))
    for layer in others[:most]:
        read, write = (
            replace(sae.site, layer=layer),
            replace(sae.writes, layer=sae.writes.layer + layer - sae.site.layer),
        )
        if 0 <= write.layer < model.n_layers and _there(model, read, write, sae):
            yield read, write


def _left(
    model: Model, rows: Sequence[Sequence[int]], tried: dict[str, tuple[Sae, Site, Site]]
) -> dict[str, tuple[list[tuple[float, int]], float]]:
    """For each reading ([(squared error, tokens) of each text], squared distance from the mean over all of them)."""
    import torch

    errors: dict[str, list[tuple[float, int]]] = {name: [] for name in tried}
    sums: dict[str, list[Tensor]] = {name: [] for name in tried}
    squares = dict.fromkeys(tried, 0.0)
    sites = sorted({site for _, read, write in tried.values() for site in (read, write)})
    for row in rows:
        batch = model.batch([row])
        values, counts = model.values(batch, sites), batch.content[0]
        for name, (sae, read, write) in tried.items():
            x, y = values[read][0].float(), sae.out_basis(values[write][0])[counts].double()
            error = y - sae.decode_features(sae.features(x, counts), x, counts)
            errors[name].append((float(error.pow(2).sum()), len(y)))
            sums[name].append(y.sum(0))
            squares[name] += float(y.pow(2).sum())
    out = {}
    for name, texts in errors.items():
        tokens = sum(count for _, count in texts)
        mean = torch.stack(sums[name]).sum(0) / tokens
        out[name] = (texts, max(1e-12, squares[name] - tokens * float(mean.pow(2).sum())))
    return out


def _there(model: Model, read: Site, write: Site, sae: Sae) -> bool:
    try:
        widths = model.d_site(model.check_site(read)), model.d_site(model.check_site(write))
    except UsageError:
        return False
    return widths == (sae.d_in, sae.d_out)


def _values(model: Model, rows: Sequence[Sequence[int]], sites: set[Site]) -> list[tuple[dict[Site, Tensor], Tensor]]:
    """For each text its values, [tokens, width], and which tokens count: the start token is longer than all others."""
    found = []
    for row in rows:
        batch = model.batch([row])
        values = model.values(batch, sorted(sites))
        found.append(({site: value[0].float() for site, value in values.items()}, batch.content[0]))
    return found


def _other_bases(model: Model, sae: Sae) -> dict[str, Sae]:
    """The SAE in each basis that it is not in, where that differs at its site."""
    from lancet.basis import Basis, put_in_basis

    out: dict[str, Sae] = {}
    seen = [(sae.offset is None, sae.centred, sae.centred_out)]
    for name, processed in (("of the model as it is", False), ("of the model with centred writing weights", True)):
        try:
            other = put_in_basis(copy.copy(sae), model, Basis(processed, processed, False))
        except (MismatchError, UsageError):
            continue
        basis = (other.offset is None, other.centred, other.centred_out)
        if basis not in seen:
            out[name] = other
            seen.append(basis)
    return out


def _spliced(model: Model, sae: Sae, rows: Sequence[Sequence[int]], figures: dict[str, float]) -> Iterator[Finding]:
    with _replaced(model, sae, zero=False):
        spliced = _loss(model, rows, 2)
    with _replaced(model, sae, zero=True):
        zero = _loss(model, rows, 2)
    plain = figures["loss"]
    recovered = (zero - spliced) / (zero - plain) if zero > plain else float("nan")
    figures |= {"loss, spliced": spliced, "loss, zeros": zero, "loss recovered": recovered}
    yield Finding(
        "loss with the SAE spliced in",
        f"{spliced:.2f} nats a token, {recovered:.3f} of the way from zeros ({zero:.2f}) to plain ({plain:.2f})",
        f"at least {RECOVERED:g} of the way",
        not recovered < RECOVERED,  # where zeros do not hurt, nothing can be recovered
    )


@contextmanager
def _replaced(model: Model, sae: Sae, zero: bool) -> Iterator[None]:
    """Reconstructions (or zeros) instead of the values at `sae.writes`, the start token's left alone."""
    import torch

    read: dict[str, Tensor] = {}

    def keep(value: Tensor) -> None:
        read["x"] = value[0].float()

    def put(value: Tensor) -> Tensor:
        if sae.writes == sae.site:
            read["x"] = value[0].float()
        new = torch.zeros_like(value[0]).float()
        if not zero:
            x, y = read["x"], value[0].float()
            new = sae.decode_features(sae.features(x), x) + (y - sae.out_basis(y))
        new[0] = value[0, 0].float()
        return new.to(value.dtype)[None]

    with ExitStack() as stack:
        if sae.writes != sae.site:
            stack.enter_context(model.at(sae.site, keep))
        stack.enter_context(model.at(sae.writes, put))
        yield


def _stated(model: Model, sae: Sae, rows: Sequence[Sequence[int]], figures: dict[str, float]) -> Iterator[Finding]:
    """L0 and explained variance against what the release states."""
    import torch

    pieces = _values(model, rows, {sae.site})
    lit = [sae.features(values[sae.site], counts).l0() for values, counts in pieces]
    figures["L0"] = got = float(torch.cat(lit).float().mean())
    stated = sae.stated.get("l0")
    fine = stated is None or 1 / STATED_L0 <= max(got, 1e-9) / stated <= STATED_L0
    yield Finding(
        "features lit at a token (L0)",
        f"{got:.1f}",
        "unknown: its release states none" if stated is None else f"about {stated:g}, as its release states",
        fine and got > 0,
        "" if fine else "far from what its release states: another model, layer or basis than it was trained on",
    )
    stated, got = sae.stated.get("explained"), figures["explained"]
    if stated is not None:
        fine = got > stated - STATED_EXPLAINED
        yield Finding("explained variance against the release's", f"{got:.3f}", f"about {stated:.3f}", fine)
