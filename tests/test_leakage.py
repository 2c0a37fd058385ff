"""Leaks planted in a phantom: each is refused, or reported by the audit, the log and the titles."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SCANS, train_small, write_set, write_slice
from PIL import Image

import dataset
from adnc.data import pixels, subjects
from adnc.data.index import list_inputs
from adnc.data.pixels import parse_name
from adnc.scoring import baselines
from dataset import read_index, split_index
from predict import predict_slices
from utils import load_checkpoint


def decode(root):
    """The SliceSet of a folder, all of whose files can be used."""
    slices = dataset.decode_set(root, use_cache=False, progress=None)
    assert slices.bad == []
    return slices


def audit(root):
    return "\n".join(dataset.audit(decode(root)))


@pytest.fixture(scope="session")
def clean(phantom, tmp_path_factory):
    """A phantom in which no test subject is in train."""
    root = shutil.copytree(phantom, tmp_path_factory.mktemp("clean") / "ADNI") / "AD_NC"
    index = read_index(root)
    shared = index.subject.isin(subjects.shared_subjects(index))
    for path in index.path[(index.split == "train") & shared]:
        (root / path).unlink()
    return root


@pytest.fixture
def planted(clean, tmp_path):
    """A copy of the clean phantom to plant a leak in, and its index."""
    shutil.copytree(clean.parent, tmp_path / "ADNI")
    root = tmp_path / "ADNI" / "AD_NC"
    return root, read_index(root)


def first_scan(index, split, label):
    return index.scan[(index.split == split) & (index.label == label)].iloc[0]


def plant_copy(root, index, scan, name, folder):
    """Copy the slices of a scan into another folder, under a scan id that no metadata know."""
    for path in index.path[index.scan == scan]:
        shutil.copy(path, root / folder / f"{name}_{parse_name(path)[1]}.jpeg")


# ---------------------------------------------------------------- leaks in the data


def test_the_clean_phantom_raises_no_alarm(clean):
    text = audit(clean)
    assert "LEAK" not in text and "NOT CHECKED" not in text and "SUSPICIOUS" not in text


def test_slices_of_a_test_scan_in_train_are_refused(planted):
    root, index = planted
    for path in index.path[(index.split == "test") & (index.label == "AD")][:10]:
        shutil.move(path, root / "train" / "AD")
    with pytest.raises(ValueError, match="is in train and in test"):
        read_index(root)


def test_a_scan_in_both_classes_is_refused(planted):
    root, index = planted
    path = index.path[index.scan == first_scan(index, "train", "AD")].iloc[0]
    shutil.copy(path, root / "train" / "NC")
    with pytest.raises(ValueError, match="is in both classes"):
        read_index(root)


def test_another_scan_of_a_test_subject_in_train_is_found(planted):
    root, index = planted
    metadata = root.parent / "meta_data_with_label.json"
    entries = json.loads(metadata.read_text())
    # The same subject in both file names: two visits.
    entries[first_scan(index, "train", "NC")] = entries[first_scan(index, "test", "NC")]
    metadata.write_text(json.dumps(entries))
    text = audit(root)
    assert "LEAK: 1 of the" in text and "test subjects are also in train" in text
    lines = "\n".join(subjects.describe_split(split_index(decode(root).index), "subject"))
    assert "LEAK IN THE DATA: 1 test subjects are also in train" in lines


def test_a_test_scan_copied_into_train_under_another_id_is_found(planted):
    root, index = planted
    plant_copy(root, index, first_scan(index, "test", "AD"), "copy", "train/AD")
    text = audit(root)
    assert "LEAK: slices of test are copies, pixel for pixel, of slices in train: 20 slices" in text
    kept, n_dropped = subjects.drop_test_subjects(decode(root).index)
    assert n_dropped == 1 and "copy" not in set(kept.scan)


def test_a_scan_copied_within_train_stays_on_one_side_of_every_split(planted):
    root, index = planted
    for i, scan in enumerate(index.scan[index.split == "train"].unique()[:4]):
        label = index.label[index.scan == scan].iloc[0]
        plant_copy(root, index, scan, f"copy{i}", f"train/{label}")

    by_name = read_index(root)  # without the pixels
    by_pixels = decode(root).index
    assert by_name.path.equals(by_pixels.path)
    n_divided = {"names": 0, "pixels": 0}
    for seed in range(8):
        for key, index in (("names", by_name), ("pixels", by_pixels)):
            split = split_index(index, 0.4, seed=seed).split
            n_divided[key] += split.groupby(by_pixels.pixel_hash).nunique().max() > 1
    assert n_divided["names"] > 0 and n_divided["pixels"] == 0


def test_the_same_slice_in_both_classes_is_suspicious(planted):
    root, index = planted
    scan = first_scan(index, "train", "AD")
    plant_copy(root, index, scan, "copy", "train/NC")
    sentence = "SUSPICIOUS: 20 slices are in both classes, pixel for pixel, first "
    assert sentence in audit(root)
    split = split_index(decode(root).index)
    assert sentence in "\n".join(subjects.describe_split(split, "subject"))


def test_without_metadata_the_audit_reports_what_it_could_not_check(planted):
    root, _ = planted
    (root.parent / "meta_data_with_label.json").unlink()
    text = audit(root)
    assert "NOT CHECKED" in text and "none of the" not in text
    with pytest.raises(ValueError, match="no subject is known, so none can be dropped"):
        subjects.drop_test_subjects(read_index(root))


def test_black_slices_are_no_copies_of_each_other(tmp_path):
    """Slices at the edge of a volume are equal and connect no two subjects."""
    black = np.zeros((3, 8, 8), np.uint8)
    black[2, 0, 0] = 1
    hashes = pixels.hash_slices(black)
    assert hashes[:2] == ["", ""] and hashes[2] != ""
    root = write_set(tmp_path)
    for name in ("train/AD/100_70", "train/NC/200_71", "test/NC/400_70"):
        Image.new("L", (48, 40)).save(root / f"{name}.jpeg")
    text = audit(root)
    assert "LEAK" not in text and "pixel for pixel" not in text


# ---------------------------------------------------------------- what a checkpoint has seen


def test_a_slice_seen_in_training_is_recognised_under_any_name(run_folder, ad_nc, tmp_path):
    shutil.copy(ad_nc / "train" / "AD" / "100_70.jpeg", tmp_path / "renamed_1.jpeg")
    write_slice(tmp_path / "other_1.jpeg", True, 5)
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    slices = dataset.load_inputs(
        list_inputs([tmp_path]), slice_size=checkpoint["slice_size"], progress=None
    )
    table = predict_slices(checkpoint, slices, device=torch.device("cpu"), amp=None)
    assert dict(zip(table.scan, table.exposure)) == {"renamed": "yes", "other": "unknown"}


def read_scores(run, part):
    return json.loads((run / part / "metrics.json").read_text())


def test_weights_that_were_trained_on_the_test_subjects_are_a_leak(ad_nc, tmp_path):
    """A run on the test subjects, and then another with the usual split that starts from it."""
    swapped = write_set(tmp_path / "swapped", {
        scan: ("test" if split == "train" else "train", label, subject)
        for scan, (split, label, subject) in SCANS.items()
    })  # fmt: skip
    first = train_small(swapped, tmp_path / "first", "--epochs", "1")
    assert "LEAKY" not in read_scores(first, "test")["title"]

    init = str(first / "best_model.pth")
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1", "--init", init)
    log = (run / "training_log.txt").read_text()
    assert "LEAK BY TRANSFER: --init was trained on subjects of 6 of the 6 scans of test" in log
    assert "LEAKY: 6 of 6" in read_scores(run, "test")["title"]
    assert read_scores(run, "val")["leaks"] == []


def test_weights_of_unknown_training_are_noted_in_the_title(ad_nc, run_folder, tmp_path):
    torch.save(load_checkpoint(run_folder / "best_model.pth")["weights"], tmp_path / "bare.pth")
    init = str(tmp_path / "bare.pth")
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1", "--init", init)
    scores = read_scores(run, "test")
    assert "starts from bare.pth, which does not record its training subjects" in scores["title"]
    assert scores["exposure"] == {"no": 0, "unknown": 6, "yes": 0}
    assert read_scores(run, "val")["exposure"]["no"] == 0
    assert "6 subjects of which it is unknown whether training saw them" in (
        scores["conclusion"]["sentences"][0]
    )
    # A run that starts from such a run knows as little.
    init = str(run / "best_model.pth")
    other = train_small(ad_nc, tmp_path / "other", "--epochs", "1", "--init", init)
    assert read_scores(other, "test")["exposure"] == {"no": 0, "unknown": 6, "yes": 0}


# ---------------------------------------------------------------- the test set has no influence


def test_the_test_set_influences_no_weight_no_choice_and_no_calibration(ad_nc, tmp_path):
    """With other pictures and swapped classes in test, what is learned keeps the same bits."""
    other = write_set(tmp_path / "set")
    shutil.move(other / "test", tmp_path / "old")
    for i, path in enumerate(sorted((tmp_path / "old").rglob("*.jpeg"))):
        label = {"AD": "NC", "NC": "AD"}[path.parent.name]
        write_slice(other / "test" / label / path.name, i % 3 == 0, i)

    flags = ["--epochs", "3", "--threshold", "youden"]
    runs = [train_small(ad_nc, tmp_path / "a", *flags), train_small(other, tmp_path / "b", *flags)]
    one, two = [load_checkpoint(run / "best_model.pth") for run in runs]
    for name in ("calibration", "baselines", "epoch"):
        assert one[name] == two[name]
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, two["weights"][name])
    predictions = [(run / "test" / "predictions.csv").read_text() for run in runs]
    assert predictions[0] != predictions[1]


@pytest.fixture
def split_set(ad_nc):
    """The set as a SliceSet with train, val and test."""
    return dataset.load_set(ad_nc, val_fraction=0.25, use_cache=False, progress=None)


def test_baselines_are_fitted_without_the_test_set(split_set):
    index, images = split_set.index, split_set.images.copy()
    test = (index.split == "test").to_numpy()
    images[split_set.rows[test]] = 255 - images[split_set.rows[test]]
    swapped = index.label.map({"AD": "NC", "NC": "AD"})
    index = index.assign(label=index.label.mask(test, swapped))
    expected = baselines.fit_baselines(split_set)
    assert baselines.fit_baselines(dataset.SliceSet(index, images)) == expected


def test_baselines_predict_what_their_names_say(split_set):
    index = split_set.index
    # A slice window that depends on the class, in train and val.
    shift = np.where((index.label == "AD") & (index.split != "test"), 10, 0)
    split_set.index = index = index.assign(slice=index.slice + shift)
    fitted, test = baselines.fit_baselines(split_set), split_set.part("test")
    p = baselines.predict_baselines(fitted, test)
    train_scans = index[index.split == "train"].drop_duplicates("scan")
    assert (p.majority_class == (train_scans.label == "AD").mean()).all()
    assert (p.window_vote < 0.5).all()  # every test scan starts at 70, as NC does in train
    assert ((p.logistic_regression >= 0.5) == (test.index.label == "AD")).all()

    test.index = test.index.assign(slice=500)  # a window that training has not seen
    p = baselines.predict_baselines(fitted, test)
    assert (p.window_vote == fitted["share_AD"]).all()


def test_the_logistic_regression_sees_means_of_square_blocks(split_set):
    small = baselines.shrink(split_set.images, split_set.rows)
    assert small.shape == (90, 20 * 24)
    first = split_set.images[split_set.rows[0]]
    assert small[0, 0] == pytest.approx(first[:2, :2].mean() / 255)
