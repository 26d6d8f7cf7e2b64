"""Checkpoints: Orbax (v1) behind one module, so that the rest of the package speaks of named arrays and steps.

A checkpoint holds parameters, moving average, the rest of the training state, and the loop's own numbers (data position,
best score) in one folder that appears by a rename when all of it is on disk. A process killed at any moment therefore leaves
either the whole checkpoint or a temporary folder, which the next start removes; older checkpoints go only after a newer one has
appeared.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
from orbax.checkpoint import v1 as orbax

from calm.errors import CalmError, UsageError
from calm.train.run_folder import NO_SPACE, out_of_space
from calm.train.trees import named_leaves

Trees = Mapping[str, Any]
"""Part name ("params", ...) -> pytree."""

Tree = TypeVar("Tree")

LOOP = "loop"
"""Key of the loop's numbers in the metadata of a checkpoint."""


class Checkpoints:
    """The checkpoints of one run: the last few, and the best.

    Saving returns as soon as the arrays are copied; writing goes on beside the next steps, and the next save waits for it.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, reads_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save there
        self.folder = folder
        self._keep = _KeepLastAndBest(keep_last)
        with _disk_errors(folder):
            self._orbax = orbax.training.Checkpointer(
                str(folder.absolute()), preservation_policy=self._keep, cleanup_tmp_directories=not reads_only
            )

    @property
    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def protect(self, step: int | None) -> None:
        """This one is the best: it stays until another is named."""
        self._keep.best = step

    def save(self, step: int, parts: Trees, loop: Mapping[str, Any]) -> None:
        """Starts writing the checkpoint of `step`; a failure of the one before it is raised here."""
        self.wait()
        named = {part: named_leaves(tree) for part, tree in parts.items()}
        named = {part: leaves for part, leaves in named.items() if leaves}
        with _disk_errors(self.folder / str(step)):
            self._orbax.save_checkpointables_async(
                step, named, force=True, overwrite=step in self.steps, custom_metadata={LOOP: dict(loop)}
            )

    def restore(self, step: int, parts: Trees) -> tuple[dict[str, Any], dict[str, Any]]:
        """The checkpoint of `step` on the shapes, types and shardings of `parts`, and the loop's numbers.

        Leaves of `parts` are `jax.ShapeDtypeStruct`s with a sharding. A checkpoint of other shapes is a `UsageError`; one whose
        files were damaged raises whatever its reader meets.
        """
        self.wait()
        if step not in self.steps:
            have = ", ".join(map(str, self.steps)) or "none"
            raise UsageError(f"{self.folder}: there is no checkpoint of step {step} (there are: {have})")
        metadata = self._orbax.checkpointables_metadata(step)
        for part, tree in parts.items():
            path = self.folder / str(step)
            there = metadata.metadata.get(part)
            if there is None and (path / part).is_dir():
                raise OSError(f"{path / part}: cannot be read")
            _check_shapes(f"{path}: {part}", there or {}, named_leaves(tree))
        wanted = {part: named_leaves(tree) for part, tree in parts.items()}
        found = self._orbax.load_checkpointables(step, {part: leaves for part, leaves in wanted.items() if leaves})
        trees = {part: _like(tree, found.get(part, {})) for part, tree in parts.items()}
        loop = metadata.custom_metadata
        return trees, dict(cast(Any, loop)[LOOP])

    def parts(self, step: int) -> set[str]:
        """Names of the parts that the checkpoint of `step` holds."""
        return set(self._orbax.checkpointables_metadata(step).metadata)

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`: a run that starts again from it must not find them later."""
        for later in [other for other in self.steps if other > step]:
            self._orbax.delete(later)

    def wait(self) -> None:
        """Until what was saved is on disk; raises if it could not be written."""
        with _disk_errors(self.folder):
            self._orbax.wait()

    def close(self) -> None:
        """Waits and releases Orbax's threads."""
        with _disk_errors(self.folder):
            self._orbax.close()


def parameter_target(params: Tree, sharding: jax.sharding.Sharding | None = None) -> Tree:
    """Parameters (arrays, or the result of `jax.eval_shape`) as a target of `restore`; by default on the first device."""
    at = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), params)


def load_parameters(folder: Path, step: int, target: Tree) -> Tree:
    """The parameters to evaluate at `step` of a run's checkpoint folder: the moving average where the run kept one."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of checkpoints")
    checkpoints = Checkpoints(folder, reads_only=True)
    try:
        if step not in checkpoints.steps:
            checkpoints.restore(step, {})
        part = "average" if "average" in checkpoints.parts(step) else "params"
        return checkpoints.restore(step, {part: parameter_target(target)})[0][part]
    finally:
        checkpoints.close()


class _KeepLastAndBest:
    """Orbax's question which checkpoints stay, answered."""

    def __init__(self, last: int):
        self.last = last
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)[-self.last :]
        return [checkpoint.step in steps or checkpoint.step == self.best for checkpoint in checkpoints]


def _like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


def _check_shapes(where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name, leaf in here.items():
        if name not in there:
            raise UsageError(f"{where}: the checkpoint has no {name!r} of shape {leaf.shape}: another configuration wrote it")
        if tuple(there[name].shape) != tuple(leaf.shape):
            raise UsageError(
                f"{where}: {name!r} has shape {tuple(there[name].shape)} in the checkpoint and {tuple(leaf.shape)} here: "
                "another configuration wrote it"
            )
        if there[name].dtype != leaf.dtype:
            raise UsageError(f"{where}: {name!r} is {there[name].dtype} in the checkpoint and {leaf.dtype} here")
    if extra := sorted(set(there) - set(here)):
        raise UsageError(f"{where}: the checkpoint also holds {extra[0]!r}: another configuration wrote it")


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A full disk as one line. The storage library below Orbax gives the error's number as text, so text is searched too."""
    try:
        yield
    except CalmError:
        raise
    except Exception as error:
        if out_of_space(error):
            raise CalmError(f"{path}: {NO_SPACE}") from error
        raise
