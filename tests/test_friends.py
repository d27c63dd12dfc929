"""Models and SAEs that the user already holds: taken as they are, run by their own code, equal to TransformerLens' and
sae-lens' own results; and Lancet's edits as TransformerLens' hooks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import GREEDY, save_sae
from fixtures_families import FAMILIES, family, hooked
from test_basis import FLAGS, at
from test_sites import IDS, INSIDE, changed, close, edited_by_lens, lens_values, sites
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import lancet
from lancet.basis import Basis, put_in_basis
from lancet.errors import MismatchError, MissingError, UsageError
from lancet.friends import model_of
from lancet.hooked import BridgeModel, HookedModel
from lancet.sae import Sae, random_sae
from lancet.site import Site

pytestmark = [
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
    pytest.mark.filterwarnings("ignore:\nThis SAE has non-empty"),
]
TEXT = "The cat sat on the mat."
HUB = {
    "GPT-2": "gpt2",
    "Llama": "meta-llama/Llama-2-7b-hf",
    "Gemma 2": "google/gemma-2-2b",
    "Pythia": "EleutherAI/pythia-70m",
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """From a folder: TransformerLens opens it again to put the start token before every text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    family("GPT-2").tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


LENSES: dict[tuple[Any, ...], Any] = {}


def lens(name: str, tokenizer: Any, **processing: bool) -> Any:
    """A HookedTransformer with its tokenizer; shared."""
    key = (name, *sorted(processing.items()))
    if key not in LENSES:
        LENSES[key] = hooked(name, **processing)
        LENSES[key].set_tokenizer(tokenizer)
    return LENSES[key]


