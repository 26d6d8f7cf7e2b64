"""What words a text is made of: how many of them are function words, and how many belong to a list."""

import re
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are as at be because been before being below between both
    but by can could did do does doing down during each few for from further had has have having he her here hers herself
    him himself his how i if in into is it its itself just may me might more most must my myself no nor not now of off on
    once only or other our ours ourselves out over own same shall she should so some such than that the their theirs them
    themselves then there these they this those through to too under until up upon us very was we were what when where which
    while who whom why will with would yet you your yours yourself yourselves""".split()
)
"""English function words, most of which any list of stop words has."""


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; digits and signs are none."""
    return [word.lower() for word in _WORD.findall(text)]


def word_counts(texts: Sequence[str], among: Collection[str]) -> Float[np.ndarray, "R 2"]:
    """For each text, how many of its words are among these, and how many words it has."""
    rows = [words_of(text) for text in texts]
    return np.array([(sum(word in among for word in row), len(row)) for row in rows], np.float64).reshape(-1, 2)
