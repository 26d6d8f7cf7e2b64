"""A published checkpoint through the public calls: imported, loaded, exported again, and what is refused on the way."""

import json
import math
import pickle
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import calm
import tiny
from calm.core.energy_head import EnergyHeadConfig
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.interop.official import load_autoencoder, load_latent_lm
from calm.runs import presets
from calm.runs.weights import flat_weights
from calm.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "published"
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|mask|>")


def write_tokenizer(path: Path, vocab_size: int) -> Path:
    """A tokenizer.json of words w3, w4, ... with Llama 3's names for the first ids."""
    words = dict(zip([*SPECIALS, *(f"w{i}" for i in range(3, vocab_size))], range(vocab_size), strict=True))
    added = [dict(id=i, content=word, special=True) for i, word in enumerate(SPECIALS)]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w3"}
    values = {"version": "1.0", "added_tokens": [item | flags for item in added], "model": model}
    path.write_text(json.dumps(values | {"pre_tokenizer": {"type": "WhitespaceSplit"}}))
    return path


def words_of(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module", params=["k4", "k2_gqa"])
def imported(request, tmp_path_factory):
    """(published folder, what the command said, the imported folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    vocab_size = json.loads((GOLDEN / request.param / "energy" / "config.json").read_text())["vocab_size"]
    tokenizer = write_tokenizer(folder / "words.json", vocab_size)
    command = ["import", "official", str(GOLDEN / request.param / "energy"), "--tokenizer", str(tokenizer)]
    return GOLDEN / request.param, tiny.run(*command, "--out", str(folder / "out")), folder / "out"


def test_the_published_numbers_hold_through_the_public_calls(imported):
    published, said, folder = imported
    theirs = dict(np.load(published / "reference.npz"))
    model = calm.load(folder)
    chunks = jnp.asarray(theirs["input_ids"].reshape(2, -1, model.chunk_size), jnp.int32)

    @jax.jit
    def run(chunks, noise):
        hidden, _ = model.lm.hidden(chunks[:, :-1])
        samples = model.lm.head(hidden.reshape(noise.shape[1], -1), noise)
        return model.autoencoder.encode(chunks), hidden, samples, model.autoencoder.decode(samples[:2])

    posterior, hidden, samples, tokens = run(chunks, jnp.asarray(theirs["lm_noise"]))
    ours = {"ae_mean": posterior.mean, "ae_log_std": posterior.log_std, "lm_hidden": hidden, "lm_predictions": samples}
    for name, value in ours.items():
        assert np.abs(np.asarray(value) - theirs[name]).max() <= 1e-5 * np.abs(theirs[name]).max(), name
    np.testing.assert_array_equal(np.asarray(tokens).reshape(theirs["sampled_tokens"].shape), theirs["sampled_tokens"])
    assert said["kind"] == "latent_lm" and said["training"] == {"alpha": 1.0, "num_samples": 8}
    assert json.loads((folder / "config.json").read_text())["training"] == said["training"]
    assert model.block_tokens == 512 * model.chunk_size

    text = words_of(np.where(theirs["input_ids"][0] < 3, 3, theirs["input_ids"][0]))
    means = model.encode(text)  # from text to latents, and on to a continuation
    chunks = jnp.asarray(model.tokenizer.encode(text).reshape(-1, model.chunk_size))
    again = load_autoencoder(published / "autoencoder").encode(chunks).mean
    np.testing.assert_allclose(means, again, atol=1e-5)
    assert model.generate(text, max_tokens=4)["tokens"][0] <= 4


def test_the_round_trip_is_exact(imported, tmp_path):
    published, _, folder = imported
    tiny.run("export", str(folder), "--out", str(tmp_path / "again"))
    for name in ("lm", "autoencoder"):
        first = {"lm": load_latent_lm, "autoencoder": load_autoencoder}[name](
            published / {"lm": "energy", "autoencoder": "autoencoder"}[name]
        )
        for place in (folder, tmp_path / "again"):
            loaded = getattr(calm.load(place), name)
            ours, theirs = flat_weights(loaded), flat_weights(first)
            assert loaded.config == first.config and ours.keys() == theirs.keys()
            assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)


def test_an_autoencoder_alone_is_imported(tmp_path):
    said = tiny.run("import", "official", str(GOLDEN / "k4" / "autoencoder"), "--out", str(tmp_path / "out"))
    assert said["kind"] == "autoencoder" and said["training"]["kl_clamp"] == 0.5 and said["tokenizer"] is None
    write_tokenizer(tmp_path / "out" / "tokenizer.json", 61)
    loaded = calm.load(tmp_path / "out")
    assert loaded.lm is None and loaded.autoencoder.config == load_autoencoder(GOLDEN / "k4" / "autoencoder").config


# -- flow and diffusion heads: the published layout, with the published formulas written out a second time ------------


def stepwise_folder(folder: Path, outputs: int) -> dict[str, np.ndarray]:
    """`k2_gqa` with a head that samples in steps; its weights, drawn anew."""
    weights = load_file(GOLDEN / "k2_gqa" / "energy" / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.startswith(("generative_head.", "mlp_generator."))}
    dim, latent, generator = 24, 10, np.random.default_rng(0)
    shapes = {"input_proj": (dim, latent), "cond_embed": (dim, dim), "time_embed.mlp.0": (dim, 256)}
    shapes |= {"time_embed.mlp.2": (dim, dim), "res_blocks.0.mlp.0": (dim, dim), "res_blocks.0.mlp.2": (dim, dim)}
    shapes |= {"res_blocks.0.adaLN_modulation.1": (3 * dim, dim), "final_layer.adaLN_modulation.1": (2 * dim, dim)}
    shapes |= {"final_layer.linear": (outputs, dim)}
    net = {}
    for name, shape in shapes.items():
        net[f"{name}.weight"] = (generator.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32)
        net[f"{name}.bias"] = 0.1 * generator.standard_normal(shape[0]).astype(np.float32)
    net["res_blocks.0.in_ln.weight"] = 1 + 0.1 * generator.standard_normal(dim).astype(np.float32)
    net["res_blocks.0.in_ln.bias"] = 0.1 * generator.standard_normal(dim).astype(np.float32)
    folder.mkdir()
    shutil.copy(GOLDEN / "k2_gqa" / "energy" / "config.json", folder)
    save_file(weights | {f"generative_head.net.{k}": v for k, v in net.items()}, folder / "model.safetensors")
    return {key: value.astype(np.float64) for key, value in net.items()}


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def published_net(net, x, time, hidden):
    """x `[R Z]` at a time in 0 .. 999 -> `[R O]`."""

    def linear(name, x):
        return x @ net[f"{name}.weight"].T + net[f"{name}.bias"]

    angles = time * np.exp(-math.log(10_000) * np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)])
    y = linear("time_embed.mlp.2", silu(linear("time_embed.mlp.0", waves))) + linear("cond_embed", hidden)
    x = linear("input_proj", x)
    shift, scale, gate = np.split(linear("res_blocks.0.adaLN_modulation.1", silu(y)), 3, -1)
    norm = layer_norm(x) * net["res_blocks.0.in_ln.weight"] + net["res_blocks.0.in_ln.bias"]
    inner = silu(linear("res_blocks.0.mlp.0", norm * (1 + scale) + shift))
    x = x + gate * linear("res_blocks.0.mlp.2", inner)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(y)), 2, -1)
    return linear("final_layer.linear", layer_norm(x) * (1 + scale) + shift)


def test_a_flow_model_samples_by_ten_midpoint_steps(tmp_path):
    net = stepwise_folder(tmp_path / "flow", 10)
    lm = load_latent_lm(tmp_path / "flow")
    assert lm.config.head == FlowHeadConfig(num_blocks=1, solver="midpoint", num_steps=10, num_draws=8)
    generator = np.random.default_rng(1)
    hidden, x = generator.standard_normal((5, 24)), generator.standard_normal((5, 10))
    ours = jax.jit(lambda h, x: lm.head(h, x))(np.float32(hidden), np.float32(x[None]))[0]
    for step in range(10):
        middle = x + 0.05 * published_net(net, x, 100 * step, hidden)
        x = x + 0.1 * published_net(net, middle, 100 * step + 50, hidden)
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-5 * np.abs(x).max())


def test_a_diffusion_model_samples_by_a_hundred_of_a_thousand_steps(tmp_path):
    net = stepwise_folder(tmp_path / "diffusion", 20)
    lm = load_latent_lm(tmp_path / "diffusion")
    assert lm.config.head == DiffusionHeadConfig(num_blocks=1, num_steps=100, num_draws=8, prediction="noise")

    def remaining(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = np.cumprod([1 - min(1 - remaining(t + 1) / remaining(t), 0.999) for t in range(1000)])
    times = [round(i * 999 / 99) for i in range(100)]
    kept = np.append(kept[times], 1.0)  # kept[-1] is that of no noise at all
    generator = np.random.default_rng(1)
    hidden, noise = generator.standard_normal((5, 24)), generator.standard_normal((5, 100, 10))
    ours = jax.jit(lambda h, x: lm.head(h, x))(np.float32(hidden), np.float32(noise.reshape(1, 5, -1)))[0]
    x = noise[:, 0]
    for place, index in enumerate(range(99, -1, -1)):
        now, before = kept[index], kept[index - 1]
        beta = 1 - now / before
        said, share = np.split(published_net(net, x, times[index], hidden), 2, -1)
        clean = x / np.sqrt(now) - np.sqrt(1 / now - 1) * said
        x = (beta * np.sqrt(before) * clean + (1 - before) * np.sqrt(1 - beta) * x) / (1 - now)
        if index:
            low = math.log(beta * (1 - before) / (1 - now))
            share = (share + 1) / 2
            x = x + np.exp((share * math.log(beta) + (1 - share) * low) / 2) * noise[:, place + 1]
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-4 * np.abs(x).max())  # a hundred steps in float32


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim", "inner", "millions"), [("m", 1024, 2752, 371), ("l", 1536, 4096, 735), ("xl", 2560, 6880, 1820)]
)
def test_published_sizes_without_allocating_them(name, dim, inner, millions):
    """CALM's table of models, without the autoencoder, and the shapes of some of their weights."""
    preset = presets.get(f"calm-{name}").lm.model
    sizes = dict(vocab_size=128_257, chunk_size=4, latent_dim=128)
    config = type(preset)(**{field: getattr(preset, field) for field in ("backbone", "head", "init_std")}, **sizes)
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    expected = {
        "stem.embedding": (128_257, dim),
        "stem.widen.kernel": (4 * dim, 2 * dim),
        "backbone.blocks.layer.attention.qkv.kernel": (16, dim, 3 * dim),
        "backbone.blocks.layer.mlp.gate_up.kernel": (16, dim, 2 * inner),
        "head.embed_noise.kernel": (64, dim),
        "head.blocks.layer.gate_up.kernel": (4, dim, 2 * dim),
        "head.out.kernel": (dim, 128),
    }
    assert {key: shapes[key] for key in expected} == expected
    assert config.parameters() == sum(map(math.prod, shapes.values())) == pytest.approx(millions * 1e6, rel=0.03)
    assert isinstance(config.head, EnergyHeadConfig)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(words: str, *command: str) -> None:
    code, result, err = tiny.calm("import", "official", *command)
    assert code == result["exit_code"] == 2 and words in err and err.count("\n") == 1, err


def test_code_in_a_bin_is_never_run(tmp_path):
    folder, mark = tmp_path / "evil", tmp_path / "mark"
    folder.mkdir()
    shutil.copy(GOLDEN / "k4" / "energy" / "config.json", folder)

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"weight": Evil()}, protocol=2))
    refused("pytorch_model.bin", str(folder), "--out", str(tmp_path / "out"))
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path):
    energy, out = str(GOLDEN / "k4" / "energy"), str(tmp_path / "out")
    refused("no such folder", str(tmp_path / "none"), "--out", out)
    refused("it holds the folders autoencoder, energy: name one of them", str(GOLDEN / "k4"), "--out", out)
    small = write_tokenizer(tmp_path / "big.json", 62)
    refused("has 62 ids, the model 61", energy, "--out", out, "--tokenizer", str(small))
    refused("--autoencoder is for a language model", str(GOLDEN / "k4" / "autoencoder"), "--autoencoder", energy, "--out", out)
    refused(
        "vocab_size is 61 in the language model and 53",
        energy,
        "--autoencoder",
        str(GOLDEN / "k2_gqa" / "autoencoder"),
        "--out",
        out,
    )
    assert not Path(out).exists()
    shutil.copytree(GOLDEN / "k4" / "energy", tmp_path / "cut")
    data = (tmp_path / "cut" / "pytorch_model.bin").read_bytes()
    (tmp_path / "cut" / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    refused("pytorch_model.bin", str(tmp_path / "cut"), "--out", out)
    Path(out).mkdir()
    (Path(out) / "config.json").write_text('{"model_type": "other"}')
    refused("belongs to another model", energy, "--out", out)
    assert [path.name for path in Path(out).iterdir()] == ["config.json"]


def test_an_autoencoder_elsewhere_is_found_by_its_path(tmp_path):
    shutil.copytree(GOLDEN / "k2_gqa", tmp_path / "k2", ignore=shutil.ignore_patterns("*.bin", "*.npz"))
    weights = load_file(tmp_path / "k2" / "energy" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("ae_model.")}, tmp_path / "k2" / "energy" / "model.safetensors"
    )
    tiny.run("import", "official", str(tmp_path / "k2" / "energy"), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "autoencoder" / "model.safetensors").is_file()
    (tmp_path / "k2" / "autoencoder").rename(tmp_path / "k2" / "elsewhere")
    refused("name it with --autoencoder", str(tmp_path / "k2" / "energy"), "--out", str(tmp_path / "other"))
    tiny.run(
        *("import", "official", str(tmp_path / "k2" / "energy"), "--out", str(tmp_path / "other")),
        *("--autoencoder", str(tmp_path / "k2" / "elsewhere")),
    )


def test_llama_3_names_are_begin_and_end_and_a_mask_is_appended(tmp_path):
    """With the Llama-3 file this gives the published vocabulary: 128,256 ids and one more."""
    path = write_tokenizer(tmp_path / "words.json", 20)
    values = json.loads(path.read_text())
    values["added_tokens"] = values["added_tokens"][:2]
    values["model"]["vocab"] = {word.replace("<|mask|>", "w2"): i for word, i in values["model"]["vocab"].items()}
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size) == (0, 1, 20, 21)
