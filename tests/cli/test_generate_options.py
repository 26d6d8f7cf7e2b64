"""`calm generate` hands every sampler option on, and refuses the ones that do not go together in one line."""

import pytest

import tiny


@pytest.fixture
def words(tiny_runs):
    return ["generate", str(tiny_runs / "lm"), "--max-tokens", "8", "--prompt", "The cat"]


def test_the_sampler_is_chosen_on_the_command_line(words):
    assert tiny.run(*words, "--temperature", "1.5", "--candidates", "6")["draws"] == [12]
    assert tiny.run(*words, "--sampler", "best", "--candidates", "5")["draws"] == [10]
    assert (
        tiny.run(*words, "--top-k", "1", "--candidates", "5")["texts"]
        == tiny.run(*words, "--top-p", "0.01", "--candidates", "5")["texts"]
    )
    exact = tiny.run(*words, "--sampler", "exact", "--temperature", "0.9", "--max-draws", "100000", "--decoding", "argmax")
    assert exact["fallback_share"] == [0.0] and exact["draws"][0] >= 4


def test_what_is_banned_is_not_written(words):
    free = tiny.run(*words)["texts"][0]
    token = next(letter for letter in free if letter.isascii())
    assert token not in tiny.run(*words, "--ban", token)["texts"][0]
    assert tiny.run(*words, "--ban", f"#{ord(token)}")["texts"] == tiny.run(*words, "--ban", token)["texts"]


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (2, "--temperature -1", "temperature -1: must be above 0"),
        (2, "--temperature 1.5 --sampler exact", "exact sampling needs 0 < T <= 1"),
        (2, "--temperature 0.5 --sampler best", "leave out 0.5"),
        (2, "--sampler exact --top-k 3", "use the batch sampler"),
        (2, "--sampler greedy", "sampler"),
        (2, "--top-p 0", "top_p must be above 0"),
        (2, "--ban dog", "ban 'dog': is 3 tokens"),
        (2, "--ban #100000", "banned token id 100000 is outside the vocabulary"),
        (1, "--sampler exact --temperature 1/60 --decoding drawn --max-draws 70", "observed collision rate"),
    ],
)
def test_options_that_do_not_work_end_in_one_line(words, code, options, message):
    found, result, err = tiny.calm(*words, *options.split())
    assert found == code and message in result["error"], err
