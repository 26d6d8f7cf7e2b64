"""Errors that end a command in one clear line, each with its exit code.

Library code raises these; `calm.cli` prints `str(error)` and exits with `error.exit_code`. A message names the file, key or
argument that is wrong and says what would be right. Nothing else in the package calls `sys.exit`.
"""

import importlib
from types import ModuleType


class CalmError(Exception):
    """A failure that the user can act on. Exit code 1."""

    exit_code = 1


class UsageError(CalmError, ValueError):
    """A bad argument, key, file or combination of them. Exit code 2."""

    exit_code = 2


class DivergedError(CalmError):
    """A loss that stopped being finite; the message names the step. Exit code 3."""

    exit_code = 3


class MissingExtraError(CalmError, ImportError):
    """An optional package is needed; the message holds the pip line. Exit code 69 (EX_UNAVAILABLE)."""

    exit_code = 69


class Preempted(CalmError):
    """The run saved its state and stopped because it was told to. Exit code 75 (EX_TEMPFAIL: run it again)."""

    exit_code = 75


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports `module`, or says which extra of calm-lm brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"this needs the package {module!r}: pip install 'calm-lm[{extra}]'") from error
