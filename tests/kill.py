"""Trains in children that are killed (SIGKILL) again and again: python tests/kill.py FOLDER KILLS
FLAGS...

test_resume.py runs it. Children are forked before anything is computed, so that a start costs no
import. Half of the children are killed after a random time, half when a half-written file is seen
after that time. Finished runs are in FOLDER/0, FOLDER/1, ...; a line for each kill says what it
hit.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import train


def start_child(out, flags):
    """Start or resume training in a child; returns its process id."""
    child = os.fork()
    if child != 0:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    words = ["--out", str(out), *flags]
    if (out / "last.pth").exists():
        words = ["--out", str(out), "--resume"]
    elif out.exists():  # killed before the first checkpoint
        os.rename(out, out.with_name(f"stillborn-{time.monotonic_ns()}"))
    try:
        train.main(words)
        os._exit(0)
    except BaseException as problem:
        print(repr(problem), file=sys.stderr, flush=True)
        os._exit(1)


def wait_or_kill(child, out, *, after, in_a_save, may_kill):
    """Wait for the end of the child, or kill it `after` seconds. Returns its status, or None if
    killed."""
    start = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if may_kill and time.monotonic() - start > after:
            if list(out.glob("*.tmp")) or not in_a_save:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
        time.sleep(0.0005)


def main(folder, kills, *flags):
    random.seed(0)
    folder, kills = Path(folder), int(kills)
    run, killed = 0, 0
    while killed < kills or (folder / str(run)).exists():
        out = folder / str(run)
        child = start_child(out, flags)
        status = wait_or_kill(
            child,
            out,
            after=random.uniform(0.1, 1.2),
            in_a_save=killed % 2 == 1,
            may_kill=killed < kills,
        )
        if status is None:
            killed += 1
            half_written = ", ".join(path.name for path in out.glob("*.tmp")) or "nothing"
            print(f"killed; half written: {half_written}", flush=True)
        elif status != 0:
            sys.exit(f"run {run} failed")
        else:
            print(f"run {run} finished", flush=True)
            run += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
