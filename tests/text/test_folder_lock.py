"""One writer: a second one is told who holds the folder, and a process that died holds nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from calm.text.folder_lock import FolderInUse, FolderLock
from calm.text.prepare import prepare
from calm.text.shards import open_data

HOLD = """
import sys, time
from calm.text.folder_lock import FolderLock
with FolderLock(sys.argv[1], "calm data prepare"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_folder(holder, tmp_path):
    with pytest.raises(FolderInUse, match=rf"in use by calm data prepare \(process {holder.pid} on .*, since 20") as caught:
        FolderLock(tmp_path, "x").__enter__()
    assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 75
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    with pytest.raises(FolderInUse, match=f"process {holder.pid}"):
        prepare(tmp_path / "a.txt", tmp_path, "bytes", quiet=True)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_killed_process_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with FolderLock(tmp_path, "x"):
            assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.json"}
        assert not list(tmp_path.iterdir())


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), FolderLock(tmp_path, "x"):
        raise KeyError
    with FolderLock(tmp_path, "x"), pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        FolderLock(tmp_path, "y").__enter__()
    assert not list(tmp_path.iterdir())


def test_complete_data_needs_no_lock(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    first = prepare(tmp_path / "a.txt", tmp_path / "data", "bytes", quiet=True)
    (tmp_path / "data").chmod(0o500)
    try:
        assert prepare(tmp_path / "a.txt", tmp_path / "data", "bytes", quiet=True) == first
        with FolderLock(tmp_path, "x"):
            open_data(tmp_path / "data")
    finally:
        (tmp_path / "data").chmod(0o700)


def test_many_processes_take_turns(tmp_path):
    """Each one writes a file, expects it to be its own a moment later, and tries again while the folder is in use."""
    code = """
import pathlib, sys, time
from calm.text.folder_lock import FolderInUse, FolderLock
path = pathlib.Path(sys.argv[1]) / "turn"
done = 0
while done < 5:
    try:
        with FolderLock(sys.argv[1], "turn"):
            assert not path.exists()
            path.write_text(sys.argv[2])
            time.sleep(0.002)
            assert path.read_text() == sys.argv[2]
            path.unlink()
            done += 1
    except FolderInUse:
        time.sleep(0.001)
"""
    start = time.monotonic()
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)]) for number in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert time.monotonic() - start < 60 and not list(tmp_path.iterdir())
