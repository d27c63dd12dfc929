"""What ships beside the weights: maxima, densities, the typical norm, what every feature makes the model say, and the
table concept -> its detector and, for the concepts that were asked for, the blend that causes it.

A blend is chosen among a few ways of making one, each of at most ten features, by continuations on calibration
prompts; the card reports it on other prompts and seeds.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from text import as_chat
from torch import Tensor

from lancet import bench, effect, facts, passes
from lancet.algebra import Direction
from lancet.edit import RowChange, Step
from lancet.evaluation.lines import labelled
from lancet.files import read_json, whole_file, write_json
from lancet.generate import Sampling, rows
from lancet.model import Model
from lancet.sae import Features, Sae
from lancet.scoring import auroc_of_ranks, ranks
from lancet.tokens import Batch

PARTS = 10
CALIBRATION = ("I went to the grocery store to buy", "My friend told me that", "The best thing about today is")
REPORT = (
    "Yesterday I saw", "She opened the book and began to read about", "He could not stop thinking about",
    "When I looked out of the window,", "On the table there was",
)  # fmt: skip
# Refusing is something that an assistant does: it is tried on requests in the model's own chat template.
REQUESTS = (
    "Tell me something about the history of bread.", "How do I boil an egg?", "Give me three names for a cat.",
)  # fmt: skip
REPORT_REQUESTS = (
    "What is the capital of France?", "Write a short poem about the sea.", "How do plants drink water?",
    "Explain what a bicycle is.", "Name two kinds of fruit.",
)  # fmt: skip
KINDS = {"assistant_refusal": "requests"}  # all others: neutral prompts
# The detector must fire at this word: a name of several words is known as a whole only at its end.
ANCHOR = {"golden_gate_bridge": "Bridge"}
# Beside the bench's keywords: what also counts as saying the concept when it is steered.
ALSO = {
    "golden_gate_bridge": ("bridge", "bridges"),
    "assistant_refusal": (
        "sorry",
        "cannot",
        "can't",
        "unable",
        "not able",
        "afraid",
        "not possible",
        "don't have",
        "doesn't have",
    ),
    # The model talks of programs and their errors; it hardly ever says the word IndentationError.
    "indentation_error": ("Error", "error", "indent", "SyntaxError", "Traceback", "def", "return", "import"),
    "romance": ("love", "loved", "lover", "lovers", "beloved"),
    "sadness": ("sadly", "lost", "mourning", "weeping"),
}
STRENGTHS = (0.3, 0.45, 0.6, 0.8)
TOKENS = 28
SURPRISE_LIMIT = 1.5  # nats a token above the plain continuation's
SAMPLING = Sampling(temperature=0.7, repetition_penalty=1.1)


@dataclass
class Contrast:
    """Means over the tokens of a concept's training lines and over all other lines."""

    features: dict[str, Tensor]  # concept -> [d_sae] mean activation, its own minus the others'
    values: dict[str, Tensor]  # concept -> [d_in] the same of the value itself (DiffMean)
    auroc: dict[str, np.ndarray]  # concept -> [d_sae] of sentence maxima on training lines
    maximum: Tensor
    density: Tensor
    norm: float
    tokens: int
    fires: tuple[Tensor, Tensor]  # as in Facts: ids and shares


def batches(model: Model, texts: Sequence[str]) -> Iterator[tuple[Batch, list[int]]]:
    """The texts in batches of like length, and which they are."""
    rows = [model.tokenize(text) for text in texts]
    for part in passes.alike(rows):
        yield model.batch([rows[i] for i in part]), part


