"""Does changing weights for a prompt say more of what is wanted than the same FLOPs spent otherwise?

For every concept, number of inner steps and seed, held-out prompts are continued in every way of `calm.alignment`: standard,
aligned, and by each control; best of S has as many texts as the adaptation and its one text cost. What counts is the opinion
of a classifier of decoded text that was trained on another split, does not see the concept's own words, and is never optimised
(`calm.ttt.text_judge`). Beside it stand fluency by an independent token model, repetition, and the shares of the concept's
words and of function words. Intervals are bootstraps over prompts; ways are compared prompt by prompt.

What the critic knows of a concept comes from the train split, what the classifier knows from valid, and the prompts from the
split that is scored.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calm.core.intervals import BlockSums, Interval, bootstrap, paired_bootstrap
from calm.errors import UsageError
from calm.evaluate.diversity import repeated
from calm.evaluate.plots import COLOURS, _figure, _tidy
from calm.evaluate.quality_report import REPEATED
from calm.evaluate.tables import interval_text, table
from calm.runs import bundle
from calm.runs.stages import validation_blocks
from calm.studies.runner import cell_folder
from calm.studies.study import Request, cell_result
from calm.ttt import align as alignment
from calm.ttt.align import CONTROLS, Writer
from calm.ttt.brakes import Brakes
from calm.ttt.concept import chunks_with, parse_words
from calm.ttt.seal import Acted, SealConfig
from calm.ttt.text_judge import TextJudge, fit_judge
from calm.ttt.word_shares import STOP_WORDS, word_counts, words_of

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
"""aligned texts, with the standard one in the place of those that read worse by more than this share (`Brakes.max_loss`)"""
NOTHING_TO_SAY = Interval(estimate=float("nan"), low=float("nan"), high=float("nan"))
MEASURES = ("judge", "fluency", "repeated", "concept words", "function words")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """One cell."""

    model: str = ""
    """run of a latent language model"""
    data: str = ""
    judge: str = ""
    """run of a token model, or none"""
    concept: str = CONCEPTS[0]
    by: alignment.By = "auto"
    """how the critic judges a concept (`calm.alignment.wanted_critic`)"""
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
    """Writes in every way and measures every text: sums and counts for each prompt, so that cells can be pooled."""
    model = bundle.load(run.model)
    judge = bundle.load(run.judge) if run.judge else None
    words = parse_words(run.concept)
    critic, found = alignment.wanted_critic(model, run.concept, run.data, run.by)
    classifier = text_judge(model, run.data, words, run.num_chunks * model.chunk_size, run.seed)
    blocks, _ = validation_blocks(model.prepared_data(run.data), model.block_tokens, run.split, None)
    if len(blocks) < run.prompts:
        raise UsageError(f"align: {run.prompts} prompts need as many blocks of {run.split}, which has {len(blocks)}")
    prompts = [block[: run.prompt_tokens] for block in blocks[np.arange(run.prompts) * len(blocks) // run.prompts]]
    options: dict[str, Any] = dict(max_tokens=run.num_chunks * model.chunk_size, judge=judge, seed=run.seed)
    writer = Writer(model, run.seal, prompts, critic, **options)
    rewired = writer.rewire(critic)
    aligned = writer.best(rewired.changes)
    written = {"standard": (writer.standard, writer.cost.text), "aligned": (aligned, writer.cost.total)}
    written |= {name: writer.control(name, rewired, aligned) for name in CONTROLS}
    return {
        "concept": run.concept,
        "steps": run.seal.inner_steps,
        "seed": run.seed,
        "found_in": found,
        "classifier_area": classifier.area,
        "texts_of_best": writer.cost.texts,
        "fluency_of": writer.fluency_of,
        "reward_before": float(rewired.before.mean()),
        "reward_after": float(rewired.after.mean()),
        "drift": float(rewired.drift.mean()),
        "ways": {name: measured(writer, acted, flops, classifier, words) for name, (acted, flops) in written.items()},
        "example": {name: writer.decoded(acted)[0] for name, (acted, _) in written.items()},
    }


def measured(writer: Writer, acted: Acted, flops: float, classifier: TextJudge, words: Sequence[str]) -> dict[str, Any]:
    """Of every text: [sum, count] of each measure."""
    texts, count = writer.decoded(acted), len(acted.chunks)
    fluency = writer.fluency(acted)
    ones = np.ones(count)
    single = {part for word in words for part in words_of(word)}
    pairs = {
        "judge": np.stack([classifier(texts), ones], axis=1),
        "fluency": np.stack([np.nan_to_num(fluency), np.isfinite(fluency)], axis=1),
        "repeated": repeated(list(writer.tokens(acted)), REPEATED),
        "concept words": word_counts(texts, single),
        "function words": word_counts(texts, STOP_WORDS),
    }
    return {"flops": flops, "reward": acted.rewards[:, 0].tolist(), **{name: pair.tolist() for name, pair in pairs.items()}}


def text_judge(model: bundle.Bundle, data: str, words: Sequence[str], length: int, seed: int) -> TextJudge:
    """A classifier of passages of `length` tokens of the valid split: those with a word of the concept against the others."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentStudy:
    """Concepts by numbers of inner steps, and a picture of gain against cost."""

    summary: str = "weight updates for a prompt against the same FLOPs spent otherwise"
    options: frozenset[str] = frozenset(("data", "model", "concept", "judge", "split", "texts"))
    steps: tuple[int, ...] = STEPS

    def run(self, request: Request) -> dict[str, Any]:
        """One cell for each concept, number of inner steps and seed."""
        if request.model is None:
            raise UsageError(f"experiment {request.name}: needs --model, the run of a latent language model")
        concepts = tuple(request.concepts) or CONCEPTS
        cells = {f"{_short(concept)}-steps-{steps}": (concept, steps) for concept in concepts for steps in self.steps}
        if len(cells) < len(concepts) * len(self.steps):
            raise UsageError(f"experiment {request.name}: two concepts begin with the same word, and cells are named by it")
        results = []
        for seed in request.seeds:
            for name in request.chosen(list(cells)):
                concept, steps = cells[name]
                settings = dict(model=request.model, data=str(request.data), judge=request.score.judge or "", concept=concept)
                chosen = dict(split=request.score.split, seed=seed, seal=SealConfig(inner_steps=steps))
                prompts: dict[str, Any] = {"prompts": request.score.texts} if request.score.texts else {}
                run = AlignmentRun(**settings, **chosen, **prompts)
                work: Callable[[], dict[str, Any]] = lambda run=run: run_cell(run)  # noqa: E731
                request.say(f"{name} seed {seed}")
                result = cell_result(cell_folder(request.out, name, seed), run, work, request.say)
                results += [] if result is None else [{"cell": name, **rolled_back(result)}]
        if not results:
            return request.written([], f"{request.name}: no cell is done yet")
        picture(results, request.out / f"{request.name}.png")
        return request.written(results, summary_of(results, f"{request.name}: {self.summary}"))


