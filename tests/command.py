"""Run a script as a command, in a fork of this process, which has imported the libraries: five
seconds less each.

The modules of the project are imported again there, so that what a test has patched is not seen.
Tests of imports and signals start a process of their own.
"""

import multiprocessing
import os
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")


def _draw_nothing(figure, file, **options):
    """In the place of Figure.savefig: half a second less for each picture."""
    Path(file).touch()


def _forget_project():
    """Forget all imported modules of this project but the tests."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{ROOT}/") and not file.startswith((f"{ROOT}/tests/", sys.prefix)):
            del sys.modules[name]


def _run(folder, script, words, cwd, environment, file_size):
    _forget_project()
    Figure.savefig = _draw_nothing
    from adnc.scoring import metrics

    metrics.RESAMPLES = 200  # as conftest.py does in this process
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    # Python ignores Ctrl-C in a process that a shell has started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_size:  # as on a full disk: no file may grow beyond this number of bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0] = str(ROOT)
    sys.argv = [script, *words]
    try:
        if script.startswith(("tools.", "docs.", "torch.")):
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()


def run(script, *words, cwd=".", env=None, file_size=None, meanwhile=None, timeout=300):
    """Run a script (its path, a module such as tools.evaluate, or lines of Python) and wait for its
    end. Its pictures are empty files, and its bootstraps short.

    meanwhile(process, path of its standard output) is called while it runs. Returns what
    subprocess.run([python, script, *words], capture_output=True, text=True) returns.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = str(script)
        if "\n" in script:
            (Path(folder) / "code.py").write_text(script)
            script = f"{folder}/code.py"
        if script.endswith(".py"):
            script = os.path.abspath(script)
        environment = dict(os.environ if env is None else env)
        process = FORK.Process(
            target=_run,
            args=(folder, script, [str(word) for word in words], str(cwd), environment, file_size),
        )
        process.start()
        if meanwhile:
            meanwhile(process, Path(folder) / "stdout")
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(script, timeout)
        stdout, stderr = (
            (Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr")
        )
    return subprocess.CompletedProcess([script, *words], process.exitcode, stdout, stderr)


def run_printed(line, *more, **where):
    """`run` of a command that a script printed: this Python, a script, its words."""
    python, *words = shlex.split(line)
    cwd = where.get("cwd", ".")
    assert os.path.samefile(os.path.join(cwd, python), sys.executable)
    if words[0] == "-m":
        words = words[1:]
    elif not os.path.isabs(words[0]):
        words[0] = os.path.join(cwd, words[0])
    return run(*words, *more, **where)
