"""SAEs in sae-lens' layout: what sae-lens opens from a folder and what Lancet opens is the same SAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import save_sae
from sae_lens import SAE

from lancet.errors import DamagedError, UsageError
from lancet.loading import sae_from_folder
from lancet.sae import ARCHITECTURES, random_sae
from lancet.site import Site

X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_is_what_sae_lens_opens(architecture: Any, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"normalize": "layer_norm"}
    if architecture == "topk":
        kwargs |= {"rescale_by_decoder_norm": True, "apply_b_dec_to_input": False}
    if architecture == "temporal":
        kwargs = {"normalize": "constant_scalar_rescale", "scalar": 0.4, "tied": False}
    if "transcoder" in architecture:
        kwargs |= {"d_out": 20}
    folder = save_sae(tmp_path / "sae", random_sae(24, 64, architecture, site=Site(2), **kwargs))
    theirs, ours = SAE.load_from_disk(folder).requires_grad_(False), sae_from_folder(folder)
    assert (ours.name, ours.site, ours.architecture) == ("sae", Site(2), architecture)
    assert str(ours.writes) == (theirs.cfg.metadata.hook_name_out or str(ours.site))
    acts = theirs.encode(X)
    assert torch.allclose(ours.encode(X), acts, atol=1e-5 * float(acts.abs().max()))
    assert torch.allclose(ours.decode(ours.encode(X), X), theirs.forward(X), atol=1e-4)
    assert dict(ours.tensors()).keys() == theirs.state_dict().keys()


def test_weights_are_mapped(tmp_path: Path) -> None:
    """Float32 weights of a file are neither read nor copied when it is opened."""
    folder = save_sae(tmp_path / "sae", random_sae(24, 64))
    (file,) = folder.glob("*.safetensors")
    inode = file.stat().st_ino
    sae = sae_from_folder(folder)
    if not Path("/proc/self/maps").is_file():
        pytest.skip("only Linux tells what is mapped")
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped if line[4] == str(inode)]
    for name, tensor in sae.tensors():
        assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), name


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("standard", {"architecture": "crosscoder"}, "is a 'crosscoder' SAE; supported: standard"),
        ("standard", {"metadata": {"hook_name": "blocks.0.hook_resid_pre", "hook_head_index": 3}}, "single attention"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "has not been folded"),
        ("transcoder", {"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "does not say which site it writes"),
        ("standard", {"architecture": "jumprelu"}, "threshold must have shape"),
    ],
)
def test_refused(architecture: Any, config: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", random_sae(24, 64, architecture), **config)
    with pytest.raises(Exception, match=said) as caught:
        sae_from_folder(folder)
    assert type(caught.value).__module__ == "lancet.errors"


@pytest.mark.parametrize("part", ["W_enc", "W_dec", "b_dec", "attn_layers.0.c_proj.bias"])
def test_missing_tensors(part: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_sae(tmp_path / "sae", random_sae(24, 64, "temporal", tied=False))
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({name: t.clone() for name, t in tensors.items() if name != part}, folder / "sae_weights.safetensors")
    with pytest.raises(DamagedError, match=f"lacks {part}"):
        sae_from_folder(folder)


def test_the_reshaped_site_of_heads(tmp_path: Path) -> None:
    """sae-lens reshapes [.., heads, d_head] for hook_z; here values lie flat, and nothing is to be reshaped."""
    folder = save_sae(tmp_path / "sae", random_sae(24, 64, site=Site(1, "z")), reshape_activations="hook_z")
    sae = sae_from_folder(folder)
    assert sae.site == Site(1, "z")
    theirs = SAE.load_from_disk(folder).requires_grad_(False)
    assert torch.allclose(sae.encode(X), theirs.encode(X.view(2, 9, 4, 6)), atol=1e-5)
    assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    with pytest.raises(UsageError, match="has no cfg"):
        sae_from_folder(tmp_path)
