"""The phantom has the form and the proportions of ADNI's AD_NC, and a disease to see."""

import collections
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import dataset
import predict
from adnc.data.subjects import archive_id
from adnc.errors import InputError
from adnc.files import read_json
from adnc.phantom.anatomy import CSF, GREY, render
from adnc.phantom.draw import (
    STARTS,
    draw,
    is_varied_set,
    label_slices,
    plan,
    plan_local,
    read_soft_labels,
)
from adnc.phantom.varied import (
    LATENTS,
    PLANES,
    SHOWN,
    SIDE,
    SLICES,
    VARIATIONS,
    put_in_head,
    render_varied,
    share_of_fluid,
    varied_anatomy,
)
from adnc.scoring.assess import read_run
from adnc.scoring.baselines import STRENGTHS, shrink
from tools import phantom as tool
from utils import load_checkpoint


def hash_files(folder):
    """Path -> SHA-256 of every file below a folder."""
    hashes = {}
    for file in folder.rglob("*"):
        if file.is_file():
            hashes[file.relative_to(folder)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def vote_accuracy(scans):
    """Accuracy on test scans of the class that each window mostly has in train."""
    votes = collections.defaultdict(collections.Counter)
    for scan in scans:
        if scan.split == "train":
            votes[scan.start][scan.label] += 1
    test = [scan for scan in scans if scan.split == "test"]
    return np.mean([votes[scan.start].most_common(1)[0][0] == scan.label for scan in test])


def auroc(positive, negative):
    positive, negative = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return np.heaviside(positive - negative, 0.5).mean()


def subjects_of(scans, split):
    return {scan.subject for scan in scans if scan.split == split}


@pytest.fixture(scope="module")
def files(phantom):
    return sorted((phantom / "AD_NC").rglob("*.jpeg"))


# ---------------------------------------------------------------- files


def test_slices_are_grey_256_by_240_jpegs_named_scan_slice(phantom, files):
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (256, 240))
        name = file.relative_to(phantom / "AD_NC").as_posix()
        assert re.fullmatch(r"(train|test)/(AD|NC)/[1-9]\d*_\d+\.jpeg", name)
    assert {path.name for path in phantom.iterdir()} == {"AD_NC", "meta_data_with_label.json"}


def test_each_scan_is_20_consecutive_slices_in_one_of_nine_windows(files):
    slices = collections.defaultdict(list)
    for file in files:
        scan, index = file.stem.rsplit("_", 1)
        slices[scan].append(int(index))
    for indices in slices.values():
        start = min(indices)
        assert start in STARTS
        assert sorted(indices) == list(range(start, start + 20))
    assert len(STARTS) == 9
    assert min(STARTS) == 67 and max(STARTS) + 19 == 114


def test_about_75_percent_of_pixels_are_near_black(files):
    shares = [(np.asarray(Image.open(file)) < 10).mean() for file in files[::10]]
    assert 0.72 < np.mean(shares) < 0.78


def test_metadata_names_the_subject_of_each_scan_and_scans_without_a_picture(phantom, files):
    metadata = json.loads((phantom / "meta_data_with_label.json").read_text())
    pictured = {file.stem.rsplit("_", 1)[0]: file.parent.name for file in files}
    for scan, entry in metadata.items():
        assert re.search(rf"/ADNI_\d{{3}}_S_\d{{4}}_MR_.*_I{scan}\.nii$", entry["raw"])
        assert entry["label"] == {"NC": 0, "AD": 2, None: 1}[pictured.get(scan)]
    assert pictured.keys() <= metadata.keys()
    assert len(metadata) == pytest.approx(len(pictured) * 2189 / 1526, abs=1)


def test_the_same_seed_draws_the_same_bytes_with_any_number_of_threads(tmp_path):
    for workers in (1, 3):
        out = tmp_path / str(workers)
        root = draw(out, 4, seed=3, cue="local", workers=workers, progress=False)
        assert root == out / "AD_NC"
    assert hash_files(tmp_path / "1") == hash_files(tmp_path / "3")


