"""extract.py on a folder of volumes, and predict.py on volumes as on their slices."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, train_steps
from heads import AFFINE, VALUES, cut, head, nib, write_dicom
from PIL import Image
from test_predict import run_predict

import utils as checkpoint
from tools import extract
import predict
from adnc.volumes import read as readers
from adnc.volumes import cut as volumes
from adnc.files import read_csv
from adnc.cli import InputError, run_script
from adnc.volumes.cut import Look


@pytest.mark.parametrize("words", [
    ["--slices", "9"], ["--slices", "9:3"], ["--slices", "1mm:9"], ["--size", "256"], ["--size", "1x2"],
    ["--turn", "45"], ["--spacing", "0"], ["--plane", "oblique"], ["--slices", "1:9", "--count", "3"],
    ["--like", "nowhere.pth"], ["--strip", "--workers", "2"],
])  # fmt: skip
def test_a_wrong_flag_is_one_error_line_and_status_2(tmp_path, words):
    nib.save(head(), tmp_path / "h.nii")
    done = command.run(extract.__file__, "h.nii", *words, cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"error: .+\n", done.stderr) and not (tmp_path / "extracted").exists()


# ---------------------------------------------------------------- a folder of volumes


def run_extract(*words):
    """extract.py in this process; returns extraction.csv."""
    args = extract.parse_args([*map(str, words), "--spacing", "6", "--count", "4"])
    extract.main(args)
    return read_csv(Path(args.out) / "extraction.csv")


def test_a_folder_becomes_slices_a_table_and_what_was_skipped(tmp_path, capsys):
    for name in ("sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "7.mgz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(head() if "nii" in name else nib.MGHImage(VALUES, AFFINE), tmp_path / "in" / name)
    (tmp_path / "in" / "bad.nii").write_bytes(b"no volume")
    (tmp_path / "in" / "sub-02" / "anat" / "sub-02_T1w.json").write_text("{}")
    (tmp_path / "in" / "._7.mgz").write_bytes(b"junk")
    table = run_extract(tmp_path / "in", "--out", tmp_path / "out").set_index("scan")
    assert list(table.columns) == [name for name in volumes.COLUMNS if name != "scan"]
    assert sorted(path.name for path in (tmp_path / "out" / "slices").iterdir()) == sorted(
        f"{scan}_{number}.png" for scan in ("sub-01_ses-2_T1w", "sub-02_T1w", "7") for number in range(11, 15))
    assert table.error["bad"].startswith("cannot be read as a volume") and pd.isna(table.n_slices["bad"])
    row = table.loc["sub-01_ses-2_T1w"]
    assert (row.subject, row.session, row.orientation, row.affine_from) == ("sub-01", "ses-2", "RAS", "sform")
    assert (row["shape"], row.voxel_sizes, row.first_slice, row.last_slice) == ("25x31x24", "6x6x6", "11", "14")
    np.testing.assert_allclose([float(word) for word in row.affine.split()], AFFINE[:3].ravel())
    assert read_csv(tmp_path / "out" / "subjects.csv").subject.tolist() == ["sub-01", "sub-02"]
    told = capsys.readouterr()
    assert "12 slices of 3 volumes in " in told.out and "1 of 4 volumes were skipped" in told.err
    assert "tools, such as .DS_Store" in told.err
    assert re.search(r"passed over: 1 .json file in .*sub-02.anat\n", told.err)
    with Image.open(tmp_path / "out" / "slices" / "7_12.png") as image:
        assert (np.asarray(image) == cut(tmp_path / "in" / "7.mgz", slices=(12, 12, "index"))[0][0]).all()


def test_folders_of_classes_are_kept_so_that_a_set_can_be_trained_on(tmp_path):
    from dataset import read_index

    for number, folder in enumerate(f"{split}/{label}" for split in ("train", "test") for label in ("AD", "NC")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        nib.save(head(), tmp_path / "in" / folder / f"sub-{number}_T1w.nii")
    run_extract(tmp_path / "in", "--out", tmp_path / "out")
    index = read_index(tmp_path / "out" / "slices")
    assert len(index) == 16 and index.subject.nunique() == 4 and set(index.split + index.label) == {
        "trainAD", "trainNC", "testAD", "testNC"}  # fmt: skip


@pytest.mark.parametrize("other", ["train/CN", "train/MCI", "val/AD", "."])
def test_volumes_outside_the_classes_are_named_before_the_classes_of_all_are_lost(run_folder, tmp_path, capsys, other):
    for folder in ("train/AD", "test/NC", other):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        nib.save(head(), tmp_path / "in" / folder / f"{len(folder)}.nii")
    said = f"2 of 3 volumes are in folders AD/ and NC/ .*, and others are not, such as .*{len(other)}.nii, so that the"
    with pytest.raises(InputError, match=said):
        run_extract(tmp_path / "in", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words = ["--plane", "axial", "--spacing", "4", "--count", "1"]
    assert run_predict(run_folder, tmp_path / "out", tmp_path / "in", *words).label.isna().all()
    assert re.search(said, capsys.readouterr().err)


def test_names_are_safe_and_no_scan_takes_the_place_of_another(tmp_path):
    names = ["=cmd|' /C calc'!A0.nii", "a\nb.nii", "..nii", "x" * 200 + ".nii", "t1.nii", "T1.nii.gz"]
    names += ["one/t1.nii", "two/t1.nii", "two/t1.nii.gz"]
    table = volumes.name_scans([(name, os.path.dirname(name)) for name in names])
    assert table.scan.is_unique and table.scan.str.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*").all()
    assert table.scan[6:].tolist() == ["one_t1", "two_t1", "two_t1-2"] and table.scan.str.len().max() < 140
    nib.save(head(), tmp_path / names[0].replace("/", ""))
    done = run_extract(tmp_path, "--out", tmp_path / "out")
    assert done.source[0] == str(tmp_path / names[0].replace("/", "")) and done.error.isna().all()


def test_an_interrupted_extraction_leaves_no_half_set(tmp_path, monkeypatch):
    for name in "ab":
        nib.save(head(), tmp_path / f"{name}.nii")
    work = volumes.extract_volume

    def fail(path, look):
        return work(path, look) if "a.nii" in path else 1 / 0

    monkeypatch.setattr(volumes, "extract_volume", fail)
    with pytest.raises(ZeroDivisionError):
        run_extract(tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_signal_ends_an_extraction_soon_and_the_same_command_runs(tmp_path, monkeypatch):
    for i in range(40):
        nib.save(head(), tmp_path / f"{i}.nii")
    work, begun = volumes.extract_volume, []

    def stop(path, look):
        begun.append(path)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return work(path, look)

    args = extract.parse_args([str(tmp_path), "--spacing", "6", "--out", str(tmp_path / "out"), "--workers", "2"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(volumes, "extract_volume", stop)
        run_script(extract.main, args)
    assert stopped.value.code == 143 and len(begun) < 10 and not (tmp_path / "out").exists()
    run_script(extract.main, args)
    assert len(list((tmp_path / "out" / "slices").iterdir())) == 40 * 20


def test_memory_that_runs_out_is_said_with_what_needs_less(tmp_path, monkeypatch):
    nib.save(head(), tmp_path / "h.nii")
    monkeypatch.setattr(readers, "read_volume", lambda *how: np.empty(2**55, np.uint8))
    with pytest.raises(OSError, match="memory ran out at .*h.nii; take a larger --spacing, fewer volumes at once"):
        run_extract(tmp_path / "h.nii", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_error_and_leaves_no_half_set(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    done = command.run(extract.__file__, "h.nii", "--out", "out", cwd=tmp_path, file_size=1500)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == "error: out/slices cannot be written: File too large; nothing is left there\n"


def test_nothing_is_overwritten_and_nothing_found_is_an_error(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    run_extract(tmp_path / "h.nii", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="is not empty, and nothing is overwritten"):
        run_extract(tmp_path / "h.nii", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist; expected a volume, a DICOM folder or a folder of volumes"):
        run_extract(tmp_path / "gone.nii", "--out", tmp_path / "a")
    with pytest.raises(InputError, match="holds no volume .* and no DICOM file"):
        run_extract(tmp_path / "out", "--out", tmp_path / "b")
    (tmp_path / "h.nii").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 1 volumes could be cut"):
        run_extract(tmp_path / "h.nii", "--out", tmp_path / "c")
    # So that the corrected command can be given.
    assert not any((tmp_path / name).exists() for name in "abc")
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="nothing is left in"):
        run_extract(tmp_path / "h.nii", "--out", tmp_path / "d")
    assert not any((tmp_path / "d").iterdir())


def test_a_missing_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    nib.save(head(), tmp_path / "h.nii")
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setenv("PATH", "")
    for module, given, words in (("dcm2niix", "dicom", []), ("deepbet.bet", "h.nii", ["--strip"]),
                                 ("nibabel", "h.nii", [])):  # fmt: skip
        readers.nibabel.cache_clear()
        readers._deepbet.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(InputError, match=f"{module.split('.')[0]}; install it with python -m pip install -r"):
                run_extract(tmp_path / given, "--out", tmp_path / module, *words)
    readers.nibabel.cache_clear()


# ---------------------------------------------------------------- like the slices of a checkpoint, and predicting


def with_record(run_folder, path, **more):
    """The checkpoint of a run, with other or more content."""
    content = checkpoint.load_checkpoint(run_folder / "best_model.pth") | more
    content.pop("format")
    checkpoint.save_checkpoint(path, **content)
    return path


def test_a_volume_is_predicted_like_its_slices(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "sub-9_T1w.nii.gz")
    words = [tmp_path / "sub-9_T1w.nii.gz", "--plane", "axial", "--spacing", "4", "--count", "5"]
    table = run_predict(run_folder, tmp_path / "a", *words, "--keep-slices", tmp_path / "kept")
    assert table.path.tolist() == sorted(map(str, (tmp_path / "kept" / "slices").iterdir()))
    assert (table.subject == "sub-9").all() and len(table) == 5 and table.error.isna().all()
    told = capsys.readouterr()
    assert "1 of 1 volumes cut: axial, 5 central slices every 4 mm, 48 x 40, 4 mm a pixel" in told.out
    again = run_predict(run_folder, tmp_path / "b", *words)  # in a temporary folder
    assert again.path.tolist() == [f"{tmp_path}/sub-9_T1w.nii.gz:{number}" for number in again.slice]
    assert (again.p_AD == table.p_AD).all()
    slices = run_predict(run_folder, tmp_path / "c", tmp_path / "kept" / "slices")
    assert (slices.p_AD == table.p_AD).all() and (slices.subject == "sub-9").all()
    # their 99 % quantile is that of training, so only the rest of the range check says anything
    assert not table.out_of_range.astype(str).str.contains("99 % quantile").any()
    with pytest.raises(InputError, match="kept is not empty, and nothing is overwritten; choose a new --out or --keep"):
        run_predict(run_folder, tmp_path / "d", *words, "--keep-slices", tmp_path / "kept")


def test_a_volume_that_cannot_be_cut_gets_a_row_with_the_reason(run_folder, ad_nc, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.nii").write_bytes(b"no volume")
    nib.save(head(), tmp_path / "good.nii")
    words = ["--plane", "axial", "--spacing", "4", "--count", "2"]
    table = run_predict(run_folder, tmp_path / "a", tmp_path, ad_nc / "test" / "AD" / "300_70.jpeg", *words)
    bad = table[table.path == str(tmp_path / "bad.nii")]
    assert len(table) == 4 and bad.error.str.startswith("cannot be read as a volume").tolist() == [True]
    assert "bad.nii cannot be read as a volume" in capsys.readouterr().err
    (tmp_path / "mix" / "dicom").mkdir(parents=True)
    shutil.copy(tmp_path / "good.nii", tmp_path / "mix")
    (tmp_path / "mix" / "dicom" / "1.dcm").write_bytes(bytes(128) + b"DICM" + b"rubbish" * 9)
    # A preview, and no scan.
    shutil.copy(ad_nc / "test" / "AD" / "300_70.jpeg", tmp_path / "mix" / "dicom")
    table = run_predict(run_folder, tmp_path / "e", tmp_path / "mix", *words)
    assert len(table) == 3 and table.path[table.error.notna()].tolist() == [str(tmp_path / "mix" / "dicom")]
    assert "passed over: 1 .jpeg file in" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "mix")
    monkeypatch.chdir(tmp_path)
    table = run_predict(run_folder, tmp_path / "c", "./bad.nii", ad_nc / "test" / "AD" / "300_70.jpeg", *words)
    assert table.error.dropna().str.startswith("cannot be read as a volume").tolist() == [True]
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "good.nii", tmp_path / "more")
    (tmp_path / "more" / "notes.txt").write_text("")
    run_predict(run_folder, tmp_path / "d", tmp_path / "more", *words)
    assert "passed over: 1 .txt file" in capsys.readouterr().err
    # Which is left as it was, so that the corrected command runs.
    kept = ["--keep-slices", str(tmp_path / "kept")]
    with pytest.raises(InputError, match="bad.nii cannot be read as a volume"):
        run_predict(run_folder, tmp_path / "b", tmp_path / "bad.nii", *words, *kept)
    with pytest.raises(InputError, match="d is not empty, and nothing is overwritten"):
        run_predict(run_folder, tmp_path / "d", tmp_path / "good.nii", *words, *kept)
    assert not (tmp_path / "kept").exists()


def test_a_dicom_folder_is_predicted(run_folder, tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-volumes.txt)")
    folder = write_dicom(tmp_path / "head")
    table = run_predict(run_folder, tmp_path / "out", folder, "--plane", "axial", "--spacing", "4", "--count", "2")
    assert table.path.str.startswith(f"{folder}:").tolist() == [True] * 2 and table.p_AD.notna().all()


def test_an_extraction_keeps_the_subjects_of_a_table_beside_the_volumes(tmp_path, capsys):
    for name in ("999.nii", "sub-8_T1w.nii", "sub-7_T1w.nii"):
        nib.save(head(), tmp_path / name)
    (tmp_path / "subjects.csv").write_text("scan,subject\n999,a0\nsub-8_T1w,b\n")
    table = run_extract(tmp_path, "--out", tmp_path / "out")
    known = read_csv(tmp_path / "out" / "subjects.csv")
    assert dict(zip(known.scan, known.subject)) == {"999": "a0", "sub-8_T1w": "b", "sub-7_T1w": "sub-7"}
    assert len(table) == 3 and "subjects.csv" not in capsys.readouterr().err
    (tmp_path / "subjects.csv").write_text("scan,subject\nx,y\n")  # of something else
    run_extract(tmp_path / "999.nii", "--out", tmp_path / "again")
    assert not (tmp_path / "again" / "subjects.csv").exists()


def test_a_table_beside_volumes_says_who_is_in_them(run_folder, tmp_path, capsys):
    words = ["--plane", "axial", "--spacing", "4", "--count", "2"]
    nib.save(head(), tmp_path / "999.nii")
    (tmp_path / "subjects.csv").write_text("scan,subject\n999,a0\n")  # whom training has seen
    for out, given in (("file", tmp_path / "999.nii"), ("folder", tmp_path)):
        table = run_predict(run_folder, tmp_path / "out" / out, given, *words)
        assert table.subject.tolist() == ["a0"] * 2 and table.exposure.tolist() == ["yes"] * 2
        assert "subjects.csv" not in capsys.readouterr().err
    # It knows better than the name.
    (tmp_path / "subjects.csv").write_text("scan,subject\nsub-07_T1w,somebody\n")
    shutil.copy(tmp_path / "999.nii", tmp_path / "sub-07_T1w.nii")
    kept = ["--keep-slices", tmp_path / "kept"]
    table = run_predict(run_folder, tmp_path / "out" / "two", tmp_path / "sub-07_T1w.nii", *words, *kept)
    assert table.subject.tolist() == ["somebody"] * 2 and "not known" not in capsys.readouterr().err
    assert read_csv(tmp_path / "kept" / "subjects.csv").subject.tolist() == ["somebody"]
    (tmp_path / "subjects.csv").unlink()
    (tmp_path / "set" / "AD").mkdir(parents=True)  # whatever the folder is called, and above it
    shutil.copy(tmp_path / "999.nii", tmp_path / "set" / "AD")
    (tmp_path / "set" / "AD" / "subjects.csv").write_text("scan,subject\n999,a0\n")
    for out, given in (("there", tmp_path / "set" / "AD"), ("above", tmp_path / "set")):
        table = run_predict(run_folder, tmp_path / "out" / out, given, *words)
        assert table.subject.tolist() == ["a0"] * 2 and "passed over" not in capsys.readouterr().err
    (tmp_path / "set" / "AD" / "subjects.csv").write_text("scan,subject\nfoo,a0\n")
    assert run_predict(run_folder, tmp_path / "out" / "foo", tmp_path / "set", *words).subject.isna().all()
    told = capsys.readouterr().err
    assert told.count("a table of subjects is not used: ") == 1 and "are such as foo, the folder's such as 999" in told
    (tmp_path / "set" / "subjects.csv").write_text("scan,subject\nfoo,b1\n")
    assert run_predict(run_folder, tmp_path / "out" / "both", tmp_path / "set", *words).subject.isna().all()
    assert "subjects are not known: scan foo is of" in capsys.readouterr().err


def test_a_table_is_read_once_however_many_folders_it_is_beside(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"p{number}").mkdir()
        nib.save(head(), tmp_path / f"p{number}" / f"{number}.nii")
    (tmp_path / "subjects.csv").write_text("scan,subject\n7,a\n")
    genuine, calls = volumes.read_subjects, []
    monkeypatch.setattr(volumes, "read_subjects", lambda *folders: calls.append(folders) or genuine(*folders))
    table, tables, lines = volumes.tabled_subjects(volumes.find_all([tmp_path]), [tmp_path])
    assert dict(zip(table.scan, table.subject))["7"] == "a" and len(calls) == 1
    assert tables == [tmp_path / "subjects.csv"] and lines == []


def test_two_volumes_of_one_name_are_said_to_be_and_known_to_the_table_by_it(tmp_path, capsys):
    for folder in ("train/AD", "test/NC"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        nib.save(head(), tmp_path / "in" / folder / "p1.nii")
    (tmp_path / "in" / "subjects.csv").write_text("scan,subject\np1,Alice\n")
    run_extract(tmp_path / "in", "--out", tmp_path / "out")
    known = read_csv(tmp_path / "out" / "subjects.csv")
    assert dict(zip(known.scan, known.subject)) == {"train_AD_p1": "Alice", "test_NC_p1": "Alice"}
    assert "2 volumes have the name of another, such as " in capsys.readouterr().err


def test_two_flags_that_name_one_folder_are_wrong_usage(capsys):
    with pytest.raises(SystemExit):
        predict.parse_args(["x.nii", "--out", "a/b", "--keep-slices", "./a/b/"])
    assert "--out and --keep-slices are both a/b; name two folders" in capsys.readouterr().err


def test_a_checkpoint_cuts_volumes_as_its_training_slices_or_says_what_it_assumes(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "h.nii")
    with pytest.raises(InputError, match="does not record of which plane .* name it with --plane"):
        run_predict(run_folder, tmp_path / "a", tmp_path / "h.nii")
    record = {"plane": "coronal", "count": 3, "size": (48, 40), "spacing": 5.0, "turn": 90}
    known_file = with_record(run_folder, tmp_path / "known.pth", extraction=vars(Look(**record)))
    run_predict(run_folder, tmp_path / "b", tmp_path / "h.nii", checkpoint=known_file)
    assert ("coronal, 3 central slices every 5 mm, 48 x 40, 5 mm a pixel, turned by 90 degrees (as the checkpoint's "
            "training slices were cut)") in capsys.readouterr().out
    with pytest.raises(InputError, match="need a volume among the inputs"):
        run_predict(run_folder, tmp_path / "c", run_folder, "--plane", "axial")
    args = predict.parse_args(["h.nii", "--turn", "0", "--count", "7"])
    look, _, _ = volumes.look_of({"slice_size": [40, 48], "extraction": vars(Look(**record))}, args)
    # A flag that is given wins.
    assert look == Look("coronal", count=7, size=(48, 40), spacing=5.0, turn=0)
    args = predict.parse_args(["h.nii", "--turn", "180"])
    content = {"slice_size": [240, 256], "slice_stats": {"brightest": [150, 190]}}
    look, known, warnings = volumes.look_of(content, args)
    assert (look.plane, look.size, look.step, look.turn, look.brightest) == ("sagittal", (256, 240), 1.2, 180, 170)
    assert known == ("assumed from the size of the checkpoint's training slices, that of AD_NC, with the flags that "
                     "are given (turn)")
    assert warnings == ["the slices are cut with --turn 180, those in training with 0: p_AD may mean nothing"]
    assert volumes.look_of(content, predict.parse_args(["h.nii", "--plane", "sagittal"]))[2] == []
    run_predict(run_folder, tmp_path / "d", tmp_path / "h.nii", "--plane", "axial", checkpoint=known_file)
    assert "warning: the slices are cut with --plane axial, those in training with coronal" in capsys.readouterr().err


def test_training_records_how_its_slices_were_cut(tmp_path, run_folder, ad_nc):
    nib.save(head(), tmp_path / "h.nii")
    run_extract(tmp_path / "h.nii", "--out", tmp_path / "out", "--plane", "coronal", "--turn", "90")
    assert checkpoint.load_checkpoint(run_folder / "best_model.pth")["extraction"] is None
    shutil.copytree(ad_nc, tmp_path / "out" / "AD_NC")  # in the place of slices/
    train_steps(tmp_path / "out" / "AD_NC", tmp_path / "run", "--epochs", "1")
    recorded = checkpoint.load_checkpoint(tmp_path / "run" / "best_model.pth")["extraction"]
    assert Look(**recorded) == Look("coronal", count=4, spacing=6.0, turn=90)


@pytest.mark.parametrize("text", ['{"plane": "upside"}', '{"plane": "axial"', "[1, 2]", '{"spacing": 0}', '{"x": 1}'])
def test_a_record_of_cutting_that_is_damaged_is_refused_when_training_starts(ad_nc, tmp_path, text):
    root = shutil.copytree(ad_nc.parent, tmp_path / "set")
    (root / "extraction.json").write_text(text)
    with pytest.raises(InputError, match="extraction.json is not what extract.py writes"):
        train_steps(root / "AD_NC", tmp_path / "run", "--epochs", "1")
    assert not (tmp_path / "run").exists()


def test_extracting_like_a_checkpoint_says_whether_the_slices_resemble_its_own(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "h.nii")
    extract.main(extract.parse_args([str(tmp_path / "h.nii"), "--like", str(run_folder / "best_model.pth"), "--plane",
                                     "axial", "--spacing", "2", "--out", str(tmp_path / "out")]))  # fmt: skip
    assert re.search(r"20 of 20 slices are out of the training range, first .*_\d+.png: \w+", capsys.readouterr().out)


def test_the_command_runs_as_its_help_says(tmp_path):
    nib.save(head(), tmp_path / "scan.nii.gz")
    done = command.run(str(ROOT / "extract.py"), "scan.nii.gz", "--plane", "axial", "--count", "32", "--out", "slices",
                       cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "32 slices of 1 volumes in slices/slices" in done.stdout
    assert done.stderr == ""  # no bar where there is no terminal
