"""Publishing: what is prepared of SAEs that were trained here, what is refused, what arrives at a hub on the loopback,
and that it opens from there."""
# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import json
import random
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hf
import pytest
import torch
import yaml
from fixtures_hub import point_at
from loopback import COMMIT, Hub, serving
from safetensors.torch import load_file, save_file
from test_cli import Done, documented, folders, run  # noqa: F401 - fixtures

from lancet import addressed, fingerprint
from lancet.errors import DamagedError, LancetError, MismatchError, MissingError, UnknownName, UsageError
from lancet.loading import open_model, open_sae, sae_from_folder
from lancet.model import Model
from lancet.publishing import gather, prepare, private, send
from lancet.training.config import TrainConfig
from lancet.training.train import train

BASE, REPO = "someone/tiny-model", "someone/tiny-saes"
SITES = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "list", "of", "value"]


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture(scope="module")
def trained(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAEs that were trained for a few steps on a model in a folder."""
    place, draw = tmp_path_factory.mktemp("trained"), random.Random(0)
    corpus = place / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=20))}) + "\n" for _ in range(40)))
    config = TrainConfig(sites=SITES, features="64", k=6, batch=64, length=24, tokens=300)
    train(model, corpus, config, place / "saes")
    (place / "saes" / "wandb").mkdir()
    (place / "saes" / "wandb" / "run.log").write_text("another's")
    (place / "saes" / SITES[0] / "model.pkl").write_bytes(b"\x80\x04")
    (place / "saes" / SITES[0] / ".hidden").write_text("x")
    return place / "saes"


@pytest.fixture
def one(trained: Path, tmp_path: Path) -> Path:
    """One of them, to be spoilt."""
    return shutil.copytree(trained / SITES[0], tmp_path / "one")


@pytest.fixture(scope="module")
def scored(trained: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures under the names that `lancet eval --json` gives them."""
    bench = {"auroc": 0.871, "auroc_probe": 0.983}
    figures = {"explained_variance": 0.8123, "l0": 6.25, "dead_share": 0.125, "loss_recovered": 0.9512, "kl": 0.0421}
    what = {"d_sae": 64, "architecture": "jumprelu"}
    entries = [
        {
            "name": site,
            "fingerprint": fingerprint.of_sae(sae_from_folder(trained / site)),
            "site": site,
            **what,
            **figures,
            "bench": bench if i else None,
        }
        for i, site in enumerate(SITES)
    ]
    told = {"model": model.name, "text": "/home/somebody/held out/text.jsonl", "tokens": 4321, "saes": entries}
    path = tmp_path_factory.mktemp("scored") / "eval.json"
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edited(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what is prepared ------------------------------------------------------------------------------------------------


def test_prepared_saes_equal_the_trained_ones(trained: Path, tmp_path: Path, no_network: None) -> None:
    from sae_lens import SAE

    made = prepare.prepare(trained, base_model=BASE, out=tmp_path / "out")
    assert [sae.folder for sae in made.saes] == list(SITES)
    files = ("cfg.json", "sae_weights.safetensors", "training.json", "training.csv")
    wanted = ["README.md", *(f"{site}/{name}" for site in SITES for name in files)]
    there = [file.relative_to(made.folder).as_posix() for file in made.folder.rglob("*") if file.is_file()]
    assert [file.path for file in made.files] == wanted and sorted(there) == sorted(wanted)
    assert made.bytes == sum((made.folder / path).stat().st_size for path in wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for site in SITES:
            ours, before = (SAE.load_from_disk(folder / site) for folder in (made.folder, trained))
            for name, value in before.state_dict().items():
                assert torch.equal(ours.state_dict()[name], value)
            assert ours.cfg.metadata.model_name == BASE
            assert ours.cfg.to_dict() | {"metadata": 0} == before.cfg.to_dict() | {"metadata": 0}
    again = prepare.prepare(trained, base_model=BASE, out=tmp_path / "out")  # over the earlier one
    assert again.files == made.files


def test_a_single_sae_lies_in_a_folder_named_by_its_site(one: Path) -> None:
    save_file({"x": torch.zeros(1)}, one / "facts.safetensors", metadata={"facts": json.dumps({"tokens": 3})})
    made = prepare.prepare(one, base_model=BASE)
    assert made.folder == one / "hub" and [sae.folder for sae in made.saes] == [SITES[0]]
    assert f"{SITES[0]}/facts.safetensors" in [file.path for file in made.files]
    made = prepare.prepare(one, base_model=BASE)  # its own folder is no hindrance
    assert len(made.files) == 6


def test_folders_tell_saes_apart(one: Path, tmp_path: Path) -> None:
    place = tmp_path / "several"
    for name in "abc":
        shutil.copytree(one, place / name)
    assert [sae.folder for sae in gather.gather(place, BASE)] == [f"{SITES[0]}-{name}" for name in "abc"]
    record = json.loads((one / "training.json").read_text())
    edited(place / "b", "training.json", sae=record["sae"] | {"k": 7})
    edited(place / "c", "training.json", config=record["config"] | {"arch": "topk"})
    found = [sae.folder for sae in gather.gather(place, BASE)]
    assert found == [f"{SITES[0]}-k6-batchtopk", f"{SITES[0]}-k7-batchtopk", f"{SITES[0]}-k6-topk"]


def test_the_card(trained: Path, scored: Path, tmp_path: Path) -> None:
    made = prepare.prepare(trained, REPO, [scored], BASE, "mit", "Tiny | ones", tmp_path / "out")
    text = (made.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "saelens" and front["base_model"] == BASE and front["license"] == "mit"
    assert {"sparse-autoencoder", "saelens"} <= set(front["tags"])
    record = json.loads((trained / SITES[0] / "training.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith(f"| `{SITES[0]}`"))
    saved = record["saved"]
    wanted = ["batchtopk, saved as jumprelu", "64", "6", f"{record['tokens']}"]
    wanted += [f"{saved['l0']:.1f}", f"{saved['explained']:.3f}", f"{record['last_step']['dead']:.1%}"]
    assert [cell for cell in wanted if f"| {cell} |" not in row] == []
    for figure in ("0.812", "6.2", "12.5%", "0.951", "0.042", "0.871", "0.983", "4,321 tokens of text.jsonl"):
        assert figure in text, figure
    assert record["corpus"]["fingerprint"] in text and f"| documents | {record['corpus']['documents']} |" in text
    assert f'SAE.from_pretrained("{REPO}", "{SITES[0]}")' in text and f"--sae hf://{REPO}/{SITES[0]}" in text
    assert f"--model {BASE} " in text and "# Tiny | ones" in text and record["versions"]["torch"] in text
    assert "| lr | 0.0003 |" in text and "stopped" not in text
    bare = prepare.prepare(trained, None, (), BASE, out=tmp_path / "out")
    text = (bare.folder / "README.md").read_text()
    assert "license" not in text.split("---\n")[1] and "USER/REPO" in text and "## Evaluation" not in text
    assert "# Sparse autoencoders of tiny-model at 2 sites" in text


def test_no_path_leaves(one: Path, model: Model) -> None:
    record = json.loads((one / "training.json").read_text())
    assert record["model"]["name"] == model.name and Path(model.name).is_absolute()
    edited(one, "training.json", notes=["read /home/somebody/my.txt, then C:\\Users\\somebody\\b.txt", {"/srv/x": 1}])
    config = json.loads((one / "cfg.json").read_text())
    edited(one, "cfg.json", metadata=config["metadata"] | {"dataset_path": "/home/somebody/with space/corpus"})
    made = prepare.prepare(one, base_model=BASE)
    texts = {file.path: (made.folder / file.path).read_text() for file in made.files if "safetensors" not in file.path}
    for path, text in texts.items():
        for part in ("somebody", str(one.parent), model.name, "/srv", str(Path.home()) + "/"):
            assert part not in text, (path, part)
    told = json.loads(texts[f"{SITES[0]}/training.json"])
    assert told["notes"] == ["read my.txt, then b.txt", {"x": 1}] and told["model"]["name"] == BASE
    assert told | {"notes": 0, "model": 0} == record | {"notes": 0, "model": 0}
    metadata = json.loads(texts[f"{SITES[0]}/cfg.json"])["metadata"]
    assert metadata["dataset_path"] == "corpus" and metadata["model_name"] == BASE


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("owner/name", "owner/name"),
        ("hf://owner/name/folder", "hf://owner/name/folder"),
        ("12 / 3 and/or 0.5", "12 / 3 and/or 0.5"),
        ("~/models/m", "m"),
        ("file:///home/me/x.txt", "x.txt"),
        ("\\\\server\\share\\folder\\x.txt", "x.txt"),
        ("at 'D:/a b/c'", "at 'a b/c'"),
        ('{"path": "/home/me/x"}', '{"path": "x"}'),
    ],
)
def test_what_counts_as_a_path(text: str, left: str) -> None:
    assert private.without_paths(text) == left


def test_a_folder_that_still_names_this_machine_is_refused(one: Path) -> None:
    with (one / "training.csv").open("a") as file:
        file.write(f"{one}\n")
    with pytest.raises(LancetError, match=r"training\.csv would tell where things lie on this machine"):
        prepare.prepare(one, base_model=BASE)
    assert not (one / "hub").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals(one: Path, trained: Path, scored: Path, tmp_path: Path) -> None:
    told = json.loads(scored.read_text())
    told["saes"] = [entry | {"fingerprint": "0" * 24} for entry in told["saes"]]  # the same names, other weights
    retrained = tmp_path / "retrained.json"
    retrained.write_text(json.dumps(told))

    def refuses(kind: type[LancetError], said: str, folder: Path = one, **how: Any) -> None:
        with pytest.raises(kind, match=said):
            prepare.prepare(folder, **({"base_model": BASE} | how))
        assert not (one / "hub").exists()

    refuses(UsageError, "trained on a model in a folder .*--base-model OWNER/NAME", base_model=None)
    refuses(UnknownName, "unknown model", base_model="./here")
    refuses(UsageError, "no folder", tmp_path / "nothing")
    (tmp_path / "empty" / "wandb").mkdir(parents=True)
    refuses(UsageError, "holds no trained SAE", tmp_path / "empty")
    refuses(UsageError, r"'a--b/c' is no repository's name", repo="a--b/c")
    refuses(UsageError, "write it as USER/REPO", repo="name")
    refuses(UsageError, "holds other things than an earlier preparation", out=one)
    refuses(UsageError, "holds other things", trained, out=trained)
    refuses(UsageError, "no file .*lancet eval --json", scored=[tmp_path / "no.json"])
    refuses(UsageError, "of none of the SAEs that are published", scored=[retrained])

    shape = json.loads((one / "cfg.json").read_text())
    edited(one, "cfg.json", d_sae=65)
    refuses(MismatchError, r"has shape \[64\], cfg.json says \[65\]|has shape .*cfg.json says .*65")
    edited(one, "cfg.json", **shape)
    record = json.loads((one / "training.json").read_text())
    edited(one, "training.json", sae=record["sae"] | {"site": SITES[1]})
    refuses(MismatchError, "its training.json says blocks.2.hook_resid_post")
    edited(one, "training.json", **record | {"model": {"name": "gpt2-small", "fingerprint": "x"}})
    refuses(MismatchError, f"trained on openai-community/gpt2, and --base-model says {BASE}")
    edited(one, "training.json", **record | {"finished": False})
    refuses(UsageError, "was stopped after 256 tokens.*--unfinished")
    made = prepare.prepare(one, base_model=BASE, unfinished=True, out=tmp_path / "unfinished")
    assert "was stopped before its end" in (made.folder / "README.md").read_text()
    edited(one, "training.json", **record)

    weights = load_file(one / "sae_weights.safetensors")
    weights["b_enc"][3] = float("nan")
    save_file(weights, one / "sae_weights.safetensors")
    refuses(DamagedError, "b_enc of .* not finite")
    save_file({"x": torch.zeros(1)}, one / "facts.safetensors", metadata={"facts": '{"of": "/home/somebody/x"}'})
    weights["b_enc"][3] = 0
    save_file(weights, one / "sae_weights.safetensors")
    refuses(UsageError, "the header of .*facts.safetensors names a path")
    (one / "training.json").unlink()
    refuses(UsageError, "lacks training.json; only what `lancet train` made")


def test_figures_of_another_model_are_refused(trained: Path, scored: Path, tmp_path: Path) -> None:
    other = tmp_path / "eval.json"
    other.write_text(json.dumps(json.loads(scored.read_text()) | {"model": "gpt2-small"}))
    with pytest.raises(MismatchError, match=r"eval\.json was made with gpt2-small"):
        prepare.prepare(trained, None, [other], BASE, out=tmp_path / "out")
    other.write_text('{"model": "x"}')
    with pytest.raises(DamagedError, match="is not what `lancet eval --json` prints"):
        prepare.prepare(trained, None, [other], BASE, out=tmp_path / "out")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_dry_run(run: Callable[..., Done], trained: Path, tmp_path: Path, no_network: None) -> None:
    words = ["publish", str(trained), "--base-model", BASE, "--out", str(tmp_path / "out")]
    done = run(*words, REPO, "--dry-run", bare=True)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split("\t") == ["file", "bytes", "sha256"] and REPO in done.out
    assert f"prepared in {tmp_path / 'out'}; nothing was sent (--dry-run)" in done.out
    done = run(*words, "--json", bare=True)
    assert done.code == 0, done.err
    assert not done.json["sent"] and done.json["repo"] is None and len(done.json["files"]) == 9
    names = set(done.json) | {key for part in ("saes", "files") for each in done.json[part] for key in each}
    assert names - {"sha256"} <= documented("lancet publish DIR [USER/REPO] --json")
    done = run(*words, "only-a-name", "--dry-run", bare=True)
    assert done.code == 2 and "write it as USER/REPO" in done.err


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def online(up: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, an empty cache, and a token that may write."""
    point_at(monkeypatch, up.url, tmp_path / "home")
    monkeypatch.setattr(hf, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(hf, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    for folder in up.root.iterdir():
        shutil.rmtree(folder)
    for kept in (up.asked, up.commits, up.blobs, up._etags):
        kept.clear()
    return up


def test_what_arrives_and_opens_again(
    online: Hub, run: Callable[..., Done], trained: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens import SAE

    words = ["publish", str(trained), REPO, "--base-model", BASE, "--out", str(tmp_path / "out"), "--license", "mit"]
    done = run(*words, "--message", "the first", bare=True)
    assert done.code == 0, done.err
    assert f"sent to {online.url}/{REPO} (commit {COMMIT[:12]})" in done.out and "let-me-in" not in done.out + done.err
    made = {file.relative_to(tmp_path / "out"): file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    arrived = {file.relative_to(online.root / REPO): file for file in (online.root / REPO).rglob("*") if file.is_file()}
    assert {path: file.read_bytes() for path, file in arrived.items()} == {p: f.read_bytes() for p, f in made.items()}
    (commit,) = online.commits
    assert commit[0]["value"]["summary"] == "the first" and len(online.blobs) == 2
    assert {token for line, token in online.asked if line.startswith("PUT")} == {None}

    name = f"hf://{REPO}/{SITES[1]}"
    monkeypatch.delenv("HF_TOKEN")
    sae, shipped = open_sae(model, name)
    local, _ = open_sae(model, str(trained / SITES[1]))
    assert sae.name == name and shipped is None and str(sae.site) == SITES[1]
    ours = dict(sae.tensors())
    assert all(torch.equal(ours[key], value) for key, value in local.tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SAE.from_pretrained(REPO, SITES[1])
    assert theirs.cfg.metadata.model_name == BASE and torch.equal(theirs.W_dec, ours["W_dec"])
    online.asked.clear()
    assert open_sae(model, name)[0].name == name and not online.asked  # the second time nothing is asked
    with pytest.raises(UsageError, match=rf"holds 2 SAEs; name one of hf://{REPO}/{SITES[0]}, hf://{REPO}/{SITES[1]}"):
        open_sae(model, f"hf://{REPO}")
    with pytest.raises(UnknownName, match=rf"unknown SAE on the hub .*nearest: .*hf://{REPO}/{SITES[0]}"):
        open_sae(model, f"hf://{REPO}/blocks.1.hook_resid_post")
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    assert addressed.fetch(f"hf://{REPO}")[0] == name  # the only one here, and nobody to ask
    read = run("read", "the cat", "--model", model.name, "--sae", name, "--anyway", "--json")
    assert read.code == 0 and read.json["sae"] == name, read.err
    with pytest.raises(MissingError, match="is not here and offline mode is on"):
        open_sae(model, f"hf://{REPO}/{SITES[0]}")


def test_a_repository_with_one_sae_and_its_facts(online: Hub, one: Path, model: Model) -> None:
    save_file({"x": torch.zeros(1)}, one / "facts.safetensors")
    made = prepare.prepare(one, REPO, base_model=BASE)
    sent = send.send(made, REPO, private=True)
    assert sent.commit == COMMIT and sent.url == f"{online.url}/{REPO}"
    again = prepare.prepare(one, REPO, base_model=BASE, title="Another")
    send.send(again, REPO)  # the repository is there: what differs is replaced
    assert "# Another" in (online.root / REPO / "README.md").read_text() and len(online.commits) == 2
    sae, shipped = open_sae(model, f"hf://{REPO}")
    assert sae.name == f"hf://{REPO}/{SITES[0]}" and shipped is not None and shipped.is_file()


def test_an_sae_of_another_model_is_refused(online: Hub, one: Path, tmp_path: Path) -> None:
    send.send(prepare.prepare(one, REPO, base_model=BASE), REPO)
    from conftest import save_tiny_gpt2

    save_tiny_gpt2(online.root / "another" / "model")
    with pytest.raises(
        MismatchError, match=rf"hf://{REPO}/{SITES[0]} was trained on {BASE}, and another/model is open"
    ):
        open_sae(open_model("another/model", "cpu", "float32"), f"hf://{REPO}")


def test_faults_of_sending_are_explained(online: Hub, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare.prepare(one, REPO, base_model=BASE)

    def fails(said: str, kind: type[LancetError] = MissingError) -> None:
        with pytest.raises(kind, match=said) as caught:
            send.send(made, REPO)
        assert "secret" not in str(caught.value) and not online.commits

    monkeypatch.setenv("HF_TOKEN", "secret")
    fails("does not know the token.*set HF_TOKEN to a token with write access, or log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "only-reads")
    fails(f"the token may not write to {REPO} .*write access to what someone owns")
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    made = prepare.prepare(one, REPO, base_model=BASE, license="nonsense")
    fails("the hub refuses what is sent to .*license", UsageError)
    monkeypatch.delenv("HF_TOKEN")
    online.asked.clear()
    fails("^set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    fails("nothing can be sent and offline mode is on; unset HF_HUB_OFFLINE")
    assert not online.asked
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf, "ENDPOINT", "http://127.0.0.1:9")
    fails("was not sent and http://127.0.0.1:9 cannot be reached")


@pytest.mark.parametrize("name", ["hf://", "hf://user", "hf://user/repo/../other", "hf://user/re po/x", "hf://a/b//c"])
def test_what_is_no_address(name: str, model: Model, no_network: None) -> None:
    with pytest.raises(UsageError, match="USER/REPO"):
        open_sae(model, name)
