"""Evaluations of a loaded model: likelihood, writing, latents, the first failing stage, and cost.

Each function takes a loaded model (`calm.load`) and a folder of prepared data, and returns a report; `calm evaluate`,
`calm inspect autoencoder` and `calm diagnose` print these.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from calm.core.brier_lm import TextProtocol
from calm.core.choose import from_temperature
from calm.core.chunk_decoder import Decoding
from calm.core.predictor import NextVector
from calm.core.sampler import Sampler
from calm.errors import UsageError
from calm.evaluate.backbone_use import BackboneUse, measure_backbone_use
from calm.evaluate.blocks import text_protocol
from calm.evaluate.diagnosis import DiagnoseOptions, Diagnosis, diagnose
from calm.evaluate.flops import Inference, Training, next_vector_inference, token_inference
from calm.evaluate.frontier import FrontierOptions, FrontierReport, measure_frontier
from calm.evaluate.inspection import AutoencoderInspection, inspect_autoencoder
from calm.evaluate.likelihood import LikelihoodReport, evaluate_likelihood
from calm.evaluate.ngram import fit_ngrams
from calm.evaluate.perplexity import PerplexityReport, ScoredText, scored_bytes
from calm.evaluate.vector_use import NoVectorUse, VectorUse, enough_text, measure_vector_use
from calm.evaluate.writing import Judge, Prompts, QualityReport, judged
from calm.rng import stream
from calm.runs.bundle import Bundle
from calm.runs.stages import validation_blocks
from calm.text.shards import Data
from calm.token.likelihood import sliding_likelihood
from calm.token.model import TokenLM
from calm.token.sampler import softmax_sampler
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
    """Bounds the likelihood of held-out text (`calm.evaluate.likelihood`) by `num_samples` latents at each position.

    The smoothing is fitted on text that is not scored: on the start of valid when another split is scored, else on the split's
    own first blocks, which are then left out.
    """
    predictor = _next_vector(model, "a token model's likelihood is exact: calm evaluate prints it")
    opened = model.prepared_data(data)
    blocks, documents, calibration, fitted_on = _calibrated_blocks(model, opened, split, max_tokens)
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


def vector_use(
    model: Bundle,
    data: str | Path | None = None,
    *,
    split: str = "valid",
    max_tokens: int | None = 8 * 1024,
    num_samples: int = 8,
    decoding: Decoding | None = None,
    seed: int = 0,
) -> VectorUse | NoVectorUse:
    """Judges whether what the model writes depends on its vector (`calm.evaluate.vector_use`); `decoding` None: what suits the
    model.
    """
    if isinstance(model.lm, TokenLM):
        return NoVectorUse(name=model.name, reason="a token model predicts no vector")
    predictor = _next_vector(model, "predicts no vector")
    writer = predictor.lm.context_decoder
    if writer is not None and not writer.reads_latent:
        return NoVectorUse(name=model.name, reason="its decoder writes from the hidden state alone (use_latent is off)")
    opened = model.prepared_data(data)
    blocks, documents, calibration, fitted_on = _calibrated_blocks(model, opened, split, max_tokens, spread=True)
    if not enough_text(len(blocks), model.block_tokens // model.chunk_size):
        reason = f"split {split!r} holds {len(blocks)} blocks of {model.block_tokens} tokens beside those of the calibration"
        return NoVectorUse(name=model.name, reason=reason, verdict="not measured")
    unigram, _ = fit_ngrams(model.training_data(opened).split("train"), model.tokenizer.vocab_size)
    return measure_vector_use(
        predictor,
        blocks,
        documents,
        stream(jax.random.key(seed), "vector"),
        unigram=unigram,
        calibration=calibration,
        fitted_on=fitted_on,
        num_samples=num_samples,
        decoding=decoding,
        text=_protocol(model, opened, split, seed),
        name=model.name,
    )


def backbone_use(
    model: Bundle,
    data: str | Path | None = None,
    *,
    split: str = "valid",
    max_tokens: int | None = 8 * 1024,
    num_samples: int = 8,
    seed: int = 0,
) -> BackboneUse | None:
    """Judges whether the backbone of a next-vector model is read (`calm.evaluate.backbone_use`); None where there is too little
    text."""
    predictor, opened = _next_vector(model, "predicts no vector"), model.prepared_data(data)
    blocks, documents, calibration, _ = _calibrated_blocks(model, opened, split, max_tokens, spread=True)
    if not enough_text(len(blocks), model.block_tokens // model.chunk_size):
        return None
    unigram, _ = fit_ngrams(model.training_data(opened).split("train"), model.tokenizer.vocab_size)
    return measure_backbone_use(
        predictor,
        blocks,
        documents,
        stream(jax.random.key(seed), "backbone"),
        unigram=unigram,
        calibration=calibration,
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
    """Likelihood of a whole split, or its first `max_tokens` tokens, under a token model, by a window that moves by `stride`
    tokens (`calm.token.likelihood`).
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


def inspect_latents(
    model: Bundle, data: str | Path | None = None, *, split: str = "valid", max_tokens: int | None = None, seed: int = 0
) -> AutoencoderInspection:
    """Accuracy under noise, spread and smoothness of the autoencoder's latents on held-out text."""
    if model.autoencoder is None:
        raise UsageError(f"{model.folder}: holds a token model, which has no autoencoder")
    opened = model.prepared_data(data)
    blocks, documents = validation_blocks(opened, model.block_tokens, split, max_tokens)
    special = (model.tokenizer.begin_id, model.tokenizer.end_id, model.tokenizer.mask_id)
    text, key = _protocol(model, opened, split, seed), stream(jax.random.key(seed), "inspect")
    return inspect_autoencoder(
        model.autoencoder, blocks, documents, key, special_ids=special, text=text, name=model.folder.name
    )


