"""Training: against sae-lens' own loop, several SAEs on one pass, killed and resumed, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import exit_code
from safetensors.torch import load_file, save_file

import lancet
from lancet import files, massive
from lancet.errors import DivergedError, LancetError, MismatchError, MissingError, UnknownName, UsageError
from lancet.loading import open_model, open_sae
from lancet.model import Model
from lancet.site import Site
from lancet.training import blocks, plan, progress, trainer
from lancet.training.config import TrainConfig
from lancet.training.text import prepare
from lancet.training.train import train

SITES = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "list",
    "of",
    "value",
    "return",
    "for",
    "so",
    "你好",
    "😀",
]
BLOCK = 400
# A window of two steps: dead features begin again at every step.
SMALL: dict[str, Any] = {
    "sites": SITES[0],
    "features": 96,
    "k": 6,
    "batch": 64,
    "length": 24,
    "lr": 2e-3,
    "dead_window": 160,
}
CONFIG = TrainConfig(**SMALL, tokens=1600)  # 25 steps, 4 blocks; a second round begins


def texts(count: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 25))) for _ in range(count)]


def written(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("corpus") / "c.jsonl", texts())


@pytest.fixture(scope="module")
def plain(model: Model, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE whose training nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK", BLOCK)
        return train(model, corpus, CONFIG, tmp_path_factory.mktemp("plain") / "sae")[0]


def raw(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json", "sae_weights.safetensors", "training.csv", "training.json",
    ]  # fmt: skip
    names = ("sae_weights.safetensors", "cfg.json", "training.csv")
    return {name: (folder / name).read_bytes() for name in names}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


# ---- what is trained on ----------------------------------------------------------------------------------------------


def blocks_of(model: Model, tmp_path: Path, sites: tuple[str, ...] = SITES, folder: Path | None = None) -> Any:
    text = prepare_text(model, tmp_path)
    return blocks.Blocks(model, [Site.parse(site) for site in sites], text, BLOCK, folder)


def prepare_text(model: Model, tmp_path: Path) -> Any:
    from lancet.atlas.corpus import Bad, sources

    found = sources(written(tmp_path / "c.jsonl", texts()))
    return prepare(model, found, "text", tmp_path / "text", 24, None, Bad(), lambda done: None)


def alone(model: Model, site: Site) -> torch.Tensor:
    """[tokens, width] the activations of every piece, read alone, start tokens left out."""
    rows = []
    for row in texts():
        ids = model.tokenizer(row, add_special_tokens=False)["input_ids"]
        for first in range(0, len(ids), 23):
            rows.append(model.values(model.batch([[0, *ids[first : first + 23]]]), [site])[site][0, 1:])
    return torch.cat(rows)


def in_order(rows: torch.Tensor) -> torch.Tensor:
    return rows[np.lexsort(rows.numpy().round(3).T[:4])]


def test_a_round_is_every_activation_once(model: Model, tmp_path: Path) -> None:
    held = blocks_of(model, tmp_path)
    site = held.sites[1]
    rest: dict[Site, torch.Tensor] = {}
    given: list[torch.Tensor] = []
    every = alone(model, site)
    for number in range(2 * len(held)):
        feed = held.feeds(number, rest, 64, lambda done, of: None)[site]
        assert abs(len(feed.values) - len(every) / len(held)) < 24 * 2 and feed.massive == 0
        given += [feed[i] for i in range(len(feed))]
        assert all(len(batch) == 64 for batch in given) and 0 <= len(feed.left()) < 64
        rest = {site: feed.left()}
    rows = torch.cat([*given, rest[site]])
    assert len(held) == -(-len(every) // BLOCK) > 3
    first, second = rows[: len(every)], rows[len(every) :]
    for each in (first, second):
        torch.testing.assert_close(in_order(each), in_order(every), rtol=1e-4, atol=1e-4)
    assert not torch.equal(first, second)


def test_a_block_depends_on_its_number_alone(model: Model, tmp_path: Path) -> None:
    number = 6
    a = blocks_of(model, tmp_path).feeds(number, {}, 64, lambda done, of: None)
    b = blocks_of(model, tmp_path).feeds(number, {}, 64, lambda done, of: None)
    one = blocks_of(model, tmp_path, SITES[1:]).feeds(number, {}, 64, lambda done, of: None)
    for site in a:
        assert torch.equal(a[site][2], b[site][2])
    site = Site.parse(SITES[1])
    assert torch.equal(a[site][2], one[site][2])


def test_kept_on_disk_they_are_read_once(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = blocks_of(model, tmp_path, folder=tmp_path / "kept")
    first = [held.feeds(number, {}, 64, lambda done, of: None) for number in range(len(held))]
    monkeypatch.setattr(model, "values", None, raising=False)  # whoever calls it fails
    again = [held.feeds(number, {}, 64, lambda done, of: None) for number in range(2 * len(held))]
    for a, b in zip(first, again, strict=False):
        for site in a:
            assert a[site].values.dtype == torch.bfloat16 and torch.equal(a[site][0], b[site][0])


def test_massive_activations_are_left_out(
    model: Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(massive, "TIMES", 1.1)
    feed = blocks_of(model, tmp_path).feeds(0, {}, 64, lambda done, of: None)[Site.parse(SITES[0])]
    norms = feed.values.norm(dim=1)
    kept = norms <= 1.1 * norms.median()
    assert 0 < feed.massive == int((~kept).sum())
    assert sorted(feed.order.tolist()) == kept.nonzero()[:, 0].tolist()
    mean, norm = feed.mean_and_norm()
    torch.testing.assert_close(mean, feed.values[kept].mean(0))
    assert norm == pytest.approx(float(norms[kept].mean()), rel=1e-5)
    (folder,) = train(model, corpus, CONFIG, tmp_path / "sae")
    assert record(folder)["massive"] > 0


def test_a_weak_one_opens_on_the_model_it_was_trained_on(model: Model, corpus: Path, tmp_path: Path) -> None:
    """The self-test takes an SAE that explains next to nothing for another model's; the record knows better, as long as
    weights and model are those it is about."""
    (folder,) = train(
        model, corpus, TrainConfig(sites=SITES[0], features="64", k=1, tokens=128, batch=64), tmp_path / "a"
    )
    opened = lancet.open(model.name, str(folder), dtype="float32", device="cpu")
    assert opened.saes[0].trained_on == record(folder)["model"]["fingerprint"]
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"b_dec": weights["b_dec"] + 1}, folder / "sae_weights.safetensors")
    with pytest.raises(MismatchError, match="fails its self-test"):
        lancet.open(model.name, str(folder), dtype="float32", device="cpu")
    (folder / "training.json").write_text("[]")
    with pytest.raises(MismatchError, match="fails its self-test"):
        lancet.open(model.name, str(folder), dtype="float32", device="cpu")


# ---- what is made ----------------------------------------------------------------------------------------------------


def test_weights_are_those_of_sae_lens_own_loop(
    model: Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`SAETrainer.fit` on the same batches, from the same weights, ends with the same SAE to a rounding error, where no
    dead feature is given another beginning."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from lancet.training.architectures import training_sae

    held, given, rest = blocks_of(model, tmp_path, SITES[:1]), [], {}
    site = held.sites[0]
    for number in range(6):
        feed = held.feeds(number, rest, 64, lambda done, of: None)[site]
        if number == 0:
            factor = 8 / float(feed.values.norm(dim=1).mean())
            mean = feed.values.mean(0)
        given += [feed[i] for i in range(len(feed))]
        rest = {site: feed.left()}
    torch.manual_seed(0)
    sae = training_sae("batchtopk", 64, 96, 6.0)
    settings = SAETrainerConfig(
        1600, 64, lr=2e-3, lr_end=2e-3, lr_warm_up_steps=2, lr_decay_steps=7, dead_feature_window=160 // 64
    )
    theirs = SAETrainer(settings, sae, data_provider=iter(given))
    theirs.activation_scaler.scaling_factor = factor
    sae.b_dec.data.copy_(mean * factor)
    theirs.fit()
    sae.save_inference_model(tmp_path / "theirs")
    monkeypatch.setattr("lancet.training.trainer.REVIVED", ())
    (plain,) = train(model, corpus, CONFIG, tmp_path / "ours")
    ours, other = (load_file(folder / "sae_weights.safetensors") for folder in (plain, tmp_path / "theirs"))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(ours[name], other[name], rtol=1e-3, atol=1e-4)
    assert float(ours["threshold"][0]) > 0  # calibrated at the end, where theirs is a running mean


def test_sae_lens_and_lancet_open_it_unchanged(model: Model, plain: Path) -> None:
    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SAE.load_from_disk(plain)
    ours, _ = open_sae(model, str(plain))
    x = alone(model, ours.site)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    rebuilt = ours.decode_features(ours.features(x), x)
    torch.testing.assert_close(rebuilt, theirs.decode(theirs.encode(x)), rtol=1e-5, atol=1e-4)
    told, metadata = record(plain), theirs.cfg.metadata
    l0 = float((theirs.encode(x) != 0).sum(1).float().mean())
    assert l0 == pytest.approx(6, abs=0.7)
    left = (x - theirs.decode(theirs.encode(x)).detach()).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert told["saved"]["l0"] == pytest.approx(l0, abs=0.7)
    assert told["saved"]["explained"] == pytest.approx(1 - float(left), abs=0.1)
    assert metadata.hook_name == SITES[0] and metadata.model_name == model.name and metadata.prepend_bos is True
    assert metadata.context_size == 24 and metadata.l0 == pytest.approx(6)
    assert metadata.num_dead_features == pytest.approx(96 * told["last_step"]["dead"])
    assert told["finished"] and told["steps"] == 25 and told["tokens"] == 1600
    assert told["corpus"]["documents"] == 60 and TrainConfig.of(told["config"]) == CONFIG
    assert lancet.Lab(model, ours).read("the cat sat on a mat")
    rows = (plain / "training.csv").read_text().splitlines()
    assert rows[0] == "step,tokens,loss,l0,explained,dead,lr,coefficient" and rows[1].startswith("25,1600,")


@pytest.mark.parametrize("arch", ["standard", "gated", "jumprelu"])
def test_k_is_what_is_saved(arch: str, model: Model, corpus: Path, tmp_path: Path) -> None:
    """Whatever the architecture; a standard SAE comes out as a JumpReLU one, where the penalty alone did not do it."""
    from sae_lens import SAE

    tokens = 12_800 if arch == "standard" else 1600  # a penalty needs steps to come near
    (folder,) = train(model, corpus, TrainConfig(**SMALL, tokens=tokens, arch=arch), tmp_path / "sae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SAE.load_from_disk(folder)
    ours, _ = open_sae(model, str(folder), anyway=True)
    x = alone(model, ours.site)
    acts = theirs.encode(x)
    assert float((acts > 0).sum(1).float().mean()) == pytest.approx(6, abs=0.9)
    torch.testing.assert_close(ours.encode(x), acts, rtol=1e-5, atol=1e-5)
    assert theirs.cfg.architecture() == ("jumprelu" if arch == "standard" else arch)


@pytest.mark.parametrize("kind", ["blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"])
def test_other_kinds_of_site(kind: str, model: Model, corpus: Path, tmp_path: Path) -> None:
    from sae_lens import SAE

    (folder,) = train(model, corpus, TrainConfig(**SMALL | {"sites": kind, "tokens": 300}), tmp_path / "sae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SAE.load_from_disk(folder)
    ours, _ = open_sae(model, str(folder))
    x = alone(model, ours.site)
    shaped = x.unflatten(-1, (4, 16)) if "hook_z" in kind else x  # sae-lens reads heads one by one
    torch.testing.assert_close(ours.encode(x), theirs.encode(shaped), rtol=1e-5, atol=1e-5)


def test_several_saes_on_one_pass_are_those_trained_alone(
    model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = TrainConfig(**SMALL | {"sites": SITES, "features": (96, 64), "seeds": (0, 3), "tokens": 1600})
    passes = []

    def values(batch: Any, sites: Any, original: Any = model.values) -> Any:
        passes.append(list(sites))
        return original(batch, sites)

    with monkeypatch.context() as patch:
        patch.setattr(model, "values", values, raising=False)
        folders = train(model, corpus, several, tmp_path / "many")
        together = len(passes)
        one = TrainConfig(**SMALL | {"sites": SITES[1], "features": 64, "seeds": 3, "tokens": 1600})
        (alone_,) = train(model, corpus, one, tmp_path / "one")
    assert [folder.name for folder in folders] == [
        f"{site}-{width}-seed{seed}" for site in SITES for width in (96, 64) for seed in (0, 3)
    ]
    assert len(passes) == 2 * together and all(len(sites) == 2 for sites in passes[:together])
    assert raw(folders[0]) == raw(plain)
    assert raw(folders[-1]) == raw(alone_)
    assert raw(folders[0]) != raw(folders[1])


def test_a_sparsity_loss_is_steered_to_k(model: Model, corpus: Path, tmp_path: Path) -> None:
    config = TrainConfig(**SMALL | {"arch": "standard", "tokens": 6400})
    (folder,) = train(model, corpus, config, tmp_path / "a")
    (fixed,) = train(model, corpus, TrainConfig(**config.to_json() | {"sparsity": 0.5}), tmp_path / "b")
    coefficients = [
        [float(row.split(",")[7]) for row in (each / "training.csv").read_text().splitlines()[1:]]
        for each in (folder, fixed)
    ]
    assert coefficients[1] == [0.5] and coefficients[0][0] not in (0.5, 1.0)


# ---- interrupted -----------------------------------------------------------------------------------------------------


def at_step(number: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Something happens before the n-th step."""
    original, left = trainer.Learner.step, [number]

    def step(self: Any, *given: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()
        original(self, *given)

    patch.setattr(trainer.Learner, "step", step)


def train_until_killed(folder: str, corpus: Path, config: TrainConfig, out: Path, step: int, threads: int) -> None:
    torch.set_num_threads(threads)
    plan.BLOCK = BLOCK
    with pytest.MonkeyPatch.context() as patch:
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
        train(open_model(folder, "cpu", "float32"), corpus, config, out)


@pytest.mark.parametrize(("arch", "buffer", "sites"), [("batchtopk", "memory", 1), ("jumprelu", "disk", 2)])
def test_killed_and_resumed(
    arch: str, buffer: str, sites: int, model: Model, corpus: Path, plain: Path, tmp_path: Path
) -> None:
    more = {"arch": arch, "buffer": buffer, "sites": SITES[:sites], "checkpoint": 0.0, "tokens": 1600}
    config, out = TrainConfig(**SMALL | more), tmp_path / "a"
    step = 17 * sites  # in the third block
    code = exit_code(train_until_killed, model.name, corpus, config, out, step, torch.get_num_threads())
    assert code == -signal.SIGKILL
    assert [path.name for path in (out / ".work").glob("checkpoint-*")] == ["checkpoint-000000016"]
    (out / ".work" / ".checkpoint-000000017.left").mkdir()  # half of one that was being written
    said: list[str] = []
    folders = train(model, corpus, config, out, said.append)
    assert "going on after step 16 of 25" in said
    undisturbed = [plain] if arch == "batchtopk" else train(model, corpus, config, tmp_path / "b")
    assert [raw(folder) for folder in folders] == [raw(folder) for folder in undisturbed]
    assert not (out / ".work").exists() and not (out / ".work.lock").exists()


def test_ctrl_c_leaves_a_usable_sae(
    model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "a", []
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(10, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train(model, corpus, CONFIG, out, said.append)
    assert signal.getsignal(signal.SIGINT) is before
    assert said[-1] == f"stopped after step 10 of 25; what {out} holds can be used; the same command goes on"
    assert not record(out)["finished"] and record(out)["steps"] == 10
    sae, _ = open_sae(model, str(out))
    assert float((sae.encode(alone(model, sae.site)) != 0).sum(1).float().mean()) == pytest.approx(6, abs=1.5)
    train(model, corpus, CONFIG, out, said.append)
    assert raw(out) == raw(plain) and record(out)["finished"]


def test_ctrl_c_while_a_block_is_read(
    model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupts:
        def __init__(self, at: int) -> None:
            self.left, self.said = at, []

        def __call__(self, line: str) -> None:
            self.said.append(line)

        def step(self, text: str, done: int, of: int) -> None:
            self.left -= text.startswith("reading") and done == 0
            if self.left == 0:
                self.left = -1
                os.kill(os.getpid(), signal.SIGINT)

    for at, told in ((1, "stopped before the first step of this run"), (3, "stopped after step 11 of 25")):
        with pytest.raises(KeyboardInterrupt):
            train(model, corpus, CONFIG, tmp_path / "a", say := Interrupts(at))
        assert say.said[-1].startswith(told)
    assert open_sae(model, str(tmp_path / "a"))
    train(model, corpus, CONFIG, tmp_path / "a")
    assert raw(tmp_path / "a") == raw(plain)


def test_a_full_disk(model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, config = os.replace, TrainConfig(**CONFIG.to_json() | {"checkpoint": 0})
    for after in (2, 8, 20):
        left = [after]

        def full(a: Any, b: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", full)
            with pytest.raises(LancetError, match="the disk is full"):
                train(model, corpus, config, tmp_path / "a")
    train(model, corpus, config, tmp_path / "a")
    assert raw(tmp_path / "a") == raw(plain)


def test_a_loss_that_is_no_number(model: Model, corpus: Path, tmp_path: Path) -> None:
    config = TrainConfig(**SMALL | {"lr": 1e30, "checkpoint": 0, "warm_up": 0.2, "tokens": 1600})
    with pytest.raises(
        DivergedError, match=r"the last good checkpoint is .*checkpoint-0{8}\d, .* smaller --lr"
    ) as told:
        train(model, corpus, config, tmp_path / "a")
    (path,) = (tmp_path / "a" / ".work").glob("checkpoint-*")
    assert str(path) in str(told.value)
    state = load_file(path / "0.safetensors")
    assert all(bool(value.isfinite().all()) for name, value in state.items() if name.startswith("sae."))


def test_another_configuration_is_refused(
    model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        at_step(5, lambda: (_ for _ in ()).throw(RuntimeError("stopped")), patch)
        with pytest.raises(RuntimeError):
            train(model, corpus, CONFIG, out)
    for change, said in (
        ({"lr": 1e-3}, r"another --lr \(lr 0.002, now 0.001\); go on with the same, delete"),
        ({"k": 7, "seeds": 1}, r"another --k and another --seed \(k 6.0, now 7.0, seeds 0, now 1\)"),
        ({"sites": SITES}, "another --site"),
        ({"arch": "topk"}, "another --arch"),
        ({"length": 25}, "another --length"),
        ({"dead_window": 2000}, "another --dead-window"),
    ):
        with pytest.raises(MismatchError, match=said):
            train(model, corpus, TrainConfig(**CONFIG.to_json() | change), out)
    with pytest.raises(MismatchError, match="another corpus"):
        train(model, written(tmp_path / "other.jsonl", texts(50)), CONFIG, out)
    from lancet.atlas.plan import alone as lock

    with lock(out), pytest.raises(UsageError, match="another training is writing"):
        train(model, corpus, CONFIG, out)
    train(model, corpus, TrainConfig(**CONFIG.to_json() | {"checkpoint": 1, "memory": "5GB"}), out)
    assert raw(out) == raw(plain)
    with pytest.raises(UsageError, match="finished SAE; choose another --out"):
        train(model, corpus, CONFIG, out)


# ---- settings, memory, refusals --------------------------------------------------------------------------------------


def test_a_file_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('sites = ["resid_pre.1"]\nfeatures = ["16k", 512]\nk = 20\ntokens = "1.5M"\nlr = 1e-3\n')
    config = TrainConfig.load(path, k=[8, 9])
    assert config.sites == (SITES[0],) and config.features == (16384, 512) and config.k == (8, 9)
    assert config.tokens == 1_500_000 and config.lr == 1e-3 and config.seeds == (0,)
    assert TrainConfig.of(config.to_json()) == config
    assert len(config.saes()) == 4
    path.write_text("batchs = 3\n")
    with pytest.raises(UnknownName, match=r"unknown setting 'batchs'; nearest: batch.*it stands in"):
        TrainConfig.load(path)
    path.write_text("k = \n")
    with pytest.raises(UsageError, match="is not TOML"):
        TrainConfig.load(path)
    with pytest.raises(UsageError, match="cannot read"):
        TrainConfig.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arch": "batch-topk"}, "unknown architecture 'batch-topk'; nearest: batchtopk"),
        ({"features": "many"}, "--features: a number of features is written 16k"),
        ({"sites": "layer 3"}, "--site: 'layer 3' is not a site"),
        ({"k": 0}, "--k must lie above 0 and below the number of features"),
        ({"k": 96}, "--k must lie above 0 and below the number of features"),
        ({"seeds": (1, 1)}, "--seed has one value twice"),
        ({"seeds": -1}, "--seed: must be a whole number"),
        ({"lr": "fast"}, "--lr: must be a number, got 'fast'"),
        ({"lr": 0}, "--lr must be above 0"),
        ({"lr": True}, "--lr: must be a number"),
        ({"k": "16,32"}, "--k: must be a number, got '16,32'; several are given one by one, the option before each"),
        ({"decay": 0.99}, "shares of the steps, together at most 1"),
        ({"widths": (64, 32)}, "--widths must rise"),
        ({"widths": (96,)}, "--widths must rise and lie below"),
        ({"buffer": "tape"}, "--buffer must be memory or disk, got 'tape'"),
        ({"memory": "much"}, "is not a size"),
        ({"log": "paper"}, "--log must be tensorboard or wandb"),
        ({"tokens": "lots"}, "--tokens: a number of tokens is written 10M"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TrainConfig(**SMALL | settings)


def test_every_field_is_documented_once() -> None:
    from dataclasses import fields

    from lancet.training.config import helps

    assert len(fields(TrainConfig)) <= 20
    assert list(helps()) == [each.name for each in fields(TrainConfig)] and all(helps().values())


def test_memory_is_planned(model: Model, corpus: Path, tmp_path: Path) -> None:
    big = {**SMALL, "features": 4096, "batch": None}
    auto = plan.plan(model, TrainConfig(**big))
    assert auto.block == BLOCK and auto.batch == 4096 and auto.total <= auto.limit
    roomy = plan.plan(model, TrainConfig(**big, memory="10GB"))
    assert roomy.block == plan.LARGEST
    tight = plan.plan(model, TrainConfig(**big, memory="150MB"))
    assert tight.batch < 4096 and tight.total <= 150e6
    with pytest.raises(UsageError, match=r"4,096 features do not fit: .* what would: .*--memory (\d+)MB") as told:
        plan.plan(model, TrainConfig(**big, memory="40MB"))
    needed = str(told.value).rpartition("--memory ")[2]
    assert plan.plan(model, TrainConfig(**big, memory=needed)).batch == 256
    width = int(str(told.value).partition("--features ")[2].split(",")[0])
    assert plan.plan(model, TrainConfig(**{**big, "features": width}, memory="40MB"))
    with pytest.raises(UsageError, match="do not fit"):
        train(model, corpus, TrainConfig(**big, memory="40MB"), tmp_path / "a")
    said: list[str] = []
    train(model, corpus, TrainConfig(**SMALL | {"tokens": 200}, memory="1GB"), tmp_path / "b", said.append)
    assert said[0].startswith("memory: 0.0") and "a step of 64 tokens" in said[0]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells how much memory is anonymous")
def test_memory_is_what_was_planned(model: Model, corpus: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from benchmarks.memory import watched
from lancet.loading import open_model
from lancet.training import plan, trainer, train as module
from lancet.training.config import TrainConfig
torch.set_num_threads(1)
plan.BLOCK = 400
model = open_model(sys.argv[1], "cpu", "float32")
small = dict(sites="resid_pre.1", length=24, batch=512)
module.train(model, sys.argv[2], TrainConfig(**small, features=64, k=4, tokens=1024), sys.argv[3] + "/a")
config = TrainConfig(**small, features="32k", tokens=2048)
with watched() as peak:
    module.train(model, sys.argv[2], config, sys.argv[3] + "/b")
print(peak.grown, plan.plan(model, config).total / 1e6)
"""
    root, args = Path(__file__).parents[1], [model.name, str(corpus), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    grown, planned = map(float, done.stdout.split())
    assert 0.5 * planned < grown < 1.15 * planned, (grown, planned)


def test_refusals(model: Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a"
    with pytest.raises(UsageError, match="no site: say where"):
        train(model, corpus, TrainConfig(), out)
    with pytest.raises(UsageError, match=r"no site blocks.9.hook_resid_pre in .* choose one of"):
        train(model, corpus, TrainConfig(**SMALL | {"sites": "blocks.9.hook_resid_pre"}), out)
    with pytest.raises(UsageError, match="2 to 256 tokens"):
        train(model, corpus, TrainConfig(**SMALL | {"length": 300}), out)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="the corpus is empty"):
        train(model, tmp_path / "empty.txt", CONFIG, tmp_path / "b")
    with pytest.raises(
        UsageError, match=r"[\d,]+ tokens are fewer than one batch of 4,096; give more text .* --batch such as"
    ):
        train(model, corpus, TrainConfig(**SMALL | {"batch": 4096}), tmp_path / "c")
    assert train(model, corpus, TrainConfig(**SMALL | {"tokens": 200}), tmp_path / "c")
    with pytest.raises(UsageError, match="100 tokens are fewer than one batch of 128"):
        train(model, corpus, TrainConfig(**SMALL | {"batch": 128, "tokens": 100}), tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 20_000, 20_000))
        with pytest.raises(LancetError, match=r"not enough disk space .* take --buffer memory"):
            train(model, corpus, TrainConfig(**SMALL | {"tokens": 200}, buffer="disk"), tmp_path / "f")
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install tensorboard"):
        train(model, corpus, TrainConfig(**SMALL, log="tensorboard"), tmp_path / "e")
    assert not (tmp_path / "e").exists()
