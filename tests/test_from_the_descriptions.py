"""docs/from-the-descriptions.md keeps its word: what it says runs is run, what it calls an option is parsed."""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import tiny
from calm import cli
from calm.cli.arguments import parse
from calm.runs import presets

PAGE = (Path(__file__).parent.parent / "docs" / "from-the-descriptions.md").read_text()
STATUSES = ("runs", "option", "here", "network", "later")
SMALLER = {
    "train autoencoder": tiny.AUTOENCODER,
    "train lm": tiny.LM,
    "evaluate": ["--max-tokens", "256", "--num-samples", "2"],
    "generate": ["--max-tokens", "8", "--candidates", "4"],
    "align": "--samples 4 --chunks 4 --max-tokens 16".split(),  # what snippet 5 has compiled as well
    "quickstart": ["--source", "text/pile", "--max-tokens", "256"],
    "experiment": ["--only", "SHA", "--max-tokens", "1024"],
}


class Row(NamedTuple):
    theirs: str
    ours: str
    status: str

    @property
    def commands(self) -> list[str]:
        return [span for span in re.findall(r"`([^`]+)`", self.ours) if re.match(r"calm [a-z]", span)]


def rows() -> list[Row]:
    cells = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    found = [Row(*(cell.strip() for cell in [*row[:-1], row[-1]])) for row in (split(line) for line in cells) if row]
    return [row for row in found if row.theirs != "theirs"]


def split(cells: list[str]) -> list[str]:
    """Three cells; the middle one may be empty."""
    joined = " | ".join(cells)
    parts = [part.strip() for part in re.split(r"(?<!\\)\|", joined)]
    assert len(parts) == 3, f"not three cells: {joined}"
    return parts


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def parsed(command: str):
    words, rest = cli._split_verb(shlex.split(command)[1:])
    verb = cli.VERBS[words]
    cls = getattr(importlib.import_module(f"calm.cli.{verb.module}"), verb.name)
    return words, parse(cls, rest, prog=words)


@pytest.fixture
def tiny_preset(monkeypatch):
    """The quickstart preset with the smallest models, under its own name."""
    from calm.cli.train import TrainAutoencoder, TrainLM

    settings = [
        parse(cls, ["--out", "unused", *words], prog="tiny").settings
        for cls, words in ((TrainAutoencoder, tiny.AUTOENCODER), (TrainLM, tiny.LM))
    ]
    preset = presets.Preset(name="quickstart", summary="", tokenizer="bytes", autoencoder=settings[0], lm=settings[1])
    original = presets.get
    monkeypatch.setattr(presets, "get", lambda name: preset if name == "quickstart" else original(name))


def test_every_row_has_a_status_and_what_it_promises():
    assert len(rows()) > 60
    for row in rows():
        status = row.status.split(":")[0]
        assert status in STATUSES, row
        if status == "later":
            assert not row.ours and row.status.startswith("later: "), row
        else:
            assert row.ours, row
        if status in ("runs", "option"):
            assert row.commands or "snippet" in row.ours, row


def test_all_four_descriptions_are_there():
    titles = ["Hybrid CALM-on-Z", "Calm-Seal", "Hybrid Hopfield-SSM Language Model", "The CALM research plan"]
    assert [line[3:] for line in PAGE.splitlines() if line.startswith("## ")][:4] == titles


def test_every_command_line_is_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lm.toml").write_text(blocks("toml")[0])
    commands = [command for row in rows() for command in row.commands if row.status in ("runs", "option")]
    assert len(commands) > 20
    for command in commands:
        words, verb = parsed(command)
        assert verb is not None and words in cli.VERBS, command


@pytest.mark.parametrize("from_scratch", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_what_runs_runs(from_scratch, tiny_runs, tmp_path, monkeypatch, tiny_preset):
    """In the order of the page, data first; the snippets last, in the folder that the commands have filled.

    By default what trains is left out, and the runs are those that the fixture trained with the same commands.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALM_HOME", str(tmp_path / "home"))
    links = {"text/pile": "text", "text/wikitext103": "text", "data/wikitext103": "data"}
    if not from_scratch:
        links |= {"data/pile": "data", "runs/z/lm": "lm", "runs/calm_m_k4": "lm", "runs/autoencoder_k4": "autoencoder"}
    for name, target in links.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(tiny_runs / target)
    Path("lm.toml").write_text(blocks("toml")[0])
    commands = [command for row in rows() for command in row.commands if row.status == "runs"]
    commands = list(dict.fromkeys(sorted(commands, key=lambda command: not command.startswith("calm data prepare"))))
    for command in commands:
        words = cli._split_verb(shlex.split(command)[1:])[0]
        fixed = words.startswith("train") or words in ("quickstart", "experiment") or "--out data/pile" in command
        if from_scratch or not fixed:
            tiny.run(*[word for word in shlex.split(command)[1:] if word != "--json"], *SMALLER.get(words, []))
    for number, snippet in enumerate(blocks("python"), 1):
        exec(compile(snippet, f"snippet {number}", "exec"), {"__name__": "snippet"})
