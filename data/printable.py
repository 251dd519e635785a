"""Names that any output accepts."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: object) -> str:
    r"""Return a text in one line of visible characters; others become escapes such as ``\x1b`` and ``\n``.

    File and class names may hold anything: control characters that command a terminal, line ends that forge a line of
    the log, marks that turn the direction of writing, bytes that are not UTF-8.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )
