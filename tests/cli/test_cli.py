"""The command line: quick, one line on failure, one JSON object on request, the right exit code."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
from typing import Annotated

import pytest
import tyro

from calm import cli
from calm.errors import CalmError, DivergedError, MissingExtraError, Preempted, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """A part.

    Args:
        layers: how deep it is
    """

    layers: int = 4
    pattern: tuple[str, ...] = ("A",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 10
    """Optimiser steps."""
    rate: float = 0.1
    limit: int | None = None
    model: Inner = Inner()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Does what its words say."""

    configuration = "run_settings"

    out: str
    """Where it goes."""
    raises: str = ""
    run_settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()

    @classmethod
    def from_preset(cls, name):
        if name != "big":
            raise UsageError(f"no preset {name!r}")
        return Settings(steps=1000, rate=0.5)

    def run(self):
        print("working")
        errors = {"diverged": DivergedError("step 7"), "extra": MissingExtraError("pip install 'calm-lm[data]'")}
        errors |= {"preempted": Preempted("saved"), "plain": CalmError("two\nlines"), "interrupt": KeyboardInterrupt()}
        errors |= {"disk": OSError(28, "No space left on device", "runs/x"), "bug": TypeError("oops")}
        if self.raises:
            raise errors[self.raises]
        return {"out": self.out, "settings": dataclasses.asdict(self.run_settings), "bad": float("nan")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy:
    """Files fill its own fields."""

    out: str
    seed: int = 0

    def run(self):
        return {"out": self.out, "seed": self.seed}


@pytest.fixture(autouse=True)
def probe(monkeypatch):
    module = types.ModuleType("calm.cli.probe")
    module.__dict__.update(Probe=Probe, Needy=Needy)
    monkeypatch.setitem(sys.modules, "calm.cli.probe", module)
    monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("probe", "Probe", "a verb for tests"))
    monkeypatch.setitem(cli.VERBS, "needy", cli.Verb("probe", "Needy", "a verb for tests"))


def call(capsys, *words):
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def settings(capsys, *words):
    code, out, err = call(capsys, "probe", "--out", "o", "--json", *words)
    assert code == 0, err
    return json.loads(out)["settings"]


def test_command_line_beats_files_beats_preset_beats_defaults(capsys, tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('steps = "3k"\n[model]\nlayers = 8\n')
    second.write_text("[model]\nlayers = 6\n")
    assert settings(capsys)["steps"] == 10
    found = settings(capsys, "--preset", "big", "--config", str(first), f"--config={second}", "--model.pattern", "S", "H")
    assert found == {"steps": 3000, "rate": 0.5, "limit": None, "model": {"layers": 6, "pattern": ["S", "H"]}}
    assert settings(capsys, "--config", str(first), "--model.layers", "2", "--steps", "2M")["steps"] == 2_000_000
    assert settings(capsys, "--limit", "30k")["limit"] == 30_000
    assert settings(capsys, "--limit", "none")["limit"] is None


def test_files_fill_the_fields_of_a_plain_verb(capsys, tmp_path):
    file = tmp_path / "needy.toml"
    file.write_text('out = "there"\n')
    assert json.loads(call(capsys, "needy", "--config", str(file), "--seed", "2k", "--json")[1]) == {
        "out": "there",
        "seed": 2000,
    }
    assert call(capsys, "needy", "--config", str(file))[1] == "out: there\nseed: 0\n"
    file.write_text("sed = 1\n")
    code, _, err = call(capsys, "needy", "--config", str(file), "--out", "o")
    assert code == 2 and "unknown key 'sed' (did you mean 'seed'?)" in err
    assert call(capsys, "needy", "--preset", "big")[0] == 2


def test_json_is_one_object_alone_on_standard_output(capsys):
    code, out, err = call(capsys, "probe", "--out", "o", "--json")
    assert code == 0 and json.loads(out)["bad"] is None and out.count("\n") == 1 and "working" in err
    code, out, err = call(capsys, "probe", "--out", "o", "--json", "--raises", "diverged")
    assert json.loads(out) == {"error": "step 7", "exit_code": 3} and "calm: step 7" in err


@pytest.mark.parametrize(
    ("raises", "code", "words"),
    [
        ("diverged", 3, "step 7"),
        ("extra", 69, "pip install 'calm-lm[data]'"),
        ("preempted", 75, "saved"),
        ("plain", 1, "two lines"),
        ("interrupt", 130, "interrupted"),
        ("disk", 1, "No space left on device: 'runs/x'"),
        ("bug", 1, "internal error: TypeError: oops (add -v for the traceback)"),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(capsys, monkeypatch, raises, code, words):
    monkeypatch.delenv("CALM_DEBUG", raising=False)
    found, out, err = call(capsys, "probe", "--out", "o", "--raises", raises)
    assert (found, err.count("\n")) == (code, 1) and words in err and out == "working\n"


def test_a_traceback_comes_only_when_asked_for(capsys, monkeypatch):
    words = ["probe", "--out", "o", "--raises", "bug"]
    monkeypatch.delenv("CALM_DEBUG", raising=False)
    assert "Traceback" not in call(capsys, *words)[2]
    assert "Traceback" in call(capsys, *words, "-v")[2]
    monkeypatch.setenv("CALM_DEBUG", "1")
    assert "Traceback" in call(capsys, *words)[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe", "--out", "o", "--model.layrs", "3"], "--model.layrs.*did you mean '--model.layers'"),
        (["probe", "--out", "o", "--steps", "x"], "steps.*whole number such as 300, 30k or 2M, got 'x'"),
        (["probe", "--out", "o", "--steps"], "steps"),
        (["probe"], "--out"),
        (["probe", "--out", "o", "--config"], "--config needs a value"),
        (["probe", "--out", "o", "--config", "/absent.toml"], "/absent.toml: no such configuration file"),
        (["probe", "--out", "o", "--preset", "bigg"], "no preset 'bigg'"),
        (["prob"], "unknown command 'prob' .did you mean 'probe'"),
        (["train", "lmm"], "unknown command 'train lmm' .did you mean 'train lm'"),
        (["train"], "calm train needs one of: autoencoder, lm"),
        (["--seed", "1"], "the command comes first"),
    ],
)
def test_bad_words_end_in_one_line_and_code_two(capsys, words, message):
    code, out, err = call(capsys, *words)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert re.search(message, err), err


def test_help_and_version(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(name in out for name in cli.VERBS)
    assert call(capsys, "train", "--help")[1].count("train ") == 4
    code, out, _ = call(capsys, "probe", "--help")
    assert code == 0 and "Does what its words say." in out and "Optimiser steps." in out and "--config FILE" in out
    assert call(capsys, "--version")[1].startswith("calm ")


def test_every_verb_exists_and_says_what_it_does():
    for words, verb in cli.VERBS.items():
        cls = getattr(importlib.import_module(f"calm.cli.{verb.module}"), verb.name)
        assert dataclasses.is_dataclass(cls) and cls.__doc__ and callable(cls.run), words


def test_help_needs_no_jax_and_half_a_second():
    code = "import sys; from calm.cli import main; main(['--help']); assert not {'jax', 'flax', 'tyro'} & set(sys.modules)"
    seconds = []
    for _ in range(3):  # the fastest of three: other processes share these cores
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=dict(os.environ))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, seconds
