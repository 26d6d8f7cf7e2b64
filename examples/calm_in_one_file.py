"""CALM in one file of plain JAX: the paper at a glance, to be read from top to bottom.

    python examples/calm_in_one_file.py

Trains both stages on Python's own documentation in under two minutes on two cores; prints the losses, BrierLM beside that of a
unigram model, and a sample. It does not import the package; tests/test_calm_in_one_file.py checks that both compute the same.
Source: Continuous Autoregressive Language Models (Shao et al. 2025, arXiv:2510.27688); its sections and equations in brackets.

    B batch    N chunks in a sequence (paper: L)    K tokens in a chunk    Z latent width (paper: l)    D model width (paper: d)
    V vocabulary    S samples of the model (paper: N)    M draws of the target    E noise width    I inner width of an MLP
    H query heads    G key-value heads    C head width    R rows: all leading axes as one    *b any leading axes

    part                                      paper                 the same in src/calm/core
    1 layers                                  [7.1]                 mlp.py attention.py rotary.py
    2 autoencoder and its loss                [2, Eq. 1-4]          autoencoder.py gaussian.py clipped_kl.py
    3 stem, transformer, energy head, loss    [3, Eq. 5-7, 9, 10]   stem.py transformer.py energy_head.py energy_score.py
    4 BrierLM                                 [4.2, Eq. 12-15]      brier_lm.py
    5 temperature 1/n, generation             [5.3, Algorithm 2]    temperature.py counts.py generate.py
      the losses of 2 and 3                   [Eq. 2, 10]           objective.py
"""

import argparse
import dataclasses
import re
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of both models, for a minute on a CPU. The paper: Z=128, D=512 in the autoencoder; CALM-M D=1024, 16 layers."""

    vocab_size: int = 128  # V
    chunk_size: int = 4  # K
    latent_dim: int = 32  # Z
    autoencoder_dim: int = 128  # D of the autoencoder
    autoencoder_inner_dim: int = 320
    context: int = 64  # N
    dim: int = 128  # D
    inner_dim: int = 344  # I
    num_layers: int = 2
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # G
    num_head_blocks: int = 1  # of the energy head; the paper has one for every four layers
    noise_dim: int = 32  # E
    num_samples: int = 8  # S
    num_draws: int = 16  # M; the paper has 100


# ---- 1. Layers: parameters are dictionaries, a layer is a function of them -------------------------------------------------


def init_linear(keys, in_dim, out_dim, bias=True, std=None):
    kernel = jax.random.normal(next(keys), (in_dim, out_dim)) * (in_dim**-0.5 if std is None else std)
    return {"kernel": kernel, "bias": jnp.zeros(out_dim)} if bias else {"kernel": kernel}


def init_norm(dim, bias=False):
    return {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)} if bias else {"scale": jnp.ones(dim)}


def init_swiglu(keys, dim, inner_dim, bias=False):
    return {"gate_up": init_linear(keys, dim, 2 * inner_dim, bias), "down": init_linear(keys, inner_dim, dim, bias)}


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def rms_norm(p, x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def layer_norm(p, x):
    return rms_norm(p, x - x.mean(-1, keepdims=True)) + p["bias"]


def swiglu(p, x):
    gate, up = jnp.split(linear(p["gate_up"], x), 2, axis=-1)
    return linear(p["down"], jax.nn.silu(gate) * up)


def rotate(x, theta=10_000.0):
    """Rotary positions for `x [B N H C]`, half-rotation layout: the pair (x_i, x_{i + C/2}) turns by n * theta^(-2i/C)."""
    angles = jnp.arange(x.shape[1])[:, None, None] * theta ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])  # [N 1 C/2]
    (cos, sin), (first, second) = (jnp.cos(angles), jnp.sin(angles)), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(p, x, c: Config):
    """Causal attention over `x [B N D]`; each of the G key-value heads serves H / G query heads."""
    batch, length, dim = x.shape
    heads = linear(p["qkv"], x).reshape(batch, length, -1, dim // c.num_heads)
    queries, keys, values = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
    queries = rotate(queries).reshape(batch, length, c.num_kv_heads, -1, dim // c.num_heads)  # [B N G H/G C]
    scores = jnp.einsum("bnghc,bmgc->bghnm", queries, rotate(keys)) * heads.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf), axis=-1)
    return linear(p["out"], jnp.einsum("bghnm,bmgc->bnghc", weights, values).reshape(batch, length, dim))


# ---- 2. The autoencoder: a chunk of K tokens <-> one latent of width Z [2.1, 2.2] ------------------------------------------


def init_autoencoder(key, c: Config):
    dim, inner, keys = c.autoencoder_dim, c.autoencoder_inner_dim, iter(jax.random.split(key, 99))
    encoder = {
        "token_layer": {"norm": init_norm(dim), "mlp": init_swiglu(keys, dim, inner)},
        "squeeze": init_linear(keys, c.chunk_size * dim, dim),
        "chunk_layer": {"norm": init_norm(dim), "mlp": init_swiglu(keys, dim, inner)},
        "norm": init_norm(dim),
        "to_latent": init_linear(keys, dim, 2 * c.latent_dim),
    }
    decoder = {
        "from_latent": init_linear(keys, c.latent_dim, dim),
        "chunk_layer": {"norm": init_norm(dim), "mlp": init_swiglu(keys, dim, inner)},
        "expand": init_linear(keys, dim, c.chunk_size * dim),
        "token_layer": {"norm": init_norm(dim), "mlp": init_swiglu(keys, dim, inner)},
        "norm": init_norm(dim),
    }
    return {"embedding": 0.1 * jax.random.normal(next(keys), (c.vocab_size, dim)), "encoder": encoder, "decoder": decoder}


def residual_swiglu(p, x):
    return x + swiglu(p["mlp"], rms_norm(p["norm"], x))


def encode(p, chunks):
    """Mean and log standard deviation of the Gaussian posterior, `[*b K] -> [*b Z], [*b Z]`. Every chunk is coded alone."""
    e = p["encoder"]
    x = residual_swiglu(e["token_layer"], p["embedding"][chunks])  # [*b K D]
    x = residual_swiglu(e["chunk_layer"], linear(e["squeeze"], x.reshape(*x.shape[:-2], -1)))  # [*b D]
    return jnp.split(linear(e["to_latent"], rms_norm(e["norm"], x)), 2, axis=-1)


def decode(p, latents):
    """Logits, `[*b Z] -> [*b K V]`: the encoder's mirror, with the embedding table as its output matrix."""
    d = p["decoder"]
    x = linear(d["expand"], residual_swiglu(d["chunk_layer"], linear(d["from_latent"], latents)))
    x = residual_swiglu(d["token_layer"], x.reshape(*x.shape[:-1], -1, p["embedding"].shape[1]))  # [*b K D]
    return rms_norm(d["norm"], x) @ p["embedding"].T


