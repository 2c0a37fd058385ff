"""What every script needs: the command line, its streams and its end, the learning rate, seeds.

Not run by itself. Neither PyTorch nor pandas is imported before a function needs it, so that `--help` and a mistyped
flag answer at once, and importing this file changes nothing in the process.
"""

import argparse
import contextlib
import errno
import hashlib
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
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


@contextlib.contextmanager
def time_limit(seconds, sentence):
    """InputError with the sentence where what is inside takes longer: in the main thread, where there are alarms."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise InputError(sentence)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    with own_streams(), stopped_by_signals():
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
        except Stopped as stopped:
            if not stopped.reported:
                print(f"stopped by {stopped}", file=sys.stderr)
            raise


class Stopped(SystemExit):
    """Somebody asked the process to end; `code` is the exit status, 128 + the number of the signal; `reported` whether
    the user has been told."""

    reported = False

    def __str__(self):
        return signal.Signals(self.code - 128).name


ONE_REQUEST = 1.0  # seconds in which signals are one: who signals a whole group may reach a process twice


def is_new_request(times):
    """Whether a signal that arrives now is another request than that of the last of `times`, which it is added to; if
    not, what the first one has begun to tidy up is not disturbed."""
    if times and time.monotonic() - times[-1] < ONE_REQUEST:
        return False
    times.append(time.monotonic())
    return True


@contextlib.contextmanager
def stopped_by_signals():
    """STOP_SIGNALS that would end the process at once raise Stopped, so that nothing temporary is left."""

    before, stopped = {}, []

    def stop(number, frame):
        if is_new_request(stopped):
            raise Stopped(128 + number)

    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:  # Ctrl-C raises anyway, and nohup ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Threads(ThreadPoolExecutor):
    """Threads that begin nothing more once their context ends by an exception, as Ctrl-C and signals are."""

    def __exit__(self, kind, *problem):
        self.shutdown(cancel_futures=kind is not None)


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


def near(path):
    """The path as a person would type it here: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative
