import json
import shutil

import command
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCANS, SMALL, train_steps, without_report, write_set, write_slice
from PIL import Image

import dataset
import metrics
import slices
import subjects
import train
from checkpoint import load_checkpoint
from dataset import SliceSet, make_loader, read_index, split_index
from subjects import assign_groups, fold_index
from utils import InputError

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
    with pytest.raises(ValueError, match="is not a JSON object of scans"):
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


@pytest.mark.parametrize("word", ["NA", "nan", "Unknown", "-", "n/a", "?", "NULL", ""])
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
])  # fmt: skip
def test_tables_of_spreadsheets_are_read(tmp_path, change, encoding):
    root = write_set(tmp_path)
    expected, path = read_index(root), tmp_path / "subjects.csv"
    path.write_bytes(change(path.read_text()).encode(encoding))
    assert read_index(root).equals(expected)


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


# ---------------------------------------------------------------- split


def fake_index(subjects):
    """An index without files, of (subject, label, scans) with four slices a scan; a subject of None is unknown."""
    rows = []
    for i, (subject, label, scans) in enumerate(subjects):
        for scan in range(scans):
            rows += [(f"/x/{label}/{i}s{scan}_{n}.jpeg", label, f"{i}s{scan}", n, subject, "train") for n in range(4)]
    index = pd.DataFrame(rows, columns=["path", "label", "scan", "slice", "subject", "split"])
    return assign_groups(index.astype({"subject": "string"}).assign(pixel_hash=""))


