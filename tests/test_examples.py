"""The examples run as they stand, one after the other, with small settings."""

import runpy
import sys
from pathlib import Path

import pytest

import tiny

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SMALLER = {
    "01_autoencoder.py": "--out out --source text --tokenizer bytes --steps 3 --dim 16 --num-tokens 192".split(),
    "02_next_vector_lm.py": "--out out --steps 3 --dim 64 --layers 1 --num-tokens 192".split(),
    "03_generate_and_score.py": "out/lm --max-tokens 8 --score-tokens 256 --candidates 4".split(),
    "calm_in_one_file.py": "--autoencoder-steps 2 --lm-steps 2 --characters 6000".split(),
}
SAYS = {
    "01_autoencoder.py": "held-out tokens",
    "02_next_vector_lm.py": "comes one of",
    "03_generate_and_score.py": "BrierLM",
    "calm_in_one_file.py": "BrierLM",
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES} == set(SMALLER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    tiny.write_corpus(folder / "text")
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run_in_order(path, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [path.name, *SMALLER[path.name]])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.name] in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(path):
    assert f"python examples/{path.name}" in path.read_text()
