"""The doctor says what is there, what is missing and how to get it, and does not die of what it finds."""

import json
import os

from calm import cli
from calm.cli import allocator, doctor


def test_the_report_covers_machine_packages_extras_and_disk(capsys, tmp_path):
    assert cli.main(["doctor", "--no-probe", "--json", "--out", str(tmp_path / "not" / "yet")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cores"] >= 1 and report["disk"]["free_bytes"] > 0 and report["disk"]["folder"] == str(tmp_path)
    assert set(report["extras"]) == set(doctor.EXTRAS) and report["packages"]["jax"] and report["devices"][0].startswith("cpu")
    assert "matrix_rates" not in report


def test_a_missing_extra_comes_with_its_pip_line(capsys, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "tiktoken", ("a_package_that_is_not_there",))
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "a-package-that-is-not-there"))
    assert cli.main(["doctor", "--no-probe"]) == 0
    out = capsys.readouterr().out
    assert "missing: pip install 'calm-lm[tiktoken]'" in out and "missing    a-package-that-is-not-there" in out


def test_the_probe_names_the_precision_that_training_would_use(capsys, monkeypatch):
    from calm.train import matrix_rate as machine

    monkeypatch.setattr(machine, "probe", lambda: machine.MatrixRates(float32=3e11, bfloat16=9e11))
    assert cli.main(["doctor"]) == 0
    assert "bfloat16 900, float32 300 GFLOP/s: training uses bfloat16" in capsys.readouterr().out


def test_the_allocator_is_advised_only_where_it_is_not_set(monkeypatch):
    report = {"devices": ["cpu:0 (cpu)"], "disk": {"free_bytes": 10**12}, "cores": 10**6}
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert [line for line in doctor.advice(report) if doctor.HUGE_PAGES in line]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert doctor.advice(report) == []
    assert "2 GB" in doctor.advice(report | {"disk": {"free_bytes": 10**9}})[0]


def test_heavy_commands_start_themselves_again_with_huge_pages_once(monkeypatch):
    calls = []
    monkeypatch.setattr(allocator.os, "execv", lambda *words: calls.append(words))
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    allocator.restart_with_huge_pages()
    assert calls == [(allocator.sys.executable, allocator.sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    allocator.restart_with_huge_pages()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    allocator.restart_with_huge_pages()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    allocator.restart_with_huge_pages()
    assert len(calls) == 1
