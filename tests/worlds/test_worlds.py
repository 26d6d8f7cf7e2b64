"""Worlds know their own distribution: draws, closed forms and counts agree, wherever a context begins."""

import itertools

import numpy as np
import pytest

from calm.errors import UsageError
from calm.worlds.grammar import Rule, compile_grammar
from calm.worlds.key_value import KeyValueWorld
from calm.worlds.registry import build_world
from calm.worlds.world import World, tempered

SMALL = {
    "markov": dict(words=5, concentration=0.5, document=9),
    "grammar": dict(depth=1, sentences=3),
    "key-value": dict(keys=3, values=4, statements=5),
}


@pytest.fixture(scope="module", params=SMALL)
def world(request) -> World:
    return build_world(request.param, **SMALL[request.param])


@pytest.fixture(scope="module")
def text(world) -> np.ndarray:
    """Blocks from the middle of documents, `[512 16]`."""
    return world.sample(16 * 65, seed=1, streams=8)[:, 16:].reshape(-1, 16)


def test_the_law_is_a_law_over_words_and_the_end(world, text):
    for state in (world.start(3), world.at_document(3), world.condition(text[:, :7])):
        law = world.distribution(state)
        np.testing.assert_allclose(law.sum(-1), 1)
        assert (law >= 0).all() and not law[:, [world.begin_id, world.mask_id]].any()
    assert not world.distribution(world.at_document(1))[0, world.end_id], "a document of no words"


def test_what_is_drawn_follows_the_law(world):
    """The score of the drawn tokens against their own distribution is a sum of martingale differences: its mean is 0."""
    tokens, state = world.sample(400, seed=2, streams=64), world.at_document(64)
    weights = np.random.default_rng(0).standard_normal((400, world.vocab_size))
    surprises = []
    for column, weight in zip(tokens.T, weights, strict=True):
        law = world.distribution(state)
        surprises.append(weight[column] - law @ weight)
        assert (law[np.arange(64), column] > 0).all()
        state = world.read(state, column)
    surprises = np.stack(surprises)
    assert abs(surprises.mean()) < 3 * surprises.std() / np.sqrt(surprises.size)


def test_reading_from_nothing_is_the_average_over_what_may_have_come_before(world, text):
    """sum_x Q(x y) = Q(y) for texts y that begin anywhere: the first belief is stationary and every update is Bayes's."""
    for row in text[:12]:
        before = np.concatenate([world.support[:, None], np.tile(row, (len(world.support), 1))], axis=1)
        empty = np.zeros((len(before), 0), int)
        longer = world.probability(empty, before)[:, -1].sum()
        np.testing.assert_allclose(longer, world.probability(empty[:1], row[None])[0, -1], rtol=1e-9)


def test_the_table_holds_every_gram_once(world, text):
    context = text[:4, :6]
    for order in (1, 2):
        table = world.table(context, order)
        np.testing.assert_allclose(table.probability.sum(-1), 1)
        for gram in range(0, len(table.grams), 7):
            repeated = np.tile(table.grams[gram], (4, 1))
            np.testing.assert_allclose(table.probability[:, gram], world.probability(context, repeated)[:, -1])
    with pytest.raises(UsageError, match="of 1 to 4 tokens"):
        world.table(context, 5)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 12])
def test_the_closed_self_match_is_the_sum_over_all_that_may_follow(world, text, cut):
    state = world.condition(text[:24, :cut])
    np.testing.assert_allclose(world.self_match(state), World.self_match(world, state), rtol=1e-9)
    squares = np.sum(world.table(text[:24, :cut], 2).probability ** 2, -1)
    np.testing.assert_allclose(world.self_match(state, 2)[:, 1], squares, rtol=1e-9)


def test_entropy_rate_and_ceilings_are_the_averages_over_long_texts(world):
    tokens, state = world.sample(240, seed=3, streams=128), world.at_document(128)
    nats, matches = [], []
    for number, column in enumerate(tokens.T):
        nats.append(-np.log(world.distribution(state)[np.arange(128), column]))
        if number >= 64 and number % 16 == 0:
            matches.append(world.self_match(state))
        state = world.read(state, column)
    rate = np.stack(nats)[64:].mean(0)  # one mean a stream: streams are independent, positions are not
    assert abs(rate.mean() - world.entropy_rate) < 3.5 * rate.std() / np.sqrt(128)
    means = np.stack(matches).mean(0)
    assert (abs(means.mean(0) - world.ceilings()) < 3.5 * means.std(0) / np.sqrt(128)).all()


