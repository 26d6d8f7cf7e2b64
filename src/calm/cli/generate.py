"""`calm generate RUN`: continue prompts, streaming chunk by chunk."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

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
    """1, or 1/n for a whole n: 0.5, 1/3, 0.25 ..."""
    candidates: int = 200
    """How many draws the sampler chooses among below temperature 1."""
    seed: int = 0
    out: str | None = None
    """Also write the texts to this file, one after the other with an empty line between."""

    def run(self) -> dict[str, Any]:
        from calm import bundle

        prompts = [*self.prompt, *self._from_file()] or [""]
        pending = [prompts[0]]  # printed with the first chunk, so that a prompt that is refused leaves no output

        def stream(text: str) -> None:
            print(*pending, text, sep="", end="", flush=True)
            pending.clear()

        result = bundle.load(self.folder).generate(
            prompts,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            candidates=self.candidates,
            seed=self.seed,
            stream=stream if len(prompts) == 1 else None,
        )
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
