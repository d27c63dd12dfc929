"""What a training is told: one frozen object, read from Python, a TOML file or the command line.

The text of each field in `TrainConfig`'s docstring is also the help of the command's option.
"""

from __future__ import annotations

import math
import re
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lancet import units
from lancet.errors import UnknownName, UsageError
from lancet.site import Site

BUFFERS = ("memory", "disk")
LOGS = ("", "tensorboard", "wandb")
IDLE = ("memory", "log", "checkpoint")  # fields that change no weight: a resumed training may have others


def _several(one: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        given = value if isinstance(value, (list, tuple)) else (value,)
        try:
            return tuple(one(each) for each in given)
        except UsageError as error:
            if not any(isinstance(each, str) and "," in each for each in given):
                raise
            raise UsageError(f"{error}; several are given one by one, the option before each") from error

    return read


def _site(value: Any) -> str:
    return str(Site.parse(value))


def _count(value: Any) -> int:
    return units.count(str(value))


def _width(value: Any) -> int:
    return units.width(str(value))


def _whole(value: Any) -> int:
    if not re.fullmatch(r"\d+", str(value)):
        raise UsageError(f"must be a whole number from 0 on, got {value!r}")
    return int(value)


def _number(value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise UsageError(f"must be a number, got {value!r}")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"must be a text, got {value!r}")
    return value


def _setting(default: Any, read: Callable[[Any], Any]) -> Any:
    return field(default=default, metadata={"read": read})


@dataclass(frozen=True)
class TrainConfig:
    """How SAEs are trained. Every combination of `sites`, `features`, `k` and `seeds` is an SAE; all of them learn from
    one pass of the model over the text.

    Attributes:
        sites: Where the SAE reads, such as blocks.6.hook_resid_pre; may be given several times.
        features: How many features, such as 16k (16,384); may be given several times.
        k: Features active on a token, in the mean; may be given several times.
        seeds: Of the first weights; may be given several times. The order of the text is the same for all.
        arch: The architecture: batchtopk, topk, matryoshka, jumprelu, standard (L1), gated.
        tokens: Train on so many, such as 50M, going through the corpus again where it is shorter; left out, once.
        batch: Tokens of a step; left out, 4,096, or less where memory is short or fewer than 800 steps would be made.
        lr: Adam's learning rate.
        warm_up: Share of the steps over which the learning rate rises from 0.
        decay: Share of the steps, the last ones, over which it falls to 0.
        length: Tokens of a piece of text; left out, 512, or the model's context where that is less.
        field: The field or column of the corpus that holds the text.
        buffer: memory, or disk to keep activations (bfloat16), so that later rounds need no model.
        memory: What all may take, such as 10GB; auto is half of what is free.
        dead_window: A feature silent for so many tokens is dead, and begins again; left out, a 25th of all, 20k to 1M.
        aux: Weight of the auxiliary loss for dead features; with 0 none begins again either.
        widths: Inner widths of a matryoshka SAE, such as 512; given several times, rising.
        sparsity: Coefficient of the sparsity loss; left out, it is steered until k features are active.
        log: tensorboard or wandb, beside the table and the CSV that are always written.
        checkpoint: Seconds between two checkpoints.

    Raises:
        UsageError: a value that cannot be.
    """

    sites: tuple[str, ...] = _setting((), _several(_site))
    features: tuple[int, ...] = _setting((16_384,), _several(_width))
    k: tuple[float, ...] = _setting((32.0,), _several(_number))
    seeds: tuple[int, ...] = _setting((0,), _several(_whole))
    arch: str = _setting("batchtopk", _text)
    tokens: int | None = _setting(None, _count)
    batch: int | None = _setting(None, _count)
    lr: float = _setting(3e-4, _number)
    warm_up: float = _setting(0.1, _number)
    decay: float = _setting(0.3, _number)
    length: int | None = _setting(None, _count)
    field: str = _setting("text", _text)
    buffer: str = _setting("memory", _text)
    memory: str = _setting("auto", _text)
    dead_window: int | None = _setting(None, _count)
    aux: float = _setting(1.0, _number)
    widths: tuple[int, ...] = _setting((), _several(_width))
    sparsity: float | None = _setting(None, _number)
    log: str = _setting("", _text)
    checkpoint: float = _setting(300.0, _number)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            try:
                object.__setattr__(self, each.name, each.metadata["read"](value))
            except UsageError as error:
                raise UsageError(f"{option(each.name)}: {error}") from error
        self._check()

    def _check(self) -> None:
        from lancet.training.architectures import ARCHITECTURES

        if self.arch not in ARCHITECTURES:
            raise UnknownName("architecture", self.arch, ARCHITECTURES, "give another --arch")
        for name, known in (("buffer", BUFFERS), ("log", LOGS)):
            if getattr(self, name) not in known:
                allowed = " or ".join(each for each in known if each)
                raise UsageError(f"{option(name)} must be {allowed}, got {getattr(self, name)!r}")
        for name in ("sites", "features", "k", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UsageError(f"{option(name)} has one value twice: {', '.join(map(str, values))}")
        units.size(self.memory)
        if not all(0 < k < min(self.features) for k in self.k):
            raise UsageError(f"--k must lie above 0 and below the number of features, got {_told(self.k)}")
        if self.lr <= 0 or self.aux < 0 or self.checkpoint < 0 or (self.sparsity or 0) < 0:
            raise UsageError("--lr must be above 0; --aux, --sparsity and --checkpoint must not be below 0")
        if min(self.warm_up, self.decay) < 0 or self.warm_up + self.decay > 1:
            raise UsageError(
                f"--warm-up and --decay are shares of the steps, together at most 1, got {self.warm_up}, {self.decay}"
            )
        if list(self.widths) != sorted(set(self.widths)) or any(w >= min(self.features) for w in self.widths):
            raise UsageError(f"--widths must rise and lie below the number of features, got {_told(self.widths)}")

    @classmethod
    def load(cls, path: str | Path, **over: Any) -> TrainConfig:
        """Reads a TOML file whose keys are the fields.

        Args:
            over: fields that go before the file's.

        Raises:
            UsageError: the file cannot be read, or has a value that cannot be.
            UnknownName: a key that is no field; the nearest are told.
        """
        try:
            told = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"cannot read {path}: {why}; give a TOML file") from error
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path} is not TOML: {error}; write lines such as k = 32") from error
        return cls.of(told | over, f"it stands in {path}")

    @classmethod
    def of(cls, told: Mapping[str, Any], where: str = "") -> TrainConfig:
        """From names and values.

        Raises:
            UnknownName: a name that is no field.
        """
        known = [each.name for each in fields(cls)]
        for name in told:
            if name not in known:
                raise UnknownName("setting", name, known, where)
        return cls(**told)

    def to_json(self) -> dict[str, Any]:
        """All fields, tuples as lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def saes(self) -> list[Spec]:
        """The SAEs that are to be trained, by site, width, k and seed.

        Raises:
            UsageError: no site is named.
        """
        if not self.sites:
            raise UsageError("no site: say where the SAE reads with --site, such as blocks.6.hook_resid_pre")
        return [
            Spec(Site.parse(site), width, k, seed)
            for site in self.sites
            for width in self.features
            for k in self.k
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Spec:
    """One SAE: where it reads, how many features it has, how many are active, and its seed."""

    site: Site
    features: int
    k: float
    seed: int


def places(out: Path, config: TrainConfig) -> list[Path]:
    """The folder of each SAE: `out` for one, folders in it for several, named by what tells them apart."""
    specs = config.saes()
    return [out] if len(specs) == 1 else [out / name for name in told_apart(specs)]


def told_apart(specs: Sequence[Spec], site: bool = False) -> list[str]:
    """A name for each SAE of its site, width, k and seed, without what all of them share.

    Args:
        site: tell the site even where all share it.
    """
    several = {name: len({getattr(spec, name) for spec in specs}) > 1 for name in ("site", "features", "k", "seed")}
    out = []
    for spec in specs:
        told = [str(spec.site)] if site or several["site"] else []
        told += [f"{spec.features}"] if several["features"] else []
        told += [f"k{units.short(spec.k)}"] if several["k"] else []
        told += [f"seed{spec.seed}"] if several["seed"] else []
        out.append("-".join(told))
    return out


def option(name: str) -> str:
    """The command's option for a field."""
    return "--" + {"sites": "site", "seeds": "seed"}.get(name, name).replace("_", "-")


def helps() -> dict[str, str]:
    """Each field's text in the docstring, with its default."""
    doc = textwrap.dedent((TrainConfig.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0])
    found = dict(re.findall(r"^(\w+): (.*)$", doc, re.MULTILINE))
    out = {}
    for each in fields(TrainConfig):
        value = each.default
        shown = "" if value in (None, "", ()) else f" Default: {_told(value) if isinstance(value, tuple) else value}."
        out[each.name] = found.get(each.name, "") + shown
    return out


def _told(values: tuple[Any, ...]) -> str:
    return ", ".join(f"{v:g}" if isinstance(v, float) else f"{v}" for v in values)