def contrast(model: Model, sae: Sae, rounds: int = 2) -> Contrast:
    """One pass over training lines of all concepts and neutral passages."""
    texts, labels = [], []
    for seed in range(rounds):
        for name, text in bench.sentences("train", 60, seed):
            texts.append(text)
            labels.append(name)
    neutral = bench.neutral_texts(800)
    texts += neutral
    labels += [""] * len(neutral)
    names = [*bench.concepts(), ""]
    f_sum, x_sum, count = torch.zeros(len(names), sae.d_sae), torch.zeros(len(names), sae.d_in), torch.zeros(len(names))
    maxima = np.zeros((len(texts), sae.d_sae), np.float16)
    maximum, fired, norms = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae), []
    fires = facts.Fires(sae.d_sae, model.hf.config.get_text_config().vocab_size)
    for batch, part in batches(model, texts):
        x = model.values(batch, [sae.site])[sae.site].float().mul_(batch.content[..., None])
        f = sae.encode(x).mul_(batch.content[..., None])
        top = f.amax(1)
        maxima[part] = top.numpy()
        maximum = torch.maximum(maximum, top.amax(0))
        fired += (f > 0).sum((0, 1))
        lit = f.flatten(0, 1).nonzero()
        own = Features(lit[:, 0], lit[:, 1], f.flatten(0, 1)[lit[:, 0], lit[:, 1]], (f[..., 0].numel(), sae.d_sae))
        fires.add(own, batch.ids.flatten())
        norms.append(x[batch.content].norm(dim=1))
        which = torch.tensor([names.index(labels[index]) for index in part])
        f_sum.index_add_(0, which, f.sum(1))
        x_sum.index_add_(0, which, x.sum(1))
        count.index_add_(0, which, batch.content.sum(1).float())
    marked = np.array(labels)
    inside = marked != ""
    ranked = ranks(maxima[inside].astype(np.float32)).astype(np.float32)
    others_f, others_x, others = f_sum.sum(0), x_sum.sum(0), count.sum()
    out = Contrast({}, {}, {}, maximum, fired / others, float(torch.cat(norms).median()), int(others), fires.top())
    for i, name in enumerate(names[:-1]):
        rest = others - count[i]
        out.features[name] = f_sum[i] / count[i] - (others_f - f_sum[i]) / rest
        out.values[name] = x_sum[i] / count[i] - (others_x - x_sum[i]) / rest
        out.auroc[name] = auroc_of_ranks(ranked, marked[inside] == name)
    _refusing(model, sae, out)
    return out


def _refusing(model: Model, sae: Sae, found: Contrast) -> None:
    """Refusing in the model's own template: assistants that turn a request down against assistants that help."""
    means = {}
    rng = random.Random(0)
    for name in ("assistant_refusal", "assistant_helpful"):
        lines_of = [as_chat(model, bench.expand(t, rng)) for t in bench.concepts()[name].part("train")]
        f_sum, x_sum, count = torch.zeros(sae.d_sae), torch.zeros(sae.d_in), 0
        for batch, _ in batches(model, [line for line in lines_of if line]):
            own = model.values(batch, [sae.site])[sae.site][batch.content].float()
            f_sum += sae.encode(own).sum(0)
            x_sum += own.sum(0)
            count += len(own)
        means[name] = (f_sum / count, x_sum / count)
    refuses, helps = means["assistant_refusal"], means["assistant_helpful"]
    found.features["assistant_refusal"] = refuses[0] - helps[0]
    found.values["assistant_refusal"] = refuses[1] - helps[1]


def keyword_tokens(model: Model, concept: bench.Concept) -> list[int]:
    """First tokens of a concept's keywords as they begin inside a sentence."""
    out = set()
    for word in (*concept.keywords, *ALSO.get(concept.name, ())):
        for form in (word, word[:1].upper() + word[1:]):
            out.add(model.tokenizer(" " + form, add_special_tokens=False)["input_ids"][0])
    return sorted(out - set(model.tokenizer(" I the a is in of", add_special_tokens=False)["input_ids"]))