def test_an_existing_set_is_refused_and_unchanged(phantom):
    before = hash_files(phantom)
    with pytest.raises(ValueError, match="AD_NC exists, and nothing is overwritten"):
        draw(phantom, 10, progress=False)
    assert hash_files(phantom) == before


@pytest.mark.parametrize("words", [
    ["OUT", "--subjects", "3"], ["OUT", "--seed", "-1"], [], ["OUT", "--without", "noise"],
    ["OUT", "--cue", "varied", "--without", "colour"],
])  # fmt: skip
def test_wrong_flags_are_one_error_line_with_status_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        tool.parse_args(words)
    assert stop.value.code == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)


def test_the_command_draws_a_set_of_one_scan_per_subject_with_the_local_cue(tmp_path, capsys):
    tool.main([str(tmp_path), "--subjects", "10", "--cue", "local"])
    assert capsys.readouterr().out == f"drew {tmp_path / 'AD_NC'}\n"
    assert len(list((tmp_path / "AD_NC").rglob("*.jpeg"))) == 10 * 6


# ---------------------------------------------------------------- proportions


def test_680_subjects_have_the_proportions_of_the_real_set():
    scans = plan(680, seed=0)
    train, test = subjects_of(scans, "train"), subjects_of(scans, "test")
    counts = (len(train | test), len(test), len(train & test))
    assert counts == pytest.approx((680, 331, 216), abs=2)
    assert len(scans) == pytest.approx(1526, rel=0.03)
    assert sum(scan.split == "test" for scan in scans) == pytest.approx(450, rel=0.05)
    assert np.mean([scan.label == "AD" for scan in scans]) == pytest.approx(743 / 1526, abs=0.02)
    visits = collections.Counter(scan.subject for scan in scans)
    assert min(visits.values()) == 1 and max(visits.values()) <= 8


def test_a_small_set_shares_subjects_between_train_and_test_as_the_real_one():
    scans = plan(60, seed=0)
    train, test = subjects_of(scans, "train"), subjects_of(scans, "test")
    assert len(train & test) / len(test) == pytest.approx(216 / 331, abs=0.05)


def test_no_subject_has_both_classes():
    labels = collections.defaultdict(set)
    for scan in plan(680, seed=0):
        labels[scan.subject].add(scan.label)
    assert {len(classes) for classes in labels.values()} == {1}


@pytest.mark.parametrize("subjects", [60, 680])
def test_a_majority_vote_on_the_window_gets_about_68_percent_of_test_scans(subjects):
    accuracy = [vote_accuracy(plan(subjects, seed)) for seed in range(8)]
    assert np.mean(accuracy) == pytest.approx(0.68, abs=0.03)
    assert np.ptp(accuracy) < 0.15


@pytest.mark.parametrize("subjects", [60, 680])
def test_the_best_possible_subject_level_accuracy_is_near_91_percent(subjects):
    for split in ("train", "test"):
        correct = {}
        for seed in range(4):
            for scan in plan(subjects, seed):
                if scan.split == split:
                    correct[scan.subject] = (scan.atrophy > 0) == (scan.label == "AD")
        assert 0.86 < np.mean(list(correct.values())) < 0.97


# ---------------------------------------------------------------- pixels


def test_another_seed_draws_another_brain_in_another_scan():
    one, two = plan(12, 0)[0], plan(12, 1)[0]
    assert one.scan != two.scan
    assert (render(one, 0, [80]) != render(one, 1, [80])).mean() > 0.1


def test_ventricles_separate_the_classes_but_not_fully():
    dark = collections.defaultdict(list)
    for scan in plan(60, seed=0):
        if scan.visit == 0:  # the same slices of each subject, whatever its window
            box = render(scan, 0, [83, 97])[:, 85:125, 95:185]
            dark[scan.label].append(np.mean(box < 60))
    assert 0.80 < auroc(dark["AD"], dark["NC"]) < 0.97


