"""The arithmetic of an SAE against sae-lens' own classes with the same weights, for every architecture and
normalisation, and every shortcut against the full computation. Activations nearer than 1e-5 to the threshold that
decides about them are left out, and are few."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import reference, save_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import load_file, save_file
from torch import Tensor

import lancet.sae
import lancet.weights
from lancet.architectures import ARCHITECTURES as KINDS_OF_SAE
from lancet.architectures import Pursuit, Temporal
from lancet.errors import MismatchError, UsageError
from lancet.sae import ARCHITECTURES, NORMALISATIONS, Features, Sae, random_sae
from lancet.site import Site

FIELDS = ("architecture", "normalize", "apply_b_dec_to_input", "rescale_by_decoder_norm")


def accepted(architecture: str, normalize: str, apply: bool, by_norm: bool) -> bool:
    """Whether sae-lens knows the combination."""
    if KINDS_OF_SAE[architecture].transcoder and apply:
        return False
    if by_norm and architecture not in ("topk", "abstopk"):
        return False
    if architecture == "temporal":
        return normalize != "covariance_whitening"
    return normalize != "constant_scalar_rescale"


KINDS: list[dict[str, Any]] = [
    dict(zip(FIELDS, kind, strict=True))
    for kind in itertools.product(ARCHITECTURES, NORMALISATIONS, (True, False), (True, False))
    if accepted(*kind)
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))


def clear(sae: Sae, x: Tensor) -> Tensor:
    """[tokens, d_sae] True where the quantity that decides whether a feature fires is not within 1e-5 of its threshold.

    Temporal SAEs' choices depend on one another; their random examples have none that is so near.
    """
    theirs = reference(sae)
    if sae.architecture == "temporal":
        return torch.ones(*x.shape[:-1], sae.d_sae, dtype=torch.bool)
    inside = theirs.process_sae_in(x)
    if sae.architecture == "matching_pursuit":
        return pursued_clearly(sae, inside)[:, None].expand(-1, sae.d_sae)
    decides = inside @ sae.W_enc + (sae.b_gate if sae.architecture == "gated" else sae.b_enc)
    if sae.threshold is not None:
        decides = decides - sae.threshold
    if sae.architecture in ("topk", "abstopk"):
        decides = decides * sae.W_dec.norm(dim=-1) if sae.rescale_by_decoder_norm else decides
        decides = decides.abs() if sae.architecture == "abstopk" else decides
        if sae.k == sae.d_sae:
            return torch.ones_like(decides, dtype=torch.bool)
        last_in, first_out = decides.sort(dim=-1, descending=True).values[..., sae.k - 1 : sae.k + 1].split(1, dim=-1)
        decides = decides - (last_in + first_out) / 2
    elif sae.threshold is None and sae.architecture != "gated":
        return torch.ones_like(decides, dtype=torch.bool)  # continuous at its threshold: nothing need be left out
    return decides.abs() > 1e-5


def pursued_clearly(sae: Sae, left: Tensor) -> Tensor:
    """[tokens] True where every choice of a plain matching pursuit leads the second best by 1e-5, and where what is
    left is never within 1e-5 of the length at which to stop."""
    sure = torch.ones(len(left), dtype=torch.bool)
    for _ in range(sae.pursuit.max_iterations or sae.d_in):
        best = (left @ sae.W_dec.T).topk(2, dim=1)
        sure &= (best.values[:, 0] - best.values[:, 1] > 1e-5) & (best.values[:, 0].abs() > 1e-5)
        left = left - best.values[:, :1].relu() * sae.W_dec[best.indices[:, 0]]
        sure &= (left.norm(dim=1) - sae.pursuit.residual_threshold).abs() > 1e-5
    return sure


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
    if kind["architecture"] == "matching_pursuit":
        changes.setdefault("pursuit", Pursuit(max_iterations=6))
    if kind["normalize"] == "constant_scalar_rescale":
        changes.setdefault("scalar", 0.37)
    if KINDS_OF_SAE[kind["architecture"]].transcoder:
        changes.setdefault("d_out", 20)
    sae = random_sae(24, 64, seed=3, **(kind | changes))
    return sae, inputs(sae)


# ---- against sae-lens ------------------------------------------------------------------------------------------------


def test_every_architecture_of_sae_lens_is_there() -> None:
    assert set(ARCHITECTURES) == set(KINDS_OF_SAE) == set(SAE_CLASS_REGISTRY)
    for architecture in ARCHITECTURES:
        assert {kind["normalize"] for kind in KINDS if kind["architecture"] == architecture} >= {
            "none",
            "expected_average_only_in",
            "layer_norm",
            "constant_norm_rescale",
        }


@every_kind
def test_encode_and_decode_equal_sae_lens(kind: dict[str, Any]) -> None:
    sae, x = example(kind)
    theirs = reference(sae)
    acts = theirs.encode(x[None])[0]
    keep = clear(sae, x)
    assert keep.float().mean() > 0.99
    assert 0.02 < (acts != 0).float().mean() < 0.9  # the comparison is about something
    assert close(sae.encode(x) * keep, acts * keep)
    clearly = keep.all(1)
    assert close(sae.decode(acts, x)[clearly], theirs.forward(x[None])[0][clearly])


@every_kind
def test_decoding_equals_sae_lens_own(kind: dict[str, Any]) -> None:
    """`decode` of a skip transcoder or temporal SAE is sae-lens' `forward`; what is beside the features is the rest."""
    sae, x = example(kind)
    theirs = reference(sae)
    acts = theirs.encode(x[None])  # decode undoes the normalisation of the input that was encoded last
    beside = sae.beside(x)
    assert (beside is not None) == (sae.W_skip is not None or sae.temporal is not None)
    found = sae.decode(acts[0], x) - (0 if beside is None else beside)
    assert close(found, theirs.decode(acts)[0], sae.decode(acts[0], x))


