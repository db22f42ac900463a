"""Make a text from the network safe to print."""


def shown(text: str, limit: int) -> str:
    """Return a text from the network as one printable line of at most `limit` characters.

    Control characters, line breaks and invisible characters are escaped, so that the text cannot
    change what a log or a terminal shows.
    """
    cut = text[: limit + 1]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
    return line if len(line) <= limit else line[: limit - 1] + "…"
