"""Every sampler in the compiled loop, on a model: exact draws, bans, repetitions, and a budget that runs out."""

from fractions import Fraction

import jax
import numpy as np
import pytest

from calm.core import generate
from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.counts import BestOfN
from calm.core.energy_head import EnergyHeadConfig
from calm.core.exact import ExactTemperature
from calm.core.generate import SpecialIds, stream
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.core.sampler import OutOfDraws
from calm.core.temperature import BatchTemperature
from calm.errors import UsageError
from calm.rng import row_keys
from random_models import random_model

V, K = 12, 2
SPECIAL = SpecialIds(begin_id=9, end_id=10, mask_id=11)
PROMPTS = [np.array([], np.int32), np.array([1, 2, 3]), np.array([4, 4, 4, 4])]


@pytest.fixture(scope="module")
def predictor():
    codec = AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=4, dim=8, inner_dim=16)
    backbone = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=16)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4)
    lm = LatentLMConfig(vocab_size=V, chunk_size=K, latent_dim=4, backbone=backbone, head=head)
    return NextVector(random_model(codec), random_model(lm, seed=1))


def run(predictor, prompts=PROMPTS, max_tokens=24, seed=3, **options):
    keys = row_keys(jax.random.key(seed), len(prompts))
    return generate(predictor, prompts, keys, special=SPECIAL, max_tokens=max_tokens, **options)


def test_the_exact_sampler_in_the_loop_squares_the_law_of_the_loop_without_it(predictor):
    prompts, options = [PROMPTS[1]] * 1_500, dict(max_tokens=K, banned=[SPECIAL.end_id])

    def shares(result) -> np.ndarray:
        return np.bincount(result.tokens @ [V, 1], minlength=V * V) / len(prompts)

    plain = shares(run(predictor, prompts, **options))
    result = run(predictor, prompts, seed=4, sampler=ExactTemperature(temperature=Fraction(1, 2), block=16), **options)
    expected = plain**2 / (plain**2).sum()
    assert np.abs(shares(result) - expected).sum() / 2 < 0.1 < np.abs(shares(result) - plain).sum() / 2
    assert result.draws.mean() == pytest.approx(2 / (plain**2).sum(), rel=0.1) and not result.fallback_share.any()


def test_a_banned_token_is_never_written(predictor):
    free = run(predictor).tokens
    favourite = int(np.bincount(free[free < 9]).argmax())
    for sampler in (BatchTemperature(num_candidates=8), ExactTemperature()):
        assert not np.isin(run(predictor, banned=[favourite, 10], sampler=sampler).tokens, [favourite, 9, 10, 11]).any()


def repeated_runs(result, length=2) -> int:
    """How many runs of tokens occur twice, counted from what was written; runs that the prompt has twice are its own affair."""
    count = 0
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt.tolist(), *result.tokens[row, : result.lengths[row]].tolist()]
        runs = [tuple(text[start : start + length]) for start in range(len(text) - length + 1)]
        count += sum(run in runs[:place] for place, run in enumerate(runs) if place + length > len(prompt))
    return count


@pytest.mark.parametrize("kind", [BatchTemperature, ExactTemperature, BestOfN])
def test_no_run_of_tokens_is_written_twice(predictor, kind):
    options = dict(banned=[SPECIAL.end_id], decoding="drawn", max_tokens=16)
    result = run(predictor, sampler=kind(no_repeat=2), **options)
    assert not repeated_runs(result) and not result.fallback_share.any()
    if kind is BestOfN:  # the same sampler without the rule
        assert repeated_runs(run(predictor, sampler=kind(), **options))


def test_streaming_with_an_exact_sampler_gives_the_same_tokens(predictor):
    sampler = ExactTemperature(temperature=Fraction(2, 5), block=8, no_repeat=3)
    keys = row_keys(jax.random.key(3), 3)
    whole = run(predictor, sampler=sampler, max_tokens=8)
    pieces = list(stream(predictor, PROMPTS, keys, special=SPECIAL, max_tokens=8, sampler=sampler))
    joined = np.concatenate(pieces, axis=1)
    np.testing.assert_array_equal(joined, whole.tokens[:, : joined.shape[1]])
    alone = generate(predictor, PROMPTS[1:2], keys[1:2], special=SPECIAL, max_tokens=8, sampler=sampler)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[1])
    assert alone.draws[0] == whole.draws[1]


def test_running_out_of_draws_ends_generation_with_the_place(predictor):
    sampler = ExactTemperature(temperature=Fraction(1, 12), max_draws=40, block=8)
    options = dict(sampler=sampler, decoding="drawn")
    message = r"prompt \d, chunk \d+ of its continuation: exact sampling at temperature 1/12 used 4\d draws .* collision rate"
    with pytest.raises(OutOfDraws, match=message):
        run(predictor, **options)
    with pytest.raises(OutOfDraws, match=message):
        list(stream(predictor, PROMPTS, row_keys(jax.random.key(3), 3), special=SPECIAL, max_tokens=24, **options))


@pytest.mark.parametrize(
    ("banned", "message"),
    [
        ([12], "banned token id 12 is outside the vocabulary of 12"),
        ([-1], "banned token id -1 is outside"),
        (list(range(9)), "banned: 9 of 12 ids leave nothing to write"),
    ],
)
def test_bans_that_make_no_sense_are_refused(predictor, banned, message):
    with pytest.raises(UsageError, match=message):
        run(predictor, banned=banned)
