"""Two trained models of one tokenizer at work on one text: a token model, and CALM, which writes chunks.

`generate` lets CALM draft what the token model writes (`calm.dual.drafting`), or lets a router give each chunk to one of
the two (`calm.dual.routing`); `measure` says what drafts are worth, `train_routing` what routing is.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from calm.core import generate as generate_tokens
from calm.core.generate import SpecialIds
from calm.core.predictor import NextVector
from calm.dual.drafting import Drafting, alone, checked_models, cost, draft, sum_of
from calm.dual.router import Router, RouterConfig
from calm.dual.router_training import SHARES, RouterTraining, measure_routing, score_chunks, thresholds, train_router
from calm.dual.routing import route
from calm.dual.routing_report import RoutingReport
from calm.errors import UsageError
from calm.evaluate.blocks import text_protocol
from calm.evaluate.flops import next_vector_inference
from calm.evaluate.tables import table
from calm.rng import row_keys, stream
from calm.runs import bundle
from calm.runs.stages import validation_blocks
from calm.runs.weights import build_with_weights, flat_weights
from calm.text.atomic_write import write_whole
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A token model and a next-vector model that share a tokenizer."""

    token: bundle.Bundle
    latent: bundle.Bundle

    @property
    def models(self) -> tuple[TokenLM, NextVector]:
        return checked_models(self.token.predictor, self.latent.predictor)

    @property
    def block_tokens(self) -> int:
        """Tokens that both have seen in one sequence: the longest prompt with its continuation."""
        return min(self.token.block_tokens, self.latent.block_tokens)

    def generate(
        self,
        prompts: Sequence[str] = ("",),
        *,
        max_tokens: int = 128,
        drafting: Drafting | None = None,
        routing: "Routing | None" = None,
        law: SoftmaxSampler | None = None,
        ban: Sequence[str | int] = (),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Continues each prompt as the token model would, in fewer passes of it; with `routing`, by both models in turns. The
        empty prompt is unconditional.

        Returns texts, tokens (counts), ended, and work: `calm.dual.drafting.Work`, or who wrote how many chunks.
        """
        ids = [self.token.tokenizer.encode(prompt) for prompt in prompts]
        options: dict[str, Any] = dict(
            special=self.token.tokenizer,
            max_tokens=max_tokens,
            law=law or SoftmaxSampler(),
            context=self.block_tokens,
            banned=[self.token.banned_id(each) for each in ban],
        )
        keys = row_keys(jax.random.key(seed), len(ids))
        if routing is None:
            result = draft(*self.models, ids, keys, drafting=drafting, **options)
            work: dict[str, Any] = result.work.to_dict()
        else:
            routing.check(self)
            result = route(*self.models, routing.router, ids, keys, threshold=routing.threshold, **options)
            work = {"chunks": result.chunks.tolist(), "by_tokens": result.by_tokens.tolist()}
        rows = zip(result.tokens, result.lengths, strict=True)
        return {
            "texts": [self.token.tokenizer.decode(row[:length]) for row, length in rows],
            "tokens": result.lengths.tolist(),
            "ended": result.ended.tolist(),
            "work": work,
        }


def load(token: str | Path, latent: str | Path, *, precision: Literal["auto", "float32", "bfloat16"] = "float32") -> Pair:
    """Loads a run folder, or an exported folder, of each kind.

    Raises:
        UsageError: a folder of the wrong kind, or two tokenizers.
    """
    first, second = bundle.load(token, precision=precision), bundle.load(latent, precision=precision)
    checked_models(first.predictor, second.predictor)
    if first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        raise UsageError(
            f"{token} and {latent}: trained with two tokenizers (fingerprints {first.tokenizer.fingerprint} and "
            f"{second.tokenizer.fingerprint}); both must be trained on the same prepared data"
        )
    return Pair(token=first, latent=second)


def measure(
    pair: Pair,
    recipes: Sequence[Drafting],
    *,
    law: SoftmaxSampler | None = None,
    data: str | None = None,
    split: str = "valid",
    prompts: int = 8,
    prompt_tokens: int = 64,
    max_tokens: int = 128,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every recipe beside the token model alone, on prompts of held-out text, one text at a time and in turns.

    The end id is out of reach, so that every text is as long. Rates are medians over the prompts of tokens per second, prompt
    included, and `speedup` that of the ratios of each prompt; the first prompt compiles and is run again.

    Raises:
        UsageError: no recipes, or prompts that leave no room.
    """
    if not recipes or prompts < 1 or prompt_tokens < 1:
        raise UsageError("drafting: needs at least one recipe, one prompt and one token in it")
    if prompt_tokens + max_tokens > pair.block_tokens:
        raise UsageError(
            f"drafting: {prompt_tokens} tokens of prompt and {max_tokens} more do not fit in the {pair.block_tokens} that both "
            "models were trained on; take fewer"
        )
    law = law or SoftmaxSampler()
    token_lm, proposer = pair.models
    opened = pair.token.prepared_data(data)
    blocks, _ = validation_blocks(opened, pair.block_tokens, split, prompts * pair.block_tokens)
    texts = [np.asarray(block[:prompt_tokens], np.int32) for block in blocks[:prompts]]
    vocab_size, tokenizer = token_lm.vocab_size, pair.token.tokenizer
    special = SpecialIds(begin_id=tokenizer.begin_id, end_id=vocab_size, mask_id=tokenizer.mask_id)
    keys = row_keys(stream(jax.random.key(seed), "drafting"), len(texts))
    options: dict[str, Any] = dict(special=special, max_tokens=max_tokens)

    def plain(row: int) -> Any:
        return generate_tokens(token_lm, [texts[row]], keys[row : row + 1], sampler=law, decoding="drawn", **options)

    def drafted(recipe: Drafting, row: int) -> Any:
        return draft(token_lm, proposer, [texts[row]], keys[row : row + 1], drafting=recipe, law=law, **options)

    sizes: dict[str, Any] = dict(prompt_tokens=len(texts) * prompt_tokens, context=prompt_tokens + max_tokens)
    plain_flops = alone(token_lm, tokens=len(texts) * max_tokens, **sizes)
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        with_drafts = functools.partial(drafted, recipe)
        for call in (plain, with_drafts):  # compiles
            call(0)
        pairs = [(_timed(plain, row), _timed(with_drafts, row)) for row in range(len(texts))]
        work = sum_of([result.work for _, (result, _) in pairs])
        own, taken = [seconds for (_, seconds), _ in pairs], [seconds for _, (_, seconds) in pairs]
        rows.append(
            {
                **dataclasses.asdict(recipe),
                **work.to_dict(),
                "same_texts": sum(bool((one.tokens == two.tokens).all()) for (one, _), (two, _) in pairs),
                "tokens_per_second": max_tokens / statistics.median(taken),
                "alone_tokens_per_second": max_tokens / statistics.median(own),
                "speedup": statistics.median(one / two for one, two in zip(own, taken, strict=True)),
                "flops_per_token": cost(token_lm, proposer, work, recipe, **sizes).to_dict(),
                "alone_flops_per_token": plain_flops,
            }
        )
        say(f"{recipe.rule}, {recipe.num_latents} latents, boundaries {recipe.boundaries}: {rows[-1]['speedup']:.2f} x alone")
    protocol = {
        "data": str(opened.manifest.source["name"]),
        "split": split,
        "prompts": len(texts),
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "chunk_size": proposer.chunk_size,
        "law": dataclasses.asdict(law),
        "seed": seed,
    }
    return {"rows": rows, "protocol": protocol}


def _timed(call: Callable[[int], Any], row: int) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(row), time.perf_counter() - began


def drafting_table(result: dict[str, Any]) -> str:
    """What `measure` found, a line for each recipe below that of the token model alone."""
    header = ["drafts", "latents", "boundaries", "tokens/pass", "kept %", "tokens/s", "x alone", "MFLOPs/token", "token model"]
    first = result["rows"][0]
    rates = [row["alone_tokens_per_second"] for row in result["rows"]]
    flops = f"{first['alone_flops_per_token'] / 1e6:.2f}"
    cells = [["none", "-", "-", "1.00", "-", f"{statistics.median(rates):.1f}", "1.00", flops, flops]]
    for row in result["rows"]:
        cost_of = row["flops_per_token"]
        cells.append(
            [
                row["rule"],
                str(row["num_latents"]),
                row["boundaries"],
                f"{row['tokens_per_pass']:.2f}",
                f"{100 * row['acceptance']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}",
                f"{cost_of['total'] / 1e6:.2f}",
                f"{cost_of['target'] / 1e6:.2f}",
            ]
        )
    told = result["protocol"]
    line = (
        f"{told['prompts']} prompts of {told['prompt_tokens']} tokens, {told['max_tokens']} written, one text at a time; "
        f"{told['data']} {told['split']}, K = {told['chunk_size']}, seed {told['seed']}; medians over the prompts"
    )
    return table(header, cells) + "\n" + line


# -- routing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """A router, and where it stands."""

    router: Router
    threshold: float
    """the gap above which the token model writes"""
    tokenizer: str
    """fingerprint of the tokenizer of both models"""
    chunk_size: int
    """of the CALM model whose hidden states it reads"""

    def check(self, pair: Pair) -> None:
        """Raises UsageError where it was trained for other models."""
        size, fingerprint = pair.latent.chunk_size, pair.latent.tokenizer.fingerprint
        if self.chunk_size != size:
            raise UsageError(f"router: trained for chunks of K = {self.chunk_size} tokens, this model's have {size}")
        if self.tokenizer != fingerprint:
            raise UsageError(
                f"router: trained with another tokenizer (fingerprint {self.tokenizer}, the models' {fingerprint})"
            )


def route_costs(pair: Pair, router: RouterConfig, context: int) -> tuple[float, float]:
    """FLOPs per token of a chunk that CALM writes, and of one that the token model writes, behind `context` tokens.

    CALM reads every chunk, as the router needs its hidden state; the token model reads every token, as its turn may come. So
    the first saves the token model's logits alone, and in steps one after the other K - 1 of K.
    """
    token_lm, proposer = pair.models
    lm, codec, size = proposer.lm.config, proposer.autoencoder.config, proposer.chunk_size
    alone_calm = next_vector_inference(lm, codec, context // size)
    encoder = codec.encoder_flops() if lm.stem != "discrete" else 0
    always = alone_calm.backbone + (encoder + router.flops()) / size
    position, logits = token_lm.config.flops(context), 2 * token_lm.config.width * token_lm.config.vocab_size
    return always + alone_calm.head + alone_calm.writing + position - logits, always + position


def train_routing(
    pair: Pair,
    *,
    data: str | None = None,
    split: str = "valid",
    train_tokens: int = 65_536,
    max_tokens: int | None = 65_536,
    num_samples: int = 8,
    shares: Sequence[float] = SHARES,
    training: RouterTraining | None = None,
    seed: int = 0,
) -> tuple[Router, dict[float, float], RoutingReport]:
    """Fits a router on the beginning of the train split, sets its thresholds there, and scores every one on `split`.

    Raises:
        UsageError: the train split as the one to be scored on; too little text.
    """
    if split == "train":
        raise UsageError("routing: the train split is what the router is fitted on; score it on valid or test")
    training = training or RouterTraining()
    opened, models = pair.token.prepared_data(data), pair.models
    size, length = pair.latent.chunk_size, pair.block_tokens
    key = stream(jax.random.key(seed), "routing")

    def scored(name: str, tokens: int | None) -> Any:
        blocks, documents = validation_blocks(opened, length, name, tokens)
        return score_chunks(*models, blocks, stream(key, name), num_samples=num_samples), documents

    fit, _ = scored("train", train_tokens)
    router = train_router(fit, key, training)
    at = thresholds(router, fit, shares)
    held, documents = scored(split, max_tokens)
    report = measure_routing(
        router,
        held,
        documents,
        at,
        costs=route_costs(pair, router.config, length),
        measure=training.measure,
        text=text_protocol(opened, split, block_tokens=length, chunk_size=size, seed=seed),
    )
    return router, at, report


def save_routing(folder: str | Path, pair: Pair, router: Router, at: dict[float, float], measure: str) -> None:
    """Leaves a router in `router.safetensors` and what it is in `router.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(flat_weights(router), folder / "router.safetensors")
    told = {
        "config": dataclasses.asdict(router.config),
        "measure": measure,
        "chunk_size": pair.latent.chunk_size,
        "tokenizer": pair.latent.tokenizer.fingerprint,
        "thresholds": {str(share): threshold for share, threshold in at.items() if 0 < share < 1},
    }
    write_whole(folder / "router.json", json.dumps(told, indent=2) + "\n")


def load_routing(folder: str | Path, share: float) -> Routing:
    """A saved router at the threshold for a share of the token model, between those that were set by straight lines.

    Raises:
        UsageError: no router there, or a share outside 0..1.
    """
    path = Path(folder) / "router.json"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; calm dual route TOKEN_RUN CALM_RUN --out FOLDER makes one")
    if not 0 <= share <= 1:
        raise UsageError(f"router: the token model's share must lie between 0 and 1, got {share}")
    told = json.loads(path.read_text(encoding="utf-8"))
    known = sorted((float(share), threshold) for share, threshold in told["thresholds"].items())
    ends = {0.0: float("inf"), 1.0: float("-inf")}
    if share not in ends and not known:
        raise UsageError(f"{path}: holds no thresholds between 0 and 1; make it with --shares 0 0.25 0.5 0.75 1, for example")
    shares, cuts = [each for each, _ in known], [threshold for _, threshold in known]
    threshold = ends[share] if share in ends else float(np.interp(share, shares, cuts))
    config, weights = RouterConfig(**told["config"]), load_file(Path(folder) / "router.safetensors")
    router = build_with_weights(config, weights, precision="float32", where=str(folder))
    return Routing(router=router, threshold=threshold, tokenizer=told["tokenizer"], chunk_size=told["chunk_size"])