def test_scans_of_a_subject_look_alike_and_subjects_do_not():
    scans = plan(60, seed=0)
    first = next(scan for scan in scans if scan.visit == 1)
    again = first._replace(visit=0)
    other = next(
        scan for scan in scans if scan.label == first.label and scan.subject != first.subject
    )
    a, b, c = (render(scan, 0, [84])[0].astype(float).ravel() for scan in (first, again, other))
    assert np.corrcoef(a, b)[0, 1] > np.corrcoef(a, c)[0, 1] + 0.02


def test_pixels_depend_on_the_class_through_atrophy_alone():
    scan = plan(12, seed=0)[0]
    a, b = (render(scan._replace(label=label), 0, [75]) for label in ("AD", "NC"))
    assert (a == b).all()


def test_atrophy_changes_neither_head_size_nor_brightness():
    scan = plan(12, seed=0)[0]
    much, little = (render(scan._replace(atrophy=a), 0, [72])[0] for a in (3.0, -3.0))
    extent = [np.flatnonzero((image > 20).any(0))[[0, -1]] for image in (much, little)]
    assert np.abs(extent[0] - extent[1]).max() <= 2
    assert np.percentile(much, 99.8) == pytest.approx(np.percentile(little, 99.8), rel=0.04)


# ---------------------------------------------------------------- the local cue


def test_the_best_observer_of_the_local_cue_is_right_on_nine_of_ten_subjects():
    scans = plan_local(250)
    for split, n in (("train", 200), ("test", 50)):
        part = [scan for scan in scans if scan.split == split]
        assert len(part) == len(subjects_of(scans, split)) == n
        correct = [(scan.atrophy > 0) == (scan.label == "AD") for scan in part]
        assert np.mean(correct) == pytest.approx(0.915, abs=0.02)
        ageing = {
            label: [scan.ageing for scan in part if scan.label == label] for label in ("AD", "NC")
        }
        assert auroc(ageing["AD"], ageing["NC"]) == pytest.approx(0.5, abs=0.2)
    assert not subjects_of(scans, "train") & subjects_of(scans, "test")


def test_a_blur_shows_little_of_the_local_cue(repeats):
    """A logistic regression on blurred slices, at the penalty that suits test best."""
    n_subjects = repeats(0, 250)
    if n_subjects == 0:
        pytest.skip("draws 250 subjects; for --exhaustive")
    scans = plan_local(n_subjects)
    with ThreadPoolExecutor(2) as pool:
        slices = np.stack(list(pool.map(render, scans)))
    x = shrink(slices.reshape(-1, 240, 256), np.arange(6 * len(scans))).reshape(len(scans), 6, -1)
    y = np.array([scan.label == "AD" for scan in scans])
    test = np.array([scan.split == "test" for scan in scans])

    scaler = StandardScaler().fit(x[~test].reshape(-1, x.shape[2]))
    train_x = scaler.transform(x[~test].reshape(-1, x.shape[2]))
    test_x = scaler.transform(x[test].reshape(-1, x.shape[2]))
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=500).fit(train_x, y[~test].repeat(6))
        p = model.predict_proba(test_x)[:, 1].reshape(-1, 6).mean(1)
        assert auroc(p[y[test]], p[~y[test]]) < 0.7


# ---------------------------------------------------------------- the phantom made for transfer


def test_the_varied_phantom_has_its_own_scanner_for_each_slice(varied):
    """Twelve slices a subject, a table of latents, and no subject with the name of a person."""
    table = pd.read_csv(varied / "latents.csv", dtype={"scan": str})
    columns = ["scan", "subject", "label", "split", "atrophy", "ageing", *LATENTS]
    assert list(table) == columns and len(table) == 12
    subjects = pd.read_csv(varied / "subjects.csv")
    assert subjects.subject.is_unique and not subjects.subject.map(archive_id).any()
    files = sorted(varied.rglob("*.jpeg"))
    assert len(files) == 12 * SLICES
    slices = []
    for file in files:
        with Image.open(file) as image:
            slices.append(np.asarray(image))
    assert {pixels.shape for pixels in slices} == {(112, 112)}
    medians = [np.median(pixels[pixels > 30]) for pixels in slices]
    assert np.std(medians) > 20
    backgrounds = [pixels[:5, :5].mean() for pixels in slices]
    assert 0.1 < np.mean(np.array(backgrounds) > 1) < 0.6


