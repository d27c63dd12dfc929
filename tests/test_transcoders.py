"""Transcoders: edits against the same edits done with sae-lens' classes inside TransformerLens' hooks, encoding and
decoding in full, and against plain hooks on a transformers model; several at once, batches, the cache, reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import generated, longer, reference
from fixtures_families import family, hooked
from torch import Tensor

from lancet import facts
from lancet.edit import RowChange, Step
from lancet.errors import UsageError
from lancet.facts import Facts
from lancet.generate import logits
from lancet.lab import Lab
from lancet.model import Model
from lancet.reading import read
from lancet.sae import Sae, random_sae
from lancet.site import Site

TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
TEXT, LATER = "The cat sat on the mat and the dog", ["return the value", "The dog"]


def transcoder(
    model: Model, layer: int, kind: Any = "mlp.hook_in", architecture: Any = "transcoder", seed: int = 0
) -> Sae:
    site = Site(layer, kind)
    return random_sae(model.d_model, 96, architecture, seed=seed, site=site, writes=Site(layer, "mlp_out"))


def lit(lab: Lab, sae: Sae, text: str = TEXT) -> int:
    """A feature that fires on some tokens of a text and not on others."""
    x = lab.model.values(lab.model.batch([lab.tokenize(text)]), [sae.site])[sae.site][0, 1:]
    share = (sae.encode(x) > 0).float().mean(0)
    return int((share - 0.5).abs().argmin())


Change = tuple[Sae, int, str, float, slice]
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "+=": lambda f, a: f + a,
    "=": lambda f, a: torch.full_like(f, a),
    "*=": lambda f, a: f * a,
    ">=": lambda f, a: f.clamp(min=a),
    "<=": lambda f, a: f.clamp(max=a),
}


def by_lens(lens: Any, ids: Sequence[int], changes: Sequence[Change], blunt: bool = False) -> Tensor:
    """[seq, vocab] TransformerLens' logits with sae-lens' transcoders in its hooks."""
    hooks: list[Any] = []
    for sae in {id(change[0]): change[0] for change in changes}.values():
        theirs, seen = reference(sae), []

        def keep(value: Tensor, hook: Any, seen: list[Tensor] = seen) -> None:
            seen[:] = [value.clone()]

        def edit(value: Tensor, hook: Any, sae: Sae = sae, theirs: Any = theirs, seen: Any = seen) -> Tensor:
            before = theirs.encode(seen[0])
            after = before.clone()
            touched = torch.zeros(value.shape[1], dtype=torch.bool)
            for owner, feature, sign, amount, span in changes:
                if owner is sae:
                    after[:, span, feature] = OPERATIONS[sign](after[:, span, feature], amount)
                    touched[span] = True
            skip = theirs.forward(seen[0]) - theirs.decode(before)
            new = theirs.decode(after) + skip if blunt else value + theirs.decode(after) - theirs.decode(before)
            return torch.where(touched[None, :, None], new, value)

        hooks += [(str(sae.site), keep), (str(sae.writes), edit)]
    with torch.no_grad():
        return lens.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=hooks)[0]


def agree(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.parametrize("name", ["GPT-2", "Gemma 2", "Llama"])
def test_edits_equal_sae_lens_inside_transformer_lens(name: str) -> None:
    model, lens = family(name), hooked(name)
    for architecture in TRANSCODERS:
        sae = transcoder(model, 1, "ln2.hook_normalized", architecture)
        lab = Lab(model, [sae])
        tokens, f = lab.tokenize(TEXT), lit(lab, sae)
        plain = by_lens(lens, tokens.ids, [])
        assert agree(lab.logits(tokens), plain)
        for sign, amount in (("+=", 3.0), ("=", 4.0), ("*=", -2.0), (">=", 1.5), ("<=", 0.05)):
            for span, text in ((slice(1, None), "all"), (slice(3, 5), "3:5")):
                change: Change = (sae, f, sign, amount, span)
                theirs = by_lens(lens, tokens.ids, [change])
                assert agree(lab.logits(tokens, f"#{f} {sign} {amount} @ {text}"), theirs), (architecture, sign, text)
                if text == "all":
                    assert not torch.allclose(theirs, plain, atol=1e-3)
                    theirs = by_lens(lens, tokens.ids, [change], blunt=True)
                    assert agree(lab.logits(tokens, f"#{f} {sign} {amount}", keep_error=False), theirs), architecture


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2(n_layer=4, n_embd=48, n_head=4)


@pytest.fixture
def lab(model: Model) -> Lab:
    """Two transcoders and an SAE of the stream before the second of them."""
    stream = random_sae(48, 96, site=Site(2), seed=5)
    return Lab(model, [transcoder(model, 1), stream, transcoder(model, 2, architecture="skip_transcoder", seed=3)])


def by_hooks(model: Model, ids: Sequence[int], changes: Sequence[Change]) -> Tensor:
    """[seq, vocab] transformers' logits with plain hooks on its modules, every SAE encoding and decoding in full."""
    handles: list[Any] = []
    for sae in {id(change[0]): change[0] for change in changes}.values():
        theirs = reference(sae)
        block: Any = model.hf.transformer.h[sae.site.layer]

        def moved(x: Tensor, sae: Sae = sae, theirs: Any = theirs) -> Tensor:
            before = theirs.encode(x)
            after = before.clone()
            for owner, feature, sign, amount, span in changes:
                if owner is sae:
                    after[:, span, feature] = OPERATIONS[sign](after[:, span, feature], amount)
            return theirs.decode(after) - theirs.decode(before)

        if sae.kind.transcoder:
            hook = lambda _m, args, out, moved=moved: out + moved(args[0])  # noqa: E731
            handles.append(block.mlp.register_forward_hook(hook))
        else:
            before = lambda _m, args, moved=moved: (args[0] + moved(args[0]), *args[1:])  # noqa: E731
            handles.append(block.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            return model.hf(torch.tensor([list(ids)])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def test_several_at_once(lab: Lab) -> None:
    """A later transcoder reads what earlier edits left, as the MLP does that it stands for."""
    first, stream, second = lab.saes
    tokens = lab.tokenize(TEXT)
    f, g, h = (lit(lab, sae) for sae in lab.saes)
    edits = [f"{second.site}#{h} *= 5", f"{first.site}#{f} = 6 @ 2:", f"{stream.site}#{g} += 9 @ 4:6"]
    edits += [f"{second.site}#{h} += 1", f"{first.site}#{f + 1} >= 2"]
    everywhere = slice(1, None)
    changes: list[Change] = [
        (second, h, "*=", 5.0, everywhere),
        (first, f, "=", 6.0, slice(2, None)),
        (stream, g, "+=", 9.0, slice(4, 6)),
        (second, h, "+=", 1.0, everywhere),
        (first, f + 1, ">=", 2.0, everywhere),
    ]
    assert agree(lab.logits(tokens, edits), by_hooks(lab.model, tokens.ids, changes))


def test_an_edit_at_the_stream_reaches_what_the_transcoder_reads(lab: Lab) -> None:
    """Read and edited at one place: the transcoder sees the value that the model goes on with."""
    stream = lab.saes[1]
    late = random_sae(48, 96, "transcoder", site=Site(2), writes=Site(2, "mlp_out"), seed=7)
    both = Lab(lab.model, [late])
    f = lit(both, late)
    tokens = lab.tokenize(TEXT)
    vector = stream.rows(torch.tensor([3]))[0]
    direction = dataclasses.replace(lab.direction(f"{stream.site}#3"), vector=vector * 4)
    assert direction.site == late.site
    scaled = both.steps(f"#{f} *= 4", tokens, len(tokens))
    push = Step(direction.site, direction, "add", 1.0, scaled[0].mask)
    found: list[Tensor] = []
    with lab.model.at(Site(3), lambda x: found.append(x[0].clone())):
        for steps in ([push, *scaled], [push]):
            logits(both.model, [tokens], [{step.site: RowChange([step]) for step in steps}])
    x = lab.model.values(lab.model.batch([tokens]), [Site(2)])[Site(2)][0, 1:] + vector * 4
    expected = late.write(x, 3 * late.encode_at(x, torch.tensor([f])), torch.tensor([f]))
    assert expected.abs().max() > 0.1
    assert torch.allclose((found[0] - found[1])[1:], expected, atol=1e-4)


def test_rows_of_a_batch_and_the_cache(lab: Lab) -> None:
    """Rows of different lengths in one batch, each as if alone; with a cache as without."""
    f, g, h = (lit(lab, sae) for sae in lab.saes)
    names = [str(sae.site) for sae in lab.saes]
    jobs: list[tuple[str, Any]] = [
        (TEXT, [f"{names[0]}#{f} *= 3 @ generated", f"{names[2]}#{h} = 5 @ 2:4, last"]),
        (LATER[0], None),
        (LATER[1], [f"{names[2]}#{h} >= 4", f"{names[1]}#{g} *= -2"]),
        (TEXT, f"{names[0]}#{f} += 4 @ prompt"),
    ]
    prompts = [lab.tokenize(text) for text, _ in jobs]
    changes = [lab.changes(edits, prompt, len(prompt) + 6) for prompt, (_, edits) in zip(prompts, jobs, strict=True)]
    alone = [generated(lab.model, [p], [c], 6) for p, c in zip(prompts, changes, strict=True)]
    ids, found = generated(lab.model, prompts, changes, 6, [row[0] for row, _ in alone])
    for i, (prompt, (row, expected)) in enumerate(zip(prompts, alone, strict=True)):
        assert ids[i] == row[0]
        assert agree(found[i], expected[0])
        whole = longer(prompt, row[0][:-1])
        uncached = logits(lab.model, [whole], [changes[i]])[0, len(prompt) - 1 :]
        assert agree(found[i], uncached)
    assert not agree(found[0], generated(lab.model, prompts[:1], [{}], 6, [alone[0][0][0]])[1][0])


@pytest.mark.parametrize("edit", ["#{} += 2", "#{} = 0 @ 500:", "#{} *= 1"])
def test_what_reads_nothing_hooks_nothing(lab: Lab, edit: str) -> None:
    """An add needs no encoder, and so no value of the site that the transcoder reads."""
    tokens = lab.tokenize(TEXT)
    changes = lab.changes(edit.format(3), tokens, len(tokens))
    assert list(changes) == [Site(1, "mlp_out")]
    assert changes[Site(1, "mlp_out")].reads == set()
    assert lab.changes("#3 *= 2", tokens, 9)[Site(1, "mlp_out")].reads == {Site(1, "mlp.hook_in")}


def test_reading_is_about_the_written_value(lab: Lab) -> None:
    for sae in (lab.saes[0], lab.saes[2], dataclasses.replace(lab.saes[2], centred_out=True)):
        tokens = lab.tokenize(TEXT)
        zeros = torch.zeros(sae.d_sae)
        reading = read(lab.model, sae, Facts(zeros, zeros, 1.0, 1), tokens)
        values = lab.model.values(lab.model.batch([tokens]), [sae.site, sae.writes])
        x, y = values[sae.site][0, 1:], values[sae.writes][0, 1:]
        y = y - y.mean(-1, keepdim=True) if sae.centred_out else y
        theirs = reference(sae)
        assert torch.allclose(reading.features.dense()[1:], theirs.encode(x), atol=1e-5)
        explained = 1 - (y - theirs.forward(x)).pow(2).sum(-1) / (y - sae.b_dec).pow(2).sum(-1)
        assert torch.allclose(reading.explained[1:], explained, rtol=1e-3, atol=1e-4)


def test_directions_live_where_it_writes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path))
    sae = lab.saes[0]
    texts = ["the cat sat on the mat", "a dog", "rain falls on the old house by the sea"]
    monkeypatch.setattr("lancet.facts.neutral_texts", lambda count: texts)
    assert lab.direction("#3").site == sae.writes
    assert lab.sae(sae.writes) is sae
    known = lab.facts(sae)
    batches = [lab.model.values(lab.model.batch([lab.tokenize(t)]), [sae.writes])[sae.writes][0, 1:] for t in texts]
    assert known.norm == pytest.approx(float(torch.cat(batches).norm(dim=1).median()), rel=1e-4)
    assert facts.of(lab.model, sae).norm == known.norm
    tokens = lab.tokenize(TEXT)
    (step,) = lab.steps("#3 += 0.5rn", tokens, len(tokens))
    assert step.amount * float(sae.W_dec[3].norm()) == pytest.approx(0.5 * known.norm, rel=1e-4)
    (step,) = lab.steps("(#3 - #4) += 0.5rn", tokens, len(tokens))
    assert step.site == sae.writes
    effects = lab.effect([3, "#3 - #4"], count=3)
    assert len(effects) == 2 and effects[0].promotes[0][1] > 0


@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
@pytest.mark.parametrize("sign", ["= 0", "*= 2", ">= 1", "<= 1"])
def test_what_cannot_be_edited_says_so(model: Model, architecture: Any, sign: str) -> None:
    lab = Lab(model, [random_sae(48, 96, architecture, site=Site(2))])
    with pytest.raises(UsageError, match=rf"#3 of random-{architecture} can be added to .* depends on all the others"):
        lab.logits(TEXT, f"#3 {sign}")
    with pytest.raises(UsageError, match="keep_error=False replaces the value by the decoding of changed"):
        lab.logits(TEXT, "#3 += 1", keep_error=False)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale", "constant_scalar_rescale"])
@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
def test_an_add_works_all_the_same(model: Model, architecture: Any, normalize: Any) -> None:
    if architecture == "matching_pursuit" and normalize == "constant_scalar_rescale":
        pytest.skip("sae-lens knows no such SAE")
    sae = random_sae(48, 96, architecture, site=Site(2), normalize=normalize, scalar=0.3)
    lab, tokens = Lab(model, [sae]), model.tokenize(TEXT)
    found: list[Tensor] = []
    with model.at(Site(2), lambda x: found.append(x[0].clone())):
        lab.logits(tokens)
    with model.at(Site(2, "resid_pre"), lambda x: None):
        changed = lab.logits(tokens, "#3 += 4 @ 2:")
    x = found[0]
    f = sae.encode(x)
    after = f.clone()
    after[2:, 3] += 4
    moved = sae.decode(after, x) - sae.decode(f, x)

    def add(value: Tensor) -> Tensor:
        return value + moved

    with torch.no_grad(), model.at(Site(2), add):
        expected = model.hf(torch.tensor([tokens.ids])).logits[0]
    assert agree(changed, expected)
    reading = read(model, sae, Facts(torch.zeros(96), torch.zeros(96), 1.0, 1), tokens)
    assert torch.allclose(reading.features.dense()[1:], f[1:], atol=1e-5)
    assert bool((reading.explained <= 1).all())
