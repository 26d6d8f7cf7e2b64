"""Share of a text's characters that a tokenizer does not bring back, measured while a corpus is encoded.

White space is left aside, since word-level tokenizers keep none of it. Order is, too: a character counts as lost where the
decoded text has fewer of its kind than the text.
"""

import dataclasses
from collections import Counter

import numpy as np
from jaxtyping import Int

from calm.text.tokenizer import Tokenizer

FIRST, EVERY = 64, 8  # pieces that are all measured at the start; one in so many of those that follow


@dataclasses.dataclass(kw_only=True)
class RoundTrip:
    """Running counts: pieces seen, characters measured, characters lost. Their JSON is what `dataclasses.asdict` gives."""

    pieces: int = 0
    measured: int = 0
    lost: int = 0

    @property
    def share(self) -> float:
        """Characters lost of those measured."""
        return self.lost / max(self.measured, 1)

    def add(self, tokenizer: Tokenizer, text: str, ids: Int[np.ndarray, "T"]) -> None:
        """Measures one piece and its ids, or passes over it; a tokenizer that loses nothing costs nothing."""
        self.pieces += 1
        if tokenizer.lossless or (self.pieces > FIRST and self.pieces % EVERY):
            return
        kept = ids if tokenizer.unknown_id is None else ids[ids != tokenizer.unknown_id]
        before, after = "".join(text.split()), "".join(tokenizer.decode(kept).split())
        self.measured += len(before)
        if before != after:
            self.lost += (Counter(before) - Counter(after)).total()
