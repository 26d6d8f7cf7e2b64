"""`calm align RUN`: change the weights for a prompt, by what is wanted, and write."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align:
    """Imagines futures of a prompt, lets a critic judge them, changes the weights for this prompt alone, and writes.

    Prints the standard and the aligned text, the reward before and after, how far the text and the model went, what it did to
    fluency, and the time. The run itself is never changed.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder, or export, of a latent language model."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeatable, and each prompt is adapted to alone. Without any the model writes unconditionally."""
    concept: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What is wanted: words such as war,army,battle, or @FILE of example texts; repeatable, each with =WEIGHT at its end."""
    by: Literal["auto", "text", "direction"] = "auto"
    """How a concept is judged: text = by the words that the decoder makes of latents; direction = by where latents point;
    auto = text where what is written follows from latents alone."""
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
    """Their size; with the optimizer `relative`, in lengths of the weights that change."""
    optimizer: Literal["relative", "sgd", "adam"] = "relative"
    texts: int = 1
    """Texts that the adapted weights write, of which the critic's best is kept."""
    weights: Literal["head", "all"] = "head"
    """Which weights change: the head's, or those of stem, backbone and head."""
    rank: int = 0
    """0 = freely; else kernels alone, by matrices of this rank."""
    feedback: Literal["auto", "constant", "straight_through", "latent"] = "auto"
    """What the gradient does between chunks (docs/ttt.md)."""
    penalty: float = 0.0
    """What a unit of drift from the base model takes off the reward."""
    max_drift: float | None = None
    """A step that would drift further is not taken; in (0, 1]."""
    max_norm: float | None = None
    """Longest change of the weights, in their own length."""
    enough: float | None = None
    """Reward at which no further step is taken."""
    max_loss: float | None = None
    """Go back to the standard text where the aligned one reads worse by more than this share, such as 0.1."""
    judge: str | None = None
    """Run or export of an independent token model, which says how fluent texts are; without it, the base model does."""
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
        from calm.ttt import align as alignment
        from calm.ttt.brakes import Brakes
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
        critic, wanted = alignment.gather_critic(model, self.concept, self.critic, self.data, self.by)
        report = alignment.align(
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
