"""`calm export RUN`: a run as files that other programs read."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the newest checkpoint of a run as safetensors with config.json, tokenizer.json and a model card; never pickle."""

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    out: str | None = None
    """Where to write; without it, the run folder's own export/."""

    def run(self) -> dict[str, Any]:
        from calm.runs import bundle

        out = Path(self.out) if self.out is not None else Path(self.folder) / "export"
        bundle.load(self.folder).export(out)
        files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
        return {"out": str(out), "files": files}
