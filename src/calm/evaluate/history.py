"""Models that give the next token's probability from a history of tokens, and what can be done with any of them.

A history is a row of token ids, oldest first. Where there are fewer tokens than columns, `NO_TOKEN` fills the row in front.
Numpy only.

Axis letters: *b batch · L tokens of history · n tokens that follow · S samples · B blocks · T tokens of a block · A places
"""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Integer

from calm.errors import UsageError

NO_TOKEN = -1
ENTRIES_AT_ONCE = 2**22
"""History entries that exist at the same time while a long text is scored."""


@runtime_checkable
class HistoryModel(Protocol):
    """A token model with exact probabilities that reads at most `reach` tokens of history (None: all of it)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def reach(self) -> int | None: ...

    def conditional(
        self, context: Integer[np.ndarray, "*b L"], token: Integer[np.ndarray, "*b"]
    ) -> Float[np.ndarray, "*b"]: ...

    def draw(self, context: Integer[np.ndarray, "*b L"], generator: np.random.Generator) -> Int[np.ndarray, "*b"]: ...

    def draw_with_probability(
        self, context: Integer[np.ndarray, "*b L"], generator: np.random.Generator
    ) -> tuple[Int[np.ndarray, "*b"], Float[np.ndarray, "*b"]]: ...


def require_ids(vocab_size: int, context: Integer[np.ndarray, "*b L"], token: Integer[np.ndarray, "*b"] | None = None) -> None:
    """Raises UsageError where a context id (`NO_TOKEN` aside) or a token id lies outside the vocabulary."""
    for what, ids, least in (("context", context, NO_TOKEN), ("token", token, 0)):
        if ids is not None and ids.size and not least <= ids.min() <= ids.max() < vocab_size:
            raise UsageError(f"{what} ids run from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}: other data?")


def histories(
    tokens: Integer[np.ndarray, "B T"], places: Int[np.ndarray, "A"], reach: int | None
) -> Integer[np.ndarray, "B A L"]:
    """The tokens before each place of each block, the newest last: at most `reach` of them, by default all.

    Returns a view into padded blocks: nothing at or after a place is in its row.
    """
    most = int(places.max(initial=0))
    width = most if reach is None else min(reach, most)
    if width == 0:
        return np.zeros((len(tokens), len(places), 0), tokens.dtype)
    padded = np.concatenate([np.full((len(tokens), width), NO_TOKEN, tokens.dtype), tokens], axis=1)
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)[:, places]


def log_prob(
    model: HistoryModel, context: Integer[np.ndarray, "*b L"], tokens: Integer[np.ndarray, "*b n"]
) -> Float[np.ndarray, "*b n"]:
    """Natural log-probability of each of n tokens after `context`, each given everything before it.

    With an empty context (L = 0), the first token is scored without any history. Rows of different lengths: fill contexts
    with `NO_TOKEN` in front, and leave out the values beyond the end of each text.
    """
    length, count = context.shape[-1], tokens.shape[-1]
    lead = tokens.shape[:-1]
    rows = int(np.prod(lead))
    joined = np.concatenate([context, tokens], axis=-1).reshape(rows, length + count)
    places = length + np.arange(count)
    result = np.empty((rows, count))
    width = length + count if model.reach is None else max(1, model.reach)
    step = max(1, ENTRIES_AT_ONCE // max(1, width * count))
    for start in range(0, rows, step):
        part = joined[start : start + step]
        result[start : start + step] = model.conditional(histories(part, places, model.reach), part[:, places])
    return np.log(result).reshape(*lead, count)


def sample(
    model: HistoryModel, context: Integer[np.ndarray, "*b L"], *, num_tokens: int, num_samples: int, seed: int
) -> Int[np.ndarray, "S *b n"]:
    """S independent continuations of `num_tokens` tokens for each context; each reads what it wrote.

    Raises:
        UsageError: fewer than one token or sample, or ids outside the vocabulary.
    """
    if num_tokens < 1 or num_samples < 1:
        raise UsageError(f"sampling needs at least 1 token and 1 sample, got {num_tokens} and {num_samples}")
    generator = np.random.default_rng(seed)
    lead = (num_samples, *context.shape[:-1])
    joined = np.concatenate([np.broadcast_to(context, (*lead, context.shape[-1])), np.zeros((*lead, num_tokens), np.int64)], -1)
    for place in range(context.shape[-1], joined.shape[-1]):
        start = 0 if model.reach is None else max(0, place - model.reach)
        joined[..., place] = model.draw(joined[..., start:place], generator)
    return joined[..., context.shape[-1] :]
