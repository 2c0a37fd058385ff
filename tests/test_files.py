"""files.py: written whole or not at all, and folders for one process."""

import os
import resource
import socket
import tempfile

import command
import pytest

from adnc import files
from adnc import cli as utils


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    file = tmp_path / "x.json"
    files.write_json(file, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("write", [
    "files.write_json(path, {'a': [1] * 10**6})",
    "files.write_csv(path, pandas.DataFrame({'a': ['text'] * 10**6}))",
    "checkpoint.save_checkpoint(path, weights=torch.zeros(10**6))",
])  # fmt: skip
def test_every_kind_of_file_is_whole_or_as_before(tmp_path, write):
    file = tmp_path / "file"
    file.write_bytes(b"before")
    script = (f"import sys, pandas, torch, checkpoint, files; path = sys.argv[1]\n"
              f"try: {write}\nexcept OSError as problem: sys.exit(str(problem))")
    done = command.run(script, file, file_size=100_000)
    assert done.returncode == 1 and done.stderr.startswith(f"{file} cannot be written: ")
    assert file.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["file"]
    assert command.run(script, file).returncode == 0 and file.stat().st_size > 10**6


def test_a_folder_that_cannot_be_written_is_one_error():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o555)
        os.seteuid(65534 if os.getuid() == 0 else os.getuid())  # for root, no folder is read-only
        try:
            with pytest.raises(OSError, match="the folder .* cannot be written into"):
                files.make_folder(folder)
            with pytest.raises(OSError, match="x.json cannot be written: Permission denied"):
                files.write_json(os.path.join(folder, "x.json"), {})
            with pytest.raises(OSError, match="run cannot be made: Permission denied"):
                files.make_folder(os.path.join(folder, "run"))
        finally:
            os.seteuid(os.getuid())
            os.chmod(folder, 0o755)


def test_a_folder_is_for_one_process_and_a_dead_one_holds_nothing(tmp_path):
    script = "import sys, files, utils\nutils.run_script(lambda args: files.locked(sys.argv[1]).__enter__(), None)"
    (tmp_path / "in_use").write_text("process 1 on a machine that lost power")
    with files.locked(tmp_path):
        done = command.run(script, tmp_path)
        assert done.returncode == 2 and f"is in use by process {os.getpid()} on {socket.gethostname()}; " in done.stderr
    assert list(tmp_path.iterdir()) == [] and command.run(script, tmp_path).returncode == 0


def test_a_folder_of_results_is_for_one_process_and_goes_if_nothing_is_in_it(tmp_path):
    with files.own_folder(None) as none, files.own_folder(tmp_path / "a") as new:
        assert none is None and new == tmp_path / "a"
        for second in (files.own_folder, files.locked):
            with pytest.raises(utils.InputError, match=f"a is in use by process {os.getpid()} on "), second(new):
                raise AssertionError
        (new / "folder").mkdir()
        (new / "link").symlink_to(tmp_path)
        files.clear_folder(new)
        assert [path.name for path in new.iterdir()] == ["in_use"]  # the lock stays, and nothing behind a link goes
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "in_use").write_text("process 1 on a machine that lost power")
    (tmp_path / "here" / f"{files.DRAFT}x" / "slices").mkdir(parents=True)
    for name, left in (("b", False), ("here", True)):
        with pytest.raises(ZeroDivisionError), files.own_folder(tmp_path / name):
            1 / 0  # noqa: B018
        assert (tmp_path / name).exists() == left
    with pytest.raises(ZeroDivisionError), files.own_folder(tmp_path / "c") as folder:
        assert list(folder.iterdir()) == [folder / "in_use"]
        (folder / "results").touch()
        1 / 0  # noqa: B018
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["c", "results", "here"]


def test_a_disk_that_is_full_at_the_lock_is_named_and_leaves_nothing(tmp_path):
    def main(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        with files.own_folder(folder):
            raise AssertionError

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="a cannot be written into: File too large"):
            main(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    genuine, locks = fcntl.flock, []

    def flock(file, how):
        if not locks:
            os.unlink(tmp_path / "in_use")  # as the holder does at its end, between our open and our lock
        locks.append(how)
        genuine(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    script = "import sys, files, utils\nutils.run_script(lambda args: files.locked(sys.argv[1]).__enter__(), None)"
    with files.locked(tmp_path):
        assert len(locks) == 2 and command.run(script, tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []
