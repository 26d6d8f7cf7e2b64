"""A token model and CALM that share a tokenizer, text in and text out.

`Pair.generate` lets CALM draft the token model's text (`calm.dual.drafting`), or lets a router give each chunk to one of
the two (`calm.dual.routing`); `measure_drafting` and `train_routing` measure what either is worth.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from calm.core.generate import SpecialIds, generate
from calm.core.predictor import NextVector
from calm.dual.drafting import checked_models, draft, drafting_cost, token_model_cost, total_work
from calm.dual.router import (
    SHARES,
    Router,
    RouterConfig,
    RouterTraining,
    RoutingReport,
    measure_routing,
    score_chunks,
    thresholds,
    train_router,
)
from calm.dual.routing import route
from calm.dual.speculation import Drafting
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
        """Most tokens of a prompt and its continuation: the shorter training sequence of the two."""
        return min(self.token.block_tokens, self.latent.block_tokens)

    def generate(
        self,
        prompts: Sequence[str] = ("",),
        *,
        max_tokens: int = 128,
        drafting: Drafting | None = None,
        routing: "Routing | None" = None,
        sampler: SoftmaxSampler | None = None,
        ban: Sequence[str | int] = (),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Continues each prompt as the token model would, in fewer passes; with `routing`, by both models in turns. The
        empty prompt is unconditional.

        Returns:
            `texts`, `tokens` (their lengths), `ended`, and `work`: `calm.dual.drafting.Work`, or chunks by each model.
        """
        ids = [self.token.tokenizer.encode(prompt) for prompt in prompts]
        options: dict[str, Any] = dict(
            special=self.token.tokenizer,
            max_tokens=max_tokens,
            context=self.block_tokens,
            banned=[self.token.banned_id(each) for each in ban],
        )
        keys, sampler = row_keys(jax.random.key(seed), len(ids)), sampler or SoftmaxSampler()
        if routing is None:
            result = draft(*self.models, ids, keys, drafting=drafting, sampler=sampler, **options)
            work: dict[str, Any] = result.work.to_dict()
        else:
            routing.check(self)
            options |= dict(threshold=routing.threshold, token_sampler=sampler)
            result = route(*self.models, routing.router, ids, keys, **options)
            work = {"chunks": result.chunks.tolist(), "by_tokens": result.by_tokens.tolist()}
        rows = zip(result.tokens, result.lengths, strict=True)
        return {
            "texts": [self.token.tokenizer.decode(row[:length]) for row, length in rows],
            "tokens": result.lengths.tolist(),
            "ended": result.ended.tolist(),
            "work": work,
        }


def load_pair(token: str | Path, latent: str | Path, *, precision: Literal["auto", "float32", "bfloat16"] = "float32") -> Pair:
    """Loads two runs, or exports: of a token model and of a next-vector model.

    Raises:
        UsageError: a run of the wrong kind, or two tokenizers.
    """
    first, second = bundle.load(token, precision=precision), bundle.load(latent, precision=precision)
    checked_models(first.predictor, second.predictor)
    if first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        raise UsageError(
            f"{token} and {latent}: trained with two tokenizers (fingerprints {first.tokenizer.fingerprint} and "
            f"{second.tokenizer.fingerprint}); both must be trained on the same prepared data"
        )
    return Pair(token=first, latent=second)


