"""`lancet chat`: a conversation from a pipe and from a terminal. The model is a random GPT-2 with a chat template that
has a system turn of its own, as SmolLM2's has."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import save_sae

from lancet.cli import main, show
from lancet.cli.chat import HELP, Talk
from lancet.edit import Edit
from lancet.facts import Facts
from lancet.generate import Sampling
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import random_sae
from lancet.site import Site

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|endoftext|>system\nYou help.\n{% endif %}"
    "<|endoftext|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)
LUCK = Sampling(temperature=1.5, repetition_penalty=1, seed=3)  # a random model is greedy for one token for ever
FEW = 12


@pytest.fixture(scope="module")
def folders(tiny_gpt2: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    model = tiny_gpt2(chat_template=TEMPLATE, seed=4)
    sae = save_sae(tmp_path_factory.mktemp("sae") / "mid", random_sae(64, 128, site=Site(2)))
    Facts(torch.full((128,), 5.0), torch.zeros(128), 10.0, 1000).save(sae / "facts.safetensors")
    return model.name, str(sae)


@pytest.fixture(scope="module")
def lab(folders: tuple[str, str]) -> Lab:
    from lancet.lab import open_lab

    return open_lab(*folders, device="cpu", dtype="float32", anyway=True)


def talk(lab: Lab, *edits: str, system: str | None = None, plain: bool = False, tokens: int = FEW) -> Talk:
    beginning = [] if system is None else [{"role": "system", "content": system}]
    return Talk(lab, beginning, [Edit.parse(edit) for edit in edits], plain, tokens, LUCK, quiet=True)


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def piped(folders: tuple[str, str], lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`lancet chat` with lines from a pipe, in this process, on the lab that is open already."""

    def call(lines: str | bytes, *words: str) -> Done:
        given = lines.encode() if isinstance(lines, str) else lines
        out, err = (TextIOWrapper(BytesIO(), encoding="utf-8") for _ in range(2))
        argv = ["lancet", "chat", "--model", folders[0], "--sae", folders[1], "--temperature", "1.5", "--seed", "3"]
        with monkeypatch.context() as patch:
            patch.setattr("lancet.lab.open_lab", lambda *_: lab)
            patch.setattr(sys, "argv", [*argv, "--repetition-penalty", "1", "--tokens", str(FEW), *words])
            patch.setattr(sys, "stdin", TextIOWrapper(BytesIO(given), encoding="utf-8"))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            show.console.cache_clear()
            show.notes.cache_clear()
            try:
                with pytest.raises(SystemExit) as caught:
                    main()
            finally:
                show.console.cache_clear()
                show.notes.cache_clear()
        shown = []
        for stream in (out, err):
            stream.flush()
            shown.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
        return Done(int(caught.value.code or 0), *shown)

    return call


# ---- what is kept of a conversation ----------------------------------------------------------------------------------


def test_the_history_is_what_was_said(lab: Lab) -> None:
    mine = talk(lab, "#3 += 20")
    for said in ("the cat", "and the dog?"):
        mine.hear(said)
    assert [turn["role"] for turn in mine.messages] == ["user", "assistant"] * 2
    assert [turn["user"] for turn in mine.told] == ["the cat", "and the dog?"]
    asked = mine.messages[:3]
    again = lab.generate(asked, "#3 += 20", FEW, LUCK).text
    assert mine.messages[3]["content"] == again == mine.told[1]["assistant"]
    assert lab.generate(asked[2:], "#3 += 20", FEW, LUCK).text != again  # the first turn matters


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_spans_of_roles_cover_what_was_said_and_no_marker(role: str, system: str | None, lab: Lab) -> None:
    mine = talk(lab, system=system)
    mine.hear("the cat sat")
    prompt = lab.tokenize([*mine.messages, {"role": "user", "content": "and the dog?"}])
    (step,) = lab.steps(f"#3 += 1 @ {role}", prompt, len(prompt) + 5)
    covered = "".join(prompt.piece(i) for i in range(len(prompt)) if step.mask[i])
    said = {
        "user": "the cat satand the dog?",
        "assistant": mine.messages[-1]["content"],
        "system": system or "",  # the template's own system turn was said by nobody
    }
    assert covered == said[role]
    assert bool(step.mask[len(prompt) :].all()) is (role == "assistant")
    assert not step.mask[0]


