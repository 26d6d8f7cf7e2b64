"""`calm train critic`: from labelled text, or words, to a critic of latents."""

import dataclasses
from typing import Any

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCritic:
    """Trains a critic of latents for `calm align`: sentiment, subjectivity, an author, whatever lines of text are labelled by.

    Give --wanted and --unwanted; with --unwanted shuffled it becomes a critic of coherence (what follows on what). --concept
    gives a direction without training.
    """

    out: str
    """The folder to write."""
    autoencoder: str
    """A run or export that holds the autoencoder: of stage 1, or of a language model on it."""
    wanted: str | None = None
    """A file, or folder of files, of lines that are wanted."""
    unwanted: str | None = None
    """A file or folder of lines that are not; `shuffled` = the wanted lines with their chunks in another order."""
    concept: str | None = None
    """Words such as war,army,battle, or @FILE of example texts, in place of labelled lines."""
    data: str | None = None
    """Prepared data in which a concept's words are looked for; without it, the data that the run was trained on."""
    width: int = 64
    """Width of the critic's layers."""
    chunks: int = 16
    """The most chunks of a trajectory."""
    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 3e-3
    seed: int = 0

    def run(self) -> dict[str, Any]:
        from calm.runs import bundle
        from calm.ttt import align as alignment
        from calm.ttt.critic_files import save_critic
        from calm.ttt.training import SHUFFLED, CriticTraining, read_lines, train_critic

        labelled = self.wanted is not None and self.unwanted is not None
        if labelled == (self.concept is not None) or (self.wanted is None) != (self.unwanted is None):
            raise UsageError("train critic: give --wanted and --unwanted, or --concept alone")
        model = bundle.load(self.autoencoder)
        if model.autoencoder is None:
            raise UsageError(f"autoencoder {self.autoencoder}: holds a token model, which has no latents to judge")
        if self.concept is not None:
            critic, count = alignment.concept_critic(model, self.concept, self.data)
            description = save_critic(critic, self.out, model.autoencoder, wanted=self.concept, chunks_found=count)
            return {"critic": self.out, **description}
        options = CriticTraining(
            width=self.width,
            chunks=self.chunks,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )
        wanted = read_lines(str(self.wanted), "wanted")
        unwanted = None if self.unwanted == SHUFFLED else read_lines(str(self.unwanted), "unwanted")
        critic, report = train_critic(wanted, unwanted, model.autoencoder, model.tokenizer, options)
        facts = dict(wanted=self.wanted, unwanted=self.unwanted, options=dataclasses.asdict(options), report=report.to_dict())
        return {"critic": self.out, **save_critic(critic, self.out, model.autoencoder, **facts)}

    def show(self, result: dict[str, Any]) -> str:
        from calm.ttt.training import CriticReport

        if "report" not in result:
            return f"{result['critic']}: direction of {result['wanted']}, found in {result['chunks_found']} chunks of text"
        values: dict[str, Any] = {**result["report"], "trajectories": tuple(result["report"]["trajectories"])}
        report = CriticReport(**values)
        return f"{result['critic']}: {report.line()}"
