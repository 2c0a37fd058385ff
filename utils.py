"""What every script needs: the command line, files that are whole or not there, the learning rate.

Not run by itself. Neither PyTorch nor pandas is imported before a function needs it, so that `--help` and a mistyped
flag answer at once, and importing this file changes nothing in the process.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import warnings
from pathlib import Path

# a job scheduler or container, Ctrl-C, SLURM's warning, a lost connection
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
CLASSES = ("NC", "AD")  # the position is the class number of the model; AD is the positive class

# ---------------------------------------------------------------- the command line of every script


class InputError(ValueError):
    """Something that the user can fix. The text says what was found, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as the manual; wrong usage is one `error: ...` line and status 2."""

    def __init__(self, manual):
        super().__init__(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_subject_pattern(self, group):
        group.add_argument("--subject-pattern", type=regex, metavar="REGEX", help="finds the subject in names of scans "
                           "that no metadata know, with the first group of a regular expression, e.g. '(sub\\d+)_'")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, which takes a value such as -10mm:10mm for a flag."""
        words = []
        for word in sys.argv[1:] if args is None else args:
            if re.match(r"-\.?\d", word) and words and re.fullmatch("--[a-z-]+", words[-1]):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_known_args(words, namespace)

    def error(self, message):
        self.exit(2, f"error: {printable(message)}\n")


def number(low, high, kind=float):
    """A `type` for argparse: a number from `low` to `high`; with kind=int a whole one."""

    def read(word):
        with contextlib.suppress(ValueError):
            if low <= kind(word) <= high:  # not so for nan
                return kind(word)
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{word} is not a {what} from {low:.10g} to {high:.10g}")

    return read


AMOUNT, POSITIVE = number(0, 1e6), number(1e-30, 1e6)  # more, or inf, is a slip of the finger
SHARE = number(0, 0.999999)
COUNT, SIDE, SEED = number(1, 1e6, int), number(32, 4096, int), number(0, 2**32 - 1, int)


def regex(word):
    """A `type` for argparse: a regular expression with a group, as text."""
    try:
        if re.compile(word).groups:
            return word
        raise argparse.ArgumentTypeError(f"{word} has no group; put what is the subject in (...), as in '(sub\\d+)_'")
    except re.error as problem:
        raise argparse.ArgumentTypeError(f"{word} is no regular expression ({problem})") from None


def span(word):
    """A `type` for argparse: FROM:TO as (from, to, "index" or "mm"): 81:100 counts slices, -10mm:10mm are positions."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})|(-?\d{1,4}(?:\.\d+)?)mm:(-?\d{1,4}(?:\.\d+)?)mm", word)
    if not match:
        raise argparse.ArgumentTypeError(f"{word} is not FROM:TO; expected slice numbers as in 81:100, or millimetres "
                                         "as in -10mm:10mm")
    low, high = (float(bound) for bound in match.groups() if bound is not None)
    if low > high:
        raise argparse.ArgumentTypeError(f"{word} ends before it begins")
    return low, high, "index" if match[1] else "mm"


def size(word):
    """A `type` for argparse: WIDTHxHEIGHT in pixels, as (width, height)."""
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", word)
    if not match or not all(16 <= int(side) <= 4096 for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{word} is not WIDTHxHEIGHT with 16 to 4096 pixels a side, as 256x240 is")
    return int(match[1]), int(match[2])


def picture(word):
    """A `type` for argparse: a PNG file to write, which is not there yet."""
    path = Path(word)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{word} does not end in .png")
    if os.path.lexists(path):
        raise argparse.ArgumentTypeError(f"{word} is already there, and nothing is overwritten; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write into")
    return word


def add_volume_flags(parser, default="those in brackets"):
    """The flags that say how a volume is cut into slices, of extract.py and predict.py; None where not given. Returns
    their group."""
    group = parser.add_argument_group("how volumes are cut into slices", f"(default: {default})")
    add = group.add_argument
    add("--plane", choices=("axial", "coronal", "sagittal"), help="left is on the left, faces look to it (axial)")
    add("--slices", type=span, metavar="FROM:TO", help="numbers as in 81:100, or positions as in -10mm:10mm")
    add("--count", type=number(1, 1000, int), metavar="N", help="the N slices in the middle of the head (20)")
    add("--size", type=size, metavar="WxH", help="pixels of a slice, about the middle of the head (the whole volume)")
    add("--turn", type=int, choices=(0, 90, 180, 270), help="degrees, counter-clockwise (0)")
    add("--spacing", type=number(0.25, 10), metavar="MM", help="size of a pixel (1)")
    add("--step", type=number(0.25, 50), metavar="MM", help="from one slice to the next (as --spacing)")
    add("--strip", action="store_true", help="remove the skull with deepbet (requirements-volumes.txt)")
    return group


def read_flags(parse_args):
    """The flags of a script that is run, read before the imports that take time: --help and a mistyped flag answer at
    once, and Ctrl-C in those imports ends without a traceback (exit status 130)."""

    def end_quietly(kind, problem, trace):
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, problem, trace)

    sys.excepthook = end_quietly
    return parse_args()


class Outlived:
    """A stream whose reader may go away, as in `train.py | head`, or with its terminal: what is written after that goes
    nowhere, and the work goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, work, *given):
        try:
            return work(*given)
        except OSError as problem:
            with contextlib.suppress(OSError, AttributeError):  # a notebook's has no descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if problem.errno not in (errno.EPIPE, errno.EIO):
                raise OSError(f"what is printed cannot be written: {problem.strerror}") from None
            return len(*given) if given else None


