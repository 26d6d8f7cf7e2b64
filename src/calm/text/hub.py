"""Data sets of the Hugging Face hub (extra `data`): `hf:NAME` or `hf:NAME:SUBSET`, streamed.

NAME may also be a local folder that the package `datasets` can read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from calm.errors import CalmError, MissingExtraError, UsageError, require_extra
from calm.text.files import SPLITS
from calm.text.surrogates import replace_half_surrogates


class HubDataset:
    """One data set: its splits under our names, its revision, its documents.

    Raises:
      UsageError: no such data set, subset or field (the message lists what there is).
      MissingExtraError: the package datasets is not installed.
      CalmError: the hub cannot be reached.
    """

    def __init__(self, spec: str, field: str = "text"):
        name, _, subset = spec.removeprefix("hf:").partition(":")
        name = str(Path(name).expanduser()) if name.startswith("~") else name
        if not name:
            raise UsageError(f"source {spec}: give hf:NAME or hf:NAME:SUBSET, as in hf:roneneldan/TinyStories")
        self.spec, self.field = spec, field
        self._name, self._subset = name, subset or None
        self._datasets = require_extra("datasets", "data")
        names = self._ask(lambda: self._datasets.get_dataset_split_names(name, self._subset))
        self.splits = {SPLITS[each]: each for each in names if each in SPLITS}
        if "train" not in self.splits:
            raise UsageError(f"source {spec}: the data set has no split named train (it has: {', '.join(names)})")

    def revision(self) -> str | None:
        """Commit that is read; None for a local folder, or when the hub does not say."""
        if Path(self._name).exists():
            return None
        try:
            from huggingface_hub import HfApi

            return HfApi().dataset_info(self._name).sha
        except Exception:  # a stamp, not a need
            return None

    def documents(self, split: str, skip: int = 0) -> Iterator[str]:
        """Yields the texts of one of our splits, from document `skip` on; null is the empty text."""
        stream = self._ask(
            lambda: self._datasets.load_dataset(self._name, self._subset, split=self.splits[split], streaming=True)
        )
        for record in stream.skip(skip) if skip else stream:
            if self.field not in record or not isinstance(record[self.field], str | None):
                raise UsageError(
                    f"source {self.spec}: no text in field {self.field!r} (there is: {', '.join(record)}); see --field"
                )
            yield replace_half_surrogates(record[self.field] or "")

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (UsageError, MissingExtraError):
            raise
        except (ConnectionError, TimeoutError) as error:
            raise CalmError(f"source {self.spec}: the hub cannot be reached ({_first_line(error)})") from error
        except (FileNotFoundError, ValueError) as error:  # datasets' own classes for "not found" and "no such subset"
            raise UsageError(f"source {self.spec}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
