"""Whether an SAE belongs to the model that is open, and in which basis it was trained.

The basis is a fact of the training run: TransformerLens centres writing weights and folds value biases, or not. It
stands in the SAE's config, in sae-lens' list (so that a bare folder of the same weights lacks it), or nowhere; unknown
is not "none". Where nothing states it, each basis is tried on a few bundled texts and the clear winner taken; where
there is none, the user is asked. Answers are kept, by the hash of the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lancet import catalogue, fingerprint, hub, names, published
from lancet.catalogue import Entry
from lancet.errors import MismatchError, UsageError
from lancet.files import cache_dir, kept_json, sha256

if TYPE_CHECKING:
    from lancet.basis import Basis
    from lancet.model import Model
    from lancet.sae import Sae

BasisName = Literal["plain", "centred"]
BASES: tuple[BasisName, ...] = ("plain", "centred")
TEXTS = 16
# A basis wins when it leaves less unexplained on every single text (by chance once in 65,536 where nothing differs) and
# at most nine tenths of what the other leaves on all of them (less would decide nothing that anyone could see).
WINS_BY = 0.9


@dataclass(frozen=True)
class About:
    """What is known of an SAE beside its weights.

    Attributes:
        entry: which published one it is, None where no list has it.
        models: the names of the model it was trained on, as its parts record them.
        kwargs: how that model was loaded, None where nothing states it.
        page: the address of its public page, None where it has none.
    """

    entry: Entry | None = None
    models: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    page: str | None = None

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> About:
        """What a folder's own files, the converter's record or a known file of the same hash say."""
        metadata = config.get("metadata") or config
        entry = _entry(published.told(folder)) or _by_hash(folder, metadata)
        models = [metadata.get("model_name"), entry.model if entry else None]
        kwargs = metadata.get("model_from_pretrained_kwargs") or None
        if kwargs is None and entry is not None:
            kwargs = entry.overrides.get("model_from_pretrained_kwargs")
        page = (entry.neuronpedia if entry else None) or metadata.get("neuronpedia_id")
        return cls(
            entry,
            tuple(dict.fromkeys(str(name) for name in models if name)),
            kwargs,
            f"{catalogue.NEURONPEDIA}/{page}" if page else None,
        )


def _entry(told: Mapping[str, Any] | None) -> Entry | None:
    """The catalogue's entry for what the converter wrote; None where this sae-lens lists it no longer."""
    if told is None:
        return None
    saes = catalogue.load().releases.get(told["release"], [])
    return next((entry for entry in saes if entry.id == told["id"]), None)


def _by_hash(folder: Path, metadata: Mapping[str, Any]) -> Entry | None:
    """The published SAE whose weight file a folder holds: among those converted here and in Hugging Face's cache."""
    weights = folder / "sae_weights.safetensors"
    candidates = [e for e in _listed(metadata) if e.loader == "sae_lens"]
    known = list(published.all_here())
    repos = {entry.repo for entry in candidates if hub.blobs(entry.repo)}
    if not weights.is_file() or not (known or repos):
        return None
    digest = known_sha256(weights)
    for _, told in known:
        if digest == told["weights_sha256"] or any(file["sha256"] == digest for file in told["files"]):
            return _entry(told)
    for repo in repos:
        for file in hub.files_of_blob(repo, digest):
            for entry in candidates:
                if entry.repo == repo and file == f"{entry.path}/sae_weights.safetensors":
                    return entry
    return None


def _listed(metadata: Mapping[str, Any]) -> Iterable[Entry]:
    model = metadata.get("model_name")
    return catalogue.load().of_model(str(model)) if model else catalogue.load().entries


def known_sha256(path: Path) -> str:
    """A file's hash, computed once for as long as its size and time stay the same."""
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:24]
    return str(kept_json(cache_dir() / "hashes" / f"{key}.json", lambda: sha256(path)))


# ---- model -------------------------------------------------------------------------------------------------------


def check_model(model: Model, sae: Sae, about: About, anyway: bool = False) -> None:
    """Refuses an SAE that records another model than the open one, or reads vectors of another width.

    A folder has no name to compare, and a record that is no known name says nothing; the width always counts.

    Raises:
        MismatchError.
    """
    width = model.d_site(model.check_site(sae.site))
    if sae.d_in != width:
        raise MismatchError(
            f"{sae.name} reads vectors of width {sae.d_in}, {model.name} has width {width} at {sae.site}: it "
            f"belongs to another model; choose an SAE that was trained on {model.name}"
        )
    opened = names.hub_id(model.name)
    recorded = [name for name in about.models if names.hub_id(name) is not None]
    if opened is None or not recorded or anyway or any(names.same(opened, name) for name in recorded):
        return
    raise MismatchError(
        f"{sae.name} was trained on {' or '.join(recorded)}, and {model.name} is open: its features mean nothing "
        f"there. Open it with --model {recorded[0]}, or go on with --anyway (anyway=True)"
    )