def rolled_back(result: dict[str, Any]) -> dict[str, Any]:
    """A cell's result with one way more, behind the aligned texts: those of them that do not read much worse, else the
    standard ones. It costs the standard text as well; what the judge's reading costs is not counted."""
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
    """A measure of one way over cells, one unit a prompt: a prompt's texts of different concepts and seeds go together."""
    totals = np.sum([np.asarray(result["ways"][way][measure], np.float64) for result in results], axis=0)
    return BlockSums(total=totals[:, :1], count=totals[:, 1], document=np.arange(len(totals)), block_tokens=1024)


def _mean(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def against(results: Sequence[dict[str, Any]], one: str, two: str) -> Interval:
    """The difference of two ways in the classifier's log-odds, prompt by prompt."""
    first, second = (pooled(results, way, "judge") for way in (one, two))
    return paired_bootstrap(first, second, [_mean])[0]


def summary_of(results: Sequence[dict[str, Any]], title: str) -> str:
    """A table for each number of steps, and in words whether weight updates are above best of S."""
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
    """Whether texts of changed weights are above best of S at equal FLOPs, and what fluency they cost, in a sentence each."""
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
    """Concept by concept: a mean over concepts can hide texts that read easily because they repeat themselves."""
    rows = []
    for concept in dict.fromkeys(result["concept"] for result in results):
        own = [result for result in results if result["concept"] == concept]
        for way in ("aligned", ROLLED_BACK, BEST):
            gain, cost = against(own, way, "standard"), fluency_cost(own, way)
            shares = [cost, *(_interval(own, way, name) for name in ("repeated", "function words"))]
            rows.append([concept, way, interval_text(gain, 2), *(interval_text(_percent(share), 1) for share in shares)])
    return table(["concept", "text", "gain", "fluency cost %", f"repeated {REPEATED}-grams %", "function words %"], rows)


def fluency_cost(results: Sequence[dict[str, Any]], way: str) -> Interval | None:
    """By what share a way's texts read worse than the standard ones, prompt by prompt."""
    own, standard = (pooled(results, each, "fluency") for each in (way, "standard"))
    if not (own.count.sum() and standard.count.sum()):
        return None
    mean = float(standard.total.sum() / standard.count.sum())
    return paired_bootstrap(own, standard, [_mean])[0].scaled(1 / mean)


def picture(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Left: gain by the classifier against FLOPs; right: fluency against FLOPs. Lines join numbers of inner steps."""
    figure = _figure(8.6, 3.4)
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
            values = [interval or NOTHING_TO_SAY for interval in found]
            spans = [[max(i.estimate - i.low, 0) for i in values], [max(i.high - i.estimate, 0) for i in values]]
            style: dict[str, Any] = dict(fmt="o-", color=colour, markersize=3, linewidth=1, capsize=2, label=way)
            axes.errorbar(cost, [i.estimate for i in values], yerr=np.nan_to_num(spans), **style)
    for axes, title in zip(panels, ("gain over the standard text, log-odds", results[0]["fluency_of"]), strict=True):
        axes.set_xscale("log")
        _tidy(axes, title, "FLOPs for a text, adaptation included", "")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(out)


def _interval(results: Sequence[dict[str, Any]], way: str, measure: str) -> Interval | None:
    """None where there is nothing to count, as in texts without a word."""
    sums = pooled(results, way, measure)
    return bootstrap(sums, [_mean])[0] if sums.count.sum() else None


def _percent(interval: Interval | None) -> Interval | None:
    return interval and interval.scaled(100.0)


def _named(way: str, results: Sequence[dict[str, Any]]) -> str:
    return f"best of {round(np.mean([result['texts_of_best'] for result in results]))}" if way == BEST else way


def _average(results: Sequence[dict[str, Any]], name: str) -> str:
    return f"{np.mean([result[name] for result in results]):.3f}"


def _short(concept: str) -> str:
    """A name for folders."""
    return re.sub(r"\W+", "-", parse_words(concept)[0].lower())
