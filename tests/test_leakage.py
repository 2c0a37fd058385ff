"""A phantom with planted leakage of every kind: it is refused, or the audit says so, or the titles do."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCANS, train_small, write_set, write_slice
from PIL import Image

from adnc.scoring import baselines
import dataset
from adnc import cpu_engine as inference
from adnc.data import index as listing
from adnc.phantom import draw as phantom
from adnc.data import pixels as slices
from adnc.data import subjects
from utils import load_checkpoint
from adnc.distributed import Runtime


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """A phantom without a subject in both train and test: those who are leave train. Returns its AD_NC."""
    root = phantom.draw(tmp_path_factory.mktemp("clean") / "ADNI", 14, seed=1, progress=False)
    index = dataset.read_index(root)
    for path in index.path[(index.split == "train") & index.subject.isin(subjects.shared_subjects(index))]:
        (root / path).unlink()
    return root


def audit_of(root):
    slices = dataset.decode_set(root, bar=None)
    assert not slices.bad, listing.describe_bad(slices.bad)
    return "\n".join(dataset.audit(slices))


@pytest.fixture
def planted(clean, tmp_path):
    """A copy to plant a leak in, its index, and who reads the audit: (root, index, audit)."""
    shutil.copytree(clean.parent, tmp_path / "ADNI")
    root = tmp_path / "ADNI" / "AD_NC"

    def audit():
        return audit_of(root)

    return root, dataset.read_index(root), audit


def test_the_clean_phantom_raises_no_alarm(planted):
    _, _, audit = planted
    assert "LEAK" not in audit() and "NOT CHECKED" not in audit()


def test_slices_of_a_test_scan_in_train_are_refused(planted):
    root, index, audit = planted
    for path in index.path[(index.split == "test") & (index.label == "AD")][:10]:
        shutil.move(path, root / "train" / "AD")
    with pytest.raises(ValueError, match="is in both train and test"):
        dataset.read_index(root)


def test_a_scan_of_both_classes_is_refused(planted):
    root, index, audit = planted
    shutil.copy(index.path[(index.split == "train") & (index.label == "AD")].iloc[0], root / "train" / "NC")
    with pytest.raises(ValueError, match="is in both classes"):
        dataset.read_index(root)


def test_another_session_of_a_test_subject_in_train_is_found(planted):
    root, index, audit = planted
    metadata = root.parent / "meta_data_with_label.json"
    entries = json.loads(metadata.read_text())
    test, train = (index[(index.split == split) & (index.label == "NC")].scan.iloc[0] for split in ("test", "train"))
    # The same name in the paths: another visit.
    metadata.write_text(json.dumps(entries | {train: entries[test]}))
    assert "LEAK: 1 of the" in audit() and "test subjects are also in train" in audit()


def plant_copy(root, index, scan, name, folder):
    """Copy the slices of a scan into another folder under another scan id, which no metadata knows."""
    for path in index.path[index.scan == scan]:
        shutil.copy(path, root / folder / f"{name}_{listing.parse_name(path)[1]}.jpeg")


def test_a_test_scan_copied_into_train_under_another_id_is_found(planted):
    root, index, audit = planted
    scan = index.scan[(index.split == "test") & (index.label == "AD")].iloc[0]
    plant_copy(root, index, scan, "copy", "train/AD")
    text = audit()
    assert "LEAK: slices of test are copies, pixel for pixel, of slices in train: 20 slices of 2 scans" in text
    index = dataset.decode_set(root, bar=None).index
    kept, left_out = subjects.drop_test_subjects(index)
    assert left_out == 1 and "copy" not in set(kept.scan)


def test_a_scan_copied_within_train_stays_on_one_side_of_every_split(planted):
    root, index, _ = planted
    for i, scan in enumerate(index.scan[index.split == "train"].unique()[:4]):
        plant_copy(root, index, scan, f"copy{i}", f"train/{index.label[index.scan == scan].iloc[0]}")
    index = dataset.read_index(root)
    naive = [dataset.split_index(index, 0.4, seed=seed) for seed in range(8)]
    index = dataset.decode_set(root, bar=None).index
    aware = [dataset.split_index(index, 0.4, seed=seed) for seed in range(8)]

    def parted(split):  # a scan on one side, its copy on the other
        return split.groupby(index.pixel_hash).split.nunique().max() > 1

    assert any(map(parted, naive)) and not any(map(parted, aware))
    with pytest.raises(RuntimeError, match="train and val share 1 groups"):
        one = aware[0].copy()
        one.loc[one.scan == "copy0", "split"] = "val" if (one.split[one.scan == "copy0"] == "train").all() else "train"
        subjects.check_disjoint(one.assign(subject=pd.array([None] * len(one), "string")))


def test_without_metadata_the_audit_says_what_it_could_not_check(planted):
    root, _, audit = planted
    (root.parent / "meta_data_with_label.json").unlink()
    assert "NOT CHECKED" in audit() and "none of the" not in audit()
    with pytest.raises(ValueError, match="test subjects cannot be dropped"):
        subjects.drop_test_subjects(dataset.read_index(root))


def test_black_slices_are_nobodys(tmp_path):
    """Slices at the edge of a volume are alike without being copies."""
    black = np.zeros((3, 8, 8), np.uint8)
    black[2, 0, 0] = 1
    assert slices.hash_slices(black)[:2] == ["", ""] and slices.hash_slices(black)[2] != ""
    root = write_set(tmp_path)
    for name in ("train/AD/100_70", "train/NC/200_71", "test/NC/400_70"):
        Image.new("L", (48, 40)).save(root / f"{name}.jpeg")
    text = audit_of(root)
    assert "LEAK" not in text and "pixel for pixel" not in text


# ---------------------------------------------------------------- what a run and a checkpoint make of it


def test_a_slice_seen_in_training_is_known_under_any_name(run_folder, ad_nc, tmp_path):
    shutil.copy(ad_nc / "train" / "AD" / "100_70.jpeg", tmp_path / "somebody_1.jpeg")
    write_slice(tmp_path / "other_1.jpeg", True, 5)
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    given = dataset.load_inputs(listing.list_inputs([tmp_path]), checkpoint, bar=None)
    table = inference.predict_slices(checkpoint, given, Runtime(torch.device("cpu")))
    assert table.set_index("scan").exposure.to_dict() == {"somebody": "yes", "other": "unknown"}


def test_a_copy_of_a_seen_scan_is_seen_whoever_it_is_called():
    """In test, a scan of a subject of train, and the same pictures under another scan and subject."""
    table = pd.DataFrame({"path": ["a", "b", "c"], "scan": ["300", "301", "302"], "pixel_hash": ["f", "f", "g"]})
    table["subject"] = pd.array(["a0", "t9", "t8"], "string")
    train = pd.DataFrame({"subject": pd.array(["a0"], "string"), "scan": ["100"], "pixel_hash": ["e"]})
    found = subjects.find_exposure(subjects.assign_groups(table), subjects.record_exposure(train))
    assert found.tolist() == ["yes", "yes", "no"]


def shared_set(root):
    """Scans 300 and 400 of test are of subjects who also have a scan in train."""
    return write_set(root, SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")})


def test_test_subjects_can_be_dropped_from_training(tmp_path):
    run = train_small(shared_set(tmp_path), tmp_path / "run", "--epochs", "1", "--drop-test-subjects")
    split = pd.read_csv(run / "split.csv", dtype=str)
    assert not {"a0", "n1"} & set(split.subject[split.split != "test"]) and (split.split == "test").sum() == 30
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert scores["title"] == "test" and scores["leaks"] == [] and "unseen_subjects" not in scores
    assert "left out of train: 2 scans of subjects who are also in test" in (run / "training_log.txt").read_text()


def test_tables_whose_train_and_test_share_subjects_say_so_and_the_others_are_apart(tmp_path):
    run = train_small(shared_set(tmp_path), tmp_path / "run", "--epochs", "1")
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert scores["leaks"] == ["2 of 6 scans are of subjects seen in training"]
    assert "LEAKY: 2 of 6" in scores["title"] and "LEAKY: 2 of 6" in (run / "training_log.txt").read_text()
    unseen = scores["unseen_subjects"]
    assert unseen["scan"]["n"] == 4 and unseen["baselines"]["logistic_regression"]["scan"]["n"] == 4


def test_a_transfer_from_a_model_that_knows_the_test_subjects_is_a_leak(ad_nc, tmp_path):
    """Train on subjects of the test set under other conditions, then start an honest run from those weights."""
    turned = tmp_path / "turned" / "AD_NC"
    shutil.copytree(ad_nc, turned)
    shutil.copy(ad_nc.parent / "subjects.csv", turned.parent)
    for one, other in (("train", "x"), ("test", "train"), ("x", "test")):
        (turned / one).rename(turned / other)
    first = train_small(turned, tmp_path / "first", "--epochs", "1")
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1", "--init", str(first / "best_model.pth"))
    log = (run / "training_log.txt").read_text()
    assert "LEAK BY TRANSFER: --init was trained on subjects of 6 of the 6 scans of test" in log
    assert "LEAKY: 6 of 6" in json.loads((run / "test" / "metrics.json").read_text())["title"]
    assert json.loads((run / "val" / "metrics.json").read_text())["leaks"] == []
    assert "LEAKY" not in json.loads((first / "test" / "metrics.json").read_text())["title"]

    torch.save(load_checkpoint(first / "best_model.pth")["weights"], tmp_path / "bare.pth")
    bare = train_small(ad_nc, tmp_path / "bare", "--epochs", "1", "--init", str(tmp_path / "bare.pth"))
    title = json.loads((bare / "test" / "metrics.json").read_text())["title"]
    assert title == "test; starts from bare.pth, which does not say on whom it was trained"


def learned(run):
    """All that best_model.pth has learned: weights, calibration, baselines, engine."""
    checkpoint = load_checkpoint(run / "best_model.pth")
    weights = {name: tensor.tolist() for name, tensor in checkpoint["weights"].items()}
    return [weights, checkpoint["calibration"], checkpoint["baselines"], checkpoint["epoch"]]


def test_the_test_set_influences_nothing(ad_nc, tmp_path):
    """With other pictures and swapped classes in test, all that is learned and chosen stays the same, to the bit."""
    flags = ["--epochs", "3", "--threshold", "youden"]
    runs = [train_small(ad_nc, tmp_path / "a", *flags)]
    other = write_set(tmp_path / "set")
    (other / "test").rename(other / "old")
    for i, path in enumerate(sorted((other / "old").rglob("*.jpeg"))):
        label = {"AD": "NC", "NC": "AD"}[path.parent.name]
        write_slice(other / "test" / label / path.name, i % 3 == 0, i)
    shutil.rmtree(other / "old")
    runs.append(train_small(other, tmp_path / "b", *flags))
    assert learned(runs[0]) == learned(runs[1])
    a, b = ((run / "test" / "predictions.csv").read_text() for run in runs)
    assert a != b


@pytest.fixture
def split_set(ad_nc):
    """The set as a SliceSet, with a validation part."""
    index = dataset.split_index(dataset.read_index(ad_nc), 0.25)
    images, _, _ = slices.load_slices(index.path.tolist(), (40, 48), bar=None)
    return dataset.SliceSet(index.assign(row=range(len(index))), images)


def test_baselines_are_fitted_on_train_alone_and_the_penalty_on_val(split_set):
    index, test = split_set.index, (split_set.index.split == "test").to_numpy()
    noise = split_set.images.copy()
    noise[test] = 255 - noise[test]
    swapped = index.assign(label=index.label.where(~test, index.label.map({"AD": "NC", "NC": "AD"})))
    fitted = baselines.fit_baselines(split_set)
    assert fitted == baselines.fit_baselines(dataset.SliceSet(swapped, noise))


def test_baselines_are_what_their_names_say(split_set):
    index, images = split_set.index, split_set.images
    # A window tied to the class.
    index["slice"] += np.where((index.label == "AD") & (index.split != "test"), 10, 0)
    fitted, test = baselines.fit_baselines(split_set), split_set.part("test")
    p = baselines.predict_baselines(fitted, test)
    train = index[index.split == "train"].drop_duplicates("scan")
    assert (p.majority_class == (train.label == "AD").mean()).all()
    assert ((p.window_vote >= 0.5) == (test.index.slice.groupby(test.index.scan).transform("min") == 80)).all()
    assert ((p.logistic_regression >= 0.5) == (test.index.label == "AD")).all()
    small = baselines.shrink(images)
    assert small.shape == (90, 20 * 24) and small[0, 0] == pytest.approx(images[0, :2, :2].mean() / 255)
    test.index = test.index.assign(slice=500)
    assert (baselines.predict_baselines(fitted, test).window_vote == fitted["share_AD"]).all()
