"""Every test runs on the CPU, offline, without a display, with compiled programs kept between runs, and the same each time."""

import importlib.metadata
import os
import sys
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"  # ignored by git; makes the second run several times quicker

# Before jax is imported anywhere: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # small arrays: compiling takes the time, not running
if importlib.metadata.version("jaxlib").startswith("0.10."):  # an unknown flag would end the process
    # The older way of writing fused loops runs slower and compiles in half the time.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("CALM_DEBUG", None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("same each time", derandomize=True, database=None, deadline=None)
settings.load_profile("same each time")


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module_are_let_go():
    """Every compiled program holds several memory maps, and a process may have 65,530: a thousand tests come near it."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory) -> Path:
    """A folder with text/, data/, and the run folders autoencoder/ and lm/ of the smallest models. Read it, do not write."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_corpus(folder / "text")
    data, autoencoder, lm = (str(folder / name) for name in ("data", "autoencoder", "lm"))
    tiny.run("data", "prepare", "--source", str(folder / "text"), "--out", data, "--tokenizer", "bytes")
    tiny.run("train", "autoencoder", "--data", data, "--out", autoencoder, *tiny.AUTOENCODER)
    tiny.run("train", "lm", "--data", data, "--autoencoder", autoencoder, "--out", lm, *tiny.LM)
    return folder
