"""The folder of a run: what it holds, and how it is written so that nothing written is ever lost.

config.toml     the resolved configuration: alone reproduces the run
meta.json       where and with what it ran: argv, versions, devices, seed, fingerprints, matrix rates, precision
metrics.jsonl   one object a record: step, name -> value; identical, byte for byte, however often the run was interrupted
timing.jsonl    what the clock said at the same steps: seconds, tokens a second, share of the machine's matrix rate
log.txt         lines for people                      best.json   step and score of the best checkpoint
tokenizer.json  checkpoints/  samples/  plots/  export/
"""

import contextlib
import datetime
import errno
import json
import math
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from calm.errors import CalmError, UsageError

NO_SPACE = "no space left to write; what was written before is whole. Free some space and run the same command again"

_FOLDERS = ("checkpoints", "samples", "plots", "export")
_PACKAGES = ("calm-lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("no space left", "file too large", "quota exceeded", "enospc", "efbig")


class RunFolder:
    """Paths and writers of one run. With several hosts only the first writes; on the others every writer does nothing."""

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.config = self.path / "config.toml"
        self.meta = self.path / "meta.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.best = self.path / "best.json"
        self.text_log = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"

    def create(self) -> None:
        """Makes the folder and those in it; existing ones stay as they are."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: is a file; a run needs a folder")
        if self.writes:
            with disk_errors(self.path):
                for name in _FOLDERS:
                    (self.path / name).mkdir(parents=True, exist_ok=True)

    def check_config(self, text: str) -> None:
        """Refuses a folder that holds a run of another configuration, naming the first key that differs."""
        if not self.config.exists():
            return
        difference = first_difference(self.config.read_text(encoding="utf-8"), text)
        if difference is not None:
            key, there, here = difference
            raise UsageError(
                f"{self.path}: holds a run of another configuration: {key} is {there} there and {here} here; "
                'choose another folder, or resume="force" to go on from its checkpoint with the new one'
            )

    def write_config(self, text: str) -> None:
        self.write(self.config, text)

    def write_meta(self, values: Mapping[str, Any]) -> None:
        self.write(self.meta, json.dumps(values, indent=2, default=str) + "\n")

    def read_meta(self) -> dict[str, Any]:
        """Contents of meta.json; {} where there is none, or none that can be read."""
        try:
            return json.loads(self.meta.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def write(self, path: Path, text: str) -> None:
        """A small file, written whole or not at all."""
        if not self.writes:
            return
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """One JSON line. Numbers that JSON cannot hold (nan, inf) become null."""
        if self.writes:
            plain = {key: _plain(value) for key, value in record.items()}
            self._append_line(path, json.dumps(plain))

    def log(self, line: str) -> None:
        """One dated line for people."""
        if self.writes:
            now = datetime.datetime.now().isoformat(timespec="seconds")
            self._append_line(self.text_log, f"{now} {line}")

    def truncate(self, path: Path, records: int) -> None:
        """Keeps the first `records` lines: what was written after the checkpoint from which a run goes on is written again."""
        if not self.writes or not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines[:records] if line.endswith(b"\n")]
        if len(kept) != len(lines):
            self.write(path, b"".join(kept).decode())

    def truncate_at(self, path: Path, step: int) -> None:
        """Keeps the records before `step`."""
        if self.writes and path.is_file():
            self.truncate(path, sum(record["step"] < step for record in read_records(path)))

    def _append_line(self, path: Path, line: str) -> None:
        with disk_errors(path), open(path, "ab", buffering=0) as file:
            data = (line + "\n").encode()
            if file.write(data) != len(data):  # a short write is how a disk says that it has just become full
                raise OSError(errno.ENOSPC, "short write", str(path))


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line cut short by a crash is left out, and so is a file that is not there."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}: line {number} is not a JSON object") from error
    return records


def best_step(path: str | Path) -> int:
    """The step at which a run is to be scored: its best checkpoint, or its last where none was named best."""
    run = RunFolder(path, writes=False)
    steps = [int(entry.name) for entry in run.checkpoints.glob("*") if entry.name.isdigit()]
    if not steps:
        raise UsageError(f"{path}: is not the folder of a run with checkpoints")
    with contextlib.suppress(OSError, ValueError, KeyError):
        step = json.loads(run.best.read_text(encoding="utf-8"))["step"]
        if step in steps:
            return step
    return max(steps)


def first_difference(there: str, here: str) -> tuple[str, Any, Any] | None:
    """The first key, in the order of `here`, at which two TOML texts differ: (dotted key, value there, value here)."""
    old, new = (_flat(tomllib.loads(text)) for text in (there, here))
    missing = "absent"
    for key in [*new, *(key for key in old if key not in new)]:
        pair = old.get(key, missing), new.get(key, missing)
        if pair[0] != pair[1]:
            return key, repr(pair[0]) if key in old else missing, repr(pair[1]) if key in new else missing
    return None


def environment() -> dict[str, Any]:
    """With what this process runs: command line, versions, machine, commit."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "versions": versions,
        "machine": {"host": platform.node(), "system": platform.platform(), "processors": os.cpu_count()},
        "git": git_commit(Path(__file__).parent),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that tracks `folder`, "-dirty" after it where tracked files differ; None outside of one.

    A package installed into an environment inside somebody's repository is not tracked by it.
    """

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() or None if answer.returncode == 0 else None

    return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") if git("ls-files", ".") else None


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the disk, the quota or the largest file size is reached."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error).lower() for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors of the file system as one line that names the path."""
    try:
        yield
    except OSError as error:
        if out_of_space(error):
            raise CalmError(f"{path}: {NO_SPACE}") from error
        raise CalmError(f"{path}: cannot be written: {error.strerror or error}") from error


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int | str | type(None)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.item()) if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)
