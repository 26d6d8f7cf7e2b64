"""A concept as a direction in latent space, from the mean latent of text in general to the mean latent of the concept;
and the critic of a concept for a trained model.

The concept is given by words, which are looked for in prepared text (chunks that hold a part of one of them count), or by
example texts, all of whose chunks count. A `Reader` gives the latent of a chunk: the autoencoder's (`encoded`), or the one
that the model itself expects there (`expected`). Difference of means as in contrastive activation addition (Rimsky et al.
2023, arXiv:2312.06681), here on latents of chunks of text and not on activations.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.latent_lm import LatentLM
from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.runs.bundle import Bundle
from calm.runs.stages import validation_blocks
from calm.text.tokenizer import Tokenizer
from calm.ttt.critic import DirectionCritic, load_critic, weighted
from calm.ttt.critic_training import read_lines
from calm.ttt.lexicon import LexiconCritic, topic_of
from calm.ttt.rollout import require_steerable

CHUNKS_AT_ONCE = 4096
CONCEPT_TOKENS, TOPIC_TOKENS, PASSAGE = 256 * 1024, 1024 * 1024, 128
By = Literal["auto", "text", "direction"]
Reader = Callable[[Int[np.ndarray, "R N K"]], Float[np.ndarray, "R N Z"]]
"""rows of chunks to the latent of each; nan where there is none"""


def parse_words(concept: str) -> tuple[str, ...]:
    """ "war, army" -> ("war", "army"). Raises UsageError where no word is left."""
    words = tuple(" ".join(word.split()) for word in concept.split(",") if word.split())
    if not words:
        raise UsageError(f"concept {concept!r}: holds no word; write words with commas between them, such as war,army,battle")
    return words


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Pattern of whole words, ignoring case; a blank matches any white space."""
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
    """Raises UsageError where the words of a concept were not found in `searched` tokens of text."""
    if not count:
        raise UsageError(
            f"concept {', '.join(words)}: not one of its words is in the {searched:,} tokens that were searched; "
            "choose words of the text that the model was trained on"
        )


