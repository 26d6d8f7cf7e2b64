"""`calm frontier RUN`: accuracy against collision over temperatures and numbers of candidates."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Sweeps the batch sampler on held-out text: how often it writes what stands there, and how often it agrees with itself."""

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model."""
    data: str | None = None
    """Prepared data; without it, the data that the run was trained on."""
    split: str = "valid"
    """train, valid or test."""
    max_tokens: int | None = 32_768
    """Read only this much text (30k, 2M are understood)."""
    positions: int = 16
    """Chunks of every block that are predicted."""
    temperatures: tuple[str, ...] = ("1", "0.7", "1/2", "1/3", "1/4", "1/8")
    """Temperatures above 0."""
    candidates: tuple[int, ...] = (10, 50, 200)
    """Numbers of draws to choose among."""
    decoding: Literal["argmax", "drawn"] = "argmax"
    """How a latent becomes tokens."""
    seed: int = 0
    out: str | None = None
    """A folder for frontier.json and frontier.png; without it, nothing is written."""

    def run(self) -> dict[str, Any]:
        import jax

        from calm.cli import plain
        from calm.evaluate.blocks import text_protocol
        from calm.evaluate.frontier import FrontierOptions, measure_frontier
        from calm.evaluate.frontier_report import frontier_curves
        from calm.runs import bundle
        from calm.runs.stages import validation_blocks
        from calm.text.shards import open_data
        from calm.text.tokenizer import require_same_tokenizer

        options = FrontierOptions(
            temperatures=self.temperatures, sizes=self.candidates, positions=self.positions, decoding=self.decoding
        )
        model = bundle.load(self.folder)
        predictor, data = model.predictor, open_data(self.data or model.data)
        require_same_tokenizer(data.tokenizer.fingerprint, model.tokenizer.fingerprint, f"model {self.folder}")
        blocks, documents = validation_blocks(data, model.block_tokens, self.split, self.max_tokens)
        text = text_protocol(data, self.split, block_tokens=model.block_tokens, chunk_size=model.chunk_size, seed=self.seed)
        report = measure_frontier(predictor, blocks, documents, jax.random.key(self.seed), options=options, text=text)
        if self.out is not None:
            out = Path(self.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "frontier.json").write_text(json.dumps(plain(report), indent=2) + "\n", encoding="utf-8")
            frontier_curves(report, out / "frontier.png")
        return {"frontier": report}

    def show(self, result: dict[str, Any]) -> str:
        return result["frontier"].table()
