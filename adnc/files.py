"""Atomic writes, CSV, output folders."""

import codecs
import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from pathlib import Path

import pandas as pd

from adnc.errors import InputError, is_system_limit, printable

# ---------------------------------------------------------------- atomic writes


def write_atomically(path, write):
    """Call `write(temporary path)`, then move the file into place, so that no reader meets half a
    file.

    OSError if that fails; what was at `path` before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes, two files
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


# ---------------------------------------------------------------- names


def same_name(text):
    """The spelling in which the names of scans and subjects are compared.

    macOS writes an accent as a letter of its own, spreadsheets add blanks: one person would be two.
    Unicode's NFKC, without characters of no width (category Cf, such as marks of direction, and the
    selectors of variants) and blanks at the ends. Files are opened by the name that they have.
    """
    seen = [
        char
        for char in text
        if unicodedata.category(char) != "Cf" and not "\ufe00" <= char <= "\ufe0f"
    ]
    return unicodedata.normalize("NFKC", "".join(seen)).strip()


# ---------------------------------------------------------------- reading


def unique_keys(pairs):
    """A dict of pairs; ValueError if a key is there twice, of which json would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice} is there twice")
    return content


def read_json(path):
    """The content of a JSON file; InputError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as problem:
        if is_system_limit(problem):
            raise
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
        if is_system_limit(problem):
            raise
        raise InputError(f"{path} cannot be read ({problem})") from None
    return table


def read_text(path, names_of_files):
    """The text of a file in UTF-8, or in UTF-16 with its mark, as Excel's "Unicode text" has it.

    `names_of_files`: bytes that are not UTF-8 are kept, as in names on Linux; else ValueError.
    """
    data = Path(path).read_bytes()
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig", errors="surrogateescape" if names_of_files else "strict")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not in UTF-8; save it as CSV in UTF-8") from None


def find_separator(header, columns):
    """The separator of the cells of a header: the first that separates the `columns`."""
    for separator in ",;\t|":
        (cells,) = csv.reader([header], delimiter=separator, skipinitialspace=True)
        if set(columns) <= {same_name(cell).lower() for cell in cells}:
            return separator
    return ","


def read_rows(path, columns):
    """The rows of a table as lists of texts, all of the length of the first one, the header.

    A spreadsheet may begin with sep=; and end rows, or the header, with empty cells. ValueError if
    there is no row, or if one has more cells than the header.
    """
    text = read_text(path, "path" in columns).lstrip()
    declared = re.match(r"\"?sep=(.)[^\w\r\n]*(\r\n|\r|\n)", text, re.IGNORECASE)
    if declared:
        separator, text = declared[1], text[declared.end() :].lstrip()
    else:
        separator = find_separator(text.split("\n", 1)[0], columns)

    table = []
    # strict: a quote that is never closed would swallow the rows after it
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        header = table[0] if table else row
        if any(cell.strip() for cell in row[len(header) :]):
            raise ValueError(
                f"line {reader.line_num} has {len(row)} cells, the header has {len(header)}"
            )
        missing = ["" for _ in header[len(row) :]]
        table.append([*row[: len(header)], *missing])
    if not table:
        raise ValueError("it holds nothing but blanks")
    return table


# Words in a table of subjects that stand for "not known", in lower case.
MISSING = {
    "", "?", "-", "--", ".", "na", "n/a", "n.a.", "k.a.", "<na>", "nan", "none", "null", "missing",
    "unknown", "unk", "not available", "tbd", "tba", "to be determined",
    "anonymous", "anonymised", "anonymized", "-9", "-99", "-999",
}  # fmt: skip


def read_table(path, columns):
    """A table that people made, as text: any separator that can be detected, column names in any
    case.

    Every cell is in the spelling of `same_name`. Words that mean "missing" (see MISSING) become
    missing, except in the column scan. InputError if the file cannot be read or lacks one of the
    `columns`.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; expected a table of {' and '.join(columns)}")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty; expected the columns {' and '.join(columns)}")
    try:
        rows = read_rows(path, columns)
    except (OSError, ValueError, csv.Error) as problem:
        if is_system_limit(problem):
            raise
        raise InputError(
            f"{path} cannot be read as a table ({str(problem).strip()}); expected a CSV file in "
            f"UTF-8 with the columns {' and '.join(columns)}"
        ) from None
    header = [same_name(name).lower() for name in rows[0]]
    table = pd.DataFrame(rows[1:], columns=header, dtype=object)
    table = table.loc[:, [bool(name) for name in header]]
    if not set(columns) <= set(table.columns) or table.columns.duplicated().any():
        names = printable(", ".join(table.columns))[:200]
        raise InputError(
            f"{path} has the columns {names}; expected {' and '.join(columns)}, each once"
        )
    for name in table:
        table[name] = table[name].map(same_name, na_action="ignore")
        if name != "scan":
            # What begins with # is an error of a spreadsheet, such as #N/A, #NV or #REF!.
            is_missing = table[name].str.lower().isin(MISSING) | table[name].str.startswith("#")
            table[name] = table[name].mask(is_missing)
    return table


# ---------------------------------------------------------------- output folders


def require_new(path, flag="--out"):
    """InputError if something exists at `path`: nothing is ever overwritten."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists, and nothing is overwritten; choose a new {flag}")
    parent = Path(os.path.abspath(path)).parent
    while not parent.exists():
        parent = parent.parent
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be made: {parent} is read-only; choose another {flag}")


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


def fingerprint_file(path):
    """The SHA-256 of the content of a file, in hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
