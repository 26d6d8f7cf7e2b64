"""`calm doctor`: what this machine can do, what is missing and how to get it."""

import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from calm.cli.allocator import HUGE_PAGES

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "safetensors",
    "numpy",
    "tyro",
)
EXTRAS = {
    "data": ("datasets", "pyarrow"),
    "tiktoken": ("tiktoken",),
    "track": ("trackio",),
    "tensorboard": ("tensorboardX",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Says which versions, devices, cores, matrix rates, extras and disk space there are, and what would make calm faster."""

    out: str = "."
    """The folder whose free disk space is reported."""
    probe: bool = True
    """Measure the matrix rates (about two seconds); --no-probe skips that."""

    def run(self) -> dict[str, Any]:
        from calm.cli import version

        folder = _existing(Path(self.out))
        report: dict[str, Any] = {
            "calm": version(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "extras": {extra: all(map(_present, modules)) for extra, modules in EXTRAS.items()},
            "cores": usable_cores(),
            "memory_bytes": _memory(),
            "disk": {"folder": str(folder.resolve()), "free_bytes": shutil.disk_usage(folder).free},
            "devices": _devices(),
        }
        if self.probe and not report["devices"][0].startswith("none"):
            report["matrix_rates"] = _matrix_rates()
        report["advice"] = advice(report)
        return report

    def show(self, report: dict[str, Any]) -> str:
        missing = [name for name, found in report["packages"].items() if found is None]
        lines = [
            f"calm {report['calm']}, Python {report['python']}, {platform.platform()}",
            "  ".join(f"{name} {found}" for name, found in report["packages"].items() if found is not None),
            f"cores      {report['cores']} usable",
            f"memory     {_gigabytes(report['memory_bytes'])}",
            f"disk       {_gigabytes(report['disk']['free_bytes'])} free in {report['disk']['folder']}",
            f"devices    {', '.join(report['devices'])}",
        ]
        rates = report.get("matrix_rates")
        if rates:
            lines.append(
                f"matrices   bfloat16 {rates['bfloat16'] / 1e9:.0f}, float32 {rates['float32'] / 1e9:.0f} GFLOP/s: "
                f"training uses {rates['precision']}"
            )
        lines += [
            f"extra      {extra:<12}{'present' if there else f'missing: pip install {chr(39)}calm-lm[{extra}]{chr(39)}'}"
            for extra, there in report["extras"].items()
        ]
        lines += [f"missing    {name}: pip install calm-lm" for name in missing]
        return "\n".join([*lines, *(f"advice     {line}" for line in report["advice"])])


def advice(report: dict[str, Any]) -> list[str]:
    """Advice that would make this machine faster or keep it from failing, one line each."""
    lines = []
    on_cpu = any("cpu" in device.lower() for device in report["devices"])
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    if on_cpu and glibc and "hugetlb=1" not in os.environ.get("GLIBC_TUNABLES", ""):
        lines.append(
            f"start Python with {HUGE_PAGES}: huge pages save up to a third of a training step on a CPU; the setting "
            "acts only before the process starts (calm quickstart, train and evaluate see to it themselves)"
        )
    if report["disk"]["free_bytes"] < 2 * 10**9:
        lines.append("less than 2 GB of disk are free: checkpoints may not fit")
    if report["cores"] < (os.cpu_count() or 1):
        lines.append(f"only {report['cores']} of {os.cpu_count()} cores are usable by this process")
    return lines


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, lowered by a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def _existing(folder: Path) -> Path:
    return next((parent for parent in [folder, *folder.absolute().parents] if parent.exists()), Path("/"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def _devices() -> list[str]:
    try:
        import jax

        return [f"{device.platform}:{device.id} ({device.device_kind})" for device in jax.devices()]
    except Exception as error:  # a doctor reports a broken installation; it does not die of it
        return [f"none: jax fails with {type(error).__name__}: {' '.join(str(error).split())}"]


def _matrix_rates() -> dict[str, Any]:
    from calm.train import matrix_rate as machine

    rates = machine.probe()
    return {**rates._asdict(), "precision": machine.choose_precision("auto", rates)}
