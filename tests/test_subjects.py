"""Groups, splits and folds: a subject, a scan or a copy of a slice is never on two sides."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SCANS, write_set, write_slice

import dataset
from adnc.data import subjects
from adnc.data.index import list_inputs, read_index
from adnc.data.subjects import assign_groups, fold_index, read_split, split_hash, split_index
from adnc.errors import InputError
from adnc.scoring import calibration, metrics


def fake_index(scans):
    """An index without files, of (subject or None, label, number of scans), four slices a scan."""
    rows = []
    for i, (subject, label, n_scans) in enumerate(scans):
        for j in range(n_scans):
            scan = f"{i}s{j}"
            for n in range(4):
                path = f"/x/train/{label}/{scan}_{n}.jpeg"
                rows.append((path, label, scan, n, subject, "train"))
    index = pd.DataFrame(rows, columns=["path", "label", "scan", "slice", "subject", "split"])
    return assign_groups(index.astype({"subject": "string"}).assign(pixel_hash=""))


def alternating(n, n_scans=1, subject="s{}"):
    """n subjects for `fake_index`, NC and AD in turn."""
    return [(subject.format(i), "AD" if i % 2 else "NC", n_scans) for i in range(n)]


USUAL = [(f"s{i}", "AD" if i % 2 else "NC", 1 + i % 8) for i in range(40)]
ODD = {
    "usual": USUAL,
    "one subject": [("s", "AD", 3)],
    "one class": [(f"s{i}", "NC", 2) for i in range(12)],
    "no metadata": [(None, "AD" if i % 2 else "NC", 2) for i in range(20)],
    "some metadata": [(f"s{i}" if i % 3 else None, "AD" if i % 2 else "NC", 2) for i in range(20)],
    "one subject with most scans": [("giant", "AD", 60), *alternating(10)],
    "a converter": [("both", "AD", 2), ("both", "NC", 2), *alternating(10)],
    "two subjects": alternating(2),
    "empty": [],
}


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("seed", range(5))
def test_train_and_val_share_no_subject_and_no_scan(name, seed):
    index = fake_index(ODD[name])
    split = split_index(index, 0.3, seed=seed)
    assert len(split) == len(index) and set(split.split) <= {"train", "val"}
    train, val = split[split.split == "train"], split[split.split == "val"]
    assert not set(train.subject.dropna()) & set(val.subject.dropna())
    assert not set(train.scan) & set(val.scan)


def test_the_split_is_stratified_and_near_the_fraction():
    split = split_index(fake_index(USUAL), 0.25)
    share = (split.split == "val").groupby(split.label).mean()
    assert share.between(0.15, 0.35).all()


def test_each_class_of_two_groups_or_more_has_one_on_each_side():
    for fraction in (0.01, 0.99):
        split = split_index(fake_index(alternating(4)), fraction)
        assert split.groupby("label").split.nunique().tolist() == [2, 2]
    split = split_index(fake_index([("s0", "AD", 1), *alternating(4, subject="t{}")[::2]]), 0.3)
    assert (split.split[split.label == "AD"] == "train").all()


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    index = fake_index(USUAL)
    assert split_index(index, seed=3).equals(split_index(index, seed=3))
    assert not split_index(index, seed=3).equals(split_index(index, seed=4))
    reverse = split_index(index.iloc[::-1], seed=3).sort_index()
    assert reverse.equals(split_index(index, seed=3))


def test_the_split_of_a_seed_is_the_same_in_every_version():
    split = split_index(fake_index(USUAL), seed=0)
    assert sorted(split.group[split.split == "val"].unique()) == ["s17", "s21", "s28", "s9"]
    assert split_hash(split) == "c5c64ae3aa1e0c8b"


def test_the_test_set_is_never_split(ad_nc):
    index = read_index(ad_nc)
    for by in ("subject", "slice"):
        split = split_index(index, 0.3, by)
        assert ((split.split == "test") == (index.split == "test")).all()


def test_a_split_by_slice_leaks_and_the_check_finds_it():
    leaky = split_index(fake_index(USUAL), 0.25, by="slice")
    assert set(leaky.scan[leaky.split == "val"]) & set(leaky.scan[leaky.split == "train"])
    with pytest.raises(RuntimeError, match="train and val share .* subjects"):
        subjects.check_disjoint(leaky)


@pytest.mark.parametrize("column", ["subject", "scan", "group"])
def test_a_shared_subject_scan_or_group_is_found_each_by_itself(column):
    table = pd.DataFrame({"split": ["train", "train", "val", "test"]})
    for name in ("subject", "scan", "group"):
        table[name] = ["a", "b", "c", "a"]
    subjects.check_disjoint(table)
    table.loc[2, column] = "b"
    with pytest.raises(RuntimeError, match=f"train and val share 1 {column}s, first b"):
        subjects.check_disjoint(table)


def test_a_fraction_or_unit_that_does_not_exist_is_refused():
    index = fake_index(USUAL)
    with pytest.raises(InputError, match="validation fraction is 1.5"):
        split_index(index, 1.5)
    with pytest.raises(InputError, match="there is no split by 'patient'"):
        split_index(index, by="patient")


def test_the_hash_depends_on_the_split_and_not_on_the_order(ad_nc):
    index = read_index(ad_nc)
    one, other = split_index(index, 0.3, seed=0), split_index(index, 0.3, seed=1)
    assert split_hash(one) == split_hash(one.iloc[::-1]) != split_hash(other)


def test_scans_without_a_subject_are_reported():
    index = split_index(fake_index(ODD["some metadata"]), 0.3)
    sizes, *lines = subjects.describe_split(index, "subject")
    parts = [part.split()[0] for part in sizes.split("; ")]
    assert parts == ["train", "val", "test"]
    assert "14 scans have no known subject: they are split by scan" in "\n".join(lines)


# ---------------------------------------------------------------- folds


def test_folds_hold_out_every_slice_once_and_every_subject_in_one_fold():
    index = fake_index(USUAL)
    parts = [fold_index(index, k, 4) for k in range(4)]
    held_out = [part[part.split == "test"] for part in parts]
    assert sorted(pd.concat(held_out).path) == sorted(index.path)
    for part in parts:
        test, train = part[part.split == "test"], part[part.split == "train"]
        assert not set(test.subject) & set(train.subject)


def test_a_fold_that_cannot_be_made_is_refused():
    index = fake_index(USUAL)
    with pytest.raises(InputError, match="there is no fold 4 of 4"):
        fold_index(index, 4, 4)
    with pytest.raises(InputError, match="30 folds need 30 groups .* the smaller class has 20"):
        fold_index(index, 0, 30)


def test_folds_leave_out_the_official_test_set(ad_nc):
    index = read_index(ad_nc)
    assert set(fold_index(index, 0, 3).scan) == set(index.scan[index.split == "train"])


def test_with_pool_test_each_scan_of_train_and_test_is_held_out_once(ad_nc):
    held_out = []
    for fold in range(3):
        slices = dataset.load_set(
            ad_nc, val_fraction=0.2, fold=fold, folds=3, pool_test=True, progress=None
        )
        held_out += slices.part("test").index.scan.unique().tolist()
    assert sorted(held_out) == sorted(SCANS)


# ---------------------------------------------------------------- groups


def test_groups_that_share_a_slice_are_one_also_through_a_third():
    table = pd.DataFrame({"scan": list("abcdef"), "path": list("abcdef")})
    table["subject"] = pd.array(["s1", "s2", None, "s3", "s1", None], "string")
    table["pixel_hash"] = ["x", "x", "y", "y", "y", ""]
    # a and b share x; c, d and e share y; the subject of a and e connects the two.
    assert assign_groups(table).group.tolist() == ["s1", "s1", "s1", "s1", "s1", "scan f"]


@pytest.fixture(params=[True, False], ids=["known subjects", "unknown subjects"])
def copied(request, tmp_path):
    """A set in which scan 901 is a copy of 100, and 902 one of 400, under other subjects."""
    root = write_set(tmp_path, subjects=False)
    for copy, scan in (("901", "100"), ("902", "400")):
        for path in sorted(root.rglob(f"{scan}_*.jpeg")):
            shutil.copy(path, path.with_name(path.name.replace(scan, copy)))
    if request.param:
        rows = [f"{scan},{subject}" for scan, (_, _, subject) in SCANS.items()]
        (tmp_path / "subjects.csv").write_text("\n".join(["scan,subject", *rows, "901,x", "902,y"]))
    return root


def test_copies_of_a_scan_are_one_group_for_split_and_folds(copied):
    both = {"100", "901"}
    for seed in range(8):
        index = dataset.load_set(copied, val_fraction=0.25, seed=seed, progress=None).index
        part = index[index.scan.isin(both)]
        assert part.group.nunique() == part.split.nunique() == 1
    in_fold = []
    for fold in range(3):
        index = dataset.load_set(copied, val_fraction=0.25, fold=fold, folds=3, progress=None).index
        in_fold.append(both & set(index.scan[index.split == "test"]))
    assert in_fold.count(both) == 1 and in_fold.count(set()) == 2


def test_copies_of_a_scan_are_one_group_for_intervals_calibration_and_sets(copied):
    index = dataset.load_set(copied, val_fraction=0.25, progress=None).index
    test = index[index.split == "test"]
    assert (test.scan.nunique(), test.group.nunique()) == (7, 6)
    p = np.where(test.label == "AD", 0.9, 0.2)
    table = test.assign(p_AD=p, logit=np.log(p / (1 - p)), threshold=0.5, exposure="no")
    sets = table.label.mask(test.scan.isin(["400", "902"]), "AD|NC")
    table = table.assign(out_of_range=None, prediction_set=sets, dark_share=np.nan)

    samples = metrics.bootstrap_scores(table)
    assert samples["slice"].groups == samples["scan"].groups == 6

    fitted = calibration.calibrate(table)
    assert fitted["groups"] == 6 and sum(fitted["weights"]) == pytest.approx(6)
    assert sorted(fitted["weights"])[:3] == [0.5, 0.5, 1]  # the copies count half each
    z, y = table.logit.to_numpy(), (table.label == "AD").to_numpy()
    assert fitted["temperature"] == calibration.fit_temperature(z, y, table.group)
    assert fitted["temperature"] != calibration.fit_temperature(z, y, table.scan)

    scans = metrics.aggregate(table, "scan")
    uncertain = (scans.prediction_set == "AD|NC").to_numpy(float)
    intervals = {}
    for unit in ("group", "scan"):
        draws = metrics.Bootstrap(scans[unit])
        intervals[unit] = metrics.interval(draws.total(uncertain) / draws.total(np.ones(7)))
    scored = calibration.score_sets(table, 0.9)
    assert scored["n"] == 7 and scored["uncertain"] == pytest.approx(2 / 7)
    assert scored["ci95"]["uncertain"] == intervals["group"] != intervals["scan"]


# ---------------------------------------------------------------- a split from a file


@pytest.fixture
def given(ad_nc, tmp_path):
    """The split.csv of a split, as a table, and a function that reads a changed one."""
    index = split_index(read_index(ad_nc), 0.25, seed=3)
    paths = index.path.str.removeprefix(f"{ad_nc}/")
    table = index.assign(path=paths).astype(str)

    def read(table, **options):
        table.to_csv(tmp_path / "mine.csv", index=False, **options)
        return read_split(read_index(ad_nc), tmp_path / "mine.csv", ad_nc)

    return index, table, read


def test_a_split_file_gives_its_split_in_any_order_and_by_two_columns(given):
    index, table, read = given
    assert read(table.sample(frac=1, random_state=0)).split.equals(index.split)
    assert split_hash(read(table[["path", "split"]])) == split_hash(index)


@pytest.mark.parametrize("change, options", [
    (lambda table: table.rename(columns=str.upper), dict(sep=";")),
    (lambda table: table.assign(split=table.split.str.upper(), path="./" + table.path),
     dict(sep="\t")),
    (lambda table: table.assign(path=" " + table.path + " ", split=table.split + " "),
     dict(encoding="utf-8-sig")),
])  # fmt: skip
def test_a_split_may_come_from_a_spreadsheet(given, change, options):
    index, table, read = given
    assert split_hash(read(change(table[["path", "split"]]), **options)) == split_hash(index)


def move(table, path, split):
    """The table with another split for one path."""
    return table.assign(split=table.split.mask(table.path == path, split))


TEST_PATH = "test/AD/300_70.jpeg"
WRONG_SPLITS = {
    "1 groups in both train and val, first ":
        lambda table: move(table, table.path[table.split == "train"].iloc[0], "val"),
    "1 of the slices under .* are not in it, first test/AD/300_70.jpeg":
        lambda table: table[table.path != TEST_PATH],
    "1 of its slices are not under .*first train/AD/9_9.jpeg":
        lambda table: pd.concat([table, table.iloc[-1:].assign(path="train/AD/9_9.jpeg")]),
    "first test/AD/300_70.jpeg with split valid": lambda table: move(table, TEST_PATH, "valid"),
    "90 rows, first test/AD/300_70.jpeg with split test, are not usable":
        lambda table: pd.concat([table, table]),
    "90 of the slices .*, by paths such as test/AD/300_70.jpeg":
        lambda table: table.assign(path="/x/" + table.path),
    "1 scans in both test and train or val, first 300":
        lambda table: move(table, TEST_PATH, "train"),
    "has the columns file, split; expected":
        lambda table: table[["path", "split"]].rename(columns={"path": "file"}),
    "cannot be read": lambda table: pd.DataFrame(),
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG_SPLITS)
def test_a_split_file_that_leaks_or_does_not_fit_is_refused(given, sentence):
    _, table, read = given
    with pytest.raises(InputError, match=sentence):
        read(WRONG_SPLITS[sentence](table))


@pytest.mark.parametrize("split, sentence", [
    ("test", "test holds no slice"), ("val", "no AD or NC is left for val"),
])  # fmt: skip
def test_a_split_file_must_fill_train_val_and_test(ad_nc, given, tmp_path, split, sentence):
    _, table, _ = given
    table.assign(split=table.split.replace(split, "train")).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match=sentence):
        dataset.load_set(ad_nc, split_file=tmp_path / "a.csv", progress=None)


# ---------------------------------------------------------------- fewer subjects


def test_fewer_subjects_are_a_part_of_more_and_keep_the_share_of_the_classes():
    index = fake_index([(f"s{i}", "AD" if i % 3 == 0 else "NC", 1) for i in range(30)])
    test = fake_index(alternating(2, subject="t{}")).assign(split="test")
    index = pd.concat([index, test], ignore_index=True)
    before = set()
    for n in (3, 6, 15, 30):
        taken = subjects.take_subjects(index, n, seed=3)
        groups = taken[taken.split == "train"].groupby("group").label.first()
        assert len(groups) == n and (groups == "AD").sum() == n // 3
        assert before <= set(groups.index)
        assert (taken.split == "test").sum() == len(test)
        before = set(groups.index)
    fifteen = [set(subjects.take_subjects(index, 15, seed=seed).group) for seed in (3, 4)]
    assert fifteen[0] != fifteen[1]
    with pytest.raises(InputError, match="--subjects is 31, but train/ has 30"):
        subjects.take_subjects(index, 31)


# ---------------------------------------------------------------- exposure


def table_of(scans, subject, pixel_hash):
    table = pd.DataFrame({"path": scans, "scan": scans, "pixel_hash": pixel_hash})
    return assign_groups(table.assign(subject=pd.array(subject, "string")))


def test_a_row_is_seen_by_its_subject_its_scan_or_a_slice_of_its_group():
    train = table_of(["100", "101"], ["a", "b"], ["e", "f"])
    recorded = subjects.record_exposure(train)
    table = table_of(
        ["300", "101", "302", "303", "304", "305"],
        ["a", "x", "y", "z", "z", None],
        ["1", "2", "e", "3", "f", "4"],
    )
    exposure = subjects.find_exposure(table, recorded)
    assert exposure.tolist() == ["yes", "yes", "yes", "yes", "yes", "unknown"]
    assert subjects.find_exposure(table_of(["1"], ["A"], ["5"]), recorded).tolist() == ["no"]


def test_a_copy_of_a_test_scan_whose_subject_was_seen_is_seen_too():
    recorded = subjects.record_exposure(table_of(["100"], ["a"], ["e"]))
    table = table_of(["300", "301", "302"], ["a", "t9", "t8"], ["f", "f", "g"])
    assert subjects.find_exposure(table, recorded).tolist() == ["yes", "yes", "no"]


def test_exposure_is_unknown_if_a_subject_of_training_is_unknown():
    recorded = subjects.record_exposure(table_of(["100", "101"], ["a", None], ["e", "f"]))
    assert subjects.find_exposure(table_of(["1"], ["b"], ["g"]), recorded).tolist() == ["unknown"]


def test_a_name_in_two_folders_of_a_prediction_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one/AD", "one/NC", "two", "two2"):
        Path(folder).mkdir(parents=True)
    names = ["sub-1", "sub-1", "002_S_6795", "002_S_6795", "sub-2"]
    table = at(["one/a.png", "two/b.png", "one/c.png", "two/d.png", "two2/e.png"], names)
    (line,) = subjects.describe_shared_names(table, ["one", "two/"])
    assert line.startswith("subject sub-1 is in ") and "(names in several folders: 1)" in line
    assert list(subjects.describe_shared_names(table, ["one"])) == []
    both = at(["one/AD/a.png", "one/NC/b.png"], ["sub-1", "sub-1"])
    assert list(subjects.describe_shared_names(both, ["one/AD", "one/NC"])) == []

    scans = at(["one/1_70.png", "two/1_90.png", "two/2_70.png"], [None] * 3)
    (line,) = subjects.describe_shared_names(scans.assign(scan=["1", "1", "2"]), ["one", "two"])
    assert line.startswith("scan 1 is in ") and "counts as one scan" in line


def test_nobody_was_seen_among_drawings_unless_a_drawing_is_the_same():
    train = at(["/one/train/AD/a.png", "/one/train/NC/b.png"], ["drawn-0001", "drawn-0002"])
    drawn = subjects.record_exposure(train, drawn=True)
    table = at(["/two/x.png", "/two/y.png", "/two/z.png"], ["drawn-0001", "002_S_6795", None])
    assert subjects.find_exposure(table, drawn).tolist() == ["no", "no", "no"]
    assert list(subjects.describe_same_names(table, drawn)) == []
    copies = table.assign(pixel_hash=["a", "b", train.pixel_hash[0]])
    assert subjects.find_exposure(copies, drawn).tolist() == ["no", "no", "yes"]
    assert subjects.find_exposure(train, drawn).tolist() == ["yes", "yes"]
    people = subjects.record_exposure(table_of(["100"], ["a"], ["e"]))
    assert not subjects.merge_exposure(people, drawn)["drawn"]
    assert subjects.merge_exposure(drawn, drawn)["drawn"]


def test_two_records_of_exposure_are_merged():
    one = subjects.record_exposure(table_of(["100"], ["a"], ["e"]))
    other = subjects.record_exposure(table_of(["101", "102"], ["b", None], ["e", "f"]))
    merged = subjects.merge_exposure(one, other)
    expected = subjects.record_exposure(
        table_of(["100", "101", "102"], ["a", "b", None], ["e", "e", "f"])
    )
    assert merged == expected


def test_a_record_of_exposure_holds_no_id():
    recorded = subjects.record_exposure(table_of(["100"], ["002_S_0001"], ["e"]))
    assert "002_S_0001" not in str(recorded) and "'100'" not in str(recorded)


def at(paths, names):
    """A table of scans in files of other sets."""
    return table_of(names, names, [f"h{path}" for path in paths]).assign(path=paths)


def test_a_name_is_no_identity_in_another_set_unless_it_is_an_id_of_an_archive():
    train = at(["/one/train/AD/a.png", "/one/train/NC/b.png"], ["sub-1", "002_S_6795"])
    recorded = subjects.record_exposure(train)
    other = at(["/two/x.png", "/two/y.png", "/two/z.png"], ["sub-1", "002_S_6795", "sub-2"])
    assert subjects.find_exposure(other, recorded).tolist() == ["unknown", "yes", "no"]
    (line,) = subjects.describe_same_names(other, recorded)
    assert "1 scans have the name of a subject or scan in training, such as sub-1" in line
    same = at(["/one/test/AD/x.png"], ["sub-1"])
    assert subjects.find_exposure(same, recorded).tolist() == ["yes"]
    assert list(subjects.describe_same_names(same, recorded)) == []
    copies = other.assign(pixel_hash=train.pixel_hash.tolist() + ["c"])
    assert subjects.find_exposure(copies, recorded).tolist() == ["yes", "yes", "no"]


@pytest.mark.parametrize(("name", "expected"), [
    ("002_S_6795", "002_S_6795"), ("sub-ADNI002S6795", "002_S_6795"),
    ("sub-002S6795", "002_S_6795"), ("OAS1_0001", "OAS1_0001"), ("sub-OAS10001", "OAS1_0001"),
    ("OAS30001", "OAS30001"), ("sub-OAS30001", "OAS30001"), ("sub-1", None), ("6795", None),
])  # fmt: skip
def test_ids_of_archives_have_one_form(name, expected):
    assert subjects.archive_id(name) == expected


def test_two_spellings_of_an_archives_id_are_one_subject(tmp_path):
    for scan in ("sub-ADNI002S6795_ses-M00_T1w", "002_S_6795_scan2"):
        write_slice(tmp_path / f"{scan}_80.png", True, 0)
    index = list_inputs([tmp_path]).index
    assert index.subject.tolist() == ["002_S_6795", "002_S_6795"] and index.group.nunique() == 1


def test_few_subjects_in_validation_are_a_warning():
    few = [(f"a{i}", "AD", 1) for i in range(8)] + [(f"n{i}", "NC", 1) for i in range(8)]
    few = fake_index(few)
    few["split"] = np.where(few.subject.isin(["a0", "a1", "n0", "n1", "n2"]), "val", "train")
    (line,) = subjects.describe_validation(few)
    assert "only 2 AD, 3 NC subjects" in line and "--val-fraction" in line
    few["split"] = np.where(few.subject.str[1].astype(int) < 5, "val", "train")
    assert list(subjects.describe_validation(few)) == []
