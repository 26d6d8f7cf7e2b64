"""Generation equals a plain loop that recomputes everything, whatever the batch, the padding, and the way it is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core import generate
from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.generate import Generated, SpecialIds, stream
from calm.core.latent_lm import LatentLM, LatentLMConfig
from calm.core.predictor import NextVector
from calm.core.sampler import PlainSampler
from calm.core.temperature import BatchTemperature
from calm.core.unrolled import Unrolled, unrolled, unstack
from calm.decoders.context_decoder import ContextDecoderConfig, recent_tokens
from calm.errors import UsageError
from calm.rng import row_keys
from calm.rng import stream as random_stream
from calm.text.chunking import chunk_prompt

V, K, LONGEST = 37, 3, 16
SPECIAL = SpecialIds(begin_id=34, end_id=34, mask_id=36)  # the end id is banned as well: rows go on to the limit
PROMPTS = [np.arange(7), np.array([], np.int32), np.array([5, 6, 7]), np.arange(20) % 11]
SAMPLERS = {"plain": PlainSampler(), "batch": BatchTemperature(num_candidates=6)}


def with_numbers(config, precision):
    """A model with random kernels everywhere: a new head would ignore its noise. Numbers from numpy compile nothing."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), precision=precision)))
    generator = np.random.default_rng(0)

    def numbers(path, x):
        names = {getattr(entry, "key", None) for entry in path}
        scale = "scale" in names
        fan_in = x.shape[-1] if "embedding" in names else 100 if "kernel" not in names else x.shape[-2]
        spread = generator.normal(size=x.shape, scale=fan_in**-0.5)
        return jnp.asarray(spread + scale, jnp.float32)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(numbers, params))


def build(precision="float32", context_decoder=None) -> tuple[Autoencoder, LatentLM]:
    codec = AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=4, dim=8, inner_dim=16)
    backbone = BackboneConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, inner_dim=24)
    head = EnergyHeadConfig(num_blocks=2, noise_dim=4)
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=4)
    config = LatentLMConfig(**sizes, backbone=backbone, head=head, context_decoder=context_decoder)
    return with_numbers(codec, precision), with_numbers(config, precision)


@pytest.fixture(scope="module")
def models():
    return build()


def keys(rows: int):
    return row_keys(jax.random.key(3), rows)


def run(models, prompts, keys, max_tokens=12, special=SPECIAL, **options) -> Generated:
    return generate(NextVector(*models), prompts, keys, special=special, max_tokens=max_tokens, **options)


@nnx.jit
def whole(lm, chunks):
    return lm.hidden(chunks)[0]


@nnx.jit
def decode(models, hidden, noise):
    autoencoder, lm = models
    return autoencoder.logits(lm.head(hidden, noise))