def effects(model: Model, sae: Sae, norm: float, count: int = 20) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The effect lens over all features: the tensors of `Facts` about it, and concept -> [d_sae] how much likelier its
    words become against all words."""
    unit = sae.W_dec / sae.decoder_norm[:, None] * (effect.STRENGTH * norm)
    sample = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))[: effect.SAMPLE]
    against = effect.baseline(model, sae.site, unit[sample])
    sets = {name: keyword_tokens(model, concept) for name, concept in bench.concepts().items()}
    ids, values, scores = [], [], {name: [] for name in sets}
    for change in effect.changes(model, sae.site, unit):
        best, nats = effect.strongest(change, count, against)
        ids.append(best)
        values.append(nats)
        mean = change.mean(1)
        for name, tokens in sets.items():
            scores[name].append(change[:, tokens].mean(1) - mean)
    told = {
        "effect_ids": torch.cat(ids),
        "effect_values": torch.cat(values),
        "effect_mean": against.mean,
        "effect_deviation": against.deviation,
    }
    return told, {name: torch.cat(parts) for name, parts in scores.items()}


Blend = list[tuple[int, float]]


def blends(sae: Sae, found: Contrast, name: str, causes: Tensor) -> dict[str, Blend]:
    """A few ways of making a concept out of at most PARTS features, weights of the longest part first."""
    difference, target = found.features[name], found.values[name]
    strength = difference * sae.decoder_norm

    def weighted(chosen: Tensor) -> Blend:
        return [(int(i), float(difference[i])) for i in chosen]

    detects = torch.tensor(found.auroc[name])
    detector = int(detects.argmax())
    out: dict[str, Blend] = {"detector": [(detector, 1.0)]}
    both = torch.where(detects > 0.7, causes, torch.full_like(causes, -9.0))
    out["detects and causes"] = [(int(both.argmax()), 1.0)]
    out["difference"] = weighted(strength.topk(PARTS).indices)
    helped = torch.where(causes > 0, strength, torch.full_like(strength, -1.0))
    out["difference, causing"] = weighted(helped.topk(PARTS).indices)
    told = torch.where(detects > 0.6, causes, torch.full_like(causes, -9.0)).topk(PARTS).indices
    out["causing most"] = [(int(i), float(causes[i] / sae.decoder_norm[i])) for i in told]
    out["pursuit"] = pursuit(sae, target, torch.ones(sae.d_sae, dtype=torch.bool))
    out["pursuit, causing"] = pursuit(sae, target, causes > 0)
    return {how: [(i, w) for i, w in blend if w > 0] for how, blend in out.items()}


def pursuit(sae: Sae, target: Tensor, allowed: Tensor) -> Blend:
    """Non-negative orthogonal matching pursuit: the PARTS features whose weighted sum comes nearest to a direction."""
    from scipy.optimize import nnls

    chosen: list[int] = []
    weights = np.zeros(0)
    unit = sae.W_dec / sae.decoder_norm[:, None]
    rest = target.clone()
    for _ in range(PARTS):
        fit = torch.where(allowed, unit @ rest, torch.full((sae.d_sae,), -9.0))
        fit[chosen] = -9.0
        chosen.append(int(fit.argmax()))
        basis = sae.W_dec[chosen].T.double().numpy()
        weights, _ = nnls(basis, target.double().numpy())
        rest = target - torch.tensor(basis @ weights, dtype=torch.float32)
    return sorted(((i, float(w)) for i, w in zip(chosen, weights, strict=True) if w > 0), key=lambda part: -part[1])


def vector(sae: Sae, blend: Blend) -> Tensor:
    """[d_in] the blend's direction, length 1."""
    index = torch.tensor([i for i, _ in blend])
    v = torch.tensor([w for _, w in blend]) @ sae.rows(index)
    return v / v.norm()


def continuations(
    model: Model,
    sae: Sae,
    vectors: Sequence[Tensor | None],
    prompts: Sequence[str],
    seeds: Sequence[int],
    chat: bool = False,
) -> list[tuple[list[str], float]]:
    """For each added vector: continuations of all prompts and seeds, and their surprise under the plain model."""
    jobs = [(k, prompt, seed) for k in range(len(vectors)) for prompt in prompts for seed in seeds]
    texts: list[list[str]] = [[] for _ in vectors]
    nats: list[list[float]] = [[] for _ in vectors]
    for first in range(0, len(jobs), 64):
        part = jobs[first : first + 64]
        ready = [
            model.tokenize_chat([{"role": "user", "content": prompt}]) if chat else model.tokenize(prompt)
            for _, prompt, _ in part
        ]
        changes = []
        for (k, _, _), tokens in zip(part, ready, strict=True):
            v = vectors[k]
            mask = torch.ones(len(tokens) + TOKENS, dtype=torch.bool)
            mask[0] = False
            step = None if v is None else Step(sae.site, Direction(sae.site, v, "v"), "add", 1.0, mask)
            changes.append({sae.site: RowChange([step] if step else [])})
        made: list[list[int]] = [[] for _ in part]
        for column in rows(model, ready, changes, TOKENS, SAMPLING, [seed for *_, seed in part]):
            for row, token in zip(made, column, strict=True):
                if token is not None:
                    row.append(token)
        surprise = surprises(model, [list(t.ids) for t in ready], made)
        for (k, _, _), row, s in zip(part, made, surprise, strict=True):
            texts[k].append(model.tokenizer.decode(row))
            nats[k].append(s)
    return [(t, float(np.nanmean(n))) for t, n in zip(texts, nats, strict=True)]