def test_documents_are_whole_and_enough(world):
    documents = list(world.documents(3000, seed=4))
    total = sum(len(document) + 1 for document in documents)
    assert 3000 <= total < 3400 and all(len(document) for document in documents)
    again = world.documents(3000, seed=4)
    assert all(np.array_equal(one, two) for one, two in zip(documents, again, strict=True))
    joined = np.concatenate([np.append(document, world.end_id) for document in documents])
    np.testing.assert_array_equal(joined, world.sample(total, seed=4)[0])


def test_temperature_targets_are_powers():
    law = np.array([[0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(tempered(law, 1), law)
    np.testing.assert_allclose(tempered(law, 0.5), law**2 / (law**2).sum(-1, keepdims=True))
    np.testing.assert_allclose(tempered(law, 3)[0], law[0] ** (1 / 3) / np.sum(law[0] ** (1 / 3)))
    assert tempered(law, 1e-3)[0, 0] == 1
    with pytest.raises(UsageError, match="above 0"):
        tempered(law, 0)


def test_answers_come_from_far_back():
    world = KeyValueWorld(keys=8, values=4)
    ids = {word: number for number, word in enumerate(world.words)}
    filler = ["k1", "is", "v0"] * 40
    text = ["k3", "is", "v2", *filler, "k5", "?", "v1", *filler, "k3", "?"]
    context = np.array([[ids[word] for word in text]])
    assert world.distribution(world.condition(context))[0, ids["v2"]] == 1
    without = context.copy()
    without[0, 0] = ids["k2"]
    np.testing.assert_allclose(world.distribution(world.condition(without))[0, world.keys + 2 : -3], 1 / 4)


def test_a_grammar_that_hides_what_it_has_read_is_a_mixture_until_it_shows():
    grammar = {
        "TEXT": [Rule(3, ("x", "ONE", "<|end|>", "TEXT")), Rule(1, ("x", "TWO", "<|end|>", "TEXT"))],
        "ONE": [Rule(1, ("b", "c")), Rule(1, ("b",))],
        "TWO": [Rule(1, ("b", "d"))],
    }
    world = compile_grammar("hidden", grammar, "TEXT")
    assert world.words == ("x", "b", "c", "d")
    law = world.distribution(world.read(world.read(world.at_document(1), np.array([0])), np.array([1])))[0]
    np.testing.assert_allclose(law, [0, 0, 3 / 8, 1 / 4, 0, 3 / 8, 0])
    with pytest.raises(UsageError, match="begins with itself"):
        compile_grammar("left", {"TEXT": [Rule(1, ("TEXT", "x"))]}, "TEXT")
    with pytest.raises(UsageError, match="a derivation ends"):
        compile_grammar("short", {"TEXT": [Rule(1, ("x",))]}, "TEXT")
    with pytest.raises(UsageError, match="more than 4096 states"):
        nested = {"TEXT": [Rule(1, ("NEST", "<|end|>", "TEXT"))], "NEST": [Rule(1, ("x", "NEST", "y")), Rule(1, ("z",))]}
        compile_grammar("deep", nested, "TEXT")


def test_verbs_agree_with_their_subject_across_clauses():
    world = build_world("grammar")
    ids = {word: number for number, word in enumerate(world.words)}
    ends_in_s = np.array([word.endswith("s") for word in world.words])
    for subject, ending in itertools.product(("dog", "dogs"), (True, False)):
        words = ["the", subject, "that", "the", "cats", "that", "sleep", "see"]
        law = world.distribution(world.read(world.condition(np.array([[world.end_id]])), np.array([ids["the"]])))
        state = world.condition(np.array([[world.end_id, *[ids[word] for word in words]]]))
        law = world.distribution(state)[0, : len(world.words)]
        assert (law[ends_in_s == ending].sum() > 0) == ((subject == "dog") == ending)


def test_bad_settings_are_named():
    for name, settings, words in [
        ("novel", {}, "choose markov, grammar, key-value"),
        ("markov", {"letters": 3}, "unknown setting 'letters'; it has words"),
        ("markov", {"words": "many"}, "words: expected a whole number"),
        ("markov", {"words": 1}, "need 2 <= words"),
        ("markov", {"words": "1M"}, "words < 4096"),
        ("markov", {"seed": -1}, "seed >= 0"),
        ("grammar", {"seed": -1}, "seed >= 0"),
        ("key-value", {"keys": "1M"}, "keys <= 1024"),
        ("grammar", {"clauses": 1.0}, "clauses < 1"),
        ("key-value", {"settings": "0"}, "0 < settings < 1"),
    ]:
        with pytest.raises(UsageError, match=words):
            build_world(name, **settings)
    world = build_world("markov", words="64")
    with pytest.raises(UsageError, match="larger than"):
        world.table(np.zeros((1, 1), int), 4)
