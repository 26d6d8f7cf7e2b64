"""`calm dual generate|measure TOKEN_RUN CALM_RUN`: two models of one tokenizer at work on one text."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualGenerate:
    """Continues prompts as the token model would, in fewer passes of it: CALM drafts a chunk, the token model reads it at once
    and keeps what its own law allows. The text's law is the token model's, exactly."""

    token: Annotated[str, tyro.conf.Positional]
    """The run folder of a token model, which decides."""
    latent: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model of chunks on the same tokenizer, which drafts."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeatable. Without any prompt the models write unconditionally."""
    max_tokens: int = 128
    """The most tokens that are added to a prompt."""
    rule: Literal["accept", "match"] = "accept"
    """accept: a draft is kept with probability min(1, p/q); match: where it equals the token model's own draw, so that the text
    is the one `calm generate TOKEN_RUN` writes with this seed."""
    latents: int = 1
    """How many latents are drawn for a chunk; drafts come from the mixture of what they say."""
    boundaries: Literal["kept", "moved"] = "kept"
    """Where CALM goes on after a rejection: in the chunk that it was in, or at a new one, out of K states kept."""
    temperature: str = "1"
    """Of the token model's softmax, above 0: 0.7, 1/3 ..."""
    top_k: int | None = None
    """Let the token model choose among so many tokens; 1 = the most probable."""
    top_p: float | None = None
    """... among the fewest tokens that make up this share of its probability."""
    min_p: float | None = None
    """... among those of at least this share of the most probable one's."""
    ban: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A token never to write: text that is one token, or #ID; repeatable."""
    seed: int = 0

    def run(self) -> dict[str, Any]:
        from calm import dual
        from calm.sampling.softmax import softmax_sampler
        from calm.sampling.speculation import Drafting

        drafting = Drafting(rule=self.rule, num_latents=self.latents, boundaries=self.boundaries)
        law = softmax_sampler(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        prompts = list(self.prompt) or [""]
        result = dual.load(self.token, self.latent).generate(
            prompts,
            max_tokens=self.max_tokens,
            drafting=drafting,
            law=law,
            ban=[int(each[1:]) if each[:1] == "#" and each[1:].isdecimal() else each for each in self.ban],
            seed=self.seed,
        )
        return {"prompts": prompts, **result}

    def show(self, result: dict[str, Any]) -> str:
        pairs = zip(result["prompts"], result["texts"], strict=True)
        work = result["work"]
        told = f"{work['tokens_per_pass']:.2f} tokens a pass of the token model, {work['acceptance']:.0%} of the drafts kept"
        return "\n\n".join([*(prompt + text for prompt, text in pairs), told])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualMeasure:
    """Measures drafting on prompts of held-out text, in turns with the token model alone: tokens for each pass, tokens per
    second, FLOPs per token. Wants a quiet machine."""

    token: Annotated[str, tyro.conf.Positional]
    """The run folder of a token model, which decides."""
    latent: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model of chunks on the same tokenizer, which drafts."""
    rules: tuple[Literal["accept", "match"], ...] = ("accept", "match")
    """Rules to measure; every combination with the other two is a line."""
    latents: tuple[int, ...] = (1, 4)
    """Numbers of latents for a chunk."""
    boundaries: tuple[Literal["kept", "moved"], ...] = ("kept", "moved")
    """Where CALM goes on after a rejection."""
    temperature: str = "1"
    """Of the token model's softmax, above 0."""
    top_k: int | None = None
    """Let the token model choose among so many tokens; 1 = the most probable."""
    data: str | None = None
    """Prepared data; without it, the data that the token model was trained on."""
    split: str = "valid"
    """train, valid or test."""
    prompts: int = 8
    """Blocks of the split whose beginnings are continued."""
    prompt_tokens: int = 64
    """Tokens of each that are given."""
    max_tokens: int = 128
    """Tokens that are written behind them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    out: str | None = None
    """A folder for drafting.json and drafting.md; without it, nothing is written."""

    def run(self) -> dict[str, Any]:
        import itertools
        import sys

        from calm import dual
        from calm.sampling.softmax import softmax_sampler
        from calm.sampling.speculation import Drafting

        result = dual.measure(
            dual.load(self.token, self.latent, precision=self.precision),
            [
                Drafting(rule=rule, num_latents=latents, boundaries=boundaries)
                for rule, latents, boundaries in itertools.product(self.rules, self.latents, self.boundaries)
            ],
            law=softmax_sampler(self.temperature, top_k=self.top_k),
            data=self.data,
            split=self.split,
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_tokens,
            seed=self.seed,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        _written(self.out, "drafting", result, dual.drafting_table(result))
        return result

    def show(self, result: dict[str, Any]) -> str:
        from calm import dual

        return dual.drafting_table(result)


def _written(out: str | None, name: str, result: dict[str, Any], text: str) -> None:
    """Leaves a result as JSON and as text, where a folder is named."""
    import json

    from calm.cli import plain
    from calm.text.writer import write_whole

    if out is None:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    write_whole(Path(out) / f"{name}.json", json.dumps(plain(result), indent=2) + "\n")
    write_whole(Path(out) / f"{name}.md", text + "\n")