def test_the_soft_label_of_a_slice_grows_with_its_fluid_wherever_it_is_cut(varied):
    latents = pd.read_csv(varied / "latents.csv", dtype={"scan": str})
    slices = pd.read_csv(varied / "slices.csv", dtype={"scan": str})
    assert list(slices) == ["scan", "slice", *SHOWN, "p_AD"] and len(slices) == 12 * SLICES
    index = dataset.decode_set(varied / "AD_NC", progress=None).index
    p = read_soft_labels(index, varied / "AD_NC")
    by_slice = slices.set_index(["scan", "slice"]).p_AD
    assert np.array_equal(p, by_slice[list(zip(index.scan, index.slice))])

    # 300 subjects whose fluid depends on the place, and a little on the class
    rng = np.random.default_rng(0)
    n = 300
    latents = pd.DataFrame({"scan": np.arange(n), "split": "train"})
    latents["label"] = np.where(latents.scan % 2, "AD", "NC")
    amount = pd.Series(rng.normal(np.where(latents.label == "AD", 0.3, 0), 0.3))
    slices = latents[["scan"]].loc[latents.index.repeat(SLICES)].reset_index(drop=True)
    slices["plane"] = rng.choice(list(PLANES), len(slices))
    slices["place"] = rng.uniform(-40, 40, len(slices))
    usual = 0.1 + 0.05 * np.cos(slices.place / 20)
    slices["fluid"] = usual * np.exp(amount[slices.scan].to_numpy())
    p = label_slices(slices, latents)
    assert spearmanr(p, amount[slices.scan])[0] > 0.99
    assert abs(spearmanr(p, slices.place.abs())[0]) < 0.05
    mean = pd.Series(p).groupby(slices.scan).mean()
    assert mean[latents.label == "AD"].mean() > 0.55 > 0.45 > mean[latents.label == "NC"].mean()


def test_only_a_set_of_the_varied_phantom_counts_as_drawings(varied, ad_nc):
    index = dataset.decode_set(varied / "AD_NC", progress=None).index
    assert is_varied_set(varied / "AD_NC", index)
    person = index.assign(subject=index.subject.where(index.index > 0, "002_S_0413"))
    assert not is_varied_set(varied / "AD_NC", person)
    assert not is_varied_set(varied / "AD_NC", index.assign(subject=pd.NA).astype(index.dtypes))
    assert not is_varied_set(ad_nc, dataset.decode_set(ad_nc, progress=None).index)


def test_variations_are_left_out_of_the_varied_phantom_alone(tmp_path):
    with pytest.raises(InputError, match="the cue local has no variations; leave out bias"):
        draw(tmp_path / "out", 10, cue="local", without=("bias",))


def test_predictions_of_weights_that_saw_drawings_rank_and_name_no_class(varied, tmp_path, capsys):
    out = tmp_path / "out"
    predict.main([str(varied / "AD_NC" / "test"), "--out", str(out)])
    printed = capsys.readouterr().out
    for name in ("predictions", "scans", "subjects"):
        table = pd.read_csv(out / f"{name}.csv")
        assert table.prediction.isna().all() and table.p_AD.notna().all()
    conclusion = read_json(out / "metrics.json")["conclusion"]
    assert conclusion["verdict"] == "ranks only"
    assert "accuracy" not in conclusion["sentences"][0] and "AUROC" in conclusion["sentences"][0]
    assert "There is no threshold" in printed and "--threshold youden" not in printed
    assert not (out / "confusion_matrix.png").exists()
    table, scores = read_run(out)  # as tools.evaluate reads it
    assert len(table) == scores["slice"]["n"] and set(table.prediction) <= {"AD", "NC"}


def test_a_set_without_soft_labels_is_refused(varied):
    index = dataset.decode_set(varied / "AD_NC", progress=None).index
    with pytest.raises(InputError, match="has no row for slice 1 of scan 7"):
        read_soft_labels(index.assign(scan="7"), varied / "AD_NC")
    with pytest.raises(InputError, match="there is no .*slices.csv; soft labels are those of"):
        read_soft_labels(index, varied)