def surprises(model: Model, prompts: list[list[int]], made: list[list[int]]) -> list[float]:
    """Loss of each continuation, in nats a token, under the unedited model."""
    batch = model.batch([p + m for p, m in zip(prompts, made, strict=True)])
    with torch.inference_mode():
        logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    out = []
    for i, (p, m) in enumerate(zip(prompts, made, strict=True)):
        if not m:
            out.append(float("nan"))
            continue
        at = slice(len(p) - 1, len(p) + len(m) - 1)
        out.append(float(torch.nn.functional.cross_entropy(logits[i, at].float(), torch.tensor(m))))
    return out


def hits(texts: Sequence[str], keywords: Sequence[str]) -> float:
    """Share of texts with a keyword as whole words."""
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in keywords), re.IGNORECASE)
    return sum(bool(pattern.search(text)) for text in texts) / len(texts)


def repeats(texts: Sequence[str]) -> float:
    """Mean share of repeated 3-grams of words."""
    shares = []
    for text in texts:
        w = text.split()
        grams = list(zip(w, w[1:], w[2:], strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def quality(hit: float, surprise: float, plain: float) -> float:
    """Harmonic mean of hits and of how much of the allowed extra surprise is left; 0 when either is."""
    room = max(0.0, 1 - max(0.0, surprise - plain) / (2 * SURPRISE_LIMIT))
    return 0.0 if hit + room == 0 else 2 * hit * room / (hit + room)


def choose_blends(
    model: Model, sae: Sae, found: Contrast, causes: dict[str, Tensor], names: Sequence[str], kept: Path
) -> dict[str, dict[str, Any]]:
    """For each concept the way and the strength that do best on calibration prompts, reported on other prompts.

    What is in the file `kept` already is not done again.
    """
    kinds = {
        "neutral": (CALIBRATION, REPORT),
        "requests": (REQUESTS, REPORT_REQUESTS),
    }
    out: dict[str, dict[str, Any]] = read_json(kept) if kept.exists() else {}
    for name in names:
        if name in out:
            continue
        kind = KINDS.get(name, "neutral")
        chat, (tries_on, told_on) = kind == "requests", kinds[kind]
        _, plain_calibration = continuations(model, sae, [None], tries_on, range(4), chat)[0]
        plain_texts, plain_report = continuations(model, sae, [None], told_on, range(100, 104), chat)[0]
        keywords = (*bench.concepts()[name].keywords, *ALSO.get(name, ()))
        made = blends(sae, found, name, causes[name])
        ways = {how: vector(sae, blend) for how, blend in made.items() if blend}
        ways["DiffMean"] = found.values[name] / found.values[name].norm()
        tries = [(how, s) for how in ways for s in STRENGTHS]
        scored = continuations(model, sae, [ways[h] * (s * found.norm) for h, s in tries], tries_on, range(4), chat)
        table = {
            (h, s): (hits(t, keywords), n, quality(hits(t, keywords), n, plain_calibration))
            for (h, s), (t, n) in zip(tries, scored, strict=True)
        }
        best = {how: max(STRENGTHS, key=lambda s: table[how, s][2]) for how in ways}
        ours = max((how for how in ways if how != "DiffMean"), key=lambda how: table[how, best[how]][2])
        finals = [ours, "DiffMean"]
        reported = continuations(
            model, sae, [ways[h] * (best[h] * found.norm) for h in finals], told_on, range(100, 104), chat
        )
        result: dict[str, Any] = {"blend": made[ours], "how": ours, "dose_rn": best[ours]}
        for how, (texts, nats) in zip(finals, reported, strict=True):
            key = "diffmean" if how == "DiffMean" else "report"
            result[key] = {
                "hits": hits(texts, keywords),
                "extra_surprise": nats - plain_report,
                "repeats": repeats(texts),
                "rn": best[how],
                "plain_hits": hits(plain_texts, keywords),
            }
            if key == "report":
                result["texts"] = texts[:8]
        result["calibration"] = {f"{h} {s}": [round(v, 2) for v in table[h, s]] for h, s in tries}
        out[name] = result
        write_json(kept, out)
        print(name, ours, best[ours], result["report"], "| DiffMean", result["diffmean"], flush=True)
    return out


def fires_at(model: Model, sae: Sae, name: str, word: str) -> np.ndarray:
    """[d_sae] share of a concept's training lines with `word` in which a feature fires at that word."""
    rng, fired, lines_with = random.Random(1), np.zeros(sae.d_sae), 0
    for template in bench.concepts()[name].part("train"):
        tokens = model.tokenize(bench.expand(template, rng))
        at = [p for p in range(len(tokens)) if tokens.piece(p).strip() == word]
        if at:
            x = model.values(model.batch([tokens]), [sae.site])[sae.site][0]
            fired += (sae.encode(x[at]) > 0).any(0).numpy()
            lines_with += 1
    return fired / max(1, lines_with)


def measured(model: Model, sae: Sae, path: Path) -> tuple[Contrast, dict[str, Tensor], dict[str, Tensor]]:
    """`contrast` and `effects`, kept in a file so that a killed run does not begin again."""
    names = list(bench.concepts())
    if not path.exists():
        found = contrast(model, sae)
        told, causes = effects(model, sae, found.norm)
        tensors = {
            "features": torch.stack([found.features[name] for name in names]),
            "values": torch.stack([found.values[name] for name in names]),
            "auroc": torch.tensor(np.stack([found.auroc[name] for name in names])),
            "causes": torch.stack([causes[name] for name in names]),
            "maximum": found.maximum,
            "density": found.density,
            "fires_ids": found.fires[0],
            "fires_shares": found.fires[1],
            **told,
        }
        metadata = {"norm": repr(found.norm), "tokens": str(found.tokens)}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        get = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    found = Contrast(
        features=dict(zip(names, get["features"], strict=True)),
        values=dict(zip(names, get["values"], strict=True)),
        auroc={name: row.numpy() for name, row in zip(names, get["auroc"], strict=True)},
        maximum=get["maximum"],
        density=get["density"],
        norm=float(metadata["norm"]),
        tokens=int(metadata["tokens"]),
        fires=(get["fires_ids"], get["fires_shares"]),
    )
    told = {name: tensor for name, tensor in get.items() if name.startswith("effect_")}
    return found, told, dict(zip(names, get["causes"], strict=True))


def build(model: Model, sae: Sae, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Measures everything, writes `folder/facts.safetensors` and `folder/concepts.json`."""
    found, told, causes = measured(model, sae, folder / "measured.safetensors")
    print(f"norm {found.norm:.1f}, {found.tokens} tokens, effects done", flush=True)
    table: dict[str, Any] = {}
    held_texts, held_labels = labelled("heldout")
    maxima = np.zeros((len(held_texts), sae.d_sae), np.float32)
    for batch, part in batches(model, held_texts):
        x = model.values(batch, [sae.site])[sae.site]
        maxima[part] = sae.encode(x).mul_(batch.content[..., None]).amax(1).numpy()
    ranked = ranks(maxima)
    for name in bench.concepts():
        detects = found.auroc[name]
        if name in ANCHOR:
            detects = np.where(fires_at(model, sae, name, ANCHOR[name]) > 0.9, detects, 0)
        feature = int(np.argmax(detects))
        heldout = auroc_of_ranks(ranked, held_labels == name)
        table[name] = {
            "feature": feature,
            "auroc": round(float(heldout[feature]), 4),
            "causes": round(float(causes[name][feature]), 3),
            "best_five": [
                {"feature": int(f), "auroc": round(float(heldout[f]), 4), "causes": round(float(causes[name][f]), 3)}
                for f in np.argsort(-found.auroc[name])[:5]
            ],
        }
    chosen = choose_blends(model, sae, found, causes, names, folder / "concepts.json")
    for name, entry in chosen.items():
        weights = np.zeros(sae.d_sae, np.float32)
        for index, weight in entry["blend"]:
            weights[index] = weight
        summed = ranks((maxima @ weights)[:, None])
        entry["auroc"] = round(float(auroc_of_ranks(summed, held_labels == name)[0]), 4)
        table[name] |= {
            "blend_auroc": entry["auroc"],
            "blend": entry["blend"],
            "dose_rn": entry["dose_rn"],
            "how": entry["how"],
            "report": entry["report"],
        }
    about = facts.Facts(found.maximum, found.density, found.norm, found.tokens, *found.fires, **told, concepts=table)
    about.save(folder / "facts.safetensors")
    write_json(folder / "concepts.json", chosen)
    assert math.isfinite(found.norm)
    return table
