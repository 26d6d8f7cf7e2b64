"""`calm align RUN`: change the weights for a prompt, by what is wanted, and write."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align:
    """Draws futures of a prompt, scores them by a critic, changes the weights for this prompt alone, and writes.

    Prints the standard and the aligned text, the reward before and after, how far text and model moved, the effect on
    fluency, and the time. The run itself is never changed.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder, or export, of a latent language model."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeatable, each with weights of its own. Without any the model writes unconditionally."""
    concept: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Concept to write about: words such as war,army,battle, or @FILE of example texts; repeatable, with =WEIGHT at its end."""
    by: Literal["auto", "text", "direction"] = "auto"
    """Critic of a concept: text = of the words that the decoder expects; direction = of the latents' direction; auto = text
    where the decoder reads latents alone."""
    critic: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder of a trained critic (calm train critic), with =WEIGHT at its end; repeatable."""
    data: str | None = None
    """Prepared data in which a concept's words are looked for; without it, the data that the run was trained on."""
    max_tokens: int = 128
    """Tokens of a text."""
    samples: int = 8
    """Futures at each inner step."""
    chunks: int = 8
    """Chunks of a future."""
    inner_steps: int = 3
    """Gradient steps."""
    rate: float = 1e-2
    """Step size; with the optimizer `relative`, relative to the length of the weights that change."""
    optimizer: Literal["relative", "sgd", "adam"] = "relative"
    texts: int = 1
    """Texts that the adapted weights write, of which that of the highest reward is kept."""
    weights: Literal["head", "all"] = "head"
    """Which weights change: the head's, or those of stem, backbone and head."""
    rank: int = 0
    """0 = all weights change freely; else only kernels, by a product of this rank."""
    feedback: Literal["auto", "constant", "straight_through", "latent"] = "auto"
    """Gradient between chunks (docs/ttt.md)."""
    penalty: float = 0.0
    """Reward subtracted per unit of drift from the base model."""
    max_drift: float | None = None
    """A step that would drift further is not taken; in (0, 1]."""
    max_norm: float | None = None
    """Length of the longest change, relative to the weights changed."""
    enough: float | None = None
    """Reward at which no further step is taken."""
    max_loss: float | None = None
    """Keep the standard text where the aligned one reads worse by more than this share, such as 0.1."""
    judge: str | None = None
    """Run or export of an independent token model that measures fluency; without it, the base model does."""
    controls: bool = False
    """Also a shuffled reward, a random direction, the best of as many texts as the same FLOPs buy, and steering of latents."""
    steer: float | None = None
    """How far steering adds the direction to every latent; without it, as far as adaptation moved them."""
    seed: int = 0
    out: str | None = None
    """Also write the result as JSON to this file."""

    def run(self) -> Any:
        from calm.cli import plain
        from calm.runs import bundle
        from calm.ttt.align import align
        from calm.ttt.brakes import Brakes
        from calm.ttt.concept import combined_critic
        from calm.ttt.fast_weights import FastWeightsConfig
        from calm.ttt.seal import SealConfig

        if self.steer is not None and not self.controls:
            raise UsageError("--steer is about a control: add --controls")
        if self.by != "auto" and not self.concept:
            raise UsageError("--by is about a concept: add --concept")
        if not self.concept and not self.critic:
            raise UsageError("say what is wanted: --concept war,army,battle, or --critic DIR of `calm train critic`")
        config = SealConfig(
            samples=self.samples,
            chunks=self.chunks,
            inner_steps=self.inner_steps,
            rate=self.rate,
            optimizer=self.optimizer,
            texts=self.texts,
            fast=FastWeightsConfig(part=self.weights, rank=self.rank),
            feedback=self.feedback,
            brakes=Brakes(
                penalty=self.penalty,
                max_drift=self.max_drift,
                max_norm=self.max_norm,
                enough=self.enough,
                max_loss=self.max_loss,
            ),
        )
        model = bundle.load(self.folder)
        judge = None if self.judge is None else bundle.load(self.judge)
        critic, wanted = combined_critic(model, self.concept, self.critic, self.data, self.by)
        report = align(
            model,
            self.prompt or ("",),
            critic,
            config=config,
            max_tokens=self.max_tokens,
            judge=judge,
            controls=self.controls,
            steer=self.steer,
            wanted=wanted,
            seed=self.seed,
        )
        if self.out is not None:
            Path(self.out).write_text(json.dumps(plain(report), indent=2) + "\n", encoding="utf-8")
        return report

    def show(self, report: Any) -> str:
        return report.text()
