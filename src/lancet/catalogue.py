"""Every published SAE that the installed sae-lens knows, out of its own list, without importing it.

The list (a YAML file of 1.5 MB) is parsed once for each version of the package and kept as JSON. What the list does
not hold is None, never a default: sae-lens itself would say l0 0.0 and variance 1.0 there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lancet import names
from lancet.errors import UnknownName
from lancet.files import kept_json

LAYOUT = 1  # of the kept list; raise it when what is written changes
LIST_MORE = "`lancet saes` lists all"
NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True)
class Entry:
    """One published SAE.

    Attributes:
        release, id: sae-lens' names; together they are unique.
        repo, path: where it lies on the hub.
        loader: the name of sae-lens' conversion function, "sae_lens" for its own format.
        model: the model's name as the list has it.
        site: where it reads, in TransformerLens' spelling; None where only the fetched file tells.
        layer: None where unknown.
        width: its number of features where a name that the publisher set says it, else None.
        l0, explained: what the list states about it, else None.
        neuronpedia: its id there, such as gpt2-small/6-res-jb, else None.
        overrides: what sae-lens changes in its config, among them the basis (`model_from_pretrained_kwargs`).
    """

    release: str
    id: str
    repo: str
    path: str
    loader: str
    model: str
    site: str | None
    layer: int | None
    width: int | None
    l0: float | None
    explained: float | None
    neuronpedia: str | None
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.release}/{self.id}"

    @property
    def pickle(self) -> bool:
        """Whether the published weights are a pickle."""
        return self.loader in PICKLED

    def url(self, feature: int) -> str | None:
        """The public page of a feature, None where the list names none."""
        return f"{NEURONPEDIA}/{self.neuronpedia}/{feature}" if self.neuronpedia else None

    @property
    def bytes(self) -> int | None:
        """What its two matrices take in float32, where both sizes are known."""
        width, d_in = self.width, self.d_in
        return 2 * 4 * width * d_in if width and d_in else None

    @property
    def d_in(self) -> int | None:
        """The width of the value that it reads, where that is known for the model."""
        hub = names.hub_id(self.model) or self.model
        if self.site is None:
            return None
        return Z_WIDTHS.get(hub) if self.site.endswith("hook_z") else MODEL_WIDTHS.get(hub)


class Catalogue:
    """The list, with its questions."""

    def __init__(self, entries: Iterable[Entry], version: str) -> None:
        self.entries = list(entries)
        self.version = version
        self.releases: dict[str, list[Entry]] = {}
        for entry in self.entries:
            self.releases.setdefault(entry.release, []).append(entry)

    def release_of(self, name: str) -> str | None:
        """The release that a `release/id` begins with, None where no release is named so."""
        first = name.split("/", 1)[0]
        return first if first in self.releases else None

    def entry(self, name: str) -> Entry:
        """The SAE `release/id`; ids may contain slashes.

        Raises:
            UnknownName: no such release, or no such id in it.
        """
        release, _, identifier = name.partition("/")
        if release not in self.releases:
            raise UnknownName("SAE release", release, self.releases, LIST_MORE)
        found = next((entry for entry in self.releases[release] if entry.id == identifier), None)
        if found is None:
            known = [entry.id for entry in self.releases[release]]
            raise UnknownName(f"SAE of {release}", identifier, known, f"`lancet saes --release {release}` lists all")
        return found

    def of_model(self, model: str) -> list[Entry]:
        """The SAEs of a model, under any of its names."""
        wanted = (names.hub_id(model) or model).lower()
        ids = {name: (names.hub_id(name) or name).lower() for name in {entry.model for entry in self.entries}}
        return [entry for entry in self.entries if ids[entry.model] == wanted]

    def find(
        self, model: str | None = None, site: str | None = None, release: str | None = None, search: str | None = None
    ) -> list[Entry]:
        """The SAEs that fit all that is given.

        Args:
            model: any of its names.
            site: a site, its kind alone (`resid_pre`, `hook_z`) or its layer alone.
            release: a release's name.
            search: words that must all occur in the name, model or site.

        Raises:
            UnknownName: a model without SAEs, or an unknown release.
        """
        found = self.entries
        if model is not None:
            found = self.of_model(model)
            if not found:
                known = {e.model for e in self.entries} | {names.hub_id(e.model) or e.model for e in self.entries}
                raise UnknownName("model with published SAEs", model, known, LIST_MORE)
        if release is not None:
            if release not in self.releases:
                raise UnknownName("SAE release", release, self.releases, LIST_MORE)
            found = [entry for entry in found if entry.release == release]
        if site is not None:
            found = [entry for entry in found if _at(entry, site)]
        for word in (search or "").lower().split():
            found = [entry for entry in found if word in f"{entry.name} {entry.model} {entry.site}".lower()]
        return found

    def with_repo(self, repo: str) -> list[Entry]:
        """The SAEs that lie in one repository."""
        return [entry for entry in self.entries if entry.repo == repo]


def _at(entry: Entry, site: str) -> bool:
    site = site.strip()
    if site.isdecimal():
        return entry.layer == int(site)
    if entry.site is None:
        return False
    return entry.site == site or entry.site.endswith((f".{site}", f".hook_{site}"))


@cache
def load() -> Catalogue:
    """The catalogue of the installed sae-lens.

    Raises:
        MissingError: sae-lens is not installed.
    """
    told: dict[str, Any] = kept_json(names.kept("saes", "sae_lens", LAYOUT), _parse)
    return Catalogue(
        (
            Entry(release, *row, overrides=info["overrides"])
            for release, info in told["releases"].items()
            for row in ([i, info["repo"], p, info["loader"], info["model"], *rest] for i, p, *rest in info["saes"])
        ),
        told["version"],
    )


def _parse() -> dict[str, Any]:
    from importlib import metadata

    import yaml

    source = names.package_folder("sae_lens") / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # with libyaml's parser it takes a tenth of the time
    with source.open(encoding="utf-8") as file:
        listed: dict[str, Any] = yaml.load(file, Loader=loader)
    releases = {}
    for release, value in listed.items():
        info = {
            "repo": value["repo_id"],
            "loader": value.get("conversion_func") or "sae_lens",
            "model": value["model"],
            "overrides": value.get("config_overrides") or {},
        }
        saes = []
        for sae in value["saes"]:
            path = str(sae["path"])
            site, layer = _site(info["loader"], info["repo"], sae["id"], path)
            width = _width(release, info["repo"], sae["id"])
            saes.append(
                [
                    sae["id"],
                    path,
                    site,
                    layer,
                    width,
                    *(sae.get(k) for k in ("l0", "variance_explained", "neuronpedia")),
                ]
            )
        releases[release] = info | {"saes": saes}
    return {"version": metadata.version("sae-lens"), "releases": releases}


# ---- what the names say ------------------------------------------------------------------------------------------

_NAMED_SITE = re.compile(r"(?:^|/)blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|mlp_out|attn_out|z)(?![a-z])")
_LAYER = re.compile(r"(?:^|[/_])(?:layer_?|l)(\d+)")

# Where the release's own convention, as sae-lens' loader of that name reads it, says what the id does not.
_BY_LOADER = {
    "dictionary_learning_1": "hook_resid_post",
    "deepseek_r1": "hook_resid_post",
    "goodfire": "hook_resid_post",
    "qwen_scope": "hook_resid_post",
    "llama_scope_r1_distill": "hook_resid_post",
    "temporal": "hook_resid_post",
    "gemma_2_transcoder": "ln2.hook_normalized",
    "mwhanna_transcoder": "mlp.hook_in",
}
# The first part that occurs in "repo/path" decides. Gemma Scope 2's transcoders read what the norm before the MLP puts
# out (`pre_feedforward_layernorm.output`), gain included; sae-lens calls that place hook_mlp_in, which in
# TransformerLens lies before the norm.
_BY_PART = {
    "gemma_2": {"embedding": "", "-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"},
    "gemma_3": {
        "transcoder": "mlp.hook_in",
        "clt": "mlp.hook_in",
        "resid_post": "hook_resid_post",
        "attn_out": "attn.hook_z",
        "mlp_out": "hook_mlp_out",
    },
    "llama_scope": {"-LXR-": "hook_resid_post", "-LXM-": "hook_mlp_out", "-LXA-": "hook_attn_out"},
}
PICKLED = ("connor_rob_hook_z", "goodfire", "dictionary_learning_1", "deepseek_r1", "qwen_scope")


def _site(loader: str, repo: str, identifier: str, path: str) -> tuple[str | None, int | None]:
    """(site, layer) of an SAE, each None where only the fetched file tells."""
    if named := _NAMED_SITE.search(identifier):
        kind = "attn.hook_z" if named[2] == "z" else f"hook_{named[2]}"
        return f"blocks.{named[1]}.{kind}", int(named[1])
    if "embedding" in identifier:
        return "hook_embed", None
    found = _LAYER.search(identifier)
    if found is None:
        return None, None
    layer = int(found[1])
    parts = _BY_PART.get(loader, {})
    kind = _BY_LOADER.get(loader) or next((kind for part, kind in parts.items() if part in f"{repo}/{path}"), None)
    return (f"blocks.{layer}.{kind}" if kind else None), layer


_WIDTHS = (
    re.compile(r"width_(\d+)([km])"),
    re.compile(r"width-2pow(\d+)()"),
    re.compile(r"(?:-v5-|-w-?)(\d+)([km])(?:-|$)"),
)
_FEATURE_SPLITTING = re.compile(r"hook_resid_pre_(\d+)$")
# What a publisher's "16k" counts: a power of two, rounded down to thousands in the name.
_THOUSANDS = {65: 1 << 16, 131: 1 << 17, 262: 1 << 18, 524: 1 << 19}


def _width(release: str, repo: str, identifier: str) -> int | None:
    """How many features, where a name that the publisher set says it."""
    if exact := _FEATURE_SPLITTING.search(identifier):
        return int(exact[1])
    for text in (identifier, release, repo):
        for pattern in _WIDTHS:
            if match := pattern.search(text):
                count = int(match[1])
                if match[2] == "m":
                    return count << 20
                return 1 << count if not match[2] else _THOUSANDS.get(count, count << 10)
    return None


# The width of the residual stream, from the models' public configs: for an estimate of size before anything is fetched.
MODEL_WIDTHS = {
    "openai-community/gpt2": 768,
    "EleutherAI/pythia-70m-deduped": 512,
    "google/gemma-2b": 2048,
    "google/gemma-2b-it": 2048,
    "google/gemma-2-2b": 2304,
    "google/gemma-2-9b": 3584,
    "google/gemma-2-9b-it": 3584,
    "google/gemma-2-27b": 4608,
    **{f"google/gemma-3-270m{kind}": 640 for kind in ("", "-it")},
    **{f"google/gemma-3-1b-{kind}": 1152 for kind in ("pt", "it")},
    **{f"google/gemma-3-4b-{kind}": 2560 for kind in ("pt", "it")},
    **{f"google/gemma-3-12b-{kind}": 3840 for kind in ("pt", "it")},
    **{f"google/gemma-3-27b-{kind}": 5376 for kind in ("pt", "it")},
    "meta-llama/Llama-3.1-8B": 4096,
    "meta-llama/Llama-3.1-8B-Instruct": 4096,
    "meta-llama/Meta-Llama-3-8B-Instruct": 4096,
    "meta-llama/Llama-3.3-70B-Instruct": 8192,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 4096,
    "mistralai/Mistral-7B-v0.1": 4096,
    "openai/gpt-oss-20b": 2880,
    "Qwen/Qwen2.5-7B-Instruct": 3584,
    "Qwen/Qwen3-0.6B": 1024,
    "Qwen/Qwen3-1.7B": 2048,
    "Qwen/Qwen3-1.7B-Base": 2048,
    "Qwen/Qwen3-4B": 2560,
    "Qwen/Qwen3-8B": 4096,
    "Qwen/Qwen3-8B-Base": 4096,
    "Qwen/Qwen3-14B": 5120,
    "Qwen/Qwen3-30B-A3B-Base": 2048,
    "Qwen/Qwen3.5-2B-Base": 2048,
    "Qwen/Qwen3.5-9B-Base": 4096,
    "Qwen/Qwen3.5-27B": 5120,
    "Qwen/Qwen3.5-35B-A3B-Base": 2048,
}
# heads x head width, where SAEs of the attention's z are published
Z_WIDTHS = {
    "openai-community/gpt2": 768,
    "google/gemma-2-2b": 2048,
    "google/gemma-2-9b": 4096,
    "google/gemma-2-27b": 4608,
    **{f"google/gemma-3-270m{kind}": 1024 for kind in ("", "-it")},
    **{f"google/gemma-3-1b-{kind}": 1024 for kind in ("pt", "it")},
    **{f"google/gemma-3-4b-{kind}": 2048 for kind in ("pt", "it")},
    **{f"google/gemma-3-12b-{kind}": 4096 for kind in ("pt", "it")},
    **{f"google/gemma-3-27b-{kind}": 4096 for kind in ("pt", "it")},
}
