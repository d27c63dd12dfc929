"""What an SAE of the embedded model learns: python -m benchmarks.meaning_train CORPUS [--arch A] [--theirs] ...

Trains one SAE at block 12 on a corpus whose activations are kept on disk (float32 pass, bfloat16 rows), and scores what
was saved, by sae-lens' own loader, on blocks of the corpus that were not trained on. The same WORK gives the same
batches to every call, so that the lines it adds to WORK/scores.jsonl are comparable.

--theirs trains sae-lens' own class on these batches: its dense step with AuxK and no resampling (TopK families), or its
JumpReLU at its defaults with the quadratic penalty around k. Thresholds are calibrated at the end on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lancet.training.blocks import Blocks

SITE, WIDTH, K, LENGTH, RATE = "blocks.12.hook_resid_pre", 8192, 32, 128, 8e-4
BLOCK = 131_072
HELD = 110_000  # tokens of each block that is scored on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("--arch", default="batchtopk")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--window", type=int, help="tokens of silence after which a feature is dead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--theirs", action="store_true", help="sae-lens' own class")
    parser.add_argument("--blocks", type=int, default=2, help="that are scored on, behind those trained on")
    parser.add_argument("--work", type=Path, default=Path("work-train"))
    asked = parser.parse_args()

    import lancet
    from lancet.atlas.corpus import Bad, sources
    from lancet.site import Site
    from lancet.training import text
    from lancet.training.blocks import Blocks
    from lancet.training.config import TrainConfig

    config = TrainConfig(
        sites=(SITE,), features=(WIDTH,), k=(K,), seeds=(asked.seed,), arch=asked.arch, tokens=asked.tokens,
        batch=asked.batch, lr=RATE, length=LENGTH, dead_window=asked.window,
        widths=(512, 2048) if asked.arch == "matryoshka" else (),
    )  # fmt: skip
    model = lancet.open("smollm2", device="cpu", dtype="float32").model
    asked.work.mkdir(parents=True, exist_ok=True)
    read = text.prepare(
        model, sources(asked.corpus), "text", asked.work / "text", LENGTH, None, Bad(), lambda tokens: None
    )
    blocks = Blocks(model, [Site.parse(SITE)], read, BLOCK, asked.work / "blocks")
    name = f"{asked.arch}-{asked.tokens}-{asked.batch}-{asked.seed}" + "-theirs" * asked.theirs
    folder = asked.work / name
    used, last = trained(config, blocks, asked.theirs, folder)
    told = {"name": name, "window": asked.window, "seconds": round(used)}
    told |= scores(folder, blocks, range(last + 1, min(last + 1 + asked.blocks, len(blocks))))
    print(json.dumps(told))
    with (asked.work / "scores.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")


def trained(config: Any, blocks: Blocks, theirs: bool, folder: Path) -> tuple[float, int]:
    """Seconds of all steps, and the last block that was trained on."""
    import torch

    from lancet.training import trainer

    (spec,), (site,) = config.saes(), blocks.sites
    if theirs:
        trainer.REVIVED = ()
        own = theirs_jumprelu if config.arch == "jumprelu" else partial(trainer.training_sae, fast=False)
        trainer.training_sae = lambda *given, **more: own(*given, **{k: v for k, v in more.items() if k != "fast"})
        if config.arch == "jumprelu":
            config = dataclasses.replace(config, sparsity=1.0)
    steps = config.tokens // config.batch
    learner = trainer.Learner.new(spec, config, blocks.model.d_model, config.batch, steps, torch.device("cpu"))
    rest: dict[Any, Any] = {}
    used, number = 0.0, 0
    while True:
        feed = blocks.feeds(number, rest, config.batch, lambda done, of: None)[site]
        if number == 0:
            learner.begin(*feed.mean_and_norm(), feed[0])
        begin = time.perf_counter()
        for i in range(len(feed)):
            if not learner.is_done:
                learner.step(feed[i], figures=False)
        used += time.perf_counter() - begin
        if learner.is_done:
            break
        rest, number = {site: feed.left()}, number + 1
    sample = feed.values[feed.order[:16_384]].float()
    folder.mkdir(parents=True, exist_ok=True)
    learner.finish(sample.split(config.batch), {"hook_name": str(site), "prepend_bos": True}, folder)
    return used, number


def theirs_jumprelu(*_: Any, **__: Any) -> Any:
    """sae-lens' class at its defaults, but for the quadratic penalty around K."""
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=576,
            d_sae=WIDTH,
            dtype="float32",
            device="cpu",
            normalize_activations="expected_average_only_in",
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=float(K),
        )
    )


def scores(folder: Path, blocks: Blocks, which: range) -> dict[str, Any]:
    """Explained variance, L0 and the share of features that never fire on blocks that were not trained on."""
    import torch
    from sae_lens import SAE

    if not which:
        raise SystemExit(
            f"the corpus has {len(blocks)} blocks, and all were trained on; give more text or fewer tokens"
        )
    sae, (site,) = SAE.load_from_disk(folder), blocks.sites
    fired = torch.zeros(WIDTH, dtype=torch.bool)
    total, lit, error, squares, count = torch.zeros(blocks.model.d_model, dtype=torch.float64), 0, 0.0, 0.0, 0
    with torch.no_grad():
        for number in which:
            feed = blocks.feeds(number, {}, 2048, lambda done, of: None)[site]
            for x in feed.values[feed.order][:HELD].float().split(2048):
                f = sae.encode(x)
                fired |= (f > 0).any(0)
                lit += int((f > 0).sum())
                error += float((x - sae.decode(f)).pow(2).sum())
                count, total, squares = (
                    count + len(x),
                    total + x.double().sum(0),
                    squares + float(x.double().pow(2).sum()),
                )
    explained = 1 - error / (squares - float(total.pow(2).sum()) / count)
    dead = 1 - float(fired.float().mean())
    return {"explained": round(explained, 4), "l0": round(lit / count, 2), "dead": round(dead, 4), "tokens": count}


main()
