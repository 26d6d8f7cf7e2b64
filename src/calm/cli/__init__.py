"""The command line: one file a verb, each of which parses, calls the library and prints.

A verb is a frozen dataclass. Its fields are its options, its docstring is its help, and

    run() -> Mapping            does the work; what it returns is the JSON object of `--json`
    show(result) -> str         what a person reads instead (without it: one `key: value` line each)

`main` finds the verb, hands the rest of the line to `calm.cli.arguments` and turns every failure into one line and an exit
code (`calm.errors`). Nothing heavy is imported before the verb is known, so `calm --help` stays quick.
"""

import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from calm.cli.allocator import restart_with_huge_pages
from calm.errors import CalmError, UsageError
from calm.registry import suggestion


class Verb(NamedTuple):
    """Where a verb lives, and its line in `calm --help`."""

    module: str
    name: str
    help: str


VERBS = {
    "quickstart": Verb("quickstart", "Quickstart", "train and measure a small model on text that is already on this machine"),
    "data prepare": Verb("data", "DataPrepare", "turn text into a tokenizer and memory-mapped token shards"),
    "data inspect": Verb("data", "DataInspect", "show counts, bytes per token and decoded examples of prepared data"),
    "train autoencoder": Verb("train", "TrainAutoencoder", "stage 1: learn chunk <-> latent"),
    "train lm": Verb("train", "TrainLM", "stage 2: learn to predict the next latent"),
    "train token-lm": Verb("train", "TrainTokenLM", "the baseline: learn to predict the next token on the same backbone"),
    "train critic": Verb("critic", "TrainCritic", "a critic of latents for calm align, from labelled text or from words"),
    "evaluate": Verb("evaluate", "Evaluate", "score a run: reconstruction, BrierLM with intervals"),
    "generate": Verb("generate", "Generate", "continue prompts, streaming chunk by chunk"),
    "dual generate": Verb("dual", "DualGenerate", "let CALM draft what a token model writes; nothing is lost"),
    "dual measure": Verb("dual", "DualMeasure", "drafting beside the token model alone: tokens a pass, a second, FLOPs"),
    "dual route": Verb("dual", "DualRoute", "fit a router that gives each chunk to one of two models, and score it"),
    "frontier": Verb("frontier", "Frontier", "accuracy against collision over temperatures and numbers of candidates"),
    "import official": Verb("import_model", "ImportOfficial", "read a published PyTorch checkpoint into a folder of ours"),
    "inspect autoencoder": Verb("inspect", "InspectAutoencoder", "look at latents: noise, KL, spread, smoothness"),
    "inspect losses": Verb("inspect", "InspectLosses", "what a language model's loss was made of, step by step, as .npz"),
    "diagnose": Verb("diagnose", "Diagnose", "name the first stage at which a language model fails"),
    "align": Verb("align", "Align", "change the weights for one prompt by what is wanted, and write"),
    "experiment": Verb("experiment", "Experiment", "run a study of many short runs at equal compute, resumable cell by cell"),
    "export": Verb("export", "Export", "write a run as safetensors + config.json + tokenizer.json + model card"),
    "doctor": Verb("doctor", "Doctor", "say what this machine can do, what is missing and how to get it"),
}

