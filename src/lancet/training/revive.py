"""Dead features are given another beginning: pointed at what is rebuilt worst.

Neuron resampling (Bricken et al. 2023, "Towards Monosemanticity"), a few features often instead of all at once, so that
hundreds of steps are enough: an auxiliary loss moves a dead feature by a learning rate at a step, and at home there are
few steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE
    from torch import Tensor

MOST = 4  # one token of so many in a batch is given a feature, at most


@torch.no_grad()
def revive(
    sae: TrainingSAE[Any], optimizer: torch.optim.Optimizer, x: Tensor, residual: Tensor, dead: Tensor, share: float
) -> Tensor:
    """Points dead features at the tokens of a batch that are rebuilt worst.

    Each gets the direction of one token's residual, a decoder row as long as those of the others, and a bias with which
    it fires on a share of the tokens; Adam's moments of it begin anew.

    Args:
        sae: changed in place.
        optimizer: Adam of its parameters, changed in place.
        x: [n, d_in] a batch, scaled as the SAE takes it.
        residual: [n, d_in] what is left of it.
        dead: [d_sae] bool.
        share: of the tokens on which each is to fire.

    Returns:
        [revived] the features.
    """
    held: Any = sae
    which = dead.nonzero()[: len(x) // MOST, 0]
    if not len(which) or bool(dead.all()):
        return which[:0]
    worst = residual.norm(dim=1).topk(len(which)).indices
    rows = torch.nn.functional.normalize(residual[worst], dim=1)
    norms = held.W_dec.norm(dim=1)
    usual = norms[~dead].median()
    pre = held.process_sae_in(x) @ rows.T
    cut = pre.topk(max(1, round(share * len(x))), dim=0).values[-1]
    held.W_enc[:, which] = rows.T.to(held.W_enc)
    held.W_dec[which] = usual * rows
    if hasattr(held, "threshold"):
        level = held.threshold[which]
    elif hasattr(held, "topk_threshold"):
        level = held.topk_threshold / usual if held.cfg.rescale_acts_by_decoder_norm else held.topk_threshold
    else:
        level = torch.zeros_like(cut)
    held.b_enc[which] = (level - cut).to(held.b_enc)
    for name, parameter in held.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][key]
            if name == "W_enc":
                state[:, which] = 0
            elif len(state) == len(dead):
                state[which] = 0
    return which
