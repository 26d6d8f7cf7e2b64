"""The lexicon critic: its evidence, its reward against brute force, and that adaptation follows it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_models
from calm.errors import UsageError
from calm.rng import row_keys
from calm.text.chunking import NOTHING
from calm.ttt.critic import ShuffledCritic, checked_rewards, reads_chunks, rewards_of, weighted
from calm.ttt.lexicon import MOST, LexiconCritic, Topic, evidence_of, topic_of
from calm.ttt.seal import Seal, SealConfig
from random_models import normal

V, K, Z = ttt_models.V, ttt_models.K, ttt_models.Z
S, B, N = 2, 3, 4
LATENTS = jnp.asarray(normal(S, B, N, Z))
CHUNKS = jnp.asarray(np.random.default_rng(1).integers(0, 30, (S, B, N, K)), jnp.int32)


def writers():
    plain = dataclasses.replace(ttt_models.WRITER, use_hidden=False)
    return {
        "autoencoder": None,
        "context decoder": plain,
        "one that looks back": dataclasses.replace(plain, recall=8),
    }


def topic(evidence=None, content=None, level=0.3, share=0.4):
    """A topic of one's own."""
    own = normal(V) if evidence is None else evidence
    return Topic(own, np.arange(V) % 3 > 0 if content is None else content, level, share)


def test_evidence_is_the_log_ratio_of_shares_and_rare_tokens_say_little():
    about, other = np.array([300.0, 100, 600, 0, 0]), np.array([100.0, 900, 0, 1, 0])
    evidence = evidence_of(about, other)
    assert evidence[0] == pytest.approx(np.log(3 / 1), abs=0.05)
    assert evidence[1] == pytest.approx(np.log(0.1 / 0.9), abs=0.05)
    assert evidence[2] == MOST  # only there, and often
    assert -0.5 < evidence[3] < 0  # only in the other text, and once
    assert evidence[4] == 0  # nowhere
    # twice as much of one kind of text changes no share
    np.testing.assert_allclose(evidence_of(2 * about, other)[:2], evidence[:2], atol=0.02)


def test_a_topic_is_what_held_out_passages_have_and_the_commonest_tokens_are_not_about_it():
    """Token 0 is the commonest and leans to the topic; 1 is about it, 2 is not, and 10 + i is a name of one passage."""
    about = [np.array([0, 0, 0, 1, 1, 10 + i, 10 + i, 10 + i]) for i in range(20)]
    other = [np.array([0, 0, 0, 2, 2, 2]) for i in range(20)]
    found = topic_of(about, other, 40)
    assert found.content[0] == 0 and found.content[1:].all() and found.evidence[0] == 0
    assert found.evidence[1] > 1.5 and found.evidence[2] < -1.5 and (found.evidence[10:30] > 0.3).all()
    assert found.share == pytest.approx(5 / 8)
    # of five tokens of content in a passage two are known from the others; names of a passage held out say nothing
    level = 2 / 5 * found.evidence[1]
    assert found.level == pytest.approx(level, rel=0.1)
    assert topic_of(about[:1], other, 40).level > 2 * level  # a single passage can only be measured by itself
    with pytest.raises(UsageError, match="one of which has no token"):
        topic_of(about, [np.array([], int)], 40)


@pytest.mark.parametrize("name", writers())
def test_the_reward_is_the_distance_of_what_is_expected_to_be_written_from_the_topic(name):
    """Against the predictor's own probabilities of each token, one chunk at a time."""
    predictor = ttt_models.next_vector(writer=writers()[name])
    about = topic()
    rewards = LexiconCritic.of(predictor, about)(LATENTS, CHUNKS)
    reach, said, content, hidden = predictor.reach, np.zeros((S, B)), np.zeros((S, B)), jnp.zeros((S, B, 16))
    log_probs = jax.jit(lambda previous, latents, target: predictor.token_log_probs(hidden, previous, latents, target)[0])
    text = np.concatenate([np.full((S, B, reach), NOTHING), np.asarray(CHUNKS).reshape(S, B, -1)], axis=-1)
    for chunk in range(N):
        previous = jnp.asarray(text[..., chunk * K : chunk * K + reach])
        for place in range(K):
            for token in range(V):
                target = CHUNKS[:, :, chunk].at[..., place].set(token)
                found = np.asarray(log_probs(previous, LATENTS[None, :, :, chunk], target))
                said += np.exp(found[..., place]) * about.evidence[token] * about.content[token]
                content += np.exp(found[..., place]) * about.content[token]
    distance = np.abs(said / content - about.level) + np.abs(content / (N * K) - about.share)
    np.testing.assert_allclose(rewards, -distance, atol=1e-5)


