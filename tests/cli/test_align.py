"""`calm train critic` and `calm align`: from words or labelled lines to aligned text beside its controls."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from calm.runs import bundle
from calm.ttt.align import AlignmentReport, Comparison, Variant
from calm.ttt.concept import combined_critic, concept_critic
from calm.ttt.seal import SealConfig
from random_models import normal

SMALL = ["--samples", "2", "--chunks", "2", "--inner-steps", "2", "--max-tokens", "12"]


def align(runs, *words):
    return tiny.calm("align", str(runs / "lm"), *SMALL, *words)


@pytest.fixture(scope="module")
def critics(tiny_runs, tmp_path_factory):
    """A trained critic and one of a concept, in folders."""
    folder = tmp_path_factory.mktemp("critics")
    for name, words in {"wanted": "cat dog", "unwanted": "house river"}.items():
        lines = [f"The {word} is a {word} number {i}." for word in words.split() for i in range(40)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    source = ["--autoencoder", str(tiny_runs / "autoencoder"), "--steps", "20", "--width", "8"]
    labelled = ["--wanted", str(folder / "wanted.txt"), "--unwanted", str(folder / "unwanted.txt")]
    report = tiny.run("train", "critic", "--out", str(folder / "trained"), *source, *labelled)
    assert 0 <= report["report"]["accuracy"] <= 1 and report["report"]["majority"] < 0.6 and report["kind"] == "trained"
    found = tiny.run("train", "critic", "--out", str(folder / "concept"), *source[:2], "--concept", "cat,dog")
    assert found["chunks_found"] > 10 and found["latent_dim"] == 8
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_standard_and_aligned_text_stand_side_by_side_and_the_run_is_as_it_was(tiny_runs, tmp_path):
    out, before = tmp_path / "aligned.json", files(tiny_runs / "lm")
    words = ["--prompt", "The cat", "--concept", "cat,dog", "--rate", "0.1", "--seed", "3", "--out", str(out)]
    code, report, err = align(tiny_runs, *words)
    assert code == 0, err
    assert json.loads(out.read_text()) == report and report["prompts"] == ["The cat"]
    standard, aligned = report["ways"]
    assert (standard["name"], aligned["name"]) == ("standard", "aligned") and standard["texts"] != [""]
    assert standard["delta"] == [0.0] and aligned["flops"] > 2 * standard["flops"]
    assert report["delta_of_chance"][0] > 0 and report["norm"][0] > 0.05 and report["seconds"] > 0
    assert files(tiny_runs / "lm") == before
    shown = report_of(report).text()
    assert "[standard] The cat" in shown and "[aligned] The cat" in shown and "SEAL delta by chance" in shown


def report_of(values):
    """The report of a `--json` object."""

    def fields(values):
        lists = {"texts": tuple, "prompts": tuple, "steps": tuple}
        return {name: lists.get(name, np.array)(x) if isinstance(x, list) else x for name, x in values.items()}

    ways = tuple(Variant(**fields(way)) for way in values.pop("ways"))
    return AlignmentReport(**fields(values), variants=ways)


@pytest.mark.slow
def test_controls_are_run_by_the_same_command(tiny_runs):
    code, report, err = align(tiny_runs, "--prompt", "The cat", "--concept", "cat,dog", "--rate", "0.1", "--controls")
    assert code == 0, err
    names = [way["name"] for way in report["ways"]]
    assert names[:4] == ["standard", "aligned", "shuffled reward", "random direction"] and names[5] == "steering"
    assert names[4].startswith("best of ") and int(names[4].split()[-1]) > 1
    flops = [way["flops"] for way in report["ways"]]
    assert flops[1] == flops[2] == flops[3] and 0.5 * flops[1] < flops[4] <= flops[1] and flops[5] == flops[0]
    rewards = {way["name"]: way["rewards"][0] for way in report["ways"]}
    assert rewards[names[4]] > rewards["standard"]


def test_the_critics_best_of_several_aligned_texts_is_kept_and_paid_for(tiny_runs):
    model = bundle.load(tiny_runs / "lm")
    critic, _ = concept_critic(model, "cat,dog")
    one, three = (
        Comparison(model, SealConfig(samples=2, chunks=2, inner_steps=2, texts=texts), ["The cat", "A"], critic, max_tokens=12)
        for texts in (1, 3)
    )
    adaptation = three.adapt(critic)
    every, kept = three.write(adaptation.changes, num_texts=3), three.best(adaptation.changes)
    np.testing.assert_array_equal(kept.rewards[:, 0], every.rewards.max(1))
    assert kept.chunks.shape == one.best(adaptation.changes).chunks.shape and np.ptp(every.rewards, axis=1).min() > 0
    assert three.cost.total == one.cost.adaptation + 3 * (one.cost.text + one.cost.judging) > one.cost.total
    assert three.cost.texts > one.cost.texts


def test_critics_from_folders_add_up_with_their_weights(tiny_runs, critics):
    model = bundle.load(tiny_runs / "lm")
    folders = [f"{critics / 'trained'}=2", str(critics / "concept")]
    both, said = combined_critic(model, critics=folders)
    assert said == f"2 times critic {critics / 'wanted.txt'} + critic cat,dog"
    latents = jnp.asarray(normal(3, 2, 4, 8))
    one, two = (combined_critic(model, critics=[str(critics / name)])[0] for name in ("trained", "concept"))
    np.testing.assert_allclose(both(latents), 2 * one(latents) + two(latents), rtol=1e-5)
    by_words, said = combined_critic(model, ["cat,dog=-1"], by="direction")
    np.testing.assert_allclose(by_words(latents), -two(latents), atol=1e-5)
    assert said.startswith("-1 times concept cat,dog (")


def test_text_that_reads_worse_than_allowed_gives_way_to_the_standard_one(tiny_runs):
    words = ["--concept", "cat", "--prompt", "The", "--rate", "0.5", "--max-loss", "1e-9"]
    code, report, err = align(tiny_runs, *words)
    assert code == 0, err
    standard, aligned = report["ways"]
    if report["rolled_back"][0]:
        assert aligned["texts"] == standard["texts"] and report["norm"] == [0.0] and report["after"] == report["before"]
    else:
        assert aligned["fluency"][0] <= standard["fluency"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concept", "xyzzy"], "concept xyzzy: not one of its words is in the"),
        (["--concept", "cat=much"], "weight"),
        (["--concept", "@nowhere.txt"], "concept nowhere.txt: no such file"),
        (["--critic", "nowhere"], "critic nowhere: holds no critic.json"),
        ([], "say what is wanted"),
        (["--concept", "cat", "--rate", "0"], "rate must lie in (0, 1000]"),
        (["--concept", "cat", "--inner-steps", "0"], "inner_steps must lie in 1 .. 1000"),
        (["--critic", "x", "--by", "text"], "--by is about a concept"),
        (["--concept", "xyzzy", "--by", "direction"], "concept xyzzy: not one of its words is in the"),
        (["--concept", "cat", "--steer", "1"], "--steer is about a control"),
        (["--concept", "cat", "--max-tokens", "4000"], "beyond the context of 48"),
        (["--concept", "cat", "--feedback", "latent"], "needs a stem that reads latents alone"),
        (["--concept", "cat", "--max-drift", "2"], "max_drift must lie in (0, 1]"),
    ],
)
def test_what_cannot_be_aligned_is_refused_in_one_line(tiny_runs, words, message):
    code, result, err = align(tiny_runs, *words)
    assert code == 2 and message in result["error"] and "internal" not in err


def test_critics_that_cannot_be_trained_are_refused(tiny_runs, tmp_path):
    words = ["train", "critic", "--out", str(tmp_path / "x"), "--autoencoder", str(tiny_runs / "autoencoder")]
    for extra in ([], ["--wanted", "a.txt"], ["--concept", "cat", "--wanted", "a", "--unwanted", "b"]):
        code, result, _ = tiny.calm(*words, *extra)
        assert code == 2 and "give --wanted and --unwanted, or --concept alone" in result["error"]
    assert not (tmp_path / "x").exists()
