"""The error that a user can fix, errors of the system, and text that is safe to print."""

import errno
import os


class InputError(ValueError):
    """Wrong input. The text says what was found, what was expected and what to do."""


# Too many open files, of the process or the machine; no memory; no process or thread; no room; a
# file that is larger than allowed.
LIMITS = ("EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "ENOSPC", "EDQUOT", "EFBIG")


def is_system_limit(problem):
    """Whether an exception says that a limit of the system is reached, whatever its type.

    Threads and PyTorch raise RuntimeError with the text of the system.
    """
    text = str(problem)
    reasons = [os.strerror(getattr(errno, name)) for name in LIMITS if hasattr(errno, name)]
    return any(reason in text for reason in (*reasons, "can't start new thread"))


def count(n, noun):
    """`1 slice`, `2,000 slices`, `2 processes`."""
    if n != 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{n:,} {noun}"


def printable(text, keep="\n"):
    """Text for a terminal, a log or a figure: characters that do not print become escapes.

    Names of files may hold control characters, or bytes that are not UTF-8. Characters in `keep`
    stay.
    """
    characters = []
    for character in str(text):
        if character.isprintable() or character in keep:
            characters.append(character)
        else:
            characters.append(ascii(character)[1:-1])
    return "".join(characters)
