"""calm: continuous autoregressive language models.

    import calm
    model = calm.load("runs/quickstart/lm")
    model.generate("The function", temperature=0.5)["texts"]

Everything else is imported from where it lives; docs/architecture.md is the map. Importing calm does no work.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.runs.bundle import Bundle as Bundle
    from calm.runs.bundle import load as load

__all__ = ["Bundle", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Bundle", "load"):
        from calm.runs import bundle

        return getattr(bundle, name)
    if name == "__version__":
        return metadata.version("calm-lm")
    raise AttributeError(f"module 'calm' has no attribute {name!r}")
