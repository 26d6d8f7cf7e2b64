"""`calm evaluate RUN`: score a run on held-out text."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError

MODELS, BASELINES = ("world", "lm"), ("kn5+cache", "kn5", "bigram", "unigram")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Scores a run on held-out text: reconstruction for an autoencoder; also BrierLM and the use of the vector for a language
    model.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    data: str | None = None
    """Prepared data; without it, the data that the run was trained on."""
    split: str = "valid"
    """train, valid or test."""
    max_tokens: int | None = None
    """Score only this many tokens (30k, 2M are understood); without it, the whole split."""
    num_samples: int = 8
    """Samples of the next chunk at every position, from which BrierLM is estimated."""
    decoding: Literal["argmax", "drawn"] | None = None
    """How a latent becomes tokens: the decoder's argmax, or drawn from its softmax (scored exactly); by default what suits the
    model."""
    boundary_every: int = 4
    """Tokens from one scored place to the next: 4 for models of 1, 2 or 4 tokens a chunk alike, 1 for every token."""
    noise: tuple[float, ...] = (0.3,)
    """Noise on the posterior mean under which the autoencoder's reconstruction is scored too."""
    bound: int = 0
    """Also bound the likelihood by this many samples of the latent (64, or up to 1024 on little text); 0 = no."""
    bound_tokens: int = 16 * 1024
    """Tokens on which it is bounded: each costs as much as all its samples."""
    vector_tokens: int = 8 * 1024
    """Tokens on which it is measured whether the decoder uses its vector, under vectors of other text, zero and the true one;
    0 = not at all."""
    stride: int = 0
    """For a token model: also score the whole split under a window that moves by so many tokens, as perplexities are published
    (half the training length is usual); 0 = no."""
    samples: int = 0
    """Let the model write this many continuations of held-out prompts, and score them too; 0 = none."""
    judge: str | None = None
    """Run or export of an independent token model, which then judges these texts by the bits that each byte costs it."""
    sample_tokens: int = 128
    """The most tokens of a continuation."""
    sample_temperature: str = "1"
    """The temperature at which they are written."""
    seed: int = 0
    out: str | None = None
    """Also write the scores as JSON to this file."""

    def run(self) -> dict[str, Any]:
        from calm.cli import plain
        from calm.core.latent_lm import LatentLM
        from calm.evaluate.scores import compare
        from calm.runs import bundle
        from calm.runs.evaluation import (
            as_judge,
            backbone_use,
            cost,
            likelihood_bound,
            score_writing,
            sliding_window,
            vector_use,
        )

        if self.judge is not None and not self.samples:
            raise UsageError("--judge reads continuations: say how many with --samples")
        if self.vector_tokens < 0:
            raise UsageError(f"vector_tokens must be at least 0, got {self.vector_tokens}")
        model = bundle.load(self.folder)
        judge = None if self.judge is None else bundle.load(self.judge)
        if judge is not None:
            as_judge(judge, model)  # one that cannot judge is refused before the long part
        likelihood: dict[str, Any] = {}
        if self.bound:
            options: dict[str, Any] = dict(split=self.split, max_tokens=self.bound_tokens, seed=self.seed)
            likelihood["bound"] = likelihood_bound(model, self.data, num_samples=self.bound, **options)
        if self.stride:
            options = dict(split=self.split, max_tokens=self.max_tokens, seed=self.seed)
            likelihood["sliding"] = sliding_window(model, self.data, stride=self.stride, **options)
        scores = likelihood | model.evaluate(
            self.data,
            split=self.split,
            max_tokens=self.max_tokens,
            num_samples=self.num_samples,
            decoding=self.decoding,
            boundary_every=self.boundary_every,
            noise=self.noise,
            seed=self.seed,
        )
        name = model.name
        if "lm" in scores:
            if self.vector_tokens:
                options = dict(split=self.split, max_tokens=self.vector_tokens, num_samples=self.num_samples, seed=self.seed)
                scores["vector"] = vector_use(model, self.data, decoding=self.decoding, **options)
                name = scores["vector"].label or name
                if isinstance(model.lm, LatentLM) and (backbone := backbone_use(model, self.data, **options)) is not None:
                    scores["backbone"] = backbone
            scores["lm"] = dataclasses.replace(scores["lm"], name=name)
            scores["against_bigram"] = compare(scores["lm"], scores["bigram"])
            scores["against_kn5+cache"] = compare(scores["lm"], scores["kn5+cache"])
        inference, training = cost(model)
        scores["flops"] = {"inference": inference, "training": training}
        if self.samples:
            scores["writing"] = score_writing(
                model,
                self.data,
                judge=judge,
                split=self.split,
                samples=self.samples,
                new_tokens=self.sample_tokens,
                temperature=self.sample_temperature,
                decoding=self.decoding,
                seed=self.seed,
                name=name,
            )
        if self.out is not None:
            Path(self.out).write_text(json.dumps(plain(scores), indent=2) + "\n", encoding="utf-8")
        return scores

    def show(self, scores: dict[str, Any]) -> str:
        from calm.evaluate.flops import flops_line
        from calm.evaluate.scores import brier_table

        parts = [scores["autoencoder"].table()] if "autoencoder" in scores else []
        if "lm" in scores:
            parts += [
                brier_table([scores[name] for name in (*MODELS, *BASELINES) if name in scores]),
                scores["against_bigram"].table(),
                scores["against_kn5+cache"].table(),
            ]
        if "vector" in scores:
            parts.append(scores["vector"].table())
        if "backbone" in scores:
            parts.append(scores["backbone"].table())
        if "sliding" in scores:
            parts.append(scores["sliding"].table())
        if "bound" in scores:
            parts.append(scores["bound"].table())
        cost = flops_line(scores["flops"]["inference"], scores["flops"]["training"])
        if cost:
            parts.append(cost)
        if "writing" in scores:
            brier = {scores[name].name: scores[name].brier_lm for name in ("lm", *BASELINES)}
            parts.append(scores["writing"].table(brier))
        return "\n\n".join(parts)
