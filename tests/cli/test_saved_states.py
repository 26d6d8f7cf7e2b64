"""`calm generate --save-state` and `--state`: what was read is gone on from, and options that do not fit are one line."""

import pytest

import tiny


@pytest.fixture(scope="module")
def words(tiny_runs):
    return ["generate", str(tiny_runs / "lm"), "--max-tokens", "8"]


@pytest.fixture(scope="module")
def state(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "cat.state"
    return str(path), tiny.run(*words, "--prompt", "The cat sees the", "--save-state", str(path))["texts"]


def test_a_state_continues_like_its_prompt(words, state):
    path, texts = state
    plain = tiny.run(*words, "--prompt", "The cat sees the")["texts"]
    assert texts == plain == tiny.run(*words, "--state", path)["texts"]
    back = tiny.run(*words, "--state", path, "--rewind", "1")["texts"]
    assert back == tiny.run(*words, "--prompt", "The cat sees")["texts"]  # bytes, four to a chunk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--state {path} --prompt a", "takes the place of the prompts"),
        ("--state {path} --rewind 4", "rewind: 4 chunks of 4 that were read"),
        ("--state {path} --max-tokens 100000", "has room for"),
        ("--state {path}.none", "no such file"),
        ("--rewind 1", "rewind goes with state"),
        ("--rewindable", "rewindable with save_state"),
    ],
)
def test_states_that_do_not_fit_end_in_one_line(words, state, options, message):
    code, result, err = tiny.calm(*words, *options.format(path=state[0]).split())
    assert code == 2 and message in result["error"], err
