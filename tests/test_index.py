"""Indexing folders: names of files and folders, and the subjects of scans."""

import json
import shutil
from pathlib import Path

import command
import pytest
from conftest import ROOT, SCANS, write_set, write_slice

from adnc.data import index as listing
from adnc.data.index import (
    describe_one_scan,
    describe_separate_classes,
    list_inputs,
    list_set,
    read_index,
)
from adnc.data.subjects import split_index
from adnc.errors import InputError


def named_set(folder, name):
    """A set whose scans are named `name(subject, number of the scan)`, two scans a subject."""
    n_scans = 0
    for split, label in (("train", "AD"), ("train", "NC"), ("test", "AD"), ("test", "NC")):
        for i in range(4):
            n_scans += 1
            scan = name(f"{split[1]}{label}{i // 2}", n_scans)
            write_slice(folder / "AD_NC" / split / label / f"{scan}_70.jpeg", True, n_scans)
    return folder / "AD_NC"


def write_metadata(folder, subjects):
    """meta_data_with_label.json as ADNI has it; `subjects` is a dict from scan to subject."""
    entries = {}
    for scan, subject in subjects.items():
        entries[scan] = {"label": 2, "raw": f"/a/ADNI_{subject}_MR_I{scan}.nii"}
    (folder / "meta_data_with_label.json").write_text(json.dumps(entries))


# ---------------------------------------------------------------- a set to train on


def test_the_index_has_a_row_a_slice_in_the_order_of_split_label_scan_and_slice(ad_nc):
    index = read_index(ad_nc)
    assert list(index.columns) == listing.COLUMNS and len(index) == 18 * 5
    keys = index[["split", "label", "scan", "slice"]]
    assert keys.equals(keys.sort_values(list(keys), ignore_index=True))
    assert Path(index.path[0]).is_file() and index.slice.dtype == "int64"
    for row in index.itertuples():
        assert (row.split, row.label, row.subject) == SCANS[row.scan]
        assert row.group == row.subject


def test_the_parent_of_ad_nc_may_be_named(ad_nc):
    assert read_index(ad_nc.parent).equals(read_index(ad_nc))


def test_a_scan_is_everything_before_the_last_underscore_and_extensions_may_have_any_case(tmp_path):
    root = write_set(tmp_path, slices=[70])
    write_slice(root / "train" / "AD" / "I_12_x_007.JPG", True, 1)
    index = read_index(root)
    assert index[index.scan == "I_12_x"].slice.tolist() == [7]


def test_leftovers_of_archives_and_tools_are_ignored(tmp_path):
    root = write_set(tmp_path, slices=[70])
    expected = read_index(root)
    for name in (".DS_Store", "._100_70.jpeg", ".ipynb_checkpoints/1_1.jpeg", "__MACOSX/1_1.jpeg"):
        path = root / "train" / "AD" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    listed = list_set(root)
    assert read_index(root).equals(expected) and listed.notes == []


def test_files_that_are_not_used_are_counted_by_extension(tmp_path):
    root = write_set(tmp_path, slices=[70])
    for name in ("train/AD/notes.txt", "test/more.TXT", "train/100_70.jpeg", "README"):
        (root / name).write_bytes(b"")
    shutil.copy(root.parent / "subjects.csv", root)  # which is used
    (note,) = list_set(root).notes
    assert note.startswith(f"not used: 4 other files under {root}: 2 .txt (such as {root}/")
    assert "1 .jpeg (such as" in note and "1 no extension (such as" in note


@pytest.mark.parametrize("old, new", [
    ("train/NC", "train/CN"), ("test", "Test"), ("train/AD", "AD"),
])  # fmt: skip
def test_folders_of_other_names_are_refused_with_what_is_there(tmp_path, old, new):
    root = write_set(tmp_path, slices=[70])
    (root / old).rename(root / new)
    with pytest.raises(InputError, match=f"has no {old}.*it holds the folders .*{new}.*expected"):
        read_index(root)


