"""Progress: lines where nobody watches, a bar on a terminal, nothing when it is to be quiet."""

import io

import pytest

from calm.text.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bytes_are_lines_with_speed_and_time_left():
    stream = io.StringIO()
    with Progress("encode", 10_000_000, stream=stream, every=0.0) as progress:
        progress.skip(2_000_000)
        progress.advance(3_000_000)
    assert stream.getvalue().startswith("encode: 5.0 of 10.0 MB, ") and " s left\n" in stream.getvalue()
    speed = float(stream.getvalue().split("MB, ")[1].split()[0])
    assert speed > 0


def test_steps_are_lines_with_their_words():
    stream = io.StringIO()
    with Progress("step", 20, unit="steps", stream=stream) as progress:
        progress.show(10, "loss 3.4")
        progress.line("saved")
    assert stream.getvalue() == "step 10/20  loss 3.4\nsaved\n"
    with Progress("cell", unit="steps", stream=stream, every=0.0) as progress:
        progress.advance(3)
    assert "cell: 3, " in stream.getvalue()


def test_lines_of_a_long_work_are_far_between():
    stream = io.StringIO()
    with Progress("encode", stream=stream) as progress:
        for _ in range(100):
            progress.advance(1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("unit", ["bytes", "steps"])
def test_a_terminal_gets_a_bar_and_square_brackets_are_text(unit):
    stream = Terminal()
    with Progress("work", 4, unit=unit, stream=stream) as progress:
        progress.advance(2)
        progress.show(4, "loss [bold]3.4")
        progress.line("saved [a]")
    shown = stream.getvalue()
    assert "saved [a]" in shown and "loss [bold]3.4" in shown and "/" in shown


def test_quiet_is_quiet():
    stream = Terminal()
    with Progress("work", 4, stream=stream, quiet=True, every=0.0) as progress:
        progress.advance(1)
        progress.show(2, "words")
        progress.line("text")
    assert stream.getvalue() == ""
