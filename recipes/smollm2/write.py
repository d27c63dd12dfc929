"""Text that the model writes itself, half of it chats: what it is like when it speaks, refusing among the rest.

    python recipes/smollm2/write.py --out self-written.jsonl [--texts 1792]

Chats answer the bench's requests and requests for what only an app could do; free texts go on from the first words of
the bench's passages. Every batch is a file of its own beside the result, so that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from text import CHAT_LINE

from lancet import bench
from lancet.files import whole_file
from lancet.generate import Sampling, rows
from lancet.loading import open_model
from lancet.model import Model
from lancet.tokens import Tokens

ROWS = 64
TOKENS = 120
SAMPLING = Sampling(temperature=0.9, repetition_penalty=1.05)
APP = (
    "Send an email to {name}.", "What time is it?", "Call my sister.", "Set an alarm for {number} o'clock.",
    "Turn on the lights in the kitchen.", "Book me a table for {number} on {day}.", "What is the weather like outside?",
    "Play my favourite song.", "Transfer money to {name}.", "Order some {food} to my house.", "Read me my messages.",
    "Take a picture of me.", "Who is standing behind me?", "Open the garage door.", "Find my phone.",
    "Add {food} to my shopping list.", "Remind me to visit {city} in {month}.", "How many steps did I walk on {day}?",
)  # fmt: skip


def requests(rng: random.Random) -> list[str]:
    """What users ask: the bench's chat lines, and what only an app could do."""
    templates = [*bench.passages()["chat"]]
    for name in ("assistant_refusal", "assistant_helpful"):
        templates += bench.concepts()[name].templates
    asked = [match[1] for t in templates if (match := CHAT_LINE.match(bench.expand(t, rng)))]
    return asked + [bench.expand(t, rng) for t in APP for _ in range(12)]


def openings(rng: random.Random) -> list[str]:
    """First words of passages."""
    templates = [t for lines in bench.passages().values() for t in lines]
    return [" ".join(bench.expand(t, rng).split()[: rng.randint(2, 6)]) for t in templates]


def prompts(model: Model, count: int, seed: int) -> list[tuple[str, Tokens]]:
    rng = random.Random(seed)
    asked, begun = requests(rng), openings(rng)
    out = []
    for i in range(count):
        if i % 2:
            out.append(("chat", model.tokenize_chat([{"role": "user", "content": rng.choice(asked)}])))
        else:
            out.append(("free", model.tokenize(rng.choice(begun))))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=1792)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    model = open_model("smollm2")
    every = prompts(model, arguments.texts, arguments.seed)
    parts = []
    for first in range(0, len(every), ROWS):
        path = arguments.out.with_suffix(f".{first:06d}.jsonl")
        parts.append(path)
        if path.exists():
            continue
        batch = every[first : first + ROWS]
        made: list[list[int]] = [[] for _ in batch]
        seeds = [arguments.seed + first + i for i in range(len(batch))]
        for column in rows(model, [p for _, p in batch], [{}] * len(batch), TOKENS, SAMPLING, seeds):
            for row, token in zip(made, column, strict=True):
                if token is not None:
                    row.append(token)
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for (kind, prompt), row in zip(batch, made, strict=True):
                text = model.decode([*prompt.ids, *row])
                file.write(json.dumps({"kind": kind, "text": text}, ensure_ascii=False) + "\n")
        print(f"{first + len(batch)} of {len(every)} texts", flush=True)
    with whole_file(arguments.out) as temporary:
        temporary.write_bytes(b"".join(path.read_bytes() for path in parts))
    for path in parts:
        path.unlink()


if __name__ == "__main__":
    main()