def test_more_of_a_topic_than_its_text_has_is_no_better_than_less():
    predictor = ttt_models.next_vector()
    evidence, content = (x[0, 0] for x in LexiconCritic.of(predictor, topic()).expected(LATENTS, CHUNKS))
    level, share = float(evidence), float(content)
    rewards = {
        (more, fuller): float(
            LexiconCritic.of(predictor, topic(level=level + more, share=share + fuller))(LATENTS, CHUNKS)[0, 0]
        )
        for more, fuller in [(0, 0), (0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)]
    }
    assert rewards.pop((0, 0)) == pytest.approx(0, abs=1e-6)
    assert list(rewards.values()) == pytest.approx([-0.1] * 4, abs=1e-5)


def test_what_was_written_is_a_constant_and_only_latents_have_a_slope():
    critic = LexiconCritic.of(ttt_models.next_vector(writer=writers()["one that looks back"]), topic())
    slope = jax.grad(lambda z: critic(z, CHUNKS).sum())(LATENTS)
    assert np.isfinite(slope).all() and (np.abs(slope).max(-1) > 0).all()
    other = critic(LATENTS, CHUNKS.at[:, :, 0].set(7))
    assert not np.allclose(other, critic(LATENTS, CHUNKS))  # the tokens before a place are read


def test_sums_and_shuffles_hand_on_what_was_written():
    critic = LexiconCritic.of(ttt_models.next_vector(), topic())
    both = weighted([(2.0, critic), (1.0, ttt_models.concept())])
    np.testing.assert_allclose(
        rewards_of(both, LATENTS, CHUNKS), 2 * critic(LATENTS, CHUNKS) + ttt_models.concept()(LATENTS), rtol=1e-5
    )
    shuffled = ShuffledCritic.of(critic, jax.random.key(0), Z)
    np.testing.assert_allclose(checked_rewards(shuffled, LATENTS, CHUNKS), critic(LATENTS[..., shuffled.order], CHUNKS))
    assert reads_chunks(both) and reads_chunks(shuffled) and not reads_chunks(weighted([(2.0, ttt_models.concept())]))


def test_adaptation_makes_the_wanted_words_more_likely_and_leaves_the_model_alone():
    predictor = ttt_models.next_vector(writer=writers()["context decoder"])
    evidence = np.zeros(V)
    evidence[:5] = 1.0
    critic = LexiconCritic.of(predictor, topic(evidence, np.ones(V), level=1.0, share=1.0))
    seal = Seal(predictor, ttt_models.SPECIAL, SealConfig(samples=8, chunks=4, inner_steps=6, rate=0.05))
    prompts, keys = seal.read(ttt_models.PROMPTS), row_keys(jax.random.key(0), 3)
    before = jax.tree.map(np.asarray, seal.params)
    adaptation = seal.adapt(critic, prompts, keys)
    assert (adaptation.after > adaptation.before + 0.02).all()
    standard, aligned = (
        seal.write(critic, prompts, keys, change, num_chunks=4, num_texts=32) for change in (None, adaptation.changes)
    )
    assert (aligned.chunks < 5).mean() > (standard.chunks < 5).mean()
    jax.tree.map(np.testing.assert_array_equal, before, seal.params)


def test_a_decoder_that_reads_the_hidden_state_is_refused():
    with pytest.raises(UsageError, match="also reads the hidden state"):
        LexiconCritic.of(ttt_models.next_vector(writer=ttt_models.WRITER), topic())
