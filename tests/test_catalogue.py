"""The list of published SAEs and the names of models, against the packages that they come from; `lancet saes` and
`lancet use` on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lancet import catalogue, names, settings
from lancet.catalogue import Entry
from lancet.cli import show
from lancet.cli.saes import as_object, run
from lancet.cli.use import run as use
from lancet.errors import DamagedError, UnknownName, UsageError
from lancet.machine import Room


@pytest.fixture(scope="module")
def listed() -> catalogue.Catalogue:
    return catalogue.load()


@pytest.fixture(scope="module")
def theirs() -> dict[str, dict]:
    path = names.package_folder("sae_lens") / "pretrained_saes.yaml"
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


# ---- the list --------------------------------------------------------------------------------------------------------


def test_counts(listed: catalogue.Catalogue, theirs: dict[str, dict]) -> None:
    if listed.version.startswith("6.54."):
        assert (len(listed.releases), len(listed.entries)) == (170, 13_857)
        assert sum(entry.pickle for entry in listed.entries) == 1397
    assert len(listed.entries) == sum(len(release["saes"]) for release in theirs.values())
    assert len({entry.name for entry in listed.entries}) == len(listed.entries)


def test_every_fact_is_the_lists_own(listed: catalogue.Catalogue, theirs: dict[str, dict]) -> None:
    for release, value in theirs.items():
        for sae, entry in zip(value["saes"], listed.releases[release], strict=True):
            assert (entry.id, entry.path, entry.repo, entry.model) == (
                sae["id"],
                str(sae["path"]),
                value["repo_id"],
                value["model"],
            )
            assert (entry.l0, entry.explained, entry.neuronpedia) == (
                sae.get("l0"),
                sae.get("variance_explained"),
                sae.get("neuronpedia"),
            )
            assert entry.overrides == (value.get("config_overrides") or {})
            assert entry.loader == (value.get("conversion_func") or "sae_lens")


def test_what_the_list_does_not_hold_is_none(listed: catalogue.Catalogue) -> None:
    silent = listed.entry("gpt2-small-mlp-tm/blocks.0.hook_mlp_out")
    assert silent.neuronpedia is None and silent.url(3) is None
    assert silent.width is None and silent.bytes is None
    assert as_object(silent)["fits"] == "unknown until fetched"
    assert listed.entry("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3").site is None


def test_the_manuals_own_sae(listed: catalogue.Catalogue) -> None:
    entry = listed.entry("gpt2-small-res-jb/blocks.6.hook_resid_pre")
    assert entry.site == "blocks.6.hook_resid_pre" and entry.layer == 6 and entry.l0 == 51
    assert entry.overrides["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert entry.url(123) == "https://www.neuronpedia.org/gpt2-small/6-res-jb/123"


SITES = {
    "gpt2-small-hook-z-kk/blocks.4.hook_z": "blocks.4.attn.hook_z",
    "gpt2-small-res-jb-feature-splitting/blocks.8.hook_resid_pre_768": "blocks.8.hook_resid_pre",
    "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical": "blocks.12.hook_resid_post",
    "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": "hook_embed",
    "gemma-scope-2b-pt-att-canonical/layer_3/width_16k/canonical": "blocks.3.attn.hook_z",
    "gemma-scope-2b-pt-mlp-canonical/layer_3/width_16k/canonical": "blocks.3.hook_mlp_out",
    "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_70": "blocks.7.ln2.hook_normalized",
    "gemma-scope-2-270m-pt-res-all/layer_9_width_16k_l0_small": "blocks.9.hook_resid_post",
    "gemma-scope-2-270m-pt-att-all/layer_9_width_16k_l0_small": "blocks.9.attn.hook_z",
    "gemma-scope-2-270m-pt-transcoders-all/layer_9_width_16k_l0_small": "blocks.9.mlp.hook_in",
    "llama_scope_lxr_8x/l13r_8x": "blocks.13.hook_resid_post",
    "llama_scope_lxm_8x/l13m_8x": "blocks.13.hook_mlp_out",
    "llama_scope_lxa_32x/l13a_32x": "blocks.13.hook_attn_out",
    "llama_scope_r1_distill/l0r_800m_slimpajama": "blocks.0.hook_resid_post",
    "qwen-scope-3-1.7b-base-w32k-l50/layer20": "blocks.20.hook_resid_post",
    "mwhanna-qwen3-4b-transcoders/layer_35": "blocks.35.mlp.hook_in",
    "goodfire-llama-3.1-8b-instruct/layer_19": "blocks.19.hook_resid_post",
    "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.3.hook_resid_post__trainer_0": "blocks.3.hook_resid_post",
    "llama-3.1-8b-instruct-andyrdt/resid_post_layer_3_trainer_1": "blocks.3.hook_resid_post",
}


@pytest.mark.parametrize("name", SITES)
def test_sites_that_names_tell(listed: catalogue.Catalogue, name: str) -> None:
    assert listed.entry(name).site == SITES[name]


def test_sites_and_widths_are_those_of_sae_lens_loader(listed: catalogue.Catalogue) -> None:
    """For the releases whose facts sae-lens' own code derives from names alone, no network needed."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    getters = {
        "gemma_2": loaders.get_gemma_2_config_from_hf,
        "gemma_2_transcoder": loaders.get_gemma_2_transcoder_config_from_hf,
        "qwen_scope": loaders.get_qwen_scope_config_from_hf,
        "deepseek_r1": loaders.get_deepseek_r1_config_from_hf,
        "goodfire": loaders.get_goodfire_config_from_hf,
    }
    checked = 0
    for entry in listed.entries:
        if getter := getters.get(entry.loader):
            config = getter(entry.repo, entry.path, "cpu", False, None)
            assert entry.site == config["hook_name"], entry
            assert entry.width in (config["d_sae"], None), entry
            assert entry.d_in in (config["d_in"], None), entry
            checked += 1
    assert checked > 3000


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("gpt2-small-resid-post-v5-32k/blocks.3.hook_resid_post", 32_768),
        ("gpt2-small-resid-post-v5-128k/blocks.3.hook_resid_post", 131_072),
        ("gpt2-small-res-jb-feature-splitting/blocks.8.hook_resid_pre_98304", 98_304),
        ("gemma-scope-9b-pt-res/layer_9/width_1m/average_l0_9", 1 << 20),
        ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0", 4096),
        ("qwen-scope-3.5-27b-w80k-l50/layer0", 80 * 1024),
    ],
)
def test_widths_that_names_tell(listed: catalogue.Catalogue, name: str, width: int) -> None:
    assert listed.entry(name).width == width


