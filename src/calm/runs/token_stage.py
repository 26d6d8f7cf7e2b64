"""The token baseline's training, from a configuration and prepared data to a finished run folder."""

import dataclasses
from pathlib import Path
from typing import Any

from calm.core.dense import Precision
from calm.errors import UsageError
from calm.runs.stages import (
    MAX_VALIDATION_TOKENS,
    TokenLMRun,
    best_parameters,
    counted_blocks,
    evaluation_key,
    filled,
    load_run_config,
    open_named,
    run_training,
    samples,
    starting_point,
    tokenizer_of,
    validation_blocks,
)
from calm.text.tokenizer import Tokenizer
from calm.token.likelihood import token_likelihood
from calm.token.model import TokenLM
from calm.token.objective import TokenObjective
from calm.token.sampler import SoftmaxSampler
from calm.train.mesh import initialize_distributed
from calm.train.protocol import Measured
from calm.train.settings import settle_precision
from calm.train.validate import validator


def train_token_lm(
    run: TokenLMRun, out: str | Path, resume: str = "auto", *, init_from: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Trains the token baseline into the run folder `out` and returns its scores; `init_from` as for `train_lm`."""
    initialize_distributed()
    data = open_named(run.data, "data")
    start = starting_point(init_from) if init_from else None
    if start is not None:
        start.require_tokenizer_of(data)
        run = dataclasses.replace(run, model=start.model(run.model))
    run = dataclasses.replace(run, model=filled(run.model, vocab_size=data.tokenizer.vocab_size))
    precision, rates = settle_precision(run.train.precision, out)
    sizes: dict[str, Any] = dict(context=run.train.num_tokens, precision=precision)
    objective, plain = TokenObjective(run.model, run.loss, **sizes), TokenObjective(run.model, **sizes)
    blocks, documents = validation_blocks(data, run.train.num_tokens, "valid", MAX_VALIDATION_TOKENS)
    # Held-out text is scored by its cross-entropy, whatever training adds to that.
    validate = validator(plain, counted_blocks(data, run, blocks), evaluation_key(run), run.train.steps)

    def evaluate(params: Any, step: int) -> dict[str, Measured]:
        nats = token_likelihood(objective.module(params), blocks, documents)
        return validate(objective.lm_params(params)) | {"nats_per_token": float(nats.means[0])}

    def sample(params: Any, step: int) -> str:
        return samples(objective.module(params), data, run.train.num_tokens, SoftmaxSampler(temperature=0.5))

    def attach() -> None:
        data.tokenizer.save(Path(out) / "tokenizer.json")

    hooks: dict[str, Any] = dict(evaluate=evaluate, sample=sample, start=start)
    result = run_training(objective, run, data, out, resume, precision, rates, quiet, attach, **hooks)
    return {"run": str(out), "step": result.step, **result.metrics}


def load_token_lm(folder: str | Path, precision: Precision = "float32") -> tuple[TokenLM, Tokenizer | None]:
    """A trained token model with its tokenizer, from its run (the best checkpoint)."""
    run = load_run_config(folder)
    if not isinstance(run, TokenLMRun):
        raise UsageError(f"{folder}: holds a run of kind {run.kind}, not a token language model")
    objective = TokenObjective(run.model, run.loss, context=run.train.num_tokens, precision=precision)
    return objective.module(best_parameters(folder, objective)), tokenizer_of(Path(folder))
