import os
import socket

import command
import numpy as np
import pytest

import utils

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


# ---------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    file = tmp_path / "x.json"
    utils.write_json(file, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ---------------------------------------------------------------- streams, and who has a folder


GONE = ("import os, sys, utils\nread, write = os.pipe()\nos.close(read)\nsys.{name} = os.fdopen(write, 'w')\n"
        "def main(args):\n    for i in range(100):\n        print('x' * 1000, flush=bool(i % 2), file=sys.{name})\n"
        "    open(sys.argv[1], 'w').write('done')\nutils.run_script(main, None)")  # fmt: skip


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_script_outlives_the_reader_of_what_it_prints(tmp_path, name):
    done = command.run(GONE.format(name=name), tmp_path / "end")
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "done"


def test_a_script_runs_where_the_streams_are_closed_or_belong_to_a_notebook(tmp_path):
    for streams in ("sys.stdout = sys.stderr = None", "sys.stdout = sys.stderr = io.StringIO()"):
        script = (f"import io, sys, utils\n{streams}\nbefore = sys.stdout, sys.excepthook\ndef main(args):\n"
                  "    print('x'); utils.make_log(sys.argv[1])('a line')\nutils.run_script(main, None)\n"
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


def test_a_folder_is_for_one_process_and_a_dead_one_holds_nothing(tmp_path):
    script = "import sys, utils\nutils.run_script(lambda args: utils.locked(sys.argv[1]).__enter__(), None)"
    (tmp_path / "in_use").write_text("process 1 on a machine that lost power")
    with utils.locked(tmp_path):
        done = command.run(script, tmp_path)
        assert done.returncode == 2 and f"is in use by process {os.getpid()} on {socket.gethostname()}; " in done.stderr
    assert list(tmp_path.iterdir()) == [] and command.run(script, tmp_path).returncode == 0


def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    genuine, locks = fcntl.flock, []

    def flock(file, how):
        if not locks:
            os.unlink(tmp_path / "in_use")  # as the holder does at its end, between our open and our lock
        locks.append(how)
        genuine(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    script = "import sys, utils\nutils.run_script(lambda args: utils.locked(sys.argv[1]).__enter__(), None)"
    with utils.locked(tmp_path):
        assert len(locks) == 2 and command.run(script, tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


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
