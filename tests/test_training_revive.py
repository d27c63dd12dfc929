"""Dead features begin again where the input is rebuilt worst."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from lancet.training.architectures import PENALTIES, training_sae
from lancet.training.config import TrainConfig
from lancet.training.revive import revive
from lancet.training.trainer import REVIVED, Learner

D_IN, D_SAE, N, SHARE = 24, 96, 400, 6 / 96
FAR = 30.0  # below everything: what is dead


def stepped(arch: str, x: Tensor, dead: Tensor) -> tuple[Any, torch.optim.Adam, Any]:
    """An SAE after a step of Adam, the step's output, and some features that fire on nothing."""
    torch.manual_seed(0)
    widths = (16, 40) if arch == "matryoshka" else ()
    sae: Any = training_sae(arch, D_IN, D_SAE, 6, widths=widths)
    with torch.no_grad():
        sae.b_enc[dead] = -FAR
        if arch == "jumprelu":
            sae.threshold.fill_(0.7)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-3)
    coefficients = {PENALTIES[arch].name: 0.1} if arch in PENALTIES else {}
    output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
    output.loss.backward()
    optimizer.step()
    return sae, optimizer, output


@pytest.mark.parametrize("rows", ["sparse", "dense"])
@pytest.mark.parametrize("arch", REVIVED)
def test_dead_features_fire_again_and_nothing_else_changes(arch: str, rows: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(N, D_IN) * 2
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE)[:9]] = True
    sae, optimizer, output = stepped(arch, x, dead)
    acts = output.feature_acts.detach()
    if acts.is_sparse == (rows == "dense"):
        acts = acts.to_dense() if acts.is_sparse else acts.to_sparse_coo()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    out = output.sae_out.detach()
    revived = revive(sae, optimizer, x, out, acts, dead, SHARE)
    assert torch.equal(revived, dead.nonzero()[:, 0])

    residual = x - out
    worst = residual.norm(dim=1).argsort(descending=True)[: len(revived)]
    cosine = torch.nn.functional.cosine_similarity(sae.W_dec[revived], residual[worst])
    assert float(cosine.min().detach()) > 1 - 1e-5
    assert (
        float(torch.nn.functional.cosine_similarity(sae.W_enc[:, revived].T, residual[worst]).min().detach()) > 1 - 1e-5
    )
    norms = before["W_dec"][~dead].norm(dim=1)
    assert torch.allclose(sae.W_dec[revived].norm(dim=1), norms.median().expand(len(revived)))
    for name, parameter in sae.named_parameters():
        columns = parameter.detach().T if name == "W_enc" else parameter.detach()
        earlier = before[name].T if name == "W_enc" else before[name]
        if len(columns) == D_SAE:
            assert torch.equal(columns[~dead], earlier[~dead]), name
        else:
            assert torch.equal(columns, earlier), name
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][key]
            state = state.T if name == "W_enc" else state
            if len(state) == D_SAE:
                assert not state[dead].any(), (name, key)
                assert state[~dead].any(), (name, key)

    # Each is now as strong as what fires, on the share that was asked for.
    pre = (x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc[:, revived] + sae.b_enc[revived]
    held = acts.to_dense() if acts.is_sparse else acts
    weak = held[held > 0].sort().values[int(0.1 * (int((held > 0).sum()) - 1))]
    level = sae.threshold[revived] if arch == "jumprelu" else weak / norms.median()
    fired = (pre > level - 1e-5).float().sum(0)
    assert ((fired - round(SHARE * N)).abs() <= 1).all(), fired


@pytest.mark.parametrize("arch", REVIVED)
def test_no_more_than_a_part_of_the_batch_and_never_all(arch: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(20, D_IN) * 2
    dead = torch.arange(D_SAE) < 30
    sae, optimizer, output = stepped(arch, x, dead)
    acts, out = output.feature_acts.detach(), output.sae_out.detach()
    assert len(revive(sae, optimizer, x, out, acts, torch.ones(D_SAE, dtype=torch.bool), SHARE)) == 0
    if arch != "jumprelu":  # its thresholds tell how strong is strong enough
        assert len(revive(sae, optimizer, x, out, acts * 0, dead, SHARE)) == 0
    assert len(revive(sae, optimizer, x, out, acts, torch.zeros(D_SAE, dtype=torch.bool), SHARE)) == 0
    assert torch.equal(revive(sae, optimizer, x, out, acts, dead, SHARE), torch.arange(5))
    assert len(revive(sae, optimizer, x, out, acts, dead, 0.99)) == 5  # a share that every token would be in


def test_the_decoders_bias_keeps_its_moments_where_it_is_as_long_as_there_are_features() -> None:
    torch.manual_seed(0)
    x, dead = torch.randn(N, D_IN) * 2, torch.arange(D_IN) < 5
    sae: Any = training_sae("batchtopk", D_IN, D_IN, 6)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-3)
    output = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    output.loss.backward()
    optimizer.step()
    before = optimizer.state[sae.b_dec]["exp_avg"].clone()
    assert len(revive(sae, optimizer, x, output.sae_out.detach(), output.feature_acts.detach(), dead, SHARE)) == 5
    assert before[:5].all() and torch.equal(optimizer.state[sae.b_dec]["exp_avg"], before)


@pytest.mark.parametrize(("arch", "aux"), [(arch, 1.0) for arch in REVIVED] + [("topk", 0.0), ("gated", 1.0)])
def test_a_learner_wakes_them_until_the_rate_falls(arch: str, aux: float) -> None:
    """Features that are made dead come back before the learning rate falls, and stay dead after."""
    torch.manual_seed(0)
    widths = (16, 40) if arch == "matryoshka" else ()
    config = TrainConfig(
        sites="blocks.0.hook_resid_pre", features=D_SAE, k=6, arch=arch, widths=widths, aux=aux, dead_window=8 * 64,
        tokens=100 * 64, batch=64,
    )  # fmt: skip
    learner = Learner.new(config.saes()[0], config, D_IN, 64, 100, torch.device("cpu"))
    sample = torch.randn(512, D_IN) * 2
    learner.begin(sample.mean(0), float(sample.norm(dim=1).mean()), sample)
    sae: Any = learner.trainer.sae
    bias = sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc
    revived = []
    for step in range(100):
        if step in (30, 80):
            with torch.no_grad():
                bias[:40] = -FAR
        learner.step(torch.randn(64, D_IN) * 2)
        revived.append(int((bias[:40] > -FAR / 2).sum()))
    wakes = aux > 0 and arch in REVIVED
    assert (revived[60] == 40) == wakes
    assert revived[99] == 0
    assert list(learner.revives) == (list(range(2, 71, 2)) if wakes else [])
