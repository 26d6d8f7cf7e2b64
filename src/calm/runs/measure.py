"""A closer look at a trained model than its scores: likelihood bound, cost, latents, and where it goes wrong.

Each function takes a loaded model (`calm.load`) and a folder of prepared data, and gives a report object; the commands
`calm evaluate --bound` and `--stride`, `calm inspect autoencoder` and `calm diagnose` print these.
"""

from pathlib import Path
from typing import Any

import jax

from calm.core.predictor import Decoding, NextVector
from calm.errors import UsageError
from calm.evaluate.bits_per_byte import scored_bytes
from calm.evaluate.blocks import text_protocol
from calm.evaluate.diagnose import DiagnoseOptions, diagnose
from calm.evaluate.diagnosis import Diagnosis
from calm.evaluate.flops import Inference, Training, next_vector_inference, token_inference
from calm.evaluate.inspect import inspect_autoencoder
from calm.evaluate.inspection import AutoencoderInspection
from calm.evaluate.likelihood import evaluate_likelihood
from calm.evaluate.likelihood_report import LikelihoodReport
from calm.evaluate.ngram import fit_ngrams
from calm.evaluate.perplexity import ScoredText
from calm.evaluate.perplexity_report import PerplexityReport
from calm.rng import stream
from calm.runs.bundle import Bundle
from calm.runs.stages import validation_blocks
from calm.text.shards import Data
from calm.token.likelihood import sliding_likelihood
from calm.token.model import TokenLM
from calm.token.softmax_head import SoftmaxHead
from calm.train.run_folder import RunFolder

CALIBRATION_BLOCKS = 8


