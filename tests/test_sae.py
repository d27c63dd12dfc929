"""The arithmetic of an SAE against sae-lens' own classes with the same weights, for every architecture and
normalisation, and every shortcut against the full computation. Activations nearer than 1e-5 to the threshold that
decides about them are left out, and are few."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor

import lancet.sae
from lancet.errors import MismatchError, UsageError
from lancet.sae import ARCHITECTURES, NORMALISATIONS, Features, Sae, random_sae

REFERENCES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
}
FIELDS = ("architecture", "normalize", "apply_b_dec_to_input", "rescale_by_decoder_norm")
KINDS: list[dict[str, Any]] = [
    dict(zip(FIELDS, (architecture, normalize, apply, by_norm), strict=True))
    for architecture in ARCHITECTURES
    for normalize in NORMALISATIONS
    for apply in (True, False)
    for by_norm in ((True, False) if architecture == "topk" else (False,))
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))


def reference(sae: Sae) -> Any:
    """sae-lens' SAE of the same weights."""
    cls, config = REFERENCES[sae.architecture]
    only_topk = {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_by_decoder_norm}
    theirs = cls(
        config(
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            normalize_activations=sae.normalize,
            apply_b_dec_to_input=sae.apply_b_dec_to_input,
            **(only_topk if sae.architecture == "topk" else {}),
        )
    )
    theirs.load_state_dict({name: getattr(sae, name).clone() for name in theirs.state_dict()})
    return theirs.requires_grad_(False)


def clear(sae: Sae, x: Tensor) -> Tensor:
    """[..., d_sae] True where the quantity that decides whether a feature fires is not within 1e-5 of its threshold."""
    theirs = reference(sae)
    decides = theirs.process_sae_in(x) @ sae.W_enc + (sae.b_gate if sae.architecture == "gated" else sae.b_enc)
    if sae.architecture == "jumprelu":
        decides = decides - sae.threshold
    if sae.architecture == "topk":
        decides = decides * sae.W_dec.norm(dim=-1) if sae.rescale_by_decoder_norm else decides
        if sae.k == sae.d_sae:
            return torch.ones_like(decides, dtype=torch.bool)
        last_in, first_out = decides.sort(dim=-1, descending=True).values[..., sae.k - 1 : sae.k + 1].split(1, dim=-1)
        decides = decides - (last_in + first_out) / 2
    if sae.architecture == "standard":  # continuous at its threshold, so that nothing need be left out
        return torch.ones_like(decides, dtype=torch.bool)
    return decides.abs() > 1e-5


def close(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> bool:
    """Whether no entry differs by more than 1e-5 of the largest (of `scale`, where one is given)."""
    largest = (theirs if scale is None else scale).abs().max() if theirs.numel() else torch.tensor(0.0)
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= 1e-5 * largest).all())


