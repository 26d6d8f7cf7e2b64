"""Generate text, and measure the model honestly: BrierLM with its interval, beside n-gram baselines on the same positions.

python examples/01_autoencoder.py --out runs/example
python examples/02_next_vector_lm.py --out runs/example
python examples/03_generate_and_score.py runs/example/lm
"""

import argparse

import calm
from calm.evaluate.scores import brier_table, compare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="the run folder of a language model")
parser.add_argument("--prompt", default="Return a new")
parser.add_argument("--max-tokens", type=int, default=48, help="tokens that are written")
parser.add_argument("--score-tokens", type=int, default=32 * 1024, help="tokens that are scored")
parser.add_argument("--candidates", type=int, default=200)
arguments = parser.parse_args()

model = calm.load(arguments.run, precision="auto")

# Temperature without likelihoods: at T = 1/n, chunks are chosen that were drawn n times among the candidates.
for temperature in ("1", "1/2"):
    result = model.generate(
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=temperature,
        candidates=arguments.candidates,
        seed=0,
    )
    print(f"T = {temperature:<4}{arguments.prompt}{result['texts'][0]!r}")

# The same prompts in one batch; each row gives what it gives alone. The empty prompt is unconditional.
batch = model.generate([arguments.prompt, "", "If the"], max_tokens=arguments.max_tokens, seed=1)
for text in batch["texts"]:
    print(repr(text))

# Every score carries its protocol, and models are compared on the same blocks.
scores = model.evaluate(split="valid", max_tokens=arguments.score_tokens, seed=0)
print(scores["autoencoder"].table())
print(brier_table([scores["lm"], scores["bigram"], scores["unigram"]]))
print(compare(scores["lm"], scores["bigram"]).table())