def likelihood_bound(
    model: Bundle,
    data: str | Path | None = None,
    *,
    num_samples: int,
    split: str = "valid",
    max_tokens: int | None = None,
    seed: int = 0,
) -> LikelihoodReport:
    """A bound on the likelihood of held-out text (`calm.evaluate.nll_bound`) by `num_samples` latents at each position.

    The smoothing is fitted on text that is not scored: on the start of valid when another split is scored, else on the split's
    own first blocks, which are then left out.
    """
    predictor = _next_vector(model, "a token model's likelihood is exact: calm evaluate prints it")
    opened = model.prepared_data(data)
    blocks, documents = validation_blocks(opened, model.block_tokens, split, None)
    if split == "valid" or "valid" not in opened.manifest.splits:
        held = min(CALIBRATION_BLOCKS, len(blocks) // 2)
        if not held:
            raise UsageError(f"split {split!r} has one block of {model.block_tokens} tokens; a bound needs one more to fit on")
        calibration, blocks, documents = blocks[:held], blocks[held:], documents[held:]
        fitted_on = f"the first {held} blocks of {split}, which are not scored"
    else:
        calibration, _ = validation_blocks(opened, model.block_tokens, "valid", CALIBRATION_BLOCKS * model.block_tokens)
        fitted_on = f"the first {len(calibration)} blocks of valid"
    if max_tokens is not None:
        count = max(1, max_tokens // model.block_tokens)
        blocks, documents = blocks[:count], documents[:count]
    unigram, _ = fit_ngrams(model.training_data(opened).split("train"), model.tokenizer.vocab_size)
    return evaluate_likelihood(
        predictor,
        blocks,
        documents,
        stream(jax.random.key(seed), "bound"),
        unigram=unigram,
        calibration=calibration,
        fitted_on=fitted_on,
        num_bytes=int(scored_bytes(model.tokenizer.decode, blocks, model.chunk_size).sum()),
        num_samples=num_samples,
        text=_protocol(model, opened, split, seed),
        name=model.name,
    )


def sliding_window(
    model: Bundle,
    data: str | Path | None = None,
    *,
    stride: int,
    split: str = "valid",
    max_tokens: int | None = None,
    seed: int = 0,
) -> PerplexityReport:
    """The likelihood of a whole split under a token model, its first `max_tokens` tokens or all, by a window that moves on by
    `stride` tokens (`calm.token.likelihood`).
    """
    if not isinstance(model.lm, TokenLM):
        raise UsageError(f"stride: {model.folder} is no token model; its likelihood is only bounded (--bound)")
    opened = model.prepared_data(data)
    text = opened.split(split)
    tokens = text.read(0, min(text.num_tokens, max_tokens or text.num_tokens))
    options: dict[str, Any] = dict(window=model.block_tokens, stride=stride)
    sums, rows, first = sliding_likelihood(model.lm, tokens, text.documents, **options)
    return PerplexityReport(
        name=model.name,
        protocol=_protocol(model, opened, split, seed),
        stride=stride,
        likelihood=sums,
        scored=ScoredText.of(model.tokenizer, rows, first),
    )


def latents(
    model: Bundle, data: str | Path | None = None, *, split: str = "valid", max_tokens: int | None = None, seed: int = 0
) -> AutoencoderInspection:
    """What the autoencoder's latents are like on held-out text."""
    if model.autoencoder is None:
        raise UsageError(f"{model.folder}: holds a token model, which has no autoencoder")
    opened = model.prepared_data(data)
    blocks, documents = validation_blocks(opened, model.block_tokens, split, max_tokens)
    special = (model.tokenizer.begin_id, model.tokenizer.end_id, model.tokenizer.mask_id)
    text, key = _protocol(model, opened, split, seed), stream(jax.random.key(seed), "inspect")
    return inspect_autoencoder(
        model.autoencoder, blocks, documents, key, special_ids=special, text=text, name=model.folder.name
    )


def faults(
    model: Bundle,
    data: str | Path | None = None,
    *,
    split: str = "valid",
    max_tokens: int | None = None,
    decoding: Decoding | None = None,
    num_samples: int = 8,
    candidates: int = 100,
    seed: int = 0,
) -> Diagnosis:
    """The first stage of the way from text to text that fails, if any; `decoding` None: as the model is meant to be decoded."""
    predictor = _next_vector(model, "a token model has no latents to go wrong")
    opened = model.prepared_data(data)
    blocks, documents = validation_blocks(opened, model.block_tokens, split, max_tokens)
    unigram, bigram = fit_ngrams(model.training_data(opened).split("train"), model.tokenizer.vocab_size)
    return diagnose(
        predictor,
        blocks,
        documents,
        stream(jax.random.key(seed), "diagnose"),
        special=model.tokenizer,
        unigram=unigram,
        bigram=bigram,
        options=DiagnoseOptions(num_samples=num_samples, candidates=candidates, decoding=decoding or predictor.decoding),
        text=_protocol(model, opened, split, seed),
        name=str(model.folder),
    )


def cost(model: Bundle) -> tuple[Inference | None, Training | None]:
    """FLOPs of generation per token, and of the run's training where its folder says; None for what does not apply."""
    context = model.block_tokens // model.chunk_size
    inference: Inference | None = None
    if isinstance(model.lm, TokenLM):
        config = model.lm.config
        inference = token_inference(config, context, SoftmaxHead.flops(config.vocab_size, config.backbone.dim, config.width))
    elif model.lm is not None and model.autoencoder is not None:
        inference = next_vector_inference(model.lm.config, model.autoencoder.config, context)
    recorded: dict[str, Any] = RunFolder(model.folder, writes=False).read_meta().get("flops", {})
    training = Training(**recorded) if recorded else None
    return inference, training


def _next_vector(model: Bundle, otherwise: str) -> NextVector:
    if model.lm is None:
        raise UsageError(f"{model.folder}: holds an autoencoder only; name the run of a language model")
    if not isinstance(model.predictor, NextVector):
        raise UsageError(f"{model.folder}: {otherwise}")
    return model.predictor


def _protocol(model: Bundle, opened: Data, split: str, seed: int) -> Any:
    return text_protocol(opened, split, block_tokens=model.block_tokens, chunk_size=model.chunk_size, seed=seed)
