"""The smallest text, settings and commands that go through everything; for tests of commands, examples and documents."""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

TRAIN = "--train.steps 4 --train.batch-size 2 --train.num-tokens 192 --train.precision float32".split()
AUTOENCODER = [*"--model.dim 16 --model.inner-dim 16 --model.latent-dim 8".split(), *TRAIN]
BACKBONE = "--model.backbone.dim 16 --model.backbone.num-layers 2 --model.backbone.inner-dim 16".split()
HEADS = "--model.backbone.num-heads 2 --model.backbone.num-kv-heads 2".split()
LM = [*BACKBONE, *HEADS, *"--model.head.num-blocks 1 --model.head.noise-dim 4 --loss.num-samples 2".split(), *TRAIN]


def write_corpus(folder: Path, documents: int = 40, seed: int = 0) -> None:
    """Small sentences, one file a document."""
    draw = random.Random(seed)
    nouns = "cat dog river stone house tree bird child king road".split()
    verbs = "sees finds follows holds leaves".split()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        sentences = [
            f"The {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)}." for _ in range(draw.randint(8, 16))
        ]
        (folder / f"{number:03}.txt").write_text(" ".join(sentences))


def calm(*words: str) -> tuple[int, Any, str]:
    """Runs a command with --json; returns its exit code, its object and what went to standard error."""
    from calm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, "--json"])
    return code, json.loads(out.getvalue()), err.getvalue()


def run(*words: str) -> Any:
    """As `calm`, for a command that must succeed."""
    code, result, err = calm(*words)
    assert code == 0, f"calm {' '.join(words)}: {err}"
    return result
