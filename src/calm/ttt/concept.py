"""A concept as a direction in latent space: from the mean latent of text in general to the mean latent of the concept.

The concept is given by words, which are looked for in prepared text: the chunks that hold a part of one of them count. Or it is
given by example texts, all of whose chunks count. Whose latents these are, a `Reader` says: the autoencoder's of the text
(`encoded`), or those that the model itself expects there (`expected`). Difference of means as in contrastive
activation addition (Rimsky et al. 2023, arXiv:2312.06681), here on latents that stand for chunks of text and not on
activations.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.text.tokenizer import Tokenizer
from calm.ttt.critic import ConceptCritic

CHUNKS_AT_ONCE = 4096
Reader = Callable[[Int[np.ndarray, "R N K"]], Float[np.ndarray, "R N Z"]]
"""rows of chunks to the latent of each; nan where there is none"""


def parse_words(concept: str) -> tuple[str, ...]:
    """ "war, army" -> ("war", "army"). Raises UsageError where no word is left."""
    words = tuple(" ".join(word.split()) for word in concept.split(",") if word.split())
    if not words:
        raise UsageError(f"concept {concept!r}: holds no word; write words with commas between them, such as war,army,battle")
    return words


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds whole words, upper and lower case alike; a blank stands for any white space."""
    either = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


def chunks_with(
    words: Sequence[str], blocks: Int[np.ndarray, "R T"], chunk_size: int, tokenizer: Tokenizer
) -> Bool[np.ndarray, "R N"]:
    """Whether a chunk holds a part of one of the words; N = T // K."""
    pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    between = " " if tokenizer.level == "word" else ""
    pattern, found = word_pattern(words), np.zeros((len(blocks), blocks.shape[1] // chunk_size), bool)
    for row, block in enumerate(blocks):
        parts = [pieces[token] + between for token in block.tolist()]
        ends = np.cumsum([len(part) for part in parts])
        for match in pattern.finditer("".join(parts)):
            # token i covers the characters ends[i - 1] .. ends[i] - 1
            first, last = np.searchsorted(ends, [match.start(), match.end() - 1], side="right")
            found[row, first // chunk_size : last // chunk_size + 1] = True
    return found


def require_found(count: int, words: Sequence[str], searched: int) -> None:
    """Raises UsageError where the words of a concept are nowhere in so many tokens of text."""
    if not count:
        raise UsageError(
            f"concept {', '.join(words)}: not one of its words is in the {searched:,} tokens that were searched; "
            "choose words of the text that the model was trained on"
        )


def concept_of_words(
    words: Sequence[str], blocks: Int[np.ndarray, "R T"], chunk_size: int, read: Reader, tokenizer: Tokenizer
) -> tuple[ConceptCritic, int]:
    """The critic of a concept given by words, and in how many chunks of the text they were found.

    Raises:
        UsageError: none of the words is in the text.
    """
    rows = as_rows(blocks, chunk_size)
    latents = read(rows)
    found = chunks_with(words, blocks, chunk_size, tokenizer) & np.isfinite(latents[..., 0])
    require_found(int(found.sum()), words, blocks.size)
    return _toward(_mean(latents), latents[found].mean(0), ", ".join(words)), int(found.sum())


def concept_of_texts(
    texts: Sequence[str], blocks: Int[np.ndarray, "R T"], chunk_size: int, read: Reader, tokenizer: Tokenizer
) -> tuple[ConceptCritic, int]:
    """The critic of a concept given by example texts, each of which begins a chunk, and how many chunks they have."""
    parts = [ids[: len(ids) // chunk_size * chunk_size] for ids in tokenizer.encode_batch(list(texts))]
    examples = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not len(examples):
        raise UsageError(f"concept: the {len(texts)} example texts have not one whole chunk of {chunk_size} tokens")
    length = min(len(examples), blocks.shape[1] // chunk_size * chunk_size)  # they are read one after the other
    own = read(as_rows(examples[: len(examples) // length * length].reshape(-1, length), chunk_size))
    count = int(np.isfinite(own[..., 0]).sum())
    if not count:
        raise UsageError(f"concept: the {len(texts)} example texts are one chunk of {chunk_size} tokens; a model needs two")
    return _toward(_mean(read(as_rows(blocks, chunk_size))), _mean(own), "of example texts"), count


def as_rows(blocks: Int[np.ndarray, "R T"], chunk_size: int) -> Int[np.ndarray, "R N K"]:
    """Blocks of text as rows of whole chunks."""
    return blocks[:, : blocks.shape[1] // chunk_size * chunk_size].reshape(len(blocks), -1, chunk_size)


# -- what the latent of a chunk of text is ----------------------------------------------------------------------------


def encoded(autoencoder: Autoencoder) -> Reader:
    """The posterior mean of every chunk: what pure CALM is trained to draw, and its decoder to read."""
    graphdef, params = nnx.split(autoencoder)

    def read(rows: Int[np.ndarray, "R N K"]) -> Float[np.ndarray, "R N Z"]:
        return _by_rows(lambda part: _means(graphdef, params, part), rows)

    return read


def expected(predictor: NextVector, num_draws: int = 8) -> Reader:
    """The mean of what the model itself draws for every chunk but the first of its row, given those before it.

    A decoder inside the chunk is trained by its likelihood to read the head's latents, which an energy score of small weight
    keeps only near the autoencoder's: what a latent means to it is in these.
    """
    graphdef, params = nnx.split(predictor)

    def read(rows: Int[np.ndarray, "R N K"]) -> Float[np.ndarray, "R N Z"]:
        latents = _by_rows(lambda part: _drawn(graphdef, params, part, num_draws), rows)
        return np.concatenate([np.full_like(latents[:, :1], np.nan), latents[:, :-1]], axis=1)

    return read


def _by_rows(function: Callable[[Array], Array], rows: Int[np.ndarray, "R N K"]) -> Float[np.ndarray, "R N Z"]:
    """Some rows at a time, always as many: one shape, compiled once."""
    at_once = min(len(rows), max(1, CHUNKS_AT_ONCE // rows.shape[1]))
    padded = np.pad(rows, ((0, -len(rows) % at_once), (0, 0), (0, 0)))
    parts = [np.asarray(function(jnp.asarray(padded[at : at + at_once]))) for at in range(0, len(padded), at_once)]
    return np.concatenate(parts)[: len(rows)]


@partial(jax.jit, static_argnums=0)
def _means(graphdef: Any, params: Any, rows: Int[Array, "R N K"]) -> Float[Array, "R N Z"]:
    return nnx.merge(graphdef, params).encode(rows).mean


@partial(jax.jit, static_argnums=(0, 3))
def _drawn(graphdef: Any, params: Any, rows: Int[Array, "R N K"], num_draws: int) -> Float[Array, "R N Z"]:
    predictor: NextVector = nnx.merge(graphdef, params)
    hidden, _ = predictor.hidden(rows)
    noise = predictor.lm.head.draw_noise(jax.random.key(0), (num_draws, *hidden.shape[:-1]))
    return predictor.lm.head(hidden, noise).mean(0)


def _mean(latents: Float[np.ndarray, "R N Z"]) -> Float[np.ndarray, "Z"]:
    return latents[np.isfinite(latents[..., 0])].mean(0)


def _toward(general: Float[np.ndarray, "Z"], own: Float[np.ndarray, "Z"], name: str) -> ConceptCritic:
    direction = own - general
    length = np.linalg.norm(direction)
    if not length > 1e-6:
        raise UsageError(f"concept {name}: its mean latent is that of text in general, so there is no direction to go")
    return ConceptCritic(jnp.asarray(general), jnp.asarray(direction / length))
