"""The package's own promises: what it exports, which module may import which, that libraries do not print, and that
everything public says what it is for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lancet

ROOT = Path(lancet.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py") if "assets" not in file.parts)
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
LAYERS = [  # docs/architecture.md; a module imports only from its own layer and from those above
    {"errors", "files", "telling", "units"},
    {"names", "catalogue", "hub", "addressed", "convert", "published", "machine"},
    {"pairing", "settings", "keeping", "hooks", "norms", "anatomy", "tokens", "basis", "hooked", "friends", "precision"}
    | {
        "fingerprint",
        "massive",
        "site",
        "bench",
        "scoring",
        "embedded",
        "gguf_tokenizer",
        "wheels",
        "architectures",
        "features",
        "weights",
        "saefile",
        "sae",
        "model",
        "processor",
        "loading",
        "tails",
        "passes",
        "prompts",
        "intervals",
    },
    {"algebra", "edit", "grammar", "span", "doses", "namefile", "naming"},
    {"facts", "reading", "generate", "continuation", "effect", "forced", "controls", "cut", "ablate", "lab"}
    | {"check", "checkup", "feeding", "splice"}
    | {"sweep", "saying", "baselines", "fit", "ways", "dose", "dosing"}
    | {"logit_lens", "background", "examples", "detect", "effects", "find"}
    | {"projection", "mix", "neurons", "about", "watch"},
    {"atlas"},
    {"evaluation"},
    {"training"},
    {"publishing"},
    {"figures", "card_picture", "pareto"},
    {"cli"},
]
every_file = pytest.mark.parametrize("name", MODULES)


def test_exported_names() -> None:
    assert lancet.__all__ == sorted(lancet.__all__)
    assert len(lancet.__all__) == len(set(lancet.__all__))
    for name in lancet.__all__:
        assert getattr(lancet, name).__doc__, name
        assert name in dir(lancet)
    assert lancet.open.__name__ == "open_lab"
    assert lancet.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lancet.nothing


def test_types_are_known_to_checkers() -> None:
    """Every lazy name is also imported under TYPE_CHECKING, from the module that it really comes from."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    told = {
        alias.asname: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(told) == set(lancet.__all__)
    for name, (module, original) in told.items():
        found = getattr(lancet, name)
        assert (found.__module__, found.__name__) == (module, original)
    assert (ROOT / "py.typed").is_file()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lancet; dir(lancet); sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def layer(module: str) -> int:
    top = module.split(".")[0]
    found = [i for i, names in enumerate(LAYERS) if top in names]
    assert found, f"{module} is in no layer: give it one here and in docs/architecture.md"
    return found[0]


def imported(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported when the module is: not in functions, not under TYPE_CHECKING."""
    out: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            out |= {alias.name.removeprefix("lancet.") for alias in node.names if alias.name.startswith("lancet.")}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lancet":
            inside = node.module.removeprefix("lancet").removeprefix(".")
            names = [f"{inside}.{alias.name}".removeprefix(".") for alias in node.names]
            out |= {name if name in MODULES or name in MODULES_TOP else inside for name in names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative imports hide the layer"
    return out - {"", "lancet"}


MODULES_TOP = {name.split(".")[0] for name in MODULES}


@every_file
def test_modules_import_only_from_layers_above(name: str) -> None:
    if name == "__init__":
        return
    for other in imported(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        assert layer(other) <= layer(name), f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {name: imported(ast.parse(file.read_text(encoding="utf-8"))) for name, file in MODULES.items()}
    edges = {name: {o if o in edges else f"{o}.__init__" for o in others} for name, others in edges.items()}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in edges.get(name, ()):
            visit(other, (*path, name))

    for name in edges:
        visit(name, ())


def test_the_map_has_every_module() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[2]
        for line in page.split("## Layers")[1].split("\n## ")[0].splitlines()
        if line.startswith("| ")
    ]
    told = [{name.strip(" `") for name in row.split(",")} for row in rows[2:]]
    assert told == LAYERS
    assert set().union(*LAYERS) == {name.split(".")[0] for name in MODULES} - {"__init__"}


@every_file
def test_libraries_do_not_print(name: str) -> None:
    if name.startswith("cli"):
        return
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {(ast.unparse(call.func), call.lineno) for call in calls}
    assert not [
        found for found in names if found[0] in ("print", "sys.stdout.write", "sys.stderr.write", "warnings.warn")
    ]


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes at the top of a module, and public methods of public classes, without a docstring.

    Properties, whose names say it, and a TypedDict's or protocol's stubs are left out.
    """
    out = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for part in (node, *inside):
            if not isinstance(part, (ast.FunctionDef, ast.ClassDef)) or part.name.startswith("_"):
                continue
            is_property = any("property" in ast.unparse(d) for d in part.decorator_list)
            if not is_property and ast.get_docstring(part) is None:
                out.append(f"{node.name}.{part.name}" if part is not node else node.name)
    return out


@every_file
def test_everything_public_has_a_docstring(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or (name.startswith("cli") and tree.body), f"{name} does not say what it is"
    found = undocumented(tree)
    if name.startswith("cli"):  # each command's `run` is told by its module, and Typer shows the root's help by itself
        found = [f for f in found if f not in ("run", "root")]
    assert not found
