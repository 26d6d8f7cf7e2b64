"""Stage 1: teach an autoencoder to turn a chunk of K tokens into one vector and back.

    python examples/01_autoencoder.py --out runs/example --steps 300

The text is the English documentation inside Python, so nothing is downloaded. Takes about a minute on two cores.
"""

import argparse
import dataclasses
from pathlib import Path

import calm
from calm.runs import presets
from calm.runs.stages import train_autoencoder
from calm.text.prepare import prepare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/example"))
parser.add_argument("--source", default="pydoc", help="pydoc, or a file or folder of text")
parser.add_argument("--tokenizer", default="bpe:4096")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--dim", type=int, default=128, help="width of the autoencoder")
parser.add_argument("--num-tokens", type=int, default=1024, help="tokens in a row of a batch")
arguments = parser.parse_args()

# Text -> token shards on disk. Calling it again finds them done.
prepare(arguments.source, arguments.out / "data", arguments.tokenizer, quiet=True)

# A preset is a frozen dataclass; what should differ is replaced.
preset = presets.get("quickstart").autoencoder
run = dataclasses.replace(
    preset,
    data=str(arguments.out / "data"),
    model=dataclasses.replace(preset.model, dim=arguments.dim, inner_dim=5 * arguments.dim // 2),
    train=dataclasses.replace(preset.train, steps=arguments.steps, num_tokens=arguments.num_tokens),
)
result = train_autoencoder(run, arguments.out / "autoencoder")
print(f"held-out tokens right after a round trip: {100 * result['valid/token_accuracy']:.2f} %")

# Text -> latents -> text. One latent is one chunk of 4 tokens, the first one filled from the left.
model = calm.load(arguments.out / "autoencoder")
text = "Return a new list containing all items from the iterable in ascending order."
latents = model.encode(text)
print(f"{len(model.tokenizer.encode(text))} tokens -> latents {latents.shape} -> {model.decode(latents)!r}")

# The latent space is smooth: halfway between two chunks is still text.
a, b = model.encode("the list is empty")[-1], model.encode("the file is missing")[-1]
for share in (0.0, 0.25, 0.5, 0.75, 1.0):
    print(f"{share:4.2f}  {model.decode(((1 - share) * a + share * b)[None])!r}")