@contextlib.contextmanager
def own_streams():
    """Standard output and error of a script: they may be closed, as by a daemon, lose their reader, or belong to a
    notebook."""
    before = sys.stdout, sys.stderr, warnings.showwarning
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know all letters of a name
        setattr(sys, name, Outlived(stream))
    warnings.showwarning = lambda message, *where, **more: print(f"warning: {printable(message)}", file=sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr, warnings.showwarning = before


def run_script(main, args):
    """Run a script's main. InputError, OSError and MemoryError become one `error: ...` line and exit status 2, warnings
    a `warning: ...` line; any other exception is a defect of this program and keeps its traceback."""
    with own_streams():
        try:
            try:
                main(args)
            finally:
                sys.stdout.flush()
        except (InputError, OSError, MemoryError) as problem:
            said = problem
            if isinstance(problem, MemoryError):
                said = f"memory ran out ({problem or 'no more is said'})"
            elif isinstance(problem, OSError) and problem.filename:
                said = f"{os.fsdecode(problem.filename)} cannot be used: {problem.strerror}"
            print(f"error: {printable(said)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)


def printable(text, breaks="\n"):
    """Text for a terminal: what does not print (control characters, bytes that are not UTF-8) becomes an escape."""
    return "".join(c if c.isprintable() or c in breaks else ascii(c)[1:-1] for c in str(text))


# ---------------------------------------------------------------- the schedule, and seeds


def lr_at(step, *, steps_per_epoch, epochs, warmup_epochs, lr):
    """The learning rate of optimizer step `step` (from 0): linear to `lr` over the warm-up, then cosine to 0.

    The warm-up ends after warmup_epochs * steps_per_epoch steps, the cosine (Loshchilov & Hutter 2017, arXiv
    1608.03983) after epochs * steps_per_epoch. A pure function, so that a resumed run cannot drift.
    """
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def seed_of(*seeds):
    """One seed (32 bits) out of a tuple of whole numbers, such as (seed, epoch)."""
    import numpy as np

    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def fingerprint(text, digits=12):
    """The first hex digits of the SHA-256 of a text, such as an id that a file should not name."""
    return hashlib.sha256(str(text).encode("utf-8", "surrogateescape")).hexdigest()[:digits]


# ---------------------------------------------------------------- files


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
    """A table of strings as `write_csv` wrote it; an empty cell is missing, but a scan may be named NA."""
    import pandas as pd

    table = pd.read_csv(path, dtype="string", keep_default_na=False, encoding_errors="surrogateescape")
    return table.mask(table == "").replace(f"^'{FORMULA}", r"\1", regex=True).astype("string")


def read_bytes(path):
    """All of a file that people made. ValueError where it is none: a pipe would be waited for without limit."""
    if not os.path.isfile(path):
        raise ValueError("it is a folder or a pipe" if os.path.exists(path) else "there is no such file")
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise ValueError(problem.strerror) from None


MISSING = {"", "na", "n/a", "#n/a", "<na>", "n.a.", "not available", "nan", "none", "null", "unknown", "unk",
           "missing", "?", "-", "--", "."}  # in any case


def read_table(path, columns):
    """A table that people made, as text: separated by commas, semicolons or tabs, in UTF-8 or UTF-16, with names of
    columns in any case. Words that mean "missing" are missing, but not in the column scan: one may be named NA.
    InputError where it cannot be read or lacks one of the `columns`."""
    import pandas as pd

    try:
        raw = read_bytes(path)
        if raw[:4] == b"PK\3\4":
            raise ValueError("it is a workbook; save it as CSV")
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raw = raw.decode("utf-16").encode()
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
        raise InputError(f"{path} has the columns {', '.join(table.columns)}; expected {' and '.join(columns)}, and "
                         "none twice")
    return table.apply(lambda column: column if column.name == "scan" else
                       column.where(~column.str.lower().isin(MISSING)))


def make_log(path):
    """A function that prints a line past the bars and appends it to the file."""
    from tqdm import tqdm

    def log(line):
        line = printable(line)
        tqdm.write(line)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


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
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty, and nothing is overwritten; choose a new --out{or_else}")
    return folder


def clear_folder(out, made):
    """Empty the folder of work that failed at its start, so that the corrected command can be given; it is removed
    where it was `made` for that: what was there stays, and so does a link to it."""
    import shutil

    with contextlib.suppress(OSError):  # what went wrong before counts more
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if made:
            out.rmdir()


@contextlib.contextmanager
def locked(folder):
    """The folder for this process alone, as long as the context is open: the operating system holds the lock and lets
    go of it when the process ends, however it ends. InputError where another process has it."""
    path = Path(folder) / "in_use"
    try:
        file = _open_locked(path)
    except ImportError:  # Windows
        yield
        return
    except BlockingIOError:
        holder = path.read_text() if path.exists() else ""
        raise InputError(f"{folder} is in use by {holder or 'another process'}; wait for its end, stop it, or choose a "
                         "new --out") from None
    except OSError as problem:
        raise OSError(f"the folder {folder} cannot be written into: {problem.strerror}") from None
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _open_locked(path):
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


def near(path):
    """The path as a person would type it here: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative
