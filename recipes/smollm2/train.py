"""Trains one SAE on harvested shards with sae-lens' `SAETrainer`; its state is safetensors and JSON, and it resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lancet.files import whole_file, write_json
from lancet.training.architectures import training_sae

CHECKPOINT_SECONDS = 240


class Shards:
    """Batches of activations in an order that depends on the seed alone, from any step on.

    Every batch is drawn from `MIXED` random shards at once, so that a batch is no slice of one shard's texts.
    """

    MIXED = 16

    def __init__(self, paths: list[Path], batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.values: list[Tensor] = [safe_open(path, "pt").get_tensor("values") for path in paths]
        self.tokens = sum(map(len, self.values))
        sample = torch.cat([values[:2000].float() for values in self.values])
        self.mean, self.scale = sample.mean(0), sample.norm(dim=1).mean()

    def epoch(self, number: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        order = torch.randperm(len(self.values), generator=generator).tolist()
        for first in range(0, len(order), self.MIXED):
            mixed = torch.cat([self.values[i] for i in order[first : first + self.MIXED]])
            index = torch.randperm(len(mixed), generator=generator)
            for rows in index.split(self.batch):
                if len(rows) == self.batch:
                    yield mixed[rows].float()

    def from_step(self, step: int) -> Iterator[Tensor]:
        number = 0
        while True:
            for values in self.epoch(number):
                if step > 0:
                    step -= 1
                else:
                    yield values
            number += 1


class Trainer(SAETrainer[Any, Any]):
    """sae-lens' trainer with a fused optimiser and checkpoints by the clock, none of them a pickle."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = folder
        self.optimizer.param_groups[0].update(fused=True, foreach=False)
        self.saved = self.told = time.monotonic()
        self.told_samples = 0

    def _checkpoint_if_needed(self) -> None:
        if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save()
            self.saved = time.monotonic()

    def _update_pbar(self, step_output: Any, pbar: Any, update_interval: int = 100) -> None:
        if self.n_training_steps % update_interval == 0:
            now = time.monotonic()
            rate = (self.n_training_samples - self.told_samples) / (now - self.told)
            self.told, self.told_samples = now, self.n_training_samples
            variance = (step_output.sae_in - step_output.sae_in.mean(0)).pow(2).sum(-1).mean()
            losses = {name: round(float(value / variance), 4) for name, value in step_output.losses.items()}
            print(
                f"step {self.n_training_steps} tokens {self.n_training_samples} {rate:.0f}/s "
                f"dead {int(self.dead_neurons.sum())} {losses}",
                flush=True,
            )

    def save(self) -> None:
        state = {f"sae.{name}": value.contiguous() for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = value.contiguous()
        state["act_freq_scores"] = self.act_freq_scores
        state["n_forward_passes_since_fired"] = self.n_forward_passes_since_fired
        counters = {
            "n_training_samples": self.n_training_samples,
            "n_training_steps": self.n_training_steps + 1,
            "n_frac_active_samples": self.n_frac_active_samples,
            "scaling_factor": self.activation_scaler.scaling_factor,
        }
        with whole_file(self.folder / "checkpoint.safetensors") as temporary:
            save_file(state, temporary, metadata={"counters": json.dumps(counters)})

    def load(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        with safe_open(path, "pt") as file:
            counters = json.loads(file.metadata()["counters"])
        state = load_file(path)
        with torch.no_grad():
            for name, value in self.sae.state_dict().items():
                value.copy_(state[f"sae.{name}"])
            for name, parameter in self.sae.named_parameters():
                prefix = f"optimizer.{name}."
                self.optimizer.state[parameter] = {
                    key.removeprefix(prefix): torch.empty_like(parameter).copy_(value) if value.dim() else value
                    for key, value in state.items()
                    if key.startswith(prefix)
                }
        self.act_freq_scores = state["act_freq_scores"]
        self.n_forward_passes_since_fired = state["n_forward_passes_since_fired"]
        self.activation_scaler.scaling_factor = counters.pop("scaling_factor")
        for name, value in counters.items():
            setattr(self, name, value)
        self.told_samples = self.n_training_samples
        for _ in range(self.n_training_steps):
            self.lr_scheduler.step()


def train(
    settings: dict[str, Any], paths: list[Path], d_in: int, folder: Path, seed: int, facts: dict[str, Any]
) -> None:
    """Trains by `settings` ([sae] of the recipe) and leaves a sae-lens folder (JumpReLU) in `folder/sae`."""
    if (folder / "sae" / "cfg.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    data = Shards(paths, settings["batch"], seed)
    sae: Any = training_sae(
        settings["architecture"],
        d_in,
        settings["width"],
        settings["k"],
        widths=settings["widths"] if settings["architecture"] == "matryoshka" else (),
        aux=settings["aux_coefficient"],
    )
    factor = d_in**0.5 / float(data.scale)
    sae.b_dec.data.copy_(data.mean * factor)
    total = int(data.tokens * settings["epochs"]) // settings["batch"] * settings["batch"]
    steps = total // settings["batch"]
    trainer = Trainer(
        SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=settings["batch"],
            lr=settings["lr"],
            lr_end=settings["lr"],
            lr_warm_up_steps=int(steps * settings["warm_up"]),
            lr_decay_steps=int(steps * settings["decay"]),
            dead_feature_window=settings["dead_window"],
            feature_sampling_window=100_000_000,
        ),
        sae,
        data_provider=iter(()),
        folder=folder,
    )
    trainer.activation_scaler.scaling_factor = factor
    if (folder / "checkpoint.safetensors").exists():
        trainer.load()
        print(f"resumed at step {trainer.n_training_steps}", flush=True)
    trainer.data_provider = data.from_step(trainer.n_training_steps)
    begun = time.monotonic()
    trainer.fit()
    sae.cfg.metadata.hook_name = facts["site"]
    sae.cfg.metadata.model_name = facts["model"]
    sae.cfg.metadata.prepend_bos = True
    sae.save_inference_model(str(folder / "sae"))
    write_json(
        folder / "training.json",
        {"tokens": total, "steps": steps, "minutes": (time.monotonic() - begun) / 60, "settings": settings},
    )
