"""Half surrogate pairs, which JSON and command lines can spell and UTF-8 text cannot hold."""


def replace_half_surrogates(text: str) -> str:
    """Text with U+FFFD in place of each half surrogate pair; whole pairs become the character that they stand for."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
