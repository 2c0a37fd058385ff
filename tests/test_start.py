"""A run that cannot start, cannot fetch its batches, cannot be alone, or has lost its reader."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import command
import pytest
from conftest import ROOT, SMALL, train_small, train_steps

import dataset
from adnc import engine
from adnc import files
import predict
from adnc import distributed as runtime
import train
from adnc import cli as utils
from utils import load_checkpoint


def unreadable(path):
    path.write_bytes(b"no weights")
    return str(path)


@pytest.mark.parametrize("existed, fail", [
    (False, lambda tmp: ["--init", unreadable(tmp / "weights.pth")]),
    (True, lambda tmp: ["--init", str(tmp / "none.safetensors")]),
    ("link", lambda tmp: ["--stem", "conv", "--init", str(tmp)]),
])  # fmt: skip
def test_a_start_that_fails_leaves_nothing_and_the_corrected_command_runs(ad_nc, tmp_path, existed, fail):
    out = tmp_path / "run"
    if existed == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o750)
        out.symlink_to(tmp_path / "elsewhere")
    elif existed:
        out.mkdir(mode=0o750)
    with pytest.raises(utils.InputError):
        train_steps(ad_nc, out, *fail(tmp_path))
    assert out.exists() == bool(existed) and out.is_symlink() == (existed == "link")
    assert not existed or not list(out.iterdir()) and out.stat().st_mode & 0o777 == 0o750
    train_steps(ad_nc, out, "--epochs", "1")


def test_a_first_step_that_fails_leaves_nothing_and_a_later_one_all(ad_nc, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(utils.InputError, match="is not empty, and nothing is overwritten"):
        train_steps(ad_nc, kept)
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
    step, taken, wanted = engine.train_step, [], []

    def fail(state, *given, **more):
        if len(taken) == wanted[-1]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        taken.append(step(state, *given, **more))

    monkeypatch.setattr(engine, "train_step", fail)
    sentence = "ran out at --batch-size 16 and --image-size 32 .Def.*lower --batch-size"
    for steps, left in ((0, False), (1, True)):
        wanted.append(steps)
        with pytest.raises(OSError, match=sentence) as problem:
            train_steps(ad_nc, tmp_path / "run")
        assert (tmp_path / "run" / "last.pth").exists() == (tmp_path / "run").exists() == left
        assert ("a resumed run keeps its flags" in str(problem.value)) == ("--resume" in str(problem.value)) == left


def test_a_machine_without_enough_memory_is_told_what_to_lower(ad_nc, tmp_path):
    script = ("import resource, sys, conftest, train\n"
              "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**29\n"
              "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
              "train.run_script(train.main, train.parse_args(['--data', sys.argv[1], '--out', sys.argv[2],\n"
              "                 *conftest.SMALL, '--image-size', '2048', '--batch-size', '48']))")
    done = command.run(script, ad_nc, tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "ran out at --batch-size 48 and --image-size 2048" in done.stderr and not (tmp_path / "run").exists()
    script = "import utils\ndef main(args): raise MemoryError('9 GiB')\nutils.run_script(main, None)"
    done = command.run(script)
    assert (done.returncode, done.stderr) == (2, "error: memory ran out (9 GiB)\n")


# ---------------------------------------------------------------- two in one folder


def test_two_processes_are_not_in_one_run_folder(ad_nc, tmp_path, monkeypatch):
    """The second is refused while the first is in its second step, and the first ends as if nothing had been."""
    run, said = tmp_path / "run", []

    def second(state, *given, **more):
        if state.step == 1:
            for flags in (["--resume"], ["--data", ad_nc, *SMALL]):
                said.append(command.run(ROOT / "train.py", "--out", run, *flags))
        return step(state, *given, **more)

    step = engine.train_step
    monkeypatch.setattr(engine, "train_step", second)
    train_steps(ad_nc, run, "--epochs", "1")
    assert [done.returncode for done in said] == [2, 2]
    assert f"is in use by process {os.getpid()} on" in said[0].stderr and "is not empty" in said[1].stderr
    assert load_checkpoint(run / "last.pth")["epoch"] == 1 and not (run / "in_use").exists()


def test_a_run_that_another_has_finished_meanwhile_is_not_written_over(ad_nc, tmp_path, monkeypatch):
    """It was empty when it was looked at, and free when it was locked."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best_model.pth").write_text("of the other")
    monkeypatch.setattr(files, "open_out", lambda path, *more: Path(path))
    with pytest.raises(utils.InputError, match="run is not empty, and nothing is overwritten"):
        train_steps(ad_nc, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["best_model.pth"]


# ---------------------------------------------------------------- batches that do not come


def test_a_batch_that_is_lost_ends_the_wait_with_a_sentence(ad_nc, tmp_path, monkeypatch):
    class Lost(dataset._InMemory):
        def __getitem__(self, batch):
            return lambda: None  # cannot be handed over: says so in the worker, and nobody hears it

    monkeypatch.setattr(dataset, "_InMemory", Lost)
    monkeypatch.setattr(dataset, "LONGEST_FETCH", 2)
    args = train.parse_args([])
    slices = dataset.decode_set(ad_nc).part("train")
    said = "a batch did not come .*/dev/shm is full.*--workers 0"
    with pytest.raises(OSError, match=said), runtime.explain_end(args):
        next(iter(dataset.make_loader(slices, 8, workers=1)))


@pytest.mark.parametrize("workers, batch, free, fits", [(1, 8, 60_000, False), (1, 8, 62_000, True),
                                                        (2, 1, 11_000, False), (1, 10**6, 470_000, True)])
def test_what_is_fetched_ahead_must_fit_into_shared_memory(ad_nc, monkeypatch, workers, batch, free, fits):
    """A slice has 48 x 40 bytes, there are 60 of them; two batches a worker are ahead, and two on their way."""
    space = collections.namedtuple("space", "free")
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: space(free if path == "/dev/shm" else 0))
    slices = dataset.decode_set(ad_nc).part("train")
    if fits:
        dataset.make_loader(slices, batch, workers=workers)
    else:
        with pytest.raises(OSError, match=f"{workers} workers hand over up to .*take --workers 0 or a smaller"):
            dataset.make_loader(slices, batch, workers=workers)