@pytest.fixture(scope="module")
def bridges(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    from transformer_lens.model_bridge import TransformerBridge

    def boot(name: str) -> Any:
        hf = copy.deepcopy(family(name).hf)
        hf.config.architectures = [type(hf).__name__]
        return TransformerBridge.boot_transformers(HUB[name], hf_model=hf, tokenizer=tokenizer, device="cpu")

    return {name: boot(name) for name in HUB}


# ---- models ----------------------------------------------------------------------------------------------------------


def test_nothing_is_copied(tokenizer: PreTrainedTokenizerBase) -> None:
    held = lens("GPT-2", tokenizer)
    model = model_of(held)
    assert isinstance(model, HookedModel)
    assert model.hf is held
    hf = family("Llama").hf
    assert model_of((hf, tokenizer)).hf is hf
    assert model_of(model) is model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hooked_transformer_is_run_by_its_own_hooks(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    held = lens(name, tokenizer, **dict.fromkeys(FLAGS, True))
    model = model_of(held)
    theirs = lens_values(held, name)
    for site, value in model.values(model.batch([IDS]), sites(name)).items():
        assert torch.equal(value, theirs[site]), site
        assert value.shape[-1] == model.d_site(site)
    for site in sites(name, (1,)):
        with torch.no_grad(), model.at(site, changed):
            ours = model.forward(torch.tensor([IDS]))
        assert torch.equal(ours, edited_by_lens(held, site)), site
    assert torch.equal(model.forward(torch.tensor([IDS])), held(torch.tensor([IDS])))


@pytest.mark.parametrize("name", HUB)
def test_a_bridge_is_read_and_edited_exactly(name: str, bridges: dict[str, Any]) -> None:
    model, ours = model_of(bridges[name]), family(name)
    assert isinstance(model, BridgeModel)
    values = ours.values(ours.batch([IDS]), sites(name))
    for site, value in model.values(model.batch([IDS]), sites(name)).items():
        assert close(value, values[site], 1e-5), site
    for site in sites(name, (1,)):
        with torch.no_grad(), model.at(site, changed):
            theirs = model.forward(torch.tensor([IDS]))
        with torch.no_grad(), ours.at(site, changed):
            assert close(theirs, ours.forward(torch.tensor([IDS])), 1e-5), site
    assert close(model.forward(torch.tensor([IDS])), ours.forward(torch.tensor([IDS])), 1e-5)


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama", "Gemma 2"])
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_generation_and_the_effect_lens(
    name: str, kind: str, tokenizer: PreTrainedTokenizerBase, bridges: dict[str, Any]
) -> None:
    """Cached, two rows of different lengths, edited: as on the plain transformers model."""
    ours = family(name)
    held = lens(name, tokenizer) if kind == "hooked" else bridges[name]
    for place in (Site(1), Site(2, "mlp_out"), Site(1, "z")):
        sae = random_sae(ours.d_site(place), 64, site=place)
        edits = "#3 += 9 @ generated"
        mine, theirs = lancet.Lab(ours, sae), lancet.Lab(held, sae)
        prompts = [TEXT, "A dog and a cat sat on the list and said:"]
        texts = [
            [row.ids for row in lab.run([(p, edits, 0, "") for p in prompts], 6, GREEDY)] for lab in (mine, theirs)
        ]
        assert texts[0] == texts[1]
        assert close(theirs.logits(TEXT, edits), mine.logits(TEXT, edits), 1e-4)
    from lancet.effect import changes

    vectors = torch.randn(3, ours.d_site(place), generator=torch.Generator().manual_seed(0)) * 3
    first, second = (torch.cat(list(changes(model_of(m), place, vectors))) for m in (ours, held))
    assert close(second, first, 1e-3)


def test_processing_is_read_off_the_weights(tokenizer: PreTrainedTokenizerBase, bridges: dict[str, Any]) -> None:
    for flags in itertools.product((False, True), repeat=3):
        kwargs = dict(zip(FLAGS, flags, strict=True))
        assert model_of(lens("GPT-2", tokenizer, **kwargs)).processed == Basis(**kwargs)
    assert model_of(lens("Llama", tokenizer, **dict.fromkeys(FLAGS, True))).processed == Basis(fold_ln=True)
    assert model_of(bridges["GPT-2"]).processed == Basis()
    folded = copy.deepcopy(bridges["GPT-2"])
    folded.enable_compatibility_mode()
    assert model_of(folded).processed == Basis(True, True, True)


@pytest.mark.parametrize("own", list(itertools.product((False, True), repeat=3)))
def test_an_sae_of_any_basis_on_a_model_of_any(own: tuple[bool, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be had is right, what is gone is refused."""
    model = model_of(lens("GPT-2", tokenizer, **dict(zip(FLAGS, own, strict=True))))
    values = model.values(model.batch([IDS]), sites("GPT-2", (1,)))
    refused = 0
    for wanted in itertools.product((False, True), repeat=3):
        kwargs = dict(zip(FLAGS, wanted, strict=True))
        theirs = BY_BASIS.setdefault(wanted, lens_values(hooked("GPT-2", **kwargs), "GPT-2"))
        for site, value in values.items():
            try:
                sae = put_in_basis(at(site, model), model, Basis(**kwargs))
            except MismatchError:
                refused += 1
                continue
            if sae.site != site:
                value = values[sae.site]
            assert close(sae.in_basis(value), theirs[site], 1e-4), (site, own, wanted)
    if not any(own):
        assert refused == 0
    assert refused < 8 * len(values)


BY_BASIS: dict[tuple[bool, ...], dict[Site, Tensor]] = {}


@pytest.mark.parametrize("thing", [3, "gpt2", torch.nn.Linear(2, 2), None])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(UsageError, match=r"a Lab cannot be made of a .*; give a lancet Model, a transformers causal"):
        lancet.Lab(thing)


def test_a_base_model_without_a_head_is_no_model(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="cannot be made of a transformers"):
        lancet.Lab((family("Llama").hf.model, tokenizer))


def test_models_without_a_tokenizer() -> None:
    for held in (family("Llama").hf, hooked("GPT-2")):
        with pytest.raises(MissingError, match=r"without a tokenizer; give both: lancet\.Lab"):
            lancet.Lab(held)


# ---- SAEs ------------------------------------------------------------------------------------------------------------


def theirs_of(sae: Sae, folder: Path, **metadata: Any) -> Any:
    from sae_lens import SAE

    save_sae(folder, sae, metadata={"sae_lens_version": "6.54.12", "hook_name": str(sae.site)} | metadata)
    return SAE.load_from_disk(folder)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *(("GPT-2", architecture) for architecture in ("standard", "jumprelu", "gated", "topk")),
        *((name, "jumprelu") for name in FAMILIES if name != "GPT-2"),
    ],
)
@pytest.mark.parametrize("operation", ["+= 3", "= 2", "*= 0.3"])
def test_every_site_edited_as_sae_lens_edits_inside_transformer_lens(
    name: str, architecture: str, operation: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held = lens(name, tokenizer)
    tokens = held.to_tokens(TEXT, prepend_bos=True)
    for site in (site for site in sites(name, (1,)) if site.kind not in INSIDE):
        width = model_of(held).d_site(site)
        theirs = theirs_of(random_sae(width, 48, architecture, site=site), tmp_path / str(site))  # type: ignore[arg-type]
        for model in (held, (family(name).hf, tokenizer)):
            lab = lancet.Lab(model, theirs, basis="plain")
            x = lab.model.values(lab.model.batch([lab.tokenize(TEXT)]), [site])[site][0, 1:]
            feature = int(lab.saes[0].features(x).feature[0])
            ours = lab.logits(TEXT, f"#{feature} {operation}")

            def steer(x: Tensor, hook: Any, theirs: Any = theirs, feature: int = feature) -> Tensor:
                flat = x.flatten(2)
                f = theirs.encode(flat)
                g = f.clone()
                value = g[:, 1:, feature]
                g[:, 1:, feature] = {"+=": value + 3, "=": 0 * value + 2, "*=": value * 0.3}[operation.split()[0]]
                return (flat + theirs.decode(g) - theirs.decode(f)).reshape(x.shape)

            with torch.no_grad():
                expected = held.run_with_hooks(tokens, fwd_hooks=[(str(site), steer)])[0]
                plain = held(tokens)[0]
            assert close(ours, expected, 1e-4), (site, type(model))
            assert not close(ours, plain, 1e-4), site


def test_a_held_sae_shares_its_weights(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    theirs = theirs_of(random_sae(32, 48, site=Site(1)), tmp_path)
    ours = lancet.Lab(lens("GPT-2", tokenizer), theirs).saes[0]
    assert ours.W_dec.data_ptr() == theirs.W_dec.data_ptr()
    assert ours.W_enc.data_ptr() == theirs.W_enc.data_ptr()


def test_a_held_sae_states_its_basis(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    kwargs = {"center_writing_weights": True}
    theirs = theirs_of(random_sae(32, 48, site=Site(1)), tmp_path, model_from_pretrained_kwargs=kwargs)
    assert lancet.Lab((family("GPT-2").hf, tokenizer), theirs).saes[0].centred
    plain = theirs_of(random_sae(32, 48, site=Site(1)), tmp_path / "2", model_from_pretrained_kwargs={"fold_ln": False})
    assert not lancet.Lab((family("GPT-2").hf, tokenizer), plain).saes[0].centred
    with pytest.raises(MismatchError, match=r"without center_writing_weights.* was loaded with it"):
        lancet.Lab(lens("GPT-2", tokenizer, center_writing_weights=True), plain)


def test_a_basis_that_nothing_tells_is_asked_for(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    theirs = theirs_of(random_sae(32, 48, site=Site(1)), tmp_path)
    with pytest.raises(UsageError, match="nothing states in which basis"):
        lancet.Lab((family("GPT-2").hf, tokenizer), theirs)
    assert lancet.Lab((family("GPT-2").hf, tokenizer), theirs, basis="centred").saes[0].centred


def test_what_is_no_sae(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match=r"is no SAE for a Lab; give a lancet Sae or a sae-lens SAE"):
        lancet.Lab((family("GPT-2").hf, tokenizer), torch.nn.Linear(2, 2))


def test_an_sae_of_another_width(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    theirs = theirs_of(random_sae(48, 64, site=Site(1)), tmp_path)
    with pytest.raises(MismatchError, match="reads vectors of width 48"):
        lancet.Lab((family("GPT-2").hf, tokenizer), theirs)


# ---- hooks -----------------------------------------------------------------------------------------------------------

SPANS = ["all", "prompt", "generated", "last", "2:4", "-3:", "5, 8:10"]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_hooks_generate_what_the_lab_generates(
    span: str, kind: str, tokenizer: PreTrainedTokenizerBase, bridges: dict[str, Any]
) -> None:
    held = lens("GPT-2", tokenizer) if kind == "hooked" else bridges["GPT-2"]
    for kind_of_site in ("resid_pre", "resid_mid", "z"):
        site = Site(0, kind_of_site)  # type: ignore[arg-type]
        lab = lancet.Lab(held, random_sae(32, 64, site=site))
        edits = [f"#3 += 9 @ {span}", "#7 = 4"]
        expected = lab.generate(TEXT, edits, 8, GREEDY).ids
        tokens = held.to_tokens(TEXT)
        for cached in (True, False):
            with held.hooks(fwd_hooks=lab.fwd_hooks(edits, TEXT)):
                for _ in range(2):  # the same hooks serve again
                    settings = {"do_sample": False, "stop_at_eos": False, "verbose": False}
                    out = held.generate(tokens, max_new_tokens=8, use_past_kv_cache=cached, **settings)
            assert tuple(out[0, tokens.shape[1] :].tolist())[: len(expected)] == expected, (site, cached)
        with torch.no_grad(), held.hooks(fwd_hooks=lab.fwd_hooks(edits, TEXT)):
            logits = held(tokens.expand(3, -1))
        assert close(logits[2], lab.logits(TEXT, edits), 1e-5)


def test_hooks_for_another_text_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    held = lens("GPT-2", tokenizer)
    lab = lancet.Lab(held, random_sae(32, 64, site=Site(1)))
    with held.hooks(fwd_hooks=lab.fwd_hooks("#3 += 9", TEXT)):
        with pytest.raises(UsageError, match="were made for a prompt of"):
            held(held.to_tokens(TEXT, prepend_bos=False))
        with pytest.raises(UsageError, match="and the model is given 1"):
            held(torch.tensor([[5]]))
        held(held.to_tokens(TEXT))
        with pytest.raises(UsageError, match=r"the model's cache holds 0 tokens before it"):
            held(torch.tensor([[5]]))  # a text of its own, and no next token
    with pytest.raises(UsageError, match="two tokens or more"):
        lab.fwd_hooks("#3 += 9", model_of(held).tokenize("a", most=1))


def test_hooks_need_hook_points(tokenizer: PreTrainedTokenizerBase) -> None:
    lab = lancet.Lab((family("GPT-2").hf, tokenizer), random_sae(32, 64, site=Site(1)))
    with pytest.raises(UsageError, match="has no hook points; make the lab of the TransformerLens model"):
        lab.fwd_hooks("#3 += 9", TEXT)
    held = lancet.Lab(lens("GPT-2", tokenizer), random_sae(32, 64, site=Site(1, "mlp.hook_in")))
    with pytest.raises(UsageError, match=r"no hook point blocks\.1\.mlp\.hook_in"):
        held.fwd_hooks("#3 += 9", TEXT)
