"""Files that are whole or not there, tables that people made, and folders for one process alone.

Not run by itself. Neither PyTorch nor pandas is imported before a function needs it.
"""

import contextlib
import io
import itertools
import json
import os
import re
import socket
from pathlib import Path

from adnc.cli import InputError, printable

# ---------------------------------------------------------------- written whole, or not at all


def write_atomically(path, write):
    """`write(temporary path)`, then move it into place, so that no reader meets half a file. OSError if it cannot be
    done; what was there before is then untouched."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or after a power cut the new name may belong to an empty file
        os.replace(temporary, path)
    except OSError as problem:
        reason = problem.strerror or problem
        if not path.parent.is_dir():
            reason = f"the folder {path.parent} is gone"
        kept = "; what was there before is untouched" if path.exists() else ""
        raise OSError(f"{path} cannot be written: {reason}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


FORMULA = r"('*[=+\-@\t\r\n])"  # what a spreadsheet would take for one, and what `disarm` itself put before it


def disarm(cell):
    """A cell of text that a spreadsheet cannot take for a formula: one more ' before what looks like one."""
    return re.sub(f"^{FORMULA}", r"'\1", cell) if isinstance(cell, str) else cell


def write_csv(path, table):
    """Write a table for people and spreadsheets; `read_csv` is its inverse."""
    import pandas as pd

    text = [name for name in table if table[name].dtype == object or isinstance(table[name].dtype, pd.StringDtype)]
    table = table.assign(**{name: table[name].map(disarm, na_action="ignore") for name in text})
    # names of files may hold bytes that are not UTF-8; they are written back as they came
    form = dict(index=False, float_format="%.7g", errors="surrogateescape")
    write_atomically(path, lambda temporary: table.to_csv(temporary, **form))


def read_csv(path):
    """A table of strings as `write_csv` wrote it; an empty cell is missing, but a scan may be named NA. InputError if
    it cannot be read."""
    import pandas as pd

    try:
        table = pd.read_csv(io.BytesIO(read_bytes(path)), dtype="string", keep_default_na=False,
                            encoding_errors="surrogateescape")
    except ValueError as problem:
        raise InputError(f"{path} cannot be read ({problem})") from None
    return table.mask(table == "").replace(f"^'{FORMULA}", r"\1", regex=True).astype("string")


def make_log(path):
    """A function that prints a line past the bars and appends it to the file."""
    from tqdm import tqdm

    def log(line):
        line = printable(line)
        tqdm.write(line)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


# ---------------------------------------------------------------- what people made


def read_bytes(path):
    """All of a file that people made. ValueError where it is none: a pipe would be waited for without limit."""
    if not os.path.isfile(path):
        raise ValueError("it is a folder or a pipe" if os.path.exists(path) else "there is no such file")
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise ValueError(problem.strerror) from None


MISSING = {"", "na", "n/a", "#n/a", "<na>", "n.a.", "not available", "nan", "none", "null", "unknown", "unk",
           "missing", "?", "-", "--", ".", "tbd", "tba", "to be determined", "anonymous", "anonymised", "anonymized",
           "-9", "-99", "-999"}  # in any case


def read_table(path, columns):
    """A table that people made, as text: separated by commas, semicolons or tabs, in UTF-8 or UTF-16, with names of
    columns in any case. Words that mean "missing" are missing, but not in the column scan: one may be named NA.
    InputError where it cannot be read or lacks one of the `columns`."""
    import pandas as pd

    try:
        raw = read_bytes(path)
        if raw[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):  # of Excel, new and old
            raise ValueError("it is a workbook; save it as CSV")
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raw = raw.decode("utf-16").encode()
        elif raw[:2].count(0) == 1:  # without a mark, as some programs write it
            raw = raw.decode("utf-16-le" if raw[1] == 0 else "utf-16-be").encode()
        first = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "surrogateescape")
        # names of files may hold bytes that are not UTF-8; the header is read as a row, for pandas renames twins in it
        table = pd.read_csv(io.BytesIO(raw), sep=max(",;\t", key=first.count), dtype=str, keep_default_na=False,
                            header=None, encoding="utf-8-sig", encoding_errors="surrogateescape")
        table = table.apply(lambda column: column.str.strip())
        table = table[1:].set_axis(table.iloc[0].str.lower(), axis=1).reset_index(drop=True).rename_axis(columns=None)
    except ValueError as problem:
        reason = str(problem).strip()
        raise InputError(f"{path} cannot be read ({reason}); expected the columns {' and '.join(columns)}") from None
    if not set(columns) <= set(table.columns) or table.columns.duplicated().any():
        names = printable(", ".join(table.columns))[:200]
        raise InputError(f"{path} has the columns {names}; expected {' and '.join(columns)}, and "
                         "none twice")
    return table.apply(lambda column: column if column.name == "scan" else
                       column.where(~column.str.lower().isin(MISSING)))


