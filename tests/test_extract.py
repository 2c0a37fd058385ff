"""tools.extract on a folder of volumes, and predict.py on volumes as on their slices."""

import os
import re
import shutil
import sys

import command
import numpy as np
import pandas as pd
import pytest
from conftest import train_steps
from heads import AFFINE, VALUES, cut, head, nib, write_dicom
from PIL import Image

import predict
from adnc.data.index import list_inputs
from adnc.errors import InputError
from adnc.files import read_csv
from adnc.volumes import cut as volumes
from adnc.volumes import read
from adnc.volumes.look import Look, recorded_look
from dataset import read_index
from tools import extract
from utils import load_checkpoint, save_checkpoint

FEW = ["--spacing", "6", "--count", "4"]


def run_extract(given, out, *words):
    """tools.extract in this process; returns extraction.csv."""
    extract.main([str(given), "--out", str(out), *FEW, *map(str, words)])
    return read_csv(out / "extraction.csv")


def run_predict(run_folder, out, *words, checkpoint=None):
    checkpoint = checkpoint or run_folder / "best_model.pth"
    predict.main([*map(str, words), "--checkpoint", str(checkpoint), "--out", str(out)])
    return pd.read_csv(out / "predictions.csv", dtype={"scan": str})


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("words", [
    ["--slices", "9"], ["--slices", "9:3"], ["--slices", "1mm:9"], ["--size", "256"],
    ["--size", "1x2"], ["--turn", "45"], ["--spacing", "0"], ["--plane", "oblique"],
    ["--slices", "1:9", "--count", "3"], ["--like", "nowhere.pth"],
])  # fmt: skip
def test_a_wrong_flag_is_one_error_line_and_status_2(tmp_path, words):
    nib.save(head(), tmp_path / "h.nii")
    done = command.run("tools.extract", "h.nii", *words, cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"error: .+\n", done.stderr)
    assert not (tmp_path / "extracted").exists()


def test_negative_positions_are_given_with_an_equals_sign(tmp_path):
    args = extract.parse_args(["h.nii", "--slices=-10mm:10.5mm"])
    assert args.slices == (-10, 10.5, "mm")


