"""What each part of the autoencoder's loss does: one cell without, or with more of, each.

The base is the autoencoder of the preset `wikitext2-tiny` with fewer steps; every cell changes one thing. Scored are the round
trip, what it bears (noise of .3 in latent units and of .3 aggregate standard deviations), and what the latents look like
(`calm inspect autoencoder`). How well a language model predicts such latents is another question, which costs a language model
for every cell.

CALM (arXiv:2510.27688) reports that without the KL clamp 71 of 128 dimensions collapse, and that both dropouts make latents
robust.

    python -m calm.studies.autoencoder_ablation DATA OUT
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm.evaluate.tables import table
from calm.runs import bundle, presets
from calm.runs import measure as examine
from calm.runs.stages import AutoencoderRun
from calm.studies.runner import Cell, run_cells
from calm.text.atomic_write import write_whole
from calm.text.shards import open_data

COLUMNS = {
    "tokens right": ("tokens_right", "{:.3%}"),
    "at .3 latent units": ("tokens_right_noise", "{:.2%}"),
    "at .3 aggregate std": ("tokens_right_noise_aggregate", "{:.2%}"),
    "KL": ("kl", "{:.0f}"),
    "sigma": ("posterior_std", "{:.2f}"),
    "aggregate std": ("aggregate_std", "{:.2f}"),
    "collapsed": ("collapsed", "{:.0f}"),
    "effective rank": ("effective_rank", "{:.1f}"),
    "one token / chunk": ("smoothness", "{:.2f}"),
}


def cells(data: str, steps: int) -> list[Cell]:
    """The base, and a cell for each change."""
    preset = presets.get("wikitext2-tiny").autoencoder
    schedule = dataclasses.replace(preset.train.optimizer, warmup_steps=max(1, steps // 5))
    train = dataclasses.replace(preset.train, steps=steps, optimizer=schedule, evaluate_every=0, save_every=0)
    model = dataclasses.replace(preset.model, vocab_size=open_data(data).tokenizer.vocab_size)
    base = dataclasses.replace(preset, data=data, model=model, train=train)

    def loss(**changes: float) -> AutoencoderRun:
        return dataclasses.replace(base, loss=dataclasses.replace(base.loss, **changes))

    def width(latent_dim: int) -> AutoencoderRun:
        return dataclasses.replace(base, model=dataclasses.replace(base.model, latent_dim=latent_dim))

    runs = {
        "base": base,
        "no KL clamp": loss(kl_clamp=0.0),
        "beta 0": loss(kl_weight=0.0),
        "beta x 10": loss(kl_weight=1e-2),
        "beta x 10, no KL clamp": loss(kl_weight=1e-2, kl_clamp=0.0),
        "no token masking": loss(token_dropout=0.0),
        "no latent dropout": loss(latent_dropout=0.0),
        "no random chunks": loss(random_chunks=0.0),
        "Z 16": width(16),
        "Z 32": width(32),
        "Z 128": width(128),
    }
    return [Cell(name=name.replace(" ", "-").replace(",", ""), run=run) for name, run in runs.items()]


def inspected(folder: Path) -> dict[str, Any]:
    """The score of a cell."""
    found = examine.latents(bundle.load(folder, precision="auto"), max_tokens=16 * 1024)
    latent, _, aggregate = found.curves
    at = latent.levels.index(0.3)
    return {
        "tokens_right": latent.tokens[0].estimate,
        "tokens_right_noise": latent.tokens[at].estimate,
        "tokens_right_noise_aggregate": aggregate.tokens[at].estimate,
        "kl": float(found.kl.sum()),
        "posterior_std": float(found.posterior_std.mean()),
        "aggregate_std": float(found.aggregate_std.mean()),
        "collapsed": found.collapsed,
        "effective_rank": found.effective_rank,
        "smoothness": found.neighbours.smoothness,
        "protocol": found.protocol.line(),
    }


def run(data: str | Path, out: str | Path, *, steps: int = 200, seeds: Sequence[int] = (0,)) -> str:
    """Runs what is missing, writes OUT/ablation.md and returns it."""
    results = run_cells(cells(str(data), steps), out, seeds=seeds, score=inspected)
    rows = []
    for name in dict.fromkeys(result["cell"] for result in results):
        of_cell = [result for result in results if result["cell"] == name]
        means = {key: sum(result[key] for result in of_cell) / len(of_cell) for key, _ in COLUMNS.values()}
        rows.append([name.replace("-", " "), *[form.format(means[key]) for key, form in COLUMNS.values()]])
    parts = [
        table(["cell", *COLUMNS], rows, markdown=True),
        "",
        f"{steps} steps, seeds {list(seeds)}; {results[0]['protocol']}",
    ]
    text = "\n".join(parts)
    write_whole(Path(out) / "ablation.md", text + "\n")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ablations of the autoencoder's loss.")
    parser.add_argument("data", help="folder of prepared data")
    parser.add_argument("out", help="folder for the cells")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    words = parser.parse_args()
    print(run(words.data, words.out, steps=words.steps, seeds=words.seeds))
