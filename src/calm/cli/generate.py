"""`calm generate RUN`: continue prompts, streaming chunk by chunk."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continues prompts. One prompt is streamed chunk by chunk; several are continued in one batch and printed at the end."""

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeatable. Without any prompt the model writes unconditionally."""
    prompt_file: str | None = None
    """A text file whose content is one more prompt; - is standard input."""
    max_tokens: int = 128
    """The most tokens that are added to a prompt."""
    temperature: str = "1"
    """Any number above 0: 0.7, 1/3, 1.5 ... Below 1 the sampler decides how near it comes to the distribution, and the cost."""
    sampler: Literal["auto", "batch", "exact", "best"] = "auto"
    """batch: near the distribution of that temperature, for --candidates draws a chunk; exact: that distribution at
    temperatures up to 1, for as many draws as it takes; best: the chunk drawn most often; auto: batch, and for a token model
    its own probabilities."""
    candidates: int = 200
    """How many draws a chunk is chosen among; at temperature 1 without other options one is drawn."""
    max_draws: int = 20_000
    """The most draws of the exact sampler for one chunk; when they run out, the command ends with an error."""
    top_k: int | None = None
    """Choose among the k chunks drawn most often."""
    top_p: float | None = None
    """Choose among the fewest chunks that make up this share of the draws, weighed by temperature."""
    min_p: float | None = None
    """Choose among the chunks of at least this share of the heaviest one's weight."""
    no_repeat: int | None = None
    """Write no run of this many tokens twice."""
    ban: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A token never to write: text that is one token, or #ID; repeatable."""
    decoding: Literal["argmax", "drawn"] | None = None
    """How a latent becomes tokens: the decoder's argmax, or drawn from its softmax; by default as suits the model."""
    seed: int = 0
    save_state: str | None = None
    """Save what the prompt left to this file before it is continued, with room for the rest of the context."""
    rewindable: bool = False
    """Save such a state that --rewind can take back what recurrences read, too; attention can in any case."""
    state: str | None = None
    """Go on from a file of --save-state instead of a prompt, as if its text had been read; as often as wanted."""
    rewind: int = 0
    """Take back the last so many chunks (of a token model: tokens) that the --state has read."""
    out: str | None = None
    """Also write the texts to this file, one after the other with an empty line between."""

    def run(self) -> dict[str, Any]:
        from calm.runs import bundle

        prompts = [*self.prompt, *self._from_file()] or [""]
        pending = [prompts[0]]  # printed with the first chunk, so that a prompt that is refused leaves no output

        def stream(text: str) -> None:
            print(*pending, text, sep="", end="", flush=True)
            pending.clear()

        result = bundle.load(self.folder).generate(
            prompts,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            sampler=None if self.sampler == "auto" else self.sampler,
            candidates=self.candidates,
            max_draws=self.max_draws,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            no_repeat=self.no_repeat,
            ban=[int(each[1:]) if each[:1] == "#" and each[1:].isdecimal() else each for each in self.ban],
            decoding=self.decoding,
            seed=self.seed,
            stream=stream if len(prompts) == 1 else None,
            state=self.state,
            save_state=self.save_state,
            rewindable=self.rewindable,
            rewind=self.rewind,
        )
        fallback = sum(result["fallback_share"]) / len(prompts)
        if fallback:
            reason = "draws were too few, or too different, to decide as asked: the most frequent chunks were taken instead"
            print(f"\ncalm: at {fallback:.0%} of the steps {self.candidates} {reason}", file=sys.stderr)
        if self.out is not None:
            texts = [prompt + text for prompt, text in zip(prompts, result["texts"], strict=True)]
            Path(self.out).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        return {"prompts": prompts, **result}

    def show(self, result: dict[str, Any]) -> str:
        if len(result["prompts"]) == 1:
            return "\n"  # the text itself was streamed
        pairs = zip(result["prompts"], result["texts"], strict=True)
        return "\n\n".join(prompt + text for prompt, text in pairs)

    def _from_file(self) -> list[str]:
        if self.prompt_file is None:
            return []
        try:
            data = sys.stdin.buffer.read() if self.prompt_file == "-" else Path(self.prompt_file).read_bytes()
            return [data.decode("utf-8")]
        except FileNotFoundError as error:
            raise UsageError(f"--prompt-file {self.prompt_file}: no such file") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt-file {self.prompt_file}: not UTF-8 text") from error
