"""Tokenizers: text <-> ids, with the three special tokens of this library and a fingerprint.

Three kinds, one interface: raw bytes; any Hugging Face `tokenizer.json` (our own byte-level BPE and word level among them); a
tiktoken rank file (extra `tiktoken`). Each knows `<|begin|>` (fills the front of a prompt's first chunk), `<|end|>` (follows
every document) and `<|mask|>` (replaces a masked token in the autoencoder). A file that lacks them gets them appended after
its own ids; Llama 3's `<|begin_of_text|>` and `<|end_of_text|>` are taken for begin and end, as the published CALM
models use them.

Text is never control: whatever it spells, `encode` gives no special id (begin, end, mask, and the tokens that a file marks as
special, but for its unknown token). See `FileTokenizer`.
"""

import abc
import base64
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers

from calm.errors import UsageError, require_extra
from calm.text.surrogates import replace_half_surrogates
from calm.text.tokenizer_file import byte_characters, decoded_tail, is_byte_token, keeps_bytes, num_common
from calm.text.tokenizer_spec import KINDS, SPECIALS, is_trained, tokenizer_path

BEGIN, END, MASK = SPECIALS
ALIASES = {BEGIN: "<|begin_of_text|>", END: "<|end_of_text|>"}
"""names in other files that are taken for ours"""
REPLACEMENT = "\ufffd"
Level = Literal["byte", "subword", "word"]
"""unit of a token, on which the meaning of a perplexity depends (`calm.evaluate.perplexity`)"""

