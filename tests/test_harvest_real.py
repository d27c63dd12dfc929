"""A harvest of 20,000 tokens of the embedded model held to a dense computation: transformers' hidden states, sae-lens'
encoder, plain sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE

from lancet import bench, passes
from lancet.atlas import shards
from lancet.atlas.harvest import harvest
from lancet.lab import Lab, open_lab
from lancet.loading import assets
from lancet.model import Model

TOKENS = 20_000
SITE = "blocks.12.hook_resid_pre"
FOLDER = assets() / "smollm2" / SITE
CLOSE = 1e-4  # of a threshold: there two orders of the same sum may fall on different sides


class Dense:
    """Everything, token by token: [tokens, d_sae] activations, and which tokens lie close to a threshold."""

    def __init__(self, model: Model, prepared: shards.Prepared) -> None:
        held = [prepared.load(index) for index in range(len(prepared.shards))]
        self.hash = np.concatenate([shard.hash for shard in held])
        self.document = np.concatenate([shard.document for shard in held])
        pieces = [ids.tolist() for shard in held for ids in shard.ids]
        self.ids = np.concatenate([np.array(piece) for piece in pieces])
        lengths = np.array([len(piece) for piece in pieces])
        self.piece = np.repeat(np.arange(len(pieces)), lengths)
        begin = lengths.cumsum() - lengths
        x = np.zeros((len(self.ids), 576), np.float32)
        rows = [[model.start_plain, *piece] for piece in pieces]
        blocks = model.hf.config.num_hidden_layers
        model.hf.config.num_hidden_layers = 13  # the blocks above need not be run
        for group in passes.alike(rows):
            longest = max(len(rows[i]) for i in group)
            ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in group])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in group])
            with torch.no_grad():
                hidden = model.hf.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[12]
            for row, i in enumerate(group):
                x[begin[i] : begin[i] + lengths[i]] = hidden[row, 1 : len(rows[i])].numpy()
        model.hf.config.num_hidden_layers = blocks
        sae = SAE.load_from_disk(str(FOLDER)).float()
        with torch.no_grad():
            parts = [(sae.encode(part), part @ sae.W_enc + sae.b_enc) for part in torch.from_numpy(x).split(1024)]
        self.acts = torch.cat([act for act, _ in parts]).numpy()
        threshold = sae.threshold.detach()
        self.close = torch.cat([(pre - threshold).abs() < CLOSE for _, pre in parts]).numpy()


@pytest.fixture(scope="module")
def found(smollm2_f32: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Path, Dense]:
    folder = tmp_path_factory.mktemp("real")
    texts = [" ".join(part) for part in zip(*[iter(bench.neutral_texts(1500))] * 3, strict=False)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    lab = open_lab("smollm2", device="cpu", dtype="float32")
    harvest(lab, corpus, folder / "atlas", TOKENS, lenses=False)
    return lab, folder / "atlas", Dense(smollm2_f32, shards.prepare(smollm2_f32, texts, folder / "s", 512, TOKENS))


def columns(folder: Path, table: str) -> dict[str, Any]:
    return pq.read_table(folder / f"{table}.parquet").to_pydict()


def test_counts_maxima_histograms(found: tuple[Lab, Path, Dense]) -> None:
    _, folder, dense = found
    told, manifest = columns(folder, "features"), json.loads((folder / "manifest.json").read_text())
    assert manifest["corpus"]["tokens"] == len(dense.ids) == TOKENS
    unsure = dense.close.sum(0)
    fired = (dense.acts > 0).sum(0)
    assert unsure.sum() < 0.01 * fired.sum()  # or the test would say nothing
    assert (np.abs(np.array(told["fired"]) - fired) <= unsure).all()
    sure = unsure == 0
    assert sure.mean() > 0.5
    np.testing.assert_allclose(np.array(told["density"])[sure], fired[sure] / TOKENS, atol=1e-12)
    np.testing.assert_allclose(np.array(told["maximum"]), dense.acts.max(0), rtol=1e-5, atol=2e-4)
    mean = dense.acts.sum(0, dtype=np.float64) / fired.clip(1)
    np.testing.assert_allclose(np.array(told["mean"])[sure], mean[sure], rtol=1e-5)
    edges = manifest["scale"] * 2.0 ** ((np.arange(50) - 50) / 4)
    edges[0] = 0
    for feature in np.flatnonzero(sure & (fired > 0))[::7].tolist():
        values = dense.acts[:, feature][dense.acts[:, feature] > 0]
        at_edge = (np.abs(values[:, None] / edges[1:] - 1) < 1e-5).any()
        if not at_edge:
            counted = np.histogram(values, [*edges, np.inf])[0]
            np.testing.assert_array_equal(told["histogram"][feature], counted)
        bounds = np.array(told["bounds"][feature])
        assert bounds[0] == 0 and bounds[5] == pytest.approx(values.max(), rel=1e-5)
        for share, bound in zip((0.2, 0.4, 0.6, 0.8), bounds[1:5], strict=True):
            away = np.abs(np.log2(edges[1:] / (share * values.max())))
            assert abs(np.log2(bound / (share * values.max()))) <= away.min() + 1e-5
    rare = sure & (fired > 20) & (fired < 500)  # a feature that fires on more than 1,024 different tokens is sampled
    for feature in np.flatnonzero(rare)[:40].tolist():
        mass = np.bincount(dense.ids, dense.acts[:, feature], minlength=49152)
        best = np.sort(mass)[::-1][: len(told["fires_shares"][feature])]
        np.testing.assert_allclose(told["fires_shares"][feature], best / mass.sum(), atol=1e-5)


def test_strongest_examples(found: tuple[Lab, Path, Dense]) -> None:
    _, folder, dense = found
    examples = pq.read_table(folder / "examples.parquet").to_pandas()
    begins = np.flatnonzero(np.diff(dense.piece, prepend=-1))
    peaks = np.maximum.reduceat(dense.acts, begins, axis=0)  # [pieces, d_sae]
    of_document = np.unique(dense.document, return_inverse=True)[1]
    strongest = np.zeros((of_document.max() + 1, peaks.shape[1]), np.float32)
    np.maximum.at(strongest, of_document, peaks)
    best = -np.sort(-strongest, axis=0)[:20]
    band = examples[examples.band == 0]
    for feature, rows in band.groupby("feature"):
        wanted = best[: len(rows), feature]
        np.testing.assert_allclose(rows.sort_values("rank").value, wanted, rtol=1e-5, atol=2e-4)
        assert len(rows) >= min(20, int((strongest[:, feature] > 1.0).sum()))
    where = {int(hash_): i for i, hash_ in enumerate(dense.hash)}
    for row in examples.iloc[:: max(1, len(examples) // 500)].itertuples():
        assert peaks[where[row.hash], row.feature] == pytest.approx(row.value, rel=1e-5, abs=2e-4)


def test_company(found: tuple[Lab, Path, Dense]) -> None:
    _, folder, dense = found
    told = columns(folder, "features")
    lit = dense.acts > 0
    fired, sure = lit.sum(0), dense.close.sum(0) == 0
    chosen = np.flatnonzero(sure & (fired > 50))[:64]
    both = torch.from_numpy(lit[:, chosen].astype(np.float32)).t() @ torch.from_numpy(lit.astype(np.float32))
    for feature, row in zip(chosen.tolist(), both.numpy(), strict=True):
        others = np.array(told["together"][feature])
        known = sure[others]
        shares = np.array(told["together_shares"][feature])
        np.testing.assert_allclose(shares[known], row[others][known] / fired[feature], atol=1e-6)
        score = row / np.sqrt(fired[feature] * fired.clip(1).astype(np.float64))
        score[feature] = 0
        np.testing.assert_allclose(score[others][known], np.sort(score)[::-1][: len(others)][known], rtol=0.02)


def test_logit_lens(found: tuple[Lab, Path, Dense]) -> None:
    from lancet.atlas import lenses

    lab, folder, _ = found
    shown = lenses.logit(lab, lab.sae(), folder / "blocks", lambda line: None)
    assert shown is not None
    hf, sae = lab.model.hf, SAE.load_from_disk(str(FOLDER)).float()
    for feature in range(0, 8192, 1024):
        with torch.no_grad():
            logits = hf.lm_head(hf.model.norm.weight * sae.W_dec[feature])
        logits -= logits.mean()
        np.testing.assert_allclose(shown["up_values"][feature], logits.topk(10).values, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits[shown["down"][feature]], shown["down_values"][feature], rtol=1e-4, atol=1e-5)
