"""One small tokenizer of every kind that a tokenizer.json can hold, several of them built to confuse text with control."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from calm.text.tokenizer import ByteTokenizer, FileTokenizer, RankTokenizer, Tokenizer
from calm.text.tokenizer_spec import SPECIALS
from calm.text.tokenizer_training import train_bpe, train_words

TEXT = [
    "the cat sat on the mat, the cat ate\n\nthe rat  and 1234 naïve cafés beside it's <|end|> words . </s> [SEP] <s>\n" * 20
]
LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyz<|>/.,'[]SEP0123456789 éï\n"})
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wordpiece() -> tokenizers.Tokenizer:
    """Like BERT's, but split at white space alone, so that a whole "<|end|>" and "[SEP]" reach the model."""
    words = ["[UNK]", "[SEP]", "<|end|>", "the", "cat", "river", "##s", "##ing", ".", "'", *LETTERS]
    vocab = {word: number for number, word in enumerate(dict.fromkeys([*words, *(f"##{c}" for c in LETTERS)]))}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    made.normalizer = normalizers.Lowercase()
    made.add_special_tokens(["[UNK]", "[SEP]"])
    return made


def unigram() -> tokenizers.Tokenizer:
    """Like T5's: a SentencePiece vocabulary that spells "</s>" and "<|mask|>" itself, a blank in front of every word."""
    pieces = ["</s>", "<|mask|>", "▁the", "▁cat", "▁", "river", "ing", *(c for c in LETTERS if not c.isspace())]
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -float(len(piece) < 3)) for piece in pieces)], 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def llama() -> tokenizers.Tokenizer:
    """Like Llama 2's: BPE over characters, bytes for what it lacks, a blank in front of the text that decoding takes off."""
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, "th", "the", "▁the"])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def eager_bpe() -> tokenizers.Tokenizer:
    """A BPE whose own merges spell "<|end|>", and which has it in its vocabulary."""
    steps = ["<|", "<|e", "<|en", "<|end", "<|end|", "<|end|>"]
    vocab = {word: number for number, word in enumerate([*LETTERS, *steps])}
    merges = [("<", "|"), ("<|", "e"), ("<|e", "n"), ("<|en", "d"), ("<|end", "|"), ("<|end|", ">")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.decoder = decoders.Fuse()
    return made


def suffix_bpe() -> tokenizers.Tokenizer:
    """Like GPT-1's: a suffix marks the end of a word; characters that it lacks are dropped in silence."""
    vocab = {word: number for number, word in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS), "th", "the</w>"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e</w>")], end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    return made


def ordinary_added() -> tokenizers.Tokenizer:
    """Byte-level BPE with our specials as ordinary added tokens, and one ordinary token more."""
    made = plain_bpe()
    made.add_tokens([*SPECIALS, AddedToken("<|user|>", lstrip=True, normalized=False)])
    return made


def plain_bpe() -> tokenizers.Tokenizer:
    """The byte-level BPE that `train_bpe` makes, without our specials."""
    content = json.loads(train_bpe(TEXT, 300).to_json())
    return tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))


def control_words() -> tokenizers.Tokenizer:
    """A word vocabulary that holds the names of our specials, as was written before they were kept out of it."""
    words = ["<unk>", "\n", "the", "river", *SPECIALS]
    made = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s\x1c-\x1f]+"), behavior="removed", invert=True)
    return made


def rank_tokenizer() -> RankTokenizer | None:
    """tiktoken with some merges; None where the package is missing."""
    try:
        return RankTokenizer({bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"<|": 259})
    except ImportError:
        return None


def every_kind() -> dict[str, Tokenizer]:
    """All of them, ready to use."""
    made: dict[str, Tokenizer | None] = {
        "bytes": ByteTokenizer(),
        "bpe": train_bpe(TEXT, 300),
        "words": train_words(TEXT),
        "tiktoken": rank_tokenizer(),
        "no decoder": FileTokenizer(tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))),
    }
    files = (wordpiece, unigram, llama, eager_bpe, suffix_bpe, ordinary_added, control_words)
    made |= {build.__name__: FileTokenizer(build()) for build in files}
    return {name: tokenizer for name, tokenizer in made.items() if tokenizer is not None}


def save(inner: tokenizers.Tokenizer, path: Path) -> Path:
    """Writes a tokenizer.json as its maker would."""
    path.write_text(inner.to_str(), encoding="utf-8")
    return path
