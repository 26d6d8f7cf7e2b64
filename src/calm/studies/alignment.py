"""Weight updates for a prompt compared with the same FLOPs spent otherwise.

For every concept, number of inner steps and seed, held-out prompts are continued in every variant of `calm.ttt.align`:
standard, aligned, and by each control; best of S has as many texts as the adaptation and its one text cost. The result is
the opinion of a classifier of decoded text that was trained on another split, does not see the concept's own words, and is
never optimised (`calm.ttt.text_judge`), next to fluency by an independent token model, repetition, and the shares of the
concept's words and of function words. Intervals are bootstraps over prompts; variants are compared prompt by prompt.

The critic learns a concept from the train split, the classifier from valid, and the prompts are of the split scored.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from calm.core.intervals import BlockSums, Interval, bootstrap, paired_bootstrap
from calm.errors import UsageError
from calm.evaluate.plots import COLOURS, new_figure, tidy
from calm.evaluate.tables import interval_text, table
from calm.evaluate.writing import REPEATED, repeated
from calm.runs import bundle
from calm.runs.stages import validation_blocks
from calm.studies.runner import cell_folder
from calm.studies.study import Request, cell_result
from calm.ttt.align import CONTROLS, Comparison
from calm.ttt.brakes import Brakes
from calm.ttt.concept import By, chunks_with, concept_critic, parse_words
from calm.ttt.seal import Continuations, SealConfig
from calm.ttt.text_judge import STOP_WORDS, TextJudge, fit_judge, word_counts, words_of

CONCEPTS = (
    "war,army,battle,troops,soldiers",
    "album,song,music,band,songs",
    "game,team,season,players,league",
    "film,films,actor,scene,episode",
    "river,island,mountain,lake,species",
)
STEPS = (3, 10)
BEST = "best of S"
ROLLED_BACK, MOST_LOSS = "rolled back", 0.2
"""variant: aligned texts, those that read worse by more than this share replaced by the standard one (`Brakes.max_loss`)"""
NO_INTERVAL = Interval(estimate=float("nan"), low=float("nan"), high=float("nan"))
MEASURES = ("judge", "fluency", "repeated", "concept words", "function words")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """Configuration of one cell."""

    model: str = ""
    """run of a latent language model"""
    data: str = ""
    judge: str = ""
    """run of a token model, or none"""
    concept: str = CONCEPTS[0]
    by: By = "auto"
    """kind of the concept's critic (`calm.ttt.concept.concept_critic`)"""
    split: str = "test"
    prompts: int = 64
    prompt_tokens: int = 24
    num_chunks: int = 32
    seal: SealConfig = SealConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompts, self.prompt_tokens, self.num_chunks) < 1:
            raise UsageError("align: prompts, prompt_tokens and num_chunks must be at least 1")


