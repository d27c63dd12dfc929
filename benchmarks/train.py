"""Training an SAE from text to folder: `lancet train` against sae-lens' own runner (`LanguageModelSAETrainingRunner`,
stopping at the site), and three SAEs on one pass against three trainings.

The same model in float32, the same rows of tokens, architecture, width, k, batch, learning rate and threads on both
sides. sae-lens is given what makes it fast: rows that are tokenised already, 20 batches instead of 1,000 for the norm,
no logging and no evaluation. Explained variance of both is measured on rows that neither has seen, by the selection of
the training: the k largest features a token over the whole batch. The threshold that sae-lens saves follows training
slowly and is far off after so few steps (L0 833 instead of 32): with it, two sparsities would be compared.

Rows with a massive token (norm over 20 times the median) are left out for both. Lancet leaves such tokens out by
itself; sae-lens trains on them, and they are nearly all of its loss: with them in, it explained 0.93 of all tokens and
-0.49 of the others, Lancet 0.89 and 0.45, and nothing about the step could be told from that.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, check, in_turns, ratio, remark

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model

SITE = "blocks.12.hook_resid_pre"
TOKENS, HELD_OUT, BATCH = 65_536, 16_384, 2048
LENGTH = 128  # tokens of a row, its start token counted
WIDTH, K, RATE = 8192, 32, 8e-4
WARM_UP, DECAY = 0.02, 0.3
WINDOW = 1_000_000  # tokens of silence after which a feature is dead: longer than this training, on either side
TWICE = 0.5  # of the time of sae-lens' runner, at most
ONE_PASS = 0.75  # of three trainings, at most
CLOSE = 0.01  # of explained variance: what another order of the same text changes


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    torch.set_num_threads(settings.threads)
    lab = pairs.smollm2(settings, "float32")
    model = lab.model
    remark("cutting rows of tokens")
    rows = texts(model)
    rows, unseen = rows[: TOKENS // (LENGTH - 1) + 1], rows[TOKENS // (LENGTH - 1) + 1 :]
    hooked = transformer_lens(model)
    held = values(model, [row for _, row in unseen])
    settings.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.work) as work:
        corpus = Path(work) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in rows), encoding="utf-8")
        count, made = 0, {}

        def ours() -> None:
            nonlocal count
            count += 1
            made["lancet"] = lancet_train(model, corpus, Path(work) / f"ours{count}", k=K)[0]

        def theirs() -> None:
            nonlocal count
            count += 1
            made["sae-lens"] = sae_lens_train(hooked, rows, Path(work) / f"theirs{count}")

        repeats = max(1, settings.repeats // 3)  # each takes minutes
        taken = in_turns({"lancet": ours, "sae-lens": theirs}, repeats, warm_up=0)
        scores = {name: score(folder, held) for name, folder in made.items()}
        name = f"smollm2, float32: {TOKENS:,} tokens to a BatchTopK SAE of {WIDTH:,} features"
        yield ratio(name, taken, "lancet", "sae-lens", TWICE)
        told = "; ".join(f"{side} {explained:.4f}" for side, explained in scores.items())
        yield Figure(
            f"{name}: explained variance behind sae-lens'", scores["sae-lens"] - scores["lancet"], "", CLOSE, told
        )

        def together() -> int:
            nonlocal count
            count += 1
            return len(lancet_train(model, corpus, Path(work) / f"three{count}", k=(16, 32, 64)))

        def apart() -> int:
            nonlocal count
            count += 1
            return sum(len(lancet_train(model, corpus, Path(work) / f"k{k}-{count}", k=k)) for k in (16, 32, 64))

        taken = in_turns({"one pass": together, "three trainings": apart}, repeats, warm_up=0)
        yield ratio("smollm2, float32: three SAEs", taken, "one pass", "three trainings", ONE_PASS)


def texts(model: Model) -> list[tuple[str, list[int]]]:
    """Texts that are whole rows: exactly LENGTH tokens with the start token, cut out of bundled sentences; without
    massive tokens."""
    from benchmarks.harvest import corpus
    from lancet.massive import ordinary

    found: dict[str, list[int]] = {}
    wanted = (TOKENS + HELD_OUT) // (LENGTH - 1) + 2
    for document in corpus():
        ids = model.tokenize(document).ids[1:]
        for first in range(0, len(ids) - LENGTH, LENGTH - 1):
            text = model.decode(ids[first : first + LENGTH - 1])
            row = list(model.tokenize(text).ids)
            if len(row) == LENGTH:
                found[text] = row
        if len(found) >= wanted * 1.2:
            break
    norms = values(model, list(found.values())).norm(dim=1).view(len(found), LENGTH - 1)
    fine = ordinary(norms.amax(1), float(norms.median()))
    whole = [pair for pair, kept in zip(found.items(), fine.tolist(), strict=True) if kept]
    if len(whole) < wanted:
        raise RuntimeError(f"{len(whole)} rows without massive tokens are too few, {wanted} are needed")
    return whole[:wanted]


def values(model: Model, rows: list[list[int]]) -> Tensor:
    """[tokens, d_model] at the site, start tokens left out."""
    import torch

    from lancet.site import Site

    site, parts = Site.parse(SITE), []
    for first in range(0, len(rows), 16):
        batch = model.batch(rows[first : first + 16])
        parts.append(model.values(batch, [site])[site][batch.content].float())
    return torch.cat(parts)


def score(folder: Path, x: Tensor) -> float:
    """Explained variance with the K largest features a token over all of x, by sae-lens' own loader."""
    import torch
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(str(folder))
    with torch.no_grad():
        sae.threshold.zero_()
        acts = torch.cat([sae.encode(part) for part in x.split(1024)])
        least = acts.flatten().kthvalue(acts.numel() - K * len(x)).values
        rebuilt = torch.cat([sae.decode(part * (part > least)) for part in acts.split(1024)])
    return 1 - float((x - rebuilt).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def lancet_train(model: Model, corpus: Path, out: Path, k: Any) -> list[Path]:
    """`lancet train`, its progress not shown."""
    from lancet.training.config import TrainConfig
    from lancet.training.train import train

    config = TrainConfig(
        sites=(SITE,), features=(WIDTH,), k=k, tokens=TOKENS, batch=BATCH, lr=RATE, warm_up=WARM_UP, decay=DECAY,
        length=LENGTH, dead_window=WINDOW,
    )  # fmt: skip
    return train(model, corpus, config, out)


def sae_lens_train(hooked: Any, rows: list[tuple[str, list[int]]], out: Path) -> Path:
    """sae-lens' own runner on the same rows."""
    from datasets import Dataset
    from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig

    steps = TOKENS // BATCH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: Any = LanguageModelSAERunnerConfig(
            sae=BatchTopKTrainingSAEConfig(
                d_in=hooked.cfg.d_model, d_sae=WIDTH, k=float(K), normalize_activations="expected_average_only_in",
                dtype="float32", device="cpu",
            ),
            model_name="smollm2", hook_name=SITE, dataset_path="rows", is_dataset_tokenized=True, streaming=False,
            context_size=LENGTH, training_tokens=TOKENS, train_batch_size_tokens=BATCH, store_batch_size_prompts=32,
            n_batches_in_buffer=16, n_batches_for_norm_estimate=20, prepend_bos=False,
            exclude_special_tokens=[rows[0][1][0]], lr=RATE, lr_end=RATE,
            lr_warm_up_steps=int(steps * WARM_UP), lr_decay_steps=int(steps * DECAY),
            dead_feature_window=WINDOW // BATCH, feature_sampling_window=10**6,
            device="cpu", dtype="float32", n_checkpoints=0, checkpoint_path=None, output_path=str(out), verbose=False,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        data = Dataset.from_dict({"tokens": [row for _, row in rows]})
        LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=hooked).run()
    return out


def transformer_lens(model: Model) -> Any:
    """TransformerLens' HookedTransformer of the embedded model's weights, unprocessed."""
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model.hf.config.architectures = [type(model.hf).__name__]
        model.hf.config.save_pretrained(folder)
        config = get_pretrained_model_config(folder, device="cpu")
        config.tokenizer_name = None
        hooked = HookedTransformer(config)
        with torch.no_grad():
            state = {name: tensor.clone() for name, tensor in convert_llama_weights(model.hf, config).items()}
        flags = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        hooked.load_and_process_state_dict(state, **dict.fromkeys(flags, False))
    hooked.tokenizer = model.tokenizer
    return hooked.eval()
