"""How well a trained model writes: its continuations of held-out prompts beside those of baselines and of the text itself."""

from pathlib import Path
from typing import Any

import jax

from calm.core.choose import from_temperature
from calm.core.predictor import Decoding
from calm.core.sampler import Sampler
from calm.errors import UsageError
from calm.evaluate.ngram import fit_ngrams
from calm.evaluate.quality_report import QualityReport
from calm.evaluate.text_quality import Judge, Prompts, judged
from calm.rng import stream
from calm.runs.bundle import Bundle
from calm.runs.stages import validation_blocks
from calm.token.model import TokenLM
from calm.token.sampler import softmax_sampler


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
) -> QualityReport:
    """Writes and scores `samples` continuations by the model, the n-gram models and the held-out text itself.

    Args:
        data, split: as in `Bundle.evaluate`.
        judge: a token model of another run, which reads every text; none = repetition and distinct-n only.
        samples: how many prompts, each of `prompt_tokens` from the start of a block; new_tokens: the most that follow each.
        temperature, candidates, decoding: as in `Bundle.generate`; the n-gram models are drawn at temperature 1.
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
    rows: dict[str, Any] = {model.name: own}
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
    """A token model as the reader of what another model writes. Raises UsageError if it cannot be."""
    if not isinstance(judge.lm, TokenLM):
        raise UsageError(f"judge {judge.folder}: only a token model can judge; `calm train token-lm` makes one")
    if judge.folder.resolve() == model.folder.resolve():
        raise UsageError(f"judge {judge.folder}: is the model that is judged; name a run of another seed")
    name = f"{judge.folder.name} (tokenizer {judge.tokenizer.fingerprint})"
    return Judge(name=name, lm=judge.lm, tokenizer=judge.tokenizer, block_tokens=judge.block_tokens)
