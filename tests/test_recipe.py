"""The recipe's sparse training step against sae-lens' own dense one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "smollm2"))
from sparse_step import SparseBatchTopK, SparseMatryoshka


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("dead", [0, 5, 40])
def test_sparse_step_equals_sae_lens(matryoshka: bool, dead: int) -> None:
    torch.manual_seed(0)
    common = {"d_in": 24, "d_sae": 96, "k": 6.5, "dtype": "float32", "device": "cpu"}
    if matryoshka:
        config = MatryoshkaBatchTopKTrainingSAEConfig(**common, matryoshka_widths=[8, 32, 96])
        theirs, ours = MatryoshkaBatchTopKTrainingSAE(config), SparseMatryoshka(config)
    else:
        config = BatchTopKTrainingSAEConfig(**common)
        theirs, ours = BatchTopKTrainingSAE(config), SparseBatchTopK(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours.load_state_dict(theirs.state_dict())
    mask = torch.zeros(96, dtype=torch.bool)
    mask[torch.randperm(96)[:dead]] = True
    step = TrainStepInput(
        sae_in=torch.randn(50, 24) * 3,
        coefficients={},
        dead_neuron_mask=mask,
        n_training_steps=0,
        is_logging_step=False,
    )
    outputs = {}
    for name, sae in (("theirs", theirs), ("ours", ours)):
        output = sae.training_forward_pass(step)
        output.loss.backward()
        outputs[name] = output
    torch.testing.assert_close(outputs["ours"].loss, outputs["theirs"].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        outputs["ours"].feature_acts.to_dense(), outputs["theirs"].feature_acts, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-5, atol=1e-7)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max()), msg=name)
