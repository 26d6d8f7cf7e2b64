"""A concept as a direction in latent space: from the mean latent of text in general to the mean latent of the concept.

The concept is given by words, which are looked for in prepared text: the chunks that hold a part of one of them count. Or it is
given by example texts, all of whose chunks count. Means are of posterior means. Difference of means as in contrastive
activation addition (Rimsky et al. 2023, arXiv:2312.06681), here on latents that stand for chunks of text and not on
activations.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.autoencoder import Autoencoder
from calm.errors import UsageError
from calm.text.tokenizer import Tokenizer
from calm.ttt.critic import ConceptCritic

CHUNKS_AT_ONCE = 4096


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


def concept_of_words(
    words: Sequence[str], blocks: Int[np.ndarray, "R T"], autoencoder: Autoencoder, tokenizer: Tokenizer
) -> tuple[ConceptCritic, int]:
    """The critic of a concept given by words, and in how many chunks of the text they were found.

    Raises:
        UsageError: none of the words is in the text.
    """
    size = autoencoder.config.chunk_size
    found = chunks_with(words, blocks, size, tokenizer).reshape(-1)
    if not found.any():
        raise UsageError(
            f"concept {', '.join(words)}: not one of its words is in the {blocks.size:,} tokens that were searched; "
            "choose words of the text that the model was trained on"
        )
    chunks = blocks[:, : blocks.shape[1] // size * size].reshape(-1, size)
    general = mean_latent(autoencoder, chunks)
    return _toward(general, mean_latent(autoencoder, chunks[found]), ", ".join(words)), int(found.sum())


def concept_of_texts(
    texts: Sequence[str], blocks: Int[np.ndarray, "R T"], autoencoder: Autoencoder, tokenizer: Tokenizer
) -> tuple[ConceptCritic, int]:
    """The critic of a concept given by example texts, and how many chunks they have."""
    size = autoencoder.config.chunk_size
    rows = [ids[: len(ids) // size * size].reshape(-1, size) for ids in tokenizer.encode_batch(list(texts))]
    examples = np.concatenate(rows) if rows else np.zeros((0, size), np.int32)
    if not len(examples):
        raise UsageError(f"concept: the {len(texts)} example texts have not one whole chunk of {size} tokens")
    general = mean_latent(autoencoder, blocks[:, : blocks.shape[1] // size * size].reshape(-1, size))
    return _toward(general, mean_latent(autoencoder, examples), "of example texts"), len(examples)


def mean_latent(autoencoder: Autoencoder, chunks: Int[np.ndarray, "R K"]) -> Float[np.ndarray, "Z"]:
    """The mean posterior mean of chunks."""
    graphdef, params = nnx.split(autoencoder)
    total = np.zeros(autoencoder.config.latent_dim)
    for start in range(0, len(chunks), CHUNKS_AT_ONCE):
        part = chunks[start : start + CHUNKS_AT_ONCE]
        counted = np.arange(CHUNKS_AT_ONCE) < len(part)  # one shape, compiled once
        padded = np.pad(part, ((0, CHUNKS_AT_ONCE - len(part)), (0, 0)))
        total += np.asarray(_sum_of_means(graphdef, params, jnp.asarray(padded), jnp.asarray(counted)), np.float64)
    return (total / len(chunks)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def _sum_of_means(graphdef: Any, params: Any, chunks: Int[Array, "R K"], counted: Bool[Array, "R"]) -> Float[Array, "Z"]:
    return (nnx.merge(graphdef, params).encode(chunks).mean * counted[:, None]).sum(0)


def _toward(general: Float[np.ndarray, "Z"], own: Float[np.ndarray, "Z"], name: str) -> ConceptCritic:
    direction = own - general
    length = np.linalg.norm(direction)
    if not length > 1e-6:
        raise UsageError(f"concept {name}: its mean latent is that of text in general, so there is no direction to go")
    return ConceptCritic(jnp.asarray(general), jnp.asarray(direction / length))