@pytest.mark.parametrize("by_norm", [True, False])
def test_topk_with_fewer_positive_than_k(by_norm: bool) -> None:
    sae, x = example(KINDS[0] | {"architecture": "topk", "rescale_by_decoder_norm": by_norm}, k=50)
    acts = reference(sae).encode(x)
    assert (acts > 0).sum(1).max() < 50
    assert bool((acts >= 0).all())
    assert close(sae.encode(x), acts)


def test_abstopk_keeps_signs() -> None:
    sae, x = example(KINDS[0] | {"architecture": "abstopk"})
    assert (sae.features(x).value < 0).any()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 40.0])
@pytest.mark.parametrize("most", [1, 7, None])
@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("longer", [1.0, 0.6])
def test_when_matching_pursuit_stops(threshold: float, most: int | None, duplicates: bool, longer: float) -> None:
    """Where rows are shorter than 1, one feature is chosen again and again."""
    pursuit = Pursuit(threshold, most, duplicates)
    sae, x = example(KINDS[0] | {"architecture": "matching_pursuit"}, pursuit=pursuit)
    sae.W_dec = sae.W_dec * longer
    sae.W_enc = sae.W_dec.t()
    acts = reference(sae).encode(x)
    keep = pursued_clearly(sae, reference(sae).process_sae_in(x))
    assert keep.sum() >= 20
    assert close(sae.encode(x)[keep], acts[keep])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_temporal_settings(tied: bool, k: int | None, layers: int) -> None:
    first, second = (random_sae(24, 64, "temporal", seed=seed, tied=tied) for seed in (3, 4))
    assert first.temporal is not None and second.temporal is not None
    attention = Temporal(2, k, (first.temporal.layers + second.temporal.layers)[:layers])
    for apply in (True, False):
        sae = dataclasses.replace(first, temporal=attention, apply_b_dec_to_input=apply)
        x = inputs(sae).view(2, 20, 24)
        theirs = reference(sae)
        assert close(sae.encode(x), theirs.encode(x))
        assert close(sae.decode(sae.encode(x), x), theirs(x))


