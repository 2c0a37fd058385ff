"""Names of scans and subjects: one person in two spellings is one, and two names never one."""

import json
import os
import unicodedata

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import write_slice

from adnc.data import subjects
from adnc.data.index import (
    list_inputs,
    read_index,
    read_metadata,
    read_subject_table,
    subjects_from_names,
)
from adnc.data.pixels import parse_name
from adnc.errors import InputError
from adnc.files import read_table, same_name
from adnc.volumes.cut import LONGEST, find_all, safe_name

NFC, NFD = (unicodedata.normalize(form, "Zoé Müller") for form in ("NFC", "NFD"))
SPELLINGS = [NFD, f"{NFC} ", f"\ufeff{NFC}", NFC.replace(" ", "\u00a0"), "Zoé\u200b Müller"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_name_in_another_spelling_of_unicode_is_the_same(spelling):
    assert spelling != NFC
    assert same_name(spelling) == same_name(NFC) == NFC
    assert parse_name(f"x/{spelling}_7.png") == (NFC, 7)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_person_spelled_in_two_ways_is_on_one_side_of_the_split(tmp_path, spelling):
    """The files spell as macOS does, the table as a spreadsheet."""
    root = tmp_path / "AD_NC"
    names = {("train", "AD"): ["ana", NFD], ("train", "NC"): ["ben", "eva"]}
    names |= {("test", "AD"): ["kim"], ("test", "NC"): ["lea"]}
    for (split, label), scans in names.items():
        for seed, scan in enumerate(scans):
            write_slice(root / split / label / f"{scan}_1.png", label == "AD", seed)
    rows = [f"{scan},{scan}" for scan in ("ben", "eva", "kim", "lea")]
    text = "\n".join(["scan,subject", *rows, f"ana,{spelling}", f"{NFC},{NFC}"])
    (root / "subjects.csv").write_text(text, encoding="utf-8")
    index = read_index(root)
    own = index[index.scan.isin(["ana", NFC])]
    assert len(own) == 2 and set(own.subject) == {NFC} and own.group.nunique() == 1
    assert all(map(os.path.exists, index.path))  # opened by the names that they have


def test_a_scan_in_train_and_test_is_noticed_in_any_spelling(tmp_path):
    for split, name in (("train", NFC), ("test", NFD)):
        for label, scan in (("AD", name), ("NC", f"other-{split}")):
            write_slice(tmp_path / split / label / f"{scan}_{len(split)}.png", True, 0)
    with pytest.raises(InputError, match="which is in train and in test"):
        read_index(tmp_path)


def test_exposure_is_found_in_any_spelling(tmp_path):
    write_slice(tmp_path / "a" / f"{NFC}_1.png", True, 0)
    write_slice(tmp_path / "b" / f"{NFD}_2.png", True, 1)
    for name in ("a", "b"):
        (tmp_path / name / "subjects.csv").write_text(f"scan,subject\n{NFD},002_S_6795\n")
    one, other = (list_inputs([tmp_path / name]).index for name in ("a", "b"))
    assert one.scan[0] == other.scan[0] and one.subject[0] == other.subject[0]


def test_a_split_file_may_spell_paths_as_another_system_does(tmp_path):
    index = pd.DataFrame({
        "path": [str(tmp_path / "train" / "AD" / f"{NFD}_1.png"), str(tmp_path / "x_1.png")],
        "scan": [NFC, "x"], "group": ["a", "b"], "split": ["train", "train"],
    })  # fmt: skip
    rows = f"path;split;;\ntrain\\AD\\{NFC}_1.png;val;;\nx_1.png;train;;\n"
    (tmp_path / "split.csv").write_text(f"sep=;\n{rows}", encoding="utf-8")
    index = subjects.read_split(index, tmp_path / "split.csv", tmp_path)
    assert index.split.tolist() == ["val", "train"]


# ---------------------------------------------------------------- tables of spreadsheets


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", [
    "sep=;\nscan;subject\n1;a\n2;b\n",
    "SEP=,\r\nscan,subject\r\n1,a\r\n2,b\r\n",
    "scan,subject,,\n1,a,,\n2,b,,\n",
    "scan,subject\n1,a,,,\n2,b,\n",
    "Scan\tSubject\t\n\n1\ta\t\n2\tb\n\n",
    'scan,subject,note\n1,a,"x, y"\n2,b,\n',
    "scan;subject;age, years\n1;a;70,5\n2;b;71,0\n",
    'scan,subject,note\n1,a,"two\nlines"\n2,b,\n',
])  # fmt: skip
def test_tables_of_spreadsheets_are_read(tmp_path, text, encoding):
    (tmp_path / "t.csv").write_text(text, encoding=encoding)
    table = read_table(tmp_path / "t.csv", ("scan", "subject"))
    assert table[["scan", "subject"]].to_numpy().tolist() == [["1", "a"], ["2", "b"]]


