"""Opens models and SAEs by name or folder, on the right device and in the right precision.

Names are a table: each entry says how its folder comes to be. Everything else is a folder on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import embedded, processor
from lancet.errors import DamagedError, MismatchError, MissingError, UnknownName, UsageError
from lancet.files import PICKLE_SUFFIXES, check_safetensors, read_json
from lancet.site import Site

if TYPE_CHECKING:
    import torch

    from lancet.model import Model
    from lancet.sae import Sae

Say = Callable[[str], None]

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
NAMES: dict[str, Callable[[Say], Path]] = {embedded.NAME: embedded.ensure}


def choose_device(device: str = "auto") -> str:
    """CUDA, then Apple's MPS, then the CPU, unless one is named.

    Raises:
        UsageError: unknown, or not usable by the installed torch.
    """
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if has[name])
    if device.split(":")[0] not in has:
        raise UsageError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if not has[device.split(":")[0]]:
        raise UsageError(f"this torch cannot use {device!r}; use --device cpu, and see `lancet doctor` for the remedy")
    return device


def choose_dtype(dtype: str, device: str) -> tuple[torch.dtype, str]:
    """The torch dtype for a `--dtype`, and a note that says what was chosen and why.

    Raises:
        UsageError: unknown dtype.
    """
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype), f"{dtype} on {device}, as asked"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16 on cuda (the card multiplies it in hardware)"
        return torch.float16, "float16 on cuda (the card has no bfloat16)"
    if device == "cpu":
        if processor.prefers_bfloat16():
            return torch.bfloat16, "bfloat16 on cpu (measured to be the faster here)"
        return torch.float32, "float32 on cpu (measured to be the faster here)"
    return torch.float32, f"float32 on {device}"


def open_model(
    name: str = embedded.NAME, device: str = "auto", dtype: str = "auto", say: Say = lambda line: None
) -> Model:
    """Opens a model by name (`smollm2`) or from a folder in transformers' layout.

    Args:
        name: a known name or the path of a folder with config.json, safetensors weights and a fast tokenizer.
        device: "auto", "cuda", "mps" or "cpu".
        dtype: "auto", "float32", "bfloat16" or "float16".
        say: called with a line of text when something takes long.

    Raises:
        UnknownName: no such name and no such folder.
        MissingError: the model must be fetched first; says how.
        DamagedError: weights are damaged, or only pickles are there.
    """
    chosen_device = choose_device(device)
    torch_dtype, note = choose_dtype(dtype, chosen_device)
    if name in NAMES:
        folder = NAMES[name](say)
        if str(torch_dtype) == "torch.bfloat16":
            folder = embedded.bfloat16_folder(folder)
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        raise UnknownName("model", name, NAMES, "or give the path of a folder with config.json and safetensors")
    return _from_folder(name, folder, chosen_device, torch_dtype, note)


def _from_folder(name: str, folder: Path, device: str, dtype: torch.dtype, note: str) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lancet.model import Model

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json; give a folder in transformers' layout")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DamagedError(f"{folder} holds no .safetensors weights; pickles (.bin, .pt) are never opened")
    for file in weights:
        check_safetensors(file)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()  # its report on weights that are missing is read here, not printed
    try:
        # With the dtype of the file, on the CPU, transformers maps the weights: no second copy in memory.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
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
    if device != "cpu":
        hf = hf.to(device)  # type: ignore[arg-type]
    plain, chat = _start_tokens(folder, tokenizer)
    return Model(name, hf, tokenizer, plain, chat, [note])


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


def open_sae(model: Model, name: str | None = None) -> tuple[Sae, Path | None]:
    """Opens an SAE for a model: a bundled one by its site (none named: the default), or a folder in sae-lens' layout.

    Returns:
        the SAE on the model's device, and the path of its shipped facts where there are any.

    Raises:
        UnknownName: neither a bundled site nor a folder.
        MismatchError: its width or site does not fit the model.
        DamagedError: its weights are damaged or a pickle.
    """
    ours = bundled(model.name)
    if name is None:
        if not ours:
            raise UsageError(f"no SAE ships for {model.name}; name one with --sae FOLDER")
        folder = next(iter(ours.values()))
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        if Path(name).is_file():  # a file is told what is wrong with it before it is taken for an unknown name
            check_safetensors(Path(name))
        folder = _site_folder(name, ours)
    sae = sae_from_folder(folder).to(model.device)
    if sae.d_in != model.d_model:
        raise MismatchError(
            f"{sae.name} reads vectors of width {sae.d_in}, {model.name} has width {model.d_model}: it belongs to "
            f"another model; choose an SAE that was trained on {model.name}"
        )
    model.check_site(sae.site)
    shipped = folder / "facts.safetensors"
    return sae, shipped if shipped.is_file() else None


def _site_folder(name: str, ours: dict[str, Path]) -> Path:
    try:
        site = str(Site.parse(name))
    except UsageError:
        site = name
    if site not in ours:
        raise UnknownName("SAE", name, ours, "or give the path of a folder with cfg.json and sae_weights.safetensors")
    return ours[site]


def sae_from_folder(folder: Path) -> Sae:
    """Reads a folder in sae-lens' layout: cfg.json and sae_weights.safetensors.

    Raises:
        UsageError: a part is missing, or an architecture that has no exact arithmetic here.
        DamagedError: the weights are damaged or a pickle.
    """
    from safetensors.torch import load_file

    from lancet.sae import Sae

    if not (folder / "cfg.json").is_file():
        raise UsageError(f"{folder} has no cfg.json; give a folder in sae-lens' layout")
    config = read_json(folder / "cfg.json")
    weights = folder / "sae_weights.safetensors"
    pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES]
    if not weights.is_file() and pickles:
        raise DamagedError(f"{folder} holds pickles ({', '.join(pickles)}), which are never opened; get safetensors")
    check_safetensors(weights)
    tensors = load_file(weights)
    if lacking := [name for name in ("W_enc", "W_dec", "b_dec") if name not in tensors]:
        raise DamagedError(f"{weights} lacks {', '.join(lacking)}; it is not an SAE in sae-lens' layout")
    metadata = config.get("metadata", {})
    hook = metadata.get("hook_name") or config.get("hook_name")
    if hook is None:
        raise UsageError(f"{folder}/cfg.json does not say at which site the SAE was trained (metadata.hook_name)")
    if config.get("reshape_activations", "none") != "none":
        raise UsageError(f"{folder} reshapes its input ({config['reshape_activations']}), which is not supported")
    centred = (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights", False)
    return Sae(
        name=folder.name,
        site=Site.parse(hook),
        architecture=config.get("architecture", "unnamed"),
        k=int(config.get("k", 0)),
        normalize=config.get("normalize_activations", "none"),
        apply_b_dec_to_input=config.get("apply_b_dec_to_input", True),
        rescale_by_decoder_norm=config.get("rescale_acts_by_decoder_norm", False),
        basis="centred" if centred else "plain",
        **{name: tensors[name] for name in tensors if name in SAE_TENSORS},
    )


SAE_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_gate", "r_mag", "b_mag")
