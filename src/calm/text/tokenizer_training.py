"""Tokenizers made from a corpus: byte-level BPE, and vocabularies of words."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from calm.text.tokenizer import ALIASES, FileTokenizer, Tokenizer, byte_level
from calm.text.tokenizer_file import byte_characters
from calm.text.tokenizer_spec import SPECIALS, WORDS, bpe_size, words_size
from calm.text.words import vocabulary, word_level


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's splitting: at most `vocab_size` ids, the three specials last.

    Fewer ids if the texts hold fewer merges. Deterministic in the texts. Every text has an exact round trip.
    """
    bpe_size(f"bpe:{vocab_size}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(byte_characters()),
        special_tokens=[],
        show_progress=False,
    )
    blank = byte_level(models.BPE())
    blank.train_from_iterator(texts, trainer)
    return FileTokenizer(blank)


def train_words(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Makes a word-level tokenizer by the rule of WikiText (`calm.text.words`): all words, or the most frequent ones.

    `vocab_size` counts every id, `<unk>`, the line end and the three specials among them. Deterministic in the texts.
    """
    if vocab_size is not None:
        words_size(f"{WORDS}:{vocab_size}")
    most = None if vocab_size is None else vocab_size - len(SPECIALS)
    # A word that reads as a special token would be one for every reader of the file: it is unknown, like a rare word.
    return FileTokenizer(word_level(vocabulary(texts, most, without={*SPECIALS, *ALIASES.values()})))


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Makes a tokenizer with one id for each word, in the order given, the three specials last.

    For text whose words are known beforehand, with white space between them: other words have no id, blanks are not kept.
    """
    made = tokenizers.Tokenizer(models.WordLevel(vocab={word: number for number, word in enumerate(words)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FileTokenizer(made)
