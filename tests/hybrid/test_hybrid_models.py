"""Models on hybrid backbones write and are scored as any other, with their states padded, taken apart and forked on the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.generate import SpecialIds, generate
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.evaluate.brier import evaluate_predictor
from calm.hybrid.state_space import SSMConfig
from calm.rng import row_keys
from calm.token.model import TokenLMConfig

V, K = 9, 2
SPECIAL = SpecialIds(begin_id=6, end_id=7, mask_id=8)
SSM = SSMConfig(state_dim=2, num_heads=2)
BACKBONE = BackboneConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=8, pattern="SA", ssm=SSM)
REASONER = dataclasses.replace(BACKBONE, num_segments=2)


@pytest.fixture(autouse=True)
def layers_are_a_loop(monkeypatch):
    monkeypatch.setattr("calm.core.stack.MAX_UNROLLED", 1)


def numbers(config, silent=False):
    """A model with random weights; a weight has the same number whether a reasoner stands around it or not."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))

    def draw(path, x):
        names = [str(getattr(entry, "key", "")) for entry in path if getattr(entry, "key", "") != "stack"]
        if silent and "controller" in names:
            return jnp.zeros(x.shape)
        noise = np.random.default_rng(list("".join(names).encode())).standard_normal(x.shape, np.float32)
        return jnp.asarray(noise * x.shape[-2] ** -0.5 if "kernel" in names and "conv" not in names else noise)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, weights))


def predictor(kind, backbone, silent=False):
    if kind == "tokens":
        return numbers(TokenLMConfig(vocab_size=V, backbone=backbone), silent)
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=4)
    codec = numbers(AutoencoderConfig(**sizes, dim=8, inner_dim=8))
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4)
    return NextVector(codec, numbers(LatentLMConfig(**sizes, backbone=backbone, head=head), silent))


@pytest.mark.parametrize("kind", ["latents", pytest.param("tokens", marks=pytest.mark.slow)])
def test_a_silent_reasoner_writes_and_scores_as_the_stack_it_runs_twice(kind):
    blocks = np.random.default_rng(0).integers(0, 6, (2, 12))
    prompts, keys = [[1, 2, 3, 4, 5], [3]], row_keys(jax.random.key(3), 2)
    written, scores = [], []
    for backbone, silent in ((BACKBONE, False), (REASONER, True), (REASONER, False)):
        model = predictor(kind, backbone, silent)
        written.append(generate(model, prompts, keys, special=SPECIAL, max_tokens=8, banned=[SPECIAL.end_id]).tokens)
        report = evaluate_predictor(model, blocks, np.arange(2), jax.random.key(1), decoding="drawn", with_energy=False)
        scores.append(report.scores.total)
    np.testing.assert_array_equal(written[0], written[1])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert np.abs(scores[0] - scores[2]).max() > 1e-3  # a reasoner that speaks is another model


def test_a_row_is_written_as_alone():
    """Prompts of unlike length are padded on the left."""
    model, prompts, keys = predictor("tokens", REASONER), [[1, 2, 3, 4, 5], [3]], row_keys(jax.random.key(3), 2)
    options = dict(special=SPECIAL, max_tokens=8, banned=[SPECIAL.end_id])
    together = generate(model, prompts, keys, **options).tokens
    np.testing.assert_array_equal(together[1], generate(model, prompts[1:], keys[1:], **options).tokens[0])
