"""Atomic writes, tables, output folders, and how a script ends."""

import errno
import os
import tempfile
from unittest import mock

import command
import pandas as pd
import pytest

from adnc import files
from adnc.cli import run_script
from adnc.data import pixels
from adnc.errors import InputError, printable

# ---------------------------------------------------------------- atomic writes


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    file = tmp_path / "x.json"
    files.write_json(file, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="x.json cannot be written: disk full"):
        files.write_atomically(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("write", [
    "files.write_json(path, {'a': [1] * 10**6})",
    "files.write_csv(path, pandas.DataFrame({'a': ['text'] * 10**6}))",
    "utils.save_checkpoint(path, weights=torch.zeros(10**6))",
])  # fmt: skip
def test_every_kind_of_file_is_whole_or_as_before_on_a_full_disk(tmp_path, write):
    file = tmp_path / "file"
    file.write_bytes(b"before")
    script = (
        "import sys, pandas, torch, utils\nfrom adnc import files\npath = sys.argv[1]\n"
        f"try: {write}\nexcept OSError as problem: sys.exit(str(problem))\n"
    )
    done = command.run(script, file, file_size=100_000)
    assert done.returncode == 1 and done.stderr.startswith(f"{file} cannot be written: ")
    assert file.read_bytes() == b"before"
    assert command.run(script, file).returncode == 0 and file.stat().st_size > 10**6


# ---------------------------------------------------------------- tables


def test_a_table_is_read_back_as_it_was(tmp_path):
    table = pd.DataFrame(
        {"scan": ["NA", "=1+1", "a,b\n", "\udcff"], "p": ["0.5", None, "1", ""]}, dtype="string"
    )
    files.write_csv(tmp_path / "t.csv", table)
    again = files.read_csv(tmp_path / "t.csv")
    assert again.scan.tolist() == table.scan.tolist()
    assert again.p.isna().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "scan,subject\n1,a\n2,NA\n",
        "Scan ; SUBJECT\n1;a \n2;unknown\n",
        "\ufeffscan\tsubject\n1\ta\n2\t-\n",
        "subject,other,scan\na,x,1\n?,y,2\n",
    ],
)
def test_tables_of_spreadsheets_are_read_and_missing_is_missing(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    table = files.read_table(tmp_path / "t.csv", ("scan", "subject"))
    assert table.scan.tolist() == ["1", "2"]
    assert table.subject[0] == "a" and pd.isna(table.subject[1])


@pytest.mark.parametrize("content, sentence", [
    (b"image,patient\n1,2\n", "has the columns image, patient; expected scan and subject"),
    (b"scan,subject,Subject\n1,2,3\n", "expected scan and subject, each once"),
    (b"", "is empty; expected the columns scan and subject"),
    (b"PK\3\4\0\0\xff\xfe" * 9, "expected"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_or_lacks_a_column_gets_a_sentence(tmp_path, content, sentence):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        files.read_table(tmp_path / "t.csv", ("scan", "subject"))
    with pytest.raises(InputError, match="there is no file .*none.csv"):
        files.read_table(tmp_path / "none.csv", ("scan", "subject"))


# ---------------------------------------------------------------- output folders


def test_an_output_folder_is_new_or_refused(tmp_path):
    assert files.new_folder(tmp_path / "a" / "b").is_dir()
    with pytest.raises(
        InputError, match="b exists, and nothing is overwritten; choose a new --out"
    ):
        files.new_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((InputError, OSError), match="exists|cannot be made"):
            files.new_folder(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_error():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o555)
        os.seteuid(65534 if os.getuid() == 0 else os.getuid())  # for root, no folder is read-only
        try:
            with pytest.raises(OSError, match="run cannot be made: Permission denied"):
                files.new_folder(os.path.join(folder, "run"))
            with pytest.raises(OSError, match="x.json cannot be written: Permission denied"):
                files.write_json(os.path.join(folder, "x.json"), {})
        finally:
            os.seteuid(os.getuid())
            os.chmod(folder, 0o755)


def test_unnamed_folders_of_the_same_second_get_two_names(tmp_path):
    names = []
    for _ in range(3):
        names.append(files.unused_name(tmp_path / "now").name)
        files.new_folder(tmp_path / names[-1])
    assert names == ["now", "now-2", "now-3"]


# ---------------------------------------------------------------- how a script ends


def test_wrong_input_is_one_line_and_a_defect_keeps_its_traceback():
    script = """
import sys
from adnc.cli import run_script
from adnc.errors import InputError
problem = eval(sys.argv[1])
def main():
    raise problem
run_script(main)
"""
    for problem in (
        "ValueError('of NumPy')",
        "KeyError('x')",
        "TypeError('y')",
        "RuntimeError('z')",
    ):
        done = command.run(script, problem)
        assert (
            done.returncode == 1 and "Traceback" in done.stderr and "error: " not in done.stderr
        ), problem
    for problem in ("InputError('no such thing')", "OSError('no such thing')"):
        done = command.run(script, problem)
        assert (done.returncode, done.stderr) == (2, "error: no such thing\n")
    done = command.run(script, "PermissionError(13, 'Permission denied', 'AD_NC/train/AD')")
    assert (done.returncode, done.stderr) == (2, "error: AD_NC/train/AD: Permission denied\n")
    done = command.run(script, "KeyboardInterrupt()")
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize("text", [
    "can't start new thread",
    "unable to open file <a.pth> in read-only mode: Too many open files (24)",
    "[enforce fail at inline_container.cc:672] . write failed: No space left on device",
    "std::system_error: Resource temporarily unavailable",
    "File too large",
])  # fmt: skip
def test_a_limit_of_the_system_that_comes_as_a_runtime_error_is_one_line(text, capsys):
    def main():
        raise RuntimeError(f"{text}\nException raised from ... at c10")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: a limit of the system is reached: {text}\n"


FEW_FILES = """
import resource
import predict
from adnc.cli import run_script
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # the standard streams
run_script(predict.main)
"""


def test_too_many_open_files_are_no_fault_of_the_files(ad_nc, tmp_path, run_folder):
    words = [ad_nc / "test", "--checkpoint", run_folder / "best_model.pth", "--out", tmp_path / "p"]
    done = command.run(FEW_FILES, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("Too many open files")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("limit", [errno.EMFILE, errno.ENFILE])
def test_a_slice_that_a_limit_of_the_system_hides_is_not_left_out(ad_nc, limit):
    problem = OSError(limit, os.strerror(limit))
    with mock.patch.object(pixels, "open_image", side_effect=problem):
        with pytest.raises(OSError, match=os.strerror(limit)):
            pixels.load_slices([ad_nc / "test" / "AD" / "300_70.jpeg"], (48, 40), None)


def test_a_warning_is_one_line():
    script = """
import warnings
from adnc.cli import run_script
run_script(lambda: warnings.warn("slower"))
"""
    done = command.run(script)
    assert (done.returncode, done.stderr) == (0, "warning: slower\n")


def test_names_are_printed_without_control_characters():
    assert printable("\x1b[31m5\r\n") == "\\x1b[31m5\\r\n"
    assert printable("Müller \udcff") == "Müller \\udcff"
