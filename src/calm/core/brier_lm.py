"""BrierLM: how good are the predictions of a language model that can only be sampled?

The Brier score of a distribution P at outcome y is 2 P(y) - sum_x P(x)^2, highest in expectation when P is the truth
Q, where it is sum_x Q(x)^2. It needs no likelihood: with samples x_1 .. x_S of P,

    (2/S) sum_s 1{x_s = y}  -  1/(S(S-1)) sum_{s != t} 1{x_s = x_t}

is unbiased (a U-statistic: it uses every sample and every pair). Brier-n takes the n tokens that follow a boundary as one
outcome, n = 1..4, and BrierLM is 100 times the geometric mean of the four, each mean floored at 0 first. A chunk of K < n
tokens is not the whole outcome: then every sample reads what it wrote and goes on, as in generation.

Source: CALM, arXiv:2510.27688, section on BrierLM. Differs: all S samples are used, not two; each order is floored,
where the published code clamps only the product, so that a collapsed model (every Brier-n = -1) reads 0 here and 100
there; for K < 4 each sample continues along itself, not along the first one; and tokens may also be drawn from the decoder's
softmax, scored by exact inner products. `published_two_sample` is the published estimate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from calm.core.intervals import BlockSums, Interval, Statistic, bootstrap, paired_bootstrap
from calm.errors import UsageError

ORDERS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextProtocol:
    """The text that a score is about: data set with its sha256, split, tokenizer fingerprint, blocks and chunks of
    how many tokens, and the seed. Stamped on every score.
    """

    dataset: str
    sha256: str
    split: str
    tokenizer: str
    block_tokens: int
    chunk_size: int
    seed: int = 0

    def __post_init__(self):
        if self.chunk_size < 1 or self.block_tokens % self.chunk_size:
            raise UsageError(f"block_tokens {self.block_tokens} must be a multiple of chunk_size {self.chunk_size}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def _decisive(self) -> tuple[str, ...]:
        """The fields that two scores must share. K is not among them: it belongs to the model."""
        return ("sha256", "split", "tokenizer", "block_tokens")

    def line(self) -> str:
        """One line to stand under a table."""
        return (
            f"{self.dataset} ({self.sha256[:12]}) {self.split}, tokenizer {self.tokenizer}, "
            f"blocks of {self.block_tokens} tokens, K={self.chunk_size}, seed {self.seed}"
        )

    def require_comparable(self, other: "TextProtocol") -> None:
        """Raises UsageError, naming the field, if the two scores are not of the same text, tokens and positions."""
        for name in self._decisive():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise UsageError(f"scores are not comparable: {name} is {mine} on one side and {theirs} on the other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol(TextProtocol):
    """Settings that a score depends on besides the model. Scores of different protocols are not comparable: block size alone
    moves BrierLM by about 30 %.

    `decoding`: tokens of a latent are the decoder's "argmax" or "drawn" from its softmax, as those of a token model always are;
    "exact" is a closed form of a model with known probabilities, which has no samples (`num_samples` 0). `boundary_every`: a
    boundary every how many tokens. 4 is a grid that chunks of 1, 2 and 4 tokens share (and 8, in two phases); 1 makes every
    token a boundary, over all phases of the chunks.
    """

    num_samples: int
    decoding: Literal["argmax", "drawn", "exact"]
    boundary_every: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.decoding not in ("argmax", "drawn", "exact"):
            raise UsageError(f"decoding must be argmax, drawn or exact, got {self.decoding!r}")
        if self.decoding != "exact":
            _check_samples(self.num_samples)
        if self.boundary_every < 1:
            raise UsageError(f"boundary_every must be at least 1, got {self.boundary_every}")

    def _decisive(self) -> tuple[str, ...]:
        return (*super()._decisive(), "boundary_every")

    def line(self) -> str:
        """One line to stand under a table."""
        samples = "closed form" if self.decoding == "exact" else f"S={self.num_samples}, {self.decoding} decoding"
        grid = "every token a boundary" if self.boundary_every == 1 else f"a boundary every {self.boundary_every} tokens"
        return f"{super().line()}, {grid}, {samples}"


def _prefix_and(matches: Bool[Array, "*b K"]) -> Bool[Array, "*b K"]:
    """Entry k says whether positions 0..k all match. Spelled out: K is at most 4."""
    columns = [matches[..., 0]]
    for k in range(1, matches.shape[-1]):
        columns.append(columns[-1] & matches[..., k])
    return jnp.stack(columns, axis=-1)


def _check_samples(num_samples: int) -> None:
    if num_samples < 2:
        raise UsageError(f"num_samples must be at least 2 (the score compares pairs), got {num_samples}")


def brier_argmax(tokens: Int[Array, "S *b K"], targets: Int[Array, "*b K"]) -> Float[Array, "*b O"]:
    """Unbiased Brier-1..O at every position from S token samples, O = min(K, 4); nothing is reduced.

    Entry n-1 takes the first n tokens as one outcome. Values lie in [-1, 2], unscaled. Memory is that of `tokens`.
    """
    num_samples, orders = tokens.shape[0], min(tokens.shape[-1], ORDERS)
    _check_samples(num_samples)
    tokens, targets = tokens[..., :orders], targets[..., :orders]
    hits = _prefix_and(tokens == targets).sum(0)

    def count_equal(total, sample):
        return total + _prefix_and(tokens == sample).sum(0), None

    pairs, _ = jax.lax.scan(count_equal, jnp.zeros_like(hits), tokens)
    # Integers up to here, and every sample equals itself once.
    return (2 / num_samples) * hits - (pairs - num_samples) / (num_samples * (num_samples - 1))


class Before(NamedTuple):
    """The P tokens between the boundary and a later chunk: those that each sample wrote, and those of the text."""

    tokens: Int[Array, "S *b P"]
    targets: Int[Array, "*b P"]


def brier_drawn(
    logits: Float[Array, "S *b K V"], targets: Int[Array, "*b K"], before: Before | None = None
) -> Float[Array, "*b O"]:
    """Brier-1..O at every position when tokens are drawn from the decoder's softmax: the expectation over those
    draws, exactly.

    Given its latent, sample s has the distribution prod_k p_{s,k}. So 1{x_s = y} becomes prod_k p_{s,k}(y_k) and 1{x_s = x_t}
    becomes prod_k <p_{s,k}, p_{t,k}>: less variance than drawing tokens, and equal to `brier_argmax` when the softmax
    is peaked. With `before`, the chunk is a later one of what was rolled out: the scores are those of orders P + 1 .. P + O, in
    which the P tokens before must match, and nothing is drawn in the last chunk alone.
    """
    _check_samples(logits.shape[0])
    rows = jnp.moveaxis(logits, 0, -3).reshape(-1, logits.shape[0], *logits.shape[-2:])
    flat = targets.reshape(-1, targets.shape[-1])
    return _brier_drawn_rows(rows, flat, *_as_rows(before, logits.shape[0], len(flat))).reshape(*targets.shape[:-1], -1)


def _as_rows(before: Before | None, num_samples: int, rows: int) -> tuple[Int[Array, "R S P"], Int[Array, "R P"]]:
    """Positions first, as rows; no tokens, which always match, where there are none before."""
    if before is None:
        return jnp.zeros((rows, num_samples, 0), jnp.int32), jnp.zeros((rows, 0), jnp.int32)
    width = before.targets.shape[-1]
    return jnp.moveaxis(before.tokens, 0, -2).reshape(rows, num_samples, width), before.targets.reshape(rows, width)


def _brier_drawn_rows(
    logits: Float[Array, "R S K V"],
    targets: Int[Array, "R K"],
    before: Int[Array, "R S P"],
    before_targets: Int[Array, "R P"],
) -> Float[Array, "R O"]:
    num_rows, num_samples, chunk_size, vocab_size = logits.shape
    orders = min(chunk_size, ORDERS - before.shape[-1])
    logits, targets = logits[:, :, :orders].astype(jnp.float32), targets[:, :orders]
    top = logits.max(-1, keepdims=True)
    unscaled = jnp.exp(logits - top)
    total = unscaled.sum(-1)
    chosen = jnp.take_along_axis(logits - top, targets[:, None, :, None], axis=-1)[..., 0]
    hit_so_far = (before == before_targets[:, None]).all(-1)
    hits = (hit_so_far[..., None] * jnp.cumprod(jnp.exp(chosen) / total, axis=-1)).sum(1)
    # One product of [S*K V] with itself and its diagonal in K: K times the work, but no copy of the logits to bring S
    # and V together, which costs more.
    flat = unscaled.reshape(num_rows, num_samples * orders, vocab_size)
    products = jnp.einsum("riv,rjv->rij", flat, flat).reshape(num_rows, num_samples, orders, num_samples, orders)
    inner = jnp.diagonal(products, axis1=2, axis2=4) / (total[:, :, None] * total[:, None])
    equal_so_far = (before[:, :, None] == before[:, None]).all(-1)
    others = (1 - jnp.eye(num_samples)) * equal_so_far
    pairs = (jnp.cumprod(inner, axis=-1) * others[..., None]).sum((1, 2))
    return (2 / num_samples) * hits - pairs / (num_samples * (num_samples - 1))


def brier_drawn_from_latents(
    logits_of: Callable[[Float[Array, "R S Z"]], Float[Array, "R S K V"]],
    latents: Float[Array, "S *b Z"],
    targets: Int[Array, "*b K"],
    before: Before | None = None,
    *,
    max_floats: int | None = None,
) -> Float[Array, "*b O"]:
    """`brier_drawn(logits_of(latents), targets, before)`, a few positions at a time: about `max_floats` logits exist at once.

    By default 2^20 on CPU, where pieces that stay in cache are 8 times faster than pieces of 2^24, and 2^26 elsewhere.
    `logits_of` maps latents of any leading shape; here it gets positions first, then samples.
    """
    num_samples, width = latents.shape[0], latents.shape[-1]
    _check_samples(num_samples)
    lead, chunk_size = targets.shape[:-1], targets.shape[-1]
    rows = int(np.prod(lead))
    flat, wanted = jnp.moveaxis(latents, 0, -2).reshape(rows, num_samples, width), targets.reshape(rows, chunk_size)
    size = jax.eval_shape(logits_of, jax.ShapeDtypeStruct((1, num_samples, width), latents.dtype)).size
    if max_floats is None:
        max_floats = 2**20 if jax.default_backend() == "cpu" else 2**26
    step = min(rows, max(1, max_floats // size))
    pieces_needed = -(-rows // step)

    def in_pieces(x: Array) -> Array:
        padding = ((0, pieces_needed * step - rows), *(((0, 0),) * (x.ndim - 1)))
        return jnp.pad(x, padding).reshape(pieces_needed, step, *x.shape[1:])

    pieces = tuple(map(in_pieces, (flat, wanted, *_as_rows(before, num_samples, rows))))
    scores = jax.lax.map(lambda piece: _brier_drawn_rows(logits_of(piece[0]), *piece[1:]), pieces)
    return scores.reshape(-1, scores.shape[-1])[:rows].reshape(*lead, -1)


def brier_known(log_probs: Float[Array, "*b O"], self_match: Float[Array, "S *b O"]) -> Float[Array, "*b O"]:
    """Brier-1..O of a model with probabilities: 2 P(y) - sum P^2, the first part exactly.

    `log_probs` are those of the text's own tokens, each given those before it. sum P^2 = sum_x1 p(x1)^2 sum_x2 p(x2 | x1)^2 ...
    is an expectation over tokens drawn from the squared one, q = p^2 / Z, Z = sum p^2, of the product of the Z: `self_match`
    holds Z at the boundary and along S such continuations. Brier-1 is exact, and what is left in the others is how Z differs
    between continuations; drawing from p itself and counting equal samples would have to meet the same n-gram twice.
    """
    return 2 * jnp.exp(jnp.cumsum(log_probs, axis=-1)) - jnp.cumprod(self_match, axis=-1).mean(0)


class PublishedBrier(NamedTuple):
    """The published estimate, unscaled as the published code prints it."""

    brier_n: Float[Array, "4"]
    brier_lm: Float[Array, ""]


def published_two_sample(tokens: Int[Array, "S *b K"], targets: Int[Array, "*b K"]) -> PublishedBrier:
    """The estimate of the published code: the first two samples, n-grams from the chunk start, only the product
    clamped.

    Kept for parity alone. A collapsed model has every Brier-n at -1, a product of +1 and so a perfect score; use
    `brier_lm`. The published code rolls on along its first sample for K < 4; here that is an error.
    """
    if tokens.shape[-1] < ORDERS:
        raise UsageError(f"the published estimate needs chunks of at least {ORDERS} tokens, got {tokens.shape[-1]}")
    scores = brier_argmax(tokens[:2], targets)
    brier_n = scores.reshape(-1, ORDERS).mean(0)
    return PublishedBrier(brier_n, jnp.maximum(jnp.prod(brier_n), 0) ** (1 / ORDERS))


def brier_lm(means: Shaped[np.ndarray, "*draws F"]) -> np.ndarray:
    """100 (prod_n max(Brier-n, 0))^(1/4) of mean Brier-1..4, `[*draws]`. Floored before the product, order by order.

    Raises:
        UsageError: not four orders.
    """
    if means.shape[-1] != ORDERS:
        raise UsageError(f"BrierLM needs Brier-1..{ORDERS}, got {means.shape[-1]} orders")
    return np.asarray(100 * np.prod(np.maximum(means, 0), axis=-1) ** (1 / ORDERS))


class BrierIntervals(NamedTuple):
    """Brier-1..4 times 100 and BrierLM, with their intervals."""

    brier_n: list[Interval]
    brier_lm: Interval


_STATISTICS: list[Statistic] = [*(lambda means, n=n: 100 * means[..., n] for n in range(ORDERS)), brier_lm]


def _checked_orders(sums: BlockSums) -> BlockSums:
    if sums.total.shape[1] != ORDERS:
        raise UsageError(f"BrierLM needs Brier-1..{ORDERS}, got {sums.total.shape[1]} orders: evaluate again")
    return sums


def brier_intervals(sums: BlockSums, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> BrierIntervals:
    """Brier-n (x100, not floored) and BrierLM (floored in every resampling as in the estimate), by bootstrap over
    documents.
    """
    *each, composite = bootstrap(_checked_orders(sums), _STATISTICS, draws=draws, seed=seed, level=level)
    return BrierIntervals(each, composite)


def compare_brier(
    first: BlockSums, second: BlockSums, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> BrierIntervals:
    """first - second by paired bootstrap on the same blocks. "Above" means that the interval excludes 0."""
    pair = _checked_orders(first), _checked_orders(second)
    *each, composite = paired_bootstrap(*pair, _STATISTICS, draws=draws, seed=seed, level=level)
    return BrierIntervals(each, composite)
