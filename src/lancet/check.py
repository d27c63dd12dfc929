"""The self-test of a pair: does this SAE belong to this place in this model, and is the model fed as it was trained.

Everything is measured on a few texts. The SAE must explain the values at its site, and explain them better there than
at the same place of other blocks and in other bases; the model must go on predicting text with the reconstruction
spliced in; the start of text must be the one that costs the least; a cached pass must equal an uncached one. What a
release states of an SAE is compared; what it does not state counts as unknown.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lancet import feeding, fingerprint, splice
from lancet.checkup import Checkup, Finding
from lancet.errors import MismatchError, UsageError
from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.features import Features
    from lancet.model import Model
    from lancet.sae import Sae

__all__ = ["Checkup", "Finding", "check", "first", "kinds_of_text"]

LAYOUT = 2  # of what is kept; another one when tests or bars change
TOKENS = 128  # of each text
QUICK_TEXTS = 4
QUICK_STARTS = 2  # texts: a second of one processor core on smollm2, and the right start is 0.2 nats ahead there
CROWDED = 16  # where more than one feature in so many lights, the dense product is the faster one
WORK = 3e11  # multiplications that comparing places may take: a few seconds of a laptop
LEAST_TOKENS = 64  # of a quick test, however large the SAE
EXPLAINED, RECOVERED, HURTS, RANDOM = 0.3, 0.5, 0.1, 0.9
WRONG_BLOCK, WRONG_BASIS = 0.85, 0.99  # what another place or basis leaves, over what this one does
ROUNDING = 1e-6  # a share that is left, and is nothing but rounding: which place has less is then an accident
STATED_L0, STATED_EXPLAINED = 3.0, 0.25  # code lights twice as many features as stories do, Chinese 2.5 times


def check(model: Model, sae: Sae, texts: Sequence[str] | None = None, quick: bool = False) -> Checkup:
    """Tests a pair.

    Args:
        texts: what to measure on; ten bundled texts of different kinds where none are given.
        quick: on four texts, beside the neighbouring blocks alone, with the start of two texts and without the cache:
            three passes a text, and one for each start. What looks poor then is tested in full.

    Raises:
        UsageError: no text has three tokens, the start token counted.
    """
    rows = _rows(model, texts or kinds_of_text())
    if not rows:
        raise UsageError("the texts are too short to test anything on; give some sentences")
    if quick:
        glance = _run(model, sae, _few(rows, sae), quick=True)
        if not glance.poor:
            return glance
    return _run(model, sae, rows, quick=False)


def first(model: Model, sae: Sae, say: Callable[[str], None] = lambda line: None) -> Checkup:
    """The quick test at the first opening of a pair; what it found is kept, by what it depends on: the model's weights
    (all of them: the SAE's values go through the blocks behind it too), the SAE's, and what its release states.

    Args:
        say: told where it must be run.
    """
    from lancet.files import cache_dir, kept_json

    def run() -> dict[str, object]:
        say(f"testing whether {sae.name} belongs to {model.name} (once)")
        return check(model, sae, quick=True).to_json()

    told = f"{LAYOUT} {fingerprint.of_model(model)} {sae.centred_out} {sorted(sae.stated.items())}"
    key = f"{fingerprint.of_pair(model, sae)}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    found = Checkup.from_json(kept_json(cache_dir() / "checks" / f"{key}.json", run))
    return replace(found, pair=_named(model, sae))  # the same weights may bear other names by now


def kinds_of_text() -> list[str]:
    """One passage out of each volume of the bench, of those that nothing was trained on, and some code."""
    import random

    from lancet import bench

    rng = random.Random(0)
    texts = [bench.expand(rng.choice(bench.select(lines, "heldout")), rng) for lines in bench.passages().values()]
    return [
        *texts,
        "def mean(values):\n    if not values:\n        return None\n    return sum(values) / len(values)\n",
    ]


def _rows(model: Model, texts: Sequence[str]) -> list[list[int]]:
    rows = [list(model.tokenize(text, most=min(model.context, TOKENS)).ids) for text in texts]
    return [row for row in rows if len(row) > 2]


def _few(rows: Sequence[list[int]], sae: Sae) -> list[list[int]]:
    """The texts of a quick test; fewer tokens where the SAE is so large that they would take long."""
    left = max(LEAST_TOKENS, int(WORK / (3 * _work(sae))))
    few = []
    for row in rows[:QUICK_TEXTS]:
        if left > 2:
            few.append(row[:left])
        left -= len(row)
    return few


def _work(sae: Sae) -> int:
    return 2 * sae.d_in * sae.d_sae  # a token


def _run(model: Model, sae: Sae, rows: Sequence[list[int]], quick: bool) -> Checkup:
    tokens = sum(map(len, rows))
    most = 2 if quick else max(2, min(model.n_layers, int(WORK / (_work(sae) * tokens))))
    (bases, possible), blocks = _bases(model, sae), dict(_other_places(model, sae, most))
    measured = _measured(model, sae, rows, {**bases, **blocks})
    figures: dict[str, float] = {}
    findings = [*_predicts(model, measured, figures)]
    kinds = _rows(model, kinds_of_text())
    findings += [*feeding.start(model, kinds[:QUICK_STARTS] if quick else kinds, figures, not quick)]
    if not quick:
        findings += [*feeding.cached(model, rows, figures)]
    findings += _explains(sae, measured, bases, blocks, figures, WRONG_BASIS if possible else 1.0)
    findings += [*_spliced(measured, figures), *_stated(sae, measured, figures)]
    return Checkup(_named(model, sae), figures, tuple(findings))


def _named(model: Model, sae: Sae) -> str:
    where = "" if sae.name == str(sae.site) else f" at {sae.site}"
    return f"{sae.name}{where} of {model.name}"


# ---- what is measured --------------------------------------------------------------------------------------------


@dataclass
class Left:
    """What a reading leaves unexplained, summed over texts."""

    errors: list[float] = field(default_factory=list)  # squared, of each text
    tokens: int = 0
    total: Tensor | None = None  # [width] sum of the values
    squares: float = 0.0

    def add(self, y: Tensor, rebuilt: Tensor) -> None:
        """Counts one text in: values [tokens, width] and their reconstruction."""
        y = y.double()
        self.errors.append(float((y - rebuilt).pow(2).sum()))
        self.tokens += len(y)
        self.total = y.sum(0) if self.total is None else self.total + y.sum(0)
        self.squares += float(y.pow(2).sum())

    @property
    def share(self) -> float:
        """Of the variance over all texts; NaN where there is no token."""
        if not self.tokens:
            return math.nan
        assert self.total is not None
        variance = self.squares - float(self.total.pow(2).sum()) / self.tokens
        return sum(self.errors) / max(1e-12, variance)


@dataclass
class Measured:
    """Sums over all texts.

    Attributes:
        left: "here" and each other reading -> what it leaves unexplained.
        lit: features lit, over all tokens.
        plain, spliced, zeros: nats of `count` tokens as they are, with the reconstruction, and with zeros at the site.
    """

    left: dict[str, Left]
    lit: int = 0
    plain: float = 0.0
    spliced: float = 0.0
    zeros: float = 0.0
    count: int = 0


def _measured(model: Model, sae: Sae, rows: Sequence[list[int]], others: Mapping[str, Sae]) -> Measured:
    import torch

    tried = {"here": sae, **others}
    sites = {site for one in tried.values() for site in (one.site, one.writes)} | {sae.writes.entry}
    out = Measured({name: Left() for name in tried})
    for row in rows:
        passed = splice.through(model, model.batch([row]), sorted(sites))
        keep = passed.content[0]
        for name, one in tried.items():
            x, y = passed.values[one.site][0].float(), passed.values[one.writes][0, keep].float()
            features = one.features(x, keep)  # of the whole text: some SAEs see the tokens before
            rebuilt, own = rebuild(one, features, x, keep), one.out_basis(y)
            out.left[name].add(own, rebuilt)
            if name == "here":
                out.lit += len(features.value)
                new = rebuilt + (y - own)  # what lies outside its basis, it never saw
                out.spliced += passed.cost(splice.replaced(model, passed, sae.writes, new))
                out.zeros += passed.cost(splice.replaced(model, passed, sae.writes, torch.zeros_like(y)))
        out.plain += passed.nats
        out.count += passed.count
    return out


def rebuild(sae: Sae, features: Features, x: Tensor, keep: Tensor) -> Tensor:
    """[rows, d_out] the reconstruction of what `sae.features(x, keep)` gave; dense where that is the faster way."""
    crowded = len(features.value) * CROWDED > features.shape[0] * features.shape[1]
    if crowded and sae.one_piece and not sae.kind.contextual:  # far from its place an SAE may light half its features
        return sae.decode(features.dense(), x[keep])
    return sae.decode_features(features, x, keep)


def _bases(model: Model, sae: Sae) -> tuple[dict[str, Sae], bool]:
    """The SAE in each basis that it is not in, by the name that --basis has for it, where that differs at its site;
    and whether its own is one that this model can be in."""
    from lancet import pairing
    from lancet.basis import put_in_basis

    others: dict[str, Sae] = {}
    possible = False
    for name, basis in pairing.bases().items():
        try:
            other = put_in_basis(sae, model, basis)
        except (MismatchError, UsageError):
            continue  # this model does not have it
        possible |= pairing.alike(sae, other)
        if not any(pairing.alike(known, other) for known in (sae, *others.values())):
            others[name] = other
    return others, possible


def _other_places(model: Model, sae: Sae, most: int) -> Iterator[tuple[str, Sae]]:
    """The same place in other blocks, the nearest first, and before the norm's gain instead of after it."""
    sites = [Site(sae.site.layer, "mlp.hook_in")] if sae.site.kind == "ln2.hook_normalized" else []
    others = sorted(set(range(model.n_layers)) - {sae.site.layer}, key=lambda layer: abs(layer - sae.site.layer))
    sites += [replace(sae.site, layer=layer) for layer in others[:most]]
    for site in sites:
        other = copy.copy(sae)
        moved = sae.writes if sae.writes != sae.site else site
        other.site, other.writes = site, replace(moved, layer=sae.writes.layer + site.layer - sae.site.layer)
        try:
            widths = [model.d_site(model.check_site(each)) for each in (other.site, other.writes)]
            other.offset = _offset_at(model, sae, site.layer)
        except (UsageError, MismatchError):
            continue
        if widths == [sae.d_in, sae.d_out]:
            yield f"at {site}", other


def _offset_at(model: Model, sae: Sae, layer: int) -> Tensor | None:
    """What is subtracted from z there: each block has a value bias of its own."""
    if sae.offset is None or layer == sae.site.layer:
        return sae.offset
    for norm_bias in (False, True):
        own = model.value_bias(sae.site.layer, norm_bias)
        if own is not None and bool((own.to(sae.device) == sae.offset).all()):
            bias = model.value_bias(layer, norm_bias)
            return None if bias is None else bias.to(sae.device)
    return sae.offset


# ---- the model ---------------------------------------------------------------------------------------------------


def _predicts(model: Model, measured: Measured, figures: dict[str, float]) -> Iterator[Finding]:
    uniform = math.log(model.d_vocab)
    figures["loss"] = loss = measured.plain / measured.count
    fine = loss < RANDOM * uniform
    why = "" if fine else "the model does not predict text: its weights are random, or another model's"
    if math.isnan(loss):
        why = "the model's numbers ran over (NaN): open it in a dtype of wider range (bfloat16, float32)"
    wanted = f"under {RANDOM * uniform:.2f} (a blind guess costs {uniform:.2f})"
    yield Finding("the model predicts text", f"{loss:.2f} nats a token", wanted, fine, why)


# ---- the SAE at its place ----------------------------------------------------------------------------------------


def _explains(
    sae: Sae,
    measured: Measured,
    bases: Mapping[str, Sae],
    blocks: Mapping[str, Sae],
    figures: dict[str, float],
    wrong_basis: float,
) -> Iterator[Finding]:
    """What is left unexplained here, at the same place of other blocks, and in other bases."""
    shares = {name: left.share for name, left in measured.left.items()}
    here, errors = shares["here"], measured.left["here"].errors
    figures["explained"] = 1 - here
    figures |= {f"explained, {'--basis ' * (name in bases)}{name}": 1 - shares[name] for name in (*bases, *blocks)}
    # Some published SAEs explain little, and say so.
    bar = min(EXPLAINED, sae.stated.get("explained", 1.0) - STATED_EXPLAINED)
    why = ""
    if not here <= 1 - bar:  # NaN included
        why = (
            "it explains no place of this model: it was trained on another model, or on another training stage of it "
            "(base against instruct)"
        )
    known = [name for name in blocks if not math.isnan(shares[name])]
    best = min(known, key=lambda name: shares[name], default="here")
    if here > ROUNDING and shares[best] < min(WRONG_BLOCK * here, 1 - EXPLAINED):
        wrong = "site" if blocks[best].site.layer == sae.site.layer else "layer"
        why = f"it explains {1 - shares[best]:.3f} {best}: it is at the wrong {wrong}"
    for name in bases:
        # Centring moves values little in some models; on every single text it is no accident all the same, least of
        # all where this model cannot be in the basis that is assumed.
        always = all(mine > other for mine, other in zip(errors, measured.left[name].errors, strict=True))
        if here > ROUNDING and always and shares[name] < min(wrong_basis * here, 1 - EXPLAINED, shares[best]):
            why = f"it explains {1 - shares[name]:.3f} with --basis {name}: it is read in the wrong basis"
    wanted = f"over {bar:.2g}, and no better elsewhere"
    yield Finding("explained variance", f"{1 - here:.3f}", wanted, not why, why)


def _spliced(measured: Measured, figures: dict[str, float]) -> Iterator[Finding]:
    plain, spliced, zeros = (nats / measured.count for nats in (measured.plain, measured.spliced, measured.zeros))
    # Where zeros do not hurt, nothing can be recovered.
    recovered = (zeros - spliced) / (zeros - plain) if zeros > plain else float("nan")
    figures |= {"loss, spliced": spliced, "loss, zeros": zeros, "loss recovered": recovered}
    fine = spliced - plain <= HURTS or recovered >= RECOVERED
    way = f", {recovered:.3f} of the way" if zeros > plain else ","
    yield Finding(
        "loss with the SAE spliced in",
        f"{spliced:.2f} nats a token{way} from zeros ({zeros:.2f}) to plain ({plain:.2f})",
        f"at least {RECOVERED:g} of the way, or {HURTS:g} nats above plain at most",
        fine,
        "" if fine else "what it leaves out is what the model needs: it was trained on another model, layer or basis",
    )


def _stated(sae: Sae, measured: Measured, figures: dict[str, float]) -> Iterator[Finding]:
    """L0 and explained variance against what the release states."""
    figures["L0"] = got = measured.lit / measured.left["here"].tokens
    stated = sae.stated.get("l0")
    near = stated is None or 1 / STATED_L0 <= got / stated <= STATED_L0
    far = (
        "far from what its release states: it was trained on another model, training stage (base against instruct), "
        "layer or basis"
    )
    yield Finding(
        "features lit at a token (L0)",
        f"{got:.1f}",
        "unknown: its release states none" if stated is None else f"about {stated:g}, as its release states",
        near and got > 0,
        far if not near else "" if got else "no feature lights at any token: it was trained on another model",
    )
    stated, got = sae.stated.get("explained"), figures["explained"]
    if stated is not None:
        near = got > stated - STATED_EXPLAINED
        wanted = f"about {stated:.3f}"
        yield Finding("explained variance against the release's", f"{got:.3f}", wanted, near, "" if near else far)
