"""The self-test of a pair: on the real embedded model, where right and wrong pairs are known, and its arithmetic on
tiny random ones against plain loops."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_edits import save_sae
from fixtures_families import FAMILIES, family, hooked
from torch import Tensor

import lancet
from lancet import check as check_module
from lancet import feeding, splice
from lancet.check import check, first, kinds_of_text
from lancet.checkup import Checkup, Finding
from lancet.errors import MismatchError, UsageError
from lancet.facts import Facts
from lancet.friends import model_of
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site

TEXT = "The cat sat on the mat and the dog sat on the cat."
KINDS = {
    "a poem": "The willow leans above the stream,\nIts silver leaves turned down in sleep;\nThe moon has lent the "
    "fields her gleam,\nAnd owls their quiet watches keep.",
    "code": "import json\n\ndef load(path):\n    with open(path) as file:\n        data = json.load(file)\n    "
    "return [item['name'] for item in data if item.get('active')]\n",
    "a chat": "<user> hey, did you get the tickets?\n<anna> yes! row 12, two seats on the aisle\n<user> perfect, what "
    "do I owe you?\n<anna> 34 each, but buy me a coffee and we're even :)",
    "Chinese": "今天早上下了一场大雨，街上的人都撑着伞。我在车站等了半个小时，公交车才慢慢地开过来。",
    "a letter": "Dear Mrs Hollis,\n\nThank you for the parcel, which came on Tuesday. The children have hardly put the "
    "books down since. We hope to see you at Easter.\n\nYours sincerely,\nMargaret Dunn",
    "numbers": "2019: 14.2, 15.8, 16.1\n2020: 13.9, 15.1, 17.4\n2021: 12.7, 14.9, 18.3\nMean of the last column: 17.27",
    "a list": "Things to take along:\n- two warm pullovers\n- the tent and its pegs\n- matches in a dry box\n- a map "
    "of the northern valley\n- rope, at least ten metres",
    "dialogue": '"Where were you last night?" asked the inspector.\n"At home," said Lewis, "with a cold and a film."'
    '\n"Can anyone confirm that?"\n"Only the cat."',
    "news": "The city council voted on Monday to close the old market hall for two years of repairs. Traders protested "
    "outside the building, saying that the stalls by the river would cost them a third of their customers.",
    "a recipe": "Melt 50 g of butter in a pan, add the chopped onion and cook it gently for ten minutes. Stir in the "
    "rice, pour on the hot stock a ladle at a time, and finish with grated cheese and black pepper.",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "cache"))


def changed(thing: Any, **attributes: Any) -> Any:
    other = copy.copy(thing)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def at(sae: Sae, layer: int) -> Sae:
    return changed(sae, site=Site(layer, sae.site.kind), writes=Site(layer, sae.site.kind))


def reason(checkup: Checkup) -> str:
    with pytest.raises(MismatchError) as caught:
        checkup.refuse()
    assert "--anyway" in str(caught.value) and "anyway=True" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value).partition(" fails its self-test: ")[2].partition(" (")[0]


# ---- the real pair ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(smollm2_f32: Model) -> Sae:
    from lancet.loading import open_sae

    return open_sae(smollm2_f32, "blocks.12.hook_resid_pre")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_pair_passes_on_a_text_of_any_kind(kind: str, smollm2_f32: Model, bundled: Sae) -> None:
    found = check(smollm2_f32, bundled, [KINDS[kind]], quick=True)
    assert not found.poor, str(found)
    assert "cached equals uncached" not in {finding.what for finding in found.findings}  # the glance sufficed
    assert bundled.stated["l0"] == pytest.approx(34.5)
    assert "as its release states" in str(found)


def test_the_right_pair_passes_in_full(smollm2_f32: Model, bundled: Sae) -> None:
    found = check(smollm2_f32, bundled, [KINDS["news"]])
    assert not found.poor, str(found)
    assert [f.what for f in found.findings] == [
        "the model predicts text",
        "one start of text",
        "start of text",
        "cached equals uncached",
        "explained variance",
        "loss with the SAE spliced in",
        "features lit at a token (L0)",
    ]
    others = [name for name in found.figures if name.startswith("explained, at ")]
    assert len(others) == 29
    assert found.figures["cached KL"] < 1e-6


@pytest.mark.parametrize("layer", [5, 11, 13, 20])
def test_the_wrong_layer(layer: int, smollm2_f32: Model, bundled: Sae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "start", lambda *_: iter(()))  # of the model alone: tested once, below
    said = reason(check(smollm2_f32, at(bundled, layer), [KINDS["a letter"]]))
    assert "at blocks.12.hook_resid_pre: it is at the wrong layer" in said


def test_the_wrong_basis(smollm2_f32: Model, bundled: Sae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "start", lambda *_: iter(()))
    said = reason(check(smollm2_f32, changed(bundled, centred=True), [KINDS["a letter"]]))
    assert "with --basis plain: it is read in the wrong basis" in said


@pytest.fixture
def four_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the start of text, instead of ten."""
    monkeypatch.setattr(check_module, "kinds_of_text", lambda: kinds_of_text()[:4])