def find_failure(
    model: Bundle,
    data: str | Path | None = None,
    *,
    split: str = "valid",
    max_tokens: int | None = None,
    decoding: Decoding | None = None,
    num_samples: int = 8,
    candidates: int = 100,
    vector: VectorUse | NoVectorUse | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Judges the stages from text to text (`calm.evaluate.diagnosis`), with `vector` also the use of the vector.

    `decoding` None: what suits the model.
    """
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
        vector=vector,
        options=DiagnoseOptions(num_samples=num_samples, candidates=candidates, decoding=decoding or predictor.decoding),
        text=_protocol(model, opened, split, seed),
        name=str(model.folder),
    )


def score_writing(
    model: Bundle,
    data: str | Path | None = None,
    *,
    judge: Bundle | None = None,
    split: str = "valid",
    samples: int = 32,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    temperature: float | str = 1.0,
    candidates: int = 200,
    decoding: Decoding | None = None,
    seed: int = 0,
    name: str = "",
) -> QualityReport:
    """Writes and scores `samples` continuations by the model, the n-gram models and the held-out text itself.

    Args:
        data, split: as in `Bundle.evaluate`.
        judge: a token model of another run, which reads every text; none = repetition and distinct-n only.
        samples: how many prompts, each of `prompt_tokens` from the start of a block; new_tokens: the most that follow each.
        temperature, candidates, decoding: as in `Bundle.generate`; the n-gram models are drawn at temperature 1.
        name: what tables call the model; by default `Bundle.name`.
    Raises:
        UsageError: a judge without a token model or from the same folder, or more text than the split or a context holds.
    """
    reader = None if judge is None else as_judge(judge, model)
    opened, end_id = model.prepared_data(data), model.tokenizer.end_id
    blocks, _ = validation_blocks(opened, model.block_tokens, split, None)
    prompts = Prompts.of(blocks, end_id, samples=samples, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    sampler: Sampler = from_temperature(temperature, candidates)
    if isinstance(model.lm, TokenLM):
        sampler = softmax_sampler(temperature)
    key = stream(jax.random.key(seed), "write")
    own = prompts.continued_by(
        model.predictor, model.tokenizer, key, sampler=sampler, decoding=decoding or model.predictor.decoding
    )
    rows: dict[str, Any] = {name or model.name: own}
    ngrams = fit_ngrams(model.training_data(opened).split("train"), model.tokenizer.vocab_size)
    for name, ngram in zip(("unigram", "bigram"), ngrams, strict=True):
        rows[name] = prompts.continued_by_ngram(ngram, model.tokenizer, seed)
    rows["held-out text"] = list(prompts.following)
    return QualityReport(
        judge="" if reader is None else reader.name,
        samples=samples,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        temperature=str(temperature),
        seed=seed,
        writings=tuple(judged(name, prompts, texts, model.tokenizer, reader) for name, texts in rows.items()),
    )


def as_judge(judge: Bundle, model: Bundle) -> Judge:
    """A token model as the judge of another model's text. Raises UsageError if it cannot be one."""
    if not isinstance(judge.lm, TokenLM):
        raise UsageError(f"judge {judge.folder}: only a token model can judge; `calm train token-lm` makes one")
    if judge.folder.resolve() == model.folder.resolve():
        raise UsageError(f"judge {judge.folder}: is the model that is judged; name a run of another seed")
    name = f"{judge.folder.name} (tokenizer {judge.tokenizer.fingerprint})"
    return Judge(name=name, lm=judge.lm, tokenizer=judge.tokenizer, block_tokens=judge.block_tokens)


def sweep_frontier(
    model: Bundle,
    data: str | Path | None = None,
    *,
    split: str = "valid",
    max_tokens: int | None = None,
    temperatures: Sequence[str] = FrontierOptions.temperatures,
    sizes: Sequence[int] = FrontierOptions.sizes,
    positions: int = FrontierOptions.positions,
    decoding: Decoding | None = None,
    seed: int = 0,
) -> FrontierReport:
    """Sweeps the batch sampler (`calm.evaluate.frontier`); `decoding` None: what suits the model."""
    predictor = model.predictor
    options = FrontierOptions(
        temperatures=tuple(temperatures), sizes=tuple(sizes), positions=positions, decoding=decoding or predictor.decoding
    )
    opened = model.prepared_data(data)
    blocks, documents = validation_blocks(opened, model.block_tokens, split, max_tokens)
    text = _protocol(model, opened, split, seed)
    return measure_frontier(predictor, blocks, documents, jax.random.key(seed), options=options, text=text)


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


def _calibrated_blocks(
    model: Bundle, opened: Data, split: str, max_tokens: int | None, *, spread: bool = False
) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R"], Int[np.ndarray, "Q T"], str]:
    """Blocks to score and the document of each; blocks to choose the smoothing on, and a description of these.

    `spread`: at least two blocks, spread evenly over the split, so that they are of different texts; else its first ones.
    """
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
        count = min(max(1 + spread, max_tokens // model.block_tokens), len(blocks))
        chosen = np.arange(count) * len(blocks) // count if spread else np.arange(count)
        blocks, documents = blocks[chosen], documents[chosen]
    return blocks, documents, calibration, fitted_on


def _next_vector(model: Bundle, otherwise: str) -> NextVector:
    if model.lm is None:
        raise UsageError(f"{model.folder}: holds an autoencoder only; name the run of a language model")
    if not isinstance(model.predictor, NextVector):
        raise UsageError(f"{model.folder}: {otherwise}")
    return model.predictor


def _protocol(model: Bundle, opened: Data, split: str, seed: int) -> TextProtocol:
    return text_protocol(opened, split, block_tokens=model.block_tokens, chunk_size=model.chunk_size, seed=seed)
