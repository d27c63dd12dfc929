"""The command line against its contract: exit codes and one line for each mistake, JSON against its documentation,
plain text in a pipe, colours in a terminal, consoles of every encoding, and Ctrl-C. The model is a random GPT-2 and the
SAE a random one, both in folders."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import save_sae

from lancet import lab as lab_module
from lancet.cli import main, show
from lancet.facts import Facts
from lancet.sae import random_sae
from lancet.site import Site

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
CHINESE = "金门大桥 is a bridge 🦙"
ENTRY = "from lancet.cli import main; main()"


@pytest.fixture(scope="module")
def folders(tiny_gpt2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folders of a model and of an SAE with facts."""
    model = tiny_gpt2(chat_template=TEMPLATE, n_positions=4096)
    sae = save_sae(tmp_path_factory.mktemp("sae") / "mid", random_sae(64, 128, site=Site(2)))
    density = torch.zeros(128)
    density[:20] = 0.5
    Facts(torch.full((128,), 5.0), density, 10.0, 1000).save(sae / "facts.safetensors")
    return model.name, str(sae)


@dataclass
class Done:
    """How a command ended."""

    code: int
    raw: bytes
    err: str
    encoding: str

    @property
    def out(self) -> str:
        return self.raw.decode(self.encoding).replace("\r\n", "\n")

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a command in this process as a console of some encoding would; the model and SAE are filled in."""

    def call(*words: str, stdin: bytes = b"", encoding: str = "utf-8", bare: bool = False, out: Any = None) -> Done:
        where = ["--model", folders[0], "--sae", folders[1], "--device", "cpu", "--dtype", "float32"]
        known = {word for word in words if word.startswith("--")}
        filled = [w for i in range(0, 8, 2) if where[i] not in known for w in where[i : i + 2]]
        shown, err = (io.TextIOWrapper(io.BytesIO(), encoding=e) for e in (encoding, "utf-8"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["lancet", *words, *([] if bare else [*filled, "--anyway"])])
            patch.setattr(sys, "stdout", out or shown)
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding))
            show.console.cache_clear()
            show.notes.cache_clear()
            try:
                with pytest.raises(SystemExit) as caught:
                    main()
            finally:
                show.console.cache_clear()
                show.notes.cache_clear()
        for stream in (shown, err):
            stream.flush()
        return Done(int(caught.value.code or 0), shown.buffer.getvalue(), err.buffer.getvalue().decode(), encoding)  # type: ignore[attr-defined]

    return call


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "matplotlib", "sae_lens", "interp_engine", "pandas", "lark"]
    commands = [[], ["read"], ["steer"], ["demo"], ["get"], ["doctor"]]
    code = f"""