def test_no_start_token(smollm2_f32: Model, bundled: Sae, four_texts: None) -> None:
    found = check(changed(smollm2_f32, start_plain=None), bundled, [KINDS["a letter"]])
    said = reason(found)
    assert said.startswith("text begins with no start token, and the model expects '<|endoftext|>' there")


def test_the_tokenizers_own_start_is_the_wrong_one(smollm2_f32: Model) -> None:
    rows = check_module._rows(changed(smollm2_f32, start_plain=1), kinds_of_text()[:4])
    found = list(feeding.start(changed(smollm2_f32, start_plain=1), rows, {}))
    assert "text begins with '<|im_start|>', and the model expects '<|endoftext|>'" in found[1].why


def test_another_trained_model_of_the_same_width(
    smollm2_f32: Model, bundled: Sae, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's coordinates in another order: a model that speaks as well, and an SAE of another one."""
    monkeypatch.setattr(feeding, "start", lambda *_: iter(()))
    order = torch.randperm(576, generator=torch.Generator().manual_seed(0))
    turned = {"W_enc": bundled.W_enc[order], "W_dec": bundled.W_dec[:, order], "b_dec": bundled.b_dec[order]}
    said = reason(check(smollm2_f32, changed(bundled, **turned), [KINDS["a letter"]]))
    assert said.startswith("it explains no place of this model: it was trained on another model")


def test_another_random_model_of_the_same_width(smollm2_f32: Model, bundled: Sae) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 14, "num_attention_heads": 9}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes))  # type: ignore[arg-type]
    other = Model("random", hf, smollm2_f32.tokenizer, 0, 1)
    found = check(other, bundled, [KINDS["a letter"]])
    assert reason(found).startswith("the model does not predict text: its weights are random, or another model's")
    assert {"the model predicts text", "explained variance"} <= {finding.what for finding in found.poor}


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2(seed=3)


