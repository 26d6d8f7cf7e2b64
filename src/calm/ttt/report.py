"""What alignment did: standard and aligned texts side by side, with the controls, in numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from calm.evaluate.tables import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """Texts of B prompts, written in one way."""

    name: str
    texts: tuple[str, ...]
    rewards: Float[np.ndarray, "B"]
    fluency: Float[np.ndarray, "B"]
    """lower reads better: the judge's bits per byte, or the base model's energy score; nan for a text without bytes"""
    delta: Float[np.ndarray, "B"]
    """SEAL delta: distance between the mean latents of this text and the standard one, both as the encoder reads them"""
    flops: float
    """for one prompt"""

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """One adaptation of B prompts, and its controls."""

    prompts: tuple[str, ...]
    critic: str
    """what was wanted, in words"""
    settings: str
    fluency_of: str
    """what `Way.fluency` is"""
    before: Float[np.ndarray, "B"]
    """mean reward of futures of the base model that no step has seen"""
    after: Float[np.ndarray, "B"]
    drift: Float[np.ndarray, "B"]
    norm: Float[np.ndarray, "B"]
    steps: tuple[int, ...]
    rolled_back: Bool[np.ndarray, "B"]
    """aligned texts that read too badly and gave way to the standard ones"""
    delta_of_chance: Float[np.ndarray, "B"]
    """SEAL delta between two standard texts of different noise: what a delta must exceed to mean anything"""
    ways: tuple[Way, ...]
    """standard first, then aligned, then the controls"""
    seconds: float
    """adapting and writing the aligned texts, compiling included"""

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "ways"}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return plain | {"ways": [way.to_dict() for way in self.ways]}

    def text(self) -> str:
        """Texts and numbers, as a person reads them."""
        parts = [f"wanted: {self.critic}"]
        for row, prompt in enumerate(self.prompts):
            for way in self.ways[:2]:
                parts.append(f"[{way.name}] {prompt}{way.texts[row]}")
            if self.rolled_back[row]:
                parts.append("rolled back: the aligned text read too badly, so the standard one and the base weights remain")
        parts.append(self.table())
        numbers = [
            f"reward of unseen futures {_mean(self.before)} -> {_mean(self.after)}",
            f"drift {_mean(self.drift)}",
            f"length of the change {_mean(self.norm)} of the weights'",
            f"steps {min(self.steps)} to {max(self.steps)}" if len(set(self.steps)) > 1 else f"steps {self.steps[0]}",
            f"SEAL delta by chance {_mean(self.delta_of_chance)}",
            f"{self.seconds:.1f} s",
        ]
        return "\n\n".join([*parts, ", ".join(numbers), self.settings])

    def table(self, *, markdown: bool = False) -> str:
        """A row for each way: means over prompts."""
        rows = [[way.name, _mean(way.rewards), _mean(way.fluency), _mean(way.delta), f"{way.flops:.3g}"] for way in self.ways]
        return table(["text", "reward", self.fluency_of, "SEAL delta", "FLOPs"], rows, markdown=markdown)


def _mean(values: Float[np.ndarray, "B"] | Sequence[float]) -> str:
    finite = np.asarray(values)[np.isfinite(values)]
    return f"{finite.mean():.3f}" if len(finite) else "-"
