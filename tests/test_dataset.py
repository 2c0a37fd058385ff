import json
import os
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCANS, train_steps, write_set, write_slice
from PIL import Image

import dataset
from adnc.scoring import metrics
import predict
from adnc.data import pixels as slices
from adnc.data import subjects
from utils import load_checkpoint
from dataset import SliceSet, make_loader, read_index
from adnc.data.index import list_inputs
from adnc.cli import InputError

# ---------------------------------------------------------------- index


def audit(root):
    """The lines of the audit of a folder."""
    return list(dataset.audit(dataset.decode_set(root, bar=None)))


def test_index_has_a_row_a_slice_and_knows_three_units(ad_nc):
    index = read_index(ad_nc)
    assert list(index.columns) == ["path", "label", "scan", "slice", "subject", "split", "group"]
    assert len(index) == 18 * 5 and index.scan.nunique() == 18
    row = index[(index.scan == "301") & (index.slice == 72)].iloc[0]
    assert (row.label, row.subject, row.split) == ("AD", "ta1", "test")
    assert Image.open(row.path).size == (48, 40)


def test_the_parent_of_ad_nc_will_do(ad_nc):
    assert read_index(ad_nc.parent).equals(read_index(ad_nc))


def test_junk_is_ignored_and_extensions_may_be_of_any_case(tmp_path):
    root = write_set(tmp_path)
    folder = root / "train" / "AD"
    for name in (".DS_Store", "._100_70.jpeg", "notes.txt", "Thumbs.db"):
        (folder / name).write_bytes(b"junk")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
        write_slice(folder / name / "100_70.jpeg", True, 0)
    for extension in ("JPG", "png", "JPEG"):
        write_slice(folder / f"x_y_{len(extension)}{ord(extension[0])}.{extension}", True, 0)
    index = read_index(root)
    assert len(index) == 18 * 5 + 3
    assert (index.scan == "x_y").sum() == 3  # the scan is all before the last underscore


