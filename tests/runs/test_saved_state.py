"""A saved state continues as the text itself would, however often, and can be taken back; a wrong file is said in one line."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file
from test_generate import SPECIAL, K, V, with_numbers

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.generate import stream
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.hybrid.hopfield import HopfieldConfig
from calm.hybrid.state_space import SSMConfig
from calm.rng import row_keys
from calm.runs import saved_state
from calm.token.model import TokenLMConfig

SIZES = dict(dim=8, num_heads=2, num_kv_heads=1, inner_dim=12, ssm=SSMConfig(state_dim=4, num_heads=2))
PATTERNS = {
    "A": BackboneConfig(num_layers=2, **SIZES),
    "SHA": BackboneConfig(pattern="SHA", num_layers=2, hopfield=HopfieldConfig(memory="context", num_heads=2), **SIZES),
    "C,H": BackboneConfig(pattern="C,H", num_layers=2, hopfield=HopfieldConfig(num_heads=2, num_slots=4), **SIZES),
}
TEXT = np.arange(3, 22) % 30
NEW = 12


def token_model(pattern, seed=0):
    model = with_numbers(TokenLMConfig(vocab_size=V, backbone=PATTERNS[pattern]), "float32")
    if seed:
        model.head.norm.scale[...] += 0.01
    return model


def latent_model(pattern):
    codec = AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=4, dim=8, inner_dim=16)
    config = LatentLMConfig(
        vocab_size=V,
        chunk_size=K,
        latent_dim=4,
        backbone=PATTERNS[pattern],
        head=EnergyHeadConfig(num_blocks=1, noise_dim=4),
        context_decoder=ContextDecoderConfig(dim=8),
    )
    return NextVector(with_numbers(codec, "float32"), with_numbers(config, "float32"))


MAKE = {"token": token_model, "latent": latent_model}


def all_of(chunks):
    return np.concatenate(list(chunks), axis=1)


def options(model):
    return dict(special=SPECIAL, max_tokens=NEW, decoding=model.decoding)


def written(model, prompts, keys):
    return all_of(stream(model, prompts, keys, **options(model)))


def resumed(model, saved, keys):
    return all_of(saved_state.resume(model, saved, keys, **options(model)))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("token", "SHA"),
        ("latent", "C,H"),
        *(pytest.param(*case, marks=SLOW) for case in (("token", "A"), ("token", "C,H"), ("latent", "A"), ("latent", "SHA"))),
    ],
)
def test_a_saved_state_is_the_text(kind, pattern, tmp_path):
    """From a file, twice: as if it had read the text. Rewound: as if it had read less."""
    model, keys = MAKE[kind](pattern), row_keys(jax.random.key(3), 1)
    saved = saved_state.prefill(model, [TEXT], special=SPECIAL, room=24, rewindable=True)
    saved_state.save(tmp_path / "state", saved, model)
    loaded = saved_state.load(tmp_path / "state", model)
    expected = written(model, [TEXT], keys)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(resumed(model, loaded, keys), expected)
    np.testing.assert_array_equal(resumed(model, loaded, keys), expected)

    fewer = saved_state.rewind(model, loaded, 3, special=SPECIAL)
    cut = TEXT[: len(TEXT) - 3 * model.chunk_size]
    np.testing.assert_array_equal(resumed(model, fewer, keys), written(model, [cut], keys))


def test_branches_continue_as_copies_of_the_text():
    model, keys = token_model("SHA"), row_keys(jax.random.key(5), 3)
    saved = saved_state.prefill(model, [TEXT], special=SPECIAL, room=NEW)
    found = resumed(model, saved.fork(3), keys)
    np.testing.assert_array_equal(found, written(model, [TEXT] * 3, keys))
    assert len({row.tobytes() for row in found}) == 3


def test_the_state_of_convolutions_and_slots_does_not_grow_with_the_room():
    sizes = {}
    for pattern in ("A", "C,H"):
        model = token_model(pattern)
        sizes[pattern] = [saved_state.prefill(model, [TEXT], special=SPECIAL, room=room).nbytes for room in (16, 64)]
    assert sizes["C,H"][0] == sizes["C,H"][1] and sizes["A"][1] > 2 * sizes["A"][0]


@pytest.fixture(scope="module")
def written_file(tmp_path_factory):
    model, path = token_model("C,H"), tmp_path_factory.mktemp("states") / "state"
    saved_state.save(path, saved_state.prefill(model, [TEXT], special=SPECIAL, room=NEW - 1), model)
    return model, path


def test_wrong_files_are_said_in_one_line(written_file, tmp_path):
    model, path = written_file
    other = token_model("C,H")
    graphdef, weights = nnx.split(other)
    other = nnx.merge(graphdef, jax.tree.map(lambda x: x + 1e-3, weights))
    with pytest.raises(UsageError, match="was written by model .* read the text again"):
        saved_state.load(path, other)
    cut = tmp_path / "cut"
    for share in (0.02, 0.5, 0.99):
        cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(UsageError, match="damaged or cut short"):
            saved_state.load(cut, model)
    with safe_open(path, "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
    save_file({name: x for name, x in arrays.items() if name != "progress.chunk"}, cut, metadata=metadata)
    with pytest.raises(UsageError, match="chunk is missing or of another shape"):
        saved_state.load(cut, model)
    save_file(arrays, cut)
    with pytest.raises(UsageError, match="is no saved state"):
        saved_state.load(cut, model)
    with pytest.raises(UsageError, match="no such file"):
        saved_state.load(tmp_path / "none", model)
    with pytest.raises(UsageError, match="is not a folder"):
        saved_state.save(tmp_path / "none" / "state", saved_state.load(path, model), model)


def test_too_little_room_and_too_much_taken_back_are_said_in_one_line(written_file):
    model, path = written_file
    saved = saved_state.load(path, model)
    with pytest.raises(UsageError, match="room for 11 more tokens, and max_tokens=12"):
        resumed(model, saved, row_keys(jax.random.key(0), 1))
    with pytest.raises(UsageError, match="19 chunks of 19 that were read"):
        saved_state.rewind(model, saved, 19, special=SPECIAL)
    with pytest.raises(UsageError, match="rewindable"):
        saved_state.rewind(model, saved, 1, special=SPECIAL)
    with pytest.raises(UsageError, match="room must be at least 1"):
        saved_state.prefill(model, [TEXT], special=SPECIAL, room=0)
