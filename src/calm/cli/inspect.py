"""`calm inspect autoencoder RUN`: what the latents are like; `calm inspect losses RUN`: what the loss was made of."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectAutoencoder:
    """Looks at an autoencoder's latents on held-out text: accuracy under noise, KL and spread by dimension, smoothness."""

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder, or export, of an autoencoder or of a language model that was trained on one."""
    data: str | None = None
    """Prepared data; without it, the data that the run was trained on."""
    split: str = "valid"
    """train, valid or test."""
    max_tokens: int | None = 64 * 1024
    """Look at only this many tokens (30k, 2M are understood); none = the whole split."""
    seed: int = 0
    out: str | None = None
    """The folder for the picture and the numbers; without it, plots/ in the run folder."""

    def run(self) -> dict[str, Any]:
        from calm.cli import plain
        from calm.runs import bundle
        from calm.runs import measure as examine

        model = bundle.load(self.folder)
        found = examine.latents(model, self.data, split=self.split, max_tokens=self.max_tokens, seed=self.seed)
        out = Path(self.out) if self.out is not None else Path(self.folder) / "plots"
        out.mkdir(parents=True, exist_ok=True)
        found.plot(out / "autoencoder.png")
        (out / "autoencoder.json").write_text(json.dumps(plain(found), indent=2) + "\n", encoding="utf-8")
        return {"autoencoder": found, "picture": str(out / "autoencoder.png")}

    def show(self, result: dict[str, Any]) -> str:
        return f"{result['autoencoder'].table()}\npicture: {result['picture']}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectLosses:
    """Shows what a language model's loss was made of, step by step: fidelity, diversity, direction, gate, fidelity by position;
    and keeps it as a file of arrays (d_fid, d_div, rf_loss, gate_mean, fidelity_per_step, gate_histogram) with a picture.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model; it may still be training."""
    out: str | None = None
    """The .npz to write, with the picture beside it; without it, plots/losses.npz in the run folder."""

    def run(self) -> dict[str, Any]:
        from calm.errors import UsageError
        from calm.evaluate.loss_curves import LossCourse

        out = Path(self.out) if self.out is not None else Path(self.folder) / "plots" / "losses.npz"
        if out.suffix != ".npz":
            raise UsageError(f"--out {out}: name a file that ends in .npz")
        course = LossCourse.read(self.folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        course.save(out)
        course.plot(out.with_suffix(".png"))
        return {"losses": course, "file": str(out), "picture": str(out.with_suffix(".png"))}

    def show(self, result: dict[str, Any]) -> str:
        return f"{result['losses'].table()}\narrays: {result['file']}\npicture: {result['picture']}"