# ---- basis -------------------------------------------------------------------------------------------------------


def in_its_basis(model: Model, sae: Sae, about: About, asked: str | None = None) -> Sae:
    """The SAE set to the basis that it was trained in.

    Args:
        asked: "plain" or "centred" where the user says it, which goes before everything else.

    Raises:
        UsageError: nothing states the basis and no basis explains clearly more, or an unknown name of one.
    """
    from lancet.basis import Basis, put_in_basis

    if asked is not None and asked not in BASES:
        raise UsageError(f"unknown basis {asked!r}; use one of {', '.join(BASES)}")
    if asked is None and about.kwargs is not None:
        return put_in_basis(sae, model, Basis.of(about.kwargs))
    tried = {name: put_in_basis(sae, model, basis) for name, basis in bases().items()}
    if asked is not None:
        return tried[asked]
    if alike(*tried.values()):  # at this site of this model the two are one
        return tried["plain"]
    return tried[_winner(model, sae, tried)]


def bases() -> dict[str, Basis]:
    """TransformerLens' two ways to load a model: `from_pretrained_no_processing` and `from_pretrained`."""
    from lancet.basis import Basis

    return {
        "plain": Basis(),
        "centred": Basis(center_writing_weights=True, fold_value_biases=True, fold_ln=True),
    }


def alike(one: Sae, other: Sae) -> bool:
    """Whether an SAE reads and writes the same in two bases."""
    if (one.site, one.centred, one.centred_out) != (other.site, other.centred, other.centred_out):
        return False
    if one.offset is None or other.offset is None:
        return one.offset is None and other.offset is None
    return bool((one.offset == other.offset).all())


def _winner(model: Model, sae: Sae, tried: Mapping[str, Sae]) -> str:
    place = cache_dir() / "basis" / f"{fingerprint.of_pair(model, sae)}.json"
    found: dict[str, Any] = kept_json(place, lambda: _measured(model, tried))
    if found["winner"] is None:
        shares = ", ".join(f"{name} {1 - left:.3f}" for name, left in found["unexplained"].items())
        raise UsageError(
            f"nothing states in which basis {sae.name} was trained, and its explained variance does not tell "
            f"({shares}); say --basis centred if its model was loaded through TransformerLens with its usual "
            f"processing, --basis plain if not"
        )
    return str(found["winner"])


def _measured(model: Model, tried: Mapping[str, Sae]) -> dict[str, Any]:
    """{"winner": name or None, "unexplained": {name: share of the variance over all texts}}."""
    from lancet.bench import neutral_texts

    left: dict[str, list[tuple[float, float]]] = {name: [] for name in tried}
    for text in neutral_texts(TEXTS):
        for name, found in _unexplained(model, tried, text).items():
            left[name].append(found)
    total = {name: sum(rest for rest, _ in rows) / sum(all_ for _, all_ in rows) for name, rows in left.items()}
    best, other = sorted(total, key=lambda name: total[name])
    every = all(a / b < c / d for (a, b), (c, d) in zip(left[best], left[other], strict=True))
    clear = every and total[best] < min(1.0, WINS_BY * total[other])
    return {"winner": best if clear else None, "unexplained": total}


def _unexplained(model: Model, tried: Mapping[str, Sae], text: str) -> dict[str, tuple[float, float]]:
    """For each, (squared error, squared distance from the mean) of its reconstruction of a text, the start left out."""
    batch = model.batch([model.tokenize(text, most=min(model.context, 128))])
    values = model.values(batch, [site for sae in tried.values() for site in (sae.site, sae.writes)])
    keep = batch.content[0]
    out = {}
    for name, sae in tried.items():
        x, own = values[sae.site][0], sae.out_basis(values[sae.writes][0][keep])
        rebuilt = sae.decode_features(sae.features(x, keep), x, keep)
        out[name] = float((own - rebuilt).pow(2).sum()), float((own - own.mean(0)).pow(2).sum())
    return out