def clipped_kl(mean, log_std, clamp=0.5):
    """sum_z max(clamp, KL_z) to N(0, 1) in nats [Eq. 3, 4]: without the clamp most dimensions collapse onto the prior."""
    return jnp.maximum(0.5 * (mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std), clamp).sum(-1)


def autoencoder_loss(p, chunks, masked, noise, kept, mask_id, kl_weight=1e-3):
    """Mean over `chunks [R K]` of cross-entropy, summed over the K tokens [Eq. 1], plus the weighted clipped KL [Eq. 2].

    Three draws make the latents robust [2.2]: which tokens are `masked [R K]`, the posterior's `noise [R Z]`, and dimensions of
    the latent: `kept [R Z]` is 0 where one is dropped, 1 / (1 - rate) elsewhere.
    """
    mean, log_std = encode(p, jnp.where(masked, mask_id, chunks))
    logits = decode(p, (mean + jnp.exp(log_std) * noise) * kept)  # [R K V]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, chunks)
    return (nats.sum(-1) + kl_weight * clipped_kl(mean, log_std)).mean()


# ---- 3. The language model: chunks -> hidden states -> samples of the next latent [3] --------------------------------------


def init_language_model(key, c: Config):
    dim, keys = c.dim, iter(jax.random.split(key, 999))
    stem = {
        "embedding": dim**-0.5 * jax.random.normal(next(keys), (c.vocab_size, dim)),
        "widen": init_linear(keys, c.chunk_size * dim, 2 * dim),
        "narrow": init_linear(keys, 2 * dim, dim),
        "norm": init_norm(dim, bias=True),
    }

    def layer():
        qkv = init_linear(keys, dim, dim + 2 * c.num_kv_heads * dim // c.num_heads, bias=False)
        mixer, mlp = {"qkv": qkv, "out": init_linear(keys, dim, dim, bias=False)}, init_swiglu(keys, dim, c.inner_dim)
        return {"norm_attention": init_norm(dim), "attention": mixer, "norm_mlp": init_norm(dim), "mlp": mlp}

    def block():  # of the head
        return {
            "norm": init_norm(dim, bias=True),
            "from_sample": init_linear(keys, dim, dim, bias=False, std=(2 * dim) ** -0.5),
            "from_hidden": init_linear(keys, dim, dim, std=(2 * dim) ** -0.5),
            "inner": init_linear(keys, dim, dim),
            **init_swiglu(keys, dim, dim, bias=True),
        }

    head = {
        "embed_hidden": init_linear(keys, dim, dim),
        "norm_hidden": init_norm(dim, bias=True),
        "embed_noise": init_linear(keys, c.noise_dim, dim),
        "norm_noise": init_norm(dim, bias=True),
        "blocks": [block() for _ in range(c.num_head_blocks)],
        "norm_out": init_norm(dim, bias=True),
        "inner_out": init_linear(keys, dim, dim),
        "out": init_linear(keys, dim, c.latent_dim, std=0.0),
    }
    return {"stem": stem, "layers": [layer() for _ in range(c.num_layers)], "norm": init_norm(dim), "head": head}


def compress(p, chunks):
    """Stem: the embeddings of a chunk's K tokens to one vector, `[B N K] -> [B N D]` [3.3.3]."""
    x = linear(p["widen"], p["embedding"][chunks].reshape(*chunks.shape[:-1], -1))
    return layer_norm(p["norm"], linear(p["narrow"], jax.nn.silu(x)))


def hidden_states(p, chunks, c: Config):
    """`[B N K] -> [B N D]` [Eq. 7]. Position i has read the chunks 0 .. i and predicts chunk i + 1."""
    x = compress(p["stem"], chunks)
    for layer in p["layers"]:
        x = x + attention(layer["attention"], rms_norm(layer["norm_attention"], x), c)
        x = x + swiglu(layer["mlp"], rms_norm(layer["norm_mlp"], x))
    return rms_norm(p["norm"], x)


def draw_noise(key, shape, c: Config):
    return jax.random.uniform(key, (*shape, c.noise_dim), minval=-0.5, maxval=0.5)  # [*shape E]


def energy_head(p, hidden, noise):
    """Samples of the next latent, `[*b D], [S *b E] -> [S *b Z]` [3.3.3]: one pass for each vector of noise, no iterations."""
    hidden = layer_norm(p["norm_hidden"], linear(p["embed_hidden"], hidden))
    x = layer_norm(p["norm_noise"], linear(p["embed_noise"], noise))  # [S *b D]
    for block in p["blocks"]:
        fused = linear(block["from_sample"], layer_norm(block["norm"], x)) + linear(block["from_hidden"], hidden)
        x = x + swiglu(block, jax.nn.silu(linear(block["inner"], jax.nn.silu(fused))))
    return linear(p["out"], jax.nn.silu(linear(p["inner_out"], layer_norm(p["norm_out"], x))))


def energy_loss(samples, targets):
    """2 E|x - y| - E|x - x'| at every position, of `samples [S *b Z]` and `targets [M *b Z]` [Eq. 10]. Lower is better.

    Least where samples are distributed as the targets are [Eq. 9]: the first term pulls them there, the second apart.
    """

    def distances(a, b):  # of all pairs; a plain root would have an infinite slope where x meets itself
        return optax.safe_norm(a[:, None] - b[None], 1e-6, axis=-1)

    count = len(samples)
    diversity = distances(samples, samples).sum((0, 1)) / (count * (count - 1))
    return 2 * distances(samples, targets).mean((0, 1)) - diversity


def language_model_loss(p, autoencoder, chunks, head_noise, target_noise, c: Config):
    """Mean energy loss over `chunks [B N+1 K]`: position i against the frozen encoder's posterior of chunk i + 1 [3.3.2].

    `head_noise [S B N E]` makes the samples, `target_noise [M B N Z]`, standard normal, the draws of the posterior.
    """
    mean, log_std = encode(autoencoder, chunks[:, 1:])
    samples = energy_head(p["head"], hidden_states(p, chunks[:, :-1], c), head_noise)
    return energy_loss(samples, mean + jnp.exp(log_std) * target_noise).mean()


# ---- 4. BrierLM: a proper score from samples alone [4.2] -------------------------------------------------------------------


def brier(samples, targets):
    """Brier-1..4 at every position, `[S *b K], [*b K] -> [*b 4]`; Brier-n takes the first n tokens as one outcome.

    Unbiased: (2/S) sum_s 1{x_s = y} - 1/(S(S-1)) sum_{s != t} 1{x_s = x_t}, of which Eq. 14 is S = 2. Higher is better.
    """
    count, scores = len(samples), []
    for n in range(1, 5):
        x, y = samples[..., :n], targets[..., :n]
        hits = (x == y).all(-1).sum(0)
        pairs = (x[:, None] == x[None]).all(-1).sum((0, 1)) - count  # every sample equals itself
        scores.append(2 * hits / count - pairs / (count * (count - 1)))
    return jnp.stack(scores, axis=-1)


def brier_lm(means):
    """100 (prod_n Brier-n)^(1/4) of the four means [Eq. 15], each floored at 0, lest two negative ones make a good score."""
    return float(100 * np.prod(np.maximum(np.asarray(means), 0)) ** 0.25)


def unigram_brier(counts, targets):
    """Brier-1..4 of tokens drawn independently by their frequency, in closed form: 2 P(y) - sum P^2 [Eq. 12]."""
    p = counts / counts.sum()
    return 2 * np.cumprod(p[targets[..., :4]], axis=-1) - np.sum(p**2) ** np.arange(1, 5)


# ---- 5. Temperature without likelihoods [5.3], and the loop through tokens [3.3.3] -----------------------------------------


def draw_chunks(p, autoencoder, hidden, noise):
    """Samples of the next chunk, `[*b D], [S *b E] -> [S *b K]`: noise to latents to their most probable tokens."""
    return decode(autoencoder, energy_head(p["head"], hidden, noise)).argmax(-1)


def temperature_weights(candidates, n):
    """Weights of `candidates [S K]` at temperature 1/n, `[S]`, each chunk's where it comes first [Algorithm 2].

    A chunk that was drawn c times can be picked n times in C(c, n) ways, whose share tends to P(chunk)^n / Z. Where no chunk
    was drawn n times, the next smaller number stands in.
    """
    equal = (candidates[:, None] == candidates[None]).all(-1)
    counts = jnp.where(jnp.tril(equal, -1).any(-1), 0, equal.sum(-1))
    weights = jnp.zeros(counts.shape)
    for m in range(1, n + 1):
        ways = jnp.prod(jnp.stack([(counts - i) / (m - i) for i in range(m)]), axis=0)  # C(c, m): 0 if c < m
        weights = jnp.where((ways > 0).any(), ways, weights)
    return weights


def generate(p, autoencoder, prompt, num_chunks, key, c: Config, n=2, num_candidates=200):
    """Continues `prompt [N K]` at temperature 1/n. What the model reads next are the chosen tokens, never a latent."""

    @jax.jit
    def next_chunk(window, last, key):
        draw, choice = jax.random.split(key)
        hidden = hidden_states(p, window[None], c)[0, last]  # causal: the padding after `last` is not seen
        candidates = draw_chunks(p, autoencoder, hidden, draw_noise(draw, (num_candidates,), c))
        return candidates[jax.random.categorical(choice, jnp.log(temperature_weights(candidates, n)))]

    chunks = list(prompt)
    for step in range(num_chunks):
        seen = np.stack(chunks[-c.context :])
        window = np.pad(seen, ((0, c.context - len(seen)), (0, 0)))
        chunks.append(np.asarray(next_chunk(window, len(seen) - 1, jax.random.fold_in(key, step))))
    return np.stack(chunks)


# ---- Training both stages, and what comes out ------------------------------------------------------------------------------


def train(name, loss, params, tokens, rows, length, steps, learning_rate, key):
    """AdamW on `loss(params, batch, key)`; a batch is `rows` stretches of `length` tokens that begin anywhere."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps, 0.03 * learning_rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.01))

    @jax.jit
    def update(params, state, batch, key):
        value, gradient = jax.value_and_grad(loss)(params, batch, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, generator, start, values = optimizer.init(params), np.random.default_rng(0), time.perf_counter(), []
    for step in range(1, steps + 1):
        batch = tokens[generator.integers(0, len(tokens) - length + 1, (rows, 1)) + np.arange(length)]
        params, state, value = update(params, state, batch, jax.random.fold_in(key, step))
        values.append(value)
        if step % max(1, steps // 5) == 0 or step == steps:
            print(f"{name} step {step:4}  loss {np.mean(values):7.3f}  {time.perf_counter() - start:5.1f} s", flush=True)
            values = []
    return params


def main(c: Config, text: str, autoencoder_steps: int, lm_steps: int) -> dict[str, float]:
    """Trains both stages on the first nine tenths of `text` and scores the rest; returns round trip and scores."""
    letters = np.unique(list(text))
    mask_id, c = len(letters), dataclasses.replace(c, vocab_size=len(letters) + 1)
    tokens = np.searchsorted(letters, list(text)).astype(np.int32)
    length, split = (c.context + 1) * c.chunk_size, len(tokens) * 9 // 10
    keys = jax.random.split(jax.random.key(0), 6)

    def stage_1(p, chunks, key):
        mask, noise, keep = jax.random.split(key, 3)
        masked = jax.random.bernoulli(mask, 0.15, chunks.shape)
        noise = jax.random.normal(noise, (len(chunks), c.latent_dim))
        return autoencoder_loss(p, chunks, masked, noise, jax.random.bernoulli(keep, 0.85, noise.shape) / 0.85, mask_id)

    def stage_2(p, tokens, key):
        chunks, (head, target) = tokens.reshape(len(tokens), -1, c.chunk_size), jax.random.split(key)
        head_noise = draw_noise(head, (c.num_samples, len(chunks), c.context), c)
        target_noise = jax.random.normal(target, (c.num_draws, len(chunks), c.context, c.latent_dim))
        return language_model_loss(p, autoencoder, chunks, head_noise, target_noise, c)

    autoencoder, lm, text = init_autoencoder(keys[0], c), init_language_model(keys[1], c), tokens[:split]
    autoencoder = train("autoencoder", stage_1, autoencoder, text, 512, c.chunk_size, autoencoder_steps, 4e-3, keys[2])
    lm = train("language model", stage_2, lm, text, 8, length, lm_steps, 2e-3, keys[3])

    @jax.jit
    def score(chunks, key):
        noise = draw_noise(key, (c.num_samples, 1, c.context), c)
        return brier(draw_chunks(lm, autoencoder, hidden_states(lm, chunks[:, :-1], c), noise), chunks[:, 1:])

    held_out = tokens[split : len(tokens) - (len(tokens) - split) % length].reshape(-1, c.context + 1, c.chunk_size)
    rebuilt = decode(autoencoder, encode(autoencoder, held_out)[0]).argmax(-1)
    calm = np.mean([score(row[None], jax.random.fold_in(keys[4], i)) for i, row in enumerate(held_out)], axis=(0, 1, 2))
    unigram = unigram_brier(np.bincount(tokens[:split], minlength=c.vocab_size), held_out[:, 1:]).mean((0, 1))
    print(f"held-out tokens right after a round trip: {100 * (rebuilt == held_out).mean():.2f} %")
    for name, means in (("unigram", unigram), ("CALM", calm)):
        print(f"{name:8} BrierLM {brier_lm(means):6.3f}   Brier-1..4", *(f"{100 * mean:7.3f}" for mean in means))
    written = np.append(letters, "?")[generate(lm, autoencoder, held_out[0, :16], 60, keys[5], c)]
    print(repr("".join(written[:16].flat)), "->", repr("".join(written[16:].flat)))
    return {"round_trip": float((rebuilt == held_out).mean()), "unigram": brier_lm(unigram), "calm": brier_lm(calm)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder-steps", type=int, default=200)
    parser.add_argument("--lm-steps", type=int, default=800)
    parser.add_argument("--characters", type=int, default=500_000, help="how much text, at most")
    options = parser.parse_args()
    # Each paragraph once, since topics repeat each other; on one line and without tables, since layout is too easy to predict.
    paragraphs = dict.fromkeys(" ".join(text.split()) for topic in topics.values() for text in topic.split("\n\n"))
    prose = "\n".join(text for text in paragraphs if not re.search("[-=*+]{3}", text))
    main(Config(), prose[: options.characters], options.autoencoder_steps, options.lm_steps)
