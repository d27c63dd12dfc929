"""The fast training steps against sae-lens' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from lancet.errors import UnknownName, UsageError
from lancet.training import sparse
from lancet.training.architectures import ARCHITECTURES, PENALTIES, training_sae

PENALISED = tuple(PENALTIES)
SHAPES = [(24, 96, 50), (17, 130, 33)]  # d_in, d_sae, tokens; 33 * 130 entries are no whole number of words


def both(arch: str, d_in: int, d_sae: int, **options: Any) -> tuple[Any, Any]:
    """sae-lens' and ours, with the same weights; every parameter away from its start."""
    widths = (d_in // 3, d_in + 8) if arch == "matryoshka" else ()
    k = 6 if arch == "topk" else 6.5
    made = [training_sae(arch, d_in, d_sae, k, widths=widths, fast=fast, **options) for fast in (False, True)]
    theirs, ours = made
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        if arch == "jumprelu":
            theirs.threshold.abs_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sparser(sae: Any, by: float) -> None:
    """Lowers what decides whether a feature fires, so that few do."""
    with torch.no_grad():
        (sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc).sub_(by)


def step(sae: Any, arch: str, x: Tensor, mask: Tensor | None) -> TrainStepOutput:
    coefficients = {PENALTIES[arch].name: 0.7} if arch in PENALTIES else {}
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False
        )
    )
    output.loss.backward()
    return output


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-9, what


def dense(values: Tensor) -> Tensor:
    return values.detach().to_dense() if values.is_sparse else values.detach()


def compare(arch: str, theirs: Any, ours: Any, x: Tensor, mask: Tensor | None) -> TrainStepOutput:
    a, b = step(theirs, arch, x, mask), step(ours, arch, x, mask)
    assert set(a.losses) == set(b.losses)
    assert set(a.metrics) == set(b.metrics)
    for name, loss in a.losses.items():
        close(b.losses[name].detach(), loss.detach(), name)
    close(b.loss.detach(), a.loss.detach(), "loss")
    close(b.sae_out.detach(), a.sae_out.detach(), "sae_out")
    close(b.hidden_pre.detach(), a.hidden_pre.detach(), "hidden_pre")
    close(dense(b.feature_acts), dense(a.feature_acts), "feature_acts")
    firing = [output.feature_acts.bool().float().sum(-2) for output in (a, b)]  # as sae-lens' trainer counts
    assert torch.equal(dense(firing[0]), dense(firing[1]))
    for (name, p), (other, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(q.grad, p.grad, name)
    for (name, p), (_, q) in zip(theirs.named_buffers(), ours.named_buffers(), strict=True):
        close(q, p, name)
    return b


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [0, 5, 40])
@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name not in PENALISED])
@pytest.mark.parametrize("rescale", [True, False])
def test_topk_families_equal_sae_lens(
    arch: str, shape: tuple[int, int, int], dead: int, rescale: bool, seed: int
) -> None:
    d_in, d_sae, n = shape
    torch.manual_seed(seed)
    theirs, ours = both(arch, d_in, d_sae, aux=0.3, rescale_acts_by_decoder_norm=rescale)
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[torch.randperm(d_sae)[:dead]] = True
    found = compare(arch, theirs, ours, torch.randn(n, d_in) * 3, mask)
    assert found.feature_acts.is_sparse
    assert (float(found.losses["auxiliary_reconstruction_loss"].detach()) > 0) == (dead > 0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [0, 5, 40])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("arch", PENALISED)
