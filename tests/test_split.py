"""Who is in train, val and test: never one subject, scan or pixel copy on two sides."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import SCANS, SMALL, train_steps, without_report, write_set

import dataset
from adnc.scoring import metrics
from adnc.data import subjects
import train
from utils import load_checkpoint
from dataset import read_index, split_index
from adnc.data.subjects import assign_groups, fold_index
from adnc.cli import InputError


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
    # Six groups hold against the prior, not seven scans.
    assert calibration["temperature"] == by_group != by_scan
    sets, rows = metrics.score_sets(table, 0.9), metrics.aggregate(table, "scan")
    # Of the two that are one brain: drawn together or not.
    unsure = (rows.prediction_set == "AD|NC").to_numpy(float)
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
    # In any order.
    assert subjects.split_hash(load(table.sample(frac=1, random_state=0)).index) == first
    # By hand, two columns do.
    assert subjects.split_hash(load(table[["path", "split"]]).index) == first
    assert f"{tmp_path / 'mine.csv'} says who is in val; --val-fraction is not used" in load(table).passed
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
        "in the file: /x/test/AD/300_70.jpeg": table.assign(path="/x/" + table.path),
        "no slices are left for test": table.assign(split=table.split.replace("test", "train")),
        "has 1 scans in both test and train or val, first 300": table.assign(
            split=table.split.mask(table.path == "test/AD/300_70.jpeg", "train")),
        "no AD or NC is left for val; .*mine.csv needs both": table.assign(split=table.split.replace("val", "train")),
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


# ---------------------------------------------------------------- fewer subjects


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