COMMON = """\
Every command also takes:
  --config FILE   TOML under the command line; repeatable, later files win
  --preset NAME   a named configuration under the files (where the command has presets)
  --json          exactly one JSON object on standard output; everything else goes to standard error
  -v, --verbose   a traceback with an error (so does CALM_DEBUG=1)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, or that of the `calm.errors` class raised; 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    words, rest = _split_verb(arguments)
    heavy = ("quickstart", "train", "evaluate", "inspect", "diagnose", "align", "experiment")
    if argv is None and words.split(" ")[0] in heavy:  # a process of its own, and heavy work
        restart_with_huge_pages()
    as_json = "--json" in rest
    verbose = bool({"-v", "--verbose"} & set(rest)) or os.environ.get("CALM_DEBUG", "") not in ("", "0")
    try:
        return _run(words, rest, as_json)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, as_json)
    except CalmError as error:
        return _fail(str(error), error.exit_code, as_json, verbose)
    except BrokenPipeError:  # the reader (head, less) left; point the flush at exit somewhere harmless
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a missing file, no permission: the system's own words name the path
        return _fail(str(error), 1, as_json, verbose)
    except Exception as error:  # a fault of ours, not of the input
        hint = "" if verbose else " (add -v for the traceback)"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 1, as_json, verbose)


def _run(words: str, rest: list[str], as_json: bool) -> int:
    if not words and (not rest or rest[0] in ("-h", "--help", "--version")):
        print(f"calm {version()}" if rest[:1] == ["--version"] else help_page())
        sys.stdout.flush()  # here, where a reader that has left is nobody's error
        return 0
    if words not in VERBS:
        return _unknown_verb(words, rest)
    from calm.cli.arguments import parse

    verb = VERBS[words]
    cls = getattr(importlib.import_module(f"calm.cli.{verb.module}"), verb.name)
    command = parse(cls, rest, prog=f"calm {words}", epilogue=COMMON)
    if command is None:  # --help was printed
        return 0
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = command.run()
    if as_json:
        print(json.dumps(plain(result), allow_nan=False))
    else:
        text = command.show(result) if hasattr(command, "show") else describe(result)
        if text:
            print(text)
    sys.stdout.flush()
    return 0


# -- finding the verb -------------------------------------------------------------------------------------------------


def _split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """(["train", "lm", "--seed", "1"]) -> ("train lm", ["--seed", "1"])."""
    if not arguments or arguments[0].startswith("-"):
        return "", arguments
    groups = {words.split()[0] for words in VERBS if " " in words}
    if arguments[0] in groups and len(arguments) > 1 and not arguments[1].startswith("-"):
        return f"{arguments[0]} {arguments[1]}", arguments[2:]
    return arguments[0], arguments[1:]


def _unknown_verb(words: str, rest: list[str]) -> int:
    if not words:
        raise UsageError(f"the command comes first, then its options; got {rest[0]!r}; see calm --help")
    within = [name for name in VERBS if name.startswith(words.split()[0] + " ")]
    if words in {name.split()[0] for name in within}:  # `calm train`, `calm train --help`
        if {"-h", "--help"} & set(rest):
            print(help_page(within))
            return 0
        raise UsageError(f"calm {words} needs one of: {', '.join(name.split()[1] for name in within)}")
    raise UsageError(f"unknown command {words!r}{suggestion(words, within or VERBS)}; see calm --help")


def help_page(names: Sequence[str] = ()) -> str:
    """`calm --help`, or the part of it that a group such as `train` has."""
    names = names or list(VERBS)
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {VERBS[name].help}" for name in names]
    head = ["usage: calm COMMAND [OPTIONS]", "", "Continuous autoregressive language models.", ""]
    tail = ["", COMMON, "", "calm COMMAND --help shows a command's own options; calm --version the version."]
    return "\n".join([*head, "commands:", *lines, *tail])


def version() -> str:
    """The installed version of calm-lm, or `unknown` when it runs from a folder that was never installed."""
    from importlib import metadata

    try:
        return metadata.version("calm-lm")
    except metadata.PackageNotFoundError:
        return "unknown"


# -- printing ---------------------------------------------------------------------------------------------------------


def describe(result: Any) -> str:
    """One `key: value` line each, nested keys dotted."""
    lines: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            lines.append(f"{prefix}: {value:.6g}" if isinstance(value, float) else f"{prefix}: {value}")

    walk("", plain(result))
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Converts to JSON values: arrays become lists, paths text, a number that is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "to_dict"):  # a report
        return plain(value.to_dict())
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return plain(value.tolist())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def _fail(message: str, code: int, as_json: bool, verbose: bool = False) -> int:
    if verbose:
        traceback.print_exc(file=sys.stderr)
    line = " ".join(message.split()) or "failed"
    print(f"calm: {line}", file=sys.stderr)
    if as_json:  # a machine that asked for one object gets one, also now
        print(json.dumps({"error": line, "exit_code": code}))
    return code
