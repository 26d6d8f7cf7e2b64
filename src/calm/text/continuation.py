"""Text of generated ids as it reads after their prompt, whole or as a stream.

Ids cannot be decoded on their own: many decoders write no blank before the first token ("the riverriver" for "the river" and
"river"), and a character may be spread over several ids. The text of a continuation is therefore what it adds to the text of
its prompt: decode(prompt + new) without decode(prompt). Where new ids change the end of the prompt's text, as by completing a
character, it starts at the first change.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from calm.text.tokenizer import Tokenizer
from calm.text.tokenizer_file import num_common

WINDOW, CONTEXT = 512, 64  # ids decoded again with every piece, at most; ids kept as context when they grow beyond that


def continuation_text(
    tokenizer: Tokenizer, prompt: Int[np.ndarray, "P"] | Sequence[int], new: Int[np.ndarray, "T"] | Sequence[int]
) -> str:
    """Text that the ids `new` add to the text of the ids `prompt`."""
    text = tokenizer.decode(np.concatenate([np.asarray(prompt, np.int64), np.asarray(new, np.int64)]))
    return text[num_common(tokenizer.decode(prompt), text) :]


class ContinuationText:
    """Stream of a continuation's text. The pieces from `add` and `finish`, joined, are `continuation_text` of all ids.

        text = ContinuationText(tokenizer, prompt_ids)
        for ids in generated:
            print(text.add(ids), end="", flush=True)
        print(text.finish())

    A piece holds only characters that no further id can change, so it may be shorter than its ids or empty. Decoders whose end
    may change without bound give their text at the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Int[np.ndarray, "P"] | Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = np.asarray(prompt, np.int64)  # the last ids, enough to decode those that follow
        self._prompt = tokenizer.decode(prompt)
        self._shown: int | None = None  # characters of these ids' text given out; None until the prompt's part is known

    def add(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """Text that is settled now that `ids` came, and was not given out before."""
        self._ids = np.concatenate([self._ids, np.asarray(ids, np.int64)])
        text = self._tokenizer.decode(self._ids)
        settled = self._tokenizer.num_settled(self._ids, text)
        if self._shown is None:
            common = num_common(self._prompt, text[:settled])
            if common == settled < len(self._prompt):
                return ""
            self._shown = common
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        if len(self._ids) > WINDOW and self._shown == len(text):
            self._forget(text)
        return piece

    def finish(self) -> str:
        """Rest of the text."""
        text = self._tokenizer.decode(self._ids)
        shown = num_common(self._prompt, text) if self._shown is None else self._shown
        self._shown = len(text)
        return text[shown:]

    def _forget(self, text: str) -> None:
        """Drops all but the last ids, where they decode to the end of `text` on their own."""
        last = self._ids[-CONTEXT:]
        end = self._tokenizer.decode(last)
        if end.strip() and text.endswith(end) and self._tokenizer.num_settled(last, end) == len(end):
            self._ids, self._shown = last, len(end)