def test_an_edit_of_a_role_acts_on_earlier_turns(lab: Lab) -> None:
    """What an edit of the user's turns alone changes, it changes by way of the first turn too."""
    mine = talk(lab, "#3 = 40 @ user")
    mine.hear("the cat")
    mine.hear("ok")
    prompt = lab.tokenize(mine.messages[:3])
    first = prompt.text.index("the cat")
    at = [i for i, (begin, end) in enumerate(prompt.spans) if first <= begin < first + len("the cat") and end]
    last = [i for i in range(len(prompt)) if prompt.roles[i] == "user" and i not in at]
    only = ",".join(map(str, last))
    both = ",".join(map(str, at + last))
    assert lab.generate(prompt, f"#3 = 40 @ {both}", FEW, LUCK).text == mine.told[1]["assistant"]
    assert not torch.equal(lab.logits(prompt, f"#3 = 40 @ {both}")[-1], lab.logits(prompt, f"#3 = 40 @ {only}")[-1])


def test_plain_answers_are_shown_and_not_kept(lab: Lab) -> None:
    mine = talk(lab, "#3 += 40", plain=True)
    mine.hear("the cat")
    (turn,) = mine.told
    question = [{"role": "user", "content": "the cat"}]
    assert turn["plain"] == lab.generate(question, None, FEW, LUCK).text != turn["assistant"]
    assert mine.messages[-1]["content"] == turn["assistant"]
    mine.hear("/plain")
    mine.hear("ok")
    assert "plain" not in mine.told[-1]
    mine.hear("/plain")
    mine.hear("/edit")
    mine.hear("ok")
    assert "plain" not in mine.told[-1]  # without edits the answer is the plain one


def test_edits_are_replaced_together_or_not_at_all(lab: Lab) -> None:
    mine = talk(lab, "#3 += 1")
    mine.hear("/edit #4 = 2 @ assistant;  #5 *= 0 ;")
    assert list(map(str, mine.edits)) == ["#4 = 2 @ assistant", "#5 *= 0"]
    for wrong in ("#1 += 1; #6 += 80y", "#1 += 1; bridge = 1", "#1 += 1; #128 += 1", "#1 += 1; #2 += 1e"):
        with pytest.raises(Exception, match=r"cannot read|unknown|no feature"):
            mine.hear(f"/edit {wrong}")
        assert list(map(str, mine.edits)) == ["#4 = 2 @ assistant", "#5 *= 0"]
    mine.hear("ok")
    assert mine.told[-1]["edits"] == ["#4 = 2 @ assistant", "#5 *= 0"]
    mine.hear("/edit")
    assert mine.edits == []


def test_again_takes_the_place_of_the_last_answer(lab: Lab) -> None:
    mine = talk(lab)
    mine.sampling = Sampling(temperature=2.0, seed=7)
    mine.hear("the cat")
    mine.hear("the dog")
    mine.hear("/again")
    assert [turn["seed"] for turn in mine.told] == [7, 7, 8]
    assert mine.told[2]["user"] == "the dog"
    assert mine.told[2]["assistant"] != mine.told[1]["assistant"]
    assert [turn["content"] for turn in mine.messages[::2]] == ["the cat", "the dog"]
    assert mine.messages[-1]["content"] == mine.told[2]["assistant"]


def test_again_after_an_answer_that_was_not_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = talk(lab)
    mine.hear("the cat")
    kept = list(mine.messages)
    with monkeypatch.context() as patch:
        patch.setattr(Lab, "stream", lambda *_: iter([" ", "\n"]))
        mine.hear("the dog")
    assert mine.messages == kept  # a template has no place for an empty turn
    mine.hear("/again")
    assert mine.messages[:2] == kept and mine.messages[2]["content"] == "the dog"


def test_again_after_a_mistake_asks_what_was_not_answered(lab: Lab) -> None:
    mine = talk(lab)
    mine.hear("the cat")
    kept, long = list(mine.messages), "x" * 300
    with pytest.raises(Exception, match="256"):
        mine.hear(long)
    assert mine.messages == kept
    with pytest.raises(Exception, match="256"):
        mine.hear("/again")
    assert mine.messages == kept and mine.sampling.seed == LUCK.seed
    mine.hear("/reset")
    with pytest.raises(Exception, match="nothing was asked"):
        mine.hear("/again")


