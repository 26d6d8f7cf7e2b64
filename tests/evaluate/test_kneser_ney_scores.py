"""Scores of Kneser-Ney models: exact nats, Brier-n that averages to enumeration, reports like all others."""

import dataclasses
import itertools

import numpy as np
import pytest

from calm.errors import UsageError
from calm.evaluate.closed_form import evaluate_ngrams
from calm.evaluate.kneser_ney import KneserNey
from calm.evaluate.kneser_ney_scores import evaluate_kneser_ney, fit_kneser_ney, score_history_model
from calm.evaluate.ngram_counts import count_ngrams
from calm.evaluate.scores import BrierReport, brier_table, compare
from calm.evaluate.text_cache import Cached, CacheWeights

VOCABULARY = 3


@dataclasses.dataclass
class ArraySplit:
    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].astype(np.int32)


def text(size: int, seed: int) -> np.ndarray:
    """A token is often the sum of the two before it."""
    generator, tokens = np.random.default_rng(seed), [0, 1]
    for _ in range(size - 2):
        tokens.append(sum(tokens[-2:]) % 3 if generator.random() < 0.6 else int(generator.choice(3, p=[0.6, 0.3, 0.1])))
    return np.array(tokens, np.int32)


def models() -> dict[str, KneserNey | Cached]:
    plain = KneserNey.closed_form(count_ngrams(ArraySplit(text(400, 0)), VOCABULARY), 3)
    return {"plain": plain, "cached": Cached(plain, CacheWeights(share=0.3, tokens=5.0, matches=(2.0, 1.5, 1.0, 0.5)))}


def distribution(model, history: np.ndarray, length: int) -> np.ndarray:
    """P of every n-gram after a history, [V]*n, token by token."""
    table = np.empty((VOCABULARY,) * length)
    for gram in itertools.product(range(VOCABULARY), repeat=length):
        rows = [np.concatenate([history, gram[:n]])[None].astype(int) for n in range(length)]
        table[gram] = np.prod([model.conditional(row, np.array([y]))[0] for row, y in zip(rows, gram, strict=True)])
    return table


@pytest.mark.parametrize("kind", ["plain", "cached"])
def test_brier_averages_to_enumeration_and_nats_are_exact(kind):
    model, block, samples = models()[kind], text(12, 5), 3000
    report = score_history_model(model, block[None], np.zeros(1, int), num_samples=samples, name=kind)
    expected, variance = np.zeros(4), np.zeros(4)
    for place, n in itertools.product((4, 8), range(1, 5)):
        p = distribution(model, block[:place], n)
        expected[n - 1] += 2 * p[tuple(block[place : place + n])] - (p**2).sum()
        variance[n - 1] += ((p**3).sum() - (p**2).sum() ** 2) / samples
    assert report.scores.count.tolist() == [2]
    assert (np.abs(report.scores.total[0] - expected) < 4.5 * np.sqrt(variance)).all()
    nats = [-np.log(model.conditional(block[None, :t].astype(int), block[t : t + 1])[0]) for t in range(4, 12)]
    assert report.likelihood is not None and report.likelihood.count.tolist() == [8]
    assert report.likelihood.total[0, 0] == pytest.approx(sum(nats))


def test_blocks_do_not_read_each_other():
    model, blocks = models()["cached"], np.stack([text(20, seed) for seed in range(11)])
    together = score_history_model(model, blocks, np.arange(11), num_samples=2)
    assert together.likelihood is not None
    for number in (0, 7, 8, 10):
        alone = score_history_model(model, blocks[number : number + 1], np.zeros(1, int), num_samples=2)
        assert alone.likelihood is not None
        np.testing.assert_allclose(alone.likelihood.total[0], together.likelihood.total[number])


def test_reports_stand_beside_those_of_other_models(tmp_path):
    train, blocks = ArraySplit(text(2000, 1)), text(1920, 2).reshape(60, 32)
    held, document = text(320, 3).reshape(10, 32), np.arange(60)
    reports = evaluate_kneser_ney(train, VOCABULARY, blocks, document, held_out=held, orders=(2, 4), num_samples=4)
    assert list(reports) == ["kn2", "kn2+cache", "kn4", "kn4+cache"]
    others = evaluate_ngrams(train, VOCABULARY, blocks, document)
    difference = compare(reports["kn4"], others["unigram"])
    assert difference.verdict == "above"
    nats = {name: report.scalars()["nats_per_token"] for name, report in (reports | others).items()}
    assert nats["kn4"] < nats["kn2"] < nats["unigram"]
    assert nats["kn2"] == pytest.approx(nats["bigram"], abs=0.02)
    table = brier_table([*others.values(), *reports.values()])
    assert "Kneser-Ney 4 + cache" in table and "S=4, drawn decoding" in table
    reports["kn4"].save(tmp_path / "scores.json")
    np.testing.assert_array_equal(BrierReport.load(tmp_path / "scores.json").scores.total, reports["kn4"].scores.total)


def test_fitting_reads_held_out_text_alone_and_may_be_left_out():
    counts, held = count_ngrams(ArraySplit(text(500, 1)), VOCABULARY), text(320, 3).reshape(10, 32)
    plain, cached = (fit_kneser_ney(counts, 3, None, cache=cache) for cache in (False, True))
    assert isinstance(plain, KneserNey) and isinstance(cached, Cached) and cached.weights == CacheWeights()
    np.testing.assert_array_equal(plain.discounts, KneserNey.closed_form(counts, 3).discounts)
    fitted = fit_kneser_ney(counts, 3, held)
    document = np.arange(10)
    better, worse = (score_history_model(m, held, document, num_samples=2).scalars() for m in (fitted, plain))
    assert better["nats_per_token"] < worse["nats_per_token"]


def test_bad_input_is_named():
    counts, blocks = count_ngrams(ArraySplit(text(100, 1)), VOCABULARY), text(64, 2).reshape(2, 32)
    model, document = KneserNey.closed_form(counts, 2), np.zeros(2, int)
    with pytest.raises(UsageError, match="num_samples must be at least 2"):
        score_history_model(model, blocks, document, num_samples=1)
    with pytest.raises(UsageError, match="the vocabulary has 3"):
        score_history_model(model, blocks + 1, document)
    with pytest.raises(UsageError, match="document must name"):
        score_history_model(model, blocks, np.zeros(3, int))
    with pytest.raises(UsageError, match="at least 2 tokens"):
        fit_kneser_ney(counts, 2, np.zeros((0, 32), int))
    with pytest.raises(UsageError, match="no order"):
        evaluate_kneser_ney(ArraySplit(text(100, 1)), VOCABULARY, blocks, document, held_out=None, orders=())
    with pytest.raises(UsageError, match="at least one token"):
        evaluate_kneser_ney(ArraySplit(np.zeros(0, int)), VOCABULARY, blocks, document, held_out=None)
