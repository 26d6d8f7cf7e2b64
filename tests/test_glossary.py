"""The glossary is in alphabetical order, short, and names files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENTRIES = [entry for entry in (ROOT / "docs" / "glossary.md").read_text().split("\n\n") if entry.startswith("**")]


def test_words_are_in_alphabetical_order_and_once():
    words = [entry.split("**")[1].lower().rstrip(".") for entry in ENTRIES]
    assert len(words) > 50 and words == sorted(set(words))


def test_an_entry_is_one_line_and_its_files():
    wrong = [entry for entry in ENTRIES if len(entry.splitlines()) != 2 or max(map(len, entry.splitlines())) > 120]
    assert not wrong, wrong


def test_the_files_exist():
    named = {(entry.split("**")[1], path) for entry in ENTRIES for path in re.findall(r"`([\w/.]+)`", entry.splitlines()[1])}
    missing = sorted((word, path) for word, path in named if not (ROOT / "src" / "calm" / path).exists())
    assert len(named) >= len(ENTRIES) and not missing, missing
