"""Opening by name, through a hub on the loopback: the real client, the real sae-lens loader, real layouts.

GPT-2's exact shape is served: its config, 124 million bfloat16 weights (one random block, repeated, so that making the
file takes a second) under the names that the real file has; its layer-6 SAE has its real size and the old layout.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants as hf
import pytest
import torch
from conftest import save_tiny_gpt2
from fixtures_hub import GPT2, RES_JB, SAES, Says, make_gpt2, make_res_jb, point_at
from loopback import COMMIT, Hub, serving
from safetensors.torch import load_file, save_file

from lancet import catalogue, convert, hub, keeping, loading, names, published
from lancet.errors import DamagedError, LancetError, MissingError, UnknownName, UsageError
from lancet.files import check_safetensors, read_json
from lancet.lab import open_lab

LISTED_PICKLES = "andyrdt/saes-llama-3.1-8b-instruct"


def make_pickle(folder: Path, state: Any) -> None:
    """dictionary_learning's layout."""
    folder.mkdir(parents=True)
    trainer = {
        "dict_class": "BatchTopKSAE",
        "activation_dim": 16,
        "dict_size": 32,
        "layer": 3,
        "lm_name": "meta-llama/Llama-3.1-8B-Instruct",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 512}}))
    torch.save(state, folder / "ae.pt")


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_gpt2(root / GPT2)
    make_res_jb(root / SAES / "blocks.6.hook_resid_pre")
    save_tiny_gpt2(root / "someone" / "tiny", n_embd=128, vocab_size=2048)  # its weights are large enough for the CDN
    generator = torch.Generator().manual_seed(1)
    state = {
        "encoder.weight": torch.randn(32, 16, generator=generator),
        "encoder.bias": torch.randn(32, generator=generator),
        "decoder.weight": torch.randn(16, 32, generator=generator),
        "b_dec": torch.randn(16, generator=generator),
        "threshold": torch.tensor(0.7),
        "k": torch.tensor(4),
    }
    make_pickle(root / LISTED_PICKLES / "resid_post_layer_3" / "trainer_1", state)
    make_pickle(root / LISTED_PICKLES / "resid_post_layer_7" / "trainer_1", state | {"k": Bomb(root / "exploded")})
    return root


@pytest.fixture(scope="module")
def up(root: Path) -> Iterator[Hub]:
    with serving(root) as hub:
        yield hub