def test_penalised_families_equal_sae_lens(
    arch: str, shape: tuple[int, int, int], dead: int, few: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    d_in, d_sae, n = shape
    torch.manual_seed(seed)
    theirs, ours = both(arch, d_in, d_sae, aux=0)
    for sae in (theirs, ours):
        if few:
            sparser(sae, 1.7)
        if hasattr(sae, "bandwidth"):
            sae.bandwidth = 0.4 if few else 0.05
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[torch.randperm(d_sae)[:dead]] = True
    x = torch.randn(n, d_in) * 3
    found = compare(arch, theirs, ours, x, mask)
    assert found.feature_acts.is_sparse == few  # the way that is meant was taken, and it is the other one below
    assert float(dense(found.feature_acts).count_nonzero()) > 20
    for module in ("relu_steps", "gated_steps"):
        monkeypatch.setattr(f"lancet.training.{module}.DENSE_ABOVE", -1 if few else 2)
    for sae in (theirs, ours):
        sae.zero_grad()
    assert compare(arch, theirs, ours, x, mask).feature_acts.is_sparse != few


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("to_input", [True, False])
@pytest.mark.parametrize("mode", ["step", "quadratic", "tanh"])
@pytest.mark.parametrize("pre_act", [None, 0.03])
def test_jumprelu_variants_equal_sae_lens(pre_act: float | None, mode: str, to_input: bool, few: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = both("jumprelu", 24, 96, aux=0)
    for sae in (theirs, ours):
        sae.cfg.jumprelu_sparsity_loss_mode, sae.cfg.jumprelu_ste_to_input, sae.cfg.target_l0 = mode, to_input, 5.0
        sae.cfg.pre_act_loss_coefficient = pre_act
        if few:
            sparser(sae, 1.7)
        sae.bandwidth = 0.4
    mask = torch.arange(96) < 9
    found = compare("jumprelu", theirs, ours, torch.randn(50, 24) * 3, mask)
    assert found.feature_acts.is_sparse == (few and mode == "step" and pre_act is None)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dead", [0, 5, 40])
def test_jumprelus_dead_features_rebuild_what_is_left(dead: int, few: bool) -> None:
    """Against autograd on a plain loop over tokens."""
    torch.manual_seed(0)
    plain, ours = both("jumprelu", 24, 96, aux=0)[1], both("jumprelu", 24, 96, aux=0.3)[1]
    ours.load_state_dict(plain.state_dict())
    for sae in (plain, ours):
        if few:
            sparser(sae, 1.7)
    mask = torch.zeros(96, dtype=torch.bool)
    mask[torch.randperm(96)[:dead]] = True
    x = torch.randn(50, 24) * 3
    found, before = step(ours, "jumprelu", x, mask), step(plain, "jumprelu", x, mask)
    assert found.feature_acts.is_sparse == few
    W_enc, b_enc, W_dec, b_dec = (plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec)
    which, total = mask.nonzero()[:, 0], torch.tensor(0.0)
    for row, out in zip(x, before.sae_out.detach(), strict=True):
        if not dead:
            break
        pre = (row - b_dec * plain.cfg.apply_b_dec_to_input) @ W_enc[:, which] + b_enc[which]
        best = pre.argsort(descending=True)[: min(12, dead)]
        rebuilt = sum(pre[i].clamp(min=0) * W_dec[which[i]] for i in best)
        total = total + 0.3 * min(dead / 12, 1) * (row - out - rebuilt).pow(2).sum() / len(x)
    close(found.losses["auxiliary_reconstruction_loss"].detach(), total.detach(), "loss")
    if dead:
        total.backward()  # on top of the gradients of the step without it
    for (name, p), (_, q) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        close(q.grad, p.grad, name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_fires_and_no_mask(arch: str) -> None:
    torch.manual_seed(0)
    theirs, ours = both(arch, 12, 40, aux=0)
    for sae in (theirs, ours):
        sparser(sae, 100.0)
    found = compare(arch, theirs, ours, torch.randn(9, 12), None)
    assert not dense(found.feature_acts).any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_saved_is_what_sae_lens_saves(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, ours = both(arch, 12, 40)
    x = torch.randn(30, 12)
    read = []
    for sae, name in ((theirs, "theirs"), (ours, "ours")):
        step(sae, arch, x, None)
        sae.fold_activation_norm_scaling_factor(1.7)
        sae.save_inference_model(str(tmp_path / name))
        read.append(SAE.load_from_disk(str(tmp_path / name)))
    assert type(read[0]) is type(read[1])
    assert read[0].cfg.to_dict() == read[1].cfg.to_dict()
    close(read[1](x), read[0](x), "output")


def test_entries_are_those_of_nonzero() -> None:
    for shape in ((5, 7), (8, 16), (1, 8)):
        mask = torch.rand(shape) < 0.2
        rows, cols = sparse.entries(mask)
        assert torch.equal(torch.stack([rows, cols], 1), mask.nonzero())


@pytest.mark.parametrize(
    ("arch", "options", "told"),
    [
        ("topk", {"k": 3.5}, "whole"),
        ("batchtopk", {"k": 0}, "above 0"),
        ("batchtopk", {"k": 41}, "at most"),
        ("batchtopk", {"sparsity": 1.0}, "no sparsity penalty"),
        ("standard", {"sparsity": -1.0}, "above 0"),
        ("standard", {"widths": (3, 5)}, "only matryoshka"),
        ("matryoshka", {}, "needs widths"),
        ("matryoshka", {"widths": (8, 4)}, "rise"),
        ("matryoshka", {"widths": (8, 44)}, "at most 40"),
    ],
)
def test_what_cannot_be_is_refused(arch: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        training_sae(arch, 12, 40, options.pop("k", 4), **options)
    with pytest.raises(UnknownName):
        training_sae("relu", 12, 40, 4)