@pytest.mark.parametrize("change", [
    lambda table: pd.concat([table, table.iloc[:1]]), lambda table: table.drop(columns="p_AD"),
])  # fmt: skip
def test_a_table_of_soft_labels_with_other_rows_or_columns_is_refused(varied, tmp_path, change):
    index = dataset.decode_set(varied / "AD_NC", progress=None).index
    change(pd.read_csv(varied / "slices.csv")).to_csv(tmp_path / "slices.csv", index=False)
    with pytest.raises(InputError, match="is not what tools.phantom writes; expected a row with"):
        read_soft_labels(index, tmp_path / "AD_NC")


def test_the_share_of_fluid_is_that_of_the_brain():
    share = np.zeros((SIDE, SIDE), np.float32)
    share[20:60, 20:60] = 1
    tissue = np.full((SIDE, SIDE), GREY, np.float32)
    tissue[20:30, 20:60] = CSF
    tissue[:, 70:] = CSF  # outside of the brain
    assert share_of_fluid(tissue, share) == pytest.approx(0.25)
    assert share_of_fluid(tissue, np.zeros_like(share)) == 0


def test_the_shipped_weights_rank_drawings_that_they_have_not_seen(varied):
    checkpoint = load_checkpoint(predict.PHANTOM)
    slices = dataset.decode_set(varied / "AD_NC", progress=None)
    predictions = predict.predict_slices(checkpoint, slices, device=torch.device("cpu"), amp=None)
    assert set(predictions.exposure) == {"no"}
    assert predictions.out_of_range.notna().mean() < 0.02
    scores = predictions.groupby("scan").logit.mean()
    index = predictions[["scan", "slice"]]
    labels = read_soft_labels(index, varied / "AD_NC")
    assert spearmanr(predictions.logit, labels)[0] > 0.5
    of_scans = pd.Series(labels).groupby(index.scan).mean()
    assert spearmanr(scores, of_scans[scores.index])[0] > 0.6
    assert os.path.getsize(predict.PHANTOM) < 1.5e6


def test_a_skull_is_a_ring_around_the_brain_with_air_outside():
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    radius = 1.5 * np.hypot(y, x)  # mm
    share = (radius < 50).astype(np.float32)
    heads = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, mask = put_in_head(0.7 * share, share, 1.5, rng, plain=False)
        assert (image[radius > 66] == 0).all() and (mask[radius > 66] == 0).all()
        assert np.allclose(image[radius < 46], 0.7)
        heads.append(mask[(radius > 52) & (radius < 60)].mean())
    assert min(heads) == 0 and max(heads) > 0.9


def test_disease_shows_in_the_hippocampus_and_less_in_what_ageing_changes_too():
    scans = plan_local(80, seed=3)
    sizes = [varied_anatomy(3, scan.subject, scan.atrophy, scan.ageing) for scan in scans]
    table = pd.DataFrame([{name: getattr(size, name) for name in LATENTS} for size in sizes])
    is_ad = np.array([scan.label == "AD" for scan in scans])
    aurocs = {name: auroc(table[name][is_ad], table[name][~is_ad]) for name in LATENTS}
    assert aurocs["hippocampus"] < 0.05 and aurocs["horn"] > 0.9
    assert 0.55 < aurocs["ventricle"] < 0.8 and 0.55 < aurocs["sulcus"] < 0.8


def test_a_variation_can_be_left_out_without_changing_the_others():
    scan = plan_local(10, seed=3)[0]
    whole = render_varied(scan, 3)[0].astype(float)
    plain = render_varied(scan, 3, VARIATIONS)[0].astype(float)
    apart = {}
    for name in VARIATIONS:
        other = render_varied(scan, 3, (name,))[0].astype(float)
        apart[name] = np.abs(other - whole).mean()
    assert all(0 < value < np.abs(plain - whole).mean() for value in apart.values()), apart
    assert np.array_equal(render_varied(scan, 3)[0], whole)
    assert (plain[:, :3, :3] == 0).all()  # without noise outside of the brain
