"""Atomic writes, CSV, output folders."""

import csv
import hashlib
import json
import os
from pathlib import Path

import pandas as pd

from adnc.errors import InputError, printable

# ---------------------------------------------------------------- atomic writes


def write_atomically(path, write):
    """Call `write(temporary path)`, then move the file into place, so that no reader meets half a
    file.

    OSError if that fails; what was at `path` before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            # Else, after a power cut, the new name may belong to an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {problem.strerror or problem}") from None


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path, table):
    """Write a table. Names of files may hold bytes that are not UTF-8; they are written as they
    are."""
    options = dict(index=False, float_format="%.7g", errors="surrogateescape")
    write_atomically(path, lambda temporary: table.to_csv(temporary, **options))


# ---------------------------------------------------------------- reading


def read_json(path):
    """The content of a JSON file; InputError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(f"{path} cannot be read as JSON ({problem})") from None


def read_csv(path):
    """A table of strings as `write_csv` wrote it. An empty cell is missing; a scan may be named
    NA."""
    try:
        table = pd.read_csv(
            path,
            dtype="string",
            keep_default_na=False,
            na_values=[""],
            encoding_errors="surrogateescape",
        )
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read ({problem})") from None
    return table


# Words in a table of subjects that stand for "not known", in lower case.
MISSING = {
    "", "?", "-", "--", ".", "na", "n/a", "n.a.", "#n/a", "<na>", "nan", "none", "null", "missing",
    "unknown", "unk", "not available", "tbd", "tba", "to be determined",
    "anonymous", "anonymised", "anonymized", "-9", "-99", "-999",
}  # fmt: skip


def read_table(path, columns):
    """A table that people made, as text: any separator that can be detected, column names in any
    case.

    Words that mean "missing" (see MISSING) become missing, except in the column scan. InputError if
    the file cannot be read or lacks one of the `columns`.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; expected a table of {' and '.join(columns)}")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty; expected the columns {' and '.join(columns)}")
    try:
        table = pd.read_csv(
            path,
            sep=None,
            engine="python",
            encoding="utf-8-sig",
            encoding_errors="surrogateescape",
            dtype=str,
            keep_default_na=False,
        )
    except (OSError, ValueError, csv.Error) as problem:
        raise InputError(
            f"{path} cannot be read as a table ({str(problem).strip()}); expected a CSV file in "
            f"UTF-8 with the columns {' and '.join(columns)}"
        ) from None
    table = table.rename(columns=lambda name: str(name).strip().lower())
    if not set(columns) <= set(table.columns) or table.columns.duplicated().any():
        found = printable(", ".join(table.columns))[:200]
        raise InputError(
            f"{path} has the columns {found}; expected {' and '.join(columns)}, each once"
        )
    for name in table:
        table[name] = table[name].str.strip()
        if name != "scan":
            table[name] = table[name].mask(table[name].str.lower().isin(MISSING))
    return table


# ---------------------------------------------------------------- output folders


def require_new(path, flag="--out"):
    """InputError if something exists at `path`: nothing is ever overwritten."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists, and nothing is overwritten; choose a new {flag}")


def new_folder(path, flag="--out"):
    """Make the folder `path`, with its parents. InputError if it exists, OSError if it cannot be
    made."""
    path = Path(path)
    require_new(path, flag)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()  # fails if another process has just made it
    except FileExistsError:
        require_new(path, flag)
        raise OSError(
            f"{path} cannot be made: {path.parent} is not a folder; choose another {flag}"
        ) from None
    except OSError as problem:
        raise OSError(f"{path} cannot be made: {problem.strerror}; choose another {flag}") from None
    return path


def unused_name(path):
    """`path`, or path-2, path-3, ... if it exists: a name for a folder that the user did not
    name."""
    path = Path(path)
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def fingerprint(text, digits=12):
    """The first hex digits of the SHA-256 of a text, such as an id that a file should not name."""
    return hashlib.sha256(str(text).encode("utf-8", "surrogateescape")).hexdigest()[:digits]
