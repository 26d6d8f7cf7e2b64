"""A named configuration of both stages."""

import dataclasses
from typing import Any

from calm.runs.stages import AutoencoderRun, LatentLMRun, TokenLMRun
from calm.token.model import TokenLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Both stages and the tokenizer that they are meant for."""

    name: str
    summary: str
    tokenizer: str
    """as in `calm data prepare --tokenizer`"""
    autoencoder: AutoencoderRun
    lm: LatentLMRun
    token_learning_rate: float | None = None
    """of the token baseline; None = that of `lm`"""
    token: TokenLMRun | None = None
    """the token model, where it has settings of its own"""

    @property
    def token_lm(self) -> TokenLMRun:
        """The baseline on the backbone and number of tokens of `lm`, at its own learning rate."""
        if self.token is not None:
            return self.token
        chosen: dict[str, Any] = {"best_metric": "valid/nats_per_token", "best_is": "lowest"}
        model = TokenLMConfig(backbone=self.lm.model.backbone, init_std=self.lm.model.init_std)
        if self.token_learning_rate is not None:
            chosen["optimizer"] = dataclasses.replace(self.lm.train.optimizer, learning_rate=self.token_learning_rate)
        return TokenLMRun(model=model, train=dataclasses.replace(self.lm.train, **chosen))
