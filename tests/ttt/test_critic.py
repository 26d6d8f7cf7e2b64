"""Critics: what they reward, that they refuse nonsense, and that a trained one is calibrated and comes back from its files."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_models
from calm.core.autoencoder import AutoencoderConfig
from calm.errors import UsageError
from calm.text.tokenizer import load_tokenizer
from calm.text.tokenizer_training import train_words
from calm.ttt.concept import chunks_with, concept_of_texts, concept_of_words, encoded, expected, parse_words
from calm.ttt.critic import ConceptCritic, ShuffledCritic, as_pytree, checked_rewards, weighted
from calm.ttt.critic_files import fingerprint, load_critic, save_critic
from calm.ttt.training import CriticTraining, calibration_error, other_order, read_lines, train_critic
from random_models import normal, random_model

Z = ttt_models.Z
LATENTS = jnp.asarray(normal(4, 3, 5, Z))
CHUNKS = jnp.zeros((4, 3, 5, ttt_models.K), jnp.int32)


@pytest.fixture(scope="module")
def autoencoder():
    """With posteriors as narrow as trained ones are: a spread that is drawn like other weights would drown the means."""
    model = random_model(AutoencoderConfig(vocab_size=259, chunk_size=4, latent_dim=Z, dim=32, inner_dim=32))
    model.encoder.to_latent.bias[...] = model.encoder.to_latent.bias[...].at[Z:].add(-4.0)
    return model


@pytest.fixture(scope="module")
def lines():
    """Two kinds of lines with words of their own."""
    draw = random.Random(0)

    def some(words):
        return [" ".join(draw.choice(words) for _ in range(6)) for _ in range(300)]

    return some("good fine great glad".split()), some("bad poor awful sad".split())


OPTIONS = CriticTraining(width=16, chunks=4, steps=300, learning_rate=2e-2)


@pytest.fixture(scope="module")
def trained(autoencoder, lines):
    return train_critic(*lines, autoencoder, load_tokenizer("bytes"), OPTIONS)


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_closeness_to_a_concept_is_a_cosine_from_the_general_mean():
    critic = ConceptCritic(jnp.ones(Z), jnp.eye(Z)[2])
    at = jnp.ones((1, 1, 2, Z))
    np.testing.assert_allclose(critic(at.at[..., 2].add(3.0)), 1, atol=1e-6)
    np.testing.assert_allclose(critic(at.at[..., 2].add(-3.0)), -1, atol=1e-6)
    np.testing.assert_allclose(critic(at.at[..., 1].add(3.0)), 0, atol=1e-6)
    assert np.isfinite(jax.grad(lambda z: critic(z).sum())(at)).all()  # on the mean itself, where a cosine has no slope


def test_a_sum_weighs_its_critics_and_a_function_of_ones_own_is_one():
    def shortness(latents):
        return -jnp.square(latents).mean((-1, -2))

    one = ttt_models.concept()
    both = weighted([(2.0, one), (0.5, shortness)])
    np.testing.assert_allclose(both(LATENTS), 2 * one(LATENTS) + 0.5 * shortness(LATENTS), rtol=1e-6)
    assert weighted([(1.0, one)]) is one and jax.tree.leaves(as_pytree(shortness)) == []
    np.testing.assert_array_equal(jax.jit(lambda critic, z: critic(z))(as_pytree(shortness), LATENTS), shortness(LATENTS))


def test_a_shuffled_critic_is_the_same_about_other_dimensions():
    one = ttt_models.concept()
    other = ShuffledCritic.of(one, jax.random.key(0), Z)
    assert sorted(other.order.tolist()) == list(range(Z)) and other.order.tolist() != list(range(Z))
    np.testing.assert_allclose(other(LATENTS), one(LATENTS[..., other.order]))
    assert not np.allclose(other(LATENTS), one(LATENTS))


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (lambda z: z.mean((0, 2, 3)), r"gave \[3\] for latents \[4, 3, 5, 6\]; it must give one reward each, \[4, 3\]"),
        (lambda z: z.mean((2, 3)) / 0, "12 of 12 rewards are not finite"),
        (lambda z: z @ jnp.zeros(3), "cannot read latents"),
        (lambda z: None, "gave no array"),
    ],
)
def test_a_critic_that_gives_nonsense_is_refused_in_one_line(critic, message):
    with pytest.raises(UsageError, match=message):
        checked_rewards(critic, LATENTS, CHUNKS)


def test_what_is_no_critic_is_refused():
    with pytest.raises(UsageError, match="must be a function of latents"):
        as_pytree("war")
    with pytest.raises(UsageError, match="name a concept or a trained critic"):
        weighted([])
    with pytest.raises(UsageError, match="weight must be a number other than 0"):
        weighted([(0.0, ttt_models.concept())])


# -- concepts ---------------------------------------------------------------------------------------------------------


def test_chunks_that_hold_a_part_of_a_word_are_found_whatever_the_tokenizer():
    text = "A war is War; wars are not. Post-war new\n york postwar"
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    ids = np.pad(ids, (0, -len(ids) % 4), constant_values=32)
    found = chunks_with(["war", "new york"], ids[None], 4, tokenizer)[0]
    held = [text[4 * i : 4 * i + 4] for i in np.flatnonzero(found)]
    assert held == ["A wa", "r is", " War", "-war", " new", "\n yo", "rk p"]
    words = train_words([text.lower()] * 2)
    ids = words.encode(text.lower())
    found = chunks_with(["war"], ids[None], 1, words)[0]
    assert [words.decode(ids[i : i + 1]) for i in np.flatnonzero(found)] == ["war", "war;", "post-war"]


def test_the_direction_goes_from_the_general_mean_to_that_of_the_concept(autoencoder):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("the sea was calm and the ship sailed on the open sea. " * 8)
    blocks = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    critic, count = concept_of_words(["sea", "ship"], blocks, 4, encoded(autoencoder), tokenizer)
    found = chunks_with(["sea", "ship"], blocks, 4, tokenizer)
    means = np.asarray(autoencoder.encode(jnp.asarray(blocks.reshape(-1, 4))).mean)
    np.testing.assert_allclose(critic.origin, means.mean(0), atol=1e-5)
    toward = means[found.reshape(-1)].mean(0) - means.mean(0)
    np.testing.assert_allclose(critic.direction, toward / np.linalg.norm(toward), atol=1e-4)
    assert count == found.sum() and float(np.linalg.norm(critic.direction)) == pytest.approx(1, abs=1e-5)
    by_text, count = concept_of_texts(["ship ahoy!", "sea"], blocks, 4, encoded(autoencoder), tokenizer)
    own = autoencoder.encode(jnp.asarray(tokenizer.encode("ship aho").reshape(-1, 4))).mean.mean(0)
    toward = np.asarray(own) - np.asarray(critic.origin)
    assert count == 2
    np.testing.assert_allclose(by_text.direction, toward / np.linalg.norm(toward), atol=1e-4)


def test_a_model_with_a_decoder_inside_the_chunk_is_asked_what_it_expects():
    """The latents of a chunk are those that the model draws in front of it; before the first chunk it has read nothing."""
    predictor = ttt_models.next_vector(writer=ttt_models.WRITER)
    size = predictor.chunk_size
    rows = np.random.default_rng(0).integers(2, 8, (3, 5, size)).astype(np.int32)
    latents = expected(predictor, num_draws=64)(rows)
    assert np.isnan(latents[:, 0]).all() and latents.shape == (3, 5, predictor.lm.config.latent_dim)
    hidden, _ = predictor.hidden(jnp.asarray(rows))
    mean = np.asarray(predictor.lm.sample(jax.random.key(5), hidden, 4096)).mean(0)
    spread = np.asarray(predictor.lm.sample(jax.random.key(6), hidden, 256)).std(0)
    assert (np.abs(latents[:, 1:] - mean[:, :-1]) < 5 * spread[:, :-1] / 8 + 1e-3).all()
    with pytest.raises(UsageError, match="are one chunk of . tokens; a model needs two"):
        concept_of_texts(["a" * size], rows.reshape(3, -1), size, expected(predictor), load_tokenizer("bytes"))


def test_a_concept_that_the_text_does_not_know_is_refused(autoencoder):
    blocks = np.full((2, 16), 65, np.int32)
    with pytest.raises(UsageError, match="concept xyzzy: not one of its words is in the 32 tokens"):
        concept_of_words(["xyzzy"], blocks, 4, encoded(autoencoder), load_tokenizer("bytes"))
    with pytest.raises(UsageError, match="holds no word"):
        parse_words(" , ")
    with pytest.raises(UsageError, match="not one whole chunk of 4 tokens"):
        concept_of_texts(["abc"], blocks, 4, encoded(autoencoder), load_tokenizer("bytes"))
    with pytest.raises(UsageError, match="so there is no direction"):
        concept_of_words(["AAAAAAAAAAAAAAAA"], blocks, 4, encoded(autoencoder), load_tokenizer("bytes"))
    assert parse_words("war, new  york,,army") == ("war", "new york", "army")


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_critic_learns_what_its_labels_say_and_is_calibrated(trained):
    critic, report = trained
    assert report.accuracy > 0.9 > report.majority + 0.2 and report.log_loss < 0.3
    assert report.calibration_error <= 0.12 and f"{report.accuracy:.3f}" in report.line()
    rewards = checked_rewards(critic, LATENTS, CHUNKS)
    assert (rewards <= 0).all()
    gradient = jax.grad(lambda z: critic(z).sum())(LATENTS)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4


def test_shorter_trajectories_count_as_they_would_alone(trained):
    critic, _ = trained
    alone = critic.logit(LATENTS[..., :2, :])
    np.testing.assert_allclose(critic.logit(LATENTS, jnp.full((4, 3), 2)), alone, rtol=1e-4, atol=1e-5)


def test_order_is_all_that_a_critic_of_coherence_has_to_go_by(autoencoder):
    """Four letters in a circle, each for a chunk; in another order they are unwanted."""
    circle = ["".join(letter * 4 for letter in ("abcdabcd"[start : start + 4])) for start in range(4)] * 100
    _, report = train_critic(circle, None, autoencoder, load_tokenizer("bytes"), OPTIONS)
    assert report.majority < 0.6 and report.accuracy > 0.85
    generator = np.random.default_rng(0)
    chunks = np.arange(12).reshape(3, 4)
    for _ in range(20):
        other = other_order(chunks, generator)
        assert sorted(map(tuple, other)) == sorted(map(tuple, chunks)) and (other != chunks).any()


def test_calibration_error_is_the_gap_between_what_is_said_and_found():
    assert calibration_error(np.full(10, 0.75), np.array([1.0] * 5 + [0.0] * 5)) == pytest.approx(0.25)
    assert calibration_error(np.array([0.05, 0.95]), np.array([0.0, 1.0])) == pytest.approx(0.05)


def test_too_few_lines_and_unreadable_files_are_refused(autoencoder, tmp_path):
    with pytest.raises(UsageError, match="1 wanted and 1 unwanted lines are too few"):
        train_critic(["a line of text"], ["another line"], autoencoder, load_tokenizer("bytes"))
    (tmp_path / "README.txt").write_text("about\n")
    with pytest.raises(UsageError, match="holds no line of text"):
        read_lines(tmp_path, "wanted")
    (tmp_path / "b.pos").write_text("two\n\n three \n")
    (tmp_path / "a.pos").write_text("one\n")
    assert read_lines(tmp_path, "wanted") == ["one", "two", "three"]
    (tmp_path / "c").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="c: not UTF-8 text"):
        read_lines(tmp_path, "wanted")
    with pytest.raises(UsageError, match="nowhere: no such file"):
        read_lines(tmp_path / "nowhere", "wanted")
    with pytest.raises(UsageError, match="steps at least 10"):
        CriticTraining(steps=3)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_critic_comes_back_from_its_files_and_is_refused_for_other_latents(trained, autoencoder, tmp_path):
    critic, report = trained
    for name, each in (("trained", critic), ("concept", ttt_models.concept())):
        save_critic(each, tmp_path / name, autoencoder, report=report.to_dict())
        back, description = load_critic(tmp_path / name, autoencoder)
        np.testing.assert_array_equal(back(LATENTS), each(LATENTS))
        assert description["kind"] == name and description["report"]["accuracy"] == report.accuracy
        assert jax.tree.structure(back) == jax.tree.structure(each)
    other = random_model(autoencoder.config, seed=5)
    assert fingerprint(other) != fingerprint(autoencoder)
    with pytest.raises(UsageError, match="another autoencoder .fingerprint"):
        load_critic(tmp_path / "trained", other)


def test_damaged_critics_are_refused(autoencoder, tmp_path):
    with pytest.raises(UsageError, match="holds no critic.json"):
        load_critic(tmp_path, autoencoder)
    save_critic(ttt_models.concept(), tmp_path, autoencoder)
    whole = (tmp_path / "critic.json").read_text()
    (tmp_path / "critic.json").write_text(json.dumps({**json.loads(whole), "kind": "oracle"}))
    with pytest.raises(UsageError, match="damaged"):
        load_critic(tmp_path, autoencoder)
    (tmp_path / "critic.json").write_text(whole)
    (tmp_path / "critic.safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match="damaged"):
        load_critic(tmp_path, autoencoder)
