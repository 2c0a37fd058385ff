"""Runs a script as a command, forked from a process that has imported the libraries: two seconds less than a new one.

Not a test by itself. Tests of imports, of signals and of what a person types start a process of their own.
"""

import multiprocessing
import os
import resource
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "torchvision.transforms.v2", "pandas", "matplotlib.figure",
                              "scipy.optimize", "sklearn.linear_model", "sklearn.model_selection"])


def _run(folder, script, words, cwd, environment, file_size):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    if file_size:  # what a full disk does to a process: no file may grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()


def start(script, *words, cwd=".", env=None, file_size=None):
    """Start a script (a path, or lines of Python); returns a function that waits for its end and then gives what
    subprocess.run gives."""
    folder = tempfile.TemporaryDirectory()
    if not str(script).endswith(".py"):
        (Path(folder.name) / "code.py").write_text(script)
        script = f"{folder.name}/code.py"
    process = FORKS.Process(target=_run, args=(folder.name, os.path.abspath(script), list(map(str, words)), str(cwd),
                                               dict(os.environ if env is None else env), file_size))  # fmt: skip
    process.start()

    def wait(timeout=300):
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(script, timeout)
        with folder:
            said = [(Path(folder.name) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([script, *words], process.exitcode, *said)

    return wait


def run_printed(line, *more, **where):
    """`run` of a command that a script printed: this Python, a script, and its words."""
    python, *words = shlex.split(line)
    assert os.path.samefile(python, sys.executable)
    return run(*words, *more, **where)


def run(script, *words, timeout=300, **where):
    """What subprocess.run([python, script, *words], capture_output=True, text=True) gives."""
    return start(script, *words, **where)(timeout)
