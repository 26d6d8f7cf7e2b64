"""A drafted text has exactly the token model's distribution, whatever drafts it; with matched draws it is its own text."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.generate import SpecialIds, generate
from calm.core.predictor import NextVector
from calm.core.steps import Model, prepare
from calm.core.vocabulary import draw_places
from calm.dual.drafting import Work, draft, drafting_cost, token_model_cost
from calm.dual.speculation import Drafting, Proposer, Speculation, draw_uniforms
from calm.errors import UsageError
from calm.hybrid.backbone import HybridConfig
from calm.rng import row_keys, stream
from calm.text.chunking import NOTHING, chunk_prompt
from calm.token.model import TokenLM, TokenLMConfig
from calm.token.sampler import SoftmaxSampler
from known_law import chi_square
from random_models import random_model
from small_pairs import BACKBONE, MASK, SPECIAL, K, V, choose, logits_after, models

ROWS, LENGTH = 2400, 6
CASES = [  # writer, sampler of the token model, recipe; one compiled program each
    ("none", SoftmaxSampler(), Drafting(rule="accept", num_latents=2)),
    ("both", SoftmaxSampler(temperature=2.0), Drafting(rule="accept", num_latents=2, boundaries="moved")),
    ("none", SoftmaxSampler(temperature=0.6), Drafting(rule="match", boundaries="moved")),
    ("both", SoftmaxSampler(), Drafting(rule="match", num_latents=2)),
]
MORE = [
    pytest.param("hidden", SoftmaxSampler(temperature=0.6), Drafting(rule="accept", num_latents=2), marks=pytest.mark.slow),
    pytest.param("both", SoftmaxSampler(), Drafting(rule="accept", num_latents=3), marks=pytest.mark.slow),
    pytest.param("none", SoftmaxSampler(top_k=2), Drafting(rule="accept", boundaries="moved"), marks=pytest.mark.slow),
    pytest.param("both", SoftmaxSampler(top_k=1), Drafting(rule="match"), marks=pytest.mark.slow),
]


def keys(rows: int = ROWS):
    return row_keys(jax.random.key(4), rows)


def drafted(writer, sampler, recipe, prompts, **options):
    options = dict(special=SPECIAL, max_tokens=LENGTH) | options
    return draft(*models(writer), prompts, keys(len(prompts)), drafting=recipe, sampler=sampler, **options)


def exact_distribution(
    token_lm: TokenLM, sampler: SoftmaxSampler, prompt: list[int], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every continuation of so many tokens, and its probability by the token model read from the beginning."""
    allowed = [token for token in range(V) if token not in (SPECIAL.begin_id, SPECIAL.mask_id)]
    every = np.array(list(itertools.product(allowed, repeat=length)))
    text = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    logits = np.array(token_lm.logits(token_lm.hidden(jnp.asarray(text[:, :-1, None]))[0][:, len(prompt) - 1 :]))
    logits[..., [SPECIAL.begin_id, SPECIAL.mask_id]] = -np.inf
    weights = np.asarray(sampler.weights(jnp.asarray(logits.reshape(-1, V)))).reshape(logits.shape)
    of_each = np.take_along_axis(weights / weights.sum(-1, keepdims=True), every[..., None], axis=-1)[..., 0]
    return every, of_each.prod(-1)


@pytest.mark.parametrize(("writer", "sampler", "recipe"), [*CASES, *MORE])
def test_a_drafted_text_has_the_distribution_of_the_token_model(writer, sampler, recipe):
    """Four tokens in a row, over a chunk boundary and after rejections, as one outcome."""
    prompt = [2, 3, 4]
    result = drafted(writer, sampler, recipe, [prompt] * ROWS)
    every, probability = exact_distribution(models(writer)[0], sampler, prompt, K + 1)
    place = {tuple(tokens): number for number, tokens in enumerate(every.tolist())}
    found = np.array([place[tuple(tokens)] for tokens in result.tokens[:, : K + 1].tolist()])
    likely = probability >= 2 / ROWS  # the rest as one outcome, so that chi-square is near its distribution
    merged = np.append(probability[likely], probability[~likely].sum())
    number = np.where(likely, np.cumsum(likely) - 1, likely.sum())
    assert abs(chi_square(number[found], merged / merged.sum())) < 4
    assert 0 < result.work.accepted < result.work.proposed


