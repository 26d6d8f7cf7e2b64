"""`calm train autoencoder` and `calm train lm`: the two stages; `calm train token-lm`: the baseline."""

import dataclasses
from typing import Annotated, Any

import tyro

from calm.runs import presets
from calm.runs.stages import AutoencoderRun, LatentLMRun, TokenLMRun, train_autoencoder, train_lm
from calm.runs.token_stage import train_token_lm


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainAutoencoder:
    """Stage 1: trains the map between a chunk of K tokens and its latent vector."""

    configuration = "settings"  # what files and presets fill; its options carry no prefix

    out: str
    """The run folder to write (or to go on with)."""
    resume: str = "auto"
    """auto goes on where the folder stopped; never refuses a folder with a run; also force, a step, or RUN@STEP."""
    settings: Annotated[AutoencoderRun, tyro.conf.arg(name="")] = AutoencoderRun()

    @classmethod
    def from_preset(cls, name: str) -> AutoencoderRun:
        return presets.get(name).autoencoder

    def run(self) -> dict[str, Any]:
        return train_autoencoder(self.settings, self.out, self.resume)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainLM:
    """Stage 2: trains a language model that predicts the next latent vector of a trained autoencoder."""

    configuration = "settings"

    out: str
    """The run folder to write (or to go on with)."""
    resume: str = "auto"
    """auto goes on where the folder stopped; never refuses a folder with a run; also force, a step, or RUN@STEP."""
    init_from: str = ""
    """A run, or a folder of calm export or calm import, whose weights and model to begin with (fine-tuning)."""
    settings: Annotated[LatentLMRun, tyro.conf.arg(name="")] = LatentLMRun()

    @classmethod
    def from_preset(cls, name: str) -> LatentLMRun:
        return presets.get(name).lm

    def run(self) -> dict[str, Any]:
        return train_lm(self.settings, self.out, self.resume, init_from=self.init_from)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenLM:
    """The baseline: trains a language model that predicts the next token, on the backbone of the other."""

    configuration = "settings"

    out: str
    """The run folder to write (or to go on with)."""
    resume: str = "auto"
    """auto goes on where the folder stopped; never refuses a folder with a run; also force, a step, or RUN@STEP."""
    init_from: str = ""
    """A run, or a folder of calm export or calm import, whose weights and model to begin with (fine-tuning)."""
    settings: Annotated[TokenLMRun, tyro.conf.arg(name="")] = TokenLMRun()

    @classmethod
    def from_preset(cls, name: str) -> TokenLMRun:
        return presets.get(name).token_lm

    def run(self) -> dict[str, Any]:
        return train_token_lm(self.settings, self.out, self.resume, init_from=self.init_from)
