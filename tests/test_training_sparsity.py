"""L0 comes to k: while training by the controller, after it by calibration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from lancet.errors import UsageError
from lancet.training.architectures import ARCHITECTURES, PENALTIES, training_sae
from lancet.training.sparsity import Controller, calibrate, single_threshold, start_sparse

D_IN, D_SAE, K = 32, 64, 6


class Truth:
    """Activations that are sums of about four of 48 known directions, of mean norm sqrt(d_in)."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=self.random), dim=1)
        self.factor = 1.0
        self.factor = math.sqrt(D_IN) / float(self(2000).norm(dim=1).mean())

    def __call__(self, tokens: int) -> Tensor:
        on = torch.rand(tokens, 48, generator=self.random) < 4 / 48
        return (on * (1 + torch.rand(tokens, 48, generator=self.random))) @ self.directions * self.factor


@pytest.mark.parametrize("arch", PENALTIES)
def test_the_controller_brings_l0_to_k(arch: str) -> None:
    torch.manual_seed(0)
    truth, steps, rate = Truth(), 900, 5e-3
    sae: Any = training_sae(arch, D_IN, D_SAE, K)
    optimiser = torch.optim.Adam(sae.parameters(), lr=rate)
    penalty = PENALTIES[arch]
    controller, coefficient, seen = Controller(K, penalty.start, gain=penalty.gain), penalty.start, []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (steps - step) / (0.2 * steps))
        output = sae.training_forward_pass(TrainStepInput(truth(128), {penalty.name: coefficient}, None, step, False))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seen.append(float(output.feature_acts.detach().bool().float().sum()) / 128)
        coefficient = controller.update(seen[-1])
    assert seen[0] > 3 * K  # it had a way to go
    assert abs(sum(seen[-20:]) / 20 / K - 1) < 0.1
    x = truth(1000)
    explained = 1 - float((sae(x) - x).detach().pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert explained > 0.6  # L0 came to k with the input still rebuilt


def test_the_controller_waits_is_bounded_and_resumes() -> None:
    controller = Controller(32, 2.0, wait=3, rate=0.01)
    assert [controller.update(500) for _ in range(3)] == [2.0] * 3
    first = controller.update(500)
    assert 2.0 * math.exp(1.0) < first <= 2.0 * math.exp(1.01) * 1.0001
    held = controller.state()
    after = [controller.update(l0) for l0 in (400, 90, 20, 0)]
    other = Controller(32, 2.0, wait=3, rate=0.01)
    other.load(held)
    assert [other.update(l0) for l0 in (400, 90, 20, 0)] == after
    for _ in range(5000):
        least = other.update(0)
    assert 0 < least < 2.0 / 1000
    for bad in ((0, 1.0), (32, 0.0), (math.nan, 1.0)):
        with pytest.raises(UsageError, match="above 0"):
            Controller(*bad)
    with pytest.raises(UsageError, match="gain"):
        Controller(32, 1.0, gain=0)


def wandered(arch: str) -> Any:
    """An SAE whose weights are all away from their start, and whose L0 is not k."""
    torch.manual_seed(1)
    sae: Any = training_sae(arch, D_IN, D_SAE, K, widths=(16, 32) if arch == "matryoshka" else ())
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if arch == "jumprelu":
            sae.threshold.abs_()
    return sae


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_calibration_sets_the_saved_saes_l0(arch: str, rescale: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lancet.training.sparsity.ROWS", 150)
    truth, sae = Truth(), wandered(arch)
    if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
        sae.cfg.rescale_acts_by_decoder_norm = rescale
    batches = [truth(400), truth(100), truth(1)]
    x = torch.cat(batches)
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    found = calibrate(sae, batches, K)
    sae.save_inference_model(str(tmp_path))
    saved = SAE.load_from_disk(str(tmp_path))
    fired = sum(int((saved.encode(row[None]) > 0).sum()) for row in x)  # a plain loop over what users load
    assert fired / len(x) == pytest.approx(found.after, rel=2e-3)
    changed = {name for name, value in sae.state_dict().items() if not torch.equal(value, weights[name])}
    if arch in ("standard", "topk"):
        assert not changed
        assert found.before == found.after
        assert not found.changed
    else:
        assert abs(found.after / K - 1) < 0.02
        assert abs(found.before / K - 1) > 0.1
        assert changed - {"threshold"} <= {"topk_threshold", "b_gate"}
        assert found.changed


@pytest.mark.parametrize("arch", PENALTIES)
def test_fresh_features_fire_alike_often(arch: str) -> None:
    truth = Truth()
    sae: Any = training_sae(arch, D_IN, D_SAE, K)
    sample = truth(1600)
    before = (sae.encode(sample) > 0).float().mean(0)
    start_sparse(sae, sample, 2 * K)
    after = (sae.encode(sample) > 0).float().mean(0)
    assert before.mean() > 2 * 2 * K / D_SAE
    share = 2 * K / D_SAE
    assert after.mean() == pytest.approx(share, rel=0.1)
    assert after.max() <= share + 2 / 1600 and (after > share / 2).float().mean() > 0.9
    fresh = truth(1600)
    assert (sae.encode(fresh) > 0).float().sum(1).mean() == pytest.approx(2 * K, rel=0.25)


def test_the_single_threshold_of_a_standard_sae() -> None:
    truth, sae = Truth(), wandered("standard")
    batches = [truth(300), truth(100)]
    cut = single_threshold(sae, batches, 2.0)
    acts = sae.encode(torch.cat(batches))
    assert cut > 0 and int((acts > cut).sum()) == 800
    assert single_threshold(sae, batches, D_SAE - 1) == 0


def test_the_threshold_is_the_quantile() -> None:
    truth, sae = Truth(), wandered("batchtopk")
    batches = [truth(60), truth(40)]
    calibrate(sae, batches, K)
    scores = []
    for row in torch.cat(batches):
        pre = (row - sae.b_dec) @ sae.W_enc + sae.b_enc
        scores += (pre * sae.W_dec.norm(dim=1)).tolist()
    scores.sort(reverse=True)
    assert scores[100 * K] < float(sae.topk_threshold) < scores[100 * K - 1]


def test_what_no_threshold_can_reach_is_told() -> None:
    truth, sae = Truth(), wandered("jumprelu")
    found = calibrate(sae, [truth(200)], D_SAE - 1)  # more than are positive
    assert found.after < D_SAE - 1
    assert not sae.threshold.any()
    few = wandered("jumprelu")
    with torch.no_grad():
        few.threshold.fill_(1.0)[:32] = 0.0  # these fire whenever they are positive
    found = calibrate(few, [truth(200)], 0.5)
    acts = few.encode(truth(200))
    assert found.after > 1
    assert int((acts[:, 32:] > 0).sum()) == 0
    with pytest.raises(UsageError, match="got none"):
        calibrate(few, [], 3)
    with pytest.raises(UsageError, match="between 0"):
        calibrate(few, [truth(5)], 64)