def test_reset_keeps_the_system_turn(lab: Lab) -> None:
    mine = talk(lab, system="Be brief.")
    mine.hear("the cat")
    mine.hear("/reset")
    mine.hear("the cat")
    assert mine.told[0]["assistant"] == mine.told[1]["assistant"]
    assert [turn["role"] for turn in mine.messages] == ["system", "user", "assistant"]
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    assert mine.told[0]["assistant"] == lab.generate(question, None, FEW, LUCK).text


def test_an_answer_ends_where_the_context_does(lab: Lab) -> None:
    mine = talk(lab, tokens=200)
    question = "x" * 150
    length = len(lab.tokenize([{"role": "user", "content": question}]))
    mine.hear(question)
    made = lab.generate([{"role": "user", "content": question}], None, 256 - length, LUCK)
    assert mine.told[0]["assistant"] == made.text
    with pytest.raises(Exception, match=r"takes at most 256; .*; /reset forgets the turns before"):
        mine.hear("more")
    mine.hear("/reset")
    mine.hear("the cat")
    assert len(mine.messages) == 2


def test_ctrl_c_ends_an_answer_in_a_terminal(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any) -> Iterator[str]:
        yield "half an"
        raise KeyboardInterrupt

    mine = talk(lab)
    monkeypatch.setattr(Lab, "stream", stream)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    mine.hear("the cat")
    assert mine.messages[-1] == {"role": "assistant", "content": "half an"}
    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"isatty": lambda self: False})())
    with pytest.raises(KeyboardInterrupt):
        mine.hear("the cat")


# ---- lines from a pipe -----------------------------------------------------------------------------------------------


def documented() -> set[str]:
    page = Path(__file__).parent.parent.joinpath("docs", "json.md").read_text(encoding="utf-8")
    part = page.partition("## `lancet chat --json`")[2].partition("\n## ")[0]
    return {
        key for row in part.splitlines() if row.startswith("| `") for key in re.findall("`(.+?)`", row.split("|")[1])
    }


def test_json_from_a_pipe(piped: Callable[..., Done], lab: Lab) -> None:
    lines = "the cat\n\n/edit #3 += 40\nthe dog\n/edit #3 += y\n你好\n"
    done = piped(lines, "--json", "--plain", "--system", "Be brief.")
    told = json.loads(done.out)
    assert [turn["user"] for turn in told] == ["the cat", "the dog", "/edit #3 += y", "你好"]
    assert "cannot read the edit" in told[2]["error"] and told[2]["error"].splitlines()[0] in done.err
    assert told[3]["edits"] == ["#3 += 40"]
    assert done.code == 1  # a line failed
    assert set().union(*told) == documented()
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in (told[0], told[1], told[3]):
        messages.append({"role": "user", "content": turn["user"]})
        assert lab.generate(messages, turn["edits"], FEW, LUCK).text == turn["assistant"]
        messages.append({"role": "assistant", "content": turn["assistant"]})


def test_text_from_a_pipe(piped: Callable[..., Done]) -> None:
    done = piped("the cat\n//usr/bin\n/nothing\n/help\n/quit\nnever\n", "--edit", "#3 += 1", "--edit", "#4 = 2 @ user")
    assert done.code == 1
    assert len(re.findall("^edited: ", done.out, re.MULTILINE)) == 2
    assert "you: " not in done.out + done.err and "never" not in done.out
    assert "no command /nothing; /help lists them" in done.err
    assert all(line.strip() in done.err for line in HELP.splitlines())


def test_a_quiet_pipe_is_code_0(piped: Callable[..., Done]) -> None:
    assert piped("\ufeffthe cat\r\n/reset\r\n").code == 0
    assert piped("").code == 0
    assert json.loads(piped("", "--json").out) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--edit", "bridge = 1"], "unknown feature name 'bridge'"),
        (["--edit", "#999 = 1"], "no feature #999"),
        (["--edit", "#3 = 1", "--edit", "#3 += y"], "cannot read the edit"),
        (["--tokens", "0"], "at least 1, got 0"),
        (["--system", ""], "empty message"),
    ],
)
def test_mistakes_in_the_command_are_told_before_a_line_is_read(
    words: list[str], said: str, piped: Callable[..., Done]
) -> None:
    done = piped("the cat\n", *words)
    assert done.code == 2 and done.out == ""
    assert said in done.err


def test_lines_that_are_not_text(piped: Callable[..., Done]) -> None:
    done = piped(b"the cat\n\xff\xfe\n")
    assert done.code == 2
    assert "line 2 of standard input is not text in UTF-8" in done.err
    assert done.out.startswith("plain: ")


