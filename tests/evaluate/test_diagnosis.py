"""Diagnosis: a planted model without fault passes every stage, and each planted fault is the first stage that fails."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.brier_lm import TextProtocol
from calm.core.gaussian import Gaussian
from calm.core.generate import SpecialIds
from calm.core.intervals import Interval
from calm.core.predictor import NextVector, Noise
from calm.errors import UsageError
from calm.evaluate.diagnosis import (
    DiagnoseOptions,
    Diagnosis,
    diagnose,
    judge_alignment,
    judge_codec,
    judge_free_running,
    judge_head_mean,
    judge_voted,
)
from calm.evaluate.ngram import fit_ngrams
from planted_decoder import PlantedDecoder

K, V, WORDS, STATES = 3, 20, 16, 12
SPECIAL = SpecialIds(begin_id=17, end_id=18, mask_id=19)
CHUNKS = np.random.default_rng(0).integers(0, WORDS, (STATES, K))  # the language: a walk over twelve chunks
JUNK = np.full(K, 16)
STAY = 0.6  # probability of the likeliest next chunk; else any


def next_state(state, uniform, pick):
    return jnp.where(uniform < STAY, (5 * state + 1) % STATES, (pick * STATES).astype(int))


def text(rows: int, chunks: int, seed: int) -> np.ndarray:
    generator, state = np.random.default_rng(seed), np.zeros(rows, int)
    walk = []
    for _ in range(chunks):
        state = np.asarray(next_state(state, generator.random(rows), generator.random(rows)))
        walk.append(CHUNKS[state])
    return np.concatenate(walk, axis=1)


class Codec(nnx.Module):
    """Latents are one-hot tokens, so that the decoder is the identity."""

    config, precision = SimpleNamespace(chunk_size=K), "float32"

    def __init__(self, fault: str):
        self.eye, self.fault = nnx.Variable(jnp.eye(V)), fault

    @property
    def table(self):
        return self.eye[...]

    def encode(self, chunks):
        mean = 6 * jax.nn.one_hot(chunks, V).reshape(*chunks.shape[:-1], K * V)
        return Gaussian(mean, jnp.full_like(mean, jnp.log(0.3)))

    def decode_states(self, latents):
        states = latents.reshape(*latents.shape[:-1], K, V)
        return states.at[..., K - 1, :].set(0.0) if self.fault == "codec round trip" else states

    def decode(self, latents):
        return self.decode_states(latents).argmax(-1)


class Head(nnx.Module):
    """Draws the next state of the walk and gives its chunk's latent."""

    def __init__(self, fault: str):
        self.fault = fault

    def draw_noise(self, key, shape):
        return jax.random.uniform(key, (*shape, 4))

    def __call__(self, hidden, noise):
        known, state = hidden[..., 0] > 0, hidden[..., 1].astype(int)
        uniform, pick, other, junk = jnp.moveaxis(noise, -1, 0)
        follows = next_state(state, uniform, pick)
        chosen = jnp.where(known & (self.fault != "head mean"), follows, (other * STATES).astype(int))
        chunks = jnp.asarray(CHUNKS)[chosen]
        if self.fault == "voted sample":  # one chunk of nonsense, more frequent than any right one
            chunks = jnp.where((junk < 0.2)[..., None], jnp.asarray(JUNK), chunks)
            # and what is right is never the same twice: its last token is anything
            last = jnp.where(junk < 0.2, JUNK[-1], (WORDS * (junk - 0.2) / 0.8).astype(int))
            chunks = chunks.at[..., K - 1].set(last)
        latents = 6 * jax.nn.one_hot(chunks, V).reshape(*chunks.shape[:-1], K * V)
        if self.fault == "one sample":  # the mean is right, and each draw far from it
            wrong = jax.nn.one_hot(jnp.full((*junk.shape, K), JUNK[0]), V).reshape(*junk.shape, K * V)
            latents = latents + jnp.where(junk < 0.8, 8.0, -32.0)[..., None] * wrong
        return latents


class State(NamedTuple):
    offset: jax.Array
    starts: jax.Array
    layers: jax.Array


class Planted(nnx.Module):
    """A predictor that knows the walk: its hidden state is (known, state of the last chunk)."""

    precision, decoding, vocab_size, chunk_size, num_layers, reach = "float32", "argmax", V, K, 1, 0
    write, write_latents = NextVector.write, NextVector.write_latents
    fork, rewind = NextVector.fork, NextVector.rewind

    def __init__(self, fault: str = ""):
        self.autoencoder, self.fault = Codec(fault), fault
        self.lm = nnx.Module()
        self.lm.head, self.lm.context_decoder = Head(fault), None

    @property
    def decoder(self):
        return PlantedDecoder(self.autoencoder)

    @property
    def table(self):
        return self.autoencoder.table

    def init_state(self, batch, context, starts=None, *, rewindable=False):
        starts = jnp.zeros((batch,), jnp.int32) if starts is None else starts
        return State(jnp.zeros((), jnp.int32), starts, jnp.zeros((1, batch)))

    def hidden(self, chunks, state=None):
        equal = (chunks[..., None, :] == jnp.asarray(CHUNKS)).all(-1)
        known, place = equal.any(-1), equal.argmax(-1)
        if self.fault == "prompt alignment":  # a begin id in the prompt, not in the padding, spoils all that follows it
            starts = jnp.zeros(len(chunks), jnp.int32) if state is None else state.starts
            of_prompt = jnp.arange(chunks.shape[1]) >= starts[:, None]
            known &= jnp.cumsum((chunks == SPECIAL.begin_id).any(-1) & of_prompt, axis=1) == 0
        if state is not None:
            if self.fault == "free running" and chunks.shape[1] == 1:
                known = jnp.zeros_like(known)
            state = state._replace(offset=state.offset + chunks.shape[1])
        return jnp.stack([known, place], -1).astype(jnp.float32), state

    def draw_noise(self, key, shape, decoding="argmax"):
        return Noise(self.lm.head.draw_noise(key, shape), None)


class Train(NamedTuple):
    tokens: np.ndarray

    @property
    def num_tokens(self):
        return len(self.tokens)

    def read(self, start, length):
        return self.tokens[start : start + length]


BLOCKS = text(40, 20, seed=1)
UNIGRAM, BIGRAM = fit_ngrams(Train(text(1, 4000, seed=2)[0]), V)


def diagnosis(fault: str = "", **options):
    options = DiagnoseOptions(**{"candidates": 40, **options})
    key, document = jax.random.key(0), np.arange(len(BLOCKS))
    return diagnose(
        Planted(fault), BLOCKS, document, key, special=SPECIAL, unigram=UNIGRAM, bigram=BIGRAM, options=options, name=fault
    )


FAULTS = ["codec round trip", "head mean", "one sample", "voted sample", "prompt alignment", "free running"]


def test_a_model_without_fault_passes_every_stage():
    found = diagnosis()
    assert found.first_failure is None and "no stage fails" in found.verdict, found.table()
    assert [stage.name for stage in found.stages] == FAULTS
    assert found.to_dict()["first_failure"] is None and len(found.to_dict()["stages"]) == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_the_first_stage_that_fails(fault):
    found = diagnosis(fault)
    assert found.first_failure is not None and found.first_failure.name == fault, found.table()
    assert f"the first stage that fails is {fault}" in found.verdict
    assert any(character.isdigit() for character in found.first_failure.finding)
    assert "FAILS" in found.table() and found.first_failure.threshold in found.table()


def at(estimate, spread=0.01):
    return Interval(estimate=estimate, low=estimate - spread, high=estimate + spread)


def test_thresholds_are_where_they_are_said_to_be():
    assert judge_codec(at(0.98), at(0.9), at(0.9)).failed and not judge_codec(at(0.995), at(0.9), at(0.9)).failed
    assert judge_head_mean(at(0.005), 0.0, 0.0).failed and not judge_head_mean(at(0.05), 0.0, 0.0).failed
    assert judge_head_mean(at(0.02, spread=0.03), 0.0, 0.0).failed  # not shown to be above nothing
    assert judge_head_mean(None, 0.0, 0.0).failed is None
    assert judge_voted(at(-0.05), 0.1, 0.0, 100).failed and not judge_voted(at(0.0), 0.1, 0.0, 100).failed
    assert judge_alignment(10.0, {0: at(3.0)}, 0.0).failed and not judge_alignment(10.0, {0: at(2.0)}, 0.0).failed
    assert judge_alignment(10.0, {0: at(0.0)}, 0.1).failed and not judge_alignment(-5.0, {0: at(1.0, spread=2.0)}, 0.0).failed
    fine = dict(state=0.001, drift=0.1, repeated=0.02, repeated_in_text=0.01, early_ends=0.0, distinct=0.9)
    assert not judge_free_running(**fine).failed
    for name, bad, words in (
        ("state", 0.2, "hidden state differs"),
        ("drift", 1.5, "less likely"),
        ("repeated", 0.4, "repeat"),
        ("early_ends", 0.6, "end in their first quarter"),
    ):
        stage = judge_free_running(**fine | {name: bad})
        assert stage.failed and words in stage.finding


def test_the_first_failure_is_named_even_if_later_ones_are_worse():
    stages = (
        judge_codec(at(0.999), at(0.99), at(0.99)),
        judge_head_mean(at(0.0), 0.0, 0.0),
        judge_voted(at(-0.5), 0.0, 1.0, 9),
    )
    protocol = TextProtocol(dataset="d", sha256="s", split="valid", tokenizer="t", block_tokens=8, chunk_size=4)
    assert Diagnosis(name="m", protocol=protocol, stages=stages).first_failure.name == "head mean"


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="num_samples and candidates"):
        DiagnoseOptions(num_samples=1)
    arguments = dict(special=SPECIAL, unigram=UNIGRAM, bigram=BIGRAM)
    with pytest.raises(UsageError, match="at least 2 blocks of 4 chunks"):
        diagnose(Planted(), BLOCKS[:1], np.zeros(1, int), jax.random.key(0), **arguments)
