"""The house: imports point one way, files stay short, text stays free of jax, words stay the same."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "calm"
# Lowest first: a room imports only itself and those before it.
# fmt: off
ROOMS = (
    "errors", "registry", "shapes", "rng", "config", "worlds", "text", "core", "heads", "decoders", "hybrid", "posteriors",
    "train", "evaluate", "token", "runs", "interop", "lab", "ttt", "dual", "serve", "studies", "cli",
)
# fmt: on
FILES = sorted(PACKAGE.rglob("*.py"))
FACADE = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}  # the public names and `python -m calm`, above every layer


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path, source: str | None = None) -> set[str]:
    """The layers that a file imports, at its top or inside a function, absolutely or relatively; `` is calm itself."""
    found = set()
    package = ("calm", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text() if source is None else source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "calm" else [module]
        for parts in (name.split(".") for name in names):
            if parts[0] == "calm":
                found.add(parts[1] if len(parts) > 1 else "")
    return found


def test_imports_point_one_way():
    wrong = []
    for file in FILES:
        if file in FACADE:
            continue
        layer = room_of(file)
        assert layer in ROOMS, f"{file}: give {layer!r} a place in ROOMS"
        allowed = set(ROOMS[: ROOMS.index(layer) + 1])
        here = file.relative_to(PACKAGE).as_posix()
        wrong += [f"{here} imports calm.{name}" for name in imported_rooms(file) - allowed]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("import calm.core.dense", {"core"}),
        ("from calm.core import dense", {"core"}),
        ("from calm import core, rng", {"core", "rng"}),
        ("from . import loop", {"train"}),
        ("from .loop import run", {"train"}),
        ("from ..cli import main", {"cli"}),
        ("from .. import cli", {"cli"}),
        ("def late():\n    from calm.cli import main", {"cli"}),
        ("import calm", {""}),
        ("import calmer.nn, numpy", set()),
    ],
)
def test_the_room_reader_sees_every_form_of_import(source, layers):
    assert imported_rooms(PACKAGE / "train" / "steps.py", source) == layers


def module_of(file: Path) -> str:
    return ".".join(("calm", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_no_circle_of_files():
    """At the top of a file or inside a function."""
    modules = {module_of(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "calm":
                found = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                graph.setdefault(name, set()).update((found or {node.module} & modules.keys()) - {name})
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def explained(text: str) -> set[str]:
    """Letters that a legend explains: "B batch", "Y latent width of a part"."""
    return set(re.findall(r"(?:^|[\s·(,])([A-Z]\w?) +(?=[a-z\[])", text))


def test_axis_letters_are_in_a_legend():
    """In that of shapes.py, or in the docstring of the file or of the definition that uses them."""
    shared, wrong = explained((PACKAGE / "shapes.py").read_text()), []
    for file in FILES:
        source = file.read_text()
        known = shared | explained(ast.get_docstring(ast.parse(source)) or "")
        used = {
            letter.lstrip("*#_.?+")
            for annotation in re.findall(r'(?:Float|Int|Bool|Integer)\[[^,\]]+, "([^"]*)"\]', source)
            for letter in annotation.split()
        }
        wrong += [f"{file.relative_to(ROOT)}: {x}" for x in sorted(used - known) if re.fullmatch(r"[A-Z]", x)]
    assert not wrong, wrong


def test_no_file_over_500_lines():
    files = [file for folder in ("src", "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]
    long = {str(file.relative_to(ROOT)): count for file in files if (count := len(file.read_text().splitlines())) > 500}
    assert not long, long


def test_examples_stay_within_a_hundred_lines():
    """But for the paper in one file, which is to be read as a whole."""
    files = set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "calm_in_one_file.py"}
    long = [file.name for file in files if len(file.read_text().splitlines()) > 100]
    assert not long, long


def test_text_in_numpy_out():
    files = [*(PACKAGE / "text").rglob("*.py"), *(PACKAGE / "worlds").rglob("*.py")]
    modules = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    modules = [name.removesuffix(".__init__") for name in [*modules, "calm.config", "calm.errors"]]
    code = f"import sys, {', '.join(modules)}; sys.exit(bool({{'jax', 'flax'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "text/, worlds/ or config imports jax"


def test_the_ngram_baseline_is_numpy_only():
    source = (PACKAGE / "evaluate" / "ngram.py").read_text()
    roots = {name.split(".")[0] for name in re.findall(r"^\s*(?:import|from) ([\w.]+)", source, re.MULTILINE)}
    assert not roots & {"jax", "flax", "optax"}, roots


def test_a_chunk_is_called_a_chunk():
    """The published code says patch; so may the file that reads its format, and activation patching is another thing."""
    exempt = {"interop", "interp"}
    files = [file for file in FILES if file in FACADE or room_of(file) not in exempt]
    word = re.compile(r"(?<!matplotlib\.)(?<![A-Za-z])patch(?:es|_\w+)?(?![A-Za-z])", re.IGNORECASE)
    wrong = [f"{file.relative_to(ROOT)}: {match[0]}" for file in files for match in word.finditer(file.read_text())]
    assert not wrong, wrong


def test_test_files_have_names_of_their_own():
    counts = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in counts.items() if count > 1]
