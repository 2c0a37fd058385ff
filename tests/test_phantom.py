"""phantom.py draws a set that has the form and the proportions of ADNI's AD_NC, and a disease to see."""
import collections
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor

import command
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from adnc.phantom import draw as phantom
from adnc.scoring.baselines import STRENGTHS, shrink

SUBJECTS = 14


def fingerprint(folder):
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def vote_accuracy(scans):
    """Accuracy on test scans of the class that each window mostly has in train."""
    votes = collections.defaultdict(collections.Counter)
    for scan in scans:
        if scan.split == "train":
            votes[scan.start][scan.label] += 1
    return np.mean([votes[s.start].most_common(1)[0][0] == s.label for s in scans if s.split == "test"])


def auroc(positive, negative):
    positive, negative = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return np.mean((positive > negative) + 0.5 * (positive == negative))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "ADNI"
    assert phantom.draw(out, SUBJECTS, seed=3, workers=2, progress=False) == out / "AD_NC"
    return out


@pytest.fixture(scope="session")
def files(drawn):
    return sorted((drawn / "AD_NC").rglob("*.jpeg"))


def test_slices_are_grey_256_by_240_jpegs_named_scan_slice(drawn, files):
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (256, 240))
        assert re.fullmatch(r"(train|test)/(AD|NC)/[1-9]\d*_\d+\.jpeg",
                            file.relative_to(drawn / "AD_NC").as_posix())
    assert {path.name for path in drawn.iterdir()} == {"AD_NC", "meta_data_with_label.json"}


def test_each_scan_is_20_consecutive_slices_in_one_of_nine_windows(files):
    slices = collections.defaultdict(list)
    for file in files:
        scan, index = file.stem.rsplit("_", 1)
        slices[scan].append(int(index))
    for indices in slices.values():
        start = min(indices)
        assert start in phantom.STARTS and sorted(indices) == list(range(start, start + 20))
    assert len(phantom.STARTS) == 9 and min(phantom.STARTS) == 67 and max(phantom.STARTS) + 19 == 114


def test_about_75_percent_of_pixels_are_near_black(files):
    share = np.mean([(np.asarray(Image.open(file)) < 10).mean() for file in files[::10]])
    assert 0.72 < share < 0.78


@pytest.mark.parametrize("subjects", [60, 680])
def test_majority_vote_on_the_window_gets_about_68_percent_of_test_scans(subjects):
    accuracy = [vote_accuracy(phantom.plan(subjects, seed)) for seed in range(8)]
    assert np.mean(accuracy) == pytest.approx(0.68, abs=0.03)
    assert np.ptp(accuracy) < 0.15


def test_680_subjects_have_the_proportions_of_the_real_set():
    scans = phantom.plan(680, seed=0)
    train, test = ({s.subject for s in scans if s.split == split} for split in ("train", "test"))
    assert (len(train | test), len(test), len(train & test)) == pytest.approx((680, 331, 216), abs=2)
    assert len(scans) == pytest.approx(1526, rel=0.03)
    assert sum(s.split == "test" for s in scans) == pytest.approx(450, rel=0.05)
    assert np.mean([s.label == "AD" for s in scans]) == pytest.approx(743 / 1526, abs=0.02)
    visits = collections.Counter(s.subject for s in scans)
    assert min(visits.values()) == 1 and max(visits.values()) <= 8


def test_small_set_shares_subjects_between_train_and_test_as_the_real_one():
    scans = phantom.plan(60, seed=0)
    train, test = ({s.subject for s in scans if s.split == split} for split in ("train", "test"))
    assert len(train & test) / len(test) == pytest.approx(216 / 331, abs=0.05)


def test_no_subject_has_both_classes():
    labels = collections.defaultdict(set)
    for scan in phantom.plan(680, seed=0):
        labels[scan.subject].add(scan.label)
    assert {len(classes) for classes in labels.values()} == {1}


def test_metadata_names_the_subject_of_each_scan_and_scans_without_a_picture(drawn, files):
    metadata = json.loads((drawn / "meta_data_with_label.json").read_text())
    pictured = {file.stem.rsplit("_", 1)[0]: file.parent.name for file in files}
    for scan, entry in metadata.items():
        assert re.search(rf"/ADNI_\d{{3}}_S_\d{{4}}_MR_.*_I{scan}\.nii$", entry["raw"])
        assert entry["label"] == {"NC": 0, "AD": 2, None: 1}[pictured.get(scan)]
    assert pictured.keys() <= metadata.keys()
    assert len(metadata) == pytest.approx(len(pictured) * 2189 / 1526, abs=1)


def test_same_seed_draws_the_same_bytes_whatever_the_workers(drawn, tmp_path):
    phantom.draw(tmp_path / "again", SUBJECTS, seed=3, workers=3, progress=False)
    assert fingerprint(tmp_path / "again") == fingerprint(drawn)


