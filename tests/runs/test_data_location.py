"""A run finds its data from any directory, and says what to pass where it cannot."""

import shutil

import pytest

import calm
import tiny
from calm.errors import UsageError


@pytest.fixture
def moved(tiny_runs, tmp_path):
    """A project folder with data and a run trained from inside it by relative names, then moved elsewhere."""
    project, cwd = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    cwd.mkdir()
    shutil.copytree(tiny_runs / "data", project / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        tiny.run("train", "autoencoder", "--data", "data", "--out", "runs/autoencoder", *tiny.AUTOENCODER)
    shutil.move(project, tmp_path / "moved")
    return tmp_path / "moved"


def test_the_data_are_found_from_another_directory_and_after_a_move(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = calm.load(moved / "runs" / "autoencoder")
    assert model.prepared_data(None).folder.samefile(moved / "data")


def test_other_data_under_the_same_name_are_not_taken(moved, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "text").mkdir()
    (tmp_path / "elsewhere" / "text" / "0.txt").write_text("Other words than those of the run. " * 200)
    monkeypatch.chdir(tmp_path / "elsewhere")
    tiny.run("data", "prepare", "--source", "text", "--out", "data", "--tokenizer", "bytes")
    assert calm.load(moved / "runs" / "autoencoder").prepared_data(None).folder.samefile(moved / "data")


def test_data_that_are_gone_end_in_one_line_that_says_what_to_pass(moved, tmp_path, monkeypatch):
    shutil.rmtree(moved / "data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="its data data is not there, nor beside the run; pass the folder as --data") as error:
        calm.load(moved / "runs" / "autoencoder").prepared_data(None)
    assert "\n" not in str(error.value)