def measure_drafting(
    pair: Pair,
    recipes: Sequence[Drafting],
    *,
    sampler: SoftmaxSampler | None = None,
    data: str | None = None,
    split: str = "valid",
    prompts: int = 8,
    prompt_tokens: int = 64,
    max_tokens: int = 128,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compares every recipe with the token model alone, on prompts of held-out text, one text at a time and in turns.

    The end id is outside the vocabulary, so all texts have one length. Rates are medians over the prompts of tokens per
    second, prompt included, and `speedup` is the median of the ratios; the first prompt compiles and is run again.

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
    sampler = sampler or SoftmaxSampler()
    token_lm, proposer = pair.models
    opened = pair.token.prepared_data(data)
    blocks, _ = validation_blocks(opened, pair.block_tokens, split, prompts * pair.block_tokens)
    texts = [np.asarray(block[:prompt_tokens], np.int32) for block in blocks[:prompts]]
    vocab_size, tokenizer = token_lm.vocab_size, pair.token.tokenizer
    special = SpecialIds(begin_id=tokenizer.begin_id, end_id=vocab_size, mask_id=tokenizer.mask_id)
    keys = row_keys(stream(jax.random.key(seed), "drafting"), len(texts))
    options: dict[str, Any] = dict(special=special, max_tokens=max_tokens)

    def plain(row: int) -> Any:
        return generate(token_lm, [texts[row]], keys[row : row + 1], sampler=sampler, decoding="drawn", **options)

    sizes: dict[str, Any] = dict(prompt_tokens=len(texts) * prompt_tokens, context=prompt_tokens + max_tokens)
    plain_flops = token_model_cost(token_lm, tokens=len(texts) * max_tokens, **sizes)
    rows: list[dict[str, Any]] = []
    for recipe in recipes:

        def drafted(row: int, recipe: Drafting = recipe) -> Any:
            return draft(token_lm, proposer, [texts[row]], keys[row : row + 1], drafting=recipe, sampler=sampler, **options)

        for call in (plain, drafted):  # compiles
            call(0)
        pairs = [(_timed(plain, row), _timed(drafted, row)) for row in range(len(texts))]
        work = total_work([result.work for _, (result, _) in pairs])
        own, taken = [seconds for (_, seconds), _ in pairs], [seconds for _, (_, seconds) in pairs]
        rows.append(
            {
                **dataclasses.asdict(recipe),
                **work.to_dict(),
                "same_texts": sum(bool((one.tokens == two.tokens).all()) for (one, _), (two, _) in pairs),
                "tokens_per_second": max_tokens / statistics.median(taken),
                "alone_tokens_per_second": max_tokens / statistics.median(own),
                "speedup": statistics.median(one / two for one, two in zip(own, taken, strict=True)),
                "flops_per_token": drafting_cost(token_lm, proposer, work, recipe, **sizes).to_dict(),
                "alone_flops_per_token": plain_flops,
            }
        )
        log(f"{recipe.rule}, {recipe.num_latents} latents, boundaries {recipe.boundaries}: {rows[-1]['speedup']:.2f} x alone")
    protocol = {
        "data": str(opened.manifest.source["name"]),
        "split": split,
        "prompts": len(texts),
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "chunk_size": proposer.chunk_size,
        "law": dataclasses.asdict(sampler),
        "seed": seed,
    }
    return {"rows": rows, "protocol": protocol}


def _timed(call: Callable[[int], Any], row: int) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(row), time.perf_counter() - began


def drafting_table(result: dict[str, Any]) -> str:
    """Table of `measure_drafting`: the token model alone, then a row for each recipe."""
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
    line = (
        "{prompts} prompts of {prompt_tokens} tokens, {max_tokens} written, one text at a time; {data} {split}, "
        "K = {chunk_size}, seed {seed}; medians over the prompts"
    ).format(**result["protocol"])
    return table(header, cells) + "\n" + line


# -- routing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """A router at one threshold."""

    router: Router
    threshold: float
    """gap above which the token model writes"""
    tokenizer: str
    """fingerprint of the tokenizer of both models"""
    chunk_size: int
    """of the CALM model whose hidden states it reads"""

    def check(self, pair: Pair) -> None:
        """Raises UsageError where the router was trained for other models."""
        size, fingerprint = pair.latent.chunk_size, pair.latent.tokenizer.fingerprint
        if self.chunk_size != size:
            raise UsageError(f"router: trained for chunks of K = {self.chunk_size} tokens, this model's have {size}")
        if self.tokenizer != fingerprint:
            raise UsageError(
                f"router: trained with another tokenizer (fingerprint {self.tokenizer}, the models' {fingerprint})"
            )


def routing_costs(pair: Pair, router: RouterConfig, context: int) -> tuple[float, float]:
    """FLOPs per token, after `context` tokens, of a chunk by CALM and of one by the token model.

    CALM reads every chunk, as the router needs its hidden state; the token model reads every token, as its turn may come. So
    a chunk by CALM saves only the token model's logits, and K - 1 of K sequential steps.
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
        UsageError: `split` is train, which the router is fitted on; too little text.
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
        costs=routing_costs(pair, router.config, length),
        measure=training.measure,
        text=text_protocol(opened, split, block_tokens=length, chunk_size=size, seed=seed),
    )
    return router, at, report


def save_routing(folder: str | Path, pair: Pair, router: Router, at: dict[float, float], measure: str) -> None:
    """Writes a router to `router.safetensors` and its description to `router.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(flat_weights(router), folder / "router.safetensors")
    description = {
        "config": dataclasses.asdict(router.config),
        "measure": measure,
        "chunk_size": pair.latent.chunk_size,
        "tokenizer": pair.latent.tokenizer.fingerprint,
        "thresholds": {str(share): threshold for share, threshold in at.items() if 0 < share < 1},
    }
    write_whole(folder / "router.json", json.dumps(description, indent=2) + "\n")


def load_routing(folder: str | Path, share: float) -> Routing:
    """Loads a router at the threshold for a share of the token model, linearly interpolated between those that were set.

    Raises:
        UsageError: no router there, or a share outside 0..1.
    """
    path = Path(folder) / "router.json"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; calm dual route TOKEN_RUN CALM_RUN --out FOLDER makes one")
    if not 0 <= share <= 1:
        raise UsageError(f"router: the token model's share must lie between 0 and 1, got {share}")
    description = json.loads(path.read_text(encoding="utf-8"))
    known = sorted((float(share), threshold) for share, threshold in description["thresholds"].items())
    ends = {0.0: float("inf"), 1.0: float("-inf")}
    if share not in ends and not known:
        raise UsageError(f"{path}: holds no thresholds between 0 and 1; make it with --shares 0 0.25 0.5 0.75 1, for example")
    shares, cuts = [each for each, _ in known], [threshold for _, threshold in known]
    threshold = ends[share] if share in ends else float(np.interp(share, shares, cuts))
    config, weights = RouterConfig(**description["config"]), load_file(Path(folder) / "router.safetensors")
    router = build_with_weights(config, weights, precision="float32", where=str(folder))
    return Routing(router=router, threshold=threshold, tokenizer=description["tokenizer"], chunk_size=description["chunk_size"])
