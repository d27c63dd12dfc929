"""Every site of eight architectures, read and edited, against TransformerLens on the same weights; and the sites that
an architecture does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_families import FAMILIES, PARALLEL, family, hooked
from torch import Tensor

from lancet.errors import UsageError
from lancet.model import Model
from lancet.site import KINDS, Kind, Site

IDS = [0, *torch.randint(1, 299, (15,), generator=torch.Generator().manual_seed(1)).tolist()]
INSIDE: dict[str, str] = {
    "mlp.hook_in": "in",
    "mlp.hook_out": "out",
}  # of the MLP module: HookedTransformer has no hook
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[str, Model, Any]:
    return request.param, family(request.param), hooked(request.param)


def sites(name: str, layers: tuple[int, ...] = (0, 1, 3)) -> list[Site]:
    return [Site(i, kind) for i in layers for kind in KINDS if kind != "resid_mid" or name not in PARALLEL]


def lens_values(lens: Any, name: str) -> dict[Site, Tensor]:
    """What TransformerLens holds at every site, z flattened."""
    found: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[..., None]:
        return lambda tensor, hook: found.__setitem__(site, tensor.flatten(2))

    handles = []
    for i, block in enumerate(lens.blocks):
        handles.append(
            block.mlp.register_forward_hook(
                lambda _m, args, out, i=i: found.update({Site(i, "mlp.hook_in"): args[0], Site(i, "mlp.hook_out"): out})
            )
        )
    hooks = [(str(site), keep(site)) for site in sites(name, (0, 1, 2, 3)) if site.kind not in INSIDE]
    with torch.no_grad():
        lens.run_with_hooks(torch.tensor([IDS]), return_type=None, fwd_hooks=hooks)
    for handle in handles:
        handle.remove()
    return found


def close(ours: Tensor, theirs: Tensor, relative: float = 1e-4) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= relative * theirs.abs().max())


def test_values_are_transformer_lens_own(pair: tuple[str, Model, Any]) -> None:
    name, model, lens = pair
    ours, theirs = model.values(model.batch([IDS]), sites(name)), lens_values(lens, name)
    for site, value in ours.items():
        assert close(value, theirs[site], 2e-5), site
        assert value.shape[-1] == model.d_site(site)


def changed(value: Tensor) -> Tensor:
    """A change that depends on the value and differs from token to token."""
    noise = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(2))
    return 0.7 * value.flip(1) + noise * value.pow(2).mean().sqrt()


def edited_by_lens(lens: Any, site: Site) -> Tensor:
    tokens = torch.tensor([IDS])
    with torch.no_grad():
        if site.kind in INSIDE:
            mlp = lens.blocks[site.layer].mlp
            if site.kind == "mlp.hook_in":
                handle = mlp.register_forward_pre_hook(lambda _m, args: (changed(args[0]),))
            else:
                handle = mlp.register_forward_hook(lambda _m, _a, out: changed(out))
            try:
                return lens(tokens)
            finally:
                handle.remove()
        hook = (str(site), lambda tensor, hook: changed(tensor.flatten(2)).reshape(tensor.shape))
        return lens.run_with_hooks(tokens, fwd_hooks=[hook])


def test_a_change_at_a_site_is_transformer_lens_own(pair: tuple[str, Model, Any]) -> None:
    name, model, lens = pair
    plain = model.forward(torch.tensor([IDS]))
    for site in sites(name, (1,)):
        with torch.no_grad(), model.at(site, changed):
            ours = model.forward(torch.tensor([IDS]))
        assert close(ours, edited_by_lens(lens, site)), site
        assert not close(ours, plain, 1e-2), site


def test_a_function_that_returns_the_value_changes_no_bit(pair: tuple[str, Model, Any]) -> None:
    name, model, _ = pair
    with torch.no_grad():
        plain = model.forward(torch.tensor([IDS]))
        for site in sites(name, (1,)):
            for function in (lambda value: value.clone(), lambda value: None):
                with model.at(site, function):
                    assert torch.equal(model.forward(torch.tensor([IDS])), plain), site
        assert torch.equal(model.forward(torch.tensor([IDS])), plain)


def test_readers_before_and_after_an_edit(pair: tuple[str, Model, Any]) -> None:
    """In one pass: who was there first sees the old value, who comes after sees the new one."""
    name, model, _ = pair
    for site in sites(name, (1,)):
        seen: list[Tensor] = []
        with (
            torch.no_grad(),
            model.at(site, seen.append),
            model.at(site, changed),
            model.at(site, seen.append),
        ):
            model.forward(torch.tensor([IDS]))
        assert torch.equal(seen[0], model.values(model.batch([IDS]), [site])[site])
        assert close(seen[1], changed(seen[0]), 1e-5), site


def test_the_pass_stops_at_the_last_site(pair: tuple[str, Model, Any]) -> None:
    name, model, _ = pair
    ran: list[int] = []
    blocks = model.arch.decoder_layers
    model.check_site(Site(1, "mlp_out"))  # tested once, by a pass of its own
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    try:
        for site in sites(name, (1,)):
            ran.clear()
            model.values(model.batch([IDS]), [site, Site(0)])
            assert ran == ([0, 1] if site.kind == "resid_post" else [0]), site
    finally:
        for handle in handles:
            handle.remove()


def test_from_site_runs_the_rest_alone(pair: tuple[str, Model, Any]) -> None:
    """What enters at `entry` is given, what lies below is not run, and the rest comes out the same."""
    name, model, _ = pair
    ids = torch.tensor([IDS])
    for site in sites(name, (2,)):
        with model.from_site(site), model.at(site, lambda _: None):  # both are tested by passes of their own, once
            pass
        entry = model.values(model.batch([IDS]), [site.entry])[site.entry]
        ran: list[int] = []
        handle = model.arch.attn_module(1).register_forward_hook(lambda *_, ran=ran: ran.append(1))
        try:
            with torch.no_grad(), model.at(site, changed):
                whole = model.forward(ids)
            assert ran == [1]
            ran.clear()
            enter = model.at(site.entry, lambda _, entry=entry: entry.clone())
            with torch.no_grad(), model.from_site(site), enter, model.at(site, changed):
                rest = model.forward(ids)
        finally:
            handle.remove()
        assert not ran
        assert torch.equal(rest, whole), site


def test_no_stream_between_parallel_attention_and_mlp() -> None:
    for name in PARALLEL:
        with pytest.raises(UsageError, match=r"run in parallel, and nothing lies between them; choose blocks\.1"):
            family(name).check_site(Site(1, "resid_mid"))


# ---- what cannot be exact --------------------------------------------------------------------------------------------


def tiny(kind: str, **settings: Any) -> Model:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=300,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = getattr(transformers, f"{kind}ForCausalLM")(config)
    return Model(kind, hf, family("GPT-2").tokenizer, 0, 0)


@pytest.mark.parametrize("kind", ["attn_out", "resid_mid", "mlp_out"])
def test_scaled_residuals_are_refused(kind: Kind) -> None:
    model = tiny("Granite", residual_multiplier=0.22, num_key_value_heads=2)
    with pytest.raises(UsageError, match=r"what is added to the stream is scaled by \(0\.22, 0\.22\)"):
        model.check_site(Site(1, kind))
    model.check_site(Site(1, "mlp.hook_in"))
    model.check_site(Site(1, "resid_post"))


def test_what_does_not_add_up_is_refused_whatever_the_architecture_says() -> None:
    model = tiny("Llama")
    block = model.arch.decoder_layers[1]
    forward = block.mlp.forward
    block.mlp.forward = lambda x: forward(x)
    block.register_forward_hook(lambda _m, _a, out: out * 1.01)  # a trick that no table of architectures knows
    for kind in ("resid_mid", "mlp_out"):
        with pytest.raises(UsageError, match="no plain sum"):
            model.check_site(Site(1, kind))  # type: ignore[arg-type]
    model.check_site(Site(1, "z"))
    model.check_site(Site(0, "mlp_out"))


def test_no_norm_before_the_mlp() -> None:
    model = tiny("Olmo2", num_key_value_heads=2)
    with pytest.raises(UsageError, match="its MLP reads no norm's output"):
        model.check_site(Site(1, "ln2.hook_normalized"))
    for kind in ("attn_out", "resid_mid", "mlp_out", "mlp.hook_in", "z"):
        model.check_site(Site(1, kind))  # type: ignore[arg-type]


def test_a_norm_of_another_kind_is_refused() -> None:
    model = tiny("Llama")
    norm = model.arch.decoder_layers[1].post_attention_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x).tanh()
    with pytest.raises(UsageError, match=r"\(LlamaRMSNorm\) is neither a LayerNorm nor an RMSNorm"):
        model.check_site(Site(1, "ln2.hook_normalized"))


def test_sites_sort_in_the_order_of_computation() -> None:
    model = family("Llama")
    order: list[Site] = []
    wanted = [Site(i, kind) for i in (1, 0) for kind in reversed(KINDS)]
    handles = [(site, lambda value, site=site: order.append(site)) for site in wanted]
    from contextlib import ExitStack

    with torch.no_grad(), ExitStack() as stack:
        for site, function in sorted(handles, key=lambda pair: pair[0]):
            stack.enter_context(model.at(site, function))
        model.forward(torch.tensor([IDS]))
    assert order == sorted(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_norms(dtype: torch.dtype) -> None:
    import copy

    for name in ("GPT-2", "Llama", "Gemma 2", "Phi"):
        whole = family(name)
        half = Model(name, copy.deepcopy(whole.hf).to(dtype), whole.tokenizer, 0, 0)
        ours, theirs = half.anatomy.norm(1), whole.anatomy.norm(1)
        assert ours.centred == theirs.centred == (name in ("GPT-2", "Phi"))
        assert close(ours.gain, theirs.gain, 1e-2)
        for site in sites(name, (1,)):
            half.check_site(site)
            with torch.no_grad(), half.at(site, lambda value: value.clone()):
                once = half.forward(torch.tensor([IDS]))
            assert torch.equal(once, half.forward(torch.tensor([IDS])))
