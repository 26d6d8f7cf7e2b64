"""A folder is replaced whole or not at all, whenever its writer is killed."""

import os
import subprocess
import sys

import pytest

import calm.runs.whole_folder as whole_folder
from calm.runs.whole_folder import replace_files

NAMES = ["config.json", "part/config.json", "weights", "part/weights"]
MODES = ["exchange", "no exchange", "inside"]


def owned(path: str) -> bool:
    return path.split("/")[-1] in ("config.json", "weights", "index", "part")


def files(version: int) -> dict:
    """Odd versions have a file more, which must be gone from the even ones."""
    names = [*NAMES, "index"] if version % 2 else NAMES
    return {name: lambda path, name=name: path.write_text(f"{name} {version}") for name in names}


def versions(folder) -> set:
    """The versions of the owned files of a folder."""
    return {(folder / name).read_text().split()[-1] for name in names(folder) if owned(name)}


def names(folder) -> list[str]:
    """Files in a folder, without what a killed writer left in its temporary folder."""
    every = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in every if not name.startswith(".calm-export"))


def temporary(folder) -> list:
    return [path for path in folder.parent.rglob("*") if ".calm-export" in str(path)]


@pytest.fixture(params=MODES)
def folder(request, tmp_path, monkeypatch):
    """A place to write to, on a system that can exchange two folders, one that cannot, and where nothing may be beside it."""
    if request.param == "no exchange":
        monkeypatch.setattr(whole_folder, "_exchange", lambda one, other: False)
    if request.param == "inside":
        monkeypatch.setattr(whole_folder, "_can_be_moved", lambda folder: False)
    return tmp_path / "deep" / "out"


def test_files_are_replaced_others_stay_and_nothing_temporary_is_left(folder):
    for version in range(4):
        replace_files(folder, files(version), marker="config.json", owned=owned)
        others = ["link", "notes/mine.txt", "part/mine.txt"] * (version > 0)
        assert versions(folder) == {str(version)} and names(folder) == sorted([*files(version), *others])
        if version == 0:
            (folder / "notes" / "empty").mkdir(parents=True)
            (folder / "notes" / "mine.txt").write_text("mine")
            (folder / "part" / "mine.txt").write_text("mine")
            (folder / "link").symlink_to("notes/mine.txt")
            (folder / "loop").symlink_to(".")
        assert (folder / "link").is_symlink() == (folder / "loop").is_symlink() == (folder / "notes" / "empty").is_dir()
        for name in ("notes/mine.txt", "part/mine.txt", "link"):
            assert (folder / name).read_text() == "mine"
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        assert not temporary(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [False, True])
def test_a_writer_that_fails_leaves_what_was_there(folder, error, before):
    if before:
        replace_files(folder, files(1), marker="config.json", owned=owned)

    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        replace_files(folder, files(2) | {"part/weights": fail}, marker="config.json", owned=owned)
    assert (versions(folder) == {"1"} and names(folder) == sorted(files(1))) if before else not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["out"] * before


KILLED_EVERYWHERE = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import calm.runs.whole_folder as whole_folder
from test_whole_folder import files, names, owned, temporary, versions
folder, mode = pathlib.Path(sys.argv[2]), sys.argv[3]
if mode == "no exchange":
    whole_folder._exchange = lambda one, other: False
if mode == "inside":
    whole_folder._can_be_moved = lambda folder: False
whole_folder.replace_files(folder, files(0), marker="config.json", owned=owned)
(folder / "mine.txt").write_text("mine")
version, moment, torn, stayed, code = 0, 0, 0, 0, 9
while code == 9:
    version, moment, before = version + 1, moment + 1, versions(folder)
    child = os.fork()
    if child == 0:
        seen = 0
        def watch(event, arguments):
            global seen
            seen += event.split(".")[0] in ("open", "os", "shutil")
            if seen == moment:
                os._exit(9)
        sys.addaudithook(watch)
        whole_folder.replace_files(folder, files(version), marker="config.json", owned=owned)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    assert (folder / "mine.txt").read_text() == "mine"
    after, whole = versions(folder), (folder / "config.json").exists()
    if whole:
        assert after in (before, {str(version)}) and len(after) == 1, (moment, before, after)
        present = {name for name in names(folder) if owned(name)}
        assert present == set(files(int(*after))), (moment, present)
        stayed += after == before
    else:
        torn += 1
        whole_folder.replace_files(folder, files(version), marker="config.json", owned=owned)
assert versions(folder) == {str(version)} and stayed > 10
assert [path.name for path in folder.parent.iterdir()] == [folder.name], list(folder.parent.iterdir())
assert not temporary(folder), temporary(folder)
print(moment, torn)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_moment_the_folder_is_the_old_or_the_new_one(tmp_path, mode):
    """A process is killed before its first, second, ... call to the system, until one comes through."""
    arguments = [os.path.dirname(__file__), str(tmp_path / "place" / "out"), mode]
    done = subprocess.run([sys.executable, "-c", KILLED_EVERYWHERE, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    moments, torn = map(int, done.stdout.split())
    assert moments > 20
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    if mode == "exchange" and whole_folder._exchange(tmp_path / "one", tmp_path / "other"):
        assert torn == 0  # where folders can be exchanged, there is always a whole one
