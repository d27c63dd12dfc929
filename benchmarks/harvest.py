"""Counting a corpus: the rate of `harvest` (lenses off) against the forward passes to the site and the dense encodes
alone, of the same batches in the same order; how the time goes with the tokens, and what memory it takes.

Preparing (reading and tokenising) and finishing (neighbours, the atlas' files) are not in the rate and stand beside it:
the one is done once for any number of SAEs, the other does not depend on the corpus.
`python -m benchmarks.harvest MODEL SAE FOLDER TOKENS` is the process whose memory is watched while it harvests whole.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, check, in_turns, process, ratio, remark

if TYPE_CHECKING:
    from lancet.atlas.shards import Prepared
    from lancet.lab import Lab
    from lancet.sae import Sae

TOKENS = 32_768  # one shard, of which the rate is taken
STEP = 8_192  # tokens of a shard where time goes with tokens: 1, 2 and 4 of them
LENGTH = 512
AT_ONCE = 1024  # tokens encoded at once by the other side: with more its time goes into fresh memory
RATE = 0.65  # of the rate of passes and encodes alone, at least
LINEAR = 1.1  # times what four times the tokens would take
BEYOND = 1500  # MB that a harvest may take beyond the weights
GROWTH = 100  # MB by which four times the corpus may take more


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    torch.set_num_threads(settings.threads)
    folders = pairs.gpt2_sae_for(settings, list(islice(corpus(), 8)), "gpt2-shape-sae-harvest")
    lab = pairs.gpt2(settings, folders)
    yield from rates(settings, lab, "GPT-2 shape, float32")
    del lab
    yield from memory(settings, *map(str, folders), "GPT-2 shape, float32", (TOKENS, 4 * TOKENS), None)
    lab = pairs.smollm2(settings, "float32")
    name = f"smollm2, {pairs.smollm2_named(settings)}, float32"
    yield from rates(settings, lab, name)
    del lab
    yield from memory(settings, "smollm2", pairs.smollm2_sae(settings) or "", name, (8 * TOKENS, 32 * TOKENS), GROWTH)


def rates(settings: Settings, lab: Lab, name: str) -> Iterator[Figure]:
    """The rate against passes and encodes alone, what stands beside it, and the time of 1, 2 and 4 times the tokens."""
    with tempfile.TemporaryDirectory(dir=settings.work) as folder:
        begin = time.perf_counter()
        prepared = prepare(lab, Path(folder) / "shards", TOKENS)
        seconds = time.perf_counter() - begin
        check(prepared.tokens == TOKENS, "tokens")
        lit = count(lab, prepared)
        sides = {"harvest": lambda: count(lab, prepared), "passes and encodes": lambda: alone(lab, prepared)}
        taken = in_turns(sides, settings.repeats)
        found = ratio(f"{name}: time of counting {TOKENS:,} tokens", taken, *sides, 1 / RATE)
        rate = TOKENS / median(taken["harvest"])
        detail = (
            f"{rate:,.0f} tokens/s, {found.value**-1:.2f} of the rate alone; {lit:.0f} features lit; {found.detail}"
        )
        yield Figure(found.name, found.value, "x", found.bar, detail, found.samples)
        yield Figure(f"{name}: preparing {TOKENS:,} tokens", seconds, "s", detail=f"{TOKENS / seconds:,.0f} tokens/s")
        yield Figure(f"{name}: finishing, whatever the corpus", finishing(lab, prepared, Path(folder)), "s")
        parts = {times: prepare(lab, Path(folder) / f"{times}", times * STEP, STEP) for times in (1, 2, 4)}
        sides = {f"{times * STEP:,}": lambda part=part: count(lab, part) for times, part in parts.items()}
        taken = in_turns(sides, settings.repeats)
        once, twice, four = (median(samples) for samples in taken.values())
        told = f"{once:.3g} s, {twice:.3g} s, {four:.3g} s for {', '.join(sides)} tokens"
        yield Figure(f"{name}: four times the tokens over 4 times the time", four / once / 4, "x", LINEAR, told, taken)


def memory(
    settings: Settings, model: str, sae: str, name: str, sizes: tuple[int, int], bar: float | None
) -> Iterator[Figure]:
    """What a whole harvest takes beyond the weights, of a corpus and of one four times as large.

    What is kept of a feature (examples, samples of its firings) has a bound and fills up first: that it grows no more
    is seen on corpora that have filled it, which takes GPT-2's shape too long.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        remark("this system does not tell memory; Linux does")
        return
    peaks, own = {}, {} if model == "smollm2" else {"LANCET_CACHE": str(pairs.cache(settings))}
    for tokens in sizes:
        remark(f"{name}: the memory of {tokens:,} tokens")
        with tempfile.TemporaryDirectory(dir=settings.work) as folder:
            command = [sys.executable, "-m", "benchmarks.harvest", model, sae, folder, str(tokens)]
            told = json.loads(process(command, **own)())
        check(told["tokens"] == tokens, "tokens")
        peaks[tokens] = told["peak"]
        yield Figure(f"{name}: peak anonymous beyond the weights, {tokens:,} tokens", told["peak"], "MB", BEYOND)
    yield Figure(f"{name}: more for four times the corpus", peaks[sizes[1]] - peaks[sizes[0]], "MB", bar)


