"""A trained model as one object: tokenizer, autoencoder and language model, text in and text out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.choose import DEFAULT_BUDGET, from_temperature
from calm.core.chunk_decoder import Decoding
from calm.core.generate import Generated
from calm.core.generate import generate as generate_tokens
from calm.core.generate import stream as stream_tokens
from calm.core.latent_lm import LatentLM
from calm.core.predictor import NextVector, Predictor
from calm.core.sampler import Sampler
from calm.errors import UsageError
from calm.evaluate.blocks import text_protocol
from calm.evaluate.brier import evaluate_predictor
from calm.evaluate.closed_form import evaluate_ngrams, evaluate_world
from calm.evaluate.kneser_ney_scores import evaluate_kneser_ney
from calm.evaluate.perplexity import ScoredText
from calm.evaluate.reconstruction import evaluate_autoencoder
from calm.rng import row_keys, stream
from calm.runs import saved_state
from calm.runs.folders import (
    LATENT_LM,
    TOKEN_LM,
    ModelCard,
    export_autoencoder,
    export_latent_lm,
    export_token_lm,
    load_exported_autoencoder,
    load_exported_latent_lm,
    load_exported_token_lm,
)
from calm.runs.stages import (
    LatentLMRun,
    TokenLMRun,
    load_autoencoder,
    load_lm,
    load_run_config,
    locate_data,
    validation_blocks,
)
from calm.runs.token_stage import load_token_lm
from calm.runs.weight_files import read_json
from calm.text.chunking import chunk_prompt
from calm.text.continuation import ContinuationText, continuation_text
from calm.text.shards import Data, open_data
from calm.text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer
from calm.text.tokenizer_spec import WORDS
from calm.token.model import TokenLM
from calm.token.sampler import softmax_sampler
from calm.train.matrix_rate import choose_precision
from calm.worlds.registry import world_of

DEFAULT_BLOCK_TOKENS = 1024
KNESER_NEY_TOKENS = 64 * 1024
"""held-out tokens that the Kneser-Ney baselines are fitted on"""
COUNTED_TOKENS = 32 * 1024**2
"""training tokens that they count at most; memory grows with them"""


def load(folder: str | Path, *, precision: Literal["auto", "float32", "bfloat16"] = "float32") -> "Bundle":
    """Loads a run folder of any kind (its best checkpoint), or a folder written by `calm export`."""
    folder = Path(folder)
    chosen = choose_precision(precision)
    autoencoder: Autoencoder | None = None
    lm: LatentLM | TokenLM | None = None
    if (folder / "config.json").is_file():
        description = read_json(folder / "config.json")
        kind, path = description.get("model_type"), folder / "tokenizer.json"
        tokenizer = load_tokenizer(path) if path.is_file() else None
        if kind == LATENT_LM:
            autoencoder, lm = load_exported_autoencoder(folder, chosen), load_exported_latent_lm(folder, chosen)
        elif kind == TOKEN_LM:
            lm = load_exported_token_lm(folder, chosen)
        else:
            autoencoder, tokenizer = load_autoencoder(folder, chosen)
        data, block_tokens = "", int(description.get("block_tokens", DEFAULT_BLOCK_TOKENS))
    else:
        run = load_run_config(folder)
        data, block_tokens = locate_data(folder, run.data), run.train.num_tokens
        if isinstance(run, LatentLMRun):
            lm, autoencoder, tokenizer = load_lm(folder, chosen)
        elif isinstance(run, TokenLMRun):
            lm, tokenizer = load_token_lm(folder, chosen)
        else:
            autoencoder, tokenizer = load_autoencoder(folder, chosen)
    if tokenizer is None:
        raise UsageError(f"{folder}: holds no tokenizer.json")
    return Bundle(folder=folder, tokenizer=tokenizer, autoencoder=autoencoder, lm=lm, data=data, block_tokens=block_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of generation."""

    max_tokens: int = 128
    """most tokens to add to a prompt"""
    temperature: float | str = 1.0
    """any number above 0, "1/3" included"""
    sampler: str | None = None
    """"batch" (chunks, by `candidates` draws each), "exact" (chunks of the exact distribution, at most `max_draws` each) or
    "best" (the chunk drawn most often); None = "batch", and the token's own probabilities for a token model"""
    candidates: int = 200
    max_draws: int = DEFAULT_BUDGET
    top_k: int | None = None
    """of chunks, or of tokens for a token model; so are top_p and min_p"""
    top_p: float | None = None
    min_p: float | None = None
    no_repeat: int | None = None
    """length of a run of tokens that is not written a second time"""
    ban: Sequence[str | int] = ()
    """token ids, or texts of one token each, that are never written"""
    decoding: Decoding | None = None
    """choice of tokens given a latent: "argmax" or "drawn"; None = as suits the model (`Predictor.decoding`)"""
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded model. `lm` is None for an autoencoder alone, `autoencoder` for a token model."""

    folder: Path
    tokenizer: Tokenizer
    autoencoder: Autoencoder | None
    lm: LatentLM | TokenLM | None
    data: str
    """folder of the data it was trained on, if known"""
    block_tokens: int
    """tokens of a training sequence: the longest prompt with its continuation"""

    def encode(self, text: str) -> Float[np.ndarray, "N Z"]:
        """The latents (posterior means) of a text, one per chunk of K tokens; the first is filled up with begin ids."""
        chunks = chunk_prompt(self.tokenizer.encode(text), self.chunk_size, self.tokenizer.begin_id)
        return np.asarray(self._require_autoencoder().encode(jax.numpy.asarray(chunks)).mean)

    def decode(self, latents: Float[np.ndarray, "N Z"]) -> str:
        """The text of latents: the most probable token at each place. Begin, end and mask ids are left out."""
        latents, autoencoder = np.asarray(latents, np.float32), self._require_autoencoder()
        if latents.ndim != 2 or latents.shape[1] != autoencoder.config.latent_dim:
            raise UsageError(f"latents must be [N {autoencoder.config.latent_dim}], got {list(latents.shape)}")
        return self.tokenizer.decode(np.asarray(autoencoder.decode(jax.numpy.asarray(latents))).reshape(-1))

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        config: GenerationConfig | None = None,
        *,
        stream: Callable[[str], None] | None = None,
        state: str | Path | None = None,
        save_state: str | Path | None = None,
        rewindable: bool = False,
        rewind: int = 0,
        **settings: Any,
    ) -> dict[str, Any]:
        """Continues each prompt; the empty prompt is unconditional.

        Args:
            config: settings of generation; by default those of `GenerationConfig()`.
            settings: fields of `GenerationConfig`, in place of those of `config`: `temperature=0.5`.
            stream: called with every piece of text as it comes; for one prompt.
            state: a file of `save_state`, which takes the place of the prompts; rewind: chunks that are taken back first.
            save_state: file to write the state after the prompts to, before they are continued (`calm.runs.saved_state`), with
                room for the rest of the context; rewindable: so that recurrences can be taken back too.
        Returns:
            texts, tokens (counts), ended, fallback_share and draws (see `calm.core.generate.Generated`), decoding.
        Raises:
            UsageError: options out of range, or that do not go together.
            OutOfDraws: the exact sampler accepted no chunk within its budget.
        """
        chosen = dataclasses.replace(config or GenerationConfig(), **settings)
        predictor = self.predictor
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UsageError("prompts: give at least one (the empty prompt is unconditional)")
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        saved = self._saved(ids, state, save_state, rewindable, rewind)
        rows = len(ids) if saved is None else len(saved.starts)
        read = (
            ids if saved is None else [row[start:].reshape(-1) for row, start in zip(saved.chunks, saved.starts, strict=True)]
        )
        keys = row_keys(jax.random.key(chosen.seed), rows)
        options: dict[str, Any] = dict(
            special=self.tokenizer,
            max_tokens=chosen.max_tokens,
            sampler=self._sampler(chosen),
            banned=[self.banned_id(each) for each in chosen.ban],
            decoding=chosen.decoding or self.predictor.decoding,
            context=self.block_tokens // self.chunk_size,
        )
        if stream is not None and rows != 1:
            raise UsageError(f"stream: takes one prompt, got {rows}")
        if saved is not None:
            del options["context"]  # the state has its room
            continued = saved_state.resume(predictor, saved, keys, **options)
            result = self._stream(continued, read[0], stream or (lambda _: None))
        elif stream is None:
            result = generate_tokens(predictor, ids, keys, **options)
        else:
            result = self._stream(stream_tokens(predictor, ids, keys, **options), read[0], stream)
        written = zip(read, result.tokens, result.lengths, strict=True)
        texts = [continuation_text(self.tokenizer, before, row[:length]) for before, row, length in written]
        return {
            "texts": texts,
            "tokens": result.lengths.tolist(),
            "ended": result.ended.tolist(),
            "fallback_share": [float(share) for share in result.fallback_share],
            "draws": result.draws.tolist(),
            "decoding": result.decoding,
        }

    def evaluate(
        self,
        data: str | Path | None = None,
        *,
        split: str = "valid",
        max_tokens: int | None = None,
        num_samples: int = 8,
        decoding: Decoding | None = None,
        boundary_every: int = 4,
        noise: Sequence[float] = (0.3,),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Held-out scores: reconstruction of the autoencoder and, with a language model, BrierLM beside n-gram baselines.

        `data` is a folder of prepared data, by default the one trained on; its tokenizer must be this model's. The n-gram
        models are fitted on what the model was trained on, where that is still at hand, else on the train split of `data`.
        `boundary_every`: tokens from one scored boundary to the next; 1 scores at every token, over all phases of the chunks.
        The entries `autoencoder`, `lm`, `unigram`, `bigram`, `kn5` and `kn5+cache` (Kneser-Ney 5-grams without and with a
        cache of the block) are report objects (`calm.evaluate.scores`), and so is `world`, the distribution of the text,
        where the data come from a world.
        """
        opened = self.prepared_data(data)
        blocks, documents = validation_blocks(opened, self.block_tokens, split, max_tokens)
        text = text_protocol(opened, split, block_tokens=self.block_tokens, chunk_size=self.chunk_size, seed=seed)
        key = stream(jax.random.key(seed), "evaluate")
        scores: dict[str, Any] = {}
        if self.autoencoder is not None:
            scores["autoencoder"] = evaluate_autoencoder(self.autoencoder, blocks, documents, key, noise=noise, text=text)
        if self.lm is not None:
            scores["lm"] = evaluate_predictor(
                self.predictor,
                blocks,
                documents,
                key,
                num_samples=num_samples,
                decoding=decoding or self.predictor.decoding,
                boundary_every=boundary_every,
                begin_id=self.tokenizer.begin_id,
                text=text,
                name=self.name,
            )
            train = self.training_data(opened).split("train")
            options: dict[str, Any] = dict(chunk_size=self.chunk_size, boundary_every=boundary_every, text=text)
            vocab_size = self.tokenizer.vocab_size
            scores |= evaluate_ngrams(train, vocab_size, blocks, documents, **options)
            # their discounts and cache weights are fitted on text that is neither counted nor scored
            held_out = None if split == "valid" else validation_blocks(opened, self.block_tokens, "valid", KNESER_NEY_TOKENS)[0]
            scores |= evaluate_kneser_ney(
                train, vocab_size, blocks, documents, held_out=held_out, orders=(5,), max_tokens=COUNTED_TOKENS, **options
            )
            world = world_of(str(opened.manifest.source["name"]))
            if world is not None and opened.manifest.tokenizer["spec"] == WORDS:
                scores["world"] = evaluate_world(world, blocks, documents, **options)
        counted = functools.cache(lambda skip: ScoredText.of(self.tokenizer, blocks, skip))
        return {name: _with_text(report, counted) for name, report in scores.items()}

    def export(self, folder: str | Path, card: ModelCard | None = None) -> None:
        """Writes safetensors, config.json, tokenizer.json and a model card."""
        options: dict[str, Any] = dict(tokenizer=self.tokenizer.save)
        if self.lm is None:
            export_autoencoder(self._require_autoencoder(), folder, **options)
            return
        options |= dict(card=card, block_tokens=self.block_tokens)
        if isinstance(self.lm, TokenLM):
            export_token_lm(self.lm, folder, **options)
        else:
            export_latent_lm(self.lm, self._require_autoencoder(), folder, **options)

    @property
    def name(self) -> str:
        """Name of the model in tables."""
        return "token LM" if isinstance(self.lm, TokenLM) else "CALM"

    @property
    def predictor(self) -> Predictor:
        """The model as generation and evaluation take it."""
        if isinstance(self.lm, TokenLM):
            return self.lm
        return NextVector(self._require_autoencoder(), self._require_lm())

    @property
    def chunk_size(self) -> int:
        """K; 1 for a token model."""
        return 1 if self.autoencoder is None else self.autoencoder.config.chunk_size

    def prepared_data(self, data: str | Path | None) -> Data:
        """Prepared data of this model's tokenizer; by default what it was trained on."""
        if data is None and not self.data:
            raise UsageError("data: name a folder of prepared data; an exported model does not know what it was trained on")
        if data is None and not (Path(self.data) / "manifest.json").is_file():
            raise UsageError(f"{self.folder}: its data {self.data} is not there, nor beside the run; pass the folder as --data")
        opened = open_data(data if data is not None else self.data)
        require_same_tokenizer(
            opened.tokenizer.fingerprint, self.tokenizer.fingerprint, f"data {opened.folder}", str(self.folder)
        )
        return opened

    def training_data(self, otherwise: Data) -> Data:
        """The data that it was trained on, if still available."""
        return open_data(self.data) if self.data and (Path(self.data) / "manifest.json").is_file() else otherwise

    def _require_lm(self) -> LatentLM:
        if self.lm is None or isinstance(self.lm, TokenLM):
            raise UsageError(f"{self.folder}: holds an autoencoder only; name the run of a language model")
        return self.lm

    def _sampler(self, config: GenerationConfig) -> Sampler:
        """By probabilities where the model has them, unless a sampler that draws is asked for."""
        filters = dict(top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        if config.sampler is None and isinstance(self.lm, TokenLM):
            if config.no_repeat is not None:
                raise UsageError(
                    "no_repeat: name a sampler that draws (batch, exact or best); a token model's own has no such rule"
                )
            return softmax_sampler(config.temperature, **filters)
        return from_temperature(
            config.temperature,
            config.candidates,
            kind=config.sampler or "batch",
            max_draws=config.max_draws,
            no_repeat=config.no_repeat,
            **filters,
        )

    def banned_id(self, token: str | int) -> int:
        """The id of a token given by its id or by its text."""
        if isinstance(token, int):
            return token
        ids = self.tokenizer.encode(token)
        if len(ids) != 1:
            raise UsageError(f"ban {token!r}: is {len(ids)} tokens, and a ban takes one; a leading blank makes another token")
        return int(ids[0])

    def _require_autoencoder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise UsageError(f"{self.folder}: holds a token model, which has no latents; name the run of an autoencoder")
        return self.autoencoder

    def _saved(
        self, ids: list[np.ndarray], state: str | Path | None, save_state: str | Path | None, rewindable: bool, rewind: int
    ) -> saved_state.SavedState | None:
        """What is gone on from, if it is a state: a file's, or that of the prompts, which is written to one."""
        predictor, size = self.predictor, self.chunk_size
        if state is not None:
            if any(len(row) for row in ids) or save_state is not None:
                raise UsageError(
                    "state: takes the place of the prompts, and is saved already; give no prompt and no save_state"
                )
            saved = saved_state.load(state, predictor)
            return saved if not rewind else saved_state.rewind(predictor, saved, rewind, special=self.tokenizer)
        if rewind or (rewindable and save_state is None):
            raise UsageError("rewind goes with state, and rewindable with save_state")
        if save_state is None:
            return None
        longest = max(len(chunk_prompt(row, size, self.tokenizer.begin_id)) for row in ids)
        room = self.block_tokens - size * longest
        if room < 1:
            raise UsageError(
                f"save_state: a prompt of {longest} chunks leaves no room in the context of {self.block_tokens // size}"
            )
        saved = saved_state.prefill(predictor, ids, special=self.tokenizer, room=room, rewindable=rewindable)
        saved_state.save(save_state, saved, predictor)
        return saved

    def _stream(self, chunks: Iterator[np.ndarray], prompt: Int[np.ndarray, "_"], show: Callable[[str], None]) -> Generated:
        """Shows the first row as its text settles; returns what the generator returns."""
        text = ContinuationText(self.tokenizer, prompt)
        while True:
            try:
                piece = text.add(next(chunks)[0])
            except StopIteration as stop:
                if piece := text.finish():
                    show(piece)
                return stop.value
            if piece:
                show(piece)


def _with_text(report: Any, counted: Callable[[int], ScoredText]) -> Any:
    """The report with the bytes and words of the text that its likelihood is about, where it has one."""
    likelihood = getattr(report, "likelihood", None)
    if likelihood is None:
        return report
    return dataclasses.replace(report, scored=counted(likelihood.block_tokens - int(likelihood.count[0])))
