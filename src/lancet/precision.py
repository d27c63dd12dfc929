"""Where a model runs and in which numbers: device, dtype, 8 and 4 bits, several devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from lancet import processor
from lancet.errors import MissingError, UsageError

if TYPE_CHECKING:
    import torch

Quantize = Literal["8bit", "4bit"]
DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BITS: tuple[Quantize, ...] = ("8bit", "4bit")
GROUP = 32  # weights that share a scale in 4 bits on a processor; the smallest that torchao knows, and the most exact
TORCHAO = "torchao>=0.16,<0.17"  # the tested one: 8 bits of 0.15 give products four times as far off
SHRINKS_TO = 0.8  # of the plain size; less of a saving means that the library found nothing to quantise


@dataclass(frozen=True)
class Precision:
    """How a model is loaded.

    Attributes:
        device: where its inputs go; "auto" where a device map decides.
        dtype: of all that is not quantised.
        note: what was chosen, and why.
        quantize: "8bit", "4bit" or None.
        arguments: for transformers' `from_pretrained`, beside the dtype.
    """

    device: str
    dtype: torch.dtype
    note: str
    quantize: Quantize | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def settle(self, hf: Any, plain_bytes: int, name: str) -> Any:
        """Moves a loaded model to its device where nothing else placed it, and sees that bits were saved.

        Args:
            plain_bytes: what its weights take in `dtype`.

        Raises:
            UsageError: the library that quantises found nothing to quantise.
        """
        if self.quantize and held_bytes(hf) > SHRINKS_TO * plain_bytes:
            raise UsageError(
                f"{name} was not made smaller by --quantize {self.quantize}: its {type(hf).__name__} has few layers of "
                f"the kind that is quantised on {self.device}; leave it out"
            )
        return hf if "device_map" in self.arguments or self.device == "cpu" else hf.to(self.device)


def held_bytes(hf: Any) -> int:
    """What a model's weights really take: transformers counts torchao's packed ones at their plain size."""
    weights = (*hf.parameters(), *hf.buffers())
    return sum(part.numel() * part.element_size() for weight in weights for part in plain_parts(weight))


def plain_parts(weight: Any) -> list[torch.Tensor]:
    """The plain tensors that a weight consists of: itself, or what torchao packs it into (numbers, scales)."""
    weight = getattr(weight, "data", weight)
    if hasattr(weight, "__tensor_flatten__"):
        return [part for name in weight.__tensor_flatten__()[0] for part in plain_parts(getattr(weight, name))]
    return [weight]


def choose(
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Precision:
    """Device, dtype and the rest, from what a user says.

    Args:
        device: "auto", "cuda", "cuda:1", "mps" or "cpu".
        dtype: "auto", "float32", "bfloat16" or "float16".
        quantize: None, "8bit" or "4bit" weights: bitsandbytes on CUDA, torchao on the CPU. Values and edits stay in
            `dtype`; what the model computes is that of the rounded weights.
        device_map: spreads the model over devices through accelerate: "auto", "balanced", ..., or module -> device.

    Raises:
        UsageError: unknown, not usable by the installed torch, or two that exclude each other.
        MissingError: a library must be installed first; says how.
    """
    if quantize not in (None, *BITS):
        raise UsageError(f"unknown quantisation {quantize!r}; use {' or '.join(BITS)}, or leave it out")
    if device_map is not None and device != "auto":
        raise UsageError(f"--device {device} and a device map both say where the model goes; give one of them")
    chosen = choose_device(device)
    kind = chosen.split(":")[0]
    if quantize and dtype == "auto":
        dtype, note = "bfloat16", f"bfloat16 on {chosen} beside {quantize} weights"
        if kind == "cuda":
            torch_dtype, _ = choose_dtype("auto", chosen)
            dtype = str(torch_dtype).removeprefix("torch.")
            note = f"{dtype} on {chosen} beside {quantize} weights"
        torch_dtype, _ = choose_dtype(dtype, chosen)
    else:
        torch_dtype, note = choose_dtype(dtype, chosen)
    arguments: dict[str, Any] = {}
    if quantize:
        arguments["quantization_config"] = _quantization(quantize, kind, torch_dtype)  # type: ignore[arg-type]
        arguments["device_map"] = {"": chosen}
    if device_map is not None:
        _need("accelerate", "spreading a model over devices")
        arguments["device_map"] = device_map
        note = f"{note}, spread by the device map {device_map!r}"
    return Precision(chosen, torch_dtype, note, quantize, arguments)  # type: ignore[arg-type]


def _quantization(quantize: Quantize, kind: str, dtype: torch.dtype) -> Any:
    """transformers' own settings object."""
    if kind == "cuda":
        _need("bitsandbytes", f"--quantize {quantize} on CUDA", "bitsandbytes>=0.46.1")
        _need("accelerate", f"--quantize {quantize} on CUDA")
        from transformers import BitsAndBytesConfig

        if quantize == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    if kind == "cpu":
        _need("torchao", f"--quantize {quantize} on the CPU (bitsandbytes needs a card)", TORCHAO)
        if tuple(map(int, metadata.version("torchao").split(".")[:2])) < (0, 16):
            raise MissingError(
                f"torchao {metadata.version('torchao')} is too old for --quantize {quantize} on the CPU; install a "
                f"newer one with: pip install '{TORCHAO}'"
            )
        from transformers import TorchAoConfig

        if quantize == "8bit":
            from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

            return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False, version=2))
        return TorchAoConfig(_four_bits_on_a_processor())
    raise UsageError(f"no library quantises on {kind}; use --device cpu or cuda, or leave --quantize out")


def _four_bits_on_a_processor() -> Any:
    """The packing that processors multiply, which torchao calls opaque.

    torchao's "inductor config" is left alone everywhere: it changes torch's settings for the whole process, the
    precision of float32 products on a card among them.
    """
    try:
        from torchao.prototype.int4_opaque_tensor import (  # type: ignore[import-not-found]
            Int4WeightOnlyOpaqueTensorConfig,
        )
    except ImportError as error:
        raise MissingError(
            f"torchao {metadata.version('torchao')} packs 4bit weights for cards alone; on the CPU take 8bit, or "
            f"pip install '{TORCHAO}'"
        ) from error
    return Int4WeightOnlyOpaqueTensorConfig(group_size=GROUP, set_inductor_config=False)


def _need(package: str, what: str, requirement: str = "") -> None:
    if find_spec(package) is None:
        raise MissingError(f"{what} needs {package}; install it with: pip install '{requirement or package}'")


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
