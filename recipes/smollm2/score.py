"""Scores SAEs on the bench's held-out lines, all of them by the same lines and the same code.

    python recipes/smollm2/score.py FOLDER [FOLDER ...] [--heldout WORK/heldout]

Explained variance is 1 - sum |x - x^|^2 / sum |x - mean|^2 over tokens; L0, cosine and loss recovered are means over
tokens. A concept's AUROC is that of sentence maxima, its best feature chosen on these lines ("best") or on training
lines ("chosen").
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lancet import bench
from lancet.loading import open_model, open_sae
from lancet.model import Model
from lancet.sae import Sae
from lancet.scoring import auroc_of_ranks, ranks
from lancet.tokens import Batch

PER_CONCEPT = 12


def lines(part: bench.Part, seed: int) -> tuple[list[str], np.ndarray]:
    labelled = list(bench.sentences(part, PER_CONCEPT, seed))
    return [text for _, text in labelled], np.array([name for name, _ in labelled])


def batches(model: Model, texts: list[str]) -> list[tuple[Batch, list[int]]]:
    rows = [model.tokenize(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [
        (model.batch([rows[i] for i in part]), part) for part in (order[k : k + 48] for k in range(0, len(order), 48))
    ]


def maxima(model: Model, sae: Sae, texts: list[str]) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Sentence maxima of features [n, d_sae] and of coordinates, both signs [n, 2 d], and reconstruction figures."""
    features = np.zeros((len(texts), sae.d_sae), np.float32)
    coordinates = np.zeros((len(texts), 2 * sae.d_in), np.float32)
    values, errors, l0, cosine = [], 0.0, 0.0, 0.0
    for batch, part in batches(model, texts):
        x = model.values(batch, [sae.site])[sae.site].float()
        inside = batch.content[..., None]
        f = sae.encode(x).mul_(inside)
        features[part] = f.amax(1).numpy()
        lowest = torch.finfo(torch.float32).min
        both = [x.masked_fill(~inside, lowest).amax(1), (-x).masked_fill(~inside, lowest).amax(1)]
        coordinates[part] = torch.cat(both, 1).numpy()
        own, f = x[batch.content], f[batch.content]
        rebuilt = sae.decode(f, own)
        values.append(own)
        errors += float((own - rebuilt).pow(2).sum())
        l0 += float((f > 0).sum())
        cosine += float(torch.cosine_similarity(own, rebuilt, dim=1).sum())
    every = torch.cat(values)
    figures = {
        "explained_variance": 1 - errors / float((every - every.mean(0)).pow(2).sum()),
        "l0": l0 / len(every),
        "cosine": cosine / len(every),
        "tokens": len(every),
    }
    return features, coordinates, figures


def losses(model: Model, sae: Sae, texts: list[str]) -> dict[str, float]:
    """Loss plain, with the SAE's reconstruction spliced in at every token but the start, and with zeros there."""
    totals, count = {"plain": 0.0, "spliced": 0.0, "zero": 0.0}, 0
    for batch, _ in batches(model, texts):

        def spliced(value: torch.Tensor, batch: Batch = batch) -> torch.Tensor:
            own = value[batch.content].float()
            new = value.clone()
            new[batch.content] = sae.decode(sae.encode(own), own).to(value.dtype)
            return new

        def zero(value: torch.Tensor, batch: Batch = batch) -> torch.Tensor:
            return torch.where(batch.content[..., None], torch.zeros_like(value), value)

        target = batch.mask[:, 1:]
        for name, function in (("plain", lambda value: None), ("spliced", spliced), ("zero", zero)):
            with torch.no_grad(), model.at(sae.site, function):
                logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits[target], batch.ids[:, 1:][target], reduction="sum")
            totals[name] += float(nats)
        count += int(target.sum())
    out = {f"loss_{name}": value / count for name, value in totals.items()}
    return out | {"loss_recovered": (out["loss_zero"] - out["loss_spliced"]) / (out["loss_zero"] - out["loss_plain"])}


def dead_share(sae: Sae, folder: Path) -> dict[str, float]:
    """Share of features that never fire on the held-out shards."""
    fired, tokens = torch.zeros(sae.d_sae, dtype=torch.bool), 0
    for path in sorted(folder.glob("*.safetensors")):
        for values in load_file(path)["values"].split(4096):
            fired |= (sae.encode(values) > 0).any(0)
            tokens += len(values)
    return {"dead_share": 1 - float(fired.float().mean()), "dead_tokens": tokens}


def score(model: Model, folder: Path, heldout: Path | None, seed: int = 11) -> dict[str, Any]:
    sae, _ = open_sae(model, str(folder))
    texts, labels = lines("heldout", seed)
    features, coordinates, out = maxima(model, sae, texts)
    out |= losses(model, sae, texts)
    if heldout:
        out |= dead_share(sae, heldout)
    train_texts, train_labels = lines("train", seed + 1)
    train_ranks = ranks(maxima(model, sae, train_texts)[0])
    ranked, plain = ranks(features), ranks(coordinates)
    concepts = {}
    for name in bench.concepts():
        on_heldout = auroc_of_ranks(ranked, labels == name)
        on_train = auroc_of_ranks(train_ranks, train_labels == name)
        best = np.argsort(-on_train)[:5]
        concepts[name] = {
            "best": float(on_heldout.max()),
            "best_coordinate": float(auroc_of_ranks(plain, labels == name).max()),
            "chosen": [{"feature": int(f), "auroc": float(on_heldout[f]), "train": float(on_train[f])} for f in best],
        }
    best = np.array([entry["best"] for entry in concepts.values()])
    chosen = np.array([entry["chosen"][0]["auroc"] for entry in concepts.values()])
    coordinate = np.array([entry["best_coordinate"] for entry in concepts.values()])
    return out | {
        "auroc_best": float(best.mean()),
        "auroc_best_at_least_0.9": int((best >= 0.9).sum()),
        "auroc_chosen_on_training_lines": float(chosen.mean()),
        "auroc_best_coordinate": float(coordinate.mean()),
        "concepts": concepts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="SAEs in sae-lens' layout")
    parser.add_argument("--heldout", type=Path, help="folder of held-out shards, for the share of dead features")
    parser.add_argument("--json", type=Path, help="write everything, concepts included, to this file")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    model = open_model("smollm2", dtype=arguments.dtype)
    all_scores = {}
    for folder in arguments.folders:
        all_scores[str(folder)] = found = score(model, folder, arguments.heldout)
        told = {name: round(value, 4) for name, value in found.items() if name != "concepts"}
        print(folder, json.dumps(told), flush=True)
        print("  lowest:", sorted((round(c["best"], 3), n) for n, c in found["concepts"].items())[:8], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(all_scores, indent=1))


if __name__ == "__main__":
    main()
