"""Corpus `pydoc`: the English documentation inside every CPython. Needs no network; varies with the Python version.

Three kinds of documents: each topic of the language reference (`pydoc_data.topics`); each module's docstring with those of its
functions; each class's docstring with those of its methods. Docstrings are dedented and follow the name of what they
describe. The files are parsed with `ast` and never imported, so nothing of them runs.
"""

import ast
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LICENSE = "PSF-2.0"
MINIMUM = 200  # characters of a document: shorter ones are a name and half a sentence
REPEATED = 0.3  # documents with a larger share of paragraphs that came before are left out, lest they leak between splits

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo", "topics.py"}


def python_version() -> str:
    """Version of Python, which decides the corpus, such as "CPython 3.11.7"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def python_documents(library: Path | None = None) -> Iterator[str]:
    """Yields every document once, in a fixed order. `library` is the standard library's folder (default: this Python's)."""
    library = library or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for text in _all_documents(library):
        text = re.sub(r"[ \t]+\n", "\n", text).strip()
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        known = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if len(text) >= MINIMUM and known <= REPEATED * len(text):
            seen.update(paragraph for paragraph in paragraphs if len(paragraph) >= 40)
            yield text + "\n"


def _all_documents(library: Path) -> Iterator[str]:
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        for statement in _parse(topics).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                # the longest first: many topics are parts of a longer one
                yield from sorted(ast.literal_eval(statement.value).values(), key=lambda text: (-len(text), text))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED.isdisjoint(relative.parts) and not relative.name.startswith(("test_", "_sysconfigdata")):
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            yield from _group(_parse(path), module)


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in somebody else's strings
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ast.Module(body=[], type_ignores=[])


def _group(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    """Yields the docstring of `node` with those of its functions, then the same for each class in it."""
    parts = [_entry(node, name)]
    parts += [
        _entry(child, f"{name}.{child.name}")
        for child in node.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    yield "\n\n".join(part for part in parts if part)
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _group(child, f"{name}.{child.name}")


def _entry(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    docstring = ast.get_docstring(node, clean=False)
    return f"{name}\n\n{inspect.cleandoc(docstring)}" if docstring and docstring.strip() else ""
