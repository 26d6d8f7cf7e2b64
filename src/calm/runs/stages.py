"""The two stages of training, from a configuration and prepared data to a finished run folder.

`calm.runs.token_stage` has the token baseline's, which shares all but the model.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from calm import config as configuration
from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.brier_lm import TextProtocol
from calm.core.dense import Precision
from calm.core.generate import generate
from calm.core.latent_lm import LatentLM, LatentLMConfig
from calm.core.objective import AutoencoderLossConfig, AutoencoderObjective, LatentLossConfig, LatentObjective
from calm.core.predictor import NextVector, Predictor
from calm.core.sampler import PlainSampler, Sampler
from calm.core.temperature import BatchTemperature
from calm.errors import UsageError
from calm.evaluate.blocks import text_protocol
from calm.evaluate.brier import evaluate_predictor
from calm.evaluate.reconstruction import evaluate_autoencoder
from calm.registry import Registered
from calm.rng import row_keys, stream
from calm.runs import schema
from calm.runs.folders import export_autoencoder, load_exported_autoencoder
from calm.runs.init_from import StartingPoint, open_exported, readable
from calm.text.batches import Batches, evaluation_blocks
from calm.text.continuation import continuation_text
from calm.text.manifest import read_manifest
from calm.text.prompted_batches import PromptedBatches
from calm.text.shards import Data, open_data
from calm.text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenLossConfig, TokenObjective
from calm.train.checkpoint import load_parameters
from calm.train.loop import TrainResult, train
from calm.train.mesh import initialize_distributed
from calm.train.protocol import Evaluate, Measured
from calm.train.run_folder import RunFolder, best_step
from calm.train.settings import TrainConfig, settle_precision
from calm.train.validate import validator

AUTOENCODER = "autoencoder"
MAX_VALIDATION_TOKENS = 64 * 1024


class RunConfig(Registered, family="run"):
    """Family of the runs' configurations; each is written as config.toml into its run folder, where it alone reproduces it."""

    @classmethod
    def from_schema_1(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table of a file of schema 1, as `calm.config` reads it today."""
        return schema.run({"kind": cls.kind, **table} if cls.kind else table)


@RunConfig.register("autoencoder")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderRun(RunConfig):
    """All of stage 1."""

    data: str = ""
    """folder of prepared data"""
    model: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    train: TrainConfig = TrainConfig()


@RunConfig.register("latent_lm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLMRun(RunConfig):
    """All of stage 2."""

    data: str = ""
    """folder of prepared data"""
    autoencoder: str = ""
    """run folder, or exported folder, of the trained autoencoder"""
    model: LatentLMConfig = LatentLMConfig()
    loss: LatentLossConfig = LatentLossConfig()
    train: TrainConfig = TrainConfig()


@RunConfig.register("token_lm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLMRun(RunConfig):
    """All of the token baseline."""

    data: str = ""
    """folder of prepared data"""
    model: TokenLMConfig = TokenLMConfig()
    loss: TokenLossConfig = TokenLossConfig()
    train: TrainConfig = TrainConfig()


Run = AutoencoderRun | LatentLMRun | TokenLMRun


def train_autoencoder(run: AutoencoderRun, out: str | Path, resume: str = "auto", *, quiet: bool = False) -> dict[str, Any]:
    """Trains stage 1 into the run folder `out` and exports the result to `out/export`. Returns its held-out accuracy."""
    initialize_distributed()
    data = open_named(run.data, "data")
    run = dataclasses.replace(run, model=filled(run.model, vocab_size=data.tokenizer.vocab_size))
    precision, rates = settle_precision(run.train.precision, out)
    objective = AutoencoderObjective(run.model, run.loss, mask_id=data.tokenizer.mask_id, precision=precision)
    blocks, documents = validation_blocks(data, run.train.num_tokens, "valid", MAX_VALIDATION_TOKENS)
    text = validation_protocol(run, data)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        module = objective.module(params)
        return evaluate_autoencoder(module, blocks, documents, evaluation_key(run), text=text).scalars()

    def attach() -> None:
        data.tokenizer.save(Path(out) / "tokenizer.json")

    result = run_training(objective, run, data, out, resume, precision, rates, quiet, attach, evaluate=evaluate)
    export_autoencoder(objective.module(best_parameters(out, objective)), Path(out) / "export")
    return {"run": str(out), "step": result.step, **result.metrics}


def train_lm(
    run: LatentLMRun, out: str | Path, resume: str = "auto", *, init_from: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Trains stage 2 into the run folder `out`, which also keeps a copy of the frozen autoencoder. Returns its scores.

    `init_from` is a run, or an exported folder, whose weights it begins with; its model and its autoencoder are then used.
    """
    initialize_distributed()
    data = open_named(run.data, "data")
    if bool(run.autoencoder) == bool(init_from):
        raise UsageError(
            f"init-from {init_from}: brings its own autoencoder; leave autoencoder={run.autoencoder} out"
            if init_from
            else "autoencoder: name the run folder of a trained autoencoder (`calm train autoencoder` makes one)"
        )
    precision, rates = settle_precision(run.train.precision, out)
    goes_on = holds_run(out)  # then with the autoencoder that it began with
    start = starting_point(init_from, precision) if init_from else None
    if start is not None:
        start.require_tokenizer_of(data)
        run = dataclasses.replace(run, model=start.model(run.model))
    if start is not None and not goes_on:
        assert start.autoencoder is not None
        autoencoder, tokenizer = start.autoencoder, start.tokenizer
    else:
        autoencoder, tokenizer = load_autoencoder(out if goes_on else run.autoencoder, precision)
    if tokenizer is not None:
        require_same_tokenizer(
            data.tokenizer.fingerprint, tokenizer.fingerprint, f"data {data.folder}", run.autoencoder or init_from
        )
    sizes = {name: getattr(autoencoder.config, name) for name in ("vocab_size", "chunk_size", "latent_dim")}
    run = dataclasses.replace(run, model=filled(run.model, **sizes))
    context = _chunks(run.train.num_tokens, run.model.chunk_size)
    objective = LatentObjective(run.model, run.loss, autoencoder, context=context, precision=precision)
    blocks, documents = validation_blocks(data, run.train.num_tokens, "valid", MAX_VALIDATION_TOKENS)
    text = validation_protocol(run, data)

    validate = validator(objective, counted_blocks(data, run, blocks), evaluation_key(run), run.train.steps)

    def evaluate(params: Any, step: int) -> dict[str, Measured]:
        predictor = NextVector(autoencoder, objective.module(params))
        options: dict[str, Any] = dict(begin_id=data.tokenizer.begin_id, decoding=predictor.decoding, text=text)
        return validate(params) | evaluate_predictor(predictor, blocks, documents, evaluation_key(run), **options).scalars()

    def sample(params: Any, step: int) -> str:
        at_half = BatchTemperature(num_candidates=100)
        return samples(NextVector(autoencoder, objective.module(params)), data, run.train.num_tokens, at_half)

    def attach() -> None:  # before the first checkpoint, so that a run folder is complete from the start
        data.tokenizer.save(Path(out) / "tokenizer.json")
        if not goes_on:
            export_autoencoder(autoencoder, Path(out) / AUTOENCODER)

    hooks: dict[str, Any] = dict(evaluate=evaluate, sample=sample, start=start)
    result = run_training(objective, run, data, out, resume, precision, rates, quiet, attach, **hooks)
    return {"run": str(out), "step": result.step, **result.metrics}


def load_run_config(folder: str | Path) -> Run:
    """The configuration that a run folder holds."""
    path = Path(folder) / "config.toml"
    if not path.is_file():
        raise UsageError(f"{folder}: not a run folder (no config.toml); `calm train` and `calm quickstart` make one")
    return cast(Run, configuration.from_dict(RunConfig, configuration.read_toml(path), where=str(path)))


def load_autoencoder(folder: str | Path, precision: Precision = "float32") -> tuple[Autoencoder, Tokenizer | None]:
    """A trained autoencoder with its tokenizer, from a stage-1 run (its best checkpoint), a stage-2 run or an export."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"autoencoder {folder}: no such folder")
    if (folder / "config.json").is_file() or (folder / AUTOENCODER / "config.json").is_file():
        return load_exported_autoencoder(folder, precision), tokenizer_of(folder)
    run = load_run_config(folder)
    if not isinstance(run, AutoencoderRun):
        raise UsageError(f"autoencoder {folder}: holds a language model and no autoencoder")
    # the mask id matters in training only
    objective = AutoencoderObjective(run.model, run.loss, mask_id=0, precision=precision)
    return objective.module(best_parameters(folder, objective)), tokenizer_of(folder)


def load_lm(folder: str | Path, precision: Precision = "float32") -> tuple[LatentLM, Autoencoder, Tokenizer | None]:
    """A trained language model with its autoencoder and tokenizer, from a stage-2 run (its best checkpoint)."""
    run = load_run_config(folder)
    if not isinstance(run, LatentLMRun):
        raise UsageError(f"{folder}: holds a run of kind {run.kind}, not a latent language model")
    autoencoder = load_exported_autoencoder(Path(folder) / AUTOENCODER, precision)
    context = _chunks(run.train.num_tokens, run.model.chunk_size)
    objective = LatentObjective(run.model, run.loss, autoencoder, context=context, precision=precision)
    return objective.module(best_parameters(folder, objective)), autoencoder, tokenizer_of(Path(folder))


def best_parameters(folder: str | Path, objective: Any) -> Any:
    """All trained weights of a run's best checkpoint, or of its last where none was named best."""
    target = jax.eval_shape(objective.init, jax.random.key(0))
    return load_parameters(Path(folder) / "checkpoints", best_step(folder), target)


def validation_blocks(data: Data, num_tokens: int, split: str, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a split to score, from its start, and the documents they begin in; the whole split if `max_tokens` is None."""
    blocks = None if max_tokens is None else max(1, max_tokens // num_tokens)
    return evaluation_blocks(data.split(split), num_tokens=num_tokens, max_blocks=blocks)


def run_training(
    objective: Any,
    run: Run,
    data: Data,
    out: str | Path,
    resume: str,
    precision: Precision,
    rates: Any,
    quiet: bool,
    attach: Callable[[], None],
    *,
    evaluate: Evaluate,
    sample: Callable[[Any, int], str] | None = None,
    start: StartingPoint | None = None,
) -> TrainResult:
    _chunks(run.train.num_tokens, run.model.chunk_size)
    train_split, hosts = data.split("train"), dict(host_index=jax.process_index(), host_count=jax.process_count())
    # An autoencoder codes every chunk; a language model is asked for responses alone.
    kind = PromptedBatches if train_split.has_prompts and not isinstance(run, AutoencoderRun) else Batches
    batches = kind(train_split, **_layout(data, run), **hosts)
    facts = {
        "tokenizer": data.tokenizer.fingerprint,
        "data": {"source": data.manifest.source, "splits": {k: v["tokens"] for k, v in data.manifest.splits.items()}},
        "data_from_run": os.path.relpath(data.folder, out),  # so that the run finds its data from any directory
        "data_fingerprint": data.manifest.fingerprint,
        "parameters": run.model.parameters(),
        "init_from": None if start is None else start.where,
        "flops": {
            "per_token": objective.flops_per_token(),
            "tokens": run.train.steps * run.train.batch_size * run.train.num_tokens,
            "before": _flops_before(run, out),
        },
    }
    return train(
        objective,
        batches,
        run.train,
        out,
        config_text=configuration.to_toml(run),
        attach=attach,
        evaluate=evaluate,
        sample=sample,
        resume=resume,
        precision=precision,
        rates=rates,
        facts=facts,
        initial=None if start is None or holds_run(out) else start.initial(objective, run.train.seed),
        quiet=quiet,
    )


def _flops_before(run: Run, out: str | Path) -> float:
    """FLOPs of the autoencoder that a latent language model was trained on, where its run says them; 0 where nobody knows."""
    if not isinstance(run, LatentLMRun) or not run.model.has_latents:
        return 0.0
    recorded = RunFolder(out, writes=False).read_meta().get("flops")
    if recorded is not None:  # the run goes on: the autoencoder's folder may be gone by now
        return float(recorded["before"])
    stage_1 = RunFolder(run.autoencoder, writes=False).read_meta().get("flops")
    return 0.0 if stage_1 is None else float(stage_1["per_token"] * stage_1["tokens"])


def counted_blocks(data: Data, run: LatentLMRun | TokenLMRun, blocks: np.ndarray) -> np.ndarray:
    """Validation batches: `blocks`; of prompts and responses, rows as in training, in which responses count."""
    valid = data.split("valid")
    if not valid.has_prompts:
        return blocks
    return PromptedBatches(valid, **_layout(data, run)).in_order(len(blocks))


def _layout(data: Data, run: Run) -> dict[str, int]:
    return dict(
        batch_size=run.train.batch_size,
        num_tokens=run.train.num_tokens,
        chunk_size=run.model.chunk_size,
        begin_id=data.tokenizer.begin_id,
        seed=run.train.seed,
    )


def holds_run(out: str | Path) -> bool:
    """Whether a run folder has checkpoints to go on from."""
    return any((Path(out) / "checkpoints").glob("*"))


def starting_point(folder: str | Path, precision: Precision = "float32") -> StartingPoint:
    """The trained language model of a run (its best checkpoint) or of an exported folder, to begin from.

    Raises:
        UsageError: no such model, or files that are damaged, cut short or do not fit each other.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return open_exported(folder, precision)
    if not folder.is_dir():
        raise UsageError(f"init-from {folder}: no such folder; name a run or an exported model")
    run, autoencoder = load_run_config(folder), None
    if isinstance(run, AutoencoderRun):
        raise UsageError(f"init-from {folder}: holds an autoencoder, not a language model")
    context = _chunks(run.train.num_tokens, run.model.chunk_size)
    if isinstance(run, LatentLMRun):
        autoencoder = load_exported_autoencoder(folder / AUTOENCODER, precision)
        objective: Any = LatentObjective(run.model, run.loss, autoencoder, context=context, precision=precision)
    else:
        objective = TokenObjective(run.model, run.loss, context=context, precision=precision)
    with readable(folder):
        params = best_parameters(folder, objective)
    return StartingPoint(str(folder), run.model, params, autoencoder, tokenizer_of(folder))


def samples(predictor: Predictor, data: Data, num_tokens: int, at_half: Sampler) -> str:
    """Continuations of the first tokens of three validation documents at T = 1 and, by `at_half`, T = 1/2, with seed 0."""
    tokenizer, valid = data.tokenizer, data.split("valid")
    starts = [int(start) for start in valid.documents[:3]]
    prompts = [valid.read(start, min(32, valid.num_tokens - start)) for start in starts]
    parts = []
    for name, sampler in (("T=1", PlainSampler()), ("T=1/2", at_half)):
        keys = row_keys(jax.random.key(0), len(prompts))
        options: dict[str, Any] = dict(special=tokenizer, max_tokens=min(64, num_tokens), decoding=predictor.decoding)
        result = generate(predictor, prompts, keys, sampler=sampler, **options)
        for prompt, tokens, length in zip(prompts, result.tokens, result.lengths, strict=True):
            parts.append(f"[{name}] {tokenizer.decode(prompt)} >>> {continuation_text(tokenizer, prompt, tokens[:length])}")
    return "\n\n".join(parts)


def locate_data(run_folder: str | Path, data: str) -> str:
    """The folder of a run's data: as its configuration names it, or where it lies as seen from the run folder.

    A folder that holds other data than the run was trained on is passed over. Returns `data` where nothing is found, so that
    whoever opens it can say what to pass.
    """
    meta = RunFolder(run_folder, writes=False).read_meta()
    candidates = [Path(data)] if data else []
    if meta.get("data_from_run"):
        candidates.append(Path(run_folder) / meta["data_from_run"])
    for folder in candidates:
        if (folder / "manifest.json").is_file():
            known = meta.get("data_fingerprint")
            if known is None or read_manifest(folder).fingerprint == known:
                return str(folder)
    return data


def open_named(folder: str, key: str) -> Data:
    if not folder:
        raise UsageError(f"{key}: name a folder of prepared data (`calm data prepare` makes one)")
    return open_data(folder)


def filled(model: Any, **sizes: int) -> Any:
    """`model` with sizes that were left at 0 taken from what it is trained on; others must agree."""
    for name, size in sizes.items():
        if getattr(model, name) not in (0, size):
            raise UsageError(f"model.{name} is {getattr(model, name)}, but what it is trained on has {size}")
    return dataclasses.replace(model, **sizes)


def _chunks(num_tokens: int, chunk_size: int) -> int:
    if num_tokens % chunk_size or num_tokens < 2 * chunk_size:
        raise UsageError(f"chunk size K={chunk_size} must divide train.num_tokens={num_tokens} at least twice")
    return num_tokens // chunk_size


def validation_protocol(run: Run, data: Data) -> TextProtocol:
    sizes = dict(block_tokens=run.train.num_tokens, chunk_size=run.model.chunk_size)
    return text_protocol(data, "valid", **sizes, seed=run.train.seed)


def evaluation_key(run: Run) -> Any:
    return stream(jax.random.key(run.train.seed), "evaluate")


def tokenizer_of(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return load_tokenizer(path) if path.is_file() else None
