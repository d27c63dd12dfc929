"""Writes the package's assets: fp16 weights, configuration, facts, and the model card, out of the recipe's results.

    python recipes/smollm2/ship.py --work WORK [--scores SCORES.json] [--compare TITLE=NAME ...]

SCORES.json is what `lancet eval --json` printed for the shipped folder and whatever it is compared with, which has the
NAME that it has there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lancet import bench
from lancet.facts import Facts
from lancet.files import read_json, whole_file, write_json
from lancet.loading import assets, sae_from_folder
from lancet.training.finish import RECORD

ROWS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "cosine": "cosine",
    "loss": "loss, plain",
    "loss_spliced": "loss, SAE spliced in",
    "loss_zeros": "loss, zeros spliced in",
    "loss_recovered": "loss recovered",
    "kl": "KL, plain from spliced",
    "dead_share": "dead share",
    "auroc_best": "best feature a concept, mean AUROC",
    "auroc_best_at_least_0.9": "concepts at 0.90 or more, of 60",
    "auroc": "the same, feature chosen on training lines, mean AUROC",
    "auroc_coordinate": "best single coordinate instead, chosen so too",
    "auroc_probe": "linear probe instead",
    "split": "features that a concept is split over",
    "absorbed": "share of lines that other features absorb",
}


def weights(source: Path, target: Path) -> None:
    """fp16 copies of the weights and the configuration; loads in sae-lens unchanged."""
    tensors = {
        name: tensor.half().contiguous() for name, tensor in load_file(source / "sae_weights.safetensors").items()
    }
    target.mkdir(parents=True, exist_ok=True)
    with whole_file(target / "sae_weights.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(target / "cfg.json", read_json(source / "cfg.json") | {"device": "cpu"})


def card(target: Path, training: dict[str, Any], columns: dict[str, dict[str, Any]]) -> str:
    """The model card, every figure out of files."""
    sae, known = sae_from_folder(target), Facts.load(target / "facts.safetensors")
    config, rounds = training["config"], training["tokens"] / training["corpus"]["tokens"]
    lines = [
        f"# {sae.site} of SmolLM2-135M-Instruct",
        "",
        f"A sparse autoencoder of {sae.d_sae:,} features ({sae.architecture}, trained as {config['arch']} with "
        f"k = {training['sae']['k']:g}) on the residual stream before block {sae.site.layer}, trained by `recipes/smollm2` in "
        f"{training['seconds'] / 60:.0f} minutes on two processor cores, the model's pass among them: {training['tokens']:,} tokens "
        f"in {training['steps']:,} steps of {training['batch']:,}, {rounds:.1f} rounds through its text. The model's own pass was in "
        f"{training['dtype']}, start tokens left out. Weights are fp16 safetensors and load in sae-lens unchanged.",
        "",
        "Text: the concept bench (one template in ten held out; the manual's examples in further expansions), English novels in "
        "the public domain, passages, and what the model itself wrote, chats among them.",
        "",
        "## Figures",
        f"`lancet eval` on {columns['this']['tokens']:,} held-out tokens of novels, the bench and the model's own text (losses on "
        f"{columns['this']['loss_tokens']:,} of them), concepts on {columns['this']['lines']['heldout']} held-out lines of the bench; "
        f"`docs/json.md` says what each figure is.",
        "",
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for key, name in ROWS.items():
        cells = ["-" if column[key] is None else f"{column[key]:.4g}" for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Typical residual norm (`1rn`): {known.norm:.1f}, median over {known.tokens:,} tokens.",
        "",
        "## Concepts",
        "The detector is chosen on training lines; AUROC is on held-out lines. `causes` is how much likelier, in nats, the concept's "
        "words become against all words when the feature is added (the effect lens); a perfect detector need not cause.",
        "",
        "| concept | detector | AUROC | causes | the five best |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in bench.concepts():
        entry = known.concepts[name]
        five = ", ".join(f"#{f['feature']} {f['auroc']:.2f}" for f in entry["best_five"])
        lines.append(f"| {name} | #{entry['feature']} | {entry['auroc']:.3f} | {entry['causes']:+.2f} | {five} |")
    chosen = read_json(target / "concepts.json")
    lines += [
        "",
        "## What causes the manual's examples",
        "The way of choosing features and the dose were picked on calibration prompts; the figures are from other prompts and seeds "
        "(20 continuations of 28 tokens, temperature 0.7, repetition penalty 1.1). Hits: share with one of the bench's keywords or a few more (`ALSO` in `concepts.py`: any bridge; for indentation errors any talk of programs and errors; for refusing any apology); surprise: extra nats a "
        "token under the plain model; DiffMean at its own best dose beside it. Refusing is tried on ordinary requests in the chat template.",
        "",
        "| concept | how | features | dose | hits | surprise | repeats | plain hits | DiffMean hits / surprise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in chosen.items():
        r, d = entry["report"], entry["diffmean"]
        parts = ", ".join(f"#{i}" for i, _ in entry["blend"])
        lines.append(
            f"| {name} | {entry['how']} | {parts} | {entry['dose_rn']:g}rn | {r['hits']:.2f} | {r['extra_surprise']:+.2f} | "
            f"{r['repeats']:.2f} | {r['plain_hits']:.2f} | {d['hits']:.2f} / {d['extra_surprise']:+.2f} at {d['rn']:g}rn |"
        )
    lines += ["", "Continuations, as they came:", ""]
    for name, entry in chosen.items():
        lines += [f"- **{name}**: " + " / ".join(" ".join(text.split()) for text in entry["texts"][:3])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder; left out, the package's own")
    parser.add_argument("--scores", type=Path, nargs="*", help="what `lancet eval --json` printed")
    parser.add_argument("--compare", nargs="*", default=[], metavar="TITLE=NAME", help="columns beside the shipped one")
    arguments = parser.parse_args()
    source = arguments.work / "sae"
    training = read_json(source / RECORD)
    target = arguments.out or assets() / "smollm2" / training["sae"]["site"]
    weights(source, target)
    for name in ("facts.safetensors", "concepts.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if not arguments.scores:
        return
    scores: dict[str, Any] = {}
    for file in arguments.scores:
        for entry in json.loads(file.read_text())["saes"]:
            scores[entry["name"]] = entry | entry["bench"]
    columns = {"this": scores[target.name]} | {
        title: scores[name] for title, name in (pair.split("=", 1) for pair in arguments.compare)
    }
    with whole_file(target / "README.md") as temporary:
        temporary.write_text(card(target, training, columns), encoding="utf-8")


if __name__ == "__main__":
    main()