def test_a_set_of_12_bits_is_read_as_such_said_and_predicted_by_the_same_rule(tmp_path, capsys):
    """In files of 16 bits; a dark slice of it is not brightened because it is predicted alone."""
    root = write_set(tmp_path)
    for path in sorted(root.rglob("*.jpeg")):
        values = np.asarray(Image.open(path)).astype(np.uint16) * 16
        Image.fromarray(values).save(path.with_suffix(".png"))
        path.unlink()
    said = "90 of 90 slices have 16 bits a pixel (AD 45, NC 45) and are read as of 12, all by one rule: 0 to 4,095"
    assert any(said in line for line in audit(root))
    run = train_steps(root, tmp_path / "run", "--epochs", "1")
    assert said in (run / "training_log.txt").read_text()
    checkpoint = load_checkpoint(run / "best_model.pth")
    path = root / "test" / "NC" / "400_70.png"
    given = dataset.load_inputs(list_inputs([path]), checkpoint, bar=None)
    whole = dataset.decode_set(root, bar=None)  # from the cache
    assert checkpoint["bits"] == 12 and "1 of 1 slices have 16 bits a pixel and are read as of 12" in given.passed[0]
    row = whole.index.row[whole.index.path == str(path)].item()
    assert np.array_equal(given.images[0], whole.images[row]) and given.images.max() < 128

    values = np.asarray(Image.open(path))
    Image.fromarray(values * (8192 // values.max())).save(tmp_path / "other_1.png")
    predict.main(predict.parse_args([str(path), str(tmp_path / "other_1.png"), "--out", str(tmp_path / "out"),
                                     "--checkpoint", str(run / "best_model.pth")]))  # fmt: skip
    assert "holds values up to" in capsys.readouterr().err


def test_every_file_is_used_refused_or_listed_as_passed_over(tmp_path):
    root = write_set(tmp_path)
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".webp": "WEBP"}
    for k, (extension, kind) in enumerate(kinds.items()):
        path = root / "train" / "NC" / f"200_{70 + k}.jpeg"
        Image.open(path).save(path.with_suffix(extension), kind)
        path.unlink()
    assert len(read_index(root)) == 18 * 5
    for folder, name in (("train/NC", "200_70.dcm"), ("train/NC", "notes"), ("val/AD", "1_70.jpeg"), (".", "a.log"),
                         ("train/MCI", "5_70.jpeg"), ("train/MCI", "5_71.jpeg"), ("__MACOSX/train", "x.jpeg")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(b"x")
    (root / "again").symlink_to(root)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "6_70.jpeg").write_bytes(b"x")
    (root / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    expected = {f"passed over: 1 .dcm file in {root}/train/NC", f"passed over: 1 file in {root}/val/AD",
                f"passed over: 1 extensionless file in {root}/train/NC", f"passed over: 1 .log file in {root}",
                f"passed over: 2 files in {root}/train/MCI", f"passed over: 1 file in {root}/train/linked",
                "passed over: 1 file left by archives and tools, such as .DS_Store"}  # fmt: skip
    assert {line for line in audit(root) if line.startswith("passed over")} == expected
    run = train_steps(root, tmp_path / "run", "--epochs", "1")
    assert expected <= set((run / "training_log.txt").read_text().splitlines())


@pytest.mark.parametrize("name", ["holiday.jpeg", "100_.png", "_70.jpeg", "100_7a.jpg", "1_99999999999999999999.png"])
def test_an_image_of_another_name_is_an_error_that_names_it(tmp_path, name):
    root = write_set(tmp_path)
    write_slice(root / "test" / "NC" / name, False, 0)
    with pytest.raises(ValueError, match=f"{name} is not named <scan>_<slice>"):
        read_index(root)


def test_a_missing_or_empty_class_folder_is_an_error_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no train/AD, train/NC, test/AD, test/NC, it holds nothing; exp"):
        read_index(tmp_path)
    root = write_set(tmp_path, {k: v for k, v in SCANS.items() if v[:2] != ("test", "NC")})
    (root / "test" / "NC").mkdir()
    with pytest.raises(ValueError, match="test/NC holds no images"):
        read_index(root)


def test_a_subfolder_with_slices_is_not_silently_lost(tmp_path):
    root = write_set(tmp_path)
    write_slice(root / "train" / "AD" / "more" / "900_70.jpeg", True, 0)
    with pytest.raises(ValueError, match="more is a folder"):
        read_index(root)


@pytest.mark.parametrize("twin, sentence", [
    (("train", "NC"), "both classes"), (("test", "AD"), "both train and test"),
])  # fmt: skip
def test_a_scan_is_in_one_class_and_one_split(tmp_path, twin, sentence):
    root = write_set(tmp_path)
    write_slice(root / twin[0] / twin[1] / "100_99.jpeg", True, 0)
    with pytest.raises(ValueError, match=f"is of scan 100, which is in {sentence}"):
        read_index(root)


def test_a_slice_that_is_there_twice_is_an_error(tmp_path):
    root = write_set(tmp_path)
    write_slice(root / "train" / "AD" / "100_70.png", True, 0)
    with pytest.raises(ValueError, match="(?s)2 files .*100_70.jpeg is the same slice of a scan as .*100_70.png"):
        read_index(root)


def write_metadata(root, **changes):
    """The JSON of ADNI, of the test's scans: labels 0 and 2, the subject in a file name."""
    entries = {}
    for i, (scan, (_, label, _)) in enumerate(SCANS.items()):
        raw = f"/data/ADNI/x/ADNI_{i:03}_S_{1000 + i}_MR_MPRAGE_br_raw_2007_S1_I{scan}.nii"
        entries[scan] = {"label": {"AD": 2, "NC": 0}[label], "raw": raw, "age": 71.5}
    entries["999"] = {"label": 1, "raw": "/data/ADNI_999_S_9999_MR_I999.nii"}  # neither, and not in the folders
    (root.parent / "meta_data_with_label.json").write_text(json.dumps(entries | changes))


def test_subjects_come_from_the_metadata_beside_the_folder(tmp_path):
    root = write_set(tmp_path, subjects=False)
    write_metadata(root)
    index = read_index(root)
    assert index[index.scan == "101"].subject.unique().tolist() == ["001_S_1001"]
    assert index.subject.notna().all() and index.subject.nunique() == 18


def test_metadata_that_disagrees_with_the_folder_is_an_error(tmp_path):
    root = write_set(tmp_path, subjects=False)
    write_metadata(root, **{"100": {"label": 0}, "101": {"label": "2"}})
    with pytest.raises(ValueError, match="100_70.jpeg is in folder AD, but .*json says NC"):
        read_index(root)


def test_without_metadata_the_subject_is_unknown_and_the_audit_says_so(tmp_path):
    root = write_set(tmp_path, subjects=False)
    assert read_index(root).subject.isna().all()
    assert any(line.startswith("NOT CHECKED: 18 of 18 scans") for line in audit(root))


def test_broken_metadata_is_an_error_in_one_sentence(tmp_path):
    root = write_set(tmp_path)
    (tmp_path / "meta_data_with_label.json").write_text('{"100": ')
    with pytest.raises(ValueError, match="cannot be read as a JSON object of scans"):
        read_index(root)
    (tmp_path / "meta_data_with_label.json").unlink()
    (tmp_path / "subjects.csv").write_text("image,patient\n1,2\n")
    with pytest.raises(ValueError, match="has the columns image, patient; expected scan and subject"):
        read_index(root)
    (tmp_path / "subjects.csv").write_text("scan,subject,Subject\n100,a0,b0\n")
    with pytest.raises(ValueError, match="has the columns scan, subject, subject; expected .*, and none twice"):
        read_index(root)
    (tmp_path / "subjects.csv").write_text("scan,subject\n 100 ,a0 \nNA,\n101,None\n")  # blanks of a spreadsheet
    subjects = read_index(root).set_index("scan").subject
    assert subjects["100"].iloc[0] == "a0" and subjects[["101", "102"]].isna().all()
    (tmp_path / "subjects.csv").write_text("")
    with pytest.raises(ValueError, match="subjects.csv cannot be read .No columns"):
        read_index(root)


@pytest.mark.parametrize("word", ["NA", "nan", "Unknown", "-", "n/a", "?", "NULL", "", "#N/A", "<NA>", "TBD", "-999"])
def test_a_word_that_means_missing_is_no_patient(tmp_path, word):
    root = write_set(tmp_path)
    table = pd.read_csv(tmp_path / "subjects.csv", dtype=str)
    table.loc[table.scan.isin(["100", "200"]), "subject"] = word
    table.to_csv(tmp_path / "subjects.csv", index=False)
    index = read_index(root).drop_duplicates("scan").set_index("scan")
    assert index.subject[["100", "200"]].isna().all() and index.group["100"] != index.group["200"]
    assert any(line.startswith("NOT CHECKED: 2 of 18 scans have no known subject, first 100") for line in audit(root))


def test_one_id_with_scans_of_both_classes_is_suspicious(tmp_path):
    root = write_set(tmp_path, SCANS | {"100": ("train", "AD", "x"), "200": ("train", "NC", "x")})
    (line,) = [line for line in audit(root) if line.startswith("SUSPICIOUS")]
    assert "subjects with scans of both classes: 1, first x" in line
    run = train_steps(root, tmp_path / "run", "--epochs", "1")
    assert line in (run / "training_log.txt").read_text()


@pytest.mark.parametrize("change", [lambda scan: f"{scan}.0", lambda scan: f"0{scan}", lambda scan: f"I{scan}",
                                    lambda scan: f"{scan}_70.jpeg"])  # fmt: skip
def test_a_table_that_knows_none_of_the_scans_is_an_error_with_an_id_of_each_side(tmp_path, change):
    root = write_set(tmp_path)
    table = pd.read_csv(tmp_path / "subjects.csv", dtype=str)
    table.assign(scan=table.scan.map(change)).to_csv(tmp_path / "subjects.csv", index=False)
    with pytest.raises(InputError, match=f"none of those in the folder: the ids are such as {change('100')}, the "
                                         "folder's such as 100 "):  # fmt: skip
        read_index(root)


@pytest.mark.parametrize("change, encoding", [
    (lambda text: text.replace(",", ";"), "utf-8"), (lambda text: text.replace(",", "\t"), "utf-16"),
    (lambda text: text.replace("scan,subject", "Scan , SUBJECT"), "utf-8-sig"),
    (lambda text: text.replace("\n", ",Jörg\n"), "cp1252"),  # in a column that nobody asks for
    (str, "utf-16-le"), (str, "utf-16-be"),  # without a mark of the order
])  # fmt: skip
def test_tables_of_spreadsheets_are_read(tmp_path, change, encoding):
    root = write_set(tmp_path)
    expected, path = read_index(root), tmp_path / "subjects.csv"
    path.write_bytes(change(path.read_text()).encode(encoding))
    assert read_index(root).equals(expected)
    path.rename(tmp_path / "Subjects.CSV")
    assert read_index(root).equals(expected)


@pytest.mark.parametrize("text, said", [
    ("scan,subject,subject\n100,a,b\n", "has the columns scan, subject, subject; expected .*, and none twice"),
    ("scan,Subject ,subject\n100,a,b\n", "none twice"), ("PK\3\4\0\0", "it is a workbook; save it as CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "it is a workbook; save it as CSV"), ("a" * 9999, "columns a{200}; expected"),
])  # fmt: skip
def test_a_table_with_a_column_twice_and_a_workbook_are_refused(tmp_path, text, said):
    root = write_set(tmp_path)
    (tmp_path / "subjects.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        read_index(root)


def test_the_audit_writes_no_control_characters(tmp_path):
    root = write_set(tmp_path, subjects=False, slices=[70])
    for path in (root / "test" / "AD").iterdir():
        path.rename(path.with_name(f"\x1b[31m5\r\n{path.name}"))
    said = command.run("dataset.py", root).stdout
    assert "\\x1b[31m5\\r\\n" in said and not set(said) & set("\x1b\r")


def test_a_table_is_found_beside_the_folder_that_was_named_and_in_what_an_archive_unpacks(tmp_path):
    root = write_set(tmp_path / "set" / "AD_NC")  # AD_NC/AD_NC
    table = (root.parent / "subjects.csv").rename(tmp_path / "set" / "subjects.csv")
    for named in (root.parent, root):
        assert read_index(named).subject.notna().all()
    table.rename(tmp_path / "subjects.csv")
    root.rename(tmp_path / "set" / "x")
    root.parent.rmdir()
    (tmp_path / "set" / "x").rename(tmp_path / "set" / "AD_NC")
    assert read_index(tmp_path / "set").subject.notna().all()  # beside what was named
    assert read_index(tmp_path / "set" / "AD_NC").subject.isna().all()


def test_a_table_in_a_folder_that_may_be_entered_and_not_listed_is_found(tmp_path, monkeypatch):
    root, genuine = write_set(tmp_path), os.listdir

    def refuse(folder="."):
        if Path(folder) == tmp_path:
            raise PermissionError(13, "Permission denied")
        return genuine(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert read_index(root).subject.notna().all()


def test_metadata_beside_the_target_of_a_link_and_behind_a_json_without_patients_are_found(tmp_path):
    root = write_set(tmp_path / "data")
    (tmp_path / "AD_NC").symlink_to(root)
    (tmp_path / "data" / "meta_data_with_label.json").write_text('{"100": {"label": 2}}')
    assert (read_index(tmp_path / "AD_NC").subject == read_index(root).subject).all()
    assert read_index(root).subject.notna().all()
    (tmp_path / "data" / "meta_data_with_label.json").write_text('{"100": {"label": 0}}')
    with pytest.raises(InputError, match="in folder AD, but meta_data_with_label.json says NC"):  # not the other table
        read_index(root)


# ---------------------------------------------------------------- audit


def test_audit_counts_and_finds_the_subjects_that_train_and_test_share(tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    text = "\n".join(audit(write_set(tmp_path, scans)))
    assert "LEAK: 2 of the 6 test subjects are also in train" in text
    assert "test AD         15       3         3" in text
    assert "48 wide x 40 high (90 slices); 0 slices are in colour" in text
    assert "slices per scan: 5 (18 scans)" in text and "slice numbers: 70 to 74" in text


def test_window_vote_finds_a_shortcut_and_only_a_shortcut(tmp_path):
    tied = {scan: value for scan, value in SCANS.items()}
    root = tmp_path / "tied"
    for label, window in (("AD", range(67, 70)), ("NC", range(80, 83))):
        write_set(root, {k: v for k, v in tied.items() if v[1] == label}, window)
    index = read_index(root / "AD_NC")
    assert metrics.window_vote(index) == 1.0
    assert metrics.window_vote(index.assign(slice=0)) == 0.5


def test_the_audit_command_prints_it_and_wrong_input_exits_with_2(ad_nc, tmp_path):
    done = command.run("dataset.py", ad_nc)
    assert done.returncode == 0 and "none of the 6 known test subjects is in train" in done.stdout
    done = command.run("dataset.py", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- batches


def numbered(n, shape=(1, 1)):
    """A SliceSet of n slices whose pixels, and rows, are their numbers."""
    images = np.tile(np.arange(n, dtype=np.uint8)[:, None, None], (1, *shape))
    return SliceSet(pd.DataFrame({"row": range(n), "label": ["AD" if i % 2 else "NC" for i in range(n)]}), images)


def test_a_loader_visits_every_slice_once_an_epoch_with_its_label():
    ten = numbered(10)
    shuffled = list(make_loader(ten, 4, generator=torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in shuffled] == [4, 4, 2] and shuffled[0][0].shape == (4, 1, 1, 1)
    pixels, labels = (torch.cat(part) for part in zip(*shuffled))
    assert sorted(pixels.flatten().tolist()) == list(range(10)) != pixels.flatten().tolist()
    assert torch.equal(labels, pixels.flatten().long() % 2)
    some = SliceSet(ten.index.iloc[[7, 2]], ten.images)
    (part,) = make_loader(some, 4)  # rows of a larger array
    assert part[0].flatten().tolist() == [7, 2] and part[1].tolist() == [1, 0]


def test_a_set_on_the_device_gives_the_same_batches():
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 4), dtype=np.uint8)
    here = dataset._InMemory(images, np.arange(2500)[::-1], np.arange(2500))
    there = dataset._OnDevice(here, torch.device("cpu"))
    assert len(here) == len(there) == 2500
    for a, b in zip(here[[5, 2001, 3]], there[[5, 2001, 3]]):
        assert torch.equal(a, b) and a.dtype == b.dtype


# ---------------------------------------------------------------- real slices


def test_oasis_is_what_its_readme_says(oasis):
    index = read_index(oasis)
    counts = index.groupby(["split", "label"]).agg(slices=("path", "size"), subjects=("subject", "nunique"))
    assert counts.slices.to_dict() == {("test", "AD"): 640, ("test", "NC"): 448, ("train", "AD"): 1856,
                                       ("train", "NC"): 1408}  # fmt: skip
    assert counts.subjects.tolist() == [20, 14, 58, 44]
    assert subjects.shared_subjects(index) == []
    assert slices.common_size(index.path[:10]) == (208, 176)