def test_hook_z_is_read_flat() -> None:
    """sae-lens reshapes [..., heads, d_head]; a value here is [..., heads * d_head], head after head."""
    sae = random_sae(24, 64, "standard", normalize="layer_norm")
    config = {"architecture": "standard", "d_in": 24, "d_sae": 64, "normalize_activations": "layer_norm"}
    theirs = SAE.from_dict(
        config | {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.0.attn.hook_z"}}
    )
    theirs.load_state_dict({name: value.clone() for name, value in sae.tensors()})
    x = inputs(sae)
    assert close(sae.encode(x), theirs.encode(x.view(40, 4, 6)).detach())
    assert close(sae.decode(sae.encode(x), x), theirs(x.view(40, 4, 6)).detach().reshape(40, 24))


@every_kind
def test_shapes_and_dtypes_of_inputs(kind: dict[str, Any]) -> None:
    sae, x = example(kind)
    folded = x.view(4, 10, -1)
    apart = torch.cat([sae.encode(text) for text in folded])
    assert torch.allclose(sae.encode(folded).view(40, -1), apart, rtol=1e-4, atol=1e-4)
    assert sae.decode(sae.encode(folded), folded).shape == (4, 10, sae.d_out)
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
    centred = dataclasses.replace(plain, centred=True)
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
    d_in, d_sae = draw(st.integers(8, 24)), 4 * draw(st.integers(4, 16))
    kind: dict[str, Any] = draw(st.sampled_from(KINDS)) | {"centred": draw(st.booleans())}
    seed, tokens = draw(st.integers(0, 10_000)), draw(st.integers(1, 5))
    if kind["architecture"] in ("topk", "abstopk"):
        kind["k"] = draw(st.integers(1, d_sae))
    if KINDS_OF_SAE[kind["architecture"]].transcoder:
        kind["d_out"] = draw(st.integers(8, 24))
    if kind["architecture"] == "matching_pursuit":
        kind["pursuit"] = Pursuit(max_iterations=5)
    sae = random_sae(d_in, d_sae, seed=seed, **kind)
    if draw(st.booleans()):
        sae = dataclasses.replace(sae, offset=torch.randn(d_in, generator=torch.Generator().manual_seed(seed)))
    index = torch.tensor(draw(st.lists(st.integers(0, d_sae - 1), min_size=1, max_size=6, unique=True)))
    amounts = st.floats(-50, 50, width=32)
    change = torch.tensor([[draw(amounts) for _ in index] for _ in range(tokens)])
    return sae, inputs(sae, tokens, seed), index, change


@settings(max_examples=60, deadline=None)
@given(random_cases())
def test_write_is_the_difference_of_two_decodings(case: tuple[Sae, Tensor, Tensor, Tensor]) -> None:
    sae, x, index, change = case
    before = sae.encode(x)
    after = before.index_add(1, index, change)
    first, second = sae.decode(before, x), sae.decode(after, x)
    assert close(sae.write(x, change, index), second - first, torch.maximum(first.abs(), second.abs()))


@settings(max_examples=60, deadline=None)
@given(random_cases())
def test_encode_at_equals_columns_of_encode(case: tuple[Sae, Tensor, Tensor, Tensor]) -> None:
    sae, x, index, _ = case
    keep = clear(sae, sae.in_basis(x))[:, index]
    assert close(sae.encode_at(x, index) * keep, sae.encode(x)[:, index] * keep, sae.encode(x))


# ---- large matrices, piece by piece ----------------------------------------------------------------------------------


@contextmanager
def in_pieces(d_in: int) -> Iterator[None]:
    """No float32 copies, and matrices in pieces of nine features; tokens in blocks of five."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lancet.weights, "COPY_BYTES", 0)
        patch.setattr(lancet.weights, "PIECE_BYTES", 9 * 4 * d_in)
        patch.setattr(lancet.sae, "DENSE_BYTES", 5 * 4 * d_in)
        yield


@every_kind
def test_pieces_equal_the_whole(kind: dict[str, Any]) -> None:
    whole, x = example(kind)
    keep = clear(whole, x)
    with in_pieces(whole.d_in):
        cut = dataclasses.replace(whole)
        assert not cut.one_piece
        assert len(cut.encoder_parts()) == 8
        found = cut.features(x)
        order = found.token * cut.d_sae + found.feature
        assert bool((order.diff() > 0).all())
        assert bool((found.value != 0).all())
        assert close(found.dense() * keep, whole.encode(x) * keep)
        assert close(cut.encode(x) * keep, whole.encode(x) * keep)
        index, some = torch.tensor([63, 0, 17, 17]), torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
        assert close(cut.encode_at(x, index) * keep[:, index], (whole.encode(x) * keep)[:, index], whole.encode(x))
        assert close(cut.write(x, some, index), whole.write(x, some, index))
        acts = whole.features(x)
        assert close(cut.decode(acts.dense(), x), whole.decode(acts.dense(), x))
        assert close(cut.decode_features(acts, x), whole.decode_features(acts, x))
        assert torch.allclose(cut.shares(x, acts), whole.shares(x, acts), atol=1e-5)
        assert torch.allclose(cut.decoder_norm, whole.W_dec.norm(dim=1))


@pytest.mark.parametrize("architecture", ["standard", "topk", "matching_pursuit", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_weights_keep_their_dtype_and_small_ones_do_not(architecture: str, dtype: torch.dtype) -> None:
    """The arithmetic is float32 on the file's numbers, whichever way they are held."""
    sae, x = example(KINDS[0] | {"architecture": architecture, "apply_b_dec_to_input": False})
    low = {name: value.to(dtype) for name, value in sae.tensors()}
    if sae.tied:
        low["W_enc"] = low["W_dec"].t()
    copied = dataclasses.replace(sae, **low)
    assert copied.W_dec.dtype == copied.W_enc.dtype == torch.float32
    with in_pieces(sae.d_in):
        held = dataclasses.replace(sae, **low)
        assert held.W_dec.dtype == held.W_enc.dtype == dtype
        assert held.b_dec.dtype == torch.float32
        assert held.W_dec.data_ptr() == low["W_dec"].data_ptr()
        assert held.W_enc.data_ptr() == low["W_enc"].data_ptr()
        keep = clear(copied, x).all(1)
        assert close(held.encode(x)[keep], copied.encode(x)[keep])
        assert held.features(x).value.dtype == torch.float32
        lit = copied.features(x)
        assert close(held.decode_features(lit, x), copied.decode_features(lit, x))
        assert torch.equal(held.rows(torch.tensor([5])), copied.rows(torch.tensor([5])))


def test_chosen_tokens_are_those_of_the_whole_text() -> None:
    """`keep` leaves rows out; a temporal SAE sees the tokens that are left out all the same."""
    wanted = torch.rand(40, generator=torch.Generator().manual_seed(2)) > 0.4
    for architecture in ("standard", "temporal"):
        sae, x = example(KINDS[0] | {"architecture": architecture})
        found = sae.features(x, wanted)
        assert found.shape == (int(wanted.sum()), 64)
        assert close(found.dense(), sae.encode(x)[wanted])
        assert close(sae.decode_features(found, x, wanted), sae.decode(sae.encode(x), x)[wanted])
        rows = x.view(2, 20, 24), wanted.view(2, 20)
        several = torch.cat([part.dense() for part in sae.features_of(*rows)])
        assert close(several, sae.encode(rows[0])[rows[1]])


def test_placing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only matrices stay behind, and only where they take more than the limit; nothing is computed on "meta"."""
    monkeypatch.setattr(lancet.weights, "COPY_BYTES", 0)
    for architecture in ("topk", "matching_pursuit", "temporal", "skip_transcoder"):
        apply = architecture != "skip_transcoder"
        sae, _ = example(KINDS[0] | {"architecture": architecture, "apply_b_dec_to_input": apply})
        size = sum(t.nbytes for name, t in sae.tensors() if name in ("W_enc", "W_dec"))
        for limit, stays in ((size - 1, True), (size, False), (None, False)):
            placed = dataclasses.replace(sae).place("meta", limit)
            assert placed.device.type == "meta"
            for name, tensor in placed.tensors():
                here = "cpu" if stays and name in ("W_enc", "W_dec") else "meta"
                assert tensor.device.type == here, name
            assert placed.W_enc.device == placed.W_dec.device
            assert placed.encoder(torch.tensor([1, 2])).shape == (24, 2)
            assert placed.encoder(slice(0, 5)).device.type == "meta"
            assert placed.rows(torch.tensor([3])).device.type == "meta"
            assert (placed.W_enc.data_ptr() == sae.W_enc.data_ptr()) == stays


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells how much memory is anonymous")
def test_memory_of_a_large_sae(tmp_path: Path) -> None:
    """200,000 features in bfloat16 from a file: 51 MB mapped, and never much of it as the process' own memory."""
    code = """
import sys, torch
from pathlib import Path
from benchmarks.memory import watched
from lancet import weights, sae as module
from lancet.loading import sae_from_folder
weights.COPY_BYTES, weights.PIECE_BYTES, module.DENSE_BYTES = 0, 1 << 20, 4 << 20
x = torch.randn(300, 64)
x @ torch.randn(64, 64)  # what the first product of matrices sets up
with watched() as peak:
    sae = sae_from_folder(Path(sys.argv[1]))
    found = sae.features(x)
    sae.decode_features(found, x)
    sae.shares(x, found)
    sae.encode_at(x, torch.tensor([5, 7]))
    sae.write(x, torch.ones(300, 2), torch.tensor([5, 7]))
assert 2 < len(found.value) / 300 < 40, len(found.value)
print(peak.grown)
"""
    sae = random_sae(64, 200_000, "topk", k=20)
    folder = save_sae(tmp_path / "large", sae)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    root, run = Path(__file__).parents[1], [sys.executable, "-c", code, str(folder)]
    told = subprocess.run(run, capture_output=True, text=True, check=False, cwd=root)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) < 40


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
        ("abstopk", "b_enc", None),
        ("transcoder", "b_enc", None),
        ("skip_transcoder", "W_skip", None),
        ("skip_transcoder", "W_skip", torch.zeros(24, 23)),
        ("temporal", "W_dec", torch.zeros(24, 64)),
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
    with pytest.raises(UsageError, match="'batchtopk' SAE; supported: standard, jumprelu, gated, topk"):
        dataclasses.replace(sae, architecture="batchtopk")
    with pytest.raises(UsageError, match="'whitened'; supported: none, expected_average_only_in"):
        dataclasses.replace(sae, normalize="whitened")
    with pytest.raises(UsageError, match="constant_scalar_rescale is defined for temporal SAEs alone"):
        dataclasses.replace(sae, normalize="constant_scalar_rescale")
    with pytest.raises(MismatchError, match="a temporal SAE needs its attention layers"):
        dataclasses.replace(random_sae(24, 64, "temporal"), temporal=None)
    with pytest.raises(UsageError, match="rescaling by the decoder's norm is defined for TopK"):
        dataclasses.replace(sae, rescale_by_decoder_norm=True)


