"""Reading an atlas: what is asked of it, what is refused, and that neither torch nor a model is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures_atlas import KEY, KNOWN, SILENT, write_atlas

from lancet import namefile
from lancet.atlas import which
from lancet.atlas.atlas import Atlas
from lancet.errors import DamagedError, MismatchError, MissingError, UsageError
from lancet.files import data_dir, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("atlas") / "it's one")  # a quote in the path must not end the SQL


@pytest.fixture(scope="module")
def atlas(folder: Path) -> Atlas:
    return Atlas.open(folder)


def give_names(**names: int) -> None:
    """Names for features of the made-up SAE."""
    told = {"lancet_names": 1, "key": KEY, "names": {name: {"feature": index} for name, index in names.items()}}
    write_json(data_dir() / "names" / f"{KEY}.json", told)


def test_a_features_row(atlas: Atlas) -> None:
    found = atlas.feature(3)
    assert (found.feature, list(found.fires_tokens), list(found.effect_up)) == (3, *KNOWN[3][:2])
    assert len(found.histogram) == 50 and sum(found.histogram) == sum(found.positions) == found.fired
    assert len(found.near) == 10 and len(found.bounds) == 6
    assert atlas.feature(SILENT).fired == 0 and atlas.examples(SILENT) == []
    assert [record.feature for record in atlas.records([9, 3, 9])] == [9, 3, 9]
    assert len(atlas) == 64 and "64 features of made-up/sae" in repr(atlas)


def test_examples_are_windows_around_their_peak(atlas: Atlas) -> None:
    found = atlas.examples(10)
    assert [(e.band, e.rank) for e in found] == sorted((e.band, e.rank) for e in found)
    for example in found:
        assert example.text == "".join(example.tokens)
        assert len(example.tokens) == len(example.strengths) <= 32
        assert example.tokens[example.peak] in KNOWN[10][0]
        assert example.strengths[example.peak] == pytest.approx(example.value)
    assert {e.band for e in atlas.examples(10, bands=[0, 5], most=2)} == {0, 5}
    assert len(atlas.examples(10, bands=[0, 5], most=2)) == 4
    assert atlas.examples(10, bands=[]) == []


def test_windows_in_which_a_feature_is_silent(atlas: Atlas) -> None:
    found = atlas.silent(3, 12, seed=1)
    assert found == atlas.silent(3, 12, seed=1)
    assert found != atlas.silent(3, 12, seed=2)
    assert len(found) == 12 == len({e.hash for e in found})
    assert not {e.hash for e in found} & {e.hash for e in atlas.examples(3)}
    assert all(e.band == -1 and e.value == 0 and not any(e.strengths) for e in found)
    assert 12 < len(atlas.silent(3, 10_000)) < 64, "no more than there are"


def test_features_as_a_table(atlas: Atlas) -> None:
    give_names(bridge=3, 桥=10)
    assert atlas.names == {"bridge": 3, "桥": 10}
    assert atlas.features(token="Bridge").to_pandas()["feature"].tolist() == [3, 7]
    assert atlas.features(says="bridge")["feature"].to_pylist() == [5, 7]
    assert atlas.features(name="BRID", columns=["density"]).to_pylist()[0].keys() == {"feature", "name", "density"}
    assert atlas.features(name="nothing").num_rows == 0
    assert atlas.features(limit=4).num_rows == 4
    rare = atlas.features(min_density=1e-9, max_density=0.002)
    assert rare.num_rows and all(0 < density <= 0.002 for density in rare["density"].to_pylist())
    with pytest.raises(UsageError, match="no column 'dense'"):
        atlas.features(columns=["dense"])


def test_what_is_no_atlas_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not here"):
        Atlas.open(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="holds no atlas"):
        Atlas.open(tmp_path)
    half = write_atlas(tmp_path / "half", 16, finished=False)
    with pytest.raises(MissingError, match="not written to its end"):
        Atlas.open(half)
    whole = write_atlas(tmp_path / "whole", 16)
    with pytest.raises(UsageError, match="no feature 16; made-up/sae has #0 to #15"):
        Atlas.open(whole).feature(16)
    (whole / "features.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DamagedError, match=r"features.parquet is damaged"):
        Atlas.open(whole).feature(1)
    (whole / "features.parquet").unlink()
    with pytest.raises(DamagedError, match=r"lacks features\.parquet"):
        Atlas.open(whole)
    file = write_atlas(tmp_path / "other", 16) / "manifest.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"lancet_atlas": 2}))
    with pytest.raises(DamagedError, match=r"version 2 .*reads version 1"):
        Atlas.open(file.parent)
    file.write_text(json.dumps({"lancet_atlas": 1}))
    with pytest.raises(DamagedError, match="not an atlas' manifest"):
        Atlas.open(file.parent)


def test_an_atlas_of_another_sae_is_refused(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namefile, "key", lambda sae: sae.key)
    mine = SimpleNamespace(d_sae=64, key=KEY, name="mine", site="blocks.2.hook_resid_pre")
    other = SimpleNamespace(d_sae=64, key="b" * 24, name="other", site="blocks.2.hook_resid_pre")
    assert atlas.belongs(mine) and not atlas.belongs(other)  # type: ignore[arg-type]
    assert atlas.belongs(SimpleNamespace(saes=[other, mine]))  # type: ignore[arg-type]
    atlas.check(mine)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"is about made-up/sae .* and other at"):
        atlas.check(other)  # type: ignore[arg-type]


def test_reading_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from lancet.atlas.atlas import Atlas; a = Atlas.open(sys.argv[1]); a.feature(3), a.examples(3), "
        "a.features(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def test_the_bundled_atlas() -> None:
    """It is about the SAE that it lies in, on two million tokens at least, and all that ships takes at most 40 MB."""
    from lancet.loading import assets, sae_from_folder

    found = which.find("smollm2")
    folder = found.folder.parent
    assert found.folder.name == which.INSIDE and folder.is_relative_to(assets())
    assert found.belongs(sae_from_folder(folder)) and found.manifest.tokens >= 2_000_000
    assert found.manifest.lenses == {"logit", "effect"}
    assert sum(path.stat().st_size for path in assets().rglob("*") if path.is_file()) <= 40e6
    bridge = found.feature(5743)
    assert bridge.fires_tokens[0] == " Bridge" and bridge.density < 0.002
    strongest = found.examples(5743, [0])
    assert len(strongest) == 20 and all("Golden Gate Bridge" in example.text for example in strongest)
    card = found.features(token="bridge", columns=["maximum"])
    assert 5743 in card["feature"].to_pylist()
