"""What people call their folders and files: an answer that says what to do, and nobody taken for somebody else."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import command
import pytest
from conftest import ROOT, SCANS, SMALL, write_set, write_slice

import dataset
from adnc.data import index as listing
from adnc.data import metadata
from adnc.data import subjects
from adnc import cli as utils
from adnc.data.index import list_inputs, read_index


def propose(root):
    """The commands that the error for a folder proposes."""
    with pytest.raises(utils.InputError) as found:
        read_index(root)
    return re.findall(r"^  (.*)$", str(found.value), re.MULTILINE)


@pytest.mark.parametrize("moves", [
    [("train/NC", "train/CN"), ("test/NC", "test/CN")],
    [("train", "Train"), ("test", "TEST")],
    [("train/AD", "train/ad"), ("train/NC", "train/nc"), ("test/AD", "test/ad"), ("test/NC", "test/nc")],
    [("train/AD", "train/Alzheimer"), ("train/NC", "train/Healthy"), ("train", "training"), ("test", "Testing")],
    [("test/NC", "test/it's normal"), ("test/it's normal", "test/Controls")],
])  # fmt: skip
def test_folders_under_other_names_get_the_commands_that_rename_them(tmp_path, moves):
    root = write_set(tmp_path / "a folder", slices=[70])
    expected = read_index(root)
    for old, new in moves:
        (root / old).rename(root / new)
    for line in propose(root):
        subprocess.run(line, shell=True, check=True)
    assert read_index(root).equals(expected)


def test_a_set_that_lies_deeper_is_named(tmp_path):
    root = write_set(tmp_path / "a" / "b", slices=[70])
    assert len(read_index(root.parent)) == 18
    for given in (tmp_path / "a", tmp_path):
        with pytest.raises(utils.InputError, match="did you mean"):
            read_index(given)
    (tmp_path / "a" / "README").touch()
    with pytest.raises(utils.InputError, match="has no train/AD, train/NC, test/AD, test/NC, it holds README, b; exp"):
        read_index(tmp_path / "a")
    with pytest.raises(utils.InputError, match="README is not a folder"):
        read_index(tmp_path / "a" / "README")


def test_folders_of_patients_get_the_command_that_moves_their_slices_up(tmp_path):
    root = write_set(tmp_path, slices=[70, 71])
    expected = read_index(root)
    for path in expected.path:
        scan = path.rsplit("/", 1)[1].split("_")[0]
        patient = root.joinpath(*path.split("/")[-3:-1], f"patient {SCANS[scan][2]}")
        patient.mkdir(exist_ok=True)
        shutil.move(path, patient)
    for _ in range(4):
        (line,) = propose(root)
        subprocess.run(line, shell=True, check=True)
        for folder in root.glob("*/*/patient*"):
            if not any(folder.iterdir()):
                folder.rmdir()
    assert read_index(root).equals(expected)


@pytest.mark.parametrize("names", [("AD", "CN"), ("ad", "nc"), ("Alzheimer's", "Normal"), ("AD", "controls")])
def test_a_folder_to_predict_may_call_the_classes_otherwise_and_it_is_said(tmp_path, names):
    for name in names:
        write_slice(tmp_path / name / f"{name[0]}_70.jpeg", True, 0)
    found = list_inputs([tmp_path])
    assert sorted(found.index.label) == ["AD", "NC"]
    taken = [line for line in found.warnings if "is taken for" in line]
    assert len(taken) == 2 - sum(name in ("AD", "NC") for name in names)


def test_folders_beside_slices_are_no_classes_and_folders_of_patients_are_proposed(tmp_path):
    write_slice(tmp_path / "a_70.jpeg", True, 0)
    write_slice(tmp_path / "normal" / "b_70.jpeg", True, 0)
    found = list_inputs([tmp_path])
    assert found.index.label.isna().all() and found.warnings == [f"passed over: 1 file in {tmp_path}/normal"]
    for name in ("p1", "p2"):
        write_slice(tmp_path / "patients" / name / "c_70.jpeg", True, 0)
    with pytest.raises(utils.InputError, match="did you mean .*/p1 and 1 others"):
        list_inputs([tmp_path / "patients"])


# ---------------------------------------------------------------- subjects from names


@pytest.mark.parametrize("scan, form, subject", [
    ("OAS1_0001_MR1_mpr-1", "OASIS-1, OASIS-2", "OAS1_0001"), ("OAS2_0186_MR3", "OASIS-1, OASIS-2", "OAS2_0186"),
    ("sub-OAS30001_ses-d0129_run-01_T1w", "OASIS-3", "OAS30001"), ("OAS30027_MR_d1300", "OASIS-3", "OAS30027"),
    ("ADNI_002_S_0295_MR_MP-RAGE__br_raw_20060418_I13722", "ADNI", "002_S_0295"),
    ("941_S_10001_I99", "ADNI", "941_S_10001"), ("sub-07_ses-1_T1w", "BIDS", "sub-07"), ("sub-X1", "BIDS", "sub-X1"),
    ("218391", None, None), ("OAS1_1_MR1", None, None), ("sub_07", None, None),
    *((scan, "ADNI", "002_S_0295") for scan in ("002_S_0295", "sub-002_S_0295_T1w", "002_S_0295_bl")),
])  # fmt: skip
def test_names_of_the_usual_archives_say_who_is_in_a_scan(scan, form, subject):
    who, lines = metadata.subjects_from_names([scan])
    assert who == ({scan: subject} if subject else {})
    assert [f"({form})" in line and f"such as {subject} of {scan}" in line for line in lines] == [True] * bool(form)


def named_set(folder, name):
    """A set whose scans are named `name(subject, number of the scan)`, two scans a subject."""
    root, scans = folder / "AD_NC", 0
    for split, label in (("train", "AD"), ("train", "NC"), ("test", "AD"), ("test", "NC")):
        for i in range(4):
            scans += 1
            write_slice(root / split / label / f"{name(split[1] + label + str(i // 2), scans)}_70.jpeg", True, scans)
    return root


def test_subjects_come_from_names_where_no_table_knows_the_scan(tmp_path, capsys):
    root = named_set(tmp_path, lambda who, scan: f"sub-{who}_ses-{scan}")
    assert read_index(root).subject.nunique() == 8 and read_index(root).group.nunique() == 8
    dataset.main(dataset.parse_args([str(root)]))
    said = capsys.readouterr().out
    assert "subjects of 16 scans from their names (BIDS), such as sub-rAD0 of" in said and "NOT CHECKED" not in said
    # A table knows better.
    (tmp_path / "subjects.csv").write_text("scan,subject\nsub-rAD0_ses-1,somebody\n")
    index = read_index(root)
    assert index.subject.nunique() == 8 and sorted(index.subject.unique())[-1] == "sub-rNC1"
    # Of whom the table has one scan of two: not two people.
    named = index.scan.str.startswith("sub-rAD0_")
    assert index.scan[named].nunique() == 2 and (index.subject[named] == "somebody").all()
    inputs = listing.list_inputs([root / "train"]).index
    assert (inputs.subject[inputs.scan.str.startswith("sub-rAD0_")] == "somebody").all()


@pytest.mark.parametrize("label", ["AD", "NC"])
def test_the_audit_ends_with_1_where_training_would_find_one_subject_in_a_class(tmp_path, label):
    root = named_set(tmp_path, lambda who, scan: f"sub-{who.replace(label + '1', label + '0')}_ses-{scan}")
    with pytest.raises(SystemExit, match=f"training would refuse this set: .*no {label} is left for val"):
        dataset.main(dataset.parse_args([str(root)]))
    done = command.run(ROOT / "train.py", "--data", root, "--out", tmp_path / "out", *SMALL)
    assert done.returncode == 2 and f"no {label} is left for val" in done.stderr


def test_a_name_that_a_table_gives_to_two_subjects_is_nobodys():
    scans, table = ["sub-1_ses-1", "sub-1_ses-2", "sub-1_ses-3"], {"sub-1_ses-1": "a", "sub-1_ses-2": "b"}
    assert metadata.add_names(scans[:2], table)[0] == table
    with pytest.raises(utils.InputError, match="who is in scan sub-1_ses-3 is not clear"):
        metadata.add_names(scans, table)
    assert metadata.add_names(scans, {"sub-1_ses-1": "a"})[0] == dict.fromkeys(scans, "a")


def test_a_pattern_that_fits_no_name_is_refused_for_a_set_and_reported_for_a_prediction(tmp_path):
    root = named_set(tmp_path, lambda who, scan: f"{who}-{scan}")
    found = listing.list_inputs([root / "test"], "(nobody)")
    assert found.index.subject.isna().all() and any("finds no subject in" in line for line in found.warnings)
    (tmp_path / "subjects.csv").write_text("scan,subject\n" + "".join(
        f"{scan},x\n" for scan in read_index(root).scan.unique()))
    assert any("--subject-pattern is not used" in line for line in listing.list_set(root, "(a)").warnings)


@pytest.mark.parametrize("text, said", [("scan,subject\n", "names the subject of no scan"),
                                        ("scan,subject\nx,NA\n", "names the subject of no scan"),
                                        ("scan,subject\nx,y\n", "none of those in the folder")])
def test_a_table_that_says_nothing_of_the_scans_is_refused_for_a_set_and_reported_for_a_prediction(
        tmp_path, text, said):
    root = named_set(tmp_path, lambda who, scan: f"{who}-{scan}")
    (tmp_path / "subjects.csv").write_text(text)
    with pytest.raises(utils.InputError, match=said):
        listing.list_set(root)
    assert any(said in line for line in listing.list_inputs([root / "test" / "AD"]).warnings)


@pytest.mark.parametrize("others", [("A0", "a0"), ("a_0", "A-0"), ("0", "00", "0.0"), ("002_S_0295", "2_s_295"),
                                    ("053_S_3884", "sub-053S3884", "sub-ADNI053S3884", "ADNI_053_S_3884"),
                                    ("sub-01", "1")])  # fmt: skip
def test_one_person_in_several_spellings_is_one_and_said_to_be(tmp_path, others):
    scans = {str(100 + i): ("train", "AD", other) for i, other in enumerate(others)}
    root = write_set(tmp_path, SCANS | scans | {"300": ("test", "AD", others[-1])}, slices=range(2))
    found = listing.list_set(root)
    (said,) = [line for line in found.warnings if line.startswith("SUSPICIOUS")]
    assert f"{len(set(others)) - 1} subjects have another spelling" in said
    assert f"taken for one person, {others[0]}" in said
    assert set(found.index.group[found.index.scan.isin([*scans, "300"])]) == {others[0]}
    assert found.index.subject.nunique() == 18 - len(scans)
    train = found.index.assign(pixel_hash="")
    record = subjects.record_exposure(train[train.split == "train"])
    for name in others:  # nor does another table make a stranger of somebody whom training has seen
        table = train[train.scan.isin(["300", "301"])].assign(subject=[name] * 2 + [None] * 2, group=[1, 1, 2, 2])
        assert subjects.find_exposure(table, record).tolist() == ["yes", "yes", "unknown", "unknown"]
        old = {**record, "subjects": [utils.fingerprint(name)]}  # a checkpoint from before
        assert subjects.find_exposure(table, old)[0] == "yes"


@pytest.mark.parametrize("one, other", [("OAS1_0001", "OAS1_0010"), ("002_S_0295", "022_S_0295"), ("1.5", "15"),
                                        ("a1", "a11"), ("1_12", "11_2"), ("s10", "s1")])  # fmt: skip
def test_two_people_with_similar_names_stay_two(one, other):
    assert metadata.one_spelling({"x": one, "y": other}) == ({"x": one, "y": other}, [])


def adni(scan, subject):
    return {"label": 2, "file": f"/a/ADNI_{subject}_MR_I{scan}.nii"}


def test_of_two_tables_each_must_know_a_scan_of_a_set(tmp_path):
    root = write_set(tmp_path)
    table, entries = tmp_path / "subjects.csv", tmp_path / "meta_data_with_label.json"
    entries.write_text(json.dumps({"100": adni(100, "002_S_0001")}))
    table.write_text(re.sub("(?m)^(?=[1-4])", "I", table.read_text()))
    with pytest.raises(utils.InputError, match="csv: 18 scans are known, and none of those in the folder: .*I100"):
        read_index(root)
    found = listing.list_inputs([root / "train"])  # a part of a set
    assert not any("none of those" in line for line in found.warnings)


def test_a_scan_that_is_twice_in_the_json_is_refused_unless_both_are_alike(tmp_path):
    root = write_set(tmp_path, subjects=False)
    entries = tmp_path / "meta_data_with_label.json"
    one, other = (json.dumps(adni(100, who)) for who in ("002_S_0001", "002_S_0002"))
    entries.write_text(f'{{"100": {one}, "101": {{"label": NaN}}, "100": {one}}}')
    assert read_index(root).subject.notna().any()
    entries.write_text(f'{{"100": {one}, "100": {other}}}')
    with pytest.raises(utils.InputError, match="it has 100 twice, not alike"):
        read_index(root)


def test_a_pattern_without_end_is_given_up_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "LONGEST_MATCH", 0.2)
    with pytest.raises(utils.InputError, match="needs more than 0.2 seconds for the names .* write it without them"):
        metadata.subjects_from_names(["a" * 60 + "1"], "^(a+)+$")
    assert metadata.subjects_from_names(["a" * 60 + "1"], "^(a+)")[0]
    time.sleep(0.3)  # no alarm is left


def test_two_tables_of_subjects_complete_each_other_and_must_not_disagree(tmp_path):
    root = write_set(tmp_path)
    table, entries = tmp_path / "subjects.csv", tmp_path / "meta_data_with_label.json"
    entries.write_text(json.dumps({"100": adni(100, "002_S_0001"), "101": adni(101, "002_S_0002")}))
    with pytest.raises(utils.InputError, match="scan 10[01] is of a[01] in .*csv, and of 002_S_000[12] in .*json; c"):
        read_index(root)
    rows = [row for row in table.read_text().splitlines() if row[:3] not in ("100", "101")]
    table.write_text("\n".join([*rows, "100,2_s_1"]))
    found = listing.list_set(root)
    assert found.index.subject.notna().all() and found.sources == [entries, table]
    assert found.index.subject[found.index.scan == "100"].iloc[0] == "002_S_0001"
    assert f"subjects from {entries} and {table}" in list(dataset.audit(dataset.decode_set(root, bar=None)))
    for content in ("{}", '{"100": 3}', '{"100": {"label": 2}}'):
        entries.write_text(content)
        # The table knows all but scan 101.
        assert listing.list_set(root).index.subject.notna().sum() == 85
    table.unlink()
    for content in ("{}", '{"100": 3}', '{"100": {"label": 2}}'):
        entries.write_text(content)
        with pytest.raises(utils.InputError, match="names the subject of no scan; expected scan,subject in each row"):
            read_index(root)
        assert any("names the subject of no" in line for line in listing.list_inputs([root / "test"]).warnings)
    entries.write_text(json.dumps({"I100": adni(100, "002_S_0001")}))
    with pytest.raises(utils.InputError, match="none of those in the folder: the ids are such as I100, the folder's"):
        read_index(root)


@pytest.mark.parametrize("name", ["subjects.csv", "meta_data_with_label.json"])
@pytest.mark.parametrize("kind, said", [(Path.mkdir, "a folder or a pipe"), (os.mkfifo, "a folder or a pipe"),
                                        (lambda path: path.symlink_to("nowhere"), "there is no such file")])
def test_what_is_called_like_a_table_and_is_none_is_refused_and_not_waited_for(tmp_path, name, kind, said):
    root = write_set(tmp_path, slices=[1], subjects=False)
    kind(tmp_path / name)
    with pytest.raises(utils.InputError, match=f"{name} .*{said}"):
        read_index(root)
    assert any(said in line for line in listing.list_inputs([root / "test"]).warnings)


def test_inputs_that_are_links_to_others_count_once_and_are_said(tmp_path):
    root = write_set(tmp_path, slices=[1])
    (root / "test" / "AD" / "999_1.jpeg").symlink_to(root / "test" / "AD" / "300_1.jpeg")
    found = list_inputs([root / "test"])
    assert len(found.index) == 6 and any(line == f"1 inputs are links to others, first {root}/test/AD/999_1.jpeg; each "
                                         "file counts once" for line in found.warnings)
    assert not any("links" in line for line in list_inputs([root / "test" / "NC", root / "test" / "NC"]).warnings)


def test_the_same_picture_in_both_classes_is_a_contradiction(tmp_path):
    root = write_set(tmp_path)
    for number in (70, 71):
        shutil.copy(root / "train" / "AD" / f"100_{number}.jpeg", root / "train" / "NC" / f"200_{number}.jpeg")
    slices = dataset.decode_set(root, bar=None)
    (said,) = [line for line in dataset.audit(slices) if "SUSPICIOUS: 2 slices are in both classes" in line]
    assert f"first {root}/train/AD/100_70.jpeg and {root}/train/NC/200_70.jpeg; one of the two labels is wrong" in said
    assert said in list(subjects.describe_split(slices.index, "subject"))


@pytest.mark.parametrize("pattern, groups", [(r"(.+)-\d+$", 8), (r"^(?P<site>r|e)(?P<subject>AD0)", 1), ("^(.)", 2)])
def test_a_pattern_of_ones_own(tmp_path, pattern, groups):
    root = named_set(tmp_path, lambda who, scan: f"{who}-{scan}")
    assert read_index(root).subject.isna().all()
    index = listing.list_set(root, pattern).index
    assert index.subject.nunique() == groups
    assert any("takes the whole name of each" in line for line in listing.list_set(root, "(.*)").warnings)
    with pytest.raises(utils.InputError, match="--subject-pattern .nobody. finds no subject in 16 names"):
        listing.list_set(root, "(nobody)")


@pytest.mark.parametrize("pattern, sentence", [("(a", "is no regular expression"), ("a", "has no group"),
                                               ("", "has no group"), ("*", "is no regular expression")])
def test_a_pattern_that_cannot_work_is_wrong_usage(pattern, sentence):
    done = command.run(ROOT / "dataset.py", "x", "--subject-pattern", pattern)
    assert done.returncode == 2 and sentence in done.stderr
