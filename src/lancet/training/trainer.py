"""One SAE in training: sae-lens' `SAETrainer`, stepped from outside, and its whole state as tensors and numbers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from lancet.errors import DivergedError
from lancet.files import read_json, whole_file, write_json
from lancet.training.architectures import PENALTIES, training_sae
from lancet.training.revive import revive
from lancet.training.sparsity import Controller, calibrate, single_threshold, start_sparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lancet.training.config import Spec, TrainConfig

WINDOWS = (20_000, 1_000_000)  # tokens of silence, at least and at most, after which a feature is dead
PART = 25  # between them, one of so many parts of the training
REVIVED = ("topk", "batchtopk", "matryoshka", "jumprelu")
FIRST = 2  # times k: L0 of fresh weights where a penalty is steered
WINDOW = 1000  # steps over which sae-lens counts how often a feature fires
COUNTERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples")


@dataclass(eq=False)
class Learner:
    """An SAE and what trains it.

    Attributes:
        spec: which one.
        trainer: sae-lens'.
        steps: in all.
        controllers: coefficient's name -> what steers it; none where it is fixed or there is none.
        revives: the steps after which dead features begin again.
        figures: of the last step that was asked for them.
    """

    spec: Spec
    trainer: SAETrainer[Any, Any]
    steps: int
    controllers: dict[str, Controller]
    revives: range
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def new(cls, spec: Spec, config: TrainConfig, d_in: int, batch: int, steps: int, device: torch.device) -> Learner:
        """With fresh weights, which depend on the SAE's seed alone."""
        warm_up = int(steps * config.warm_up)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(spec.seed)
            sae = training_sae(
                config.arch,
                d_in,
                spec.features,
                spec.k,
                widths=config.widths,
                sparsity=config.sparsity,
                aux=config.aux,
                warm_up_steps=warm_up,
                device=str(device),
            )
        silence = min(WINDOWS[1], max(WINDOWS[0], steps * batch // PART))
        window = max(1, (config.dead_window or silence) // batch)
        decay = int(steps * config.decay)
        settings = SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=config.lr,
            lr_end=config.lr,
            lr_warm_up_steps=warm_up,
            lr_decay_steps=decay,
            device=str(device),
            dead_feature_window=window,
            feature_sampling_window=max(1, min(WINDOW, steps // 4)),
        )
        trainer: SAETrainer[Any, Any] = SAETrainer(settings, sae, data_provider=iter(()))
        trainer.optimizer.param_groups[0].update(fused=True, foreach=False)
        steered = trainer.coefficient_schedulers if config.sparsity is None else {}
        controllers = {
            name: Controller(spec.k, each.final_value, wait=int(each.warm_up_steps), gain=PENALTIES[config.arch].gain)
            for name, each in steered.items()
        }
        every = max(1, window // 4)
        # What begins while the learning rate falls would not come far.
        last = steps - decay if config.aux > 0 and config.arch in REVIVED else 0
        revives = range(every, last + 1, every)
        return cls(spec, trainer, steps, controllers, revives)

    @property
    def step_number(self) -> int:
        """Steps that were made."""
        return self.trainer.n_training_steps

    @property
    def is_done(self) -> bool:
        return self.step_number >= self.steps

    def begin(self, mean: Tensor, norm: float, sample: Tensor) -> None:
        """Sets the scale in which the SAE is trained, its decoder's bias to the mean, and where a penalty is steered
        the first L0.

        Args:
            mean: [d_in] of activations; norm: the mean of their norms. After Anthropic's April 2024 update, inputs are
                scaled so that this is sqrt(d_in).
            sample: [n, d_in] some of them.
        """
        sae = self.trainer.sae
        factor = math.sqrt(sae.cfg.d_in) / norm
        self.trainer.activation_scaler.scaling_factor = factor
        sae.b_dec.data.copy_(mean * factor)
        if self.controllers:
            start_sparse(sae, sample * factor, min(FIRST * self.spec.k, self.spec.features / 2))

    def step(self, batch: Tensor, figures: bool = False) -> None:
        """One step on raw activations [batch, d_in].

        Args:
            figures: also take down loss, active features a token, explained variance and share of dead features.

        Raises:
            DivergedError: the loss is not finite.
        """
        self.trainer.maybe_reset_sparsity()
        output = self.trainer.step(batch)
        if not math.isfinite(loss := output.loss.item()):
            raise DivergedError(f"the loss of {self} is {loss} at step {self.step_number + 1:,}")
        self.trainer.n_training_steps += 1
        if self.step_number in self.revives:
            self._revive(output)
        if self.controllers:
            l0 = float(output.feature_acts.bool().sum()) / len(batch)
            for name, controller in self.controllers.items():
                self._steer(name, controller.update(l0))
        if figures:
            self.figures = self._figures(output)

    def _revive(self, output: Any) -> None:
        trainer, dead = self.trainer, self.trainer.dead_neurons
        x, out = output.sae_in.detach(), output.sae_out.detach()
        share = self.spec.k / self.spec.features
        revived = revive(trainer.sae, trainer.optimizer, x, out, output.feature_acts.detach(), dead, share)
        trainer.n_forward_passes_since_fired[revived] = 0

    def _steer(self, name: str, value: float) -> None:
        scheduler = self.trainer.coefficient_schedulers[name]
        scheduler.final_value = value
        scheduler.load_state_dict({"current_step": scheduler.current_step})  # the warm-up's share of the new value

    def _figures(self, output: Any) -> dict[str, float]:
        told = self.trainer.build_train_step_log_dict(output, self.trainer.n_training_samples)
        out = {
            "loss": told["losses/overall_loss"],
            "l0": told["metrics/l0"],
            "explained": told["metrics/explained_variance"],
            "dead": told["sparsity/dead_features"] / self.spec.features,
            "lr": told["details/current_learning_rate"],
        }
        if schedulers := self.trainer.coefficient_schedulers:
            out["coefficient"] = next(iter(schedulers.values())).value
        return {name: float(value) for name, value in out.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which `load` goes on as if nothing had happened.

        Raises:
            DivergedError: a weight is not finite.
        """
        trainer = self.trainer
        tensors = {f"sae.{name}": value for name, value in trainer.sae.state_dict().items()}
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise DivergedError(f"weights of {self} are not finite after step {self.step_number:,}")
        for name, parameter in trainer.sae.named_parameters():
            for key, value in trainer.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["act_freq_scores"] = trainer.act_freq_scores
        tensors["n_forward_passes_since_fired"] = trainer.n_forward_passes_since_fired
        numbers: dict[str, Any] = {name: getattr(trainer, name) for name in COUNTERS}
        numbers["scaling_factor"] = trainer.activation_scaler.scaling_factor
        numbers["coefficients"] = {
            name: [each.current_step, each.final_value] for name, each in trainer.coefficient_schedulers.items()
        }
        numbers["controllers"] = {name: each.state() for name, each in self.controllers.items()}
        return {name: value.detach().contiguous() for name, value in tensors.items()}, numbers

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes on a state."""
        trainer = self.trainer
        with torch.no_grad():
            for name, value in trainer.sae.state_dict().items():
                value.copy_(tensors[f"sae.{name}"])
            for name, parameter in trainer.sae.named_parameters():
                prefix = f"optimizer.{name}."
                trainer.optimizer.state[parameter] = {
                    key.removeprefix(prefix): torch.empty_like(parameter).copy_(value) if value.dim() else value.clone()
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        trainer.act_freq_scores = tensors["act_freq_scores"].clone()
        trainer.n_forward_passes_since_fired = tensors["n_forward_passes_since_fired"].clone()
        for name in COUNTERS:
            setattr(trainer, name, numbers[name])
        trainer.activation_scaler.scaling_factor = numbers["scaling_factor"]
        for name, (current, final) in numbers["coefficients"].items():
            scheduler = trainer.coefficient_schedulers[name]
            scheduler.final_value = final
            scheduler.load_state_dict({"current_step": current})
        for name, state in numbers["controllers"].items():
            self.controllers[name].load(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimiser made no step: it made them in another process
            for _ in range(trainer.n_training_steps):
                trainer.lr_scheduler.step()

    def finish(self, batches: Sequence[Tensor], facts: dict[str, Any], folder: Path) -> None:
        """Writes sae-lens' two files of an SAE that reads raw activations. It cannot be trained on after that.

        Args:
            batches: raw activations [batch, d_in], to calibrate a threshold on.
            facts: for the metadata.
        """
        trainer, sae = self.trainer, self.trainer.sae
        sae.eval()
        scaled = [trainer.activation_scaler(each) for each in batches]
        calibrate(sae, scaled, self.spec.k)
        steered = bool(self.controllers) and sae.cfg.architecture() == "standard"
        threshold = single_threshold(sae, scaled, self.spec.k) if steered else 0.0
        assert trainer.activation_scaler.scaling_factor is not None
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        trainer.activation_scaler.scaling_factor = None
        trainer.set_final_sae_metadata()
        for name, value in facts.items():
            setattr(sae.cfg.metadata, name, value)
        if self.spec.site.kind == "z":
            sae.cfg.reshape_activations = "hook_z"
        sae.cfg.device = "cpu"  # where it is opened unless another is named
        for parameter in sae.parameters():
            parameter.data = parameter.data.contiguous()
        sae.save_inference_model(folder)
        if threshold > 0:
            _as_jumprelu(folder, threshold)

    def __str__(self) -> str:
        return f"the SAE of {self.spec.features:,} features (k {self.spec.k:g}) at {self.spec.site}"


def _as_jumprelu(folder: Path, threshold: float) -> None:
    """Gives a saved standard SAE one threshold for all features, as sae-lens does with BatchTopK: a penalty comes near
    the L0 that was asked for, and what fires weakest can go at little loss (0.704 to 0.696 of the variance where L0
    went from 47 to 32).
    """
    weights, config = load_file(folder / "sae_weights.safetensors"), read_json(folder / "cfg.json")
    weights["threshold"] = torch.full_like(weights["b_enc"], threshold)
    with whole_file(folder / "sae_weights.safetensors") as temporary:
        save_file(weights, temporary)
    write_json(folder / "cfg.json", config | {"architecture": "jumprelu"})


@torch.no_grad()
def measured(folder: Path, batches: Sequence[Tensor]) -> dict[str, float]:
    """Explained variance and active features a token of a saved SAE, as sae-lens opens it."""
    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = SAE.load_from_disk(folder, device=str(batches[0].device))
    sae.turn_off_forward_pass_hook_z_reshaping()
    active = error = spread = 0.0
    for x in batches:
        f = sae.encode(x)
        active += float((f != 0).sum())
        error += float((x - sae.decode(f)).pow(2).sum())
        spread += float((x - x.mean(0)).pow(2).sum())
    rows = sum(map(len, batches))
    return {"l0": active / rows, "explained": 1 - error / spread, "tokens": rows}