def test_no_sae_lies_inside_another_ones_folder(listed: catalogue.Catalogue) -> None:
    for entries in listed.releases.values():
        ids = {entry.id for entry in entries}
        assert not any("/".join(i.split("/")[:n]) in ids for i in ids for n in range(1, i.count("/") + 1))


def test_reading_it_imports_nothing_heavy_and_is_kept(tmp_path: Path) -> None:
    code = """
import sys, time, lancet.catalogue as c
c.load(); c.names.table(); c.load.cache_clear()
before = time.perf_counter(); c.load(); print(time.perf_counter() - before)
print([m for m in ("torch", "sae_lens", "transformer_lens", "transformers", "numpy") if m in sys.modules])
"""
    environment = {"LANCET_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    took, heavy = said.stdout.splitlines()
    assert float(took) < 0.5 and heavy == "[]"
    assert len(list((tmp_path / "catalogue").glob("*.json"))) == 2


def test_a_damaged_kept_list_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path))
    path = names.kept("saes", "sae_lens", catalogue.LAYOUT)
    path.parent.mkdir(parents=True)
    path.write_text('{"releases": ')
    catalogue.load.cache_clear()
    try:
        assert len(catalogue.load().releases) >= 170
        assert json.loads(path.read_text())["version"] == catalogue.load().version
    finally:
        catalogue.load.cache_clear()


def test_find(listed: catalogue.Catalogue) -> None:
    by_name, by_id = listed.find(model="gpt2-small"), listed.find(model="openai-community/gpt2")
    assert by_name == by_id == listed.find(model="gpt2") and len(by_name) > 100
    assert {e.site for e in listed.find(model="gpt2", site="blocks.6.hook_resid_pre")} == {"blocks.6.hook_resid_pre"}
    assert {e.site.split(".")[-1] for e in listed.find(model="gpt2", site="resid_pre")} == {"hook_resid_pre"}  # type: ignore[union-attr]
    assert {e.layer for e in listed.find(site="6", model="gemma-2-2b")} == {6}
    assert all("canonical" in e.name and "16k" in e.name for e in listed.find(search="Canonical 16k"))
    assert len(listed.find(release="gpt2-small-res-jb")) == 13


def test_wrong_names_get_the_nearest(listed: catalogue.Catalogue) -> None:
    with pytest.raises(
        UnknownName, match=r"unknown SAE release 'gpt2-smal-res-jb'; nearest: gpt2-small-res-jb, .*lancet saes"
    ):
        listed.entry("gpt2-smal-res-jb/blocks.6.hook_resid_pre")
    with pytest.raises(UnknownName, match=r"nearest: blocks.6.hook_resid_pre, .*--release gpt2-small-res-jb") as found:
        listed.entry("gpt2-small-res-jb/blocks.6.hook_resid_prr")
    assert len(found.value.nearest) == 5
    with pytest.raises(UnknownName, match="nearest: gpt2-small"):
        listed.find(model="gpt2-smal")


# ---- names of models -------------------------------------------------------------------------------------------------


