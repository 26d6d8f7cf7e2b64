"""A prompt ends where a chunk ends; what is missing stands in front, as begin ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.text.chunking import chunk_prompt, num_begins, num_chunks, pad_prompts

BEGIN = 999
IDS = st.lists(st.integers(0, 500), max_size=40)


@given(IDS, st.integers(1, 8))
def test_chunks_are_the_prompt_behind_as_few_begins_as_will_do(ids, chunk_size):
    chunks = chunk_prompt(ids, chunk_size, BEGIN)
    begins = num_begins(len(ids), chunk_size)
    assert 0 <= begins < chunk_size or not ids
    assert chunks.shape == (num_chunks(len(ids), chunk_size), chunk_size)
    assert chunks.ravel().tolist() == [BEGIN] * begins + ids


@given(st.lists(IDS, min_size=1, max_size=5), st.integers(1, 5))
def test_rows_of_a_padded_batch_are_their_prompts_and_end_together(prompts, chunk_size):
    chunks, starts = pad_prompts(prompts, chunk_size, BEGIN)
    assert starts.min() == 0 and starts.dtype == np.int32
    for row, start, prompt in zip(chunks, starts, prompts, strict=True):
        np.testing.assert_array_equal(row[start:], chunk_prompt(prompt, chunk_size, BEGIN))
        assert (row[:start] == BEGIN).all()


def test_empty_prompt_is_one_chunk_of_begins():
    np.testing.assert_array_equal(chunk_prompt([], 4, BEGIN), [[BEGIN] * 4])


def test_no_prompts_and_no_chunk_size_are_refused():
    with pytest.raises(UsageError, match="prompts"):
        pad_prompts([], 4, BEGIN)
    with pytest.raises(UsageError, match="chunk_size"):
        chunk_prompt([1], 0, BEGIN)