@pytest.mark.parametrize(("writer", "sampler", "recipe"), [CASES[2], CASES[3], MORE[3]])
def test_matched_drafts_leave_the_token_models_text_as_it_is(writer, sampler, recipe):
    """Prompts of all phases, the empty one among them; the same keys. Some rows end before their limit."""
    ending = SpecialIds(begin_id=0, end_id=5, mask_id=1)
    prompts = [[2, 3, 4, 5, 2, 2, 3][: length % 8] for length in range(ROWS)]
    result = drafted(writer, sampler, recipe, prompts, special=ending)
    some = slice(0, 64)
    options = dict(special=ending, max_tokens=LENGTH, sampler=sampler, decoding="drawn")
    plain = generate(models(writer)[0], prompts[some], keys()[some], **options)
    for name in ("tokens", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(result, name)[some], getattr(plain, name), err_msg=name)
    assert result.work.accepted > 0 and set(plain.ended) == {False, True}


@pytest.mark.parametrize(("writer", "sampler", "recipe"), CASES)
def test_what_both_models_are_sure_of_alike_is_always_kept(writer, sampler, recipe):
    """Uniform distributions on both sides: a rule that accepts keeps every draft, one that matches every draft drawn with
    the same numbers. With kept boundaries a pass ends with its chunk and one token, and the next drafts one place less."""
    pair = [nnx.merge(*nnx.split(model)) for model in models(writer)]
    pair[0].backbone.norm.scale[...] *= 0.0
    if writer == "none":
        pair[1].autoencoder.decoder.norm.scale[...] *= 0.0
    else:
        for layer in filter(None, (pair[1].lm.context_decoder.out, pair[1].lm.context_decoder.copy)):
            layer.kernel[...] *= 0.0
    result = draft(*pair, [[2, 3, 4]] * ROWS, keys(), special=SPECIAL, max_tokens=LENGTH, drafting=recipe, sampler=sampler)
    work = result.work
    assert work.accepted == work.proposed
    passes = -(-LENGTH // (K + 1)) if recipe.boundaries == "moved" else 1 + -(-(LENGTH - K - 1) // K)
    assert work.passes == ROWS * passes


@functools.partial(nnx.jit, static_argnames="num_latents")
def of_each_latent(predictor: NextVector, key, chunks, at, previous, targets, place, *, num_latents):
    """log p of the token at `place` of each target, for each of the latents drawn after chunk `at` of a padded text."""
    hidden = predictor.hidden(chunks[None])[0][:, at]
    latents = predictor.lm.head(hidden, predictor.draw_noise(key, (num_latents, 1)).latent)
    rows = (jnp.repeat(hidden, V, 0), jnp.repeat(previous[None], V, 0), jnp.repeat(latents, V, 1))
    return predictor.token_log_probs(*rows, targets)[..., place]


def twin(writer, sampler, recipe, prompt, key) -> tuple[list[int], dict[str, int]]:
    """One row of matched drafts in plain Python: both models read the whole text anew at every step."""
    token_lm, predictor = models(writer)
    numbers = np.asarray(draw_uniforms(key, LENGTH + K + 1).choice)
    begins = [] if prompt else [SPECIAL.begin_id] * K  # what an empty prompt is stays in front of what is written
    text, written, counts = list(prompt), 0, dict(passes=0, proposed=0, accepted=0)
    while written < LENGTH:
        known = written % K if recipe.boundaries == "kept" else 0
        boundary = len(text) - known
        chunks = chunk_prompt([*begins, *text[:boundary]] if boundary % K == 0 else text[:boundary], K, SPECIAL.begin_id)
        padded = np.pad(chunks, ((0, 10 - len(chunks)), (0, 0)))  # the future: not seen
        before = np.array([NOTHING] * 5 + chunks.reshape(-1).tolist(), np.int32)
        previous = jnp.asarray(before[len(before) - predictor.reach :])
        of_chunk, weights = stream(key, "latents", written - known), np.zeros(recipe.num_latents)
        chunk = text[boundary:]
        for place in range(K):
            targets = np.array([(chunk[:place] + [token] + [2] * K)[:K] for token in range(V)], np.int32)
            reads = (jnp.asarray(padded), len(chunks) - 1, previous, jnp.asarray(targets), place)
            log_probs = np.asarray(of_each_latent(predictor, of_chunk, *reads, num_latents=recipe.num_latents)) + MASK
            log_probs -= np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)
            if place >= known:
                chunk.append(
                    choose(sampler, np.logaddexp.reduce(weights[:, None] + log_probs, axis=0), numbers[written + place - known])
                )
            weights = weights + log_probs[:, chunk[place]]
        drafts = chunk[known:]
        kept = -1
        while kept < 0 or (kept < len(drafts) and token == drafts[kept]):
            kept += 1
            token = choose(sampler, logits_after(token_lm, text, started=not prompt), numbers[written])
            text.append(token)
            written += 1
        done = dict(passes=1, proposed=len(drafts), accepted=kept)
        counts = {name: counts[name] + done[name] for name in counts}
    return text[len(prompt) :][:LENGTH], counts