# The split pattern of Llama 3 and cl100k; a rank file does not say its own.
RANK_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(abc.ABC):
    """Text <-> ids. `vocab_size` counts every id, the specials too; ids are int32 arrays.

    `unknown_id` stands for every word that a word vocabulary lacks; None for other tokenizers. `lossless` says that every text
    comes back from its ids, to the character.
    """

    level: Level = "subword"
    unknown_id: int | None = None
    lossless: bool = False
    vocab_size: int
    begin_id: int
    end_id: int
    mask_id: int

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids of `text` alone, without begin or end, and never a special id.

        Half a surrogate pair, which no UTF-8 text holds, is read as U+FFFD.

        Raises UsageError: the text holds a word that the vocabulary lacks, and the tokenizer has no id for unknown words.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """Ids of each text as from `encode`, computed on all cores."""
        try:
            return self._encode_batch(texts)
        except (UnicodeEncodeError, TypeError):  # the tokenizers library says TypeError for half a surrogate pair
            return self._encode_batch([replace_half_surrogates(text) for text in texts])

    @abc.abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """Ids of each text."""

    @abc.abstractmethod
    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """Text of `ids`; special ids are dropped, bytes that are not UTF-8 become U+FFFD."""

    def num_settled(self, ids: Int[np.ndarray, "T"], text: str) -> int:
        """Number of leading characters of `text`, the decoded `ids`, that stay whatever ids follow."""
        return len(text.rstrip(REPLACEMENT))  # a character may lack its last bytes

    @abc.abstractmethod
    def to_json(self) -> str:
        """Text of the file that `save` writes and `load_tokenizer` reads back."""

    @abc.abstractmethod
    def _identity(self) -> Any:
        """JSON of everything that decides the ids of a text, without parts that a new library version may spell differently."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits; equal exactly when the vocabulary and the rules are equal."""
        content = json.dumps(self._identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to a file, as a whole or not at all."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8 (0..255), then begin, end, mask (256..258)."""

    level, lossless = "byte", True
    vocab_size, begin_id, end_id, mask_id = 259, 256, 257, 258

    def _encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        values = np.asarray(ids, np.int64)
        return values[values < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """A tokenizer.json that every Hugging Face reader understands: byte-level BPE without a merge."""
        characters = byte_characters()
        blank = byte_level(models.BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
        blank.add_special_tokens(list(SPECIALS))
        return blank.to_str(pretty=True)

    def _identity(self) -> Any:
        return {"kind": "bytes", "specials": SPECIALS}


class FileTokenizer(Tokenizer):
    """A Hugging Face tokenizer; specials that it lacks are appended.

    Two ways lead from text to a special id, and both are closed. The library searches text for added tokens before the model
    reads it, except for those marked as special: tokens that serve as our specials get that mark. The model's own vocabulary
    may spell a special token (a SentencePiece vocabulary holds "</s>", a word vocabulary may hold any word): such an id is
    replaced by the ids of its halves, or by the unknown token in models that know whole words only.

    Raises UsageError: a special token shares its id with another one, as where the ids of a vocabulary have gaps.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        names = {name: ALIASES[name] if _only_alias(inner, name) else name for name in SPECIALS}
        added = {token.content for token in inner.get_added_tokens_decoder().values()}
        # Not a token of the model's vocabulary alone: adding it would change the fingerprint of data that exists.
        inner.add_special_tokens([name for name in names.values() if inner.token_to_id(name) is None or name in added])
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # specials are not looked for in text
        self._inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self.begin_id, self.end_id, self.mask_id = (vocabulary[names[name]] for name in SPECIALS)
        unknown = getattr(inner.model, "unk_token", None)
        if isinstance(inner.model, models.WordLevel):
            self.level, self.unknown_id = "word", inner.token_to_id(inner.model.unk_token)
        ours = {self.begin_id, self.end_id, self.mask_id}
        marked = {id for id, token in inner.get_added_tokens_decoder().items() if token.special and token.content != unknown}
        if isinstance(inner.model, models.Unigram):
            marked.discard(json.loads(inner.to_str())["model"].get("unk_id"))
        for token, id in vocabulary.items():
            if id in ours and token != inner.id_to_token(id):
                raise UsageError(
                    f"{token!r} and {inner.id_to_token(id)!r} share the id {id}; number the vocabulary without gaps"
                )
        self._spelt = self._spellings(ours | marked)
        content = json.loads(inner.to_str())
        self._tail = decoded_tail(content["decoder"])
        self.lossless = keeps_bytes(content)

    def _spellings(self, special: set[int]) -> dict[int, list[int]]:
        """Ids to write in place of each special id that the model's own vocabulary spells."""
        model = self._inner.model
        whole_words = isinstance(model, models.WordLevel | models.WordPiece)
        unknown = None if not whole_words else self._inner.token_to_id(model.unk_token)

        def spell(text: str) -> list[int]:
            """Ids of `text` in the alphabet of the model, none of them special."""
            if whole_words:
                return [unknown] if unknown is not None and unknown not in special else []
            found = [token.id for token in model.tokenize(text)]
            if special.isdisjoint(found):
                return found
            half = len(text) // 2
            return [*spell(text[:half]), *spell(text[half:])] if half else []

        spelt = {}
        for id in special:
            text = self._inner.id_to_token(id)
            if text and model.token_to_id(text) == id:
                half = len(text) // 2
                spelt[id] = [*spell(text[:half]), *spell(text[half:])] if not whole_words else spell(text)
        return spelt

    def _encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"tokenizer: the text holds what the vocabulary cannot spell ({error})") from error
        rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [self._respelt(row) for row in rows] if self._spelt else rows

    def _respelt(self, row: Int[np.ndarray, "T"]) -> Int[np.ndarray, "U"]:
        """The row with the ids of `_spellings` in place of special ids."""
        if not np.isin(row, list(self._spelt)).any():
            return row
        return np.array([each for id in row.tolist() for each in self._spelt.get(id, (id,))], np.int32)

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        values = np.asarray(ids, np.int64)
        values = values[~np.isin(values, [self.begin_id, self.end_id, self.mask_id])]
        return self._inner.decode(values.tolist(), skip_special_tokens=True)

    def num_settled(self, ids: Int[np.ndarray, "T"], text: str) -> int:
        """Number of leading characters of `text`, the decoded `ids`, that stay whatever ids follow."""
        if not self._tail.bounded:
            return 0
        settled = len(text.rstrip(REPLACEMENT + self._tail.loose))
        if self._tail.byte_runs and (complete := self._without_byte_run(ids)) < len(ids):
            settled = min(settled, num_common(self.decode(ids[:complete]), text))
        if self._tail.last_differs and len(ids):
            settled = min(settled, num_common(self.decode(np.append(ids, ids[-1])), text))
        return settled

    def _without_byte_run(self, ids: Int[np.ndarray, "T"]) -> int:
        """Number of ids before those at the end that stand for single bytes, which are decoded together."""
        for place in range(len(ids) - 1, -1, -1):
            token = self._inner.id_to_token(int(ids[place])) or ""
            if not is_byte_token(token) and self.decode(ids[place : place + 1]):
                return place + 1
        return 0

    def to_json(self) -> str:
        return self._inner.to_str(pretty=True)

    def _identity(self) -> Any:
        content = json.loads(self._inner.to_str())
        model = content["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
        added = sorted((token["id"], token["content"]) for token in content["added_tokens"])
        rules = [content.get("normalizer"), content.get("pre_tokenizer")]
        return {"vocab": model.get("vocab"), "merges": merges, "added": added, "rules": rules}


class RankTokenizer(Tokenizer):
    """A tiktoken rank file (lines of base64 bytes and a rank), specials after the last rank; splits as Llama 3 does."""

    lossless = True

    def __init__(self, ranks: dict[bytes, int], pattern: str = RANK_PATTERN):
        self._ranks, self._pattern = ranks, pattern
        self.begin_id, self.end_id, self.mask_id = (max(ranks.values()) + 1 + i for i in range(3))
        self.vocab_size = self.mask_id + 1
        self._known = np.fromiter(ranks.values(), np.int64)  # a file may leave ids out
        self._inner = require_extra("tiktoken", "tiktoken").Encoding(
            "calm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        rows = self._inner.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(row, np.int32) for row in rows]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        values = np.asarray(ids, np.int64)
        return self._inner.decode(values[np.isin(values, self._known)].tolist(), errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "tiktoken", **self._identity()})

    def _identity(self) -> Any:
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self._ranks.items()}
        return {"pattern": self._pattern, "ranks": ranks, "specials": SPECIALS}


# -- from a name or a file --------------------------------------------------------------------------------------------


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Loads "bytes", a tokenizer.json (or a folder that holds one) or a tiktoken rank file.

    Raises:
      UsageError: no such file, neither format, or a "bpe:SIZE" or "words", trained by `calm data prepare` first.
      MissingExtraError: a rank file without the package tiktoken.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    if is_trained(spec):
        raise UsageError(f"tokenizer {spec}: it must be trained on a corpus first; give the tokenizer.json of prepared data")
    path = tokenizer_path(spec)
    if not path.is_file():
        raise UsageError(f"tokenizer {spec}: local path not found; give {KINDS}")
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return RankTokenizer(_read_ranks(content, path))
    try:
        fields = json.loads(content)
        if fields.get("type") == "tiktoken":
            ranks = {base64.b64decode(token): rank for token, rank in fields["ranks"].items()}
            return _tried(RankTokenizer(_checked(ranks, path), fields["pattern"]), path)
        inner = tokenizers.Tokenizer.from_buffer(content)
    except UsageError:
        raise
    except Exception as error:  # the library raises bare Exception
        if isinstance(error, ImportError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"tokenizer {path}: not a tokenizer.json ({reason})") from error
    if _is_bytes(inner):
        return ByteTokenizer()
    try:
        return FileTokenizer(inner)
    except UsageError as error:
        raise UsageError(f"tokenizer {path}: {error}") from error


def require_same_tokenizer(found: str, expected: str, where: str, model: str = "") -> None:
    """Compares two fingerprints; ids of one vocabulary mean nothing in another.

    Args:
        found: fingerprint of the tokenizer of `where`.
        expected: fingerprint that it should have: that of `model`, where one is given.

    Raises:
        UsageError: they differ.
    """
    if found != expected:
        remedy = f"; prepare the data with --tokenizer {Path(model) / 'tokenizer.json'}" if model else ""
        whose = f", {model} has {expected}" if model else f", expected {expected}"
        raise UsageError(f"{where}: made with another tokenizer (fingerprint {found}{whose}){remedy}")


# -- parts ------------------------------------------------------------------------------------------------------------


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Tokenizer that splits as GPT-2 does and spells bytes as characters."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _is_bytes(inner: tokenizers.Tokenizer) -> bool:
    vocabulary = inner.get_vocab(with_added_tokens=True)
    return len(vocabulary) == 259 and all(vocabulary.get(c) == byte for byte, c in enumerate(byte_characters()))


def _only_alias(inner: tokenizers.Tokenizer, name: str) -> bool:
    return inner.token_to_id(name) is None and name in ALIASES and inner.token_to_id(ALIASES[name]) is not None


def _read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in content.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UsageError(f"tokenizer {path}: neither a tokenizer.json nor a tiktoken rank file") from error
    return _checked(ranks, path)


def _checked(ranks: dict[bytes, Any], path: Path) -> dict[bytes, int]:
    """The same ranks. Raises UsageError: they are no ranks, or some text could not be spelled with them."""
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise UsageError(f"tokenizer {path}: a rank file must hold all 256 single bytes; {missing} are missing")
    if b"" in ranks:
        raise UsageError(f"tokenizer {path}: a rank file must not hold the empty token")
    if not all(type(rank) is int and 0 <= rank < 2**31 - 3 for rank in ranks.values()) or len({*ranks.values()}) < len(ranks):
        raise UsageError(f"tokenizer {path}: ranks must be different whole numbers from 0 on")
    return ranks


def _tried(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The same tokenizer. Raises UsageError: it cannot split text, as with a pattern that matches nothing at all."""
    try:
        tokenizer.encode("a 1\n")
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library's Rust code; it derives from BaseException alone
            raise
        raise UsageError(f"tokenizer {path}: text cannot be split by its pattern ({error})") from error
    return tokenizer
