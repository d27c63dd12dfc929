"""Brings an SAE's L0, the features that fire on a token, to the k that was asked for, whatever the architecture.

The TopK families keep k features by themselves while they train. The others have a penalty, whose coefficient a
`Controller` moves. What is saved for inference has thresholds in all but TopK and standard: `calibrate` sets them from
activations that were not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.errors import UsageError

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE
    from torch import Tensor

ROWS = 2048  # tokens whose activations of all features are held at once
FAST, SLOW = 0.1, 0.02  # weights of a new error in the controller's two running means
AHEAD = 5.0  # what is looked ahead, in differences of the two: some 200 steps
WIDEST = 1.0  # error that the proportional part answers, at most
FARTHEST = math.log(1000)  # of the coefficient from its start


class Controller:
    """Moves a penalty's coefficient so that L0 comes to a target.

    A controller of the coefficient's logarithm on the error log(L0 / target). L0 follows the coefficient late, since
    weights must move first. So a proportional part answers at once, up to `gain` times an error of `WIDEST`, and the
    integral takes the error as it will be if L0 goes on as it does (from two running means of it): it waits while L0 is
    on its way. It is deterministic, and `state` is all that it knows.

    Args:
        target: the L0 to come to.
        start: the coefficient to start from.
        wait: updates that are answered with `start` alone: a warm-up of the coefficient or of the learning rate.
        rate: the most by which the integral moves at one update; 0.01 is an e-fold in 100 steps.
        gain: of the proportional part.

    Raises:
        UsageError: a target, start, rate or gain that is not above 0.
    """

    def __init__(self, target: float, start: float, *, wait: int = 0, rate: float = 0.01, gain: float = 1.0) -> None:
        given = (("target L0", target), ("coefficient to start from", start), ("rate", rate), ("gain", gain))
        for name, value in given:
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"the {name} must be a finite number above 0; got {value:g}")
        self.target, self.start, self.wait, self.rate, self.gain = target, start, wait, rate, gain
        self.integral, self.fast, self.slow, self.seen = 0.0, 0.0, 0.0, 0

    def update(self, l0: float) -> float:
        """The coefficient for the next step, from the L0 of this one: features that fired for each token."""
        self.seen += 1
        if self.seen <= self.wait:
            return self.start
        # An L0 of 0 is far below every target; its logarithm needs a number.
        error = math.log(max(l0, self.target * 1e-3) / self.target)
        if self.seen == self.wait + 1:
            self.fast = self.slow = error
        self.fast += FAST * (error - self.fast)
        self.slow += SLOW * (error - self.slow)
        ahead = self.fast + AHEAD * (self.fast - self.slow)
        self.integral += max(-self.rate, min(self.rate, 2 * self.rate * ahead))
        # Where the learning rate holds L0 back, a coefficient that ran away would drown the other losses for long.
        self.integral = max(-FARTHEST, min(FARTHEST, self.integral))
        return self.start * math.exp(self.integral + self.gain * max(-WIDEST, min(WIDEST, self.fast)))

    def state(self) -> dict[str, float]:
        """All that it knows, for a checkpoint."""
        return {"integral": self.integral, "fast": self.fast, "slow": self.slow, "seen": float(self.seen)}

    def load(self, state: dict[str, float]) -> None:
        """Goes on from a `state` of a controller with the same arguments."""
        self.integral, self.fast, self.slow = state["integral"], state["fast"], state["slow"]
        self.seen = int(state["seen"])


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        before: mean L0 on the batches as training left the SAE, in its inference form.
        after: the same with what was set.
        changed: what was set: "threshold" (one for all features), "thresholds" (each times `by`), "b_gate" or "".
        by: the new threshold, the factor, or what the gates were lowered by, times decoder norm.
    """

    before: float
    after: float
    changed: str = ""
    by: float = 0.0


def calibrate(sae: TrainingSAE[Any], batches: Sequence[Tensor], k: float) -> Calibration:
    """Sets what the inference form needs so that the mean L0 of these activations is k.

    - batchtopk, matryoshka: sae-lens saves them as JumpReLU SAEs with one threshold, a running mean of each batch's
      smallest activation; it becomes the exact quantile.
    - jumprelu: all thresholds are multiplied by one number, the quantile of activation / threshold.
    - gated: each `b_gate` is lowered by one number over the feature's decoder norm, which leaves the sizes of what
      fires as they are. Only features whose magnitude is above 0 can fire.
    - topk keeps exactly k, or fewer where fewer are positive, and standard has no threshold: both stay as they are.

    Between the entry that is the last to fire and the first that is not, the threshold lies half way. Where no
    threshold can bring L0 to k (fewer positive activations, thresholds of 0), `after` comes as near as it can.

    Args:
        sae: a trained SAE of `training_sae`, before `save_inference_model`; changed in place.
        batches: activations [tokens, d_in] each, held out, scaled as the SAE takes them (raw once its scaling factor is
            folded). They are read several times.
        k: mean L0 to reach.

    Raises:
        UsageError: no tokens, or a k that is not between 0 and d_sae.
    """
    import torch

    if not 0 < k < sae.cfg.d_sae:
        raise UsageError(f"k must lie between 0 and the SAE's {sae.cfg.d_sae} features; got {k:g}")
    tokens = sum(map(len, batches))
    if not tokens:
        raise UsageError("calibration needs held-out activations; got none")
    with torch.no_grad():
        held: Any = sae
        if hasattr(held, "threshold"):
            held.threshold.clamp_(min=0)  # as each training step does before it encodes
        before = _l0(sae, batches)
        architecture = sae.cfg.architecture()
        if architecture not in _FORMS:
            return Calibration(before, before)
        form = _FORMS[architecture]
        by = _cut(lambda x: form.scores(sae, x), form.least, batches, round(k * tokens))
        form.set(sae, by)
        return Calibration(before, _l0(sae, batches), form.changed, by)


