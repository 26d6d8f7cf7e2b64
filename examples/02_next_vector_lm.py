"""Stage 2: a language model that predicts the next vector instead of the next token.

    python examples/01_autoencoder.py --out runs/example
    python examples/02_next_vector_lm.py --out runs/example --steps 400

Trains on the latents of the autoencoder of the first example, then looks at what the model predicts.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import calm
from calm.runs import presets
from calm.runs.stages import train_lm
from calm.text.shards import open_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/example"))
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--dim", type=int, default=256, help="width of the backbone")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--num-tokens", type=int, default=1024, help="tokens in a row of a batch")
arguments = parser.parse_args()

preset = presets.get("quickstart-pure").lm
backbone = dataclasses.replace(
    preset.model.backbone, dim=arguments.dim, inner_dim=8 * arguments.dim // 3, num_layers=arguments.layers
)
run = dataclasses.replace(
    preset,
    data=str(arguments.out / "data"),
    autoencoder=str(arguments.out / "autoencoder"),
    model=dataclasses.replace(preset.model, backbone=backbone),
    train=dataclasses.replace(preset.train, steps=arguments.steps, num_tokens=arguments.num_tokens, sample_every=0),
)
result = train_lm(run, arguments.out / "lm")
print(f"energy loss {result['valid/energy_loss']:.3f}, BrierLM {result.get('valid/brier_lm', float('nan')):.3f}")

# Under the hood: chunks -> hidden states -> S samples of the next latent -> tokens.
model = calm.load(arguments.out / "lm")
lm, autoencoder = model.lm, model.autoencoder
tokens = open_data(arguments.out / "data").split("valid").read(0, 64)
chunks = jnp.asarray(tokens.reshape(1, -1, model.chunk_size))  # [B N K]
hidden, _ = lm.hidden(chunks)  # [B N D]: position i has read chunks 0..i
samples = lm.sample(jax.random.key(0), hidden, 4)  # [S B N Z]
guesses = np.asarray(autoencoder.decode(samples))  # [S B N K]
for position in (3, 7, 11):
    said = [model.tokenizer.decode(guess) for guess in guesses[:, 0, position]]
    print(f"after {model.tokenizer.decode(tokens[: 4 * position + 4])[-40:]!r} comes one of {said}")
