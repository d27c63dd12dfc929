"""`lancet eval`: every figure against a plain loop over tokens, sentences or rows, or against scikit-learn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_edits import save_sae
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

import lancet
from lancet import bench, massive
from lancet.errors import LancetError, MismatchError, UsageError
from lancet.evaluation import concepts, decoder, lines, probe, texts
from lancet.evaluation.evaluate import evaluate
from lancet.evaluation.scores import Evaluation
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.scoring import best_threshold, f1
from lancet.site import Site

TEXTS = ["The cat sat on the mat and the dog sat on the cat.", "A list:\n- rope\n- tent", "你好，世界", "ox", "No."]


@pytest.fixture(scope="module")
def tiny(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2(seed=3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return path


def sklearn_f1(positive: Any, called: Any) -> float:
    return float(f1_score(positive, called, zero_division=0.0))  # type: ignore[arg-type]


SAES: dict[str, Callable[[], Sae]] = {
    "relu": lambda: random_sae(64, 96, site=Site(2)),
    "topk": lambda: random_sae(64, 96, "topk", site=Site(2), seed=1),
    "abstopk": lambda: random_sae(64, 96, "abstopk", site=Site(1, "resid_mid"), seed=2),
    "centred": lambda: random_sae(64, 96, site=Site(1, "mlp_out"), centred=True, seed=3),
    "layer_norm": lambda: random_sae(64, 96, "jumprelu", site=Site(3), normalize="layer_norm", seed=4),
    "transcoder": lambda: random_sae(
        64, 96, "transcoder", site=Site(1, "ln2.hook_normalized"), writes=Site(1, "mlp_out"), seed=5
    ),
    "temporal": lambda: random_sae(64, 96, "temporal", site=Site(2), seed=6),
}


def plainly(model: Model, sae: Sae) -> dict[str, Any]:
    """Every figure by a loop over texts, one pass each, all activations dense, splicing by a plain hook."""
    own, rebuilt, lit = [], [], []
    costs: dict[str, list[float]] = {"plain": [], "spliced": [], "zeros": [], "kl": []}
    for text in TEXTS:
        ids = torch.tensor([model.tokenize(text).ids])
        values = model.values(model.batch([ids[0].tolist()]), [sae.site, sae.writes])
        x, y = values[sae.site], values[sae.writes]
        if sae.kind.contextual:
            features = sae.features(x[0])
            f, new = features.dense()[None], sae.decode_features(features, x[0])[None]
        else:
            f = sae.encode(x)
            new = sae.decode(f, x)
        own.append(sae.out_basis(y)[0, 1:])
        rebuilt.append(new[0, 1:])
        lit.append(f[0, 1:])
        put = (new + y - sae.out_basis(y))[:, 1:]

        def logits(new: Tensor | None, ids: Tensor = ids) -> Tensor:
            def function(value: Tensor) -> Tensor | None:
                return None if new is None else torch.cat([value[:, :1], new], 1)

            with torch.no_grad(), model.at(sae.writes, function):
                return model.hf(ids).logits[0].double().log_softmax(-1)

        said = {"plain": logits(None), "spliced": logits(put), "zeros": logits(torch.zeros_like(put))}
        for position in range(2, ids.shape[1]):  # the first token of the text is predicted by the start alone
            for name, told in said.items():
                costs[name].append(-float(told[position - 1, ids[0, position]]))
            p, q = said["plain"][position - 1], said["spliced"][position - 1]
            costs["kl"].append(float((p.exp() * (p - q)).sum()))
    y, z, f = torch.cat(own).double(), torch.cat(rebuilt).double(), torch.cat(lit)
    out = {name: float(np.mean(told)) for name, told in costs.items()}
    fired = (f != 0).sum(0).numpy()
    return out | {
        "values": y,
        "rebuilt": z,
        "explained": 1 - float(((y - z) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()),
        "l0": float((f != 0).sum(1).double().mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(y, z, dim=1).mean()),
        "dead": float((fired == 0).mean()),
        "fired": fired,
        "tokens": len(y),
        "predicted": len(costs["plain"]),
    }


@pytest.mark.parametrize("name", SAES)
def test_figures_equal_a_plain_loop(name: str, tiny: Model, file: Path) -> None:
    sae = SAES[name]()
    found = evaluate(tiny, sae, [file], concepts=False)
    (got,), want = found.saes, plainly(tiny, sae)
    assert found.tokens == got.tokens == want["tokens"]
    assert got.losses is not None and got.losses.tokens == want["predicted"]
    assert got.explained_variance == pytest.approx(want["explained"], rel=1e-4)
    assert got.l0 == pytest.approx(want["l0"], rel=1e-9)
    assert got.cosine == pytest.approx(want["cosine"], rel=1e-4)
    assert got.dead == pytest.approx(want["dead"])
    assert got.losses.plain == pytest.approx(want["plain"], rel=1e-5)
    assert got.losses.spliced == pytest.approx(want["spliced"], rel=1e-4)
    assert got.losses.zeros == pytest.approx(want["zeros"], rel=1e-5)
    assert got.losses.kl == pytest.approx(want["kl"], rel=1e-3, abs=1e-6)
    if want["zeros"] > want["plain"]:
        recovered = (want["zeros"] - want["spliced"]) / (want["zeros"] - want["plain"])
        assert got.recovered == pytest.approx(recovered, rel=1e-2)
    else:
        assert got.recovered is None and any("no loss to recover" in note for note in found.notes)
    share = want["fired"][want["fired"] > 0] / want["tokens"]
    for low, high, count in zip(got.density.edges, got.density.edges[1:], got.density.counts, strict=False):
        last = high == got.density.edges[-1]
        inside = (np.log10(share) >= low) & ((np.log10(share) <= high) if last else (np.log10(share) < high))
        assert count == inside.sum()
    assert sum(got.density.counts) + got.density.dead == sae.d_sae


def test_massive_tokens_are_left_out_of_explained_variance(
    tiny: Model, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, site = SAES["transcoder"](), Site(1, "mlp_out")
    monkeypatch.setattr(massive, "TIMES", 1.1)
    found = evaluate(tiny, sae, [file], concepts=False)
    (got,), want = found.saes, plainly(tiny, sae)
    values = [tiny.values(tiny.batch([list(tiny.tokenize(text).ids)]), [site])[site][0, 1:] for text in TEXTS]
    norms = torch.cat(values).norm(dim=1)
    kept = norms <= 1.1 * norms.median()
    y, z = want["values"][kept], want["rebuilt"][kept]
    assert got.massive == int((~kept).sum()) and 0 < got.massive < got.tokens == len(kept)
    left_out = 1 - float(((y - z) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())
    assert got.explained_variance == pytest.approx(left_out, rel=1e-4)
    assert got.explained_all == pytest.approx(want["explained"], rel=1e-4)
    assert got.l0 == pytest.approx(want["l0"]) and got.cosine == pytest.approx(want["cosine"], rel=1e-4)
    told = f"{got.massive} of {got.tokens} tokens at {site} have a norm over 1.1 times the median"
    assert [note for note in found.notes if told in note and f"with them it is {got.explained_all:.3f}" in note]
    several = evaluate(tiny, {"a": sae, "b": sae}, [file], concepts=False)
    (note,) = [note for note in several.notes if told in note]
    assert note.endswith(f"{got.explained_all:.3f} (a), {got.explained_all:.3f} (b)")


def test_several_saes_share_a_pass_and_score_as_alone(tiny: Model, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = {"a": SAES["relu"](), "b": SAES["topk"](), "c": SAES["centred"]()}
    alone = {name: evaluate(tiny, {name: sae}, [file], concepts=False).saes[0] for name, sae in saes.items()}
    passes: list[int] = []
    forward = Model.forward

    def counted(self: Model, ids: Tensor, *args: Any, **more: Any) -> Tensor:
        passes.append(len(ids))
        return forward(self, ids, *args, **more)

    monkeypatch.setattr(Model, "forward", counted)
    together = evaluate(tiny, saes, [file], concepts=False)
    assert [each.to_json() for each in together.saes] == [alone[name].to_json() for name in saes]
    assert len(passes) == 1 + 3 + 2  # plain; each spliced; zeros at two sites


def test_the_start_token_is_never_counted_and_tokens_are_bounded(tiny: Model, file: Path) -> None:
    sae = SAES["relu"]()
    found = evaluate(tiny, sae, [file], tokens=7, concepts=False)
    assert found.tokens == 7 and found.saes[0].losses is not None and found.saes[0].losses.tokens == 6
    rows = [row for chunk in texts.chunks(tiny, TEXTS, 10**6) for row in chunk]
    assert [row[1:] for row in rows] == [list(tiny.tokenize(text).ids[1:]) for text in TEXTS]
    assert any("rare features" in note for note in found.notes)


def test_losses_on_a_part_of_the_text(tiny: Model, file: Path) -> None:
    sae = SAES["relu"]()
    whole, part = (evaluate(tiny, sae, [file], loss_tokens=n, concepts=False).saes[0] for n in (10**6, 1))
    assert part.losses is not None and whole.losses is not None
    assert part.losses.tokens == len(tiny.tokenize(TEXTS[0])) - 2 < whole.losses.tokens
    assert part.explained_variance == pytest.approx(whole.explained_variance, rel=1e-9)


def test_decoder_similarity_equals_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae(8, 50, site=Site(0))
    sae.W_dec[7] = 3 * sae.W_dec[31]
    sae.W_dec[9] = -sae.W_dec[11]
    sae.W_dec[20] = 0
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    highest = [max(float(rows[i] @ rows[j]) for j in range(50) if j != i) for i in range(50)]
    for block in (1024, 3):
        monkeypatch.setattr(decoder, "BLOCK", block)
        got = decoder.similarity(sae)
        assert got.asked == 50
        assert got.median == pytest.approx(float(torch.tensor(highest).median()), abs=1e-6)
        assert got.near == pytest.approx(np.mean(np.array(highest) > 0.7))
        assert got.twin == pytest.approx(np.mean(np.array(highest) > 0.9)) and got.twin >= 0.04
    monkeypatch.setattr(decoder, "WORK", 0)
    monkeypatch.setattr(decoder, "LEAST", 5)
    some = decoder.similarity(sae)
    assert some.asked == 5
    assert some.median == pytest.approx(sorted(highest[i] for i in (0, 12, 24, 37, 49))[2], abs=1e-6)


# ---- the bench -------------------------------------------------------------------------------------------------------


def test_f1_and_its_threshold_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for case in range(16):
        positive = rng.random(30) < 0.3
        positive[0] = True
        scores = np.round(rng.normal(size=30) + positive, 1 if case % 2 else 6)  # with ties and without
        if case == 7:
            scores[:] = 0
        best = best_threshold(scores, positive)
        tried = [sklearn_f1(positive, scores >= bar) for bar in np.unique(scores)]
        assert f1(scores, positive, best) == pytest.approx(max(tried))
        bar = float(rng.normal())
        assert f1(scores, positive, bar) == pytest.approx(sklearn_f1(positive, scores >= bar))


@pytest.mark.parametrize("d", [5, 60])
def test_probes_equal_scikit_learn(d: int) -> None:
    rng = np.random.default_rng(d)
    labels = rng.random((40, 3)) < 0.3
    x = rng.normal(size=(40, d)) + labels @ rng.normal(size=(3, d)) + 5
    got, other = probe.fit(x, labels), rng.normal(size=(9, d)) + 5
    errors = {}
    spectrum = np.linalg.svd(x - x.mean(0), compute_uv=False)
    for share in probe.RIDGES:
        alpha, left_out = share * float((spectrum**2).mean()), np.zeros(labels.shape)
        for i in range(40):
            rest = np.arange(40) != i
            left_out[i] = Ridge(alpha).fit(x[rest], labels[rest].astype(float)).predict(x[i : i + 1])[0]
        errors[alpha] = float(((left_out - labels) ** 2).sum())
        if alpha == pytest.approx(got.ridge):
            assert got.left_out == pytest.approx(left_out, abs=1e-8)
    assert got.ridge == pytest.approx(min(errors, key=lambda alpha: errors[alpha]))
    assert got.scores(other) == pytest.approx(Ridge(got.ridge).fit(x, labels.astype(float)).predict(other), abs=1e-8)
    for i in range(3):
        mine = labels[:, i]
        within = sum(np.cov(x[mine == side].T, bias=True) * (mine == side).mean() for side in (False, True))
        grain = got.ridge / 40 / (np.trace(within) / d)
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=grain / (1 + grain)).fit(x, mine)
        way = lda.coef_[0] / np.linalg.norm(lda.coef_[0])
        assert got.ways[:, i] / np.linalg.norm(got.ways[:, i]) == pytest.approx(way, abs=1e-6)


@pytest.fixture(scope="module")
def few() -> Any:
    """Three concepts of the bench, four lines each: the whole bench would take a tiny model minutes."""
    patch = pytest.MonkeyPatch()
    kept = dict(list(bench.concepts().items())[:3])
    patch.setattr(bench, "concepts", lambda: kept)
    patch.setattr(lines, "PER_CONCEPT", 4)
    yield kept
    patch.undo()


@pytest.fixture(scope="module")
def read(tiny: Model, few: Any) -> tuple[list[Sae], lines.Lines, lines.Lines]:
    saes = [
        random_sae(64, 40, "topk", site=Site(2)),
        random_sae(64, 30, "jumprelu", site=Site(3), normalize="layer_norm"),
        random_sae(64, 30, "temporal", site=Site(2)),
    ]
    return saes, *(lines.read(tiny, saes, *lines.labelled(part)) for part in ("train", "heldout"))  # type: ignore[return-value]


def test_lines_equal_a_loop(tiny: Model, read: Any) -> None:
    saes, _, heldout = read
    said, labels = lines.labelled("heldout")
    assert len(said) == 12 and list(heldout.labels) == list(labels)
    for i, text in enumerate(said):
        batch = tiny.batch([tiny.tokenize(text, most=lines.TOKENS)])
        for which, sae in enumerate(saes):
            x = tiny.values(batch, [sae.site])[sae.site][0]
            own = x[1:]
            assert heldout.mean[sae.site][i] == pytest.approx(own.mean(0).numpy(), abs=1e-4)
            both = torch.cat([own.amax(0), (-own).amax(0)])
            assert heldout.extreme[sae.site][i] == pytest.approx(both.numpy(), abs=1e-4)
            keep = torch.arange(len(x)) > 0
            f = sae.features(x, keep).dense()
            assert heldout.strongest[which][i].toarray()[0] == pytest.approx(f.abs().amax(0).numpy(), abs=1e-3)
            written = (f * sae.scale(own)).mean(0)
            assert heldout.written[which][i].toarray()[0] == pytest.approx(written.numpy(), abs=1e-3)


def test_concepts_equal_scikit_learn(read: Any) -> None:
    saes, train, heldout = read
    for which, sae in enumerate(saes):
        known = concepts.beside(sae.site, train, heldout)
        found = concepts.score(sae, which, train, heldout, known)
        own, theirs = (part.strongest[which].toarray() for part in (train, heldout))
        for i, concept in enumerate(found.concepts):
            mine, held = train.labels == concept.name, heldout.labels == concept.name
            areas = [[roc_auc_score(m, v[:, j]) for j in range(sae.d_sae)] for m, v in ((mine, own), (held, theirs))]
            chosen = concept.feature.index
            assert chosen is not None
            assert areas[0][chosen] == pytest.approx(max(areas[0])) == pytest.approx(concept.feature.train)
            assert concept.feature.auroc == pytest.approx(areas[1][chosen])
            assert concept.best[1] == pytest.approx(max(areas[1])) == pytest.approx(areas[1][concept.best[0]])
            assert concept.detectors == sum(a >= 0.9 and b >= 0.9 for a, b in zip(*areas, strict=True))
            bar = best_threshold(own[:, chosen], mine)
            assert concept.feature.f1 == pytest.approx(sklearn_f1(held, theirs[:, chosen] >= bar))
            scores = known.probes.scores(heldout.mean[sae.site])[:, i]
            assert concept.probe.auroc == pytest.approx(roc_auc_score(held, scores))
            place = concept.coordinate.index
            assert place is not None
            plain = train.extreme[sae.site], heldout.extreme[sae.site]
            column = place + (64 if concept.coordinate.sign < 0 else 0)
            every = [roc_auc_score(mine, plain[0][:, j]) for j in range(128)]
            assert every[column] == pytest.approx(max(every))
            assert concept.coordinate.auroc == pytest.approx(roc_auc_score(held, plain[1][:, column]))
            model = LinearRegression().fit(own[:, list(concept.split)], mine)
            bar = best_threshold(model.predict(own[:, list(concept.split)]), mine)
            reached = sklearn_f1(held, model.predict(theirs[:, list(concept.split)]) >= bar)
            assert concept.sparse_f1 == pytest.approx(reached)
        counted = [c.feature.index for c in found.concepts]
        assert found.figures()["sharing"] == sum(counted.count(index) > 1 for index in counted)


def synthetic(strongest: list[np.ndarray], labels: list[np.ndarray], values: list[np.ndarray]) -> list[lines.Lines]:
    from scipy.sparse import csc_matrix

    return [
        lines.Lines(
            label,
            {Site(0): v},
            {Site(0): np.hstack([v, -v])},
            [csc_matrix(high)],
            [csc_matrix(high.astype(np.float64))],
        )
        for high, label, v in zip(strongest, labels, values, strict=True)
    ]


@pytest.mark.parametrize("kind", ["one", "split", "absorbed", "silent"])
def test_splitting_and_absorption_on_known_features(kind: str, few: Any) -> None:
    """Feature 0 is the first concept; or 0 and 1 share its lines; or on some held-out lines feature 2, whose row points
    the same way, fires in its place; or a feature of another direction does."""
    names = list(few)
    labels = np.array([name for name in names for _ in range(8)])
    sae = random_sae(6, 10, site=Site(0))
    sae.W_dec.copy_(torch.eye(10, 6))
    sae.W_dec[2], sae.W_dec[3] = torch.tensor([0.9, 0.1, 0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 0, 0, 1])
    rng = np.random.default_rng(0)
    parts = []
    for heldout in (False, True):
        high = np.zeros((24, 10), np.float32)
        high[8:16, 4], high[16:, 5] = 1, 1
        high[:8, 0] = 1
        if kind == "split":
            high[4:8, 0], high[4:8, 1] = 0, 1
        if kind in ("absorbed", "silent") and heldout:
            high[6:8, 0], high[6:8, 2 if kind == "absorbed" else 3] = 0, 1
        parts.append(high)
    values = []
    for _ in parts:
        value = rng.normal(size=(24, 6)).astype(np.float32) * 0.05
        value[:8, 0] += 1
        values.append(value)
    train, heldout = synthetic(parts, [labels, labels], values)
    known = concepts.beside(Site(0), train, heldout)
    first = concepts.score(sae, 0, train, heldout, known).concepts[0]
    assert first.probe.auroc == 1 and first.feature.train == (0.75 if kind == "split" else 1)
    assert set(first.split) == ({0, 1} if kind == "split" else {0})
    assert first.absorbed == (0.25 if kind == "absorbed" else 0)
    assert first.feature.auroc == {"one": 1, "split": 0.75}.get(kind, 0.875)


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_json_picture_and_lab(tiny: Model, few: Any, file: Path, tmp_path: Path) -> None:
    lab = Lab(tiny, [SAES["relu"](), SAES["transcoder"]()])
    found = lab.evaluate([file])
    assert isinstance(found, Evaluation)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["tokens"] == found.tokens and [each["site"] for each in told["saes"]] == [
        "blocks.2.hook_resid_pre",
        "blocks.1.ln2.hook_normalized",
    ]
    page = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split("## `lancet eval")[1].split("\n## ")[0]
    for part in (told, told["saes"][0], told["saes"][0]["bench"], told["saes"][0]["bench"]["concepts"][0]):
        for key in part:
            assert f"`{key}" in section, key
    assert [c["absorbed"] for c in told["saes"][1]["bench"]["concepts"]] == [None] * 3  # a transcoder writes elsewhere
    assert lancet.evaluate is evaluate
    assert str(found).count("explained variance") == 2


def test_bad_input(tiny: Model, tmp_path: Path, file: Path) -> None:
    sae = SAES["relu"]()
    with pytest.raises(UsageError, match="does not exist"):
        evaluate(tiny, sae, [tmp_path / "none.txt"])
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no text to score on"):
        evaluate(tiny, sae, [empty])
    with pytest.raises(UsageError, match="at least one"):
        evaluate(tiny, [])
    with pytest.raises(UsageError, match="two SAEs of one name"):
        evaluate(tiny, [sae, sae])
    with pytest.raises(UsageError, match="at least 2 tokens"):
        evaluate(tiny, sae, [file], tokens=1)
    with pytest.raises(MismatchError, match=r"48 wide at blocks\.2\.hook_resid_pre, where .* has 64"):
        evaluate(tiny, random_sae(48, 96, site=Site(2)), [file])
    with pytest.raises(UsageError, match="blocks 0 to 3"):
        evaluate(tiny, random_sae(64, 96, site=Site(9)), [file])


def test_the_bundled_text_is_held_out_and_comes_once() -> None:
    stream = texts.bundled()
    first = [next(stream) for _ in range(1500)]
    assert len(set(first)) == 1500 and first[:50] == [text for text, _ in zip(texts.bundled(), range(50), strict=False)]
    trained = {template for concept in bench.concepts().values() for template in concept.part("train")}
    trained |= {template for passages in bench.passages().values() for template in bench.select(passages, "train")}
    assert not trained & set(first)


def test_numbers_that_ran_over_are_null(tiny: Model, few: Any, file: Path) -> None:
    sae = SAES["relu"]()
    sae.b_dec[:] = math.nan
    told = evaluate(tiny, sae, [file], concepts=False).to_json()["saes"][0]
    assert told["explained_variance"] is None and told["loss_spliced"] is None and told["loss_recovered"] is None
    sae = SAES["relu"]()
    sae.W_dec[3] = math.inf
    json.dumps(evaluate(tiny, sae, [file], concepts=False).to_json(), allow_nan=False)
    assert sae.b_enc is not None
    sae.b_enc[0] = math.inf
    with pytest.raises(LancetError, match="not finite"):
        evaluate(tiny, sae, [file])


def test_command_line(
    tiny_gpt2: Callable[..., Model], few: Any, tmp_path: Path, file: Path, capsys: Any, monkeypatch: Any
) -> None:
    import sys

    from lancet.cli import main

    model = tiny_gpt2(seed=3)
    folders = []
    for seed in (0, 1):
        sae = random_sae(64, 96, site=Site(2), seed=seed)
        folders.append(str(save_sae(tmp_path / str(seed) / "sae", sae, metadata={"hook_name": str(Site(2))})))
    common = ["--model", model.name, "--basis", "plain", "--anyway", "--device", "cpu", "--dtype", "float32"]

    def run(*arguments: str, leave: str = "") -> tuple[int, str, str]:
        options = [option for option in common if option != leave]
        monkeypatch.setattr(sys, "argv", ["lancet", "eval", *arguments, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    code, out, err = run(*folders, "--text", str(file), "--json", "--plot", str(tmp_path / "front.png"))
    assert code == 0, err
    told = json.loads(out)
    assert [each["name"] for each in told["saes"]] == folders  # both are called "sae"
    code, out, err = run(*folders, "--text", str(file), "--tokens", "30")
    assert code == 0 and "30 tokens" in out
    assert out.count("\n") > 8 and "\t" in out
    for concept in few:
        assert out.count(f"{concept}\t") == 2
    code, out, _ = run(folders[0], "--text", str(file), "--no-concepts")
    assert code == 0 and next(iter(few)) not in out
    code, _, err = run(folders[0], "--text", str(file), leave="--anyway")  # it was trained on no model
    assert code == 1 and "fails its self-test" in err
    assert run(folders[0], folders[0], "--text", str(file))[0] == 2
    assert run(folders[0], "--tokens", "many")[0] == 2
    assert run(folders[0], "--text", str(tmp_path / "none.txt"))[0] == 2
    assert run(str(tmp_path / "nothing"), "--text", str(file))[0] == 2