@pytest.mark.parametrize("text, problem", [
    ("scan,subject\n\n1,a,b\n", "line 3 has 3 cells, the header has 2"),
    ("\n \n", "nothing but blanks"),
    ("scan,subject,subject\n1,a,b\n", "each once"),
    ("sep=;\n", "cannot be read"),
    ("scan\n1\n", "has the columns scan; expected scan and subject"),
])  # fmt: skip
def test_a_table_that_cannot_be_understood_is_refused(tmp_path, text, problem):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=problem):
        read_table(tmp_path / "t.csv", ("scan", "subject"))


@pytest.mark.parametrize("text", ['scan,subject\n1,"a\n2,b\n', 'scan,subject\n1,"a\n2,"b\n3,c\n'])
def test_a_quote_that_is_not_closed_swallows_no_row(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_table(tmp_path / "t.csv", ("scan", "subject"))


@pytest.mark.parametrize("cell", ["#NV", "#REF!", "#N/A", "k.A.", "NaN"])
def test_errors_of_a_spreadsheet_are_unknown_subjects(tmp_path, cell):
    (tmp_path / "t.csv").write_text(f"scan,subject\n1,a\n2,{cell}\n")
    assert read_table(tmp_path / "t.csv", ("scan", "subject")).subject.isna().tolist() == [0, 1]


def test_a_key_that_is_twice_in_metadata_is_refused(tmp_path):
    (tmp_path / "m.json").write_text('{"1": {"raw": "ADNI_002_S_0001_"}, "1": {}}')
    with pytest.raises(InputError, match="the key 1 is there twice"):
        read_metadata(tmp_path / "m.json")


@pytest.mark.parametrize("one, other", [
    ("0513", "513"), ("P513", "p513"), ("P 513", "P-513"), ("P-513", "P\u2013513"),
    ("sub-0513", "0513"), ("513_S_0513", "513_s_0513"),
])  # fmt: skip
def test_subjects_that_differ_in_what_is_easily_mistyped_are_named(one, other):
    table = pd.DataFrame({"scan": list("abc"), "subject": [one, other, "another"]})
    (line,) = subjects.describe_doubtful_names(table)
    assert line.startswith(f"SUSPICIOUS: the subjects {one} and {other} differ only in")
    table.loc[1, "subject"] = "someone"
    assert list(subjects.describe_doubtful_names(table)) == []


def test_a_subject_with_an_unusual_share_of_the_scans_is_named():
    names = ["x" for _ in range(6)] + [f"s{i}" for i in range(30)]
    table = pd.DataFrame({"scan": range(36), "subject": names})
    (line,) = subjects.describe_doubtful_names(table)
    assert line.startswith("SUSPICIOUS: 6 of 36 scans have the subject x: is it a word for")
    table.loc[30:, "subject"] = "y"  # six scans, too: people who came often
    assert list(subjects.describe_doubtful_names(table)) == []


def test_reals_of_a_spreadsheet_are_the_whole_numbers_that_they_were(tmp_path):
    (tmp_path / "subjects.csv").write_text("scan,subject\n1.0,513\n2,513.0\n")
    assert read_subject_table(tmp_path / "subjects.csv")[0] == {"1": "513", "2": "513"}


def test_a_table_that_is_not_in_utf_8_is_refused_with_its_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("scan,subject\n1,a\nMüller,b\n".encode("cp1252"))
    with pytest.raises(InputError, match="line 3 is not in UTF-8; save it as CSV in UTF-8"):
        read_table(tmp_path / "t.csv", ("scan", "subject"))


@pytest.mark.parametrize("mark", "\u200b\u200e\u202a\u2066\u2061\u180e\ufe0f\u00ad\ufeff")
def test_characters_of_no_width_make_no_other_person(mark):
    assert same_name(f" {mark}Mül{mark}ler {mark}") == "Müller"


def test_two_spellings_of_a_scan_with_two_subjects_are_refused(tmp_path):
    entries = {}
    for form, subject in (("NFC", "002_S_0001"), ("NFD", "002_S_0002")):
        name = unicodedata.normalize(form, "Müller")
        entries[name] = {"label": 2, "raw": f"ADNI_{subject}_MR.nii"}
    (tmp_path / "meta_data_with_label.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(InputError, match="names two subjects of scan Müller"):
        read_metadata(tmp_path / "meta_data_with_label.json")


# ---------------------------------------------------------------- names of volumes


@pytest.mark.parametrize("name", [
    "sub-01_ses-2_T1w", "Müller", "Иван", "山田", "हिन्दी", "ภาษาไทย", "a.b-c_d",
])  # fmt: skip
def test_letters_of_all_scripts_are_kept(name):
    assert safe_name(name) == name


def test_different_names_never_become_equal():
    names = ["a b", "a-b", "a  b", "a/b", "a?b", ".a", "a", "..a", "?", "*", "", "\udcff", "\udcfe"]
    names += ["x" * 200, "y" + "x" * 199, "ü" * 200, "é" * 200]
    safe = [safe_name(name) for name in names]
    assert len({name.lower() for name in safe}) == len(names)
    assert all(len(os.fsencode(name)) <= LONGEST + 7 and name.isprintable() for name in safe)
    assert not any(set(name) & set('/\\:*?"<>| ') for name in safe)


def test_volumes_whose_names_differ_in_an_accent_or_in_case_are_different_scans(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    for name in ("Müller", "Möller", "Иван", "Анна", "Scan", "scan"):
        (tmp_path / name).mkdir()
        nib.save(image, tmp_path / name / f"{name}.nii")
    scans = find_all([tmp_path]).scan
    assert len({scan.lower() for scan in scans}) == 6
    assert {"Müller", "Möller", "Иван", "Анна"} <= set(scans)


def test_the_name_of_a_scan_does_not_depend_on_what_is_given_beside_it(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    paths = []
    for folder in ("one/anat", "two/anat"):
        (tmp_path / folder).mkdir(parents=True)
        paths.append(tmp_path / folder / "_x.nii")
        nib.save(image, paths[-1])
    forwards = find_all(paths).set_index("source").scan
    backwards = find_all(paths[::-1]).set_index("source").scan
    assert forwards.sort_index().equals(backwards.sort_index()) and forwards.nunique() == 2


def test_bids_subjects_have_whole_names_in_any_script(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    for name in ("sub-Müller_T1w", "sub-Möller_T1w", "sub-Иван_ses-2_T1w"):
        nib.save(image, tmp_path / f"{name}.nii")
    table = find_all([tmp_path])
    assert set(table.subject) == {"sub-Müller", "sub-Möller", "sub-Иван"}
    read, _ = subjects_from_names(table.scan)
    assert dict(zip(table.scan, table.subject)) == read
