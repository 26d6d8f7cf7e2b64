"""Rotary positions, attention and SwiGLU against their definitions, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.attention import CausalAttention, Window
from calm.core.mlp import ResidualSwiGLU, SwiGLU
from calm.core.rotary import rotate
from random_models import Layer, normal, random_model

DIM, HEADS, KV_HEADS, WIDTH = 24, 4, 2, 6


def window(batch: int) -> Window:
    return Window(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))


def test_rotary_turns_pairs_as_complex_numbers():
    x, theta = normal(1, 7, 2, 8), 100.0
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    angles = np.arange(7)[:, None] * theta ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angles)[:, None, :]
    rotated = np.asarray(jax.jit(rotate, static_argnums=2)(x, np.arange(7)[None], theta))
    np.testing.assert_allclose(rotated[..., :4] + 1j * rotated[..., 4:], turned, atol=1e-5)


def test_rotary_products_depend_on_distances_only():
    query, key = normal(2, 1, 5, 1, 8)
    turn = jax.jit(rotate)

    def scores(shift: int) -> np.ndarray:
        positions = np.arange(5)[None] + shift
        return np.einsum("bihc,bjhc->bij", turn(query, positions), turn(key, positions))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-4)
    assert np.abs(scores(0) - np.einsum("bihc,bjhc->bij", query, key)).max() > 0.1


def attention(num_kv_heads: int = KV_HEADS) -> CausalAttention:
    return random_model(Layer(lambda rngs: CausalAttention(DIM, HEADS, num_kv_heads, precision="float32", rngs=rngs)))


@jax.jit
def attend(layer: CausalAttention, hidden: jax.Array) -> jax.Array:
    return layer(hidden, None, window(hidden.shape[0]))[0]


def test_attention_is_its_definition():
    layer, length = attention(), 5
    hidden = normal(2, length, DIM)
    heads = np.asarray(hidden[0] @ np.asarray(layer.qkv.kernel[...])).reshape(length, -1, WIDTH)
    turned = np.asarray(jax.jit(rotate)(heads[None, :, : HEADS + KV_HEADS], np.arange(length)[None]))[0]
    expected = np.zeros((length, HEADS, WIDTH))
    for i in range(length):
        for head in range(HEADS):
            shared = HEADS + head // (HEADS // KV_HEADS)  # neighbouring query heads share a key-value head
            scores = turned[: i + 1, shared] @ turned[i, head] / np.sqrt(WIDTH)
            weights = np.exp(scores - scores.max())
            expected[i, head] = weights / weights.sum() @ heads[: i + 1, shared + KV_HEADS]
    expected = expected.reshape(length, -1) @ np.asarray(layer.out.kernel[...])
    np.testing.assert_allclose(attend(layer, hidden)[0], expected, atol=1e-5)


def test_grouped_queries_equal_repeated_key_value_heads():
    grouped, full = attention(), attention(HEADS)
    query, key, value = np.split(np.asarray(grouped.qkv.kernel[...]), [DIM, DIM + KV_HEADS * WIDTH], axis=1)
    key, value = (x.reshape(DIM, KV_HEADS, WIDTH).repeat(HEADS // KV_HEADS, axis=1).reshape(DIM, -1) for x in (key, value))
    full.qkv.kernel[...] = jnp.asarray(np.concatenate([query, key, value], axis=1))
    full.out.kernel[...] = grouped.out.kernel[...]
    hidden = normal(2, 5, DIM)
    np.testing.assert_allclose(attend(grouped, hidden), attend(full, hidden), atol=1e-5)


def test_a_query_sees_its_row_from_the_start_up_to_itself():
    mask = Window(jnp.int32(2), jnp.asarray([0, 3], jnp.int32)).mask(2, 5)
    np.testing.assert_array_equal(mask[0, 0], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(mask[1, 0], [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])


@pytest.mark.parametrize("residual", [False, True])
def test_swiglu_is_its_definition(residual):
    kind = ResidualSwiGLU if residual else SwiGLU
    layer = random_model(Layer(lambda rngs: kind(8, 12, precision="float32", rngs=rngs)))
    mlp = layer.mlp if residual else layer
    x = normal(3, 8).astype(np.float64)
    scale = np.asarray(layer.norm.scale[...]) / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) if residual else 1
    inner = x * scale
    gate, up = np.split(inner @ np.asarray(mlp.gate_up.kernel[...]), 2, axis=-1)
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(mlp.down.kernel[...]) + (x if residual else 0)
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x.astype(np.float32)), expected, rtol=1e-4, atol=1e-5)
