import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

import utils
from modules import ConvNeXtBlock, convnext

RECIPE = dict(steps_per_epoch=10, epochs=5, warmup_epochs=1, lr=1e-3)


# ---------------------------------------------------------------- schedule


def test_learning_rate_rises_to_its_peak_over_the_first_epoch_and_falls_to_zero():
    lrs = [utils.lr_at(step, **RECIPE) for step in range(51)]
    assert lrs[0] == pytest.approx(1e-4)  # a tenth of the way up, not a wasted step at zero
    assert lrs[9] == pytest.approx(1e-3) == lrs[10] == max(lrs)
    assert np.all(np.diff(lrs[:10]) > 0) and np.all(np.diff(lrs[10:]) < 0)
    assert lrs[30] == pytest.approx(0.5e-3)  # halfway through the cosine
    assert lrs[50] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_or_with_nothing_but_warm_up():
    assert utils.lr_at(0, **RECIPE | dict(warmup_epochs=0)) == 1e-3
    assert utils.lr_at(9, **RECIPE | dict(epochs=1)) == pytest.approx(1e-3)
    assert utils.lr_at(4, **RECIPE | dict(warmup_epochs=0.5)) == pytest.approx(1e-3)


# ---------------------------------------------------------------- precision and device


def test_amp_modes_that_a_device_cannot_do_are_refused():
    cpu = torch.device("cpu")
    assert utils.pick_amp("off", cpu) is None and utils.pick_amp("bf16", cpu) == torch.bfloat16
    assert utils.pick_amp("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        utils.pick_amp("fp16", cpu)


def test_a_device_that_is_not_there_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="device cuda:99 cannot be used here"):
        utils.pick_device("cuda:99")


def test_layer_scale_gives_no_gradient_in_fp16_without_the_scaler():
    """Why the scaler is not optional: at 1e-6 the gradients of a block's MLP are below fp16's smallest number."""
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(8).half(), torch.randn(2, 8, 7, 7).half()
    largest = {}
    for scale in (1.0, 2.0**16):  # GradScaler starts at 2**16
        block.zero_grad()
        (block(x).float().square().mean() * scale).backward()
        largest[scale] = block.pwconv1.weight.grad.abs().max()
    assert largest[1.0] == 0 < largest[2.0**16]


# ---------------------------------------------------------------- figures


def random_predictions(subjects=30, seed=0):
    """A table of 5 slices a scan and 1 to 3 scans a subject, right more often than not, alike within a subject."""
    rng = np.random.default_rng(seed)
    rows = []
    for s in range(subjects):
        y, shift = s % 2, rng.normal(0, 1)
        for scan in range(rng.integers(1, 4)):
            for n in range(5):
                logit = (2 * y - 1) * 0.8 + shift + rng.normal(0, 0.5)
                rows.append((f"{s}s{scan}", n, f"p{s}", ("NC", "AD")[y], round(1 / (1 + math.exp(-logit)), 2)))
    table = pd.DataFrame(rows, columns=["scan", "slice", "subject", "label", "p_AD"]).astype({"subject": "string"})
    return utils.with_predictions(table)


def test_point_figures_are_scikit_learns():
    table = random_predictions()
    y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy()
    figures = utils.point_figures(y, p)
    tn, fp, fn, tp = sk.confusion_matrix(y, p >= 0.5).ravel()
    assert figures["sensitivity"] == tp / (tp + fn) and figures["specificity"] == tn / (tn + fp)
    assert figures["accuracy"] == (tp + tn) / len(y)
    assert figures["balanced_accuracy"] == pytest.approx((figures["sensitivity"] + figures["specificity"]) / 2)
    assert figures["auroc"] == sk.roc_auc_score(y, p)


def test_bootstrap_equals_drawing_the_subjects_one_by_one():
    table = random_predictions()
    y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy()
    intervals = utils.bootstrap(y, p, table.subject, resamples=200, seed=5)

    names = sorted(table.subject.unique())
    counts = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), 200)
    drawn = []
    for row in counts:
        pick = np.concatenate([np.flatnonzero(table.subject == s).repeat(c) for s, c in zip(names, row)]).astype(int)
        drawn.append(utils.point_figures(y[pick], p[pick]))
    for name, interval in intervals.items():
        expected = np.quantile([figures[name] for figures in drawn], [0.025, 0.975])
        np.testing.assert_allclose(interval, expected, atol=1e-12, err_msg=name)


