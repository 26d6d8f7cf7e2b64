"""The file layer: what is written reproduces the object; what is wrong is named."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm import config
from calm.core.head import HeadConfig
from calm.errors import UsageError
from calm.registry import PROVIDED, Registered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Registered, family="schedule of the tests"):
    rate: float = 1e-3


@Schedule.register("constant")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    steps: int = 1


@Schedule.register("cosine")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    floor: float = 0.1
    steps: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    layers: int = 4
    pattern: tuple[str, ...] = ("SH", "SHA")
    span: tuple[int, float] = (1, 0.5)
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 100
    seed: int = 0
    share: float = 0.1
    limit: int | None = None
    name: str | None = "first"
    batch: int | Literal["auto"] = "auto"
    out: Path = Path("runs")
    resume: bool = True
    model: Model = Model()
    critic: Model | None = None
    schedule: Schedule = Constant()
    second: Schedule | None = None
    every: dict[str, Schedule] = dataclasses.field(default_factory=lambda: config.FrozenDict(constant=Constant()))
    models: tuple[Model, ...] = ()
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    data: str
    out: str
    steps: int = 1


numbers = st.floats(allow_nan=False)
models = st.builds(
    Model,
    layers=st.integers(1, 10**9),
    pattern=st.lists(st.text(max_size=3)).map(tuple),
    span=st.tuples(st.integers(-(2**60), 2**60), numbers),
    precision=st.sampled_from(["float32", "bfloat16"]),
)
runs = st.builds(
    Run,
    steps=st.integers(-(2**60), 2**60),
    share=numbers,
    limit=st.none() | st.integers(-9, 9),
    name=st.none() | st.text(max_size=5).filter(lambda text: text != "none"),
    batch=st.just("auto") | st.integers(-9, 9),
    out=st.sampled_from([Path("a/b"), Path("runs")]),
    resume=st.booleans(),
    model=models,
    critic=st.none() | models,
    schedule=st.builds(Constant, rate=numbers) | st.builds(Cosine, rate=numbers, floor=numbers),
    models=st.lists(models, max_size=2).map(tuple),
    weights=st.dictionaries(st.text(max_size=3), numbers, max_size=2),
    every=st.dictionaries(st.sampled_from(["constant", "cosine", "x"]), st.builds(Cosine, rate=numbers), max_size=2).map(
        config.FrozenDict
    ),
)


@settings(deadline=None, max_examples=60)
@given(runs)
def test_the_written_file_alone_reproduces_the_object(tmp_path_factory, run):
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(config.to_toml(run), encoding="utf-8", newline="")
    assert config.load(Run, [file]) == run
    # Over any other default too: every field is written, so nothing of the default is left.
    other = Run(steps=7, limit=3, critic=Model(layers=2), schedule=Cosine(floor=0.5), weights={"x": 1.0})
    assert config.load(Run, [file], other) == run


def test_later_files_win_and_name_only_what_differs(tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('steps = "30k"\n[model]\nlayers = 8\npattern = ["A"]\n')
    second.write_text("[model]\nlayers = 6\n")
    run = config.load(Run, [first, second], Run(seed=5))
    assert (run.steps, run.seed, run.model.layers, run.model.pattern) == (30_000, 5, 6, ("A",))


def test_files_may_share_the_required_keys(tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('data = "d"\n')
    second.write_text('out = "o"\nsteps = 2\n')
    assert config.load(Needs, [first, second]) == Needs(data="d", out="o", steps=2)
    with pytest.raises(UsageError, match="'out' is missing"):
        config.load(Needs, [first])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 1", r"bad.toml: unknown key 'stepz' \(did you mean 'steps'\?\)"),
        ("[model]\nlayrs = 1", r"bad.toml: unknown key 'model.layrs' \(did you mean 'model.layers'\?\)"),
        ("steps = 'x'", "bad.toml: steps: expected a whole number such as 300, 30k or 2M, got 'x'"),
        ("steps = 1.5", "bad.toml: steps: expected int, got 1.5"),
        ("steps = true", "bad.toml: steps: expected int, got True"),
        ("share = true", "bad.toml: share: expected float, got True"),
        ("resume = 1", "bad.toml: resume: expected bool"),
        ("limit = 'many'", "bad.toml: limit: expected int or 'none', got 'many'"),
        ("model = 3", "bad.toml: model: expected a table of Model, got 3"),
        ("[model]\npattern = 'SHA'", "bad.toml: model.pattern: expected a list of strs, got 'SHA'"),
        ("[model]\npattern = ['S', 1]", r"bad.toml: model.pattern\[1\]: expected str, got 1"),
        ("[model]\nspan = [1]", "bad.toml: model.span: expected 2 values, got 1"),
        ("[model]\nprecision = 'bfloat61'", r"model.precision: expected one of .*did you mean 'bfloat16'"),
        ("[model]\nlayers = 0", "bad.toml: model: layers must be at least 1, got 0"),
        (
            "[schedule]\nkind = 'cosin'",
            r"schedule.kind: expected one of 'constant', 'cosine', got 'cosin' \(did you mean",
        ),
        ("[schedule]\nfloor = 1", "unknown key 'schedule.floor'"),
        ("[second]\nfloor = 1", "key 'second.kind' is missing: one of 'constant', 'cosine'"),
        ("[every.sine]\nrate = 1", "every.sine.kind: expected one of 'constant', 'cosine', got 'sine'"),
        ("schema_version = 3", "bad.toml: schema_version is 3, and this version of calm reads 1 and 2"),
        ("steps = ", "bad.toml: not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        config.load(Run, [file])
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="absent.toml: no such configuration file"):
        config.load(Run, [tmp_path / "absent.toml"])
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match=r"binary.toml: cannot be read"):
        config.load(Run, [tmp_path / "binary.toml"])


def test_a_kind_chooses_the_member_of_a_family():
    run = config.from_dict(Run, {"schedule": {"kind": "cosine", "floor": 0.2}})
    assert run.schedule == Cosine(floor=0.2)
    assert config.from_dict(Run, {"schedule": {"floor": 0.3}}, run).schedule == Cosine(floor=0.3)
    assert config.from_dict(Run, {"second": {"kind": "cosine"}}).second == Cosine()
    assert config.from_dict(Run, {"critic": {"layers": 2}}).critic == Model(layers=2)
    assert config.from_dict(Run, {"critic": "none"}, Run(critic=Model())).critic is None


def test_names_of_classes_from_older_files_are_read():
    assert config.from_dict(HeadConfig, {"kind": "EnergyHeadConfig", "num_blocks": 3}).kind == "energy"


def test_another_member_keeps_what_both_inherit_and_nothing_else():
    run = Run(schedule=Constant(rate=0.5, steps=7))
    assert config.with_kind(run, "schedule", "cosine").schedule == Cosine(rate=0.5, steps=2)
    with pytest.raises(UsageError, match="--schedule.kind: schedule.kind: expected one of"):
        config.with_kind(run, "schedule", "linear")


def test_a_table_of_members_is_changed_entry_by_entry():
    run = config.from_dict(Run, {"every": {"cosine": {"floor": 0.3}}})
    assert run.every == {"constant": Constant(), "cosine": Cosine(floor=0.3)}
    assert config.to_dict(run)["every"]["cosine"] == {"rate": 1e-3, "floor": 0.3, "steps": 2}, "the key says the kind"
    assert config.from_dict(Run, {"every": {"constant": "none"}}, run).every == {"cosine": Cosine(floor=0.3)}
    renamed = {"every": {"late": {"kind": "cosine"}}}
    assert config.from_dict(Run, config.to_dict(config.from_dict(Run, renamed))).every["late"] == Cosine()
    assert hash(run.every) == hash(config.FrozenDict(run.every))


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match="is registered already"):
        Schedule.register("cosine")(Constant)
    with pytest.raises(ValueError, match="comes with calm"):
        HeadConfig.register("flow")(Constant)


def test_every_provided_member_registers_under_its_name():
    for family, members in PROVIDED.items():
        for name, place in members.items():
            module, _, attribute = place.partition(":")
            assert getattr(importlib.import_module(module), attribute).kind == name, (family, name)


def test_human_numbers():
    written = ["30k", "2M", "15B", "1.5k", "64Ki", "1_000", "-3", "1e3", "0"]
    assert [config.parse_human_int(text) for text in written] == [
        30_000,
        2_000_000,
        15 * 10**9,
        1500,
        65536,
        1000,
        -3,
        1000,
        0,
    ]
    assert config.parse_human_float("0.5M") == 500_000.0
    assert config.from_dict(Run, {"steps": "512k", "share": "1e-2", "batch": "4k"}).batch == 4000
    for text in ["", "k", "1.5", "3x", "1k2", "nan", "inf", "0x10"]:
        with pytest.raises(UsageError, match="whole number"):
            config.parse_human_int(text)


def test_config_and_errors_do_not_import_jax():
    code = "import sys, calm.config, calm.errors; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