def concept_of_words(
    words: Sequence[str], blocks: Int[np.ndarray, "R T"], chunk_size: int, read: Reader, tokenizer: Tokenizer
) -> tuple[DirectionCritic, int]:
    """Critic of a concept given by words, and the number of chunks of the text that hold them.

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
) -> tuple[DirectionCritic, int]:
    """Critic of a concept given by example texts, each beginning a chunk, and their number of chunks."""
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


# -- latent of a chunk of text ----------------------------------------------------------------------------------------


def encoded(autoencoder: Autoencoder) -> Reader:
    """Reader of the posterior mean of every chunk, the latent that pure CALM is trained to draw and its decoder to read."""
    graphdef, params = nnx.split(autoencoder)

    def read(rows: Int[np.ndarray, "R N K"]) -> Float[np.ndarray, "R N Z"]:
        return _by_rows(lambda part: _means(graphdef, params, part), rows)

    return read


def expected(predictor: NextVector, num_draws: int = 8) -> Reader:
    """Reader of the mean of the model's own draws for every chunk but the first of its row, given those before it.

    A context decoder is trained by its likelihood to read the head's latents, which an energy score of small weight keeps
    only near the autoencoder's; so its latents are these.
    """
    graphdef, params = nnx.split(predictor)

    def read(rows: Int[np.ndarray, "R N K"]) -> Float[np.ndarray, "R N Z"]:
        latents = _by_rows(lambda part: _drawn(graphdef, params, part, num_draws), rows)
        return np.concatenate([np.full_like(latents[:, :1], np.nan), latents[:, :-1]], axis=1)

    return read


def _by_rows(function: Callable[[Array], Array], rows: Int[np.ndarray, "R N K"]) -> Float[np.ndarray, "R N Z"]:
    """Applies `function` to groups of rows of one size, so that it compiles once."""
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


def _toward(general: Float[np.ndarray, "Z"], own: Float[np.ndarray, "Z"], name: str) -> DirectionCritic:
    direction = own - general
    length = np.linalg.norm(direction)
    if not length > 1e-6:
        raise UsageError(f"concept {name}: its mean latent is that of text in general, so there is no direction to go")
    return DirectionCritic(jnp.asarray(general), jnp.asarray(direction / length))


# -- the critic of a concept, for a trained model -------------------------------------------------------------------------


def lexicon_critic(
    model: Bundle, concept: str, data: str | Path | None = None, *, split: str = "train", max_tokens: int = TOPIC_TOKENS
) -> tuple[LexiconCritic, int]:
    """Critic of the words that a model's decoder expects to write (`calm.ttt.lexicon`), and the number of passages of
    `PASSAGE` tokens about the concept that it was learned from. The arguments are those of `direction_critic`.

    Raises:
        UsageError: as `direction_critic`; a decoder that reads more than latents.
    """
    predictor, tokenizer = require_steerable(model.predictor), model.tokenizer
    text = model.prepared_data(data).split(split)
    count = min(max_tokens, text.num_tokens) // PASSAGE
    passages = text.read(0, count * PASSAGE).reshape(count, PASSAGE)
    if concept.startswith("@"):
        examples = tokenizer.encode_batch(read_lines(concept[1:], "concept"))
        own, other, found = examples, passages, len(examples)
    else:
        words = parse_words(concept)
        about = chunks_with(words, passages, PASSAGE, tokenizer)[:, 0]
        own, other, found = passages[about], passages[~about], int(about.sum())
        require_found(found, words, passages.size)
    return LexiconCritic.of(predictor, topic_of(list(own), list(other), predictor.vocab_size)), found


def direction_critic(
    model: Bundle, concept: str, data: str | Path | None = None, *, split: str = "train", max_tokens: int = CONCEPT_TOKENS
) -> tuple[DirectionCritic, int]:
    """Critic of a concept's direction, and the number of chunks that hold the concept.

    `concept` is words separated by commas, which are looked for in the first `max_tokens` of a split of prepared data (by
    default the model's training data), or `@FILE`, a file or folder of example texts, one a line.

    Raises:
        UsageError: no words, words that the text does not have, or a file that cannot be read.
    """
    read, size = latent_reader(model), _autoencoder(model).config.chunk_size
    opened = model.prepared_data(data)
    blocks, _ = validation_blocks(opened, model.block_tokens, split, max_tokens)
    if concept.startswith("@"):
        return concept_of_texts(read_lines(concept[1:], "concept"), blocks, size, read, model.tokenizer)
    return concept_of_words(parse_words(concept), blocks, size, read, model.tokenizer)


def latent_reader(model: Bundle) -> Reader:
    """Reader for this model: its own expectation where a context decoder reads latents, else the posterior mean."""
    if isinstance(model.lm, LatentLM) and model.lm.context_decoder is not None:
        return expected(require_steerable(model.predictor))
    return encoded(_autoencoder(model))


def concept_critic(model: Bundle, concept: str, data: str | Path | None = None, by: By = "auto") -> tuple[Any, str]:
    """Critic of a concept, and a description of the text it was found in: `by` the decoder's words (text) or by the latents'
    direction; auto = text where the decoder reads latents alone."""
    writer = model.lm.context_decoder if isinstance(model.lm, LatentLM) else None
    if by == "text" or (by == "auto" and not (writer is not None and writer.reads_hidden)):
        critic, count = lexicon_critic(model, concept, data)
        return critic, f"{count} passages of text"
    direction, count = direction_critic(model, concept, data)
    return direction, f"{count} chunks of text"


def combined_critic(
    model: Bundle,
    concepts: Sequence[str] = (),
    critics: Sequence[str] = (),
    data: str | Path | None = None,
    by: By = "auto",
) -> tuple[Any, str]:
    """Weighted sum of the critics of concepts (`concept_critic`) and of trained critics in folders, and its description. Each
    may end in `=WEIGHT`.

    Raises:
        UsageError: neither concept nor critic, or one that cannot be loaded.
    """
    parts, descriptions = [], []
    for concept in concepts:
        words, weight = _weight(concept)
        critic, found = concept_critic(model, words, data, by)
        parts.append((weight, critic))
        descriptions.append(f"{_times(weight)}concept {words} ({found})")
    for folder in critics:
        name, weight = _weight(folder)
        critic, description = load_critic(name, _autoencoder(model))
        parts.append((weight, critic))
        descriptions.append(f"{_times(weight)}critic {description.get('wanted', name)}")
    return weighted(parts), " + ".join(descriptions)


def _weight(words: str) -> tuple[str, float]:
    """ "war,army=2" -> ("war,army", 2.0)."""
    name, found, number = words.rpartition("=")
    if not found:
        return words, 1.0
    try:
        return name, float(number)
    except ValueError as error:
        raise UsageError(f"{words!r}: after = comes a weight, a number such as {name}=0.5") from error


def _times(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} times "


def _autoencoder(model: Bundle) -> Autoencoder:
    if model.autoencoder is None:
        raise UsageError(f"{model.folder}: holds a token model, which has no latents to align; name a latent language model")
    return model.autoencoder
