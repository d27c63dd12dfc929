"""The model card of a repository of SAEs: front matter for the hub, and what a reader must know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lancet import names
from lancet.addressed import PREFIX
from lancet.publishing.gather import Trained
from lancet.publishing.scored import Scored
from lancet.units import short

TAGS = ["sparse-autoencoder", "saelens", "lancet", "mechanistic-interpretability"]
UNNAMED = "USER/REPO"  # stands for a repository that has no name yet
# Settings that the tables tell already, or that change no weight.
TOLD = ("sites", "features", "k", "seeds", "arch", "tokens", "field", "buffer", "memory", "log", "checkpoint")


def card(
    saes: Sequence[Trained],
    repo: str | None = None,
    license: str | None = None,
    title: str | None = None,
    scored: Sequence[Scored] = (),
) -> str:
    """README.md of a repository: YAML between two lines of dashes, then Markdown.

    Args:
        repo: owner/name, None where it has none yet.
        license: as the hub writes it, such as mit.
        title: the heading; left out, one is made of the model and the sites.
        scored: what `lancet eval` found.
    """
    from huggingface_hub import ModelCardData

    bases = list(dict.fromkeys(sae.base for sae in saes))
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases, library_name="saelens", license=license, tags=TAGS
    )
    repo = repo or UNNAMED
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_line(title or _title(saes, bases))}",
        _about(saes, bases),
        "## SAEs\n" + _saes(saes),
        *([f"## Evaluation\n{_evaluation(scored)}"] if scored else []),
        f"## Use\n{_use(saes[0], repo)}",
        f"## Training\n{_training(saes)}",
    ]
    return "\n\n".join(parts) + "\n"


def _title(saes: Sequence[Trained], bases: Sequence[str]) -> str:
    sites = list(dict.fromkeys(str(sae.spec.site) for sae in saes))
    where = f" at {sites[0]}" if len(sites) == 1 else f" at {len(sites)} sites"
    what = "Sparse autoencoder" + ("s" if len(saes) > 1 else "")
    return f"{what} of {' and '.join(base.split('/')[-1] for base in bases)}{where}"


def _about(saes: Sequence[Trained], bases: Sequence[str]) -> str:
    first = saes[0]
    what = "A sparse autoencoder (SAE)" if len(saes) == 1 else f"{len(saes)} sparse autoencoders (SAEs)"
    opened = first.record["model"]["name"]
    copy = f" (the 4-bit copy that Lancet calls `{opened}`)" if opened in names.EMBEDDED else ""
    told = [
        f"{what} trained on activations of {' and '.join(f'`{base}`' for base in bases)}{copy}, which ran in "
        f"{first.record['dtype']}. Made with Lancet and sae-lens' training classes, saved in sae-lens' layout as "
        f"float32 safetensors that read unscaled activations."
    ]
    if first.config["metadata"].get("prepend_bos"):
        told.append("Each piece of text began with a start token, which was not trained on: leave its features out.")
    if stopped := [sae.folder for sae in saes if not sae.record["finished"]]:
        told.append(f"**The training of {', '.join(f'`{name}`' for name in stopped)} was stopped before its end.**")
    return " ".join(told)


def _saes(saes: Sequence[Trained]) -> str:
    rows = []
    for sae in saes:
        spec, saved, form = sae.spec, sae.record["saved"], sae.config["architecture"]
        rows.append(
            {
                "folder": f"`{sae.folder}`",
                "site": f"`{spec.site}`",
                "architecture": sae.architecture + (f", saved as {form}" if form != sae.architecture else ""),
                "width": f"{sae.config['d_in']:,}",
                "features": f"{spec.features:,}",
                "k": short(spec.k),
                "seed": str(spec.seed),
                "tokens": f"{sae.record['tokens']:,}",
                "L0": f"{saved['l0']:.1f}",
                "explained": f"{saved['explained']:.3f}",
                "dead": _share(sae.record.get("last_step", {}).get("dead")),
            }
        )
    most = max(sae.record["saved"]["tokens"] for sae in saes)
    return (
        f"{_table(rows)}\n\nL0 (features active on a token) and the explained share of the variance are those of the "
        f"saved SAE on {most:,} tokens of the training text; dead is the share of features silent at the end of the "
        f"training."
    )


def _evaluation(scored: Sequence[Scored]) -> str:
    parts = []
    for each in scored:
        rows = [{"folder": f"`{folder}`"} | _scores(figures) for folder, figures in each.of.items()]
        parts.append(f"On {each.tokens:,} tokens of {_line(each.text)}:\n\n{_table(rows)}")
    parts.append(
        "Loss recovered is (zeros - spliced) / (zeros - plain) of the model's loss with zeros, with the reconstruction "
        "and with the activation itself; KL is that of plain to spliced, in nats a token; never fire is the share of "
        "features silent on all of the text."
    )
    if any("AUROC" in _scores(figures) for each in scored for figures in each.of.values()):
        parts.append(
            "AUROC is the mean over 60 concepts of one feature's, chosen on training lines and scored on held-out "
            "ones; probe is that of a linear probe on the activations."
        )
    return "\n\n".join(parts)


def _scores(figures: dict[str, Any]) -> dict[str, str]:
    bench = figures.get("bench")
    told = {
        "explained": _number(figures["explained_variance"]),
        "L0": _number(figures["l0"], 1),
        "never fire": _share(figures["dead_share"]),
        "loss recovered": _number(figures["loss_recovered"]),
        "KL": _number(figures["kl"]),
    }
    return told | ({"AUROC": _number(bench["auroc"]), "probe": _number(bench["auroc_probe"])} if bench else {})


def _use(sae: Trained, repo: str) -> str:
    opened = sae.record["model"]["name"]
    return f"""With sae-lens:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "{sae.folder}")
```

With Lancet:

```
lancet read "The Golden Gate Bridge" --model {opened} --sae {PREFIX}{repo}/{sae.folder}
```"""


def _training(saes: Sequence[Trained]) -> str:
    """What all share in one table, what is the first's alone told of each; all of it stands in training.json too."""
    record = saes[0].record
    corpus = record["corpus"]
    text = {
        "tokens": f"{corpus['tokens']:,}",
        "documents": f"{corpus['documents']:,}",
        "repeated documents left out": f"{corpus['repeats']:,}",
        "pieces": f"{corpus['pieces']:,}",
        "fingerprint": f"`{corpus['fingerprint']}`",
        "tokens left out for their norm": f"{record['massive']:,}",
    }
    settings = {name: value for name, value in record["config"].items() if name not in TOLD and value not in (None, [])}
    settings |= {"batch": record["batch"], "context": saes[0].config["metadata"].get("context_size")}
    settings |= {"steps": record["steps"], "seconds": record["seconds"]}
    same = all(sae.record["corpus"] == corpus and sae.record["config"] == record["config"] for sae in saes)
    note = "" if same else f"\n\nThis is the training of `{saes[0].folder}`; the others' differ."
    return (
        f"Each folder's `training.json` has all of it, `training.csv` the course of the training.{note}\n\n"
        f"{_pairs('text', text)}\n\n{_pairs('setting', settings)}\n\n{_pairs('version', record['versions'])}"
    )


def _pairs(what: str, of: dict[str, Any]) -> str:
    return _table([{what: name, "value": "" if value is None else str(value)} for name, value in of.items()])


def _table(rows: Sequence[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(_line(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
