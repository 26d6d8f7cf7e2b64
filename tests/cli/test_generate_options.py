"""`calm generate` hands every sampler option on, and refuses the ones that do not go together in one line."""

import pytest

import tiny


@pytest.fixture
def words(tiny_runs):
    return ["generate", str(tiny_runs / "lm"), "--max-tokens", "8", "--prompt", "The cat"]


def test_the_sampler_is_chosen_on_the_command_line(words):
    """The most frequent of five draws is the best of five, and the same draws are made for both."""
    best = tiny.run(*words, "--sampler", "best", "--candidates", "5")
    assert best["draws"] == [10]
    top = tiny.run(*words, "--top-k", "1", "--candidates", "5", "--temperature", "1.5", "--no-repeat", "20")
    assert top["texts"] == best["texts"] and top["draws"] == [10]


def test_what_is_banned_is_not_written(words):
    free = tiny.run(*words)["texts"][0]
    letter, other = [letter for letter in dict.fromkeys(free + "xyz") if letter.isascii()][:2]
    banned = tiny.run(*words, "--ban", letter, "--ban", f"#{ord(other)}")["texts"][0]
    assert letter in free and not {letter, other} & set(banned)


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (2, "--temperature -1", "must be above 0"),
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
