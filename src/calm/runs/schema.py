"""Configuration files of schema 1, read as those of today.

Schema 1 had all mixers' settings in every backbone, both levels in every autoencoder, and one flat table of weights for the
objective of stage 2. Its run folders and exports stay readable; `tests/golden/schema_1` holds one of each.
"""

from collections.abc import Mapping
from typing import Any

LETTERS = {"ssm": "S", "conv": "C", "hopfield": "H", "gru": "G"}
_OWN_LOSS = ("flow", "diffusion", "mixture", "FlowHeadConfig", "DiffusionHeadConfig", "MixtureHeadConfig")
_GATED = ("gated", "GatedEnergyHeadConfig")
NONE = "none"


def autoencoder_model(model: Mapping[str, Any], loss: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The table of an autoencoder, one level or two."""
    found = {name: value for name, value in model.items() if not name.startswith("lower_")}
    if model.get("lower_chunk_size"):
        lower = {name: value for name, value in model.items() if name.startswith("lower_")}
        return {"kind": "hierarchical", **found, **lower, "lower_weight": (loss or {}).get("lower_weight", 1.0)}
    return {"kind": "flat", **found}


def backbone(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a backbone: a plain transformer, or a hybrid with the mixers of its pattern."""
    apart = (*LETTERS, "pattern", "num_segments", "reasoner_gradient")
    found = {name: value for name, value in table.items() if name not in apart}
    pattern, segments = table.get("pattern", "A"), table.get("num_segments", 1)
    if pattern == "A" and segments == 1:
        return {"kind": "transformer", **found}
    mixers = {letter: dict(table[name]) for name, letter in LETTERS.items() if letter in pattern and name in table}
    kept = {name: table[name] for name in ("num_segments", "reasoner_gradient") if name in table}
    return {"kind": "hybrid", **found, "pattern": pattern, "mixers": mixers, **kept}


def language_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a latent or token language model."""
    found = dict(model)
    if isinstance(found.get("backbone"), Mapping):
        found["backbone"] = backbone(found["backbone"])
    if isinstance(found.get("context_decoder"), Mapping):
        found["context_decoder"] = {"kind": "context", **found["context_decoder"]}
    return found


def latent_loss(loss: Mapping[str, Any], head: str = "energy") -> dict[str, Any]:
    """The flat table of weights as terms. `head` is the head's kind, which decided on terms of its own."""

    def term(name: str, weight: float, **others: str) -> dict[str, Any]:
        values = {"weight": loss.get(f"{name}_weight", weight)}
        return values | {ours: loss[theirs] for ours, theirs in others.items() if theirs in loss}

    own = term("own", 1.0)
    terms = {
        "energy": term("energy", 1.0, from_step="energy_from_step", num_draws="num_draws", alpha="alpha", fidelity="fidelity"),
        "direction": term("direction", 0.0, origin="direction_from"),
        "own": own if head in _OWN_LOSS else {"weight": 0.0},
        "auxiliary": term("auxiliary", 0.0, decay_steps="auxiliary_decay_steps"),
        "anchor": term("anchor", 0.0),
        "slot_energy": term("slot_energy", 0.0, alpha="alpha"),
        "likelihood": term("likelihood", 0.0, num_samples="likelihood_samples"),
    }
    # Beside a direction term the energy was measured, and beside a gate and an energy the direction.
    measured = {"energy"} if terms["direction"]["weight"] else set()
    measured |= {"direction"} if head in _GATED and terms["energy"]["weight"] else set()
    kept = {name: values for name, values in terms.items() if values["weight"] or name in measured}
    shared = {"num_samples": loss["num_samples"]} if "num_samples" in loss else {}
    return {**shared, "terms": kept}


def run(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a whole run."""
    found, kind = dict(table), table.get("kind")
    model, loss = found.get("model"), found.get("loss")
    if kind == "autoencoder":
        if isinstance(model, Mapping):
            found["model"] = autoencoder_model(model, loss)
        if isinstance(loss, Mapping):
            found["loss"] = {name: value for name, value in loss.items() if name != "lower_weight"}
    elif isinstance(model, Mapping):
        found["model"] = language_model(model)
    if kind == "latent_lm" and isinstance(loss, Mapping):
        head = model.get("head") if isinstance(model, Mapping) else None
        found["loss"] = latent_loss(loss, head.get("kind", "energy") if isinstance(head, Mapping) else "energy")
    return found
