"""Command lines: a parser with one-line errors, types of flags, and how a script ends."""

import argparse
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

from adnc.errors import InputError, is_system_limit, printable

# ---------------------------------------------------------------- parser


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as the manual. Wrong usage is one `error:` line, status
    2."""

    def __init__(self, manual):
        super().__init__(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.words = []

    def parse_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_args(self.words, namespace)

    def error(self, message):
        for word in self.words:
            if word.startswith("-") and os.path.lexists(word):
                message += f"; if {word} is the file of this name, write -- before it"
                break
        self.exit(2, f"error: {printable(message)}\n")


def number(low, high, kind=float):
    """A `type` for argparse: a number from `low` to `high`; with kind=int a whole number."""

    def read(word):
        what = "whole number" if kind is int else "number"
        lowest = "above 0" if 0 < low < 1e-5 else f"of at least {low:.10g}"
        highest = "below 1" if 0.999 < high < 1 else f"at most {high:.10g}"
        message = f"{word} is not a {what} {lowest} and {highest}"
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(message) from None
        if not low <= value <= high:  # also for nan
            raise argparse.ArgumentTypeError(message)
        return value

    return read


AMOUNT = number(0, 1e6)
POSITIVE = number(1e-30, 1e6)
FRACTION = number(0, 0.999999)
COUNT = number(1, 1e6, int)
SIDE = number(32, 4096, int)
SEED = number(0, 2**32 - 1, int)


def regex(word):
    """A `type` for argparse: a regular expression with at least one group, as text."""
    try:
        groups = re.compile(word).groups
    except re.error as problem:
        raise argparse.ArgumentTypeError(f"{word} is no regular expression ({problem})") from None
    if groups == 0:
        raise argparse.ArgumentTypeError(
            f"{word} has no group; put the part that names the subject in (...), as in '(sub\\d+)_'"
        )
    return word


def new_png(word):
    """A `type` for argparse: the name of a PNG file to write, which must not exist yet."""
    path = Path(word)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{word} does not end in .png")
    if os.path.lexists(path):
        raise argparse.ArgumentTypeError(
            f"{word} exists, and nothing is overwritten; choose another name"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write into")
    return word


def add_subject_pattern(group):
    """The flag --subject-pattern of the commands that read names of scans."""
    group.add_argument(
        "--subject-pattern",
        type=regex,
        metavar="REGEX",
        help="regular expression whose first group is the subject, in names of scans: '(sub\\d+)_'",
    )


# ---------------------------------------------------------------- running a script


def describe_other_modules(script):
    """A sentence if a module named dataset, modules or utils that is loaded, or would be imported,
    is not in the folder of the file `script`, as in a notebook with a utils of its own; else an
    empty string."""
    folder = os.path.dirname(os.path.abspath(script))
    for name in ("dataset", "modules", "utils"):
        if name in sys.modules:
            file = getattr(sys.modules[name], "__file__", None)
        else:
            spec = importlib.util.find_spec(name)
            file = spec and spec.origin
        if file and os.path.dirname(os.path.abspath(file)) != folder:
            return (
                f"{file} is another module named {name}; {os.path.basename(script)} needs the one "
                f"in {folder}: import it in a process of its own, or rename the other"
            )
    return ""


def run_script(main):
    """Call `main()`. InputError, OSError, MemoryError and limits of the system become one `error:`
    line and exit status 2.

    Any other exception is a defect of this program and keeps its traceback. Warnings are one line.
    """

    def show(message, *where, **more):
        print(f"warning: {printable(message)}", file=sys.stderr)

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may not know every letter of a file name
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            main()
        except InputError as problem:
            message = str(problem)
        except MemoryError as problem:
            message = f"out of memory ({problem or 'no details'})"
        except OSError as problem:
            message = str(problem)
            if problem.filename:
                message = f"{os.fsdecode(problem.filename)}: {problem.strerror}"
        except RuntimeError as problem:
            if not is_system_limit(problem):
                raise
            message = f"a limit of the system is reached: {str(problem).splitlines()[0]}"
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        else:
            return
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)
