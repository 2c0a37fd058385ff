import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time

import command
import numpy as np
import pytest
from conftest import ROOT

from adnc import cli as utils

RECIPE = dict(steps_per_epoch=10, epochs=5, warmup_epochs=1, lr=1e-3)


# ---------------------------------------------------------------- schedule


def test_learning_rate_rises_to_its_peak_over_the_first_epoch_and_falls_to_zero():
    lrs = [utils.lr_at(step, **RECIPE) for step in range(51)]
    assert lrs[0] == pytest.approx(1e-4)  # a tenth of the way up, not a wasted step at zero
    assert lrs[9] == pytest.approx(1e-3) == lrs[10] == max(lrs)
    assert np.all(np.diff(lrs[:10]) > 0) and np.all(np.diff(lrs[10:]) < 0)
    assert lrs[30] == pytest.approx(0.5e-3)  # halfway through the cosine
    assert lrs[50] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_or_with_nothing_but_warm_up():
    assert utils.lr_at(0, **RECIPE | dict(warmup_epochs=0)) == 1e-3
    assert utils.lr_at(9, **RECIPE | dict(epochs=1)) == pytest.approx(1e-3)
    assert utils.lr_at(4, **RECIPE | dict(warmup_epochs=0.5)) == pytest.approx(1e-3)


# ---------------------------------------------------------------- streams, signals, words


def test_bars_are_for_terminals_and_nothing_is_ever_coloured(ad_nc):
    """NO_COLOR has nothing to turn off: a terminal that has colours gets none either."""
    script = f"import pathlib, slices; slices.load_slices(list(pathlib.Path({str(ad_nc)!r}).rglob('*.jpeg')), (24, 20))"
    words = dict(args=[sys.executable, "-c", script], env=os.environ | {"TERM": "xterm-256color"}, cwd=ROOT)
    assert subprocess.run(**words, capture_output=True).stderr == b""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(ours, "rb", 0) as screen:
        process = subprocess.Popen(**words, stderr=theirs)
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while part := screen.read(4096):
                seen += part
        assert process.wait() == 0
    assert b"decoding" in seen and b" slices" in seen and not re.search(rb"\x1b\[[\d;]*m", seen)


def test_a_signal_that_reaches_a_process_twice_does_not_stop_it_from_tidying_up(tmp_path):
    script = ("import os, signal, sys, utils\ndef main(args):\n    try:\n        os.kill(os.getpid(), 15)\n"
              "    finally:\n        os.kill(os.getpid(), 15)\n        open(sys.argv[1], 'w').write('tidy')\n"
              "utils.run_script(main, None)")  # fmt: skip
    done = command.run(script, tmp_path / "end")
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n") and (tmp_path / "end").exists()


GONE = ("import os, sys, utils\nread, write = os.pipe()\nos.close(read)\nsys.{name} = os.fdopen(write, 'w')\n"
        "def main(args):\n    for i in range(100):\n        print('x' * 1000, flush=bool(i % 2), file=sys.{name})\n"
        "    open(sys.argv[1], 'w').write('done')\nutils.run_script(main, None)")  # fmt: skip


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_script_outlives_the_reader_of_what_it_prints(tmp_path, name):
    done = command.run(GONE.format(name=name), tmp_path / "end")
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "done"


def test_a_script_runs_where_the_streams_are_closed_or_belong_to_a_notebook(tmp_path):
    for streams in ("sys.stdout = sys.stderr = None", "sys.stdout = sys.stderr = io.StringIO()"):
        script = (f"import files, io, sys, utils\n{streams}\nbefore = sys.stdout, sys.excepthook\ndef main(args):\n"
                  "    print('x'); files.make_log(sys.argv[1])('a line')\nutils.run_script(main, None)\n"
                  "assert (sys.stdout, sys.excepthook) == before\nsys.stdout = sys.__stdout__")  # fmt: skip
        assert command.run(script, tmp_path / "log").returncode == 0, streams
    assert (tmp_path / "log").read_text() == "a line\n" * 2


def test_a_full_disk_behind_standard_output_is_an_error_and_not_silence():
    script = "import os, utils\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nutils.run_script(print, 'x')"
    done = command.run(script)
    said = "error: what is printed cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)
    script = script.replace("print, 'x'", "lambda args: sys.exit(print('x')), None")
    done = command.run(script.replace("os, ", "os, sys, "))
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize("number", utils.STOP_SIGNALS)
def test_a_signal_ends_a_script_by_way_of_what_it_has_to_tidy_up(tmp_path, number):
    """Ctrl-C as well; what threads have not begun is dropped."""
    script = (
        "import os, sys, tempfile, time, utils\ndef main(args):\n"
        "    with tempfile.TemporaryDirectory(dir=sys.argv[1]), utils.Threads(1) as pool:\n"
        "        done = pool.map(time.sleep, [0.3] * 100)\n        os.kill(os.getpid(), int(sys.argv[2]))\n"
        "        list(done)\nutils.run_script(main, None)")  # fmt: skip
    start = time.monotonic()
    done = command.run(script, tmp_path, int(number))
    assert done.returncode == 128 + number and done.stderr.startswith("stopped by ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - start < 20


def test_a_value_that_begins_with_a_minus_is_a_value(capsys):
    parser = utils.Parser("")
    utils.add_volume_flags(parser)
    parser.add_argument("words", nargs="*")
    for words in (["--slices", "-10mm:10.5mm"], ["--slices=-10mm:10.5mm"], ["--sl", "-10mm:10.5mm"]):
        assert parser.parse_args(words).slices == (-10, 10.5, "mm")
    for words in (["--count", "-5"], ["--slices", "-x"], ["--strip", "-5"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err.startswith("error: argument --")
