"""What a model costs, in floating-point operations per token of text: the yardstick on which models are compared.

A multiplication and an addition are two operations, and only matrix products count (XLA's own count of whole programs is at
most a tenth above). A backward pass costs twice its forward pass. Attention to a context counts in full, masked positions too.
A model that predicts K tokens at a time is divided by K.

The rule of equal compute: whatever a run had to do counts. In training that is the head once per sample, every auxiliary term,
the encoder that makes the targets, and the autoencoder's own training, which is spread over the language model's tokens and
also stated apart. In generation the head runs once and the decoder's vocabulary projection is part of the price.

Source: with the head counted once per sample this reproduces the figures that CALM (arXiv:2510.27688) prints for its models M
and L within 2 %; the paper does not write its formula out. Configurations report their own `flops`; this only adds.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class NextVectorCost(Protocol):
    """A language model's configuration (`calm.models.LatentLMConfig`)."""

    @property
    def chunk_size(self) -> int: ...

    @property
    def context_decoder(self) -> Any:
        """What writes a chunk in place of the autoencoder's decoder, or None."""
        ...

    def flops(self, context: int, num_samples: int) -> int:
        """Forward FLOPs of one position in a context of chunks, with so many samples of the head."""
        ...

    def writing_flops(self, num_samples: int) -> int:
        """Forward FLOPs of the context decoder."""
        ...


@runtime_checkable
class CodecCost(Protocol):
    """An autoencoder's configuration (`calm.autoencoder.AutoencoderConfig`)."""

    def decoder_flops(self) -> int: ...

    def vocabulary_flops(self) -> int: ...


@runtime_checkable
class TokenCost(Protocol):
    """A token model's configuration (`calm.models.TokenLMConfig`)."""

    def flops(self, context: int) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """FLOPs per generated token at full context, by part."""

    backbone: float
    """with whatever stands in front of it"""
    head: float
    writing: float
    """from latents to logits"""

    @property
    def total(self) -> float:
        return self.backbone + self.head + self.writing

    def to_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "total": self.total}


def next_vector_inference(lm: NextVectorCost, autoencoder: CodecCost, context: int, candidates: int = 1) -> Inference:
    """A next-vector model that draws `candidates` chunks at each step (1 at temperature 1), behind `context` chunks."""
    backbone, with_head = lm.flops(context, 0), lm.flops(context, candidates)
    if lm.context_decoder is None:
        writing = candidates * (autoencoder.decoder_flops() + autoencoder.vocabulary_flops())
    else:
        writing = lm.writing_flops(candidates)
    parts = (backbone, with_head - backbone, writing)
    return Inference(**{name: part / lm.chunk_size for name, part in zip(("backbone", "head", "writing"), parts, strict=True)})


def token_inference(lm: TokenCost, context: int, logits: int) -> Inference:
    """A token model behind `context` tokens; `logits` are the FLOPs of its vocabulary projection."""
    return Inference(backbone=float(lm.flops(context) - logits), head=0.0, writing=float(logits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """FLOPs of a training run, forward and backward."""

    per_token: float
    """of the run itself: trained parts three times, frozen ones as often as they run"""
    tokens: int
    """seen by the run"""
    before: float = 0.0
    """FLOPs of what had to be trained first: the autoencoder; 0 for a token model"""

    @property
    def total(self) -> float:
        """All that the model cost."""
        return self.per_token * self.tokens + self.before

    @property
    def amortised(self) -> float:
        """Per token of this run, with what came before spread over its tokens."""
        return self.total / self.tokens

    def to_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "amortised_per_token": self.amortised, "total": self.total}


def flops_line(inference: Inference | None, training: Training | None) -> str:
    """One line to stand under a table of scores."""
    parts = []
    if training is not None:
        first = f", of which {training.before:.3g} for the autoencoder" if training.before else ""
        parts.append(f"training {training.total:.3g} FLOPs ({training.amortised:.3g} a token{first})")
    if inference is not None:
        parts.append(
            f"generation {inference.total:.3g} FLOPs a token ({inference.writing / inference.total:.0%} in the decoder)"
        )
    return "; ".join(parts)
