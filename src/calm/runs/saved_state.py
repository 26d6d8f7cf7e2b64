"""The state that reading leaves, as a file: save it, go on from it as often as you like, take back what was read last.

Reading a prompt costs time in proportion to its length; going on from a saved state costs nothing of that. A continuation has
the tokens that it would have had after the text itself. The size of a state is that of its mixers': attention and memories of
the context keep something of every position, state-space models, convolutions and memories of slots do not.

The file is safetensors, with a json description in its header; never pickle.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from calm.core import steps
from calm.core.chunk_decoder import recent_tokens
from calm.core.generate import (
    PLAIN,
    Generated,
    HasSpecialIds,
    allowed_ids,
    check_options,
    checked_prompts,
    follow,
    history_of,
    laid_out,
)
from calm.core.predictor import Predictor
from calm.core.sampler import Sampler
from calm.core.steps import Model, Progress, Recipe
from calm.core.unrolled import unrolled
from calm.errors import UsageError
from calm.text.chunking import NOTHING

FORMAT = "calm-state-1"


class SavedState(NamedTuple):
    """B rows that were read. Nothing here is given up by a continuation: one state serves any number of them."""

    progress: Progress
    chunks: Int[np.ndarray, "B N K"]
    """all that was read, padded on the left"""
    starts: Int[np.ndarray, "B"]
    capacity: int
    """chunks that the state holds, left padding included"""
    rewindable: bool

    @property
    def room(self) -> int:
        """Chunks that can still be written."""
        return self.capacity - self.chunks.shape[1] + 1

    @property
    def nbytes(self) -> int:
        """Size of the mixers' states."""
        return sum(x.nbytes for x in jax.tree.leaves(self.progress.state))

    def fork(self, num_branches: int) -> "SavedState":
        """`num_branches` copies of every row, those of one row beside each other."""
        if num_branches < 1:
            raise UsageError(f"fork: num_branches must be at least 1, got {num_branches}")

        def repeated(x: Any) -> Any:
            return jnp.repeat(x, num_branches, axis=0) if x.ndim else x

        copies = dict(chunks=self.chunks.repeat(num_branches, axis=0), starts=self.starts.repeat(num_branches))
        return self._replace(progress=jax.tree.map(repeated, self.progress), **copies)