def test_intervals_hold_their_promise():
    """Of 200 samples of 40 subjects, about 95 % of the intervals hold the figure of the population."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        right = rng.random(40) < 0.7  # a subject is right or wrong with all of its 10 slices
        y = np.repeat(np.arange(40) % 2 == 1, 10)
        p = np.where(np.repeat(right, 10) == y, 0.9, 0.1)
        low, high = utils.bootstrap(y, p, np.repeat(np.arange(40), 10), 400, seed)["accuracy"]
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_intervals_over_subjects_are_wider_than_over_slices():
    table = random_predictions()
    y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy()
    by_subject = utils.bootstrap(y, p, table.subject)["accuracy"]
    by_slice = utils.bootstrap(y, p, np.arange(len(y)))["accuracy"]
    assert np.ptp(by_subject) > 1.5 * np.ptp(by_slice)


def test_score_gives_each_unit_its_own_n_and_survives_unknown_subjects():
    table = random_predictions()
    figures = utils.score(table)
    assert figures["slice"]["n"] == len(table) and figures["scan"]["n"] == table.scan.nunique()
    assert figures["subject"]["n"] == 30
    for unit in utils.UNITS:
        for name, (low, high) in figures[unit]["ci95"].items():
            assert low <= figures[unit][name] <= high
    unknown = utils.score(table.assign(subject=pd.array([None] * len(table), "string")))
    assert unknown["subject"] is None and unknown["scan"]["accuracy"] == figures["scan"]["accuracy"]
    assert "subjects unknown" in utils.format_score(unknown, "x")


def test_score_of_one_class_leaves_undefined_figures_empty():
    table = random_predictions()
    figures = utils.score(table[table.label == "AD"])["slice"]
    assert figures["specificity"] is figures["auroc"] is figures["balanced_accuracy"] is None
    assert figures["ci95"]["auroc"] is None and figures["accuracy"] == figures["sensitivity"]


def test_a_scan_and_a_subject_get_the_mean_over_their_slices():
    table = random_predictions()
    scans, subjects = utils.aggregate(table, "scan"), utils.aggregate(table, "subject")
    one = table[table.scan == "3s0"]
    row = scans.set_index("scan").loc["3s0"]
    assert row.p_AD == pytest.approx(one.p_AD.mean()) and row.n_slices == 5 and row.label == "AD"
    assert row.prediction == ("AD" if one.p_AD.mean() >= 0.5 else "NC")
    assert subjects.n_slices.sum() == len(table)


# ---------------------------------------------------------------- evaluation and checkpoints


def test_evaluation_is_deterministic_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = convnext("atto")
    torch.nn.init.normal_(model.head.weight, std=1.0)
    images = np.random.default_rng(0).integers(0, 256, (9, 40, 48), dtype=np.uint8)
    table = pd.DataFrame({"scan": list("aaabbbccc"), "slice": range(9)})
    common = dict(image_size=32, device=torch.device("cpu"), amp=None)
    one = utils.evaluate(model, images, table, **common)
    assert one.p_AD.between(0, 1).all() and one.p_AD.std() > 1e-3
    assert one.equals(utils.evaluate(model, images, table, **common))
    by_two = utils.evaluate(model, images, table, **common, batch_size=2)
    np.testing.assert_allclose(by_two.p_AD, one.p_AD, atol=1e-6)


def test_a_checkpoint_rebuilds_the_model(tmp_path):
    model = convnext("atto", drop_path_rate=0.1)
    facts = {"variant": "atto", "in_chans": 1, "num_classes": 2, "drop_path_rate": 0.1}
    utils.save_checkpoint(tmp_path / "m.pth", weights=model.state_dict(), model=facts, classes=["NC", "AD"])
    again = utils.build_model(utils.load_checkpoint(tmp_path / "m.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


def test_a_checkpoint_is_data_and_foreign_files_get_a_sentence(tmp_path):
    file = tmp_path / "m.pth"
    with pytest.raises(ValueError, match="there is no file"):
        utils.load_checkpoint(file)
    file.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        utils.load_checkpoint(file)
    torch.save({"weights": Bomb(), "format": 1}, file)
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        utils.load_checkpoint(file)
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        utils.load_checkpoint(file)
    utils.save_checkpoint(file, classes=["NC", "AD"], weights=torch.zeros(1000))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        utils.load_checkpoint(file)
    torch.save({"format": 99}, file)
    with pytest.raises(ValueError, match="format 99, this version reads"):
        utils.load_checkpoint(file)


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    file = tmp_path / "x.json"
    utils.write_json(file, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["x.json"]
