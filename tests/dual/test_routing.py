"""Two models in turns: each chunk is what the model that the router names writes after the text before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.generate import SpecialIds, generate
from calm.dual.router import Router, RouterConfig
from calm.dual.routing import route
from calm.dual.speculation import draw_uniforms
from calm.errors import UsageError
from calm.rng import row_keys
from calm.text.chunking import chunk_prompt
from calm.token.sampler import SoftmaxSampler
from small_pairs import SPECIAL, K, choose, logits_after, models

PROMPTS = [[2, 3, 4, 5, 2, 2, 3][:length] for length in (0, 1, 3, 7, 2, 5, 4, 6)]
LENGTH, THRESHOLD = 15, -0.1


def keys(rows: int = len(PROMPTS)):
    return row_keys(jax.random.key(7), rows)


def random_router(dim: int = 8) -> Router:
    graph, params = nnx.split(RouterConfig(dim=dim, inner_dim=4).build(rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    noise = np.random.default_rng(1)
    drawn = [jnp.asarray(noise.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


def routed(threshold: float, writer: str = "hidden", special: SpecialIds = SPECIAL, **options):
    options = dict(max_tokens=LENGTH, token_sampler=SoftmaxSampler(top_k=1), decoding="argmax") | options
    return route(*models(writer), random_router(), PROMPTS, keys(), special=special, threshold=threshold, **options)


@nnx.jit
def hidden_at(predictor, chunks, at):
    return predictor.hidden(chunks[None])[0][0, at]


def test_every_chunk_is_that_of_the_model_whose_turn_it_is():
    """Each is written anew by one model that reads all the text before it: the token model with the numbers of the place, CALM
    as what is most probable, so that the text alone decides it."""
    token_lm, predictor = models("hidden")
    router, sampler = random_router(), SoftmaxSampler(temperature=1.5)
    result = routed(THRESHOLD, token_sampler=sampler)
    starts = [(row, chunk) for row in range(len(PROMPTS)) for chunk in range(LENGTH // K)]
    begins = [SPECIAL.begin_id] * K  # the empty prompt
    before = [[*(PROMPTS[row] or begins), *result.tokens[row, : K * chunk].tolist()] for row, chunk in starts]
    by_chunk = generate(predictor, before, keys(len(before)), special=SPECIAL, max_tokens=K, decoding="argmax").tokens
    turns = np.zeros((len(PROMPTS), LENGTH // K), bool)
    for number, (row, chunk) in enumerate(starts):
        text = list(before[number])
        chunks = chunk_prompt(np.array(text, np.int32), K, SPECIAL.begin_id)
        padded = jnp.asarray(np.pad(chunks, ((0, 10 - len(chunks)), (0, 0))))
        turns[row, chunk] = router(hidden_at(predictor, padded, len(chunks) - 1)) > THRESHOLD
        numbers = np.asarray(draw_uniforms(keys()[row], LENGTH).choice)
        if turns[row, chunk]:
            for place in range(K * chunk, K * chunk + K):
                read = text if PROMPTS[row] else text[K:]
                text.append(choose(sampler, logits_after(token_lm, read, started=not PROMPTS[row]), numbers[place]))
        written = text[-K:] if turns[row, chunk] else by_chunk[number]
        np.testing.assert_array_equal(result.tokens[row, K * chunk :][:K], written, err_msg=str(before[number]))
    np.testing.assert_array_equal(result.by_tokens, turns.sum(1))
    assert (turns[:, 2:] & ~turns[:, 1:-1] & ~turns[:, :-2]).any()  # the token model waited for two chunks
    assert (turns[:, :-1] & ~turns[:, 1:]).any() and (turns[:, :-1] & turns[:, 1:]).any()


def test_one_model_alone_writes_what_it_writes_without_a_router():
    """Drawn, with the same keys, to an end token."""
    token_lm, predictor = models("both")
    special = SpecialIds(begin_id=0, end_id=5, mask_id=1)
    options = dict(special=special, max_tokens=LENGTH - 8)
    alone = {
        float("inf"): generate(predictor, PROMPTS, keys(), decoding="drawn", **options),
        float("-inf"): generate(token_lm, PROMPTS, keys(), sampler=SoftmaxSampler(), decoding="drawn", **options),
    }
    for threshold, plain in alone.items():
        result = routed(threshold, "both", token_sampler=SoftmaxSampler(), decoding="drawn", **options)
        for name in ("tokens", "lengths", "ended"):
            np.testing.assert_array_equal(getattr(result, name), getattr(plain, name), err_msg=name)
        assert set(result.by_tokens / result.chunks) == {float(threshold < 0)}
    assert {bool(ended) for plain in alone.values() for ended in plain.ended} == {False, True}


def test_a_router_of_other_hidden_states_is_refused():
    with pytest.raises(UsageError, match="made for hidden states of width 9, this model's are 8 wide"):
        route(*models("hidden"), random_router(9), [[2]], keys(1), special=SPECIAL, max_tokens=3, threshold=0.0)
    with pytest.raises(UsageError, match="dim and inner_dim must be at least 1"):
        RouterConfig(dim=0)