@pytest.mark.parametrize(
    ("writer", "recipe"),
    [("none", Drafting(rule="match", boundaries="moved")), ("both", Drafting(rule="match", num_latents=2))],
)
def test_drafts_are_what_calm_writes_after_the_whole_text_read_anew(writer, recipe):
    """At the boundary that the recipe names, with the latents drawn there, and the tokens of the chunk that are known."""
    sampler, prompts = SoftmaxSampler(temperature=1.5), [[2, 3, 4, 5, 2][:length] for length in (0, 0, 0, 0, 1, 2, 5)]
    result = drafted(writer, sampler, recipe, prompts)
    total = dict(passes=0, proposed=0, accepted=0)
    for row, prompt in enumerate(prompts):
        text, counts = twin(writer, sampler, recipe, prompt, keys(len(prompts))[row])
        assert text == result.tokens[row].tolist()
        total = {name: total[name] + counts[name] for name in total}
    assert total == {name: getattr(result.work, name) for name in total}


@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize("writer", ["none", "both"])
def test_drafts_of_several_latents_follow_the_mixture_of_what_each_would_write(writer, known):
    """Their distributions multiply to mean_s prod_k p(x_k | latent s, x_<k), given the tokens that are known."""
    target, predictor = models(writer)
    pair = [prepare(Model(*nnx.split(model)), jnp.arange(V), jnp.int32(V)) for model in (target, predictor)]
    recipe, chunks, start = Drafting(num_latents=3), jnp.asarray([[0, 3, 2], [4, 2, 3]]), 9
    text = jnp.asarray([0, 0, 0, 0, 3, 2, 4, 2, 3, 5, 4, 0, 0, 0], jnp.int32)  # the last two are known, or are not
    graphs, weights = nnx.split(predictor)

    @jax.jit
    def run(weights, key):
        predictor = nnx.merge(graphs, weights)
        together = Speculation(recipe, SoftmaxSampler(), *pair, jnp.zeros(V))
        hidden = predictor.hidden(chunks[None])[0][:, -1]
        parts = together.parts(key, hidden)
        proposer = Proposer((), *[jnp.zeros(1, jnp.int32)] * 3, parts, jnp.zeros(3), jnp.int32(0))
        numbers = jax.random.uniform(key, (K, 2))
        draft = together.propose(proposer, text, jnp.int32(start), jnp.int32(known), jnp.int32(3), numbers)
        latents = predictor.lm.head(hidden, predictor.draw_noise(key, (3, 1)).latent)
        written = draft.text[start : start + K]
        previous = text[start - predictor.reach : start]
        return draft, written, numbers, predictor.token_log_probs(hidden, previous[None], latents, written[None])[:, 0]

    for seed in range(12):
        draft, written, numbers, log_probs = run(weights, jax.random.key(seed))
        of_chunk = np.exp(log_probs).prod(1).mean() / np.exp(log_probs)[:, :known].prod(1).mean()
        found = np.prod([draft.probs[place, written[known + place]] for place in range(K - known)])
        np.testing.assert_allclose(found, of_chunk, rtol=1e-4)
        np.testing.assert_allclose(draft.probs[: K - known].sum(-1), 1, rtol=1e-5)
        by_probs = draw_places(numbers[: K - known, None], draft.probs[: K - known])[:, 0]
        np.testing.assert_array_equal(written, np.append([5, 4][:known], by_probs))


