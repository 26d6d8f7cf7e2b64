"""A tiny objective and stream for the tests of training: logistic regression of the next token on an embedding of this one.

As a program it trains in a folder, and a signal that it sends itself ends it: `toy_training.py FOLDER SIGNAL STEP`.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from calm.errors import CalmError
from calm.rng import stream
from calm.train.loop import TrainConfig, TrainResult, train
from calm.train.optim import OptimizerConfig

VOCAB, DIM = 16, 8
STEPS, SAVE_EVERY = 24, 5
CONFIG_TEXT = "seed = 0\n[train]\nsteps = 24\n"


class ToyObjective:
    """Mean cross-entropy; `noise` adds randomness, `bad_step` makes it nan there. Layers are stacked, as in real models."""

    def __init__(self, noise: float = 0.0, bad_step: int = -1, dim: int = DIM):
        self.noise, self.bad_step, self.dim = noise, bad_step, dim
        self.frozen = {"offset": jnp.full((VOCAB,), 0.1)}

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
        logits = hidden @ table.T + frozen["offset"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        loss = -picked.mean()
        correct = (logits.argmax(-1) == tokens[:, 1:]).mean()
        return jnp.where(step == self.bad_step, jnp.nan, loss), {"accuracy": correct}

    def flops_per_token(self):
        return 6.0 * (2 * self.dim * self.dim + VOCAB * self.dim)


class ToyBatches:
    """Row i of batch n: a noisy walk around the vocabulary, a function of (seed, n, i). Sends a signal at a batch, if told."""

    def __init__(self, batch_size=8, num_tokens=12, seed=0, signal_number=0, signal_at=-1):
        self.batch_size, self.num_tokens, self.seed, self.position = batch_size, num_tokens, seed, 0
        self.signal_number, self.signal_at = signal_number, signal_at

    @property
    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.signal_at:
            os.kill(os.getpid(), self.signal_number)
        generator = np.random.default_rng([self.seed, self.position])
        self.position += 1
        start = generator.integers(0, VOCAB, (self.batch_size, 1))
        steps = 1 + (generator.random((self.batch_size, self.num_tokens)) < 0.2)
        return ((start + np.cumsum(steps, 1)) % VOCAB).astype(np.int32)


def config(**changes) -> TrainConfig:
    values = {
        "steps": STEPS,
        "batch_size": 8,
        "num_tokens": 12,
        "log_every": 4,
        "evaluate_every": 6,
        "save_every": SAVE_EVERY,
        "best_metric": "valid/loss",
        "ema_decay": 0.9,
        "optimizer": OptimizerConfig(learning_rate=0.02, warmup_steps=4, schedule="cosine"),
    }
    return TrainConfig(**(values | changes))


def evaluate(params, step) -> dict[str, float]:
    """Best at step 12, whatever the parameters; and a digest of the parameters, so that records show any difference in them."""
    digest = sum(float(jnp.sum(leaf * leaf)) for leaf in jax.tree.leaves(params))
    return {"loss": (step - 12.5) ** 2, "digest": digest}


def run(folder: Path, batches: ToyBatches | None = None, objective: ToyObjective | None = None, **options) -> TrainResult:
    """One run of the toy in `folder`; `options` are those of `train`, or fields of its configuration."""
    names = ("config_text", "evaluate", "sample", "trackers", "resume", "facts", "rates", "precision")
    arguments = {name: options.pop(name) for name in names if name in options}
    arguments = {"config_text": CONFIG_TEXT, "evaluate": evaluate, "quiet": True} | arguments
    return train(objective or ToyObjective(noise=0.1), batches or ToyBatches(), config(**options), folder, **arguments)


if __name__ == "__main__":
    number, at = signal.Signals[sys.argv[2]], int(sys.argv[3])
    try:
        run(Path(sys.argv[1]), ToyBatches(signal_number=number, signal_at=at))
    except CalmError as error:
        print(error)
        sys.exit(error.exit_code)