def corpus() -> Iterator[str]:
    """Documents of many lengths, without end and none twice: bundled neutral sentences in another order each time."""
    from lancet.bench import neutral_texts

    draw = random.Random(0)
    for seed in range(1 << 30):
        texts = neutral_texts(400, seed=seed)
        while texts:
            count = min(len(texts), draw.randint(1, 24))
            yield f"{seed} " + " ".join(texts[:count])
            texts = texts[count:]


def prepare(lab: Lab, folder: Path, tokens: int, size: int | None = None) -> Prepared:
    """Exactly so many tokens as shards."""
    from lancet.atlas import shards

    length = min(LENGTH, lab.model.context)
    return shards.prepare(lab.model, corpus(), folder, length, tokens, size or shards.SHARD)


def count(lab: Lab, prepared: Prepared) -> float:
    """What a harvest does with prepared shards, without its checkpoints (one a minute); features lit a token."""
    from lancet.atlas import harvest
    from lancet.atlas.statistics import Statistics

    counted = harvest.Sum(Statistics(lab.sae().d_sae, octave=8), prepared.folder / "never-written")
    for _ in harvest._locally(lab, [lab.sae()], prepared, [counted]):
        pass
    check(len(counted.done) == len(prepared.shards), "shards")
    return float(counted.statistics.fired.sum()) / prepared.tokens


def alone(lab: Lab, prepared: Prepared) -> int:
    """What no harvest can do without: the same batches to the site, and all features' activations."""
    import torch

    from lancet import passes

    model, sae, tokens = lab.model, lab.sae(), 0
    start = [] if model.start_plain is None else [model.start_plain]
    with torch.no_grad():
        for index in range(len(prepared.shards)):
            rows = [[*start, *ids.tolist()] for ids in prepared.load(index).ids]
            for group in passes.alike(rows):
                batch = model.batch([rows[i] for i in group])
                values = model.values(batch, [sae.site])[sae.site][batch.content]
                tokens += sum(len(sae.encode(part)) for part in values.split(AT_ONCE))
    check(tokens == prepared.tokens, "tokens")
    return tokens


def finishing(lab: Lab, prepared: Prepared, folder: Path) -> float:
    """Seconds from the last shard to the atlas, lenses off."""
    from lancet.atlas import finish, harvest
    from lancet.atlas import plan as plans
    from lancet.atlas.statistics import Statistics

    plan = plans.make(lab, [lab.sae()], [], "text", LENGTH, prepared.tokens)
    counted = harvest.Sum(Statistics(lab.sae().d_sae, plan.saes[0]["octave"]), folder / "never-written")
    for _ in harvest._locally(lab, [lab.sae()], prepared, [counted]):
        pass
    (folder / "work").mkdir()
    begin = time.perf_counter()
    finish.write(
        lab, lab.sae(), plan, plan.saes[0], prepared, counted.statistics, folder / "atlas", folder / "work", False, 20,
        lambda line: None,
    )  # fmt: skip
    return time.perf_counter() - begin


def child(model: str, sae: str, folder: str, tokens: str) -> None:
    """Harvests whole, and prints as JSON its peak of anonymous memory over imports and weights (those that are held
    and not mapped), in MB."""
    import interp_engine.arch
    import pyarrow.parquet
    import scipy.sparse
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

    import lancet
    from benchmarks.memory import anonymous, watched
    from lancet.atlas import harvest

    imported = anonymous()
    lab = lancet.open(model, sae=sae or None, device="cpu", dtype="float32", anyway=True)
    lab.facts()  # kept, or shipped with the SAE
    weights = sum(parameter.nbytes for parameter in lab.model.hf.parameters()) / 1e6
    weights += sum(tensor.nbytes for _, tensor in lab.sae().tensors()) / 1e6
    weights = min(weights, max(0.0, anonymous() - imported))  # what is mapped is not anonymous
    path = Path(folder) / "corpus.jsonl"
    held = 0
    with path.open("w", encoding="utf-8") as file:
        for text in corpus():
            file.write(json.dumps({"text": text}) + "\n")
            held += len(lab.model.tokenizer(text, add_special_tokens=False)["input_ids"])
            if held >= int(tokens):
                break
    with watched() as peak:
        found = harvest.harvest(lab, path, Path(folder) / "atlas", int(tokens), LENGTH, lenses=False)
    print(json.dumps({"peak": peak.most - imported - weights, "weights": weights, "tokens": found.corpus["tokens"]}))


if __name__ == "__main__":
    child(*sys.argv[1:])
