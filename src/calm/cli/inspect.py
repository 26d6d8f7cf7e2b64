"""`calm inspect autoencoder RUN`: what the latents are like."""

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
        from calm import bundle, examine
        from calm.cli import plain

        model = bundle.load(self.folder)
        found = examine.latents(model, self.data, split=self.split, max_tokens=self.max_tokens, seed=self.seed)
        out = Path(self.out) if self.out is not None else Path(self.folder) / "plots"
        out.mkdir(parents=True, exist_ok=True)
        found.plot(out / "autoencoder.png")
        (out / "autoencoder.json").write_text(json.dumps(plain(found), indent=2) + "\n", encoding="utf-8")
        return {"autoencoder": found, "picture": str(out / "autoencoder.png")}

    def show(self, result: dict[str, Any]) -> str:
        return f"{result['autoencoder'].table()}\npicture: {result['picture']}"