# ---------------------------------------------------------------- readers that go away, notebooks


def test_training_outlives_the_reader_of_its_output(ad_nc, tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), "--data", str(ad_nc), "--out", str(tmp_path / "run"), *SMALL,
             "--epochs", "2"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process.stdout.readline()
    process.stdout.close()  # as `head -1` does
    assert process.wait(120) == 0
    assert (tmp_path / "run" / "test" / "metrics.json").exists()
    assert "predict again with" in (tmp_path / "run" / "training_log.txt").read_text()


class NotebookStream:
    """What a notebook puts into the place of standard output: no reconfigure, no descriptor, no more than this."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def test_a_notebook_trains_and_predicts_by_calling_main_or_by_run(ad_nc, tmp_path, monkeypatch):
    stream = NotebookStream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", NotebookStream())
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1")
    assert (run / "test" / "metrics.json").exists() and "run folder" in stream.text
    assert "predict again with" in stream.text and sys.stdout is stream
    words = [str(ad_nc / "test"), "--checkpoint", str(run / "best_model.pth"), "--out"]
    predict.main(predict.parse_args([*words, str(tmp_path / "a")]))
    assert f"results in {tmp_path / 'a'}" in stream.text
    utils.run_script(predict.main, predict.parse_args([*words, str(tmp_path / "b")]))  # as %run does
    assert f"results in {tmp_path / 'b'}" in stream.text and sys.stdout is stream
    assert (tmp_path / "a" / "scans.csv").read_bytes() == (tmp_path / "b" / "scans.csv").read_bytes()
    with pytest.raises(SystemExit) as end:
        utils.run_script(predict.main, predict.parse_args([*words, str(tmp_path / "b")]))
    assert end.value.code == 2 and sys.stderr.text.count("error: ") == 1 and "is not empty" in sys.stderr.text
