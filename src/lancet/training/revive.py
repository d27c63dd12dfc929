"""Dead features begin again where the input is rebuilt worst.

Neuron resampling (Bricken et al. 2023, "Towards Monosemanticity"), a few features often instead of all at once. An
auxiliary loss moves a dead feature by a learning rate at a step, and a training at home has few steps: after 488 of
them on 250,000 tokens 41 % of a Matryoshka SAE's 8,192 features never fired with AuxK alone, 8 % with this beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE
    from torch import Tensor

MOST = 4  # one token of so many in a batch is given a feature, at most
WEAK = 0.1  # of what is active: as strong as that is strong enough to be among a token's features


@torch.no_grad()
def revive(
    sae: TrainingSAE[Any],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    out: Tensor,
    acts: Tensor,
    dead: Tensor,
    share: float,
) -> Tensor:
    """Points dead features at the tokens of a batch that are rebuilt worst.

    Each gets the direction of one token's residual, a decoder row as long as those of the others, and a bias with which
    it fires on a share of the batch, this token among them if any; Adam's moments of it begin anew.

    Args:
        sae: of a TopK family, or jumprelu; changed in place.
        optimizer: Adam of its parameters, changed in place.
        x: [n, d_in] a batch, scaled as the SAE takes it; out: [n, d_in] what the SAE made of it.
        acts: [n, d_sae] its activations, dense or sparse COO.
        dead: [d_sae] bool.
        share: of the tokens on which each is to fire.

    Returns:
        [revived] the features.
    """
    held: Any = sae
    which = dead.nonzero()[: len(x) // MOST, 0]
    values = acts.coalesce().values() if acts.is_sparse else acts.flatten()
    values = values[values > 0]
    has_level = hasattr(held, "threshold") or len(values) > 0
    if not len(which) or not has_level or bool(dead.all()):
        return which[:0]
    residual = x - out
    worst = residual.norm(dim=1).topk(len(which)).indices
    rows = torch.nn.functional.normalize(residual[worst], dim=1)
    usual = held.W_dec.norm(dim=1)[~dead].median()
    if hasattr(held, "threshold"):
        level = held.threshold[which]
    else:
        level = values.kthvalue(1 + int(WEAK * (len(values) - 1))).values
        level = level / usual if held.cfg.rescale_acts_by_decoder_norm else level
    fired = min(max(1, round(share * len(x))), len(x) - 1)
    strongest = (held.process_sae_in(x) @ rows.T).topk(fired + 1, dim=0).values
    held.W_enc[:, which] = rows.T
    held.W_dec[which] = usual * rows
    held.b_enc[which] = level - strongest[-1]
    for name, parameter in held.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][key]
            if name == "W_enc":
                state[:, which] = 0
            elif name != "b_dec":  # which alone has no part for each feature
                state[which] = 0
    return which