def test_where_a_transcoder_writes() -> None:
    sae = random_sae(24, 64, "transcoder", d_out=20, site=Site(2))
    assert (sae.d_in, sae.d_out, sae.writes) == (24, 20, Site(2, "resid_post"))
    assert random_sae(24, 64).writes == Site(0)
    with pytest.raises(UsageError, match=r"reads blocks.2.hook_resid_pre and writes blocks.2.hook_resid_pre"):
        dataclasses.replace(sae, writes=None)
    with pytest.raises(UsageError, match="is computed before"):
        dataclasses.replace(sae, writes=Site(1))
    with pytest.raises(UsageError, match="other SAEs do not"):
        random_sae(24, 64, site=Site(2), writes=Site(3))
    with pytest.raises(UsageError, match="b_dec belongs to what it writes"):
        dataclasses.replace(sae, apply_b_dec_to_input=True)
    with pytest.raises(MismatchError, match=r"b_dec must have shape \(20,\), got \(24,\)"):
        dataclasses.replace(sae, b_dec=torch.zeros(24))
    with pytest.raises(MismatchError, match=r"offset must have shape \(24,\), got \(20,\)"):
        dataclasses.replace(sae, offset=torch.zeros(20))


@pytest.mark.parametrize("index", [-1, 64, 10**9])
def test_index_out_of_range(index: int) -> None:
    sae = random_sae(24, 64)
    assert sae.check_feature(0) == 0
    assert sae.check_feature(63) == 63
    with pytest.raises(UsageError, match=f"no feature #{index} in random-standard; it has #0 to #63"):
        sae.check_feature(index)