# ---------------------------------------------------------------- folders for results

IN_USE = "in_use"  # the file of `locked`
DRAFT = ".draft-"  # begins the name of what is not yet whole; of a process that was killed it stays


def make_folder(path):
    """The folder `path`, made if it is not there. OSError if it cannot be made or written into."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OSError(f"{path} is not a folder, or lies in a file; name another with --out") from None
    except OSError as problem:
        raise OSError(f"the folder {path} cannot be made: {problem.strerror}; name another with --out") from None
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OSError(f"the folder {path} cannot be written into; name another with --out")
    return path


def open_out(path, default, or_else=""):
    """The folder for results: `path`, made if it is not there, or without one `default`, default-2, ... where it is
    taken. InputError if it is not empty, since nothing is overwritten; `or_else` says what else can be done."""
    if path is None:
        make_folder(Path(default).parent)
        for number in itertools.count(1):
            folder = Path(default if number == 1 else f"{default}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    folder = make_folder(path)
    if _holds_results(folder):
        raise InputError(f"{folder} is not empty, and nothing is overwritten; choose a new --out{or_else}")
    return folder


def _holds_results(folder):
    """Whether there is more in it than the lock, which `locked` judges, and drafts."""
    return any(other.name != IN_USE and not other.name.startswith(DRAFT) for other in folder.iterdir())


@contextlib.contextmanager
def own_folder(path, default=None, or_else=""):
    """The folder of `open_out`, for this process alone as long as the context is open; where nothing was written into
    it, it goes again, unless it was there before. Without `path` and `default` there is none: None."""
    if path is None and default is None:
        yield None
        return
    made = path is None or not os.path.exists(path)
    folder = open_out(path, default, or_else)
    try:
        with locked(folder):
            if _holds_results(folder):  # of another process, meanwhile
                raise InputError(f"{folder} is not empty, and nothing is overwritten; choose a new --out{or_else}")
            clear_folder(folder, f"{DRAFT}*")
            yield folder
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def clear_folder(folder, pattern="*"):
    """Remove what work that failed has left in its folder, so that the corrected command can be given."""
    import shutil

    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # what went wrong before counts more
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != IN_USE:  # the lock is let go of by who holds it
                path.unlink()


@contextlib.contextmanager
def locked(folder):
    """The folder for this process alone, as long as the context is open: the operating system holds the lock and lets
    go of it when the process ends, however it ends. InputError where another process has it."""
    path = Path(folder) / IN_USE
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(open_locked(path))
            held.callback(_remove, path)
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())  # nothing to flush
        except ImportError:  # Windows
            pass
        except BlockingIOError:
            holder = ""
            with contextlib.suppress(OSError):
                holder = path.read_text()
            raise InputError(f"{folder} is in use by {holder or 'another process'}; wait for its end, stop it, or "
                             "choose a new --out") from None
        except OSError as problem:
            raise OSError(f"the folder {folder} cannot be written into: {problem.strerror}") from None
        yield


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def open_locked(path):
    """The file `path`, opened and locked, if its file system has locks. BlockingIOError where another process has the
    lock."""
    import fcntl

    for _ in range(10):
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            return file
        # who held it may have removed it since it was opened: a lock on such a file keeps nobody away
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()
    raise BlockingIOError