def twin(models, prompt, key, max_tokens, sampler) -> np.ndarray:
    """One row, a Python loop, no state, no padding on the left, all logits."""
    _, lm = models
    chunks = chunk_prompt(np.asarray(prompt, np.int32), K, SPECIAL.begin_id)
    first = len(chunks)
    for step in range(max_tokens // K):
        padded = np.concatenate([chunks, np.zeros((LONGEST - len(chunks), K), np.int32)])  # the future: not seen
        hidden = whole(lm, jnp.asarray(padded[None]))[0, len(chunks) - 1]
        noise = lm.head.draw_noise(random_stream(key, "draw", step), (getattr(sampler, "num_candidates", 1),))
        logits = decode(models, hidden, noise)
        candidates = logits.at[..., [SPECIAL.begin_id, SPECIAL.mask_id]].set(-jnp.inf).argmax(-1).astype(jnp.int32)
        index = 0
        if isinstance(sampler, BatchTemperature):
            index, _ = sampler.choose(random_stream(key, "choice", step), candidates)
        chunks = np.concatenate([chunks, candidates[index][None]])
    return chunks[first:].reshape(-1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_tokens_are_those_of_a_plain_loop_without_state(models, name):
    result = run(models, PROMPTS, keys(4), sampler=SAMPLERS[name])
    assert not result.ended.any()
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(result.tokens[row], twin(models, prompt, keys(4)[row], 12, SAMPLERS[name]))
    assert len({tuple(row) for row in result.tokens.tolist()}) == 4
    np.testing.assert_array_equal(result.draws, 4 * (6 if name == "batch" else 1))


def test_a_row_gives_the_same_tokens_alone_as_in_any_batch(models):
    options = dict(sampler=SAMPLERS["batch"])
    together = run(models, PROMPTS, keys(4), **options)
    for row, prompt in enumerate(PROMPTS):
        alone = run(models, [prompt], keys(4)[row : row + 1], **options)
        for ours, theirs in zip(alone[:-1], together[:-1], strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


@pytest.mark.parametrize("decoding", ["argmax", "drawn"])
def test_the_other_rows_of_a_batch_do_not_matter(models, decoding):
    options = dict(sampler=SAMPLERS["batch"], decoding=decoding)
    forwards = run(models, PROMPTS, keys(4), **options)
    backwards = run(models, PROMPTS[::-1], keys(4)[::-1], **options)
    np.testing.assert_array_equal(backwards.tokens, forwards.tokens[::-1])
    assert forwards.decoding == decoding


@pytest.mark.parametrize(("window", "recall"), [(2, 0), (7, 0), (2, 8)])
def test_a_decoder_inside_the_chunk_writes_as_if_it_had_the_whole_text(window, recall):
    """The most probable path, against the states of the whole text read at once; neither padding nor the batch matters."""
    size = dict(dim=16, inner_dim=24, num_layers=1, table_dim=8)
    models = build(context_decoder=ContextDecoderConfig(**size, window=window, recall=recall, use_latent=False))
    predictor, lm = NextVector(*models), models[1]
    result = run(models, PROMPTS, keys(4), decoding="argmax")
    for row, prompt in enumerate(PROMPTS):
        text = np.concatenate([chunk_prompt(np.asarray(prompt, np.int32), K, SPECIAL.begin_id).reshape(-1), result.tokens[row]])
        chunks = jnp.asarray(text.reshape(-1, K))
        plan = lm.context_decoder.plan(whole(lm, chunks[None, :-1])[0], None)
        states = lm.context_decoder.teacher_forced(plan, recent_tokens(chunks[:-1], predictor.reach), chunks[1:])[0]
        logits = (states @ predictor.table.T).at[..., [SPECIAL.begin_id, SPECIAL.mask_id]].set(-jnp.inf)
        steps = result.tokens.shape[1] // K
        np.testing.assert_array_equal(result.tokens[row].reshape(-1, K), logits[-steps:].argmax(-1))
    assert len({tuple(row) for row in result.tokens.tolist()}) > 1


def test_a_longer_neighbour_does_not_matter(models):
    """It pads the other rows to another length, for which another loop is compiled."""
    longer = [np.arange(60) % 13, *PROMPTS[1:]]
    np.testing.assert_array_equal(run(models, longer, keys(4)).tokens[1:], run(models, PROMPTS, keys(4)).tokens[1:])


def test_fewer_tokens_are_a_prefix_of_more(models):
    more = run(models, PROMPTS, keys(4))
    for max_tokens in (1, 5, 11):
        fewer = run(models, PROMPTS, keys(4), max_tokens)
        np.testing.assert_array_equal(fewer.tokens, more.tokens[:, :max_tokens])
        np.testing.assert_array_equal(fewer.lengths, max_tokens)


def test_a_prompt_is_filled_with_begin_ids_from_the_left(models):
    """So writing the begin ids out changes nothing, and an empty prompt is a chunk of them."""
    begin = SPECIAL.begin_id
    same_key = jnp.stack([keys(1)[0]] * 4)
    short = run(models, [[], [5], [5, 6, 7], [1]], same_key)
    written_out = run(models, [[begin] * K, [begin, begin, 5], [5, 6, 7], [begin, begin, 1]], same_key)
    np.testing.assert_array_equal(chunk_prompt(np.array([], np.int32), K, begin), [[begin] * K])
    np.testing.assert_array_equal(chunk_prompt(np.array([5, 6, 7], np.int32), K, begin), [[5, 6, 7]])
    np.testing.assert_array_equal(written_out.tokens, short.tokens)


def test_a_row_stops_at_its_first_end_token_and_the_others_go_on(models):
    """Any token can be made the end token: what was written before it does not change."""
    free = run(models, PROMPTS, keys(4), 24)
    end = int(free.tokens[0][7])
    result = run(models, PROMPTS, keys(4), 24, special=SpecialIds(begin_id=34, end_id=end, mask_id=36))
    assert result.ended.any()
    for row in range(4):
        places = np.flatnonzero(free.tokens[row] == end)
        length = places[0] if len(places) else 24
        assert result.lengths[row] == length and result.ended[row] == (length < 24)
        np.testing.assert_array_equal(result.tokens[row][:length], free.tokens[row][:length])
        assert (result.tokens[row][length:] == end).all()
        assert result.draws[row] == min(length // K + 1, 24 // K)


@pytest.mark.parametrize("max_tokens", [24, 10])
def test_streaming_gives_the_same_tokens_chunk_by_chunk(models, max_tokens):
    end = int(run(models, PROMPTS, keys(4), 24, sampler=SAMPLERS["batch"]).tokens[0][7])
    special = SpecialIds(begin_id=34, end_id=end, mask_id=36)
    alike = jnp.stack([keys(1)[0]] * 4)
    for prompts, own in ((PROMPTS, keys(4)), (PROMPTS[:1] * 4, alike)):  # the second ends early, all rows together
        options = dict(special=special, max_tokens=max_tokens, sampler=SAMPLERS["batch"])
        whole = generate(NextVector(*models), prompts, own, **options)
        chunks, pieces = [], stream(NextVector(*models), prompts, own, **options)
        while True:
            try:
                chunks.append(next(pieces))
            except StopIteration as stop:
                result = stop.value
                break
        joined = np.concatenate(chunks, axis=1)
        np.testing.assert_array_equal(joined, whole.tokens[:, : joined.shape[1]])
        for ours, theirs in zip(result, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("decoding", ["argmax", "drawn"])
def test_begin_and_mask_ids_are_never_written(models, decoding):
    """Here the model's two favourite tokens take their places."""
    options = dict(sampler=SAMPLERS["batch"], decoding=decoding)
    free = run(models, PROMPTS, keys(4), 24, **options)
    favourite, second = np.bincount(free.tokens.reshape(-1), minlength=V).argsort()[-2:]
    banned = SpecialIds(begin_id=int(favourite), end_id=35, mask_id=int(second))
    tokens = run(models, PROMPTS, keys(4), 24, special=banned, **options).tokens
    assert not np.isin(tokens, [favourite, second]).any()


def test_the_share_of_fallbacks_is_reported(models):
    """A step falls back if all six candidates differ."""
    often = run(models, PROMPTS, keys(4), sampler=SAMPLERS["batch"]).fallback_share
    never = run(models, PROMPTS, keys(4), sampler=PlainSampler()).fallback_share
    assert (never == 0).all() and 0 < often.mean() < 1
    np.testing.assert_array_equal(often * 4, np.round(often * 4))


def test_layers_taken_apart_compute_the_same(models):
    _, lm = models
    apart = unrolled(lm)
    assert isinstance(apart.backbone.blocks, Unrolled) and isinstance(apart.head.blocks, Unrolled)
    chunks = jax.random.randint(jax.random.key(5), (2, 4, K), 0, V)
    hidden, state = nnx.jit(lambda lm, state: lm.hidden(chunks, state))(lm, lm.init_state(2, 6))
    begun = lm.init_state(2, 6)
    begun = begun._replace(layers=unstack(begun.layers, 2))
    ours, state_apart = nnx.jit(lambda lm, state: lm.hidden(chunks, state))(apart, begun)
    np.testing.assert_allclose(ours, hidden, atol=1e-5)
    for layer, expected in zip(state_apart.layers, unstack(state.layers, 2), strict=True):
        np.testing.assert_allclose(layer.keys, expected.keys, atol=1e-5)


def test_bfloat16_operands_generate_too():
    result = run(build("bfloat16"), PROMPTS, keys(4))
    assert result.tokens.shape == (4, 12) and (result.tokens < V).all() and (result.tokens >= 0).all()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([np.arange(20)], dict(context=6), "prompt 0 has 7 chunks of 3 tokens, more than the context of 6"),
        ([[1], np.arange(20)], dict(context=9), "prompt 1 has 7 chunks .* room for 6 more tokens .* max_tokens=12"),
        ([], {}, "no prompts"),
        ([[1, 37]], {}, "prompt 0: token id 37 is outside the vocabulary of 37"),
        ([[1]], dict(max_tokens=0), "max_tokens must be at least 1"),
        ([[1]], dict(decoding="greedy"), "choose argmax or drawn"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_one_line(models, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        run(models, prompts, keys(len(prompts)), **options)


def test_one_key_a_row(models):
    with pytest.raises(UsageError, match="2 keys for 1 prompts"):
        run(models, [[1]], keys(2))


def test_a_prompt_may_fill_the_context_to_the_last_chunk(models):
    assert run(models, [np.arange(20)] * 4, keys(4), context=11).tokens.shape == (4, 12)