def run_cell(run: AlignmentRun) -> dict[str, Any]:
    """Writes all variants and measures every text: sums and counts for each prompt, so that cells can be pooled."""
    model = bundle.load(run.model)
    judge = bundle.load(run.judge) if run.judge else None
    words = parse_words(run.concept)
    critic, found = concept_critic(model, run.concept, run.data, run.by)
    classifier = text_judge(model, run.data, words, run.num_chunks * model.chunk_size, run.seed)
    blocks, _ = validation_blocks(model.prepared_data(run.data), model.block_tokens, run.split, None)
    if len(blocks) < run.prompts:
        raise UsageError(f"align: {run.prompts} prompts need as many blocks of {run.split}, which has {len(blocks)}")
    prompts = [block[: run.prompt_tokens] for block in blocks[np.arange(run.prompts) * len(blocks) // run.prompts]]
    options: dict[str, Any] = dict(max_tokens=run.num_chunks * model.chunk_size, judge=judge, seed=run.seed)
    comparison = Comparison(model, run.seal, prompts, critic, **options)
    adaptation = comparison.adapt(critic)
    aligned = comparison.best(adaptation.changes)
    variants = {"standard": (comparison.standard, comparison.cost.text), "aligned": (aligned, comparison.cost.total)}
    variants |= {name: comparison.control(name, adaptation, aligned) for name in CONTROLS}
    return {
        "concept": run.concept,
        "steps": run.seal.inner_steps,
        "seed": run.seed,
        "found_in": found,
        "classifier_area": classifier.area,
        "texts_of_best": comparison.cost.texts,
        "fluency_of": comparison.fluency_of,
        "reward_before": float(adaptation.before.mean()),
        "reward_after": float(adaptation.after.mean()),
        "drift": float(adaptation.drift.mean()),
        "ways": {name: measured(comparison, texts, flops, classifier, words) for name, (texts, flops) in variants.items()},
        "example": {name: comparison.decoded(texts)[0] for name, (texts, _) in variants.items()},
    }


def measured(
    comparison: Comparison, written: Continuations, flops: float, classifier: TextJudge, words: Sequence[str]
) -> dict[str, Any]:
    """FLOPs, reward, and [sum, count] of each measure for every text."""
    texts, count = comparison.decoded(written), len(written.chunks)
    fluency = comparison.fluency(written)
    ones = np.ones(count)
    single = {part for word in words for part in words_of(word)}
    pairs = {
        "judge": np.stack([classifier(texts), ones], axis=1),
        "fluency": np.stack([np.nan_to_num(fluency), np.isfinite(fluency)], axis=1),
        "repeated": repeated(list(comparison.tokens(written)), REPEATED),
        "concept words": word_counts(texts, single),
        "function words": word_counts(texts, STOP_WORDS),
    }
    return {"flops": flops, "reward": written.rewards[:, 0].tolist(), **{name: pair.tolist() for name, pair in pairs.items()}}


def text_judge(model: bundle.Bundle, data: str, words: Sequence[str], length: int, seed: int) -> TextJudge:
    """Classifier of passages of `length` tokens of the valid split: with a word of the concept, against the others."""
    opened = model.prepared_data(data)
    valid = opened.split("valid")
    count = valid.num_tokens // length
    if not count:
        raise UsageError(f"align: the valid split has {valid.num_tokens} tokens, fewer than a text of {length}")
    passages = valid.read(0, count * length).reshape(count, length)
    held = chunks_with(words, passages, length, model.tokenizer)[:, 0]
    texts = [model.tokenizer.decode(passage) for passage in passages]
    kinds = [[text for text, has in zip(texts, held, strict=True) if has == kind] for kind in (True, False)]
    return fit_judge(*kinds, hidden={part for word in words for part in words_of(word)}, seed=seed)


# -- the study --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AlignmentStudy:
    """Concepts by numbers of inner steps, and a picture of gain against cost."""

    steps: tuple[int, ...] = STEPS
    options: ClassVar[frozenset[str]] = frozenset(("data", "model", "concept", "judge", "split", "texts"))

    def cells(self, request: Request) -> dict[str, AlignmentRun]:
        """`CONCEPT-steps-STEPS` -> its configuration, named by the concept's first word."""
        if request.model is None:
            raise UsageError(f"experiment {request.name}: needs --model, the run of a latent language model")
        concepts = tuple(request.concepts) or CONCEPTS
        if len(set(map(_short, concepts))) < len(concepts):
            raise UsageError(f"experiment {request.name}: two concepts begin with the same word, and cells are named by it")
        base = AlignmentRun(
            model=request.model, data=str(request.data), judge=request.score.judge or "", split=request.score.split
        )
        base = dataclasses.replace(base, prompts=request.score.texts or base.prompts)
        return {
            f"{_short(concept)}-steps-{steps}": dataclasses.replace(base, concept=concept, seal=SealConfig(inner_steps=steps))
            for concept in concepts
            for steps in self.steps
        }

    def run(self, request: Request) -> dict[str, Any]:
        """One cell for each concept, number of inner steps and seed."""
        cells, results = self.cells(request), []
        for seed, name in itertools.product(request.seeds, request.chosen(list(cells))):
            request.log(f"{name} seed {seed}")
            run = dataclasses.replace(cells[name], seed=seed)
            result = cell_result(cell_folder(request.out, name, seed), run, functools.partial(run_cell, run), request.log)
            if result is not None:
                results.append({"cell": name, **rolled_back(result)})
        if not results:
            return request.written([], f"{request.name}: no cell is done yet")
        picture(results, request.out / f"{request.name}.png")
        return request.written(results, report(results, request.title))


def rolled_back(result: dict[str, Any]) -> dict[str, Any]:
    """A cell's result with the variant `ROLLED_BACK` added: aligned texts, replaced by the standard ones where they read much
    worse. Its FLOPs include the standard text, but not the judge's reading."""
    standard, aligned = (result["ways"][way] for way in ("standard", "aligned"))
    bits = [np.asarray(way["fluency"], np.float64)[:, 0] for way in (standard, aligned)]
    back = Brakes(max_loss=MOST_LOSS).reads_too_badly(bits[1], bits[0]).tolist()
    kept = {"flops": aligned["flops"] + standard["flops"]}
    for name in ("reward", *MEASURES):
        kept[name] = [one if at else two for one, two, at in zip(standard[name], aligned[name], back, strict=True)]
    ways = {}
    for name, way in result["ways"].items():
        ways |= {name: way} | ({ROLLED_BACK: kept} if name == "aligned" else {})
    return result | {"ways": ways, "share_rolled_back": float(np.mean(back))}


def pooled(results: Sequence[dict[str, Any]], way: str, measure: str) -> BlockSums:
    """A measure of one variant over cells; the unit is a prompt, with its texts of all concepts and seeds."""
    totals = np.sum([np.asarray(result["ways"][way][measure], np.float64) for result in results], axis=0)
    return BlockSums(total=totals[:, :1], count=totals[:, 1], document=np.arange(len(totals)), block_tokens=1024)


def _mean(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def against(results: Sequence[dict[str, Any]], one: str, two: str) -> Interval:
    """Difference of two variants in the classifier's log-odds, prompt by prompt."""
    first, second = (pooled(results, way, "judge") for way in (one, two))
    return paired_bootstrap(first, second, [_mean])[0]


def report(results: Sequence[dict[str, Any]], title: str) -> str:
    """A table for each number of steps, and a sentence on whether weight updates beat best of S."""
    parts = [title]
    for steps in dict.fromkeys(result["steps"] for result in results):
        own = [result for result in results if result["steps"] == steps]
        rows = []
        for way in own[0]["ways"]:
            row = [_named(way, own)]
            row.append("-" if way == "standard" else interval_text(against(own, way, "standard"), 2))
            row += [interval_text(_interval(own, way, "fluency"), 2)]
            row += [interval_text(_percent(_interval(own, way, name)), 1) for name in MEASURES[2:]]
            rows.append([*row, f"{np.mean([result['ways'][way]['flops'] for result in own]):.3g}"])
        header = ["text", "gain by classifier", own[0]["fluency_of"], f"repeated {REPEATED}-grams %", "concept words %"]
        parts.append(
            f"{steps} inner steps: {len(own)} cells of {len(own[0]['ways']['standard']['reward'])} prompts; critic's reward "
            f"{_average(own, 'reward_before')} -> {_average(own, 'reward_after')}, drift {_average(own, 'drift')}, "
            f"classifier's area under the curve {_average(own, 'classifier_area')}"
        )
        parts.append(table([*header, "function words %", "FLOPs"], rows))
        parts += [verdict(own, "aligned"), verdict(own, ROLLED_BACK), by_concept(own)]
    return "\n\n".join([*parts, "95 % intervals, bootstrap over prompts; gain in log-odds over the standard text"])


def verdict(results: Sequence[dict[str, Any]], way: str) -> str:
    """Comparison of adapted texts with best of S at equal FLOPs, and their cost in fluency, in a sentence each."""
    difference = against(results, way, BEST)
    said = "do not differ from" if not difference.excludes_zero else "beat" if difference.estimate > 0 else "lose to"
    count = round(np.mean([result["texts_of_best"] for result in results]))
    cost = fluency_cost(results, way)
    words = "Weight updates"
    if way == ROLLED_BACK:
        share = np.mean([result["share_rolled_back"] for result in results])
        words += f", undone where a text reads more than {MOST_LOSS:.0%} worse ({share:.0%} of them),"
    return (
        f"{words} {said} the best of {count} texts at equal FLOPs: {interval_text(difference, 2)} by the classifier. "
        f"Fluency costs them {interval_text(_percent(cost), 1)} % more than the standard text."
    )


def by_concept(results: Sequence[dict[str, Any]]) -> str:
    """Table by concept; a mean over concepts can hide texts that read easily because they repeat themselves."""
    rows = []
    for concept in dict.fromkeys(result["concept"] for result in results):
        own = [result for result in results if result["concept"] == concept]
        for way in ("aligned", ROLLED_BACK, BEST):
            gain, cost = against(own, way, "standard"), fluency_cost(own, way)
            shares = [cost, *(_interval(own, way, name) for name in ("repeated", "function words"))]
            rows.append([concept, way, interval_text(gain, 2), *(interval_text(_percent(share), 1) for share in shares)])
    return table(["concept", "text", "gain", "fluency cost %", f"repeated {REPEATED}-grams %", "function words %"], rows)


def fluency_cost(results: Sequence[dict[str, Any]], way: str) -> Interval | None:
    """Relative loss of fluency of a variant's texts against the standard ones, prompt by prompt; None without texts."""
    own, standard = (pooled(results, each, "fluency") for each in (way, "standard"))
    if not (own.count.sum() and standard.count.sum()):
        return None
    mean = float(standard.total.sum() / standard.count.sum())
    return paired_bootstrap(own, standard, [_mean])[0].scaled(1 / mean)


def picture(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Left: gain by the classifier against FLOPs; right: fluency against FLOPs. Lines join numbers of inner steps."""
    figure = new_figure(8.6, 3.4)
    panels = figure.subplots(1, 2)
    steps = sorted({result["steps"] for result in results})
    ways = list(results[0]["ways"])
    for colour, way in zip(COLOURS, ways, strict=False):
        cost, panes = [], ([], [])
        for number in steps:
            own = [result for result in results if result["steps"] == number]
            cost.append(float(np.mean([result["ways"][way]["flops"] for result in own])))
            panes[0].append(against(own, way, "standard"))
            panes[1].append(_interval(own, way, "fluency"))
        for axes, found in zip(panels, panes, strict=True):
            values = [interval or NO_INTERVAL for interval in found]
            spans = [[max(i.estimate - i.low, 0) for i in values], [max(i.high - i.estimate, 0) for i in values]]
            style: dict[str, Any] = dict(fmt="o-", color=colour, markersize=3, linewidth=1, capsize=2, label=way)
            axes.errorbar(cost, [i.estimate for i in values], yerr=np.nan_to_num(spans), **style)
    for axes, title in zip(panels, ("gain over the standard text, log-odds", results[0]["fluency_of"]), strict=True):
        axes.set_xscale("log")
        tidy(axes, title, "FLOPs for a text, adaptation included", "")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(out)


def _interval(results: Sequence[dict[str, Any]], way: str, measure: str) -> Interval | None:
    """Mean of a measure over the prompts in which it counts anything, such as texts with a word; None without any."""
    sums = pooled(results, way, measure)
    some = sums.count > 0
    if not some.any():
        return None
    sums = dataclasses.replace(sums, total=sums.total[some], count=sums.count[some], document=sums.document[some])
    return bootstrap(sums, [_mean])[0]


def _percent(interval: Interval | None) -> Interval | None:
    return interval and interval.scaled(100.0)


def _named(way: str, results: Sequence[dict[str, Any]]) -> str:
    return f"best of {round(np.mean([result['texts_of_best'] for result in results]))}" if way == BEST else way


def _average(results: Sequence[dict[str, Any]], name: str) -> str:
    return f"{np.mean([result[name] for result in results]):.3f}"


def _short(concept: str) -> str:
    """A concept's first word, as a name of folders."""
    return re.sub(r"\W+", "-", parse_words(concept)[0].lower())
