"""Judged texts: the judge's price is the likelihood, whatever is read beside it; prompts come from the text and end with it."""

import jax
import numpy as np
import pytest

from calm.core.backbone import BackboneConfig
from calm.core.intervals import Interval
from calm.errors import UsageError
from calm.evaluate.ngram import fit_ngrams
from calm.evaluate.quality_report import QualityReport
from calm.evaluate.text_quality import Judge, Prompts, judged
from calm.text.tokenizer import ByteTokenizer
from calm.token.likelihood import token_likelihood
from calm.token.model import TokenLMConfig
from calm.token.sampler import SoftmaxSampler
from random_models import random_model

TOKENIZER = ByteTokenizer()
LM = random_model(
    TokenLMConfig(vocab_size=259, backbone=BackboneConfig(dim=8, num_layers=1, num_heads=1, num_kv_heads=1, inner_dim=8))
)
JUDGE = Judge(name="judge", lm=LM, tokenizer=TOKENIZER, block_tokens=64)
TEXT = "the cat sees the dog and the dog sees the cat " * 20
BLOCKS = TOKENIZER.encode(TEXT)[:640].reshape(10, 64)


def prompts(**changes) -> Prompts:
    return Prompts.of(BLOCKS, TOKENIZER.end_id, **({"samples": 5, "prompt_tokens": 8, "new_tokens": 12} | changes))


def test_the_judge_pays_the_likelihood_of_the_text_given_its_prompt():
    before, text = "the cat", " sees the dog"
    ids = np.concatenate([[TOKENIZER.begin_id], TOKENIZER.encode(before + text)]).astype(np.int32)[None]
    expected = token_likelihood(LM, ids, np.zeros(1, np.int64), skip=1 + len(before)).total[0, 0]
    np.testing.assert_allclose(JUDGE.nats([before], [text]), [expected], rtol=1e-5)
    # beside others, longer and shorter
    others = JUDGE.nats(["a", before, "the dog and the"], ["b", text, " cat sees the dog and"])
    np.testing.assert_allclose(others[1], expected, rtol=1e-5)
    assert JUDGE.nats(["a"], [""]) == [0]


def test_what_does_not_fit_is_left_out_in_front():
    text = "x" * 40
    near = "y" * 23
    np.testing.assert_allclose(JUDGE.nats(["q" * 30 + near], [text]), JUDGE.nats([near], [text]), rtol=1e-6)
    with pytest.raises(UsageError, match="reads 64 tokens, a text has 64"):
        JUDGE.nats([""], ["x" * 64])


def test_prompts_are_spread_over_the_blocks_and_followed_by_their_text():
    made = prompts()
    np.testing.assert_array_equal(made.tokens, BLOCKS[[0, 2, 4, 6, 8], :8])
    np.testing.assert_array_equal(np.stack(made.following), BLOCKS[[0, 2, 4, 6, 8], 8:20])
    ended = BLOCKS.copy()
    ended[2, 11] = TOKENIZER.end_id
    made = Prompts.of(ended, TOKENIZER.end_id, samples=5, prompt_tokens=8, new_tokens=12)
    assert [len(row) for row in made.following] == [12, 3, 12, 12, 12]


def test_all_authors_are_measured_alike():
    made = prompts()
    own = made.continued_by(LM, TOKENIZER, jax.random.key(0), sampler=SoftmaxSampler(), decoding="argmax")
    assert len(own) == 5 and all(len(row) <= 12 for row in own)

    class Train:
        num_tokens = BLOCKS.size

        def read(self, start, length):
            return BLOCKS.reshape(-1)[start : start + length]

    rows = made.continued_by_ngram(fit_ngrams(Train(), 259)[1], TOKENIZER, seed=0)
    assert set(np.concatenate(rows)) <= set(BLOCKS.reshape(-1)) | set(range(259))
    truth = judged("text", made, made.following, TOKENIZER, JUDGE)
    nats = JUDGE.nats([TOKENIZER.decode(row) for row in made.tokens], [TOKENIZER.decode(row) for row in made.following])
    assert truth.bits_per_byte.estimate == pytest.approx(nats.sum() / np.log(2) / 60, rel=1e-6)
    assert truth.tokens == 60 and truth.ended == 0
    loop = judged("loop", made, [np.array([97, 98] * 6)] * 5, TOKENIZER, JUDGE)
    assert loop.repetition.estimate == 7 / 9 and loop.distinct[0] == 2 / 60
    silent = judged("silent", made, [np.zeros(0, np.int32)] * 5, TOKENIZER, JUDGE)
    assert silent.bits_per_byte is None and silent.repetition is None and silent.ended == 5

    report = QualityReport(
        judge="judge", samples=5, prompt_tokens=8, new_tokens=12, temperature="1", seed=0, writings=(truth, loop, silent)
    )
    lines = report.table({"loop": Interval(estimate=1.5, low=1.0, high=2.0)}).splitlines()
    assert "1.500 [1.000, 2.000]" in lines[3] and "judge judge" in lines[-1]
    assert report.to_dict()["writings"][1]["repeated_4"]["estimate"] == 7 / 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(samples=11), "11 continuations need as many held-out blocks, there are 10"),
        (dict(samples=0), "at least 1 sample"),
        (dict(new_tokens=60), "do not fit into blocks of 64"),
    ],
)
def test_prompts_that_the_text_does_not_have_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        prompts(**changes)