import sys
from lancet.cli import main
for words in {commands}:
    sys.argv = ["lancet", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, words
assert not [name for name in {heavy} if name in sys.modules], [name for name in {heavy} if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    for words in ("柳叶刀", "--repetition-penalty", "--at", "--plot", "doctor"):
        assert words in done.stdout


def test_help_on_a_poor_console() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-c", ENTRY, "--help"], capture_output=True, env=env, check=False)
    assert done.returncode == 0
    assert b"sparse" in done.stdout
    assert not done.stderr


def test_version(run: Callable[..., Done]) -> None:
    done = run("--version", bare=True)
    assert done.code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.out)


# ---- mistakes --------------------------------------------------------------------------------------------------------

USAGE = [
    (["read", ""], "the text is empty; give at least one character"),
    (["read", "abc", "--top", "0"], "top must be at least 1, got 0"),
    (["read", "abc", "--at", "zzz"], "'zzz' does not occur in the text 'abc'"),
    (["read", "The Bridge", "--at", "Brigde"], "nearest: Bridge"),
    (["read", "abc", "--at", ""], "nothing to look for"),
    (["read", "abc", "--plot", "{tmp}/x.xyz"], "end its name in one of"),
    (["read", "abc", "--plot", "{file}/x.png"], "choose a path in a folder that you may write to"),
    (["read", "abc", "--sae", "blocks.99.hook_resid_pre"], "unknown SAE"),
    (["read", "abc", "--sae", "nowhere"], "unknown SAE 'nowhere'"),
    (["read", "abc", "--device", "gpu"], "use one of auto, cuda, mps, cpu"),
    (["read", "abc", "--dtype", "int4"], "use one of auto, float32"),
    (["read", "abc", "--quantize", "2bit"], "use 8bit or 4bit, or leave it out"),
    (["read", "abc", "--device-map", "auto"], "--device cpu and a device map both say where the model goes"),
    (["read", "\udcff\udcfe"], "not valid Unicode at character 1"),
    (["steer", "abc", "#3 = 1", "--tokens", "0"], "new tokens must be at least 1, got 0"),
    (["steer", "abc", "#3 = 1", "--tokens", "-5"], "new tokens must be at least 1, got -5"),
    (["steer", "abc", "#3 = 1", "--tokens", "5000"], "exceed the context of 4096"),
    (["steer", "abc", "#3 = 1", "--samples", "0"], "--samples must be at least 1, got 0"),
    (["steer", "abc", "#3 = 1", "--temperature", "-1"], "temperature must be 0"),
    (["steer", "abc", "#3 = 1", "--top-p", "2"], "top_p must be above 0"),
    (["steer", "abc", "#128 += 1"], "no feature #128 in mid; it has #0 to #127"),
    (["steer", "abc", "bridge += 1"], "unknown feature name 'bridge'"),
    (["steer", "abc", "#3 += 1 @ user"], "needs a chat"),
    (["steer", "abc", "blocks.3.hook_resid_pre#3 += 1"], "no SAE at blocks.3.hook_resid_pre is open"),
    (["steer", "", "#3 += 1"], "the text is empty"),
]
BARE = [
    (["read", "abc", "--model", "smolm2"], "unknown model 'smolm2'; nearest: smollm2"),
    (["get", "smollm"], "unknown model 'smollm'; nearest: smollm2"),
]
TYPERS = [
    (["nothing"], "No such command"),
    (["read"], "Missing argument"),
    (["steer", "abc"], "Missing argument"),
    (["read", "abc", "--top", "many"], "Invalid value for '--top'"),
    (["steer", "abc", "#3 = 1", "--tokens", "1.5"], "Invalid value for '--tokens'"),
    (["read", "abc", "--nothing"], "No such option"),
]


@pytest.mark.parametrize(("words", "said"), USAGE + BARE, ids=str)
def test_mistakes_are_one_line_and_code_2(
    words: list[str], said: str, run: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    filled = [word.replace("{tmp}", str(tmp_path)).replace("{file}", str(tmp_path / "file")) for word in words]
    done = run(*filled, bare=(words, said) in BARE)
    assert done.code == 2
    assert done.raw == b""
    assert said in done.err
    assert done.err.startswith("lancet: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(("words", "said"), TYPERS, ids=str)
def test_typers_own_mistakes_are_code_2(words: list[str], said: str, run: Callable[..., Done]) -> None:
    done = run(*words, bare=True)
    assert done.code == 2
    assert said in done.err
    assert done.raw == b""
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("edit", "at", "said"),
    [
        ("#3 += 80y", 8, "expected @ or x or rn"),
        ("#3 += inf", 6, "write `= 0`"),
        ("#3 *= 2x", 6, "takes a plain factor"),
    ],
)
def test_an_edit_that_cannot_be_read_is_shown_with_a_caret(
    edit: str, at: int, said: str, run: Callable[..., Done]
) -> None:
    done = run("steer", "abc", edit, "--model", "not opened")
    first, shown, caret = done.err.splitlines()
    assert done.code == 2
    assert said in first
    assert first.startswith(f"lancet: cannot read the edit at character {at + 1} (")
    assert shown == "  " + edit
    assert caret == "  " + " " * at + "^"


def damage(folder: Path, how: str) -> None:
    """Spoils a model's or an SAE's folder in one of the ways in which folders are spoiled."""
    from safetensors.torch import load_file, save_file

    weights = next(folder.glob("*.safetensors"))
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickle":
            torch.save({"a": torch.zeros(3)}, weights.with_suffix(".pt"))
            weights.unlink()
        case "pickle under another name":
            torch.save({"a": torch.zeros(3)}, weights)
        case "garbage":
            next(folder.glob("c*f*g.json")).write_text("{")
        case "lacking":
            tensors = load_file(weights)
            del tensors[sorted(tensors)[0]]
            save_file(tensors, weights, metadata={"format": "pt"})


HOW = ["truncated", "pickle", "pickle under another name", "garbage", "lacking"]


@pytest.mark.parametrize("what", ["--model", "--sae"])
@pytest.mark.parametrize("how", HOW)
def test_damaged_folders_are_one_line_and_code_1(
    what: str, how: str, run: Callable[..., Done], folders: tuple[str, str], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(folders[what == "--sae"], folder)
    (folder / "facts.safetensors").unlink(missing_ok=True)
    damage(folder, how)
    done = run("read", "abc", what, str(folder))
    assert done.code == 1
    assert done.raw == b""
    assert "damaged" in done.err
    assert done.err.startswith("lancet: ")
    assert len(done.err.splitlines()) == 1


def test_a_weight_of_another_shape(run: Callable[..., Done], folders: tuple[str, str], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders[0], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.2.mlp.c_fc.weight"] = torch.zeros(64, 8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run("read", "abc", "--model", str(folder))
    assert done.code == 1
    assert done.err.startswith("lancet: transformers cannot open")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"d_model": 32}, 1, "reads vectors of width 32, .* has width 64"),
        ({"layer": 9}, 2, "no site blocks.9.hook_resid_pre"),
        ({"architecture": "crosscoder"}, 2, "'crosscoder' SAE; supported"),
        ({"metadata": {}}, 2, "does not say at which site"),
        ({"reshape_activations": "hook_z"}, 2, "reshapes its input"),
    ],
    ids=str,
)
def test_saes_that_do_not_fit(
    change: dict[str, Any], code: int, said: str, run: Callable[..., Done], tmp_path: Path
) -> None:
    config = {name: value for name, value in change.items() if name not in ("d_model", "layer")}
    folder = save_sae(
        tmp_path / "sae", random_sae(change.get("d_model", 64), 128, site=Site(change.get("layer", 2))), **config
    )
    done = run("read", "abc", "--sae", str(folder))
    assert done.code == code
    assert re.search(said, done.err)
    assert len(done.err.splitlines()) == 1


