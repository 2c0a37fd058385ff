"""Trains in children that are killed (SIGKILL) again and again: python tests/kill.py FOLDER KILLS FLAGS...

Not a test by itself; test_interruption.py runs it. Children are forked before anything is computed, so that a life
costs no import. Half of the lives end after a random time, half when after it a half-written file is seen. Finished
runs lie in FOLDER/0, FOLDER/1, ...; a line a kill says what it hit.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import train


def live(out, flags):
    """Train on in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        more = ["--resume"] if (out / "config.json").exists() else []
        try:
            train.main(train.parse_args(["--out", str(out), *flags, *more]))
            os._exit(0)
        except BaseException as problem:
            print(repr(problem), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def main(folder, kills, *flags):
    random.seed(0)
    folder, run, killed = Path(folder), 0, 0
    while killed < int(kills) or (folder / str(run)).exists():
        out, start = folder / str(run), time.monotonic()
        child = live(out, flags)
        in_a_save = killed % 2 == 1
        after = random.uniform(0.1, 1.2)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if killed < int(kills) and time.monotonic() - start > after:
                halves = list(out.glob("*.tmp"))
                if halves or not in_a_save:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed += 1
                    left = ", ".join(path.name for path in out.glob("*.tmp")) or "nothing"
                    print(f"killed after {time.monotonic() - start:.2f} s; half written: {left}", flush=True)
                    break
            time.sleep(0.0005)
        if done:
            if status != 0:
                sys.exit(f"run {run} failed")
            print(f"run {run} finished", flush=True)
            run += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