@contextmanager
def at_output(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain torch hook, as an independent way to splice."""

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def loss_of(model: Model, ids: list[int]) -> float:
    with torch.no_grad():
        scores = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = [-float(scores[i - 1, ids[i]]) for i in range(2, len(ids))]  # the start token and what it alone predicts
    return sum(nats) / len(nats)


def figures_of(model: Model, sae: Sae, text: str = TEXT) -> dict[str, float]:
    return dict(check_module._run(model, sae, [list(model.tokenize(text).ids)], quick=True).figures)


KINDS_OF_SAE = ["standard", "jumprelu", "gated", "topk", "abstopk", "matching_pursuit", "temporal"]


@pytest.mark.parametrize("architecture", KINDS_OF_SAE)
@pytest.mark.parametrize("centred", [False, True])
def test_spliced_loss_and_explained_variance_are_a_plain_loops(architecture: str, centred: bool, tiny: Model) -> None:
    """At resid_post of block 1, where a hook on the block's output does the same; the start token stays."""
    site = Site(1, "resid_post")
    sae = random_sae(64, 96, architecture, site=site, centred=centred)  # type: ignore[arg-type]
    ids = list(tiny.tokenize(TEXT).ids)
    got = figures_of(tiny, sae)
    kept: dict[str, Tensor] = {}

    def spliced(value: Tensor) -> Tensor:
        x = value[0].clone()
        kept["x"] = x
        rebuilt = sae.decode(sae.encode(x), x)  # dense, over the whole text from its start token
        kept["rebuilt"] = rebuilt
        mean = x.mean(-1, keepdim=True) if centred else 0
        return torch.cat([value[:, :1], (rebuilt + mean)[None, 1:]], 1)

    block = tiny.hf.transformer.h[1]  # type: ignore[index]
    with at_output(block, spliced):
        wanted = loss_of(tiny, ids)
    with at_output(block, lambda value: torch.cat([value[:, :1], torch.zeros_like(value[:, 1:])], 1)):
        zeros = loss_of(tiny, ids)
    assert got["loss"] == pytest.approx(loss_of(tiny, ids), rel=1e-5)
    assert got["loss, spliced"] == pytest.approx(wanted, rel=1e-4)
    assert got["loss, zeros"] == pytest.approx(zeros, rel=1e-5)
    x, rebuilt = kept["x"][1:], kept["rebuilt"][1:]
    x = x - x.mean(-1, keepdim=True) if centred else x
    share = (x - rebuilt).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert got["explained"] == pytest.approx(1 - float(share), rel=1e-4)
    assert got["L0"] == pytest.approx(float((sae.encode(kept["x"])[1:] != 0).sum(-1).float().mean()))


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_transcoders_are_spliced_where_they_write(architecture: str, tiny: Model) -> None:
    read, write = Site(1, "mlp.hook_in"), Site(1, "mlp_out")
    sae = random_sae(64, 96, architecture, site=read, writes=write)  # type: ignore[arg-type]
    ids = list(tiny.tokenize(TEXT).ids)
    checkup = check_module._run(tiny, sae, [ids], quick=False)
    seen: dict[str, Tensor] = {}
    mlp = tiny.hf.transformer.h[1].mlp  # type: ignore[index]
    handle = mlp.register_forward_pre_hook(lambda _module, args: seen.update(x=args[0][0].clone()))

    def spliced(value: Tensor) -> Tensor:
        seen["y"] = value[0].clone()
        x = seen["x"]
        return torch.cat([value[:, :1], sae.decode(sae.encode(x), x)[None, 1:]], 1)

    with at_output(mlp, spliced):
        wanted = loss_of(tiny, ids)
    handle.remove()
    assert checkup.figures["loss, spliced"] == pytest.approx(wanted, rel=1e-4)
    x, y = seen["x"][1:], seen["y"][1:]
    share = (y - sae.decode(sae.encode(x), x)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert checkup.figures["explained"] == pytest.approx(1 - float(share), rel=1e-4)
    # In another block it is what the transcoder would write there, held against what that block's MLP writes.
    values = tiny.values(tiny.batch([ids]), [Site(3, "mlp.hook_in"), Site(3, "mlp_out")])
    x, y = (values[Site(3, kind)][0, 1:] for kind in ("mlp.hook_in", "mlp_out"))
    share = (y - sae.decode(sae.encode(x), x)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert checkup.figures["explained, at blocks.3.mlp.hook_in"] == pytest.approx(1 - float(share), rel=1e-4)


def test_every_block_has_its_own_offset_of_z(tiny: Model) -> None:
    """Value biases that were folded away differ from block to block."""
    from lancet.basis import put_in_basis
    from lancet.pairing import bases

    plain = random_sae(64, 96, site=Site(1, "z"))
    sae = put_in_basis(plain, tiny, bases()["centred"])
    assert sae.offset is not None
    got = check_module._run(tiny, sae, [list(tiny.tokenize(TEXT).ids)], quick=False).figures
    ids = list(tiny.tokenize(TEXT).ids)
    for layer in (1, 2):
        site = Site(layer, "z")
        offset = tiny.value_bias(layer, True)
        assert offset is not None
        x = tiny.values(tiny.batch([ids]), [site])[site][0, 1:] - offset
        share = (x - plain.decode(plain.encode(x), x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        name = "explained" if layer == 1 else f"explained, at {site}"
        assert got[name] == pytest.approx(1 - float(share), rel=1e-4)
    assert "explained, --basis plain" in got
    # Spliced in, the offset that it never saw stays in the model.
    block = tiny.hf.transformer.h[1].attn.c_proj  # type: ignore[index]

    def before(_module: Any, args: Any) -> Any:
        value = args[0]
        x = value[0] - sae.offset
        new = plain.decode(plain.encode(x), x) + sae.offset
        return (torch.cat([value[:, :1], new[None, 1:]], 1),)

    handle = block.register_forward_pre_hook(before)
    wanted = loss_of(tiny, ids)
    handle.remove()
    assert got["loss, spliced"] == pytest.approx(wanted, rel=1e-4)


def test_an_sae_of_a_folded_norm_is_tried_on_the_other_side_of_the_gain(tiny: Model) -> None:
    """`mlp.hook_in` read as `ln2.hook_normalized` by mistake, and the other way round."""
    for site, other in (("ln2.hook_normalized", "at blocks.1.mlp.hook_in"), ("mlp.hook_in", "--basis centred")):
        sae = random_sae(64, 96, site=Site(1, site))  # type: ignore[arg-type]
        assert f"explained, {other}" in figures_of(tiny, sae)


def identity(site: Site, centred: bool = False) -> Sae:
    """Rebuilds every vector exactly: each coordinate has a feature for its positive and one for its negative part."""
    eye = torch.eye(64) - (1 / 64 if centred else 0)
    parts = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye])}
    return Sae("made", site, "standard", b_dec=torch.zeros(64), b_enc=torch.zeros(128), centred=centred, **parts)


@pytest.fixture(scope="module")
def with_mean(tiny_gpt2: Callable[..., Model]) -> Model:
    """A GPT-2 whose stream has a mean: every embedding is moved by 3."""
    model = tiny_gpt2(seed=5)
    with torch.no_grad():
        model.hf.transformer.wte.weight.add_(3.0)  # type: ignore[union-attr]
    return model


def test_an_sae_of_centred_values_that_reads_uncentred_ones(with_mean: Model) -> None:
    """What happens to gpt2-small-res-jb where nothing says that its model was centred."""
    rows = [list(with_mean.tokenize(text).ids) for text in (TEXT, "    return the value of the list")]
    right = identity(Site(2), centred=True)
    assert not [f for f in check_module._run(with_mean, right, rows, True).poor if f.what == "explained variance"]
    (found,) = [
        f
        for f in check_module._run(with_mean, changed(right, centred=False), rows, True).findings
        if f.what == "explained variance"
    ]
    assert found.why.endswith("with --basis centred: it is read in the wrong basis")


def test_numbers_that_ran_over_are_poor_and_null(tiny: Model) -> None:
    sae = changed(identity(Site(2)), b_dec=torch.full((64,), float("nan")))
    found = check_module._run(tiny, sae, [list(tiny.tokenize(TEXT).ids)], quick=True)
    poor = {finding.what for finding in found.poor}
    assert {"explained variance", "loss with the SAE spliced in"} <= poor
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["figures"]["explained"] is None and not told["fine"]
    assert Checkup.from_json(told).poor == found.poor


def test_where_zeros_do_not_hurt_nothing_need_be_recovered(tiny: Model) -> None:
    with torch.no_grad():
        kept = tiny.hf.transformer.h[1].mlp.c_proj.weight.clone()  # type: ignore[index]
        tiny.hf.transformer.h[1].mlp.c_proj.weight.zero_()  # type: ignore[index]
        try:
            found = check_module._run(tiny, identity(Site(1, "mlp_out")), [list(tiny.tokenize(TEXT).ids)], quick=True)
        finally:
            tiny.hf.transformer.h[1].mlp.c_proj.weight.copy_(kept)  # type: ignore[index]
    assert not [f for f in found.poor if f.what.startswith("loss with")]


def test_what_a_release_states(tiny: Model) -> None:
    ids = [list(tiny.tokenize(TEXT).ids)]
    sae = identity(Site(2))
    got = check_module._run(tiny, sae, ids, quick=True).figures
    assert got["L0"] == pytest.approx(64)

    def poor(**stated: float) -> set[str]:
        found = check_module._run(tiny, changed(sae, stated=stated), ids, quick=True)
        return {f.what for f in found.poor if "release" in f.wanted + f.what}

    assert poor() == set() == poor(l0=64.0, explained=0.99) == poor(l0=25.0)
    assert poor(l0=20.0) == poor(l0=200.0) == {"features lit at a token (L0)"}
    worse = changed(sae, W_dec=sae.W_dec * 0.3, stated={"explained": 0.9})
    assert "explained variance against the release's" in {
        f.what for f in check_module._run(tiny, worse, ids, True).poor
    }
    x = tiny.values(tiny.batch(ids), [Site(2)])[Site(2)][0, 1:]
    mean = x.mean(0)  # with it, a tenth of the rest is rebuilt: 0.19 is explained
    # A release that states how little its SAE explains is believed.
    for stated, fine in ((0.2, True), (0.9, False)):
        small = changed(sae, W_dec=sae.W_dec * 0.1, b_dec=mean, stated={"explained": stated})
        (found,) = [f for f in check_module._run(tiny, small, ids, True).findings if f.what == "explained variance"]
        assert found.got == "0.190" and found.fine is fine


# ---- the model -------------------------------------------------------------------------------------------------------


def test_every_start_is_charged_for_the_same_tokens(tiny: Model) -> None:
    figures: dict[str, float] = {}
    text = check_module._rows(tiny, [TEXT, "    return the value of the list"])
    list(feeding.start(tiny, text, figures))
    for start, name in (((), "none"), ((0,), "'<|endoftext|>'")):
        nats, count = 0.0, 0
        for row in text:
            content = row[1:][: feeding.START_TOKENS]
            with torch.no_grad():
                scores = tiny.hf(torch.tensor([[*start, *content]])).logits[0].log_softmax(-1)
            nats -= sum(float(scores[len(start) + i - 1, content[i]]) for i in range(1, len(content)))
            count += len(content) - 1
        assert figures[f"loss, start {name}"] == pytest.approx(nats / count, rel=1e-5)
    assert len(figures) == 2  # bos and eos are one token here


def test_a_model_without_a_start(tiny_gpt2: Callable[..., Model]) -> None:
    model = tiny_gpt2(seed=8, n_positions=16)
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    model.start_plain = model.start_chat = None
    rows = check_module._rows(model, [TEXT * 4])
    assert len(rows[0]) == 16  # the whole context: a start more would not fit
    found = check_module._run(model, identity(Site(2)), rows, quick=False)
    told = {finding.what: finding for finding in found.findings}
    assert told["one start of text"].fine and told["one start of text"].got == "none"
    assert "loss, start '<|endoftext|>'" in found.figures  # tried though the tokenizer names none
    assert found.figures["explained"] == pytest.approx(1.0, abs=1e-4)


def test_two_starts_are_told(tiny_gpt2: Callable[..., Model]) -> None:
    model = tiny_gpt2(seed=8)
    (found, _) = feeding.start(model, [[0, 0, *model.tokenize(TEXT).ids[1:]]], {})
    assert not found.fine and found.got == "two"
    (found, _) = feeding.start(model, [list(model.tokenize(TEXT).ids)], {})
    assert found.fine and found.got == "one"


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached(name: str) -> None:
    """Windows of six tokens among them, which the text and its end overrun."""
    model = family(name)
    (found,) = feeding.cached(model, check_module._rows(model, [TEXT]), {})
    assert found.fine, found


def test_a_cache_that_forgets_is_found(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(tiny).forward

    def forgetful(self: Model, ids: Tensor, *args: Any, **more: Any) -> Tensor:
        (mask, positions, cache, *_) = (*args, None, None, None)
        if cache is not None and cache.get_seq_length():
            cache.crop(-1)
            mask = mask[:, 1:]
        return forward(self, ids, mask, positions, cache, **more)

    monkeypatch.setattr(type(tiny), "forward", forgetful)
    (found,) = feeding.cached(tiny, check_module._rows(tiny, [TEXT]), {})
    assert not found.fine and "token by token" in found.why


def test_models_of_transformer_lens_are_tested_the_same() -> None:
    model, sae = family("GPT-2"), random_sae(32, 64, site=Site(2))
    held = model_of((hooked("GPT-2"), model.tokenizer))
    mine, theirs = figures_of(model, sae), figures_of(held, sae)
    assert mine.keys() >= theirs.keys()
    for name, value in theirs.items():
        assert value == pytest.approx(mine[name], rel=1e-3, nan_ok=True), name


# ---- the quick form --------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each pass."""
    seen: list[int] = []
    forward = Model.forward

    def counted(self: Model, ids: Tensor, *args: Any, **more: Any) -> Tensor:
        seen.append(ids.shape[1])
        return forward(self, ids, *args, **more)

    monkeypatch.setattr(Model, "forward", counted)
    return seen


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model passes for one that predicts text."""
    monkeypatch.setattr(check_module, "RANDOM", 100.0)


def test_the_quick_form_takes_three_passes_a_text(tiny: Model, passes: list[int], calm: None) -> None:
    found = check(tiny, identity(Site(2)), quick=True)
    assert not found.poor
    starts = len([name for name in found.figures if name.startswith("loss, start")])
    assert starts >= 2 and len(passes) <= 3 * check_module.QUICK_TEXTS + starts + 1  # one to see what a block returns
    blocks = [name for name in found.figures if name.startswith("explained, at")]
    assert blocks == ["explained, at blocks.1.hook_resid_pre", "explained, at blocks.3.hook_resid_pre"]


def test_a_large_sae_is_tested_on_fewer_tokens() -> None:
    sae: Any = SimpleNamespace(d_in=2304, d_sae=1_000_000)
    rows = [list(range(100)) for _ in range(10)]
    assert [len(row) for row in check_module._few(rows, sae)] == [check_module.LEAST_TOKENS]
    assert [len(row) for row in check_module._few(rows, random_sae(64, 96))] == [100] * 4


def test_what_looks_poor_is_tested_in_full(tiny: Model) -> None:
    found = check(tiny, identity(Site(2)), quick=True)
    assert "the model predicts text" in {finding.what for finding in found.poor}
    assert "cached equals uncached" in {finding.what for finding in found.findings}


def test_the_first_test_is_kept_for_its_pair(
    tiny: Model, passes: list[int], calm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sae = identity(Site(2))
    found = first(tiny, sae, said.append)
    assert not found.poor and said == [f"testing whether made belongs to {tiny.name} (once)"]
    passes.clear()
    assert first(tiny, sae, said.append).to_json() == found.to_json()
    assert not passes and len(said) == 1
    for other in (at(sae, 1), changed(sae, centred=True), changed(sae, stated={"l0": 64.0})):
        passes.clear()
        first(tiny, other)
        assert passes
    passes.clear()
    other = changed(tiny, name="elsewhere")  # the same weights under other names are the same pair
    moved = first(other, changed(sae, name="moved"), said.append)
    assert not passes and moved.findings == found.findings
    assert moved.pair == "moved at blocks.2.hook_resid_pre of elsewhere"
    for file in (tmp_path / "cache" / "checks").iterdir():
        file.write_text("{", encoding="utf-8")
    passes.clear()
    first(tiny, sae)
    assert passes


def test_an_interrupted_test_is_not_kept(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(splice, "through", interrupted)
        with pytest.raises(KeyboardInterrupt):
            first(tiny, identity(Site(2)))
    assert not list((tmp_path / "cache").rglob("*.json"))
    first(tiny, identity(Site(2)))
    assert list((tmp_path / "cache" / "checks").glob("*.json"))


def test_opening_tests_a_pair_unless_told_not_to(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_sae(tmp_path / "sae", random_sae(64, 96, site=Site(2)), metadata={"hook_name": str(Site(2))})
    settings: dict[str, Any] = {"sae": str(folder), "device": "cpu", "dtype": "float32", "basis": "plain"}
    for _ in range(2):  # the second time from the cache
        with pytest.raises(MismatchError, match=r"does not predict text.*--anyway \(anyway=True\)"):
            lancet.open(tiny.name, **settings)
    monkeypatch.setattr(check_module, "check", None)  # would fail
    assert lancet.open(tiny.name, **settings, anyway=True).saes


def components(model: Model, site: Site, count: int) -> Sae:
    """Rebuilds a model's values at a site from their largest principal components, as a trained SAE does its own."""
    values = []
    for text in kinds_of_text():
        batch = model.batch([model.tokenize(text, most=128)])
        values.append(model.values(batch, [site])[site][batch.content])
    x = torch.cat(values)
    rows = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:count]
    both = torch.cat([rows, -rows])
    return Sae("made", site, "standard", both.T.contiguous(), both, b_dec=x.mean(0), b_enc=torch.zeros(len(both)))


def test_an_sae_that_was_copied_with_its_facts_is_tested_on_the_model_that_is_open(
    tiny: Model, tiny_gpt2: Callable[..., Model], passes: list[int], calm: None, tmp_path: Path
) -> None:
    made = components(tiny, Site(2), 12)
    folder = save_sae(tmp_path / "made", made, metadata={"hook_name": str(Site(2))})
    Facts(torch.ones(24), torch.zeros(24), 10.0, 1000).save(folder / "facts.safetensors")
    settings: dict[str, Any] = {"sae": str(folder), "device": "cpu", "dtype": "float32", "basis": "plain"}
    passes.clear()
    assert lancet.open(tiny.name, **settings).facts().tokens == 1000
    assert passes
    passes.clear()
    lancet.open(tiny.name, **settings)
    assert not passes  # it was kept
    with pytest.raises(MismatchError, match=r"it explains no place of this model.*--anyway \(anyway=True\)"):
        lancet.open(tiny_gpt2(seed=11).name, **settings)
    assert lancet.open(tiny_gpt2(seed=11).name, **settings, anyway=True).saes


def test_a_model_that_differs_behind_the_sae_is_another_one(
    tiny: Model, passes: list[int], calm: None, tmp_path: Path
) -> None:
    """The loss with the SAE spliced in goes through all blocks."""
    sae = identity(Site(1))
    first(tiny, sae)
    other = changed(tiny, hf=copy.deepcopy(tiny.hf))
    other = Model(tiny.name, other.hf, tiny.tokenizer, tiny.start_plain, tiny.start_chat)
    with torch.no_grad():
        other.hf.transformer.h[3].mlp.c_proj.weight.mul_(0.5)
    passes.clear()
    first(other, sae)
    assert passes


def test_texts_that_are_too_short(tiny: Model) -> None:
    with pytest.raises(UsageError, match="too short to test anything"):
        check(tiny, identity(Site(2)), ["a"])


# ---- the command -----------------------------------------------------------------------------------------------------


def command(capsys: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    from lancet.cli import main, show

    monkeypatch.setattr(sys, "argv", ["lancet", *words])
    show.console.cache_clear()
    show.notes.cache_clear()
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def where(tiny: Model, tmp_path: Path) -> list[str]:
    folder = save_sae(tmp_path / "made", identity(Site(2)), metadata={"hook_name": str(Site(2))})
    return ["--model", tiny.name, "--sae", str(folder), "--device", "cpu", "--dtype", "float32", "--basis", "plain"]


def documented(heading: str) -> set[str]:
    """The keys that docs/json.md has for a command; `.b` after `list[].a` is `list[].b`."""
    page = Path(__file__).parent.parent.joinpath("docs", "json.md").read_text(encoding="utf-8")
    part = page.partition(f"## `lancet {heading} --json`")[2].partition("\n## ")[0]
    keys, before = set(), ""
    for row in (row for row in part.splitlines() if row.startswith("| `")):
        for key in re.findall(r"`([^`]+)`", row.split("|")[1]):
            before = key.rpartition(".")[0] if key[0] != "." else before
            keys.add(f"{before}{key}" if key[0] == "." else key)
    return keys


def test_a_poor_pair_is_code_1(where: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command(capsys, monkeypatch, "check", *where, "--json")
    (told,) = json.loads(out)
    assert code == 1 and told["fine"] is False
    keys = set(told) | {f"findings[].{key}" for key in told["findings"][0]}
    assert keys == documented("check")


def test_a_fine_pair_is_code_0(
    where: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch, calm: None, tmp_path: Path
) -> None:
    (tmp_path / "texts").write_text(f"{TEXT}\n\n{TEXT * 2}\n", encoding="utf-8")
    code, out, _ = command(capsys, monkeypatch, "check", *where, "--file", str(tmp_path / "texts"))
    lines = out.splitlines()
    assert code == 0, out
    assert lines[1].startswith("made at blocks.2.hook_resid_pre of ")
    assert lines[2] == "\ttested\tgot\twanted"
    assert lines[-1] == "the pair belongs together"
    assert all(line.startswith("fine\t") for line in lines[3:-1]) and len(lines) == 11


def test_anyway_says_nothing_new_to_check(where: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [command(capsys, monkeypatch, "check", *where, *more, "--json") for more in ([], ["--anyway"])]
    assert told[0][:2] == told[1][:2] and told[1][0] == 1
    assert "--anyway" not in command(capsys, monkeypatch, "check", "--help")[1]


@pytest.mark.parametrize("what", ["none", "empty", "bytes"])
def test_files_of_texts(
    what: str, where: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if what != "none":
        (tmp_path / what).write_bytes(b"" if what == "empty" else b"\xff\xfe\x00")
    code, out, err = command(capsys, monkeypatch, "check", *where, "--file", str(tmp_path / what))
    assert code == 2 and not out
    assert err.startswith("lancet: ") and len(err.splitlines()) == 1


def test_a_finding_in_words() -> None:
    found = Checkup("a at b", {"x": 1.0}, (Finding("one", "1", "1"), Finding("two", "2", "3", False, "why")))
    assert str(found) == "a at b\n  fine  one: 1 (wanted 1)\n  POOR  two: 2 (wanted 3) why"
    assert [finding.what for finding in found.poor] == ["two"]
    assert Checkup("c").refuse() is None