def inputs(sae: Sae, tokens: int = 40, seed: int = 1) -> Tensor:
    """[tokens, d_in] values with a mean and tokens of very different norms, as in a residual stream."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, sae.d_in, generator=generator) + 0.5
    return x * torch.rand(tokens, 1, generator=generator).mul(3).exp()


def example(kind: dict[str, Any], **changes: Any) -> tuple[Sae, Tensor]:
    sae = random_sae(24, 64, seed=3, **(kind | changes))
    return sae, inputs(sae)


# ---- against sae-lens ------------------------------------------------------------------------------------------------


@every_kind
def test_encode_and_decode_equal_sae_lens(kind: dict[str, Any]) -> None:
    sae, x = example(kind)
    theirs = reference(sae)
    acts = theirs.encode(x)
    keep = clear(sae, x)
    assert keep.float().mean() > 0.99
    assert 0.02 < (acts != 0).float().mean() < 0.9  # the comparison is about something
    assert close(sae.encode(x) * keep, acts * keep)
    theirs.encode(x)  # decode undoes the normalisation of the input that was encoded last
    assert close(sae.decode(acts, x), theirs.decode(acts))


@pytest.mark.parametrize("by_norm", [True, False])
def test_topk_with_fewer_positive_than_k(by_norm: bool) -> None:
    sae, x = example({"architecture": "topk", "rescale_by_decoder_norm": by_norm}, k=50)
    acts = reference(sae).encode(x)
    assert (acts > 0).sum(1).max() < 50
    assert bool((acts >= 0).all())
    assert close(sae.encode(x), acts)


@every_kind
def test_shapes_and_dtypes_of_inputs(kind: dict[str, Any]) -> None:
    sae, x = example(kind)
    folded = x.view(4, 10, -1)
    assert torch.allclose(sae.encode(folded).view(40, -1), sae.encode(x), rtol=1e-4, atol=1e-4)
    assert sae.decode(sae.encode(folded), folded).shape == folded.shape
    low = x.to(torch.bfloat16)
    assert torch.equal(sae.encode(low), sae.encode(low.float()))
    assert sae.encode(low).dtype == torch.float32
    before = x.clone()
    sae.decode(sae.encode(x), x)
    assert torch.equal(x, before)


# ---- shortcuts -------------------------------------------------------------------------------------------------------


@every_kind
def test_sparse_equals_dense_in_several_chunks(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = example(kind)
    keep = clear(sae, x)
    monkeypatch.setattr(lancet.sae, "DENSE_BYTES", 7 * 4 * sae.d_sae)  # seven tokens, or eighteen entries, at a time
    found = sae.features(x)
    dense = sae.encode(x)
    assert close(found.dense() * keep, dense * keep)
    assert found.shape == (40, 64)
    assert bool((found.value != 0).all())
    order = found.token * sae.d_sae + found.feature
    assert bool((order.diff() > 0).all())  # sorted, and each entry once
    assert close(sae.decode_features(found, x), sae.decode(found.dense(), x))
    assert torch.equal(torch.from_numpy(found.to_scipy().toarray()), found.dense())
    assert torch.equal(found.l0(), (found.dense() != 0).sum(1))
    assert torch.equal(found.of_feature(5), found.dense()[:, 5])
    features, values = found.of_token(9)
    assert torch.equal(values, values.abs().sort(descending=True).values * values.sign())
    assert torch.equal(torch.zeros(64).index_put((features,), values), found.dense()[9])


def test_no_tokens() -> None:
    sae, x = example(KINDS[0])
    found = sae.features(x[:0])
    assert found.dense().shape == (0, 64)
    assert sae.decode_features(found, x[:0]).shape == (0, 24)
    assert sae.shares(x[:0], found).shape == (0,)


@every_kind
def test_encode_at_equals_encode(kind: dict[str, Any]) -> None:
    sae, x = example(kind)
    index, keep = torch.tensor([63, 0, 17, 17]), clear(sae, x)
    assert close((sae.encode_at(x, index) * keep[:, index]), (sae.encode(x) * keep)[:, index], sae.encode(x))


@every_kind
def test_shares_sum_to_one(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = example(kind)
    x[3] = -100 * sae.W_enc.sum(1)  # at least for some SAEs a token at which nothing fires
    found = sae.features(x)
    shares = sae.shares(x, found)
    sums = torch.zeros(len(x)).index_add(0, found.token, shares)
    assert torch.allclose(sums[found.l0() > 0], torch.ones(int((found.l0() > 0).sum())), atol=1e-4)
    monkeypatch.setattr(lancet.sae, "DENSE_BYTES", 5 * 4 * sae.d_in)
    assert torch.allclose(sae.shares(x, found), shares, atol=1e-5)


def test_shares_by_hand() -> None:
    """Two orthogonal features with lengths 3 and 4 and activations 1: shares 9/25 and 16/25, whatever the bias."""
    weights = torch.tensor([[3.0, 0, 0], [0, 4, 0]])
    sae = Sae("hand", random_sae(2, 2).site, "standard", weights.T, weights, torch.ones(3), torch.zeros(2))
    found = Features(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 1.0]), (1, 2))
    assert torch.allclose(sae.shares(torch.ones(1, 3), found), torch.tensor([9 / 25, 16 / 25]))
    assert torch.equal(sae.decode_features(found, torch.ones(1, 3)), torch.tensor([[4.0, 5.0, 1.0]]))


@every_kind
def test_a_centred_sae_is_the_plain_one_on_centred_values(kind: dict[str, Any]) -> None:
    plain, x = example(kind)
    centred = dataclasses.replace(plain, basis="centred")
    middle = x - x.mean(-1, keepdim=True)
    keep = clear(plain, middle)
    assert close(centred.encode(x) * keep, plain.encode(middle) * keep)
    acts = plain.encode(middle)
    assert close(centred.decode(acts, x), plain.decode(acts, middle))
    assert close(centred.in_basis(x), middle)
    assert torch.equal(plain.in_basis(x), x)
    change, index = torch.ones(40, 2), torch.tensor([1, 2])
    assert close(centred.write(x, change, index), plain.write(middle, change, index))


@st.composite
def random_cases(draw: st.DrawFn) -> tuple[Sae, Tensor, Tensor, Tensor]:
    """An SAE, values, a few distinct features, and a change of each of them at each token."""
    d_in, d_sae = draw(st.integers(8, 24)), draw(st.integers(16, 64))
    kind: dict[str, Any] = draw(st.sampled_from(KINDS)) | {"basis": draw(st.sampled_from(["plain", "centred"]))}
    seed, tokens = draw(st.integers(0, 10_000)), draw(st.integers(1, 5))
    if kind["architecture"] == "topk":
        kind["k"] = draw(st.integers(1, d_sae))
    sae = random_sae(d_in, d_sae, seed=seed, **kind)
    index = torch.tensor(draw(st.lists(st.integers(0, d_sae - 1), min_size=1, max_size=6, unique=True)))
    amounts = st.floats(-50, 50, width=32)
    change = torch.tensor([[draw(amounts) for _ in index] for _ in range(tokens)])
    return sae, inputs(sae, tokens, seed), index, change


@settings(max_examples=40, deadline=None)
@given(random_cases())
def test_write_is_the_difference_of_two_decodings(case: tuple[Sae, Tensor, Tensor, Tensor]) -> None:
    sae, x, index, change = case
    before = sae.encode(x)
    after = before.index_add(1, index, change)
    first, second = sae.decode(before, x), sae.decode(after, x)
    assert close(sae.write(x, change, index), second - first, torch.maximum(first.abs(), second.abs()))


@settings(max_examples=40, deadline=None)
@given(random_cases())
def test_encode_at_equals_columns_of_encode(case: tuple[Sae, Tensor, Tensor, Tensor]) -> None:
    sae, x, index, _ = case
    keep = clear(sae, sae.in_basis(x))[:, index]
    assert close(sae.encode_at(x, index) * keep, sae.encode(x)[:, index] * keep, sae.encode(x))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "part", "value"),
    [
        ("standard", "b_enc", None),
        ("standard", "b_enc", torch.zeros(63)),
        ("standard", "W_dec", torch.zeros(24, 64)),
        ("standard", "W_enc", torch.zeros(64, 24)),
        ("standard", "b_dec", torch.zeros(64)),
        ("jumprelu", "threshold", None),
        ("jumprelu", "threshold", torch.zeros(1)),
        ("gated", "b_gate", None),
        ("gated", "r_mag", torch.zeros(24)),
        ("gated", "b_mag", torch.zeros(64, 1)),
        ("topk", "b_enc", torch.zeros(24)),
    ],
)
def test_shapes_that_do_not_fit(architecture: str, part: str, value: Tensor | None) -> None:
    sae = random_sae(24, 64, architecture)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=f"random-{architecture}: .* must have shape .*, got"):
        dataclasses.replace(sae, **{part: value})


@pytest.mark.parametrize("k", [0, -1, 65])
def test_k_that_does_not_fit(k: int) -> None:
    with pytest.raises(MismatchError, match=f"between 1 and 64, got {k}"):
        random_sae(24, 64, "topk", k=k)


def test_unknown_arithmetic() -> None:
    sae = random_sae(24, 64)
    with pytest.raises(UsageError, match="'matching_pursuit' SAE; supported: standard, jumprelu, gated, topk"):
        dataclasses.replace(sae, architecture="matching_pursuit")
    with pytest.raises(UsageError, match="'covariance_whitening'; supported: none, expected_average_only_in"):
        dataclasses.replace(sae, normalize="covariance_whitening")


@pytest.mark.parametrize("index", [-1, 64, 10**9])
def test_index_out_of_range(index: int) -> None:
    sae = random_sae(24, 64)
    assert sae.check_feature(0) == 0
    assert sae.check_feature(63) == 63
    with pytest.raises(UsageError, match=f"no feature #{index} in random-standard; it has #0 to #63"):
        sae.check_feature(index)
