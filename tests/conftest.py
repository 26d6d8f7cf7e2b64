"""Every test runs on the CPU, offline, without a display, with compiled programs kept between runs, and the same each time."""

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"  # ignored by git; makes the second run several times quicker

# Before jax is imported anywhere: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("CALM_DEBUG", None)

from hypothesis import settings  # noqa: E402

settings.register_profile("same each time", derandomize=True, database=None, deadline=None)
settings.load_profile("same each time")