def test_a_pickle_and_a_folder_without_parts(run: Callable[..., Done], tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "sae.pt")
    done = run("read", "abc", "--sae", str(tmp_path / "sae.pt"))
    assert done.code == 1
    assert "is a pickle, which can run code and is never opened" in done.err
    done = run("read", "abc", "--sae", str(tmp_path))
    assert done.code == 2
    assert "has no cfg.json" in done.err
    done = run("read", "abc", "--model", str(tmp_path))
    assert done.code == 2
    assert "has no config.json" in done.err


def test_no_sae_ships_for_a_folder(run: Callable[..., Done], folders: tuple[str, str]) -> None:
    done = run("read", "abc", "--model", folders[0], bare=True)
    assert done.code == 2
    assert "no SAE ships for" in done.err
    assert "name one with --sae FOLDER" in done.err


# ---- what is printed -------------------------------------------------------------------------------------------------


def documented(heading: str) -> set[str]:
    """The names in a section of docs/json.md."""
    page = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split(f"## `{heading}`")[1].split("\n## ")[0]
    return set(re.findall(r"`([a-z_]+)`", section))


def test_read_in_a_pipe(run: Callable[..., Done]) -> None:
    done = run("read", CHINESE, "--top", "3")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0].split("\t") == ["position", "token", "lit", "explained", "features"]
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(1, len(lines))]
    assert all(re.fullmatch(r"#\d+ -?\d+\.\d(  #\d+ -?\d+\.\d){2}", line.split("\t")[4]) for line in lines[1:])
    assert "\x1b" not in done.out
    assert "\x1b" not in done.err
    assert "features that fire on more than a tenth of all tokens are hidden; --dense shows them" in done.err
    assert "float32 on cpu" in done.err
    assert "hidden" not in run("read", CHINESE, "--dense").err


def test_read_as_json(run: Callable[..., Done]) -> None:
    done = run("read", CHINESE, "--json", "--top", "2")
    assert done.code == 0
    assert CHINESE in done.out
    assert set(done.json) <= documented("lancet read TEXT --json")
    assert done.json["text"] == CHINESE
    assert all(len(token["top"]) == 2 and token["top"][0]["feature"] >= 20 for token in done.json["tokens"])
    dense = run("read", CHINESE, "--json", "--dense", "--top", "128").json
    assert dense["hidden_dense"] == 0 < done.json["hidden_dense"]
    assert all(len(token["top"]) == token["lit"] for token in dense["tokens"])


def test_read_at_as_json(run: Callable[..., Done]) -> None:
    found = run("read", CHINESE, "--at", "大桥", "--json").json
    assert set(found) <= documented("lancet read TEXT --at CHARACTERS --json") | {"top"}
    assert found["text"] == "大桥"
    assert len(found["positions"]) == len(found["lit"]) == len(found["explained"])
    assert set(found["top"][0]) == {"share", "feature", "value", "position", "fires", "says", "name", "described"}
    assert len(found["top"]) == 5


