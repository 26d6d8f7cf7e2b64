"""Bits per byte: the bytes are those of the scored text, and the unit is right."""

import math

import numpy as np
import pytest

from calm.core.intervals import BlockSums
from calm.errors import UsageError
from calm.evaluate.bits_per_byte import bits_per_byte, scored_bytes
from calm.text.tokenizer import ByteTokenizer
from calm.text.tokenizer_training import train_bpe

TEXT = "Der Fuchs läuft über die Brücke, und der Hund läuft hinterher. " * 4


def test_bytes_are_those_of_the_text_behind_what_is_only_read():
    tokenizer = ByteTokenizer()
    blocks = np.stack([tokenizer.encode(TEXT)[:64], tokenizer.encode(TEXT)[64:128]])
    np.testing.assert_array_equal(scored_bytes(tokenizer.decode, blocks[:, :13], 4), [9, 9])
    bpe = train_bpe([TEXT], 280)
    ids = bpe.encode(TEXT)[:24]
    assert scored_bytes(bpe.decode, ids[None], 3)[0] == len(bpe.decode(ids[3:]).encode()) > 21


def test_special_tokens_stand_for_no_text():
    tokenizer = ByteTokenizer()
    block = np.array([[97, tokenizer.end_id, tokenizer.begin_id, 98, 99]])
    assert scored_bytes(tokenizer.decode, block, 0)[0] == 3


def test_a_uniform_model_over_bytes_costs_eight_bits():
    nats = BlockSums(
        total=np.full((40, 1), 63 * math.log(256)), count=np.full(40, 63.0), document=np.arange(40), block_tokens=64
    )
    found = bits_per_byte(nats, np.full(40, 63.0))
    assert found.estimate == pytest.approx(8) and found.low == pytest.approx(8)
    assert bits_per_byte(nats, np.full(40, 126.0)).estimate == pytest.approx(4)


def test_bytes_that_do_not_fit_are_refused():
    nats = BlockSums(total=np.ones((2, 1)), count=np.ones(2), document=np.arange(2), block_tokens=64)
    with pytest.raises(UsageError, match="2 blocks and 3 numbers"):
        bits_per_byte(nats, np.ones(3))
    with pytest.raises(UsageError, match="no text"):
        bits_per_byte(nats, np.zeros(2))