def prefill(
    predictor: Predictor,
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]],
    *,
    special: HasSpecialIds,
    room: int,
    rewindable: bool = False,
) -> SavedState:
    """Reads prompts (token ids, as in `calm.core.generate`), with room for `room` more tokens after the longest.

    `rewindable`: recurrences keep what every position left, so that `rewind` works; attention does so by nature.
    """
    if room < 1:
        raise UsageError(f"room must be at least 1 token, got {room}")
    size = predictor.chunk_size
    chunks, starts = laid_out(checked_prompts(prompts, predictor.vocab_size), size, special.begin_id)
    capacity = chunks.shape[1] - 1 + -(-room // size)
    history = history_of(chunks, special.begin_id, capacity)
    model = Model(*nnx.split(predictor))
    ids, at = jnp.asarray(chunks, jnp.int32), jnp.asarray(starts, jnp.int32)
    progress = steps.prefill(model, ids, at, history, capacity, rewindable)
    return SavedState(progress, np.asarray(chunks, np.int32), np.asarray(starts, np.int32), capacity, rewindable)


def resume(
    predictor: Predictor,
    saved: SavedState,
    keys: Array,
    *,
    special: HasSpecialIds,
    max_tokens: int,
    sampler: Sampler = PLAIN,
    decoding: str = "argmax",
    banned: Sequence[int] = (),
) -> Generator[Int[np.ndarray, "B K"], None, Generated]:
    """`calm.core.generate.stream` after what was read: the same tokens for the same keys.

    Raises UsageError if the state has less room than `max_tokens`.
    """
    check_options(saved.chunks.shape[0], keys, max_tokens, decoding)
    if -(-max_tokens // predictor.chunk_size) > saved.room:
        left = saved.room * predictor.chunk_size
        raise UsageError(f"state: has room for {left} more tokens, and max_tokens={max_tokens} is too many")
    allowed = jnp.asarray(allowed_ids(predictor.vocab_size, special, banned))
    weights = steps.prepare(Model(*nnx.split(predictor)), allowed, jnp.int32(special.end_id))
    progress = jax.tree.map(jnp.copy, saved.progress)  # a step gives its own up
    return (yield from follow(Recipe(sampler=sampler, decoding=decoding), weights, keys, progress, max_tokens))


def rewind(predictor: Predictor, saved: SavedState, num_chunks: int, *, special: HasSpecialIds) -> SavedState:
    """The state as it was before the last `num_chunks` chunks were read; a row keeps at least one.

    Raises UsageError if a row is shorter, or where a recurrence did not keep its past.
    """
    length = saved.chunks.shape[1] - num_chunks
    shortest = int((saved.chunks.shape[1] - saved.starts).min())
    if not 0 <= num_chunks < shortest:
        raise UsageError(f"rewind: {num_chunks} chunks of {shortest} that were read; one must be left")
    # the layers of a state are apart, and so must be those of the model
    layers = nnx.jit(lambda model, state: unrolled(model).rewind(state, length - 1))(predictor, saved.progress.state)
    chunks = saved.chunks[:, :length]
    padding = np.arange(length)[:, None] < saved.starts[:, None, None]
    previous = recent_tokens(jnp.where(padding, NOTHING, chunks), predictor.reach)[:, -1]
    history = history_of(chunks, special.begin_id, saved.capacity)
    progress = saved.progress._replace(state=layers, chunk=jnp.asarray(chunks[:, -1]), previous=previous, history=history)
    return saved._replace(progress=progress, chunks=chunks)


# -- files ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header:
    """Metadata of the file beside its arrays."""

    format: str
    model: str
    """`fingerprint` of the model that read"""
    capacity: int
    rewindable: bool


def fingerprint(predictor: Predictor) -> str:
    """A digest of every weight, its name and the precision of products."""
    digest = hashlib.sha256(predictor.precision.encode())
    for path, x in jax.tree_util.tree_leaves_with_path(nnx.split(predictor)[1]):
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


def save(path: str | Path, saved: SavedState, predictor: Predictor) -> None:
    """Writes the state that `predictor` is in; a file of that name is replaced, whole or not at all."""
    from safetensors.numpy import save_file

    arrays = {f"progress.{name}": _plain(np.asarray(x)) for name, x in _named(saved.progress).items()}
    arrays |= {"chunks": np.ascontiguousarray(saved.chunks), "starts": saved.starts}
    header = _Header(format=FORMAT, model=fingerprint(predictor), capacity=saved.capacity, rewindable=saved.rewindable)
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"state {path}: {path.parent} is not a folder")
    unfinished = path.with_name(path.name + ".part")
    save_file(arrays, unfinished, metadata={"calm": json.dumps(dataclasses.asdict(header))})
    os.replace(unfinished, path)


def load(path: str | Path, predictor: Predictor) -> SavedState:
    """Reads a state back, for the model that wrote it.

    Raises UsageError for a file that is missing, damaged, something else or of another model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"state {path}: no such file; `calm generate RUN --save-state FILE` writes one")
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get("calm", "{}"))
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise UsageError(f"state {path}: is damaged or cut short ({error}); write it again") from error
    if header.get("format") != FORMAT:
        raise UsageError(f"state {path}: is no saved state ({FORMAT}); `calm generate RUN --save-state FILE` writes one")
    description = _Header(**header)
    if description.model != (own := fingerprint(predictor)):
        raise UsageError(f"state {path}: was written by model {description.model}, and this one is {own}; read the text again")

    chunks, starts = arrays["chunks"], arrays["starts"]
    capacity, rewindable = description.capacity, description.rewindable
    shapes = [jnp.asarray(x) for x in (chunks[:, :1], starts, arrays["progress.history"])]

    def begin(chunks: Array, starts: Array, history: Array) -> Progress:
        return steps.begin(Model(*nnx.split(predictor)), chunks, starts, history, capacity, rewindable)

    like = jax.eval_shape(begin, *shapes)
    if misfits := [
        name for name, x in _named(like).items() if getattr(arrays.get(f"progress.{name}"), "shape", None) != x.shape
    ]:
        raise UsageError(f"state {path}: {misfits[0]} is missing or of another shape than this model's; read the text again")
    leaves = [
        jnp.asarray(arrays[f"progress.{name}"].view(x.dtype) if x.dtype == jnp.bfloat16 else arrays[f"progress.{name}"])
        for name, x in _named(like).items()
    ]
    progress = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return SavedState(progress, chunks, starts, capacity, rewindable)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in the tree's order."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in found}


def _plain(x: np.ndarray) -> np.ndarray:
    """numpy has no bfloat16: its bits travel as integers."""
    return np.ascontiguousarray(x.view(np.uint16) if x.dtype == jnp.bfloat16 else x).reshape(x.shape)
