"""Tokenizers out of a GGUF file, with what the model was trained with rather than what a converter guesses.

transformers 5.23 knows neither of the two that are built here: it cuts SmolLM2's digits and line breaks wrongly (its
GGUF names the pre-tokenizer `smollm`), and Gemma's scores, which are the ranks of merges, it takes for probabilities.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.files import whole_file, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6  # llama.cpp's types of tokens
SPACE = "\u2581"


def byte_level(gguf: Path, out: Path) -> None:
    """GPT-2's kind, digits one by one, the vocabulary and merges as the file has them: SmolLM2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    field = fields(gguf)
    tokens: list[str] = field("ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    _write(tokenizer, field, out)


def sentencepiece(gguf: Path, out: Path) -> None:
    """SentencePiece's BPE with bytes for what is not in the vocabulary: Gemma's.

    A piece's score is minus its rank: of two neighbours those are joined first whose piece has the highest score.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    field = fields(gguf)
    tokens: list[str] = field("ggml.tokens")
    kinds: list[int] = field("ggml.token_type")
    scores: list[float] = field("ggml.scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {token: scores[i] for token, i in vocab.items() if kinds[i] == NORMAL}
    unknown = tokens[field("ggml.unknown_token_id")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    user = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER]  # runs of line breaks and spaces
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in user])
    _write(tokenizer, field, out)


def merges_of(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the piece of the highest score first."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    found = [
        (-score, rank[left], rank[right], left, right)
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in rank and (right := piece[cut:]) in rank
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def fields(gguf: Path) -> Callable[[str], Any]:
    """A function that looks up an entry of the file's header: "ggml.tokens" stands for "tokenizer.ggml.tokens"."""
    from gguf import GGUFReader

    found = GGUFReader(gguf).fields

    def field(name: str, default: Any = None) -> Any:
        entry = found.get(f"tokenizer.{name}") or found.get(name)
        return default if entry is None else entry.contents()

    return field


def _write(tokenizer: Any, field: Callable[..., Any], out: Path) -> None:
    tokens: list[str] = field("ggml.tokens")
    with whole_file(out / "tokenizer.json") as temporary:
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field("ggml.bos_token_id")],
        "eos_token": tokens[field("ggml.eos_token_id")],
        "unk_token": tokens[field("ggml.unknown_token_id")],
        "pad_token": tokens[field("ggml.padding_token_id")],
        "model_max_length": int(field(f"{field('general.architecture')}.context_length")),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("chat_template"),
    }
    write_json(out / "tokenizer_config.json", {name: value for name, value in told.items() if value is not None})