def test_a_target_whose_state_is_a_recurrence_is_rewound():
    """A rejected draft leaves no trace: the text is that of the same model alone."""
    backbone = HybridConfig(dim=8, num_layers=2, pattern="G,C", num_heads=2, num_kv_heads=2, inner_dim=8)
    config = TokenLMConfig(vocab_size=V, backbone=backbone)
    graphdef, params = nnx.split(nnx.jit(lambda: config.build(rngs=nnx.Rngs(0)))())
    token_lm = nnx.merge(graphdef, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params))
    options = dict(special=SPECIAL, max_tokens=LENGTH)
    prompts, sampler = [[2, 3, 4], [], [5, 5]], SoftmaxSampler()
    recipe = Drafting(rule="match", num_latents=2)
    result = draft(token_lm, models("both")[1], prompts, keys(3), drafting=recipe, sampler=sampler, **options)
    plain = generate(token_lm, prompts, keys(3), sampler=sampler, decoding="drawn", **options)
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    assert 0 < result.work.accepted < result.work.proposed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target="calm"), "the model that checks must be a token model"),
        (dict(proposer="token"), "the model that drafts must be a next-vector model"),
        (dict(target="larger"), "a vocabulary of 7, the one that drafts of 6: both must be trained on one tokenizer"),
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[1, 6]]), "prompt 0: token id 6 is outside the vocabulary of 6"),
        (dict(prompts=[[2] * 5], context=8), "prompt 0 has 5 tokens and leaves room for 3 more in the context of 8"),
        (dict(max_tokens=0), "max_tokens must be at least 1"),
        (dict(prompts=[[2], [2]]), "1 keys for 2 prompts"),
        (dict(banned=[6]), "banned token id 6 is outside"),
        (dict(banned=[2, 3, 4, 5]), "4 of 6 ids leave nothing to write"),
    ],
)
def test_what_cannot_be_drafted_is_refused_in_one_line(change, message):
    target, proposer = models("none")
    larger = random_model(TokenLMConfig(vocab_size=V + 1, backbone=BACKBONE), seed=3)
    named = {"calm": proposer, "token": target, "larger": larger}
    pair = (named.get(change.pop("target", ""), target), named.get(change.pop("proposer", ""), proposer))
    options = dict(prompts=[[2]], special=SPECIAL, max_tokens=4) | change
    with pytest.raises(UsageError, match=message) as caught:
        draft(*pair, options.pop("prompts"), keys(1), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rule="greedy"), "rule must be accept or match"),
        (dict(boundaries="lost"), "boundaries must be kept or moved"),
        (dict(num_latents=0), "num_latents must be at least 1"),
    ],
)
def test_recipes_that_do_not_exist_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Drafting(**options)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_is_above_zero(temperature):
    with pytest.raises(UsageError, match="temperature must be a number above 0"):
        SoftmaxSampler(temperature=temperature)


def test_the_cost_counts_positions_read_for_nothing_and_states_kept_for_other_boundaries():
    """By hand: passes of K + 1 positions, chunks, latents, places, and the prompt at one phase or at K of them."""
    target, proposer = models("none")
    lm, codec, context = proposer.lm.config, proposer.autoencoder.config, 16
    recipe = Drafting(num_latents=3)
    work = Work(tokens=10, passes=6, proposed=9, accepted=4, chunks=5, plans=4, places=9)
    position, logits = target.config.flops(context), 2 * 8 * V
    chunk, latents = lm.flops(context // K, 0), lm.flops(context // K, 3) - lm.flops(context // K, 0)
    found = drafting_cost(target, proposer, work, recipe, prompt_tokens=4, context=context)
    assert found.target == (6 * (K + 1) * position + 4 * (position - logits)) / 10
    assert found.proposer == ((5 + 4 / K) * chunk + 4 * (latents + 3 * codec.decoder_flops())) / 10
    assert found.drafts == 9 * 3 * codec.vocabulary_flops() / K / 10
    assert found.total == found.target + found.proposer + found.drafts
    moved = drafting_cost(target, proposer, work, Drafting(num_latents=3, boundaries="moved"), prompt_tokens=4, context=context)
    assert np.isclose(moved.proposer - found.proposer, (K - 1) * (4 / K) * chunk / 10)
    assert token_model_cost(target, prompt_tokens=4, tokens=10, context=context) == position + 4 * (position - logits) / 10
