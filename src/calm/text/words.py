"""Words as the WikiText corpora count them: split at white space, and every line end a token of its own.

Perplexities of words are comparable only under one rule for what a word is. This is the rule of Merity et al. 2016
(arXiv:1609.07843) and of what was published after it: a line is split at white space and closed by one end-of-line token (their
`<eos>`, here the line end itself); a word that the vocabulary lacks is `<unk>`. The vocabulary of all of WikiText-2's train
file has 33,278 entries, `<unk>` and the line end among them. Blanks around words are not kept: text comes back with one blank
between words and none at line ends.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

UNKNOWN, LINE_END = "<unk>", "\n"
PATTERN = r"\n|[^\s\x1c-\x1f]+"
"""a line end or a word; Python's white space, spelt so that Python's regular expressions and the tokenizers library's agree"""

_WORD = re.compile(PATTERN)


def words_of(text: str) -> list[str]:
    """Words of a text in order, its line ends among them."""
    return _WORD.findall(text)


def count_words(text: str) -> int:
    """Number of words in a text, line ends included: the divisor of a perplexity per word."""
    return sum(1 for _ in _WORD.finditer(text))


def plain_blanks(text: str) -> str:
    """Text as it comes back from a word-level tokenizer: one blank between words, none at line ends."""
    return LINE_END.join(" ".join(words_of(line)) for line in text.split(LINE_END))


def vocabulary(texts: Iterable[str], most: int | None = None, without: Collection[str] = ()) -> list[str]:
    """Vocabulary: `<unk>`, the line end, then every word of the texts, frequent ones first (ties in the order of letters).

    `most` bounds all of them together: rarer words are left out, and so are the words in `without`. A text must end where a
    word does.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words_of(text))
    for word in (UNKNOWN, LINE_END, *without):
        counts.pop(word, None)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return [UNKNOWN, LINE_END, *ordered][:most]


def word_level(words: Sequence[str]) -> tokenizers.Tokenizer:
    """Builds a Hugging Face tokenizer with this vocabulary that follows the rule above."""
    made = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    # The first puts a blank before every token but the first; its prefix, which it takes off words, is in none of them.
    blanks = decoders.WordPiece(prefix=2 * LINE_END, cleanup=False)
    made.decoder = decoders.Sequence([blanks, decoders.Fuse(), decoders.Replace(Regex(" ?\n ?"), LINE_END)])
    return made
