"""Two trained models of one tokenizer at work on one text: a token model, and CALM, which writes chunks.

`generate` lets CALM draft what the token model writes (`calm.sampling.drafting`); `measure` says what that is worth.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from calm import bundle
from calm.errors import UsageError
from calm.models import NextVector, TokenLM
from calm.report.tables import table
from calm.rng import row_keys, stream
from calm.sampling import SpecialIds
from calm.sampling import generate as generate_tokens
from calm.sampling.drafting import Drafting, alone, checked_models, cost, draft, sum_of
from calm.sampling.softmax import SoftmaxSampler
from calm.stages import validation_blocks


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
        law: SoftmaxSampler | None = None,
        ban: Sequence[str | int] = (),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Continues each prompt as the token model would, in fewer passes of it; the empty prompt is unconditional.

        Returns texts, tokens (counts), ended, and work (`calm.sampling.drafting.Work`).
        """
        ids = [self.token.tokenizer.encode(prompt) for prompt in prompts]
        result = draft(
            *self.models,
            ids,
            row_keys(jax.random.key(seed), len(ids)),
            special=self.token.tokenizer,
            max_tokens=max_tokens,
            drafting=drafting,
            law=law or SoftmaxSampler(),
            context=self.block_tokens,
            banned=[self.token.banned_id(each) for each in ban],
        )
        rows = zip(result.tokens, result.lengths, strict=True)
        return {
            "texts": [self.token.tokenizer.decode(row[:length]) for row, length in rows],
            "tokens": result.lengths.tolist(),
            "ended": result.ended.tolist(),
            "work": result.work.to_dict(),
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
