"""Models that come in wheels: fetched by the real pip from an index on the loopback, with everything that can be wrong,
and terms that must be accepted first."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lancet import embedded, gguf_tokenizer, loading, wheels
from lancet.cli import main
from lancet.cli.get import plain_text
from lancet.embedded import GEMMA3, Embedded
from lancet.errors import DamagedError, MissingError, UsageError
from lancet.wheels import Wheel

TERMS = """<html><head><title>Terms</title><style>p {}</style></head><body><nav><p>Menu</p></nav>
<div class="devsite-article-body clearfix"><p>You must be
kind.</p><div><ul><li>Always</li></ul></div></div><div><p>Footer</p></div></body></html>"""


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> Wheel:
    """A wheel 1.0 of a package; the first file is the one that is wanted."""
    package = name.replace("-", "_")
    told = f"{package}-1.0.dist-info"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('a wheel of a model was imported')\n")
        archive.writestr(f"{told}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
                         "Requires-Dist: nothing-of-that-name\n")  # fmt: skip
        archive.writestr(f"{told}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{told}/RECORD", "".join(f"{inside},,\n" for inside in files))
    data = path.read_bytes()
    return Wheel(name, "1.0", hashlib.sha256(data).hexdigest(), next(iter(files)), len(data))


class Index:
    """A package index: a folder of wheels, and the digest that it names where that is to be a wrong one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.digest, self.asked = folder, "", [""]
        index = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                index.asked.append(self.path)
                name = self.path.strip("/").split("/")[-1]
                if name.endswith(".whl"):
                    body = (index.folder / name).read_bytes()
                else:
                    found = [p for p in index.folder.glob("*.whl") if p.name.startswith(name.replace("-", "_") + "-")]
                    digests = [index.digest or hashlib.sha256(path.read_bytes()).hexdigest() for path in found]
                    links = [
                        f'<a href="/files/{path.name}#sha256={digest}">{path.name}</a>'
                        for path, digest in zip(found, digests, strict=True)
                    ]
                    body = ("<!DOCTYPE html><html><body>" + "".join(links) + "</body></html>").encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream" if ".whl" in name else "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    (tmp_path / "wheels").mkdir()
    index = Index(tmp_path / "wheels")
    thread = threading.Thread(target=index.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": index.url,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
        "LANCET_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    yield index
    index.server.shutdown()
    index.server.server_close()
    thread.join()


@pytest.fixture
def parcel(index: Index) -> Wheel:
    return make_wheel(index.folder, "a-model", {"a_model/data/weights.gguf": "the weights"})


def test_pip_fetches_and_the_file_comes_out(index: Index, parcel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told: list[str] = []
    path = wheels.fetch(parcel, tmp_path / "out", told.append)
    assert path.read_text() == "the weights" and path.name == "weights.gguf"
    assert told == [f"fetching a-model==1.0 ({parcel.bytes / 1e3:.0f} kB)"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["weights.gguf"]
    assert not [line for line in index.asked if "nothing-of-that-name" in line]  # what it depends on is not wanted


def test_what_pip_brings_wrong(index: Index, parcel: Wheel, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"is not the expected file: sha256 .*, expected 000000"):
        wheels.fetch(replace(parcel, sha256="0" * 64), tmp_path, print)
    with pytest.raises(MissingError, match=r"pip could not fetch a-model==2\.0: ERROR: .*a-model==2\.0"):
        wheels.fetch(replace(parcel, version="2.0"), tmp_path, print)
    index.digest = "1" * 64  # the index's own digest is compared by pip
    with pytest.raises(MissingError, match=r"pip could not fetch a-model==1\.0"):
        wheels.fetch(parcel, tmp_path, print)


def test_an_installed_wheel_is_found_by_its_record(
    parcel: Wheel, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wheels.installed(parcel) is None
    with zipfile.ZipFile(next(index.folder.iterdir())) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path = wheels.installed(parcel)
    assert path == tmp_path / "site" / "a_model" / "data" / "weights.gguf" and "a_model" not in sys.modules
    path.unlink()
    assert wheels.installed(parcel) is None


# ---- parts and terms -------------------------------------------------------------------------------------------------


@pytest.fixture
def licensed(index: Index, monkeypatch: pytest.MonkeyPatch) -> tuple[Embedded, list[bytes]]:
    """A model in three parts under terms of its own, and what its conversion is given."""
    parts = [make_wheel(index.folder, f"m-part{i}", {f"m_part{i}/m.gguf.part{i}": f"part {i}, "}) for i in range(3)]
    terms = make_wheel(index.folder, "m-terms", {"m_terms/TERMS.html": TERMS})
    given: list[bytes] = []
    model = replace(GEMMA3, name="m", title="M", gguf="m.gguf", wheels=tuple(parts), terms=(terms, "https://terms"))

    def convert(self: Embedded, gguf: Path, say: Callable[[str], None] = print) -> Path:
        assert gguf.name == "m.gguf"
        given.append(gguf.read_bytes())
        self.folder().mkdir(parents=True)
        return self.folder()

    monkeypatch.setattr(Embedded, "convert", convert)
    monkeypatch.setattr(Embedded, "ensure", lambda self, say=print: self.folder())
    monkeypatch.setitem(embedded.MODELS, "m", model)
    return model, given


def test_terms_come_first(licensed: tuple[Embedded, list[bytes]], index: Index) -> None:
    model, given = licensed
    asked: list[tuple[str, str]] = []
    with pytest.raises(UsageError, match="the terms of M were not accepted, and nothing of it was fetched"):
        model.get(print, lambda *terms: bool(asked.append(terms)))
    assert asked == [(TERMS, "https://terms")] and not given
    assert not [line for line in index.asked if "part" in line]
    with pytest.raises(UsageError, match="--accept-terms"):  # nobody to ask
        model.get(print)
    model.get(print, lambda *terms: True)
    assert given == [b"part 0, part 1, part 2, "]


@pytest.mark.parametrize("answer", ["yes\n", "y\n", "", "no\n"])
def test_lancet_get_takes_a_typed_yes_alone(
    answer: str,
    licensed: tuple[Embedded, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lancet", "get", "m"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert "You must be kind.\n\nAlways\n" in told.out and "Menu" not in told.out and "Footer" not in told.out
    assert (ended.value.code, bool(licensed[1])) == ((0, True) if answer == "yes\n" else (2, False)), told.err


def test_lancet_get_accepts_beforehand(
    licensed: tuple[Embedded, list[bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lancet", "get", "m", "--accept-terms"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and licensed[1] and "You must" not in capsys.readouterr().out


def test_opening_asks_for_terms_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wheels that were installed by hand are not used before the terms were shown."""
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path))
    monkeypatch.setattr(Embedded, "parts", lambda self: [tmp_path / "part"])
    with pytest.raises(
        MissingError, match=r"comes under its own terms; run `lancet get gemma3-270m`, which shows them"
    ):
        loading.open_model("gemma3-270m")
    monkeypatch.setattr(Embedded, "parts", lambda self: None)
    with pytest.raises(MissingError, match=r"gemma3-270m is not here; run `lancet get gemma3-270m` \(238 MB, once\)"):
        loading.open_model("gemma3-270m")


def test_a_page_without_an_article_is_shown_whole() -> None:
    assert plain_text("<p>One\n two</p><script>x</script><p>three") == "One two\n\nthree"


# ---- its kind of tokenizer -------------------------------------------------------------------------------------------


def test_merges_are_in_the_order_of_scores() -> None:
    pieces = {"a": -9.0, "b": -10.0, "c": -11.0, "bc": -1.0, "ab": -2.0, "abc": -3.0}
    assert gguf_tokenizer.merges_of(pieces) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
