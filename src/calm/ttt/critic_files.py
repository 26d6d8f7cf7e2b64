"""A critic as a folder: critic.json says what it is, critic.safetensors holds its arrays. Never pickle.

A critic is about the latents of one autoencoder, whose fingerprint it bears; it is refused for another.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm.core.autoencoder import Autoencoder
from calm.errors import CalmError, UsageError
from calm.text.atomic_write import write_whole
from calm.train.trees import named_leaves
from calm.ttt.critic import ConceptCritic, TrainedCritic

DESCRIPTION, ARRAYS = "critic.json", "critic.safetensors"
KINDS: dict[str, type] = {"concept": ConceptCritic, "trained": TrainedCritic}


def fingerprint(autoencoder: Autoencoder) -> str:
    """16 digits that stand for an autoencoder's weights."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(nnx.state(autoencoder, nnx.Param)).items()):
        digest.update(name.encode() + np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return digest.hexdigest()[:16]


def save_critic(
    critic: ConceptCritic | TrainedCritic, folder: str | Path, autoencoder: Autoencoder, **facts: Any
) -> dict[str, Any]:
    """Writes the folder, which is made if it is missing; `facts` go into its description, which is returned."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    kind = next(name for name, cls in KINDS.items() if isinstance(critic, cls))
    description = {"kind": kind, "autoencoder": fingerprint(autoencoder), "latent_dim": autoencoder.config.latent_dim, **facts}
    arrays = {field.name: np.asarray(getattr(critic, field.name), np.float32) for field in dataclasses.fields(critic)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.atleast_1d(array) for name, array in arrays.items()}, folder / (ARRAYS + ".tmp"))
        (folder / (ARRAYS + ".tmp")).chmod(0o644)
        (folder / (ARRAYS + ".tmp")).replace(folder / ARRAYS)
        write_whole(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise CalmError(f"{folder}: cannot write the critic ({error})") from error
    return description


def load_critic(folder: str | Path, autoencoder: Autoencoder) -> tuple[ConceptCritic | TrainedCritic, dict[str, Any]]:
    """A critic for the latents of this autoencoder, and its description.

    Raises:
        UsageError: no critic there, damaged files, or one that was made for another autoencoder.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / ARRAYS).is_file():
        raise UsageError(f"critic {folder}: holds no {DESCRIPTION} and {ARRAYS}; `calm train critic` makes them")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        cls = KINDS[description["kind"]]
        arrays = load_file(folder / ARRAYS)
        scalars = ("out_bias", "temperature")
        fields = {
            field.name: jnp.asarray(arrays[field.name][0] if field.name in scalars else arrays[field.name])
            for field in dataclasses.fields(cls)
        }
        made_for = description["autoencoder"]
    except (ValueError, KeyError, TypeError, IndexError, OSError, SafetensorError) as error:
        raise UsageError(f"critic {folder}: damaged ({type(error).__name__}: {error})") from error
    if made_for != fingerprint(autoencoder):
        raise UsageError(
            f"critic {folder}: made for the latents of another autoencoder (fingerprint {made_for}, the model's is "
            f"{fingerprint(autoencoder)}); train it with --autoencoder on the model's run"
        )
    return cls(**fields), description
