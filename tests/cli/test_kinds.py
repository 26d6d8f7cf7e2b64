"""Members of families on the command line: `--X.kind NAME`, and options of entries that a table does not have yet."""

import pytest

from calm.cli.arguments import parse
from calm.cli.train import TrainLM, TrainTokenLM
from calm.errors import UsageError

PURE = "--out run --preset wikitext2-tiny-pure"


def settings(words: str, verb: type = TrainLM):
    return parse(verb, words.split(), prog="calm train lm").settings


def test_a_kind_is_chosen_and_its_options_are_read():
    read = settings(f"{PURE} --model.head.kind flow --model.head.num-steps 4 --loss.terms.own.weight 1")
    assert (read.model.head.kind, read.model.head.num_steps) == ("flow", 4)
    assert set(read.loss.terms) == {"energy", "own", "auxiliary"}, "an entry is added to those of the preset"


def test_another_backbone_keeps_the_sizes_that_both_have():
    chosen = "--model.backbone.kind hybrid --model.backbone.pattern C,H --model.backbone.mixers.C.kernel 9"
    before, after = settings(PURE).model.backbone, settings(f"{PURE} {chosen}").model.backbone
    assert (after.dim, after.num_layers, after.inner_dim) == (before.dim, before.num_layers, before.inner_dim)
    assert set(after.mixers) == {"C", "H"} and after.mixers["C"].kernel == 9


def test_a_pattern_drops_the_mixers_that_it_does_not_name():
    assert set(settings("--out run --preset hybrid-tiny", TrainTokenLM).model.backbone.mixers) == {"S", "H"}
    changed = settings("--out run --preset hybrid-tiny --model.backbone.pattern C,H", TrainTokenLM)
    assert set(changed.model.backbone.mixers) == {"C", "H"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.head.kind flw", r"--model.head.kind: .*expected one of 'energy', .*got 'flw' \(did you mean 'flow'\?\)"),
        ("--model.heads.kind flow", "unknown key 'model.heads'"),
        ("--loss.terms.nope.weight 1", "expected one of 'energy', .*got 'nope'"),
        ("--loss.terms.anchor.wait 1", "Unrecognized options: --loss.terms.anchor.wait"),
        ("--model.backbone.pattern SHA", "Unrecognized options: --model.backbone.pattern"),
        ("--model.head.kind", "--model.head.kind needs a value"),
    ],
)
def test_nonsense_is_one_line(words, message):
    with pytest.raises(UsageError, match=message) as caught:
        settings(f"{PURE} {words}")
    assert "\n" not in str(caught.value)