@pytest.fixture
def online(up: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub is up, both caches are empty, no fault is ordered."""
    point_at(monkeypatch, up.url, tmp_path)
    for faults in (up.gated, up.cut, up.altered, up.asked):
        faults.clear()
    return up


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)


# ---- GPT-2 Small and its SAE, by name --------------------------------------------------------------------------------

REOPEN = """
import sys, torch
from lancet.lab import open_lab
lab = open_lab("gpt2-small", device="cpu", dtype="bfloat16", anyway=True)  # random weights
sae = lab.saes[0]
x = lab.model.values(lab.model.batch([lab.tokenize("The cat sat")]), [sae.site])[sae.site][0, 1:]
print(sae.name, sae.centred, int(sae.features(x).value.numel()), "sae_lens" in sys.modules)
"""


@pytest.fixture(scope="module")
def opened(up: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """GPT-2 Small, opened by name alone; both large files are cut once on the way."""
    home = tmp_path_factory.mktemp("home")
    says = Says()
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, up.url, home)
        up.asked.clear()
        up.cut |= {"model.safetensors": 100_000_000, "sae_weights.safetensors": 60_000_000}
        lab = open_lab("gpt2-small", device="cpu", dtype="bfloat16", say=says, anyway=True)  # random weights
        yield SimpleNamespace(lab=lab, says=says, home=home, asked=list(up.asked), hub=up)


def test_opens_by_name(opened: SimpleNamespace) -> None:
    lab = opened.lab
    assert lab.model.name == "gpt2-small" and lab.model.n_layers == 12 and lab.model.d_model == 768
    (sae,) = lab.saes
    assert sae.name == RES_JB and str(sae.site) == "blocks.6.hook_resid_pre" and sae.d_sae == 24576
    assert sae.centred and lab.model.start_plain == 0
    assert sae.page == "https://www.neuronpedia.org/gpt2-small/6-res-jb"


def test_only_what_is_needed_was_asked_for(opened: SimpleNamespace) -> None:
    asked = [line for line, _ in opened.asked]
    assert not [line for line in asked if ".bin" in line or "onnx" in line]
    assert opened.says.fetched["model.safetensors"][0] == opened.says.fetched["model.safetensors"][1] > 248_000_000
    assert any("fetching openai-community/gpt2 (249 MB)" in line for line in opened.says)


def test_cut_downloads_went_on_where_they_broke(opened: SimpleNamespace) -> None:
    asked = [line for line, _ in opened.asked if line.startswith("GET /cdn")]
    assert len(asked) == 4
    for name, cut in (("/model.safetensors", 100_000_000), ("/sae_weights.safetensors", 60_000_000)):
        again = next(line for line in asked if name in line and "bytes=" in line)
        begun = int(again.split("bytes=")[1].rstrip("-"))
        assert cut - 2 * hub.PIECE <= begun <= cut


def test_its_features_are_those_of_the_published_weights(opened: SimpleNamespace, root: Path) -> None:
    """Against the arithmetic written out on the file that was served, in the centred basis that the list states."""
    lab, weights = opened.lab, load_file(root / SAES / "blocks.6.hook_resid_pre" / "sae_weights.safetensors")
    sae = lab.saes[0]
    x = lab.model.values(lab.model.batch([lab.tokenize("The cat sat on the mat.")]), [sae.site])[sae.site][0].float()
    centred = x - x.mean(-1, keepdim=True)
    wanted = ((centred - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    torch.testing.assert_close(sae.features(x).dense(), wanted, rtol=1e-5, atol=1e-4)
    plain = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    assert (wanted - plain).abs().max() > 1e-3  # the basis makes a difference here


def test_what_the_converter_wrote(opened: SimpleNamespace, root: Path) -> None:
    folder = opened.home / "lancet" / "saes" / "gpt2-small-res-jb" / "blocks.6.hook_resid_pre"
    told = read_json(folder / "lancet.json")
    assert told["commit"] == COMMIT and told["repo"] == SAES and told["pickle"] is False and told["l0"] == 51
    assert told["basis"] == {"center_writing_weights": True}
    hashes = {file["file"]: file["sha256"] for file in told["files"]}
    served = root / SAES / "blocks.6.hook_resid_pre" / "sae_weights.safetensors"
    assert hashes["blocks.6.hook_resid_pre/sae_weights.safetensors"] == opened.hub.etag(served)
    ours, theirs = load_file(folder / "sae_weights.safetensors"), load_file(served)
    assert all(torch.equal(ours[name].float(), theirs[name]) for name in theirs)


def test_reopens_in_a_new_process_with_the_hub_down(opened: SimpleNamespace) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(opened.home / "hf"),
        "LANCET_CACHE": str(opened.home / "lancet"),
        "HF_HUB_OFFLINE": "0",
    }
    before = len(opened.hub.asked)
    done = subprocess.run([sys.executable, "-c", REOPEN], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, centred, count, heavy = done.stdout.split()
    assert (name, centred, heavy) == (RES_JB, "True", "False") and int(count) > 0
    assert len(opened.hub.asked) == before


def test_the_published_folder_alone_is_known_by_its_hash(
    opened: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--sae ./folder` of the same file: its config states no basis, and it must not be taken for plain."""
    source = opened.hub.root / SAES / "blocks.6.hook_resid_pre"
    shutil.copytree(source, tmp_path / "mine")
    point_at(monkeypatch, "http://127.0.0.1:9", opened.home)
    sae, _ = loading.open_sae(opened.lab.model, str(tmp_path / "mine"))
    assert sae.centred and sae.name == RES_JB
    # Lancet's own conversion gone, Hugging Face's cache still knows the file.
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "lancet"))
    sae, _ = loading.open_sae(opened.lab.model, str(tmp_path / "mine"))
    assert sae.centred and sae.name == RES_JB