def test_the_command_runs_as_its_help_says(tmp_path):
    nib.save(head(), tmp_path / "scan.nii.gz")
    words = ["scan.nii.gz", "--plane", "axial", "--count", "32", "--out", "slices"]
    done = command.run("tools.extract", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 slices of 1 volumes in slices/slices" in done.stdout
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- a folder of volumes


def test_a_folder_becomes_slices_and_a_table_that_lists_what_was_skipped(tmp_path, capsys):
    folder = tmp_path / "in"
    names = ("sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "7.mgz")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = head() if "nii" in name else nib.MGHImage(VALUES, AFFINE)
        nib.save(image, folder / name)
    (folder / "bad.nii").write_bytes(b"no volume")
    (folder / "sub-02" / "anat" / "sub-02_T1w.json").write_text("{}")
    (folder / "._7.mgz").write_bytes(b"junk")
    table = run_extract(folder, tmp_path / "out").set_index("scan")

    assert list(table.columns) == [name for name in volumes.COLUMNS if name != "scan"]
    slices = sorted(path.name for path in (tmp_path / "out" / "slices").iterdir())
    scans = ("sub-01_ses-2_T1w", "sub-02_T1w", "7")
    assert slices == sorted(f"{scan}_{number}.png" for scan in scans for number in range(11, 15))
    assert table.error["bad"].startswith("cannot be read as a volume")
    row = table.loc["sub-01_ses-2_T1w"]
    assert (row.subject, row.session, row.orientation) == ("sub-01", "ses-2", "RAS")
    assert (row["shape"], row.voxel_sizes) == ("25x31x24", "6x6x6")
    assert (row.affine_from, row.first_slice, row.last_slice) == ("sform", "11", "14")
    np.testing.assert_allclose([float(word) for word in row.affine.split()], AFFINE[:3].ravel())
    assert read_csv(tmp_path / "out" / "subjects.csv").subject.tolist() == ["sub-01", "sub-02"]
    assert (tmp_path / "out" / "extraction.json").exists()
    printed = capsys.readouterr()
    assert "12 slices of 3 volumes in " in printed.out
    assert "1 of 4 volumes were skipped" in printed.err and ".json" in printed.err
    with Image.open(tmp_path / "out" / "slices" / "7_12.png") as image:
        expected = cut(folder / "7.mgz", slices=(12, 12, "index"))[0][0]
        assert (np.asarray(image) == expected).all()


def test_folders_of_classes_are_kept_so_that_a_set_can_be_trained_on(tmp_path):
    folders = [f"{split}/{label}" for split in ("train", "test") for label in ("AD", "NC")]
    for number, folder in enumerate(folders):
        (tmp_path / "in" / folder).mkdir(parents=True)
        nib.save(head(), tmp_path / "in" / folder / f"sub-{number}_T1w.nii")
    run_extract(tmp_path / "in", tmp_path / "out")
    index = read_index(tmp_path / "out" / "slices")
    assert len(index) == 16 and index.subject.nunique() == 4
    assert set(index.split + "/" + index.label) == set(folders)


@pytest.mark.parametrize("other", ["train/CN", "val/AD", "."])
def test_volumes_outside_the_class_folders_are_reported(run_folder, tmp_path, capsys, other):
    for folder in ("train/AD", "test/NC", other):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        nib.save(head(), tmp_path / "in" / folder / f"{len(folder)}.nii")
    sentence = (
        f"2 of 3 volumes are in folders AD/ and NC/ of an input, .*{len(other)}.nii, are not: then"
    )
    with pytest.raises(InputError, match=sentence):
        run_extract(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words = ["--plane", "axial", "--spacing", "4", "--count", "1"]
    assert run_predict(run_folder, tmp_path / "out", tmp_path / "in", *words).label.isna().all()
    assert re.search(sentence, capsys.readouterr().err)


def test_volumes_of_a_set_beside_those_of_classes_alone_are_all_predicted(
    run_folder, tmp_path, capsys
):
    for folder in ("A/train/AD", "A/test/NC", "B/AD"):
        (tmp_path / folder).mkdir(parents=True)
        nib.save(head(), tmp_path / folder / f"{folder.replace('/', '-')}.nii")
    words = ["--plane", "axial", "--spacing", "4", "--count", "1"]
    inputs = [tmp_path / "A", tmp_path / "B"]
    table = run_predict(run_folder, tmp_path / "out", *inputs, *words)
    assert table.scan.nunique() == 3 and table.label.isna().all()
    sentence = "2 of 3 volumes are in train/ or test/, the others, such as .*, in AD/ or NC/ alone"
    assert re.search(sentence, capsys.readouterr().err)


def test_class_folders_of_volumes_that_are_given_one_by_one_are_no_labels(
    run_folder, tmp_path, capsys
):
    folders = [tmp_path / "heads" / label for label in ("AD", "NC")]
    for folder in folders:
        folder.mkdir(parents=True)
        nib.save(head(), folder / f"of-{folder.name}.nii")
    words = ["--plane", "axial", "--spacing", "4", "--count", "1"]
    assert run_predict(run_folder, tmp_path / "out", *folders, *words).label.isna().all()
    sentence = f"give the folder that holds them, such as {tmp_path / 'heads'}"
    assert sentence in capsys.readouterr().err


def test_names_are_safe_and_no_scan_takes_the_place_of_another(tmp_path):
    names = ["=cmd|' /C calc'!A0.nii", "a\nb.nii", "..nii", "x" * 200 + ".nii", "t1.nii"]
    names += ["T1.nii.gz", "one/t1.nii", "two/t1.nii", "two/t1.nii.gz"]
    table = volumes.name_scans([(name, os.path.dirname(name)) for name in names])
    assert table.scan.is_unique and table.scan.str.len().max() < 140
    assert table.scan.str.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*").all()
    assert table.scan[6] == "one_t1"
    assert table.scan[7:].str.fullmatch(r"two_t1-[0-9a-f]{6}").all()


def test_two_volumes_of_one_name_are_reported_and_the_table_knows_both(tmp_path, capsys):
    for folder in ("train/AD", "test/NC"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        nib.save(head(), tmp_path / "in" / folder / "p1.nii")
    (tmp_path / "in" / "subjects.csv").write_text("scan,subject\np1,Alice\n")
    run_extract(tmp_path / "in", tmp_path / "out")
    known = read_csv(tmp_path / "out" / "subjects.csv")
    expected = {"train_AD_p1": "Alice", "test_NC_p1": "Alice"}
    assert dict(zip(known.scan, known.subject)) == expected
    assert "2 volumes have the name of another" in capsys.readouterr().err


def test_nothing_is_overwritten_and_no_volume_is_an_error(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    run_extract(tmp_path / "h.nii", tmp_path / "out")
    with pytest.raises(InputError, match="exists, and nothing is overwritten"):
        run_extract(tmp_path / "h.nii", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist; expected a volume, a DICOM folder"):
        run_extract(tmp_path / "gone.nii", tmp_path / "a")
    with pytest.raises(InputError, match="holds no volume .* and no DICOM file"):
        run_extract(tmp_path / "out", tmp_path / "b")
    (tmp_path / "h.nii").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 1 volumes could be cut"):
        run_extract(tmp_path / "h.nii", tmp_path / "c")


def test_an_extraction_that_fails_in_the_middle_has_no_extraction_json(tmp_path, monkeypatch):
    for name in "ab":
        nib.save(head(), tmp_path / f"{name}.nii")
    genuine = volumes.extract_volume

    def fail(path, look):
        return genuine(path, look) if "a.nii" in path else 1 / 0

    monkeypatch.setattr(volumes, "extract_volume", fail)
    with pytest.raises(ZeroDivisionError):
        run_extract(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "extraction.json").exists()


def test_a_full_disk_is_one_error(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    done = command.run("tools.extract", "h.nii", "--out", "out", cwd=tmp_path, file_size=1500)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert not (tmp_path / "out" / "extraction.json").exists()


def test_a_missing_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    nib.save(head(), tmp_path / "h.nii")
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setenv("PATH", "")
    cases = (
        ("dcm2niix", "dicom", []),
        ("deepbet.bet", "h.nii", ["--strip"]),
        ("nibabel", "h.nii", []),
    )
    for module, given, words in cases:
        read.import_nibabel.cache_clear()
        read.load_deepbet.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            message = f"{module.split('.')[0]}; install it with python -m pip install"
            with pytest.raises(InputError, match=message):
                run_extract(tmp_path / given, tmp_path / module, *words)
    read.import_nibabel.cache_clear()


# ---------------------------------------------------------------- classes and subjects


@pytest.mark.parametrize("folder, expected", [
    ("AD", "AD"), ("train/NC", "train/NC"), ("ad/sub-1/anat", "AD"), ("Test/AD/p1", "test/AD"),
    ("ADNI/x", ""), (".", ""), ("x/AD", ""), ("", ""),
])  # fmt: skip
def test_the_class_of_a_volume_is_that_of_a_folder_above_it(folder, expected):
    assert volumes.class_folder(folder) == expected


def test_scans_in_folders_of_their_own_keep_their_class(tmp_path):
    for label, name in (("AD", "p1"), ("NC", "p2")):
        (tmp_path / "set" / label / name).mkdir(parents=True)
        nib.save(head(), tmp_path / "set" / label / name / f"{name}.nii")
    run_extract(tmp_path / "set", tmp_path / "out")
    folders = {path.parent.name for path in (tmp_path / "out" / "slices").rglob("*.png")}
    assert folders == {"AD", "NC"}


def test_a_table_that_knows_only_some_volumes_says_so(tmp_path, capsys):
    for name in ("a", "b"):
        nib.save(head(), tmp_path / f"{name}.nii")
    (tmp_path / "subjects.csv").write_text("scan,subject\na,s\n")
    run_extract(tmp_path, tmp_path / "out")
    printed = capsys.readouterr()
    assert "1 of 2 volumes, such as b, have no subject in" in printed.out + printed.err


def test_the_name_of_a_folder_above_the_input_is_no_subject(tmp_path):
    (tmp_path / "sub-all").mkdir()
    nib.save(head(), tmp_path / "sub-all" / "p1.nii")
    assert volumes.find_all([tmp_path / "sub-all"]).subject.isna().all()


def test_a_table_beside_the_volumes_names_their_subjects(tmp_path, capsys):
    for name in ("999.nii", "sub-8_T1w.nii", "sub-7_T1w.nii"):
        nib.save(head(), tmp_path / name)
    (tmp_path / "subjects.csv").write_text("scan,subject\n999,a0\nsub-8_T1w,b\n")
    table = run_extract(tmp_path, tmp_path / "out")
    known = read_csv(tmp_path / "out" / "subjects.csv")
    expected = {"999": "a0", "sub-8_T1w": "b", "sub-7_T1w": "sub-7"}
    assert dict(zip(known.scan, known.subject)) == expected and len(table) == 3
    assert "subjects.csv" not in capsys.readouterr().err
    (tmp_path / "subjects.csv").write_text("scan,subject\nx,y\n")  # of something else
    run_extract(tmp_path / "999.nii", tmp_path / "again")
    assert not (tmp_path / "again" / "subjects.csv").exists()
    assert "a table of subjects is not used" in capsys.readouterr().err


def test_a_person_whose_scans_are_listed_in_part_has_one_id(tmp_path):
    names = ["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_ses-1_T1w"]
    for name in names:
        nib.save(head(), tmp_path / f"{name}.nii")
    (tmp_path / "subjects.csv").write_text(f"scan,subject\n{names[0]},P1234\n")
    run_extract(tmp_path, tmp_path / "out")
    known = read_csv(tmp_path / "out" / "subjects.csv")
    assert dict(zip(known.scan, known.subject)) == dict(zip(names, ["P1234", "P1234", "sub-02"]))

    nib.save(head(), tmp_path / "sub-01_ses-3_T1w.nii")
    listed = f"scan,subject\n{names[0]},P1234\n{names[1]},P9\n"
    (tmp_path / "subjects.csv").write_text(listed)
    with pytest.raises(InputError, match="they give sub-01 several, P1234 and P9; add"):
        run_extract(tmp_path, tmp_path / "again")


def test_a_table_counts_for_equal_names_in_its_own_folder_alone(tmp_path):
    for site in ("siteA", "siteB"):
        (tmp_path / site).mkdir()
        nib.save(head(), tmp_path / site / "001.nii")
    (tmp_path / "siteA" / "subjects.csv").write_text("scan,subject\n001,A1\n")
    table, _, lines = volumes.add_table_subjects(volumes.find_all([tmp_path]), [tmp_path])
    subjects = dict(zip(table.source.str.contains("siteA"), table.subject))
    assert subjects[True] == "A1" and pd.isna(subjects[False])
    assert any("1 of 2 volumes" in line and "have no subject" in line for line in lines)


def test_exposure_of_a_volume_comes_from_the_table_beside_it(run_folder, tmp_path, capsys):
    words = ["--plane", "axial", "--spacing", "4", "--count", "2"]
    nib.save(head(), tmp_path / "999.nii")
    (tmp_path / "subjects.csv").write_text("scan,subject\n999,a0\n")  # a name of training
    for out, given in (("file", tmp_path / "999.nii"), ("folder", tmp_path)):
        table = run_predict(run_folder, tmp_path / "out" / out, given, *words)
        assert table.subject.tolist() == ["a0", "a0"]
        assert set(table.exposure) == {"unknown"}  # a name in another folder is no identity
        printed = capsys.readouterr().err
        assert "subjects.csv" not in printed
        assert "1 scans have the name of a subject or scan in training, such as a0" in printed


def test_tables_that_contradict_each_other_are_refused_or_cost_the_subjects(tmp_path):
    for name, subject in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        nib.save(head(), tmp_path / name / f"{name}.nii")
        (tmp_path / name / "subjects.csv").write_text(f"scan,subject\none,{subject}\n")
    message = f"scan one belongs to subject b in {tmp_path}/two/subjects.csv, and to a in "
    with pytest.raises(InputError, match=message + f"{tmp_path}/one/subjects.csv"):
        run_extract(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    checkpoint = {"slice_size": [40, 48], "extraction": vars(Look()), "slice_stats": {}}
    cut_volumes = volumes.cut_inputs([str(tmp_path)], checkpoint=checkpoint, flags={"spacing": 6.0})
    assert cut_volumes.problem.startswith("scan one belongs to")
    assert cut_volumes.table.subject.isna().all() and cut_volumes.table.error.isna().all()
    folder = cut_volumes.temporary.name
    cut_volumes.close()
    assert not os.path.exists(folder)


def test_tables_that_contradict_each_other_cost_the_subjects_of_bids_names_too(
    run_folder, tmp_path, capsys
):
    for name, subject in (("one", "a"), ("two", "b")):
        (tmp_path / "in" / name).mkdir(parents=True)
        nib.save(head(), tmp_path / "in" / name / f"sub-{name}_ses-2_T1w.nii")
        (tmp_path / "in" / name / "subjects.csv").write_text(f"scan,subject\none,{subject}\n")
    words = ["--plane", "axial", "--spacing", "6", "--count", "2"]
    table = run_predict(run_folder, tmp_path / "out", tmp_path / "in", *words)
    assert "subjects are unknown: scan one belongs to subject b" in capsys.readouterr().err
    assert table.subject.isna().all() and set(table.exposure) == {"unknown"}


def test_a_repeated_name_has_the_subject_of_the_nearest_table(tmp_path):
    for folder, subject in (("p1", "a"), ("p2", "b"), ("p2/deep", None)):
        (tmp_path / folder).mkdir()
        nib.save(head(), tmp_path / folder / "T1.nii")
        if subject:
            (tmp_path / folder / "subjects.csv").write_text(f"scan,subject\nT1,{subject}\n")
    (tmp_path / "subjects.csv").write_text("scan,subject\nT1,c\n")
    nib.save(head(), tmp_path / "T1.nii")
    table, _, _ = volumes.add_table_subjects(volumes.find_all([tmp_path]), [tmp_path])
    subjects = dict(zip(table.folder, table.subject))
    assert subjects == {".": "c", "p1": "a", "p2": "b", "p2/deep": "b"}


def test_a_table_is_read_once_however_many_folders_it_is_beside(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"p{number}").mkdir()
        nib.save(head(), tmp_path / f"p{number}" / f"{number}.nii")
    (tmp_path / "subjects.csv").write_text("scan,subject\n7,a\n")
    genuine, calls = volumes.read_subjects, []
    monkeypatch.setattr(volumes, "read_subjects", lambda *f: calls.append(f) or genuine(*f))
    table = volumes.find_all([tmp_path])
    table, tables, lines = volumes.add_table_subjects(table, [tmp_path])
    assert dict(zip(table.scan, table.subject))["7"] == "a" and len(calls) == 1
    assert tables == [tmp_path / "subjects.csv"]
    assert len(lines) == 1 and lines[0].startswith("19 of 20 volumes, such as ")


# ---------------------------------------------------------------- predicting volumes


def test_a_volume_is_predicted_like_its_slices(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "sub-9_T1w.nii.gz")
    words = [tmp_path / "sub-9_T1w.nii.gz", "--plane", "axial", "--spacing", "4", "--count", "5"]
    kept = tmp_path / "kept"
    table = run_predict(run_folder, tmp_path / "a", *words, "--keep-slices", kept)
    assert (table.subject == "sub-9").all() and len(table) == 5 and table.error.isna().all()
    assert len(list((kept / "slices").iterdir())) == 5
    line = "1 of 1 volumes cut: axial, 5 central slices every 4 mm, 48 x 40, 4 mm per pixel"
    assert line in capsys.readouterr().out

    assert table.path.tolist() == sorted(map(str, (kept / "slices").iterdir()))

    again = run_predict(run_folder, tmp_path / "b", *words)  # in a temporary folder
    assert again.path.tolist() == [f"{tmp_path}/sub-9_T1w.nii.gz:{n}" for n in again.slice]
    slices = run_predict(run_folder, tmp_path / "c", kept / "slices")
    assert (again.p_AD == table.p_AD).all() and (slices.p_AD == table.p_AD).all()
    # The grey levels are scaled to the 99 % quantile of training.
    assert not table.out_of_range.astype(str).str.contains("99 % quantile").any()
    with pytest.raises(InputError, match="choose a new --keep-slices"):
        run_predict(run_folder, tmp_path / "d", *words, "--keep-slices", kept)
    for inside in (tmp_path / "e", tmp_path / "e" / "slices"):
        with pytest.raises(InputError, match="is --out or inside it"):
            run_predict(run_folder, tmp_path / "e", *words, "--keep-slices", inside)
        assert not (tmp_path / "e").exists()


def test_a_volume_that_cannot_be_cut_gets_a_row_with_the_reason(
    run_folder, ad_nc, tmp_path, capsys
):
    (tmp_path / "in").mkdir()
    for name in ("bad_1.nii", "bad_2.nii"):  # no slices of one scan
        (tmp_path / "in" / name).write_bytes(b"no volume")
    nib.save(head(), tmp_path / "in" / "good.nii")
    words = ["--plane", "axial", "--spacing", "4", "--count", "2"]
    slice_file = ad_nc / "test" / "AD" / "300_70.jpeg"
    table = run_predict(run_folder, tmp_path / "a", tmp_path / "in", slice_file, *words)
    bad = table[table.error.notna()]
    assert len(table) == 5 and bad.path.tolist() == bad.scan.tolist() and bad.slice.isna().all()
    assert bad.error.str.startswith("cannot be read as a volume").all()
    printed = capsys.readouterr()
    for name in ("bad_1.nii", "bad_2.nii"):
        assert f"{name} cannot be read as a volume" in printed.err
    assert "; 3 slices on cpu" in printed.out  # the volume that failed is no slice
    with pytest.raises(InputError, match="bad_1.nii cannot be read as a volume"):
        run_predict(run_folder, tmp_path / "b", tmp_path / "in" / "bad_1.nii", *words)
    with pytest.raises(InputError, match="--plane: for volumes only"):
        run_predict(run_folder, tmp_path / "c", slice_file, "--plane", "axial")
    with pytest.raises(InputError, match="nowhere does not exist"):
        run_predict(run_folder, tmp_path / "d", tmp_path / "nowhere", "--plane", "axial")


def test_a_dicom_folder_is_predicted(run_folder, tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-extra.txt)")
    folder = write_dicom(tmp_path / "head")
    words = ["--plane", "axial", "--spacing", "4", "--count", "2"]
    table = run_predict(run_folder, tmp_path / "out", folder, *words)
    assert table.path.str.startswith(f"{folder}:").tolist() == [True] * 2
    assert table.p_AD.notna().all()


def test_a_volume_that_does_not_say_where_left_is_has_no_sides_in_a_report(tmp_path):
    (tmp_path / "in").mkdir()
    nib.save(head(), tmp_path / "in" / "known.nii")
    analyze = nib.AnalyzeImage(VALUES.astype(np.int16), np.diag([-6, 6, 6, 1]))
    nib.save(analyze, tmp_path / "in" / "guessed.img")
    run_extract(tmp_path / "in", tmp_path / "out")
    folder = str(tmp_path / "out" / "slices")
    of_folder = volumes.CutInputs([folder]).looks(list_inputs([folder]).index)
    assert set(of_folder) == {"known"}

    checkpoint = {"slice_size": [40, 48], "extraction": vars(Look()), "slice_stats": {}}
    inputs = [str(tmp_path / "in")]
    cut_volumes = volumes.cut_inputs(inputs, checkpoint=checkpoint, flags={"spacing": 6.0})
    assert set(cut_volumes.looks(list_inputs(cut_volumes.inputs).index)) == {"known"}
    cut_volumes.close()


def test_the_header_of_a_pair_stands_for_its_image(tmp_path):
    pair = nib.Nifti1Pair(VALUES, AFFINE)
    nib.save(pair, tmp_path / "h.img")
    for name in ("h.hdr", "h.img"):
        table = volumes.find_all([tmp_path / name])
        assert table.source.tolist() == [str(tmp_path / "h.img")]
    table = run_extract(tmp_path / "h.hdr", tmp_path / "out")
    assert table.error.isna().all()


# ---------------------------------------------------------------- like the slices of a checkpoint


def with_record(run_folder, path, record):
    """The checkpoint of a run whose slices were cut as a record says."""
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    del checkpoint["format"]
    save_checkpoint(path, **{**checkpoint, "extraction": record})
    return path


def test_a_checkpoint_cuts_volumes_as_its_training_slices(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "h.nii")
    with pytest.raises(InputError, match="does not record the plane .* name it with --plane"):
        run_predict(run_folder, tmp_path / "a", tmp_path / "h.nii")
    record = vars(Look("coronal", count=3, size=(48, 40), spacing=5.0, turn=90))
    file = with_record(run_folder, tmp_path / "known.pth", record)
    run_predict(run_folder, tmp_path / "b", tmp_path / "h.nii", checkpoint=file)
    line = (
        "coronal, 3 central slices every 5 mm, 48 x 40, 5 mm per pixel, turned by 90 degrees (as "
        "the checkpoint's training slices were cut)"
    )
    assert line in capsys.readouterr().out
    words = [tmp_path / "h.nii", "--plane", "axial"]
    run_predict(run_folder, tmp_path / "d", *words, checkpoint=file)
    warning = "the slices are cut with --plane axial, those in training with coronal"
    assert warning in capsys.readouterr().err


def test_flags_win_over_the_record_and_assumptions_are_reported():
    stats = {"brightest": [150, 190]}
    record = vars(Look("coronal", count=3, size=(48, 40), spacing=5.0, turn=90))
    checkpoint = {"slice_size": [40, 48], "extraction": record, "slice_stats": stats}
    look, _, _ = volumes.look_of(checkpoint, {"turn": 0, "count": 7})
    assert look == Look("coronal", count=7, size=(48, 40), spacing=5.0, turn=0)

    _, _, warnings = volumes.look_of(checkpoint, {"size": (60, 60)})
    assert "--size 60x60, 48x40 in training" in warnings[0]
    assert volumes.look_of(checkpoint, {"size": (48, 40)})[2] == []

    checkpoint["extraction"] = record | {"slices": (-60.0, -20.0, "mm")}
    assert volumes.look_of(checkpoint, {})[0].slices == (-60.0, -20.0, "mm")
    checkpoint["extraction"] = record | {"slices": (60, 119, "index")}
    look, _, warnings = volumes.look_of(checkpoint, {})
    assert (look.slices, look.count) == (None, 60)
    assert "in training slices 60 to 119 of each volume were cut" in warnings[0]
    for slices in ((60, 119, "index"), (-60.0, -20.0, "mm")):
        checkpoint["extraction"] = record | {"slices": slices}
        look, _, warnings = volumes.look_of(checkpoint, {"count": 5})
        assert (look.slices, look.count, warnings) == (None, 5, [])

    checkpoint = {"slice_size": [240, 256], "extraction": None, "slice_stats": stats}
    look, origin, warnings = volumes.look_of(checkpoint, {"turn": 180})
    assert (look.plane, look.size, look.step, look.turn) == ("sagittal", (256, 240), 1.2, 180)
    assert look.brightest == 170
    assert origin.startswith("assumed from the size of the training slices")
    assert "--turn 180, those in training with 0" in warnings[0]
    assert volumes.look_of(checkpoint, {"plane": "sagittal"})[2] == []


def test_training_records_how_its_slices_were_cut(tmp_path, run_folder, ad_nc):
    nib.save(head(), tmp_path / "h.nii")
    run_extract(tmp_path / "h.nii", tmp_path / "out", "--plane", "coronal", "--turn", "90")
    assert load_checkpoint(run_folder / "best_model.pth")["extraction"] is None
    shutil.copytree(ad_nc, tmp_path / "out" / "AD_NC")  # in the place of slices/
    train_steps(tmp_path / "out" / "AD_NC", tmp_path / "run", "--epochs", "1")
    recorded = load_checkpoint(tmp_path / "run" / "best_model.pth")["extraction"]
    assert Look(**recorded) == Look("coronal", count=4, spacing=6.0, turn=90)


@pytest.mark.parametrize("text", [
    '{"plane": "upside"}', '{"plane": "axial"', "[1, 2]", '{"x": 1}',
    '{"plane": "axial", "turn": -90}', '{"plane": "axial", "slices": 5}',
    '{"plane": "axial", "size": [1]}',
])  # fmt: skip
def test_a_damaged_record_is_refused_when_training_starts(tmp_path, text):
    (tmp_path / "AD_NC").mkdir()
    (tmp_path / "extraction.json").write_text(text)
    with pytest.raises(InputError, match="extraction.json"):
        recorded_look(tmp_path / "AD_NC")


def test_extracting_like_a_checkpoint_compares_with_its_training_slices(
    run_folder, tmp_path, capsys
):
    nib.save(head(), tmp_path / "h.nii")
    words = ["--like", str(run_folder / "best_model.pth"), "--plane", "axial", "--spacing", "2"]
    extract.main([str(tmp_path / "h.nii"), *words, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    sentence = r"20 of 20 slices are out of the training range, first .*_\d+.png: \w+"
    assert re.search(sentence, printed)