def test_names_are_transformer_lens_own() -> None:
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    reached = 0
    for official in OFFICIAL_MODEL_NAMES:
        for name in (official, *MODEL_ALIASES.get(official, ())):
            found = names.hub_id(name)
            if found is not None:
                assert found in (official, names.MOVED.get(official)), name
                reached += 1
            else:
                assert "/" not in official
    assert reached > 600


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("GPT2-Small", "openai-community/gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("somebody/some-model", "somebody/some-model"),
        ("./folder/model", None),
        ("/folder/model", None),
        ("folder", None),
    ],
)
def test_hub_ids(name: str, hub: str | None) -> None:
    assert names.hub_id(name) == hub


def test_every_listed_model_has_a_hub_id(listed: catalogue.Catalogue) -> None:
    assert all(names.hub_id(entry.model) for entry in listed.entries)
    assert names.same("gpt2-small", "openai-community/gpt2") and not names.same("gemma-2-2b", "gemma-2-2b-it")


def test_an_unknown_model_gets_the_five_nearest() -> None:
    with pytest.raises(UnknownName, match="nearest: gpt2-small, ") as found:
        names.check("gpt2-smalll")
    assert len(found.value.nearest) == 5


# ---- command line ----------------------------------------------------------------------------------------------------


def rows(text: str) -> list[dict[str, str]]:
    header, *lines = (line.split("\t") for line in text.strip().splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_saes_lists_one_release(capsys: pytest.CaptureFixture[str]) -> None:
    run(None, None, "gpt2-small-resid-post-v5-32k", None, 60, json=False)
    found = rows(capsys.readouterr().out)
    assert len(found) == 12
    assert found[0]["width"] == "32,768" and found[0]["on disk"] == "not here"
    memory = next(column for column in found[0] if re.fullmatch(r"of the (card|machine)'s [\d.]+ GB", column))
    assert found[0][memory].startswith("needs 0.2")


def test_what_does_not_fit_is_told() -> None:
    room = Room("card", free=2_000_000_000, total=10_000_000_000)
    assert room.fits(1_500_000_000) == "needs 1.5 GB of the card's 10.0"
    assert (
        room.fits(3_100_000_000) == "needs 3.1 GB of the card's 10.0, of which 2.0 are free: read from disk as needed"
    )
    assert room.needs(3_100_000_000) == "needs 3.1, 2.0 free: read from disk"


def test_saes_sums_up_many(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt2-small", None, None, None, 60, json=False)
    said = capsys.readouterr()
    found = {row["release"]: row for row in rows(said.out)}
    assert found["gpt2-small-res-jb"]["SAEs"] == "13" and found["gpt2-small-res-jb"]["widths"] == "unknown"
    assert "--release NAME lists one of them" in said.err.replace("\n", " ")


def test_saes_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt2-small", "blocks.6.hook_resid_pre", "gpt2-small-res-jb", None, 60, json=True)
    (found,) = json.loads(capsys.readouterr().out)
    told = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    section = told.split("## `lancet saes")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) >= set(found)
    assert found["page"] == "https://www.neuronpedia.org/gpt2-small/6-res-jb" and found["here"] is False


def test_nothing_fits() -> None:
    with pytest.raises(UsageError, match="no published SAE fits"):
        run("gpt2-small", "99", None, None, 60, json=False)


def test_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LANCET_DATA", str(tmp_path / "data"))
    use(None, (), json=False)
    assert "smollm2" in capsys.readouterr().out
    use("gpt2-small", ("blocks.8.hook_resid_pre",), json=True)
    assert json.loads(capsys.readouterr().out)["saes"] == ["blocks.8.hook_resid_pre"]
    assert settings.default() == settings.Pair("gpt2-small", ("blocks.8.hook_resid_pre",))
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    use("model", (), json=False)
    assert settings.default().model == str(tmp_path / "model")
    with pytest.raises(UnknownName, match="nearest: gpt2-small"):
        use("gpt2-smal", (), json=False)
    with pytest.raises(UnknownName, match=r"nearest: blocks\.6\.hook_resid_pre"):
        use("gpt2-small", ("gpt2-small-res-jb/blocks.6.hook_resid_prr",), json=False)
    with pytest.raises(UsageError, match="name the model as well"):
        use(None, ("x",), json=False)
    assert settings.default().model == str(tmp_path / "model")
    settings.file().write_text("[]")
    with pytest.raises(DamagedError, match="does not name a model"):
        settings.default()


def test_the_choice_fills_in_what_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lancet.cli.opening import Choice

    monkeypatch.setenv("LANCET_DATA", str(tmp_path))
    settings.use("gpt2-small", ("blocks.8.hook_resid_pre",))
    assert Choice().named() == Choice("gpt2-small", ("blocks.8.hook_resid_pre",))
    assert Choice(saes=("blocks.2.hook_resid_pre",)).named().saes == ("blocks.2.hook_resid_pre",)
    assert Choice("smollm2").named() == Choice("smollm2")  # the other model's SAE does not come along


def test_entries_are_values(listed: catalogue.Catalogue) -> None:
    assert isinstance(listed.entries[0], Entry)
    assert show.say.status is None