ODD = {
    "usual": [(f"s{i}", "AD" if i % 2 else "NC", 1 + i % 8) for i in range(40)],
    "one subject": [("s", "AD", 3)],
    "one class": [(f"s{i}", "NC", 2) for i in range(12)],
    "no metadata": [(None, "AD" if i % 2 else "NC", 2) for i in range(20)],
    "some metadata": [(f"s{i}" if i % 3 else None, "AD" if i % 2 else "NC", 2) for i in range(20)],
    "one giant": [("giant", "AD", 60)] + [(f"s{i}", "AD" if i % 2 else "NC", 1) for i in range(10)],
    "a converter": [("both", "AD", 2), ("both", "NC", 2)] + [(f"s{i}", "AD" if i % 2 else "NC", 1) for i in range(10)],
    "two subjects": [("s0", "AD", 1), ("s1", "NC", 1)],
    "empty": [],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("seed", range(5))
def test_train_and_val_share_no_subject_and_no_scan_whatever_comes_in(odd, seed):
    index = fake_index(ODD[odd])
    split = split_index(index, 0.3, seed=seed)
    assert len(split) == len(index) and set(split.split) <= {"train", "val"}
    train, val = split[split.split == "train"], split[split.split == "val"]
    assert not set(train.subject.dropna()) & set(val.subject.dropna())
    assert not set(train.scan) & set(val.scan)


def test_the_split_is_stratified_and_near_the_fraction():
    split = split_index(fake_index(ODD["usual"]), 0.25)
    share = (split.split == "val").groupby(split.label).mean()
    assert share.between(0.15, 0.35).all()


def test_the_split_depends_on_the_seed_alone():
    index = fake_index(ODD["usual"])
    assert split_index(index, seed=3).equals(split_index(index, seed=3))
    assert not split_index(index, seed=3).equals(split_index(index, seed=4))


def test_the_split_does_not_depend_on_the_order_of_rows():
    index = fake_index(ODD["usual"])
    a, b = split_index(index), split_index(index.iloc[::-1])
    assert a.sort_values("path").split.tolist() == b.sort_values("path").split.tolist()


def test_the_test_set_is_never_split(ad_nc):
    index = read_index(ad_nc)
    for by in ("subject", "slice"):
        split = split_index(index, 0.3, by)
        assert ((split.split == "test") == (index.split == "test")).all()


def test_a_split_by_slice_leaks_and_the_check_would_catch_it():
    leaky = split_index(fake_index(ODD["usual"]), 0.25, by="slice")
    assert set(leaky.scan[leaky.split == "val"]) & set(leaky.scan[leaky.split == "train"])
    with pytest.raises(RuntimeError, match="train and val share .* subjects"):
        subjects.check_disjoint(leaky)


def test_split_refuses_what_it_cannot_do():
    index = fake_index(ODD["usual"])
    with pytest.raises(ValueError, match="validation fraction is 1.5"):
        split_index(index, 1.5)
    with pytest.raises(ValueError, match="split by 'patient' is not known"):
        split_index(index, by="patient")


def test_folds_hold_out_every_slice_once_and_no_subject_twice():
    index = fake_index(ODD["usual"])
    parts = [fold_index(index, k, 4) for k in range(4)]
    held_out = [part[part.split == "test"] for part in parts]
    assert sorted(pd.concat(held_out).path) == sorted(index.path)
    for part in parts:
        assert not set(part.subject[part.split == "test"]) & set(part.subject[part.split == "train"])
    with pytest.raises(ValueError, match="fold 4 of 4 does not exist"):
        fold_index(index, 4, 4)
    with pytest.raises(ValueError, match="the smaller class has"):
        fold_index(index, 0, 30)


def test_folds_never_touch_the_official_test_set(ad_nc):
    index = read_index(ad_nc)
    assert set(fold_index(index, 0, 3).scan) == set(index.scan[index.split == "train"])


def test_with_pool_test_each_subject_of_train_and_test_is_held_out_once(ad_nc):
    words = ["--data", str(ad_nc), "--folds", "3", "--val-fraction", "0.2", "--pool-test", "--fold"]
    folds = [dataset.load_set(train.parse_args([*words, str(k)]), ad_nc, bar=None).index for k in range(3)]
    held_out = [scan for fold in folds for scan in fold.scan[fold.split == "test"].unique()]
    assert sorted(held_out) == sorted(read_index(ad_nc).scan.unique())


def test_the_hash_tells_splits_apart(ad_nc):
    index = read_index(ad_nc)
    a, b = split_index(index, 0.3, seed=0), split_index(index, 0.3, seed=1)
    assert subjects.split_hash(a) == subjects.split_hash(a.iloc[::-1]) != subjects.split_hash(b)


# ---------------------------------------------------------------- one group everywhere


@pytest.mark.parametrize("known", [True, False])
def test_a_scan_under_two_ids_is_one_group_for_split_folds_intervals_calibration_and_sets(tmp_path, known):
    scans = SCANS | {"901": ("train", "AD", "x1"), "902": ("test", "NC", "x2")}
    root = write_set(tmp_path, {scan: value for scan, value in scans.items() if scan < "900"}, subjects=False)
    for copy, scan in (("901", "100"), ("902", "400")):
        for path in sorted(root.rglob(f"{scan}_*.jpeg")):
            shutil.copy(path, path.with_name(path.name.replace(scan, copy)))
    if known:
        rows = [f"{scan},{subject}" for scan, (_, _, subject) in scans.items()]
        (tmp_path / "subjects.csv").write_text("\n".join(["scan,subject", *rows]))
    flags = [*SMALL, "--data", str(root)]
    both = {"100", "901"}
    for seed in range(8):
        index = dataset.load_set(train.parse_args([*flags, "--seed", str(seed)]), root, bar=None).index
        assert index[index.scan.isin(both)].group.nunique() == index[index.scan.isin(both)].split.nunique() == 1
        words = [*flags, "--seed", str(seed), "--folds", "3", "--fold"]
        folds = [dataset.load_set(train.parse_args([*words, str(k)]), root, bar=None).index for k in range(3)]
        assert [both & set(fold.scan[fold.split == "test"]) for fold in folds].count(both) == 1
    test = index[index.split == "test"]  # seven scans of six groups
    assert (test.scan.nunique(), test.group.nunique()) == (7, 6)
    p = np.where(test.label == "AD", 0.9, 0.2)
    table = test.assign(p_AD=p, logit=np.log(p / (1 - p)), threshold=0.5, exposure="no", out_of_range=None)
    table = table.assign(prediction_set=table.label.mask(test.scan.isin({"400", "902"}), "AD|NC"))
    samples = metrics.bootstrap_scores(table)
    assert [samples[unit].groups for unit in ("slice", "scan")] == [6, 6]
    calibration = metrics.calibrate(table)
    assert calibration["groups"] == 6 and sum(calibration["weights"]) == pytest.approx(6)
    assert sorted(calibration["weights"])[:2] == [0.5, 0.5]  # the two that are one brain
    z, y = table.logit.to_numpy(), (table.label == "AD").to_numpy()
    by_group, by_scan = (metrics.fit_temperature(z, y, table[name]) for name in ("group", "scan"))
    assert calibration["temperature"] == by_group != by_scan  # six groups hold against the prior, not seven scans
    sets, rows = metrics.score_sets(table, 0.9), metrics.aggregate(table, "scan")
    unsure = (rows.prediction_set == "AD|NC").to_numpy(float)  # of the two that are one brain: drawn together or not
    by_group, by_scan = (metrics.interval(draws.total(unsure) / draws.total(np.ones(7)))
                         for draws in map(metrics.Bootstrap, (rows.group, rows.scan)))  # fmt: skip
    assert sets["n"] == 7 and sets["uncertain"] == pytest.approx(2 / 7)
    assert sets["ci95"]["uncertain"] == by_group != by_scan


# ---------------------------------------------------------------- a split that is given


@pytest.fixture
def given(ad_nc, tmp_path):
    """The split.csv of a run, as a table, and a function that loads the set with a changed one."""
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--seed", "3")

    def load(table):
        table.to_csv(tmp_path / "mine.csv", index=False)
        return dataset.load_set(train.parse_args([*SMALL, "--split", str(tmp_path / "mine.csv")]), ad_nc, bar=None)

    return run, pd.read_csv(run / "split.csv", dtype=str), load


def test_the_split_csv_of_a_run_gives_its_split_again(ad_nc, tmp_path, given):
    run, table, load = given
    first = load_checkpoint(run / "last.pth")["split_hash"]
    assert subjects.split_hash(load(table.sample(frac=1, random_state=0)).index) == first  # in any order
    assert subjects.split_hash(load(table[["path", "split"]]).index) == first  # by hand, two columns do
    other = train_steps(ad_nc, tmp_path / "other", "--epochs", "1", "--seed", "4", "--split", str(run / "split.csv"))
    assert load_checkpoint(other / "last.pth")["split_hash"] == first
    shutil.rmtree(run)  # the run keeps its own split.csv
    with without_report():
        train.main(train.parse_args(["--out", str(other), "--resume", "--epochs", "2"]))
    assert load_checkpoint(other / "last.pth")["epoch"] == 2


def test_a_split_that_leaks_or_does_not_fit_is_refused_in_a_sentence(given, tmp_path):
    _, table, load = given
    train_rows = table.index[table.split == "train"]
    changed = {
        "groups in both train and val": table.assign(split=table.split.mask(table.index == train_rows[0], "val")),
        "1 of the slices under .* are not in it, first test/AD/300_70.jpeg": table.iloc[1:],
        "1 of its slices are not under .*first train/AD/9_9.jpeg": pd.concat(
            [table, table.iloc[-1:].assign(path="train/AD/9_9.jpeg")]),
        "first test/AD/300_70.jpeg with split valid": table.assign(split=table.split.mask(table.index == 0, "valid")),
        "90 rows, first test/AD/300_70.jpeg with split test, are not usable": pd.concat([table, table]),
        "has the columns file, split; expected": table[["path", "split"]].rename(columns={"path": "file"}),
        "cannot be read .No columns": pd.DataFrame(),
    }  # fmt: skip
    for sentence, wrong in changed.items():
        with pytest.raises(InputError, match=sentence):
            load(wrong)
    with pytest.raises(InputError, match="nowhere.csv cannot be read"):
        subjects.read_split(table, tmp_path / "nowhere.csv", tmp_path)


@pytest.mark.parametrize("change, form", [
    (lambda table: table.rename(columns=str.upper), dict(sep=";")),
    (lambda table: table.assign(split=table.split.str.upper(), path="./" + table.path), dict(sep="\t")),
    (lambda table: table.assign(path=" " + table.path + " ", split=table.split + " "), dict(encoding="utf-16")),
])  # fmt: skip
def test_a_split_may_come_from_a_spreadsheet(ad_nc, given, tmp_path, change, form):
    run, table, _ = given
    change(table[["path", "split"]]).to_csv(tmp_path / "mine.csv", index=False, **form)
    index = subjects.read_split(read_index(ad_nc), tmp_path / "mine.csv", ad_nc)
    assert subjects.split_hash(index) == load_checkpoint(run / "last.pth")["split_hash"]


def test_a_given_split_does_not_go_with_flags_that_split(capsys):
    for words in (["--fold", "0", "--folds", "3"], ["--drop-test-subjects"], ["--split-by", "slice"]):
        with pytest.raises(SystemExit):
            train.parse_args(["--split", "x.csv", *words])
        assert "--split names every slice's part; leave out" in capsys.readouterr().err


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


def test_fewer_subjects_are_among_more_with_the_shares_of_the_classes(tmp_path):
    scans = {str(100 + i): ("train", "AD" if i % 3 == 0 else "NC", f"s{i}") for i in range(30)}
    index = read_index(write_set(tmp_path, scans | {"900": ("test", "AD", "t0"), "901": ("test", "NC", "t1")}, [70]))
    before = set()
    for n in (3, 6, 15, 30):
        taken = subjects.take_subjects(index, n, seed=3)
        train = taken[taken.split == "train"]
        now = set(train.subject)
        assert len(now) == n and before <= now and (train.label == "AD").sum() == n // 3
        assert (taken.split == "test").sum() == 2  # which stays whole
        before = now
    assert before != set(subjects.take_subjects(index, 15, seed=4).subject)
    with pytest.raises(InputError, match="--subjects is 31, but train/ has 30"):
        subjects.take_subjects(index, 31)
