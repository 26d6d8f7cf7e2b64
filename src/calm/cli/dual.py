"""`calm dual generate|measure|route TOKEN_RUN CALM_RUN`: two models of one tokenizer at work on one text."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualGenerate:
    """Continues prompts as the token model would, in fewer passes: CALM drafts a chunk, the token model reads it at once and
    keeps what its own distribution allows. The text has exactly the token model's distribution. With --router, each chunk
    is written by one of the two instead."""

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
    """Latents drawn for a chunk; drafts come from the mixture of the decoder's distributions given each."""
    boundaries: Literal["kept", "moved"] = "kept"
    """Where CALM continues after a rejection: in the same chunk, or at a new one, with K states kept."""
    router: str | None = None
    """A folder that `calm dual route` wrote: no drafts, the router chooses who writes a chunk."""
    share: float | None = None
    """With --router: the share of chunks that the token model is to write."""
    temperature: str = "1"
    """Temperature of the token model's softmax, above 0: 0.7, 1/3 ..."""
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
        from calm.dual.pair import load_pair, load_routing
        from calm.dual.speculation import Drafting
        from calm.token.sampler import softmax_sampler

        drafting = Drafting(rule=self.rule, num_latents=self.latents, boundaries=self.boundaries)
        if (self.router is None) != (self.share is None):
            raise UsageError("--router and --share go together: a folder of calm dual route, and the token model's share")
        if self.router is not None and drafting != Drafting():
            raise UsageError("--router writes without drafts; leave out --rule, --latents and --boundaries")
        routing = None if self.router is None or self.share is None else load_routing(self.router, self.share)
        sampler = softmax_sampler(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        prompts = list(self.prompt) or [""]
        result = load_pair(self.token, self.latent).generate(
            prompts,
            max_tokens=self.max_tokens,
            drafting=drafting,
            routing=routing,
            sampler=sampler,
            ban=[int(each[1:]) if each[:1] == "#" and each[1:].isdecimal() else each for each in self.ban],
            seed=self.seed,
        )
        return {"prompts": prompts, **result}

    def show(self, result: dict[str, Any]) -> str:
        pairs = zip(result["prompts"], result["texts"], strict=True)
        work = result["work"]
        if self.router is not None:
            line = f"{sum(work['by_tokens'])} of {sum(work['chunks'])} chunks by the token model"
        else:
            line = (
                f"{work['tokens_per_pass']:.2f} tokens a pass of the token model, {work['acceptance']:.0%} of the drafts kept"
            )
        return "\n\n".join([*(prompt + text for prompt, text in pairs), line])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualMeasure:
    """Measures drafting on prompts of held-out text, in turns with the token model alone: tokens per pass, tokens per second,
    FLOPs per token. Needs an idle machine."""

    token: Annotated[str, tyro.conf.Positional]
    """The run folder of a token model, which decides."""
    latent: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model of chunks on the same tokenizer, which drafts."""
    rules: tuple[Literal["accept", "match"], ...] = ("accept", "match")
    """Rules to measure; every combination with the other two is a line."""
    latents: tuple[int, ...] = (1, 4)
    """Numbers of latents of a chunk."""
    boundaries: tuple[Literal["kept", "moved"], ...] = ("kept", "moved")
    """Where CALM continues after a rejection."""
    temperature: str = "1"
    """Temperature of the token model's softmax, above 0."""
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
    """Tokens that are written after them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    out: str | None = None
    """A folder for drafting.json and drafting.md; without it, nothing is written."""

    def run(self) -> dict[str, Any]:
        import itertools
        import sys

        from calm.dual.pair import drafting_table, load_pair, measure_drafting
        from calm.dual.speculation import Drafting
        from calm.token.sampler import softmax_sampler

        result = measure_drafting(
            load_pair(self.token, self.latent, precision=self.precision),
            [
                Drafting(rule=rule, num_latents=latents, boundaries=boundaries)
                for rule, latents, boundaries in itertools.product(self.rules, self.latents, self.boundaries)
            ],
            sampler=softmax_sampler(self.temperature, top_k=self.top_k),
            data=self.data,
            split=self.split,
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_tokens,
            seed=self.seed,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        _written(self.out, "drafting", result, drafting_table(result))
        return result

    def show(self, result: dict[str, Any]) -> str:
        from calm.dual.pair import drafting_table

        return drafting_table(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualRoute:
    """Fits a router that gives each chunk to CALM or to the token model, by how much worse CALM is expected to do on it.
    Scores it on held-out text at every share: FLOPs and steps per token, nats per token, BrierLM."""

    token: Annotated[str, tyro.conf.Positional]
    """The run folder of a token model."""
    latent: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model of chunks on the same tokenizer."""
    measure: Literal["nats", "brier"] = "nats"
    """The error whose difference is predicted."""
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of chunks for the token model; their thresholds are set on the train split."""
    steps: int = 600
    """Steps of the router's training."""
    train_tokens: int = 65_536
    """Tokens of the train split to fit on."""
    max_tokens: int | None = 65_536
    """The most tokens of the split to score on."""
    num_samples: int = 8
    """Latents for CALM's nats, and continuations for the Brier scores."""
    data: str | None = None
    """Prepared data; without it, the data that the token model was trained on."""
    split: str = "valid"
    """valid or test."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    out: str | None = None
    """A folder for the router, routing.json, routing.md and routing.png; without it, nothing is written."""

    def run(self) -> dict[str, Any]:
        from calm.dual.pair import load_pair, save_routing, train_routing
        from calm.dual.router import RouterTraining, routing_curves

        training = RouterTraining(measure=self.measure, steps=self.steps)
        pair = load_pair(self.token, self.latent, precision=self.precision)
        router, at, report = train_routing(
            pair,
            data=self.data,
            split=self.split,
            train_tokens=self.train_tokens,
            max_tokens=self.max_tokens,
            num_samples=self.num_samples,
            shares=self.shares,
            training=training,
            seed=self.seed,
        )
        if self.out is not None:
            save_routing(self.out, pair, router, at, self.measure)
            routing_curves(report, Path(self.out) / "routing.png")
        _written(self.out, "routing", report.to_dict(), report.table())
        return {"routing": report}

    def show(self, result: dict[str, Any]) -> str:
        return result["routing"].table()


def _written(out: str | None, name: str, result: dict[str, Any], text: str) -> None:
    """Writes a result as JSON and as text to the folder `out`, if given."""
    import json

    from calm.cli import plain
    from calm.text.atomic_write import write_whole

    if out is None:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    write_whole(Path(out) / f"{name}.json", json.dumps(plain(result), indent=2) + "\n")
    write_whole(Path(out) / f"{name}.md", text + "\n")