def test_a_folder_that_is_no_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; expected AD_NC with train/AD, "):
        read_index(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it holds no folders; expected AD_NC"):
        read_index(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder; expected AD_NC"):
        read_index(tmp_path / "file")


def test_folders_of_patients_are_refused(tmp_path):
    root = write_set(tmp_path, slices=[70])
    folder = root / "train" / "AD"
    (folder / "patient 1").mkdir()
    with pytest.raises(InputError, match="patient 1 is a folder; expected files <scan>_<slice>"):
        read_index(root)
    for path in folder.glob("*.jpeg"):
        path.rename(folder / "patient 1" / path.name)
    with pytest.raises(InputError, match="train/AD holds 1 folders and no images"):
        read_index(root)


@pytest.mark.parametrize("name, reason", [
    ("train/AD/holiday.jpeg", "is not named <scan>_<slice>"),
    ("train/AD/100_1234567890.jpeg", "is not named <scan>_<slice>"),
    ("train/AD/100_70.png", "is the same slice of a scan as "),
    ("train/NC/100_99.jpeg", "belongs to scan 100, which is in both classes "),
    ("test/AD/100_99.jpeg", "belongs to scan 100, which is in train and in test "),
])  # fmt: skip
def test_files_that_contradict_each_other_or_have_other_names_are_refused(tmp_path, name, reason):
    root = write_set(tmp_path, slices=[70, 71])
    write_slice(root / name, True, 1)
    with pytest.raises(InputError, match=f"(?s)cannot be used.*{name} {reason}"):
        read_index(root)


def test_ten_files_that_cannot_be_used_are_listed_and_the_others_counted():
    bad = [(f"/x/a{i}\n.jpeg", "is bad") for i in range(13)]
    lines = listing.describe_bad(bad).splitlines()
    assert lines[0] == "13 files cannot be used; fix or remove them:"
    assert lines[1] == r"  /x/a0\n.jpeg is bad" and len(lines) == 12
    assert lines[-1] == "  ... and 3 more"


# ---------------------------------------------------------------- labels of the metadata


def test_labels_of_the_metadata_must_be_those_of_the_folders(tmp_path):
    root = write_set(tmp_path, slices=[70])
    # As spreadsheets write them; None and scans that are not listed are unknown.
    labels = {"100": 2, "101": "2.0", "102": 2.0, "103": None, "104": "AD", "200": 0, "201": "CN"}
    entries = {scan: {"label": label} for scan, label in labels.items()} | {"204": 3}
    path = tmp_path / "meta_data_with_label.json"
    path.write_text(json.dumps(entries))
    assert len(read_index(root)) == 18
    path.write_text(json.dumps(entries | {"202": {"label": 7}, "203": {"label": 1}}))
    with pytest.raises(InputError) as refusal:
        read_index(root)
    _, *reasons = str(refusal.value).splitlines()
    says = "is in folder NC, but meta_data_with_label.json says"
    assert len(reasons) == 2
    assert reasons[0].endswith(f"202_70.jpeg {says} label 7")
    assert reasons[1].endswith(f"203_70.jpeg {says} label 1 (MCI)")


def test_a_prediction_reports_labels_that_differ_and_keeps_those_of_the_folders(tmp_path):
    root = write_set(tmp_path, slices=[70], subjects=False)
    write_metadata(tmp_path, {"400": "002_S_0001"})  # label 2 is AD, and scan 400 is in test/NC
    listed = list_inputs([root / "test"])
    assert listed.index.label[listed.index.scan == "400"].tolist() == ["NC"]
    assert any("1 scans are in a folder of another class" in note for note in listed.notes)


# ---------------------------------------------------------------- subjects from tables


def test_subjects_come_from_the_json_of_adni(tmp_path):
    root = write_set(tmp_path, slices=[70], subjects=False)
    write_metadata(tmp_path, {"100": "002_S_0001", "101": "002_S_0001", "999": "002_S_0002"})
    index = read_index(root).set_index("scan")
    assert index.subject["100"] == index.subject["101"] == index.group["100"] == "002_S_0001"
    assert index.subject.isna().sum() == 16 and index.group["102"] == "scan 102"


def test_tables_are_read_in_or_beside_the_folder_and_beside_the_target_of_a_link(tmp_path):
    root = write_set(tmp_path / "set", slices=[70])
    (tmp_path / "link").symlink_to(root)
    assert read_index(tmp_path / "link").subject.notna().all()
    (root.parent / "subjects.csv").rename(root / "subjects.csv")
    assert list_set(root).sources == [root / "subjects.csv"]
    assert read_index(root).subject.notna().all()


def test_blanks_around_ids_are_stripped_and_ids_are_otherwise_exact(tmp_path):
    scans = SCANS | {"100": ("train", "AD", " x "), "101": ("train", "AD", "x"),
                     "102": ("train", "AD", "X"), "103": ("train", "AD", "NA")}  # fmt: skip
    subject = read_index(write_set(tmp_path, scans, [70])).set_index("scan").subject
    assert subject["100"] == subject["101"] == "x" and subject["102"] == "X"
    assert subject.isna()["103"]


def test_two_tables_complete_each_other(tmp_path):
    root = write_set(tmp_path, SCANS | {"100": ("train", "AD", None)}, [70])
    write_metadata(tmp_path, {"100": "002_S_0001"})
    listed = list_set(root)
    assert listed.index.subject.notna().all()
    assert listed.sources == [tmp_path / "meta_data_with_label.json", tmp_path / "subjects.csv"]


def test_tables_that_contradict_each_other_are_refused(tmp_path):
    root = write_set(tmp_path, slices=[70])
    write_metadata(tmp_path, {"100": "002_S_0001"})
    with pytest.raises(InputError, match="100 belongs to subject a0 in .*csv, and to 002_S_0001 "):
        read_index(root)
    (tmp_path / "meta_data_with_label.json").unlink()
    with (tmp_path / "subjects.csv").open("a") as file:
        file.write("100,a1\n")
    with pytest.raises(InputError, match="subjects.csv gives scan 100 two subjects"):
        read_index(root)


def test_an_entry_of_the_json_with_two_subjects_is_refused(tmp_path):
    root = write_set(tmp_path, slices=[70], subjects=False)
    entry = {"raw": "ADNI_002_S_0001_x.nii", "mask": "ADNI_002_S_0002_x.nii"}
    (tmp_path / "meta_data_with_label.json").write_text(json.dumps({"100": entry}))
    with pytest.raises(InputError, match="two subjects of scan 100 .002_S_0001, 002_S_0002."):
        read_index(root)


@pytest.mark.parametrize("name, text, sentence", [
    ("subjects.csv", "scan,subject\n", "no scan has a subject"),
    ("subjects.csv", "scan,subject\n100,NA\n", "no scan has a subject"),
    ("subjects.csv", "scan,subject\nI100,y\n", "They are ids such as I100; the files"),
    ("subjects.csv", "image,patient\n1,2\n", "has the columns image, patient; expected"),
    ("meta_data_with_label.json", "{}", "no scan has a subject"),
    ("meta_data_with_label.json", '{"100": 3}', "no scan has a subject"),
    ("meta_data_with_label.json", "[]", "holds a list; expected a JSON object"),
    ("meta_data_with_label.json", '{"100": ', "cannot be read as JSON"),
])  # fmt: skip
def test_a_table_without_use_is_refused_for_a_set_and_reported_for_a_prediction(
    tmp_path, name, text, sentence
):
    root = write_set(tmp_path, slices=[70], subjects=False)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_index(root)
    listed = list_inputs([root / "test"])
    assert listed.index.subject.isna().all()
    assert any("subjects are unknown: " in note and sentence in note for note in listed.notes)


def test_each_of_two_tables_must_know_a_scan_of_a_set(tmp_path):
    root = write_set(tmp_path, slices=[70])
    write_metadata(tmp_path, {"I100": "002_S_0001"})
    with pytest.raises(InputError, match="json: none of the 1 scans listed there is .*I100"):
        read_index(root)
    # A prediction is of a part of a set, which one of two tables need not know.
    assert list_inputs([root / "test"]).index.subject.notna().all()


def test_two_tables_without_subjects_are_refused(tmp_path):
    root = write_set(tmp_path, slices=[70], subjects=False)
    (tmp_path / "subjects.csv").write_text("scan,subject\n")
    (tmp_path / "meta_data_with_label.json").write_text("{}")
    with pytest.raises(InputError, match="no scan has a subject"):
        read_index(root)


# ---------------------------------------------------------------- subjects from names


@pytest.mark.parametrize("scan, form, subject", [
    ("OAS1_0001_MR1_mpr-1", "OASIS-1, OASIS-2", "OAS1_0001"),
    ("OAS2_0186_MR3", "OASIS-1, OASIS-2", "OAS2_0186"),
    ("sub-OAS30001_ses-d0129_run-01_T1w", "OASIS-3", "OAS30001"),
    ("OAS30027_MR_d1300", "OASIS-3", "OAS30027"),
    ("ADNI_002_S_0295_MR_MP-RAGE__br_raw_20060418_I13722", "ADNI", "002_S_0295"),
    ("941_S_10001_I99", "ADNI", "941_S_10001"),
    ("002_S_0295", "ADNI", "002_S_0295"),
    ("sub-002_S_0295_T1w", "ADNI", "002_S_0295"),
    ("sub-07_ses-1_T1w", "BIDS", "sub-07"),
    ("sub-X1", "BIDS", "sub-X1"),
])  # fmt: skip
def test_names_of_the_usual_archives_give_the_subject(scan, form, subject):
    subjects, (line,) = listing.subjects_from_names([scan])
    assert subjects == {scan: subject}
    assert f"({form}), such as {subject} of {scan}" in line


@pytest.mark.parametrize("scan", ["218391", "OAS1_1_MR1", "sub_07", "patient-3"])
def test_other_names_give_no_subject(scan):
    assert listing.subjects_from_names([scan]) == ({}, [])


def test_subjects_come_from_names_if_no_table_knows_the_scan(tmp_path):
    root = named_set(tmp_path, lambda subject, scan: f"sub-{subject}_ses-{scan}")
    index = read_index(root)
    assert index.subject.nunique() == index.group.nunique() == 8
    assert "8 subjects of 16 scans from their names (BIDS)" in list_set(root).notes[0]
    split = split_index(index, 0.3)
    assert split.groupby("subject").split.nunique().max() == 1


def test_a_subject_of_whom_a_table_knows_one_scan_of_two_stays_one(tmp_path):
    root = named_set(tmp_path, lambda subject, scan: f"sub-{subject}_ses-{scan}")
    (tmp_path / "subjects.csv").write_text("scan,subject\nsub-rAD0_ses-1,p1\n")
    for index in (read_index(root), list_inputs([root / "train"]).index):
        scans = index[index.scan.str.startswith("sub-rAD0_")]
        assert len(scans) == 2 and (scans.subject == "p1").all()


def test_a_name_that_a_table_gives_to_two_subjects_cannot_be_completed():
    scans = ["sub-1_ses-1", "sub-1_ses-2", "sub-1_ses-3"]
    table = {"sub-1_ses-1": "a", "sub-1_ses-2": "b"}
    assert listing.add_subjects_from_names(scans[:2], table)[0] == table
    with pytest.raises(InputError, match="the subject of scan sub-1_ses-3 is not clear"):
        listing.add_subjects_from_names(scans, table)


@pytest.mark.parametrize("pattern, n_subjects", [
    (r"(.+)-\d+$", 8), (r"^(?P<site>r|e)(?P<subject>AD0)", 1), ("^(.)", 2),
])  # fmt: skip
def test_a_pattern_finds_subjects_in_other_names(tmp_path, pattern, n_subjects):
    root = named_set(tmp_path, lambda subject, scan: f"{subject}-{scan}")
    assert read_index(root).subject.isna().all()
    assert list_set(root, pattern).index.subject.nunique() == n_subjects


def test_a_pattern_that_takes_the_whole_name_is_suspicious(tmp_path):
    root = named_set(tmp_path, lambda subject, scan: f"{subject}-{scan}")
    assert any("takes the whole name of each scan" in note for note in list_set(root, "(.*)").notes)


def test_a_pattern_without_a_match_is_refused_for_a_set_and_reported_for_a_prediction(tmp_path):
    root = named_set(tmp_path, lambda subject, scan: f"{subject}-{scan}")
    sentence = "--subject-pattern .zzz. finds no subject in 16 names"
    with pytest.raises(InputError, match=sentence):
        list_set(root, "(zzz)")
    notes = list_inputs([root / "test"], "(zzz)").notes
    assert any("finds no subject in 8 names of scans, such as " in note for note in notes)


def test_a_pattern_is_not_used_if_a_table_knows_all_scans(tmp_path):
    notes = list_set(write_set(tmp_path, slices=[70]), "(.)").notes
    assert notes == [
        "--subject-pattern is not used: the subjects of all scans are known from a table"
    ]


@pytest.mark.parametrize("pattern, sentence", [
    ("(a", "is no regular expression"), ("*", "is no regular expression"), ("a", "has no group"),
])  # fmt: skip
def test_a_pattern_that_cannot_work_is_wrong_usage(pattern, sentence):
    done = command.run(ROOT / "dataset.py", "x", "--subject-pattern", pattern)
    assert done.returncode == 2 and sentence in done.stderr


# ---------------------------------------------------------------- one scan, or a patient a file


def test_files_that_are_all_slices_of_one_scan_are_explained(tmp_path):
    for number in range(1, 9):
        write_slice(tmp_path / "in" / f"patient_{number:03d}.jpeg", True, number)
    index = list_inputs([tmp_path / "in"]).index
    (line,) = describe_one_scan(index, "all files")
    assert line == (
        "all files are taken for 8 slices of one scan: patient_001.jpeg is slice 1 of scan "
        "patient, as in <scan>_<slice>. If each is another scan, rename them, for example to "
        "patient-1_1.jpeg"
    )
    write_slice(tmp_path / "in" / "other_1.jpeg", True, 0)
    assert list(describe_one_scan(list_inputs([tmp_path / "in"]).index, "all files")) == []
    one = list_inputs([tmp_path / "in" / "other_1.jpeg"]).index
    assert list(describe_one_scan(one, "all files")) == []


def test_a_training_class_of_a_single_scan_is_explained(tmp_path):
    for split in ("train", "test"):
        for number in range(1, 5):
            write_slice(tmp_path / split / "AD" / f"{split}_{number}.png", True, number)
            write_slice(tmp_path / split / "NC" / f"{split}{number}_1.png", False, number)
    notes = [line for line in list_set(tmp_path).notes if "one scan" in line]
    assert len(notes) == 2 and notes[0].startswith("all files of train/AD are taken for 4 slices")


# ---------------------------------------------------------------- the inputs of a prediction


@pytest.mark.parametrize("names", [("AD", "NC"), ("ad", "nc"), ("Ad", "nC")])
def test_folders_of_the_classes_are_labels_in_any_case(tmp_path, names):
    for name in names:
        write_slice(tmp_path / name / f"{name}x_70.jpeg", True, 0)
    index = list_inputs([tmp_path]).index
    assert dict(zip(index.scan, index.label)) == {f"{name}x": name.upper() for name in names}


def test_a_folder_of_another_name_beside_slices_is_not_used(tmp_path):
    write_slice(tmp_path / "a_70.jpeg", True, 0)
    write_slice(tmp_path / "ad" / "b_70.jpeg", True, 0)
    listed = list_inputs([tmp_path])
    assert listed.index.scan.tolist() == ["a"] and listed.index.label.isna().all()
    assert listed.notes == [
        f"not used: 1 other file under {tmp_path}: 1 .jpeg (such as {tmp_path}/ad/b_70.jpeg); "
        "images are read in an input itself, or in its AD/ and NC/ alone if it has them"
    ]


def test_class_folders_that_are_given_one_by_one_are_reported_as_no_labels(ad_nc):
    folders = [ad_nc / "test" / "AD", ad_nc / "test" / "NC"]
    index = list_inputs(folders).index
    assert index.label.isna().all() and index.subject.notna().all()
    (line,) = describe_separate_classes(folders, index)
    assert f"give the folder that holds them, such as {ad_nc}/test" in line
    index = list_inputs([ad_nc / "test"]).index
    assert list(describe_separate_classes([ad_nc / "test"], index)) == []


def test_tables_are_found_from_a_slice_and_from_lower_case_classes(tmp_path):
    root = write_set(tmp_path, slices=[70])
    (root / "test" / "AD").rename(root / "test" / "ad")
    for given in (root / "test" / "ad", root / "test" / "ad" / "300_70.jpeg"):
        assert list_inputs([given]).index.subject[0] == "ta0"


def test_a_folder_without_slices_names_a_folder_that_has_some(tmp_path):
    write_slice(tmp_path / "p1" / "c_70.jpeg", True, 0)
    with pytest.raises(InputError, match=r"contains no images .*did you mean .*/p1\?"):
        list_inputs([tmp_path])
    root = write_set(tmp_path / "set", slices=[70])
    for given in (root, root.parent):
        with pytest.raises(InputError, match="did you mean .*AD_NC/test"):
            list_inputs([given])


def test_an_input_that_cannot_be_predicted_has_a_reason(tmp_path):
    path = tmp_path / "a_70.jpeg"
    write_slice(path, True, 0)
    (tmp_path / "x.txt").touch()
    failed = {str(tmp_path / "b.nii"): "is empty"}
    index = list_inputs([path, tmp_path / "gone", tmp_path / "x.txt"], failed=failed).index
    errors = {Path(row.path).name: row.error for row in index[index.error.notna()].itertuples()}
    assert errors["gone"].startswith("does not exist; expected")
    assert errors["x.txt"].startswith("is neither an image (.jpeg, ")
    assert errors["b.nii"] == "is empty" and len(errors) == 3
    with pytest.raises(InputError, match=r"gone does not exist.* \(and 1 more that cannot"):
        list_inputs([tmp_path / "gone", tmp_path / "x.txt"])


def test_a_file_of_another_name_is_a_scan_of_its_own(tmp_path):
    for folder in ("a", "b"):
        write_slice(tmp_path / folder / "holiday.jpeg", True, 0)
    index = list_inputs([tmp_path / "a", tmp_path / "b"]).index
    assert index.scan.tolist() == index.path.tolist() and index.slice.isna().all()


def test_a_folder_that_holds_one_class_under_its_name_says_so(tmp_path):
    root = write_set(tmp_path, slices=[70])
    assert not any("its labels are all" in note for note in list_inputs([root / "test"]).notes)
    (root / "test" / "NC").rename(root / "test" / "CN")
    listed = list_inputs([root / "test"])
    assert set(listed.index.label) == {"AD"}
    assert any("and no NC/: its labels are all AD. If CN/ is the" in note for note in listed.notes)


def test_a_file_counts_once_and_links_are_reported(tmp_path):
    root = write_set(tmp_path, slices=[70])
    link = root / "test" / "AD" / "999_70.jpeg"
    link.symlink_to(root / "test" / "AD" / "300_70.jpeg")
    listed = list_inputs([root / "test", root / "test" / "AD"])
    assert len(listed.index) == 6 and listed.index.label.notna().all()
    assert listed.notes == [
        f"1 path of a file that is listed under another path, first {link}; each file counts once"
    ]
    twice = list_inputs([root / "test" / "NC", root / "test" / "NC"])
    assert len(twice.index) == 3 and twice.notes == []


def test_tables_beside_two_inputs_must_not_contradict_each_other(tmp_path):
    one = write_set(tmp_path / "one", slices=[70])
    other = write_set(tmp_path / "other", SCANS | {"300": ("test", "AD", "x")}, slices=[71])
    listed = list_inputs([one / "test", other / "test"])
    assert any("subjects are unknown: scan 300 belongs to" in note for note in listed.notes)
    assert listed.index.subject.isna().all()
