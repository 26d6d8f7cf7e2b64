"""Replaces the files of a folder together: after an interruption at any moment it holds the old ones or the new ones, whole.

The new files are written to a temporary folder first. Where `folder` is new, that folder is renamed to it. Where it is
complete already, both change places in one system call, and the old one is removed. Where the system has no such call, or the
folder cannot be moved (a mount point, the working directory), the files are moved one after another: an interruption then
leaves a folder without its `marker`, which nobody takes for complete, and never a mixture that somebody does.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Writer = Callable[[Path], object]  # writes one file at the path that it is given

_PREFIX, _SUFFIX = ".calm-export-", ".partial"


def replace_files(folder: Path, files: Mapping[str, Writer], *, marker: str, owned: Callable[[str], bool]) -> None:
    """Makes `files`, by path relative to `folder`, all of its owned files; files that are not owned stay as they are.

    Args:
        marker: the file that a complete folder has.
        owned: whether a path, relative and with forward slashes, is of the kind that is replaced.
    Raises:
        OSError: the files cannot be written; `folder` is as it was, or (see above) without its marker.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.is_dir() and not _can_be_moved(folder)
    parent = folder if inside else folder.parent
    for place in (folder.parent, folder):
        _remove_stale(place)
    staged = parent / f"{_PREFIX}{secrets.token_hex(4)}.{os.getpid()}.{_host()}{_SUFFIX}"
    nearer = folder / staged.name
    try:
        staged.mkdir()
        for name, write in files.items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            path.chmod(0o644)  # some writers make files that only their owner can read
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _sync_folders(*_folders(staged))
        if not folder.exists():
            staged.rename(folder)
        elif inside or not (folder / marker).exists() or not _exchange_keeping(staged, folder, owned):
            if not inside:
                shutil.move(staged, nearer)  # renames do not lead from one filesystem to another
            _move_one_by_one(nearer, folder, files, marker, owned)
        _sync_folders(folder.parent, *{(folder / name).parent for name in files})
    finally:
        for path in (staged, nearer):
            shutil.rmtree(path, ignore_errors=True)


def _can_be_moved(folder: Path) -> bool:
    """Whether a new folder may take this one's place: programs that work in it would be left in one that is gone."""
    return not (folder.is_mount() or Path.cwd().is_relative_to(folder)) and os.access(folder.parent, os.W_OK)


def _exchange_keeping(staged: Path, folder: Path, owned: Callable[[str], bool]) -> bool:
    """Adds the files that are not owned to `staged`, as links, and lets the two change places; False if it cannot be done."""
    try:
        for source in _below(folder):
            relative = source.relative_to(folder)
            if owned(relative.as_posix()):
                continue
            place = staged / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                place.symlink_to(os.readlink(source))
            elif source.is_dir():
                place.mkdir(exist_ok=True)
            else:
                _link(source, place)
        shutil.copymode(folder, staged)
        _sync_folders(*_folders(staged))
    except OSError:  # such as a folder that we may not read
        return False
    return _exchange(staged, folder)


def _below(folder: Path) -> Iterator[Path]:
    """Everything in `folder`, without following links; what cannot be listed is an error."""
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _folders(folder: Path) -> list[Path]:
    return [folder, *(path for path in _below(folder) if path.is_dir() and not path.is_symlink())]


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a filesystem without links
        shutil.copy2(source, place)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one step; False, and nothing done, where the system cannot."""
    call, here, swap = None, -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    with contextlib.suppress(OSError, TypeError):
        library = ctypes.CDLL(None)
        call = getattr(library, "renameat2" if sys.platform == "linux" else "renamex_np", None)
    if call is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    arguments = (here, paths[0], here, paths[1]) if sys.platform == "linux" else paths
    return call(*arguments, ctypes.c_uint(swap)) == 0


def _move_one_by_one(
    staged: Path, folder: Path, files: Mapping[str, Writer], marker: str, owned: Callable[[str], bool]
) -> None:
    (folder / marker).unlink(missing_ok=True)
    for path in [path for path in folder.rglob("*") if staged not in path.parents]:
        relative = path.relative_to(folder).as_posix()
        if owned(relative) and relative not in files and (path.is_symlink() or not path.is_dir()):
            path.unlink()
    for name in sorted(files, key=lambda name: name == marker):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(folder / name)


def _sync_folders(*folders: Path) -> None:
    """Makes the names in these folders last, where the system can."""
    if os.name != "posix":
        return
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(parent: Path) -> None:
    """Removes temporary folders of processes of this machine that are no more."""
    if os.name != "posix" or not parent.is_dir():
        return
    pattern = re.compile(rf"{re.escape(_PREFIX)}\w+\.(\d+)\.{re.escape(_host())}{re.escape(_SUFFIX)}")
    for path in parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:60]