def test_a_model_without_a_template(tiny_gpt2: Callable[..., Model]) -> None:
    bare = Lab(tiny_gpt2(seed=1), [random_sae(64, 128, site=Site(2))])
    with pytest.raises(Exception, match="has no chat template"):
        talk(bare)


def test_control_characters_never_reach_the_terminal(
    piped: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "a\x1b[2J\x07b\x9b31m\rc\u3000全角\u200d\tend\n"
    monkeypatch.setattr(Lab, "stream", lambda *_: iter([evil[:2], evil[2:]]))
    out = piped("the cat\n").out
    assert "\u3000全角\u200d\tend" in out  # neither wide spaces nor joiners are control characters
    assert not [c for c in out if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    show.console.cache_clear()
    show.notes.cache_clear()
    show.say(evil)
    assert "\x1b[2J" not in capsys.readouterr().err
    show.notes.cache_clear()
    assert show.harmless("a\r\x00\x7f\nb\t") == "a\ufffd\ufffd\ufffd\nb\t"


# ---- a terminal ------------------------------------------------------------------------------------------------------

SLOW = """
import time
from lancet import generate, lab
rows = generate.rows
def slow(*a, **k):
    for made in rows(*a, **k):
        time.sleep(0.05)
        yield made
lab.rows = slow
from lancet.cli import main
main()
"""


class Terminal:
    """A pseudo-terminal with a process in it."""

    def __init__(self, *words: str, stdout: Any = None) -> None:
        import pty

        self.fd, child = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *words],
            stdin=child,
            stdout=child if stdout is None else stdout,
            stderr=child,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(child)
        self.seen = ""

    def until(self, wanted: str, seconds: float = 240) -> str:
        """Reads until something is shown, and returns what was shown since the last call."""
        begin, end = len(self.seen), time.monotonic() + seconds
        while not re.search(wanted, self.seen[begin:]):
            if time.monotonic() > end or not self._read(1.0):
                raise AssertionError(f"{wanted!r} was not shown in {self.seen[begin:]!r}")
        return self.seen[begin:]

    def _read(self, seconds: float) -> bool:
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                return False
        return True

    def interrupt(self, wanted: str) -> str:
        """Types Ctrl-C until something is shown: a signal that comes just before `input` begins to wait is noticed at
        the next key."""
        begin = len(self.seen)
        for _ in range(12):
            self.type("\x03")
            with suppress(AssertionError):
                self.until(wanted, 10)
                return self.seen[begin:]
        raise AssertionError(f"{wanted!r} was not shown in {self.seen[begin:]!r}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def leave(self) -> int:
        while self._read(1.0) and self.process.poll() is None:
            pass
        code = self.process.wait(60)
        os.close(self.fd)
        return code


def _take_terminal() -> None:
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background is deaf to it, and so its children
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there is a signal here


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_in_a_terminal(folders: tuple[str, str]) -> None:
    words = ["chat", "--anyway", "--model", folders[0], "--sae", folders[1], "--device", "cpu", "--tokens", "100"]
    window = Terminal(*words, "--edit", "#3 += 1", "--temperature", "1.5")
    window.until("you: ")
    window.type("the cat\n")
    window.until("edited: ")
    window.type("\x03")  # Ctrl-C, while the answer is written
    window.until("you: ")
    window.type("half a li")
    window.until("half a li")
    assert "Ctrl-D leaves" in window.interrupt("you: ")  # at the prompt it takes the line back
    window.type("/edit #3 += y\n")
    assert "cannot read the edit" in window.until("you: ")
    window.type("/edit #4 = 2; #5 = 0\n")
    assert "edits: #4 = 2; #5 = 0" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", window.until("you: "))
    window.type("\x04")
    assert window.leave() == 0
    assert "Traceback" not in window.seen


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_json_from_a_terminal_goes_to_a_file_alone(folders: tuple[str, str], tmp_path: Path) -> None:
    words = ["chat", "--anyway", "--model", folders[0], "--sae", folders[1], "--device", "cpu", "--tokens", "4"]
    with (tmp_path / "told.json").open("wb") as file:
        window = Terminal(*words, "--json", stdout=file)
    window.until("you: ")
    window.type("the cat\n")
    window.until("you: ")
    window.type("/quit\n")
    assert window.leave() == 0
    (turn,) = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert turn["user"] == "the cat"