def start_sparse(sae: TrainingSAE[Any], sample: Tensor, l0: float) -> None:
    """Sets the first thresholds (jumprelu) or biases (gated, standard) of fresh weights so that each feature fires on
    the same share of these activations, l0 of them on a token.

    Fresh weights let half of all features fire. A penalty brings that down only as fast as thresholds move, a learning
    rate at a step, and drowns the reconstruction meanwhile; with one threshold for all, most features would never fire
    and die. The TopK families need none of it.

    Args:
        sae: changed in place.
        sample: [tokens, d_in], scaled as the SAE takes them.
    """
    import torch

    held: Any = sae
    with torch.no_grad():
        pre = _pre(held, sample[:ROWS]) if hasattr(held, "b_enc") else held.process_sae_in(sample[:ROWS]) @ held.W_enc
        fired = max(1, round(l0 / held.cfg.d_sae * len(pre)))
        cut = pre.topk(min(fired + 1, len(pre)), dim=0).values[-1]
        architecture = held.cfg.architecture()
        if architecture == "jumprelu":
            held.threshold.copy_(cut.clamp_min(1e-3))
        elif architecture == "gated":
            held.b_gate.copy_(-cut)
        elif architecture == "standard":
            held.b_enc.sub_(cut)


def single_threshold(sae: TrainingSAE[Any], batches: Sequence[Tensor], k: float) -> float:
    """The threshold above which a standard SAE's mean L0 on these activations is k; 0 where fewer fire anyway."""
    import torch

    with torch.no_grad():
        return _cut(lambda x: _pre(sae, x), 0.0, batches, round(k * sum(map(len, batches))))


# ---- each architecture's scores: an entry fires if and only if its score is above the cut ---------------------------


def _pre(sae: Any, x: Tensor) -> Tensor:
    return sae.process_sae_in(x) @ sae.W_enc + sae.b_enc


def _batchtopk_scores(sae: Any, x: Tensor) -> Tensor:
    pre = _pre(sae, x)
    return pre * sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else pre


def _set_threshold(sae: Any, cut: float) -> None:
    sae.topk_threshold.fill_(cut)


def _jumprelu_scores(sae: Any, x: Tensor) -> Tensor:
    # A threshold of 0 stays 0 whatever it is multiplied by: its features fire wherever they are positive.
    return _pre(sae, x) / sae.threshold


def _scale_thresholds(sae: Any, cut: float) -> None:
    sae.threshold.mul_(cut)


def _gated_scores(sae: Any, x: Tensor) -> Tensor:
    import torch

    product = sae.process_sae_in(x) @ sae.W_enc
    score = (product + sae.b_gate) * sae.W_dec.norm(dim=1)
    return score.masked_fill_(product * sae.r_mag.exp() + sae.b_mag <= 0, -torch.inf)


def _lower_gates(sae: Any, cut: float) -> None:
    sae.b_gate.sub_(cut / sae.W_dec.norm(dim=1))


@dataclass(frozen=True)
class _Form:
    scores: Callable[[Any, Tensor], Tensor]
    set: Callable[[Any, float], None]
    changed: str
    least: float


_FORMS = {
    "batchtopk": _Form(_batchtopk_scores, _set_threshold, "threshold", 0.0),
    "matryoshka_batchtopk": _Form(_batchtopk_scores, _set_threshold, "threshold", 0.0),
    "jumprelu": _Form(_jumprelu_scores, _scale_thresholds, "thresholds", 0.0),
    "gated": _Form(_gated_scores, _lower_gates, "b_gate", -math.inf),
}


def _pieces(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.split(ROWS)


def _l0(sae: Any, batches: Sequence[Tensor]) -> float:
    """Mean L0 of the inference form."""
    fired = 0
    for x in _pieces(batches):
        if hasattr(sae, "topk_threshold"):
            # Its training form chooses within the batch; the JumpReLU SAE that is saved goes by the threshold.
            acts = _batchtopk_scores(sae, x) > sae.topk_threshold.float()
        else:
            acts = sae.encode(x)
        fired += int(acts.count_nonzero())
    return fired / sum(map(len, batches))


def _cut(scores: Callable[[Tensor], Tensor], least: float, batches: Sequence[Tensor], wanted: int) -> float:
    """The score above which `wanted` scores of all batches lie, not under `least`."""
    import torch

    kept, bound = torch.empty(0, device=batches[0].device), least
    for x in _pieces(batches):
        found = scores(x).flatten()
        kept = torch.cat([kept, found[found > bound]])
        if len(kept) > 2 * wanted + 1:
            kept = kept.topk(wanted + 1, sorted=False).values
            bound = float(kept.min())
    if len(kept) <= wanted:
        return least if math.isfinite(least) or not len(kept) else float(kept.min()) - 1.0
    last, after = kept.topk(wanted + 1).values[-2:].tolist()
    if math.isfinite(last):
        return (last + after) / 2
    # More features than k fire whatever happens: the rest is silenced.
    finite = torch.cat([found[found.isfinite()] for found in (scores(x).flatten() for x in _pieces(batches))])
    return 2 * max(float(finite.max()), 1.0) if len(finite) else 1.0