def test_another_seed_draws_another_brain_in_another_scan():
    one, two = phantom.plan(12, 0)[0], phantom.plan(12, 1)[0]
    assert one.scan != two.scan
    assert (phantom.render(one, 0, [80]) != phantom.render(one, 1, [80])).mean() > 0.1


def test_ventricles_separate_the_classes_but_not_fully():
    dark = collections.defaultdict(list)
    for scan in phantom.plan(60, seed=0):
        if scan.visit == 0:                 # the same slices of each subject, so that the window has no say
            box = phantom.render(scan, 0, [83, 97])[:, 85:125, 95:185].astype(float)
            dark[scan.label].append(np.mean(box < 60))
    assert 0.80 < auroc(dark["AD"], dark["NC"]) < 0.97


@pytest.mark.parametrize("subjects", [60, 680])
def test_the_best_possible_subject_level_accuracy_is_near_91_percent(subjects):
    for split in ("train", "test"):
        right = {s.subject: (s.atrophy > 0) == (s.label == "AD")
                 for seed in range(4) for s in phantom.plan(subjects, seed) if s.split == split}
        assert 0.86 < np.mean(list(right.values())) < 0.97


def test_scans_of_a_subject_look_alike_and_subjects_do_not():
    scans = phantom.plan(60, seed=0)
    first = next(s for s in scans if s.visit == 1)
    again = first._replace(visit=0)
    other = next(s for s in scans if s.label == first.label and s.subject != first.subject)
    a, b, c = (phantom.render(scan, 0, [84])[0].astype(float).ravel() for scan in (first, again, other))
    assert np.corrcoef(a, b)[0, 1] > np.corrcoef(a, c)[0, 1] + 0.02


def test_pixels_do_not_know_the_class_beyond_the_atrophy():
    scan = phantom.plan(12, seed=0)[0]
    a, b = (phantom.render(scan._replace(label=label), 0, [75]) for label in ("AD", "NC"))
    assert (a == b).all()


def test_atrophy_changes_neither_head_size_nor_brightness():
    scan = phantom.plan(12, seed=0)[0]
    ill, well = (phantom.render(scan._replace(atrophy=a), 0, [72])[0] for a in (3.0, -3.0))
    extent = [np.flatnonzero((image > 20).any(0))[[0, -1]] for image in (ill, well)]
    assert np.abs(extent[0] - extent[1]).max() <= 2
    assert np.percentile(ill, 99.8) == pytest.approx(np.percentile(well, 99.8), rel=0.04)


def test_existing_set_is_refused_and_kept(drawn):
    before = fingerprint(drawn)
    with pytest.raises(ValueError, match="AD_NC exists; expected"):
        phantom.draw(drawn, SUBJECTS, progress=False)
    assert fingerprint(drawn) == before


def test_interrupted_run_leaves_no_half_set(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phantom.draw(tmp_path / "ADNI", 10, progress=False)
    assert not any((tmp_path / "ADNI").iterdir())


@pytest.mark.parametrize("arguments", [["OUT", "--subjects", "3"], ["OUT", "--seed", "-1"], []])
def test_wrong_input_is_one_error_line_and_status_2(tmp_path, arguments):
    done = command.run(phantom.__file__, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"error: .+\n", done.stderr)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- the local cue


def test_the_best_observer_of_the_local_cue_is_right_on_nine_of_ten_subjects():
    scans = phantom.plan_local(250)
    for split, n in (("train", 200), ("test", 50)):
        part = [scan for scan in scans if scan.split == split]
        assert len(part) == len({scan.subject for scan in part}) == n
        assert np.mean([(scan.atrophy > 0) == (scan.label == "AD") for scan in part]) == pytest.approx(0.915, abs=0.02)
        assert abs(auroc(*([s.ageing for s in part if s.label == label] for label in ("AD", "NC"))) - 0.5) < 0.2
    assert not {s.subject for s in scans if s.split == "train"} & {s.subject for s in scans if s.split == "test"}


def test_a_blur_shows_little_of_the_local_cue(repeats):
    """AUROC on the test subjects of a logistic regression on blurred slices of 80 subjects (or 200), at the penalty
    that suits test best."""
    scans = phantom.plan_local(repeats(100, 250))
    with ThreadPoolExecutor(2) as pool:
        drawn = np.stack(list(pool.map(phantom.render, scans)))
    y, test = np.array([s.label == "AD" for s in scans]), np.array([s.split == "test" for s in scans])
    x = shrink(drawn.reshape(-1, 240, 256)).reshape(len(scans), 6, -1)
    train = StandardScaler().fit(x[~test].reshape(-1, x.shape[2]))
    best = 0
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=500)
        model.fit(train.transform(x[~test].reshape(-1, x.shape[2])), y[~test].repeat(6))
        p = model.predict_proba(train.transform(x[test].reshape(-1, x.shape[2])))[:, 1].reshape(-1, 6).mean(1)
        best = max(best, auroc(p[y[test]], p[~y[test]]))
    assert best < 0.7
