"""The error that a user can fix, and text that is safe to print."""


class InputError(ValueError):
    """Wrong input. The text says what was found, what was expected and what to do."""


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
