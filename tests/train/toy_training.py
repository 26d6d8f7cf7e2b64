"""A tiny objective and stream for the tests of training: logistic regression of the next token on an embedding of this one."""

import jax
import jax.numpy as jnp
import numpy as np

from calm.rng import stream

VOCAB, DIM = 16, 8


class ToyObjective:
    """Mean cross-entropy; `noise` adds randomness to it, `bad_step` makes it nan there. Its first axis of parameters is stacked."""

    def __init__(self, noise: float = 0.0, bad_step: int = -1, dim: int = DIM, frozen: bool = True):
        self.noise, self.bad_step, self.dim = noise, bad_step, dim
        self.frozen = {"offset": jnp.full((VOCAB,), 0.1)} if frozen else {}

    def init(self, key):
        layers = {
            "kernel": 0.3 * jax.random.normal(stream(key, "kernel"), (2, self.dim, self.dim)),
            "bias": jnp.zeros((2, self.dim)),
        }
        table = jax.random.normal(stream(key, "table"), (VOCAB, self.dim))
        return {"embed": {"embedding": table}, "layers": layers}

    def loss(self, params, frozen, tokens, key, step):
        table = params["embed"]["embedding"]
        hidden = table[tokens[:, :-1]]
        hidden = hidden + self.noise * jax.random.normal(key, hidden.shape)
        for kernel, bias in zip(params["layers"]["kernel"], params["layers"]["bias"], strict=True):
            hidden = jnp.tanh(hidden @ kernel + bias)
        logits = hidden @ table.T
        if frozen:
            logits = logits + frozen["offset"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        loss = -picked.mean()
        correct = (logits.argmax(-1) == tokens[:, 1:]).mean()
        return jnp.where(step == self.bad_step, jnp.nan, loss), {"accuracy": correct}

    def flops_per_token(self):
        return 6.0 * (2 * self.dim * self.dim + VOCAB * self.dim)


class ToyBatches:
    """Row i of batch n: a noisy walk around the vocabulary, a function of (seed, n, i)."""

    def __init__(self, batch_size=8, num_tokens=12, seed=0, slow=0.0):
        self.batch_size, self.num_tokens, self.seed, self.position = batch_size, num_tokens, seed, 0

    @property
    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]

    def __iter__(self):
        return self

    def __next__(self):
        generator = np.random.default_rng([self.seed, self.position])
        self.position += 1
        start = generator.integers(0, VOCAB, (self.batch_size, 1))
        steps = 1 + (generator.random((self.batch_size, self.num_tokens)) < 0.2)
        return ((start + np.cumsum(steps, 1)) % VOCAB).astype(np.int32)