def test_cache_lists_and_prunes(opened: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", opened.home)
    found = {item.name: item for item in keeping.everything()}
    assert found[GPT2].bytes > 248_000_000 and not found[GPT2].own
    assert found[RES_JB].bytes > 1_000_000 and found[RES_JB].own
    assert "needed no more" in found[SAES].what
    with pytest.raises(UnknownName, match="nearest: gpt2-small-res-jb"):
        keeping.chosen(["gpt2-small-res-jc"])
    mine = published.root() / "other" / "sae"
    shutil.copytree(published.root() / "gpt2-small-res-jb" / "blocks.6.hook_resid_pre", mine)
    told = read_json(mine / "lancet.json") | {"release": "other", "id": "sae"}
    (mine / "lancet.json").write_text(json.dumps(told))
    (chosen,) = keeping.chosen(["other"])
    keeping.delete(chosen)
    assert not mine.exists() and (published.root() / RES_JB).is_dir()


def test_names_of_saes(opened: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which published SAE each spelling means; fetching is left out."""
    asked: list[str] = []
    monkeypatch.setattr(published, "ensure", lambda entry, say, progress: asked.append(entry.name) or Path("x"))
    for name in (
        None,
        "blocks.8.hook_resid_pre",
        "resid_pre.8",
        "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
    ):
        loading._sae_folder(opened.lab.model, name, lambda line: None)
    assert asked == [
        RES_JB,
        *["gpt2-small-res-jb/blocks.8.hook_resid_pre"] * 2,
        "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
    ]
    with pytest.raises(UnknownName, match=r"nearest: .*lancet saes --model gpt2-small"):
        loading._sae_folder(opened.lab.model, "blocks.12.hook_resid_pre", lambda line: None)
    with pytest.raises(UnknownName, match=r"nearest: blocks\.6\.hook_resid_pre"):
        loading._sae_folder(opened.lab.model, RES_JB + "x", lambda line: None)
    other = SimpleNamespace(name="gemma-2-2b")
    with pytest.raises(UsageError, match=r"no default SAE; .*gemma-scope-2b-pt-res.*lancet saes --model gemma-2-2b"):
        loading._sae_folder(other, None, lambda line: None)  # type: ignore[arg-type]


# ---- models: faults of the network and of files ----------------------------------------------------------------------


def fetch_tiny(says: Says | None = None) -> Path:
    says = says or Says()
    return hub.model_folder("someone/tiny", says, says.progress, names.table().values())


def test_an_interrupted_download_goes_on_in_the_next_process(online: Hub, root: Path) -> None:
    def interrupt(file: str, done: int, of: int | None) -> None:
        if file == "model.safetensors":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.model_folder("someone/tiny", print, interrupt)
    assert hub.local_model("someone/tiny") is None
    online.asked.clear()
    folder = fetch_tiny()
    (line,) = online.requests("GET /cdn")
    assert "bytes=" in line
    assert (folder / "model.safetensors").read_bytes() == (root / "someone/tiny/model.safetensors").read_bytes()
    assert not list((folder / "model.safetensors").resolve().parent.glob("*.part"))


def test_the_second_opening_asks_nothing(online: Hub) -> None:
    folder = fetch_tiny()
    online.asked.clear()
    assert fetch_tiny() == folder and not online.asked


def test_files_of_another_programs_cache_are_used_where_they_lie(online: Hub) -> None:
    from huggingface_hub import snapshot_download

    there = snapshot_download("someone/tiny", allow_patterns=["*.json", "*.safetensors"])
    online.asked.clear()
    assert fetch_tiny() == Path(there) and not online.asked


def test_no_such_model(online: Hub) -> None:
    with pytest.raises(
        UnknownName,
        match=r"'EleutherAI/pythia-70n-deduped'; nearest: EleutherAI/pythia-70m-deduped, .*hf auth login",
    ):
        hub.model_folder("EleutherAI/pythia-70n-deduped", print, known=names.table().values())


def test_no_such_file(online: Hub) -> None:
    with pytest.raises(MissingError, match=r"someone/tiny has no file nothing\.json"):
        hub.fetch("someone/tiny", "nothing.json")


def test_gated(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online.gated.add("someone/tiny")
    with pytest.raises(
        MissingError,
        match=rf"log in with `hf auth login` \(or set HF_TOKEN\), accept its terms at {online.url}/someone/tiny",
    ):
        fetch_tiny()
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    fetch_tiny()
    tokens = {("/cdn/" in line): token for line, token in online.asked}
    assert tokens == {False: "Bearer let-me-in", True: None}  # the token is not for the host of the files


def test_altered_on_the_way(online: Hub, root: Path, quick: None) -> None:
    online.altered |= {"model.safetensors"}
    with pytest.raises(DamagedError, match=r"model.safetensors came damaged: .* promised .*try again"):
        fetch_tiny()
    assert hub.local_model("someone/tiny") is None
    online.altered = set()
    online.altered |= {"config.json"}
    for blob in hub.storage("someone/tiny").rglob("*.json"):
        hub.remove(blob)
    with pytest.raises(DamagedError, match=r"config.json came damaged"):
        fetch_tiny()
    online.altered.clear()
    folder = fetch_tiny()
    assert (folder / "model.safetensors").read_bytes() == (root / "someone/tiny/model.safetensors").read_bytes()


def test_damaged_in_the_cache(online: Hub) -> None:
    folder = fetch_tiny()
    weights = folder / "model.safetensors"
    with weights.resolve().open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedError, match="it was removed, and is fetched again"):
        fetch_tiny()
    check_safetensors(fetch_tiny() / "model.safetensors")
    with weights.resolve().open("r+b") as file:  # the same length: only the hash tells
        file.seek(-4, 2)
        file.write(b"\0\0\xff\0")
    hub.model_folder("someone/tiny", print)
    with pytest.raises(DamagedError, match=r"model\.safetensors came damaged"):
        hub.verify(folder)
    hub.verify(fetch_tiny())


def test_pickles_alone(online: Hub, root: Path) -> None:
    folder = root / "someone" / "pickles"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(DamagedError, match=r"has no model\.safetensors; pickles .* are never opened"):
        hub.model_folder("someone/pickles", print)
    assert not online.requests(".bin")


def test_shards(online: Hub, root: Path) -> None:
    folder = root / "someone" / "shards"
    shutil.copytree(root / "someone" / "tiny", folder, dirs_exist_ok=True)
    state = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": state[::2], "model-00002-of-00002.safetensors": state[1::2]}
    for name, part in parts.items():
        save_file(dict(part), folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key, _ in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = loading.open_model("someone/shards", "cpu", "float32")
    there = hub.local_model("someone/shards")
    assert there and found.d_model == 128
    (there / "model-00002-of-00002.safetensors").unlink()
    assert hub.local_model("someone/shards") is None  # half a model is none


def test_without_a_network(online: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: None) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(
        MissingError, match=r"http://127.0.0.1:9 cannot be reached .*HTTPS_PROXY .*HF_ENDPOINT for a mirror"
    ):
        fetch_tiny()
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        fetch_tiny()


def test_a_server_that_breaks_off_for_good(online: Hub, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(online, "cut", _Always({"model.safetensors": 5000}))
    with pytest.raises(MissingError, match="cannot be reached"):
        fetch_tiny()
    assert len(online.requests("GET /cdn")) < 12


class _Always(dict[str, int]):
    def pop(self, key: str, default: Any = None) -> Any:
        return self.get(key, default)


def test_no_room(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LancetError, match=r"not enough disk space: .*HF_HOME"):
        fetch_tiny()


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.fixture
def numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the converter changes in its own process is put back in this one."""
    import numpy as np
    from sae_lens.loading import pretrained_sae_loaders as loaders

    for owner, name in (
        (torch, "load"),
        (np, "load"),
        (loaders, "hf_hub_download"),
        (loaders, "get_safetensors_tensor_shapes"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_a_pickle_is_converted_and_told(online: Hub, root: Path, tmp_path: Path, numbers_only: None) -> None:
    entry = catalogue.load().entry("llama-3.1-8b-instruct-andyrdt/resid_post_layer_3_trainer_1")
    told: list[dict[str, Any]] = []
    out = tmp_path / "out"
    out.mkdir()
    convert.convert(entry, out, told.append)
    assert any("ae.pt is a pickle" in line.get("say", "") for line in told)
    assert read_json(out / "lancet.json")["pickle"] is True
    sae = loading.sae_from_folder(out)
    assert (sae.architecture, str(sae.site)) == ("jumprelu", "blocks.3.hook_resid_post")
    state = torch.load(root / LISTED_PICKLES / "resid_post_layer_3" / "trainer_1" / "ae.pt", weights_only=True)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    before = (x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    wanted = before * (before > 0.7)
    torch.testing.assert_close(sae.encode(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(wanted, x), wanted @ state["decoder.weight"].T + state["b_dec"])


def test_a_pickle_that_holds_more_than_numbers_is_refused(online: Hub, root: Path) -> None:
    entry = catalogue.load().entry("llama-3.1-8b-instruct-andyrdt/resid_post_layer_7_trainer_1")
    with pytest.raises(
        DamagedError, match="holds more than numbers, or is damaged, and was refused; nothing in it was run"
    ):
        published.ensure(entry)
    assert online.requests("GET /andyrdt")  # it was fetched, and then not opened
    assert not (root / "exploded").exists()
    assert not published.folder(entry).exists() and not list(published.root().rglob(".*"))
    torch.load(root / LISTED_PICKLES / "resid_post_layer_7" / "trainer_1" / "ae.pt", weights_only=False)
    assert (root / "exploded").exists()  # the bomb is one


def test_an_array_of_objects_is_refused(online: Hub, root: Path, tmp_path: Path, numbers_only: None) -> None:
    import numpy as np

    entry = catalogue.load().entry("gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical")
    folder = root / entry.repo / entry.path
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", W_enc=np.array([Bomb(root / "exploded too")], dtype=object))
    with pytest.raises(DamagedError, match="was refused; nothing in it was run"):
        convert.convert(entry, tmp_path, lambda told: None)
    assert not (root / "exploded too").exists()


def test_no_single_sae(online: Hub) -> None:
    entry = catalogue.load().entry("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3")
    with pytest.raises(UsageError, match="one layer of a cross-layer transcoder"):
        published.ensure(entry)
    assert not online.asked


def test_numbers_only_holds_whatever_is_asked(tmp_path: Path, numbers_only: None) -> None:
    torch.save({"k": Bomb(tmp_path / "exploded")}, tmp_path / "x.pt")
    convert.only_numbers()
    convert.only_numbers()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not (tmp_path / "exploded").exists()


def test_interrupted_conversion_leaves_nothing(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the other process works: it is ended, and no folder is taken for whole."""
    entry = catalogue.load().entry(RES_JB)
    children: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    class Interrupted(list[str]):
        def __iter__(self) -> Iterator[str]:
            raise KeyboardInterrupt

    def spy(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        child = start(*args, **kwargs)
        children.append(child)
        return SimpleNamespace(stdout=Interrupted(), poll=child.poll, kill=child.kill, wait=child.wait)  # type: ignore[return-value]

    monkeypatch.setattr(published.subprocess, "Popen", spy)
    with pytest.raises(KeyboardInterrupt):
        published.ensure(entry)
    assert children[0].poll() is not None
    assert not published.here(entry) and not list(published.root().rglob("*.safetensors"))
    assert list(published.all_here()) == []


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (torch.tensor([1.0, -0.5, 256.0]), torch.bfloat16),
        (torch.tensor([1.0, 1.0009765625]), torch.float16),
        (torch.tensor([1.0, 1.0000001]), torch.float32),
        (torch.tensor([1.0, float("inf")]), torch.bfloat16),
        (torch.tensor([0.5, 1e-30]).double(), torch.float64),
    ],
)
def test_narrowest_dtype_loses_nothing(values: torch.Tensor, dtype: torch.dtype) -> None:
    found = convert.narrowest(values)
    assert found.dtype == dtype and torch.equal(found.to(values.dtype), values)