def test_read_at_in_a_pipe(run: Callable[..., Done]) -> None:
    lines = run("read", "The cat", "--at", "cat").out.splitlines()
    assert re.fullmatch(r"' cat' \(position 2\): \d+ of 128 features lit, -?\d+% explained", lines[0])
    assert lines[1].split("\t") == ["feature", "strength", "", "share", "fires on", "makes the model say"]
    assert len(lines) == 7


def test_read_draws(run: Callable[..., Done], tmp_path: Path) -> None:
    for words in ([], ["--at", "cat"]):
        done = run("read", "The cat", "--plot", str(tmp_path / "new" / "picture.png"), *words)
        assert done.code == 0
        assert f"drew {tmp_path}" in done.err
        assert (tmp_path / "new" / "picture.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "new" / "picture.png").unlink()


def test_steer_in_a_pipe(run: Callable[..., Done]) -> None:
    done = run("steer", "The cat", "#3 += 50", "#5 = 0 @ generated", "--tokens", "4", "--samples", "2", "--seed", "7")
    cells = [line.split("\t") for line in done.out.splitlines()]
    assert done.code == 0
    assert [c[:3] for c in cells] == [[name, seed, "length"] for seed in "78" for name in ("plain", "steered")]
    assert all(c[3].startswith("'The cat") for c in cells)
    assert len(run("steer", "The cat", "#3 += 50", "--tokens", "2", "--no-plain").out.splitlines()) == 1


def test_steer_as_json(run: Callable[..., Done]) -> None:
    words = ["steer", CHINESE, "#3 += 0.5rn", "(#5 - #6) = 2 @ last", "--tokens", "4", "--temperature", "0", "--json"]
    plain, steered = run(*words).json
    assert set(plain) == set(steered) == {"name", "prompt", "text", "tokens", "edits", "ended", "sampling", "recipe"}
    names = documented("lancet steer PROMPT EDIT... --json")
    assert set(plain) | set(plain["sampling"]) | set(plain["recipe"]) <= names
    assert (plain["name"], steered["name"]) == ("plain", "steered")
    assert plain["prompt"] == CHINESE
    assert plain["edits"] == []
    assert steered["edits"] == ["#3 += 0.5rn", "(#5 - #6) = 2 @ last"]
    assert plain["sampling"]["temperature"] == 0
    assert len(steered["tokens"]) == 4
    assert steered["recipe"]["saes"] == ["mid"]
    assert run(*words).json == [plain, steered]
    blunt = run(*words[:3], "--blunt", *words[4:], "--no-plain").json
    assert [row["name"] for row in blunt] == ["steered"]


def test_chats(run: Callable[..., Done]) -> None:
    found = run("read", "Hi", "--chat", "--json").json
    assert found["text"] == "<user>Hi</>"
    assert run("steer", "Hi", "#3 += 1 @ user", "--chat", "--tokens", "2", "--json").json[0]["prompt"] == "<user>Hi</>"


def test_standard_input(run: Callable[..., Done]) -> None:
    text = "The cat\n金门大桥"
    for raw, encoding in (
        (text.encode() + b"\n", "utf-8"),
        (text.encode() + b"\n", "gbk"),  # a file in UTF-8 piped into a Chinese console
        (text.encode("gbk") + b"\n", "gbk"),
        (text.encode(), "ascii"),
        (text.replace("\n", "\r\n").encode("utf-8-sig") + b"\r\n", "utf-8"),
    ):
        done = run("read", "-", "--json", stdin=raw, encoding=encoding)
        assert done.code == 0, (raw, encoding)
        assert done.json["text"] == text, (raw, encoding)
    assert run("steer", "-", "#3 += 1", "--tokens", "1", "--json", stdin=b"The cat\n").json[0]["prompt"] == "The cat"
    done = run("read", "-", stdin=b"\xff\xfe\xfd")
    assert done.code == 2
    assert "standard input is not text in UTF-8" in done.err
    done = run("read", "-", stdin=b"\n")
    assert done.code == 2
    assert "the text is empty" in done.err


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252", "latin-1"])
def test_consoles_that_lack_characters(encoding: str, run: Callable[..., Done]) -> None:
    for words in (["read", CHINESE], ["read", CHINESE, "--at", "🦙"], ["steer", CHINESE, "#3 += 1", "--tokens", "2"]):
        done = run(*words, encoding=encoding)
        assert done.code == 0
        assert "Traceback" not in done.err
        assert ("大" in done.out) == (encoding == "gbk" and "--at" not in words)
    for words in (["read", CHINESE], ["read", "A bridge"], ["steer", CHINESE, "#3 += 1", "--tokens", "2"]):
        done = run(*words, "--json", encoding=encoding)
        assert done.code == 0
        assert done.json
    assert run("read", CHINESE, "--json", encoding=encoding).json["text"] == CHINESE


def test_a_real_process_on_such_a_console(folders: tuple[str, str]) -> None:
    words = ["read", CHINESE, "--anyway", "--model", folders[0], "--sae", folders[1], "--device", "cpu"]
    env = os.environ | {"PYTHONIOENCODING": "gbk"}
    done = subprocess.run([sys.executable, "-c", ENTRY, *words], capture_output=True, env=env, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert done.stdout.decode("gbk").startswith("position\ttoken")


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
@pytest.mark.parametrize("plain", [False, True])
def test_colours_in_a_terminal(plain: bool, run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table and panels with lines and colours; with NO_COLOR, without colours."""
    import pty

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1") if plain else monkeypatch.delenv("NO_COLOR", raising=False)
    shown = ""
    for words in (["read", "The cat [bold]x[/bold]"], ["steer", "The cat", "#3 += 50", "--tokens", "3"]):
        outer, inner = pty.openpty()
        with os.fdopen(inner, "w", encoding="utf-8") as terminal:
            assert run(*words, out=terminal).code == 0
            terminal.flush()
            shown += os.read(outer, 1_000_000).decode(errors="replace")
        os.close(outer)
    assert "│" in shown
    assert "─" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)) == (not plain)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_interrupted_writing_keeps_what_was_written(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    original = lab_module.rows

    def until_three(*args: Any, **kwargs: Any) -> Any:
        for step, made in enumerate(original(*args, **kwargs)):
            if step == 3:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(lab_module, "rows", until_three)
    found = run("steer", "The cat", "#3 += 1", "--json", "--seed", "1").json
    assert [row["ended"] for row in found] == ["interrupted"] * 2
    assert all(len(row["tokens"]) == 3 for row in found)


@pytest.mark.parametrize("command", ["read", "steer"])
def test_interrupted_elsewhere(command: str, run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lab_module, "open_lab", interrupted)
    done = run(command, "The cat", *(["#3 += 1"] if command == "steer" else []))
    assert done.code == 130
    assert done.raw == b""
    assert done.err in ("", "lancet: interrupted\n")


STARTED = """
import signal
import sys
import lancet.lab as lab
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
original = lab.rows
def rows(*args, **kwargs):
    for step, made in enumerate(original(*args, **kwargs)):
        if step == 5:
            print("writing", file=sys.stderr, flush=True)
        yield made
lab.rows = rows
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_while_writing(folders: tuple[str, str]) -> None:
    words = [
        "steer",
        "The cat",
        "#3 += 1",
        "--tokens",
        "4000",
        "--model",
        folders[0],
        "--sae",
        folders[1],
        "--device",
        "cpu",
        "--anyway",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED + ENTRY, *words, "--temperature", "0", "--repetition-penalty", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "writing" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    rows = [line.split("\t") for line in out.splitlines()]
    assert process.returncode == 0
    assert "Traceback" not in err
    assert [row[0] for row in rows] == ["plain", "steered"]
    assert "interrupted" in {row[2] for row in rows}
    assert all(len(row[3]) > len("'The cat'") for row in rows)


def test_a_reader_that_goes_away(folders: tuple[str, str]) -> None:
    words = ["read", "The cat " * 100, "--anyway", "--model", folders[0], "--sae", folders[1], "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", ENTRY, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(300) in (0, 1)


def test_doctor(run: Callable[..., Done]) -> None:
    found = run("doctor", "--json", bare=True)
    assert found.code == 0
    assert set(found.json) == {"versions", "devices", "memory", "caches", "model", "remedies"}
    assert found.json["versions"]["torch"] == torch.__version__
    assert found.json["devices"]["chosen"] in ("cpu", "cuda", "mps")
    lines = run("doctor", bare=True, encoding="gbk").out.splitlines()
    assert "what to do" in lines
    assert any(line.startswith("python\t") for line in lines)
