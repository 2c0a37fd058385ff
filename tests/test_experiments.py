"""Scripts of docs/experiments: stress test, linear probe, learning curves, tables."""

import re
import shutil
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from fake_predictions import random_predictions, write_run
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from adnc.data.pixels import find_head
from adnc.errors import InputError
from adnc.files import read_json, write_csv, write_json
from adnc.scoring.assess import cell, describe_distrust
from adnc.scoring.metrics import bootstrap_scores, summarise
from dataset import decode_set
from docs.experiments import (
    aggregate,
    beyond,
    both_together,
    context,
    finetune,
    fluid_maps,
    learning_curve,
    orientation,
    probe,
    residual,
    ship,
    stress,
    tables,
    transfer,
)
from modules import ConvNeXtBlock, convnext, make_model
from utils import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(run_folder):
    """(checkpoint, test slices) of a run: six scans of five slices each, all predicted right."""
    return stress.load_test(run_folder)


# ---------------------------------------------------------------- changes of slices


@pytest.fixture
def pixels():
    """A bright textured square on black, uint8 (40, 48)."""
    picture = np.zeros((40, 48), np.uint8)
    picture[10:30, 14:34] = np.random.default_rng(0).integers(80, 180, (20, 20))
    return picture


def test_shift_moves_and_fills_with_black(pixels):
    moved = stress.shift(pixels, 4)
    assert np.array_equal(moved[4:, 4:], pixels[:-4, :-4])
    assert not moved[:4].any() and not moved[:, :4].any()


def test_rotation_keeps_the_shape_and_0_degrees_change_nothing(pixels):
    assert np.array_equal(stress.rotate(pixels, 0), pixels)
    rotated = stress.rotate(pixels, 15)
    assert rotated.shape == pixels.shape and (rotated != pixels).mean() > 0.1


def test_gamma_contrast_and_bias_field_scale_grey_levels(pixels):
    assert (stress.gamma(pixels, 1.4) <= pixels).all()
    assert (stress.gamma(pixels, 0.7) >= pixels).all()
    assert stress.contrast(pixels, 0.5).max() == pytest.approx(pixels.max() / 2, abs=1)
    biased = stress.bias_field(pixels, 0.4)
    assert biased[:, 14].sum() < pixels[:, 14].sum()
    assert biased[:, 33].sum() > pixels[:, 33].sum()


def test_noise_is_repeatable_and_stays_inside_the_brain(pixels):
    noisy = stress.noise(pixels, 10)
    assert np.array_equal(noisy, stress.noise(pixels, 10)) and not noisy[pixels == 0].any()
    inside = pixels > 0
    assert np.std(noisy[inside].astype(float) - pixels[inside]) == pytest.approx(10, rel=0.15)


def test_blur_and_jpeg_lose_detail(pixels):
    assert stress.blur(pixels, 2).std() < pixels.std()
    errors = [np.abs(stress.jpeg(pixels, q).astype(float) - pixels).mean() for q in (10, 95)]
    assert errors[0] > 2 * errors[1] > 0


# ---------------------------------------------------------------- stress test


def test_the_stress_table_has_a_row_for_each_change_and_level(loaded, monkeypatch):
    for name, (change, levels, unit) in stress.CHANGES.items():
        level = (0.1,) if name == "contrast" else levels[:1]
        monkeypatch.setitem(stress.CHANGES, name, (change, level, unit))
    table = stress.stress(*loaded, device=CPU, amp=None)
    assert table.change.tolist() == ["none", *stress.CHANGES, "slices left", "slices left"]
    first = table.iloc[0]
    assert (first.change, first.changed, first.n) == ("none", 0, 6)
    assert first.accuracy == 1 and first.auroc == 1
    for row in table.itertuples():
        low, high = row.changed_ci95
        assert 0 <= low <= row.changed <= high <= 1

    # Brightness alone tells the classes of this set apart.
    changed = table.set_index(["change", "level"]).changed
    assert changed["contrast", "0.1 times"] > 0
    assert changed["rotation", "2 degrees"] == changed["slices left", "0.5 of them"] == 0


def test_leaving_slices_out_leaves_at_least_one_for_each_scan(loaded, monkeypatch):
    parts, predict_slices = [], stress.predict_slices

    def record(checkpoint, part, **options):
        parts.append(part)
        return predict_slices(checkpoint, part, **options)

    monkeypatch.setattr(stress, "CHANGES", {})
    monkeypatch.setattr(stress, "predict_slices", record)
    stress.stress(*loaded, device=CPU, amp=None)
    half, tenth = (part.index.groupby("scan").size() for part in parts[-2:])
    assert set(half) <= {2, 3} and set(tenth) == {1}  # of five
    assert len(half) == len(tenth) == 6


def test_the_stress_test_writes_a_table_and_a_picture(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stress, "CHANGES", {"shift": (stress.shift, (1, 8), "px")})
    out = tmp_path / "out"
    stress.main([str(run_folder), "--out", str(out)])
    text = capsys.readouterr().out
    assert "| shift 8 px" in text and ": changed" in text
    assert set(pd.read_csv(out / "stress.csv").run) == {str(run_folder)}
    assert np.asarray(Image.open(out / "stress.png").convert("L")).std() > 5


def test_a_run_whose_test_slices_are_gone_is_refused(run_folder, monkeypatch):
    predictions, scores = stress.read_run(run_folder)
    path = predictions.path[0].replace(".jpeg", "-gone.jpeg")
    moved = predictions.assign(path=[path, *predictions.path[1:]])
    monkeypatch.setattr(stress, "read_run", lambda folder: (moved, scores))
    with pytest.raises(InputError, match="gone"):
        stress.load_test(run_folder)


# ---------------------------------------------------------------- orientation


def test_turns_are_counted_as_found_and_upright_scans_as_no_alarm(phantom):
    alarms, slice_alarms, *found = orientation.measure(str(phantom / "AD_NC" / "train"))
    n_scans = int(alarms.split()[-1])
    assert n_scans >= 4 and slice_alarms == f"0 of {20 * n_scans}"
    assert alarms == f"0 of {n_scans}" and set(found) == {f"{n_scans} of {n_scans}"}


# ---------------------------------------------------------------- other sets than the trained one


def test_runs_are_compared_with_the_dark_share_on_another_set(run_folder, phantom, capsys):
    capsys.readouterr()
    transfer.main([str(run_folder), "--sets", str(phantom / "AD_NC")])
    printed = capsys.readouterr().out
    assert f"{phantom / 'AD_NC'}: 10 subjects, " in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["run", "mean of 1", "ensemble", "dark share"]

    transfer.main([str(run_folder), "--sets", str(phantom / "AD_NC"), "--apart"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["run", "dark share"]


def test_an_ensemble_of_noisy_scores_is_better_than_their_mean():
    rng = np.random.default_rng(0)
    is_ad = np.arange(400) % 2 == 0
    scores = {name: is_ad + rng.normal(0, 1, 400) for name in ("a", "b", "dark share")}
    rows = [line.split("|") for line in transfer.format_scores(is_ad, pd.DataFrame(scores))[2:]]
    found = {row[1].strip(): float(row[2].split()[0]) for row in rows}
    for name in ("a", "b", "dark share"):
        assert found[name] == pytest.approx(roc_auc_score(is_ad, scores[name]), abs=5e-4)
    assert found["ensemble"] > found["mean of 2"] + 0.03
    assert found["mean of 2"] == pytest.approx((found["a"] + found["b"]) / 2, abs=1e-3)


# ---------------------------------------------------------------- from slices to a scan


def test_a_scan_has_a_score_by_each_rule_and_folds_are_pooled(tmp_path, capsys):
    table = random_predictions(24, slices=6, digits=6)
    number = table.subject.str[1:].astype(int)
    for k in range(2):
        run = write_run(tmp_path / f"f{k}", table[number % 4 // 2 == k], fold=k, folds=2)
        (run / "val").symlink_to(run / "test")
        scores = read_json(run / "test" / "metrics.json")
        write_json(run / "test" / "metrics.json", {**scores, "calibration": {"temperature": 2.0}})
    aggregate.main([str(tmp_path / "f0"), str(tmp_path / "f1")])
    printed = capsys.readouterr().out
    assert "24 subjects, 1 seed\n" in printed
    for name in (*aggregate.RULES, aggregate.DARK_SHARE):
        assert f"| {name} " in printed
    scores = bootstrap_scores(table.assign(p_AD=expit(table.logit / 2)))
    expected = cell(summarise(scores)["subject"], "auroc")
    row = next(line for line in printed.splitlines() if line.startswith("| mean of p_AD  "))
    assert row.split("|")[2].strip() == expected
    with pytest.raises(InputError, match="the runs of seed 0 share subjects"):
        aggregate.main([str(tmp_path / "f0"), str(tmp_path / "f0")])


def test_the_informative_places_are_those_that_tell_the_classes_apart():
    rng = np.random.default_rng(0)
    rows = []
    for scan in range(40):
        for place in range(4):
            signal = 3.0 * (scan % 2) if place in (1, 3) else 0.0
            label = "AD" if scan % 2 else "NC"
            rows.append({"label": label, "place": place, "logit": signal + rng.normal()})
    assert sorted(aggregate.informative_places(pd.DataFrame(rows))) == [1, 3]


def test_neighbours_are_of_the_same_scan_and_an_end_is_its_own():
    index = pd.DataFrame({"scan": list("bbaab"), "slice": [2, 1, 7, 8, 3], "row": [4, 3, 2, 1, 0]})
    rows = context.neighbours(index)
    assert rows.tolist() == [[3, 4, 0], [3, 3, 4], [2, 2, 1], [2, 1, 1], [4, 0, 0]]
    with pytest.raises(InputError, match="1 slices do not follow the one before them by 1"):
        context.neighbours(index.assign(slice=[2, 1, 7, 9, 3]))


def test_slices_with_and_without_neighbours_are_compared(ad_nc, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(context.train.SMALL, "epochs", 1)
    words = [str(ad_nc), "--image-size", "32", "--seeds", "0", "--folds", "2"]
    context.main([*words, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "18 test subjects, 1 seed, 32 px\n" in printed
    for name in (*context.WAYS, context.DARK_SHARE):
        assert f"| {name} " in printed
    monkeypatch.setattr(context, "score_seed", None)
    context.main([*words, "--out", str(tmp_path)])
    assert printed.endswith(capsys.readouterr().out)  # the same table, of the files
    words[-1] = "3"
    shutil.copytree(ad_nc, tmp_path / "unknown" / "AD_NC")  # without the table beside it
    with pytest.raises(InputError, match="has scans whose subject is not known"):
        context.main([str(tmp_path / "unknown" / "AD_NC"), *words[1:], "--out", str(tmp_path)])
    with pytest.raises(TypeError):  # files of other folds are not taken for those of these
        context.main([*words, "--out", str(tmp_path)])


# ---------------------------------------------------------------- the residual stream


def test_a_stream_in_16_bits_loses_a_branch_that_the_model_keeps():
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(40, layer_scale=1e-3), 1 + torch.rand(2, 40, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        kept = block(x)
        with residual.stream_in_16_bits():
            lost = block(x)
    assert kept.dtype == torch.float32 and (kept != x).any()
    assert torch.equal(lost, x.bfloat16())
    rows = residual.measure(CPU, 32, 2, repeats=1)
    assert set(rows) == {"16-bit stream", "float32 stream"}


@pytest.mark.parametrize("make_layer, shape", [
    (lambda: torch.nn.Conv2d(8, 8, 7, padding=3, groups=8), (4, 8, 16, 16)),
    (lambda: torch.nn.Linear(40, 160), (4, 8, 8, 40)),
    (torch.nn.GELU, (4, 1000)),
])  # fmt: skip
def test_bfloat16_is_imitated_to_the_bit_forwards_and_closely_backwards(make_layer, shape):
    """How often a kernel of PyTorch rounds within a convolution's gradient depends on the CPU: by
    1.2 % in all on one. The imitation rounds the weights and the gradient, each to bfloat16's 8
    bits, so it is about that close to the exact gradient."""
    torch.manual_seed(0)
    layer = make_layer()
    x = torch.randn(shape).bfloat16()

    def result(context, x):
        x = x.clone().requires_grad_()
        with context:
            y = layer(x)
        (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 1.375))
        return y.detach().float(), gradient.float()

    imitated, gradient = result(residual.imitation("float32"), x.float())
    real, real_gradient = result(torch.autocast("cpu", torch.bfloat16), x)
    exact_gradient = result(nullcontext(), x.float())[1]
    assert (imitated == real).float().mean() > 0.999  # ties may differ
    assert (imitated != layer(x.float())).float().mean() > 0.5
    assert 0 < (gradient - exact_gradient).norm() < 2**-7 * exact_gradient.norm()
    assert (gradient - real_gradient).norm() < 0.05 * real_gradient.norm()


def test_the_imitated_16_bit_stream_loses_what_bfloat16_loses():
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(40, layer_scale=1e-3), 1 + torch.rand(2, 40, 8, 8)
    with residual.imitation("16-bit"):
        assert torch.equal(block(x), x.bfloat16().float())
    with residual.imitation("float32"):
        assert (block(x) != x).any()


# ---------------------------------------------------------------- linear probe


def test_a_linear_read_out_finds_brightness_from_the_stem_on(loaded):
    scores = probe.probe(*loaded, device=CPU)
    assert list(scores) == ["stem", "stage 1", "stage 2", "stage 3", "head norm"]
    assert scores["stage 3"][0] == 1
    assert all(0 <= auroc <= 1 and spread > 0 for auroc, spread in scores.values())


def test_features_are_read_after_each_stage_of_a_convnext_and_each_pooling_of_a_cnn():
    assert len(probe.places(convnext("atto"))) == 6
    assert list(probe.places(make_model("cnn"))) == [f"stage {i}" for i in (1, 2, 3, 4)]


def test_a_read_out_of_a_class_with_one_subject_is_undefined(loaded):
    checkpoint, slices = loaded
    few = slices.where(~slices.index.scan.isin(["400", "401"]))
    scores = probe.probe(checkpoint, few, device=CPU)
    assert all(np.isnan(auroc) and spread > 0 for auroc, spread in scores.values())
    assert "undefined" in "\n".join(probe.format_probe({"run": scores}))


def test_the_probe_prints_a_table_and_draws_a_picture(run_folder, tmp_path, capsys):
    png = tmp_path / "probe.png"
    probe.main([str(png), str(run_folder)])
    assert "| after stage 3 " in capsys.readouterr().out
    assert np.asarray(Image.open(png).convert("L")).std() > 5


# ---------------------------------------------------------------- learning curves and tables


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Runs of two seeds on 6 and on 12 subjects, with the same test set."""
    root, test = tmp_path_factory.mktemp("sizes"), random_predictions(slices=2)
    runs = []
    for n in (12, 6):
        for seed in (0, 1):
            noise = np.random.default_rng(seed).normal(0, 12 / n, len(test))
            predicted = test.assign(logit=test.logit + noise)
            run = write_run(root / f"n{n}-s{seed}", predicted, seed=seed, subjects=n, model="atto")
            train = pd.DataFrame({"group": [f"t{i}" for i in range(n)], "split": "train"})
            held_out = pd.DataFrame({"group": test.group, "split": "test"})
            write_csv(run / "split.csv", pd.concat([train, held_out]))
            runs.append(run)
    return runs


def test_a_learning_curve_has_a_row_for_each_size_with_the_baseline_beside_it(
    sizes, tmp_path, capsys
):
    png = tmp_path / "curve.png"
    learning_curve.main([str(png), *map(str, sizes)])
    text = capsys.readouterr().out
    header, _, six, twelve = [line for line in text.splitlines() if line.startswith("|")]
    names = [name.strip() for name in header.split("|")[1:-1]]
    assert names == ["training subjects", "ConvNeXt atto", "logistic regression on a blur"]
    assert six.startswith("| 6 ") and twelve.startswith("| 12 ")
    assert six.count("[") == twelve.count("[") == 2
    assert "LEAKY" not in text
    assert np.asarray(Image.open(png).convert("L")).std() > 5


def test_a_learning_curve_averages_over_seeds_and_names_leaks(sizes, tmp_path):
    test = random_predictions(slices=2)
    leaky = write_run(tmp_path / "leaky", test, seed=2, subjects=6, model="atto", leaks=["a leak"])
    (leaky / "split.csv").write_text((sizes[2] / "split.csv").read_text())
    curves, leaks = learning_curve.learning_curve([*sizes, leaky])
    assert leaks == ["LEAKY: a leak"]
    aurocs = []
    for run in (*sizes[2:], leaky):
        _, scores = stress.read_run(run)
        aurocs.append(scores["subject"]["auroc"])
    assert curves["ConvNeXt atto"][6]["auroc"] == pytest.approx(np.mean(aurocs))


def test_a_table_of_runs_has_the_scores_that_each_run_wrote(run_folder):
    lines = tables.format_runs([run_folder])
    assert len(lines) == 2 + 2 * 3  # the header; val and test, three units each
    assert lines[5].split("|")[1:6] == [
        " run ",
        " test ",
        " slice   ",
        " 30 ",
        " 1.000 [0.541, 1.000] ",
    ]


def test_each_severity_is_scored_against_all_controls(sizes, tmp_path):
    test = random_predictions(slices=2)
    scans = test.drop_duplicates("scan")[["scan", "subject", "label"]]
    is_ad = scans.label == "AD"
    mild = is_ad & scans.subject.isin(["p1", "p3", "p5"])
    scans["CDR"] = np.select([mild, is_ad], ["0.5", "1"], "0")
    file = tmp_path / "subjects.csv"
    scans.to_csv(file, index=False)

    n_ad, n_nc = scans.subject[is_ad].nunique(), scans.subject[~is_ad].nunique()
    rows = [line.split("|") for line in tables.format_by(sizes[:2], file, "CDR")[2:]]
    cells = [(row[1].strip(), int(row[2])) for row in rows]
    assert cells == [("0.5", 3 + n_nc), ("1", n_ad - 3 + n_nc)]

    scans[~mild].to_csv(file, index=False)
    n_missing = mild.sum()
    with pytest.raises(InputError, match=f"has no cdr of {n_missing} AD scans"):
        tables.format_by(sizes[:2], file, "cdr")


# ---------------------------------------------------------------- weights that are shipped


def test_only_weights_that_saw_drawings_are_shipped_and_without_paths(run_folder, tmp_path, capsys):
    with pytest.raises(InputError, match="not trained on drawings alone"):
        ship.main([str(run_folder), str(tmp_path / "a.pth"), "--real", "Nothing.", "--maps", "No."])
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    checkpoint["exposure"]["drawn"] = True
    del checkpoint["format"]
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "best_model.pth", **checkpoint)
    file = tmp_path / "weights" / "b.pth"
    sentences = ["--real", "On real slices it is worth nothing.", "--maps", "They show nothing."]
    ship.main([str(tmp_path / "run"), str(file), *sentences])
    assert load_checkpoint(file)["maps"] == "They show nothing."
    (difference,) = re.findall(r"p_AD from float32 is (\S+),", capsys.readouterr().out)
    assert float(difference) < 1e-3

    shipped = load_checkpoint(file)
    assert describe_distrust(shipped).endswith("something. On real slices it is worth nothing.")
    assert {tensor.dtype for tensor in shipped["weights"].values()} <= {torch.float16, torch.int64}
    assert str(tmp_path.parent) not in str({**shipped, "weights": None})
    wide = {"weight": torch.tensor([1e6])}
    with pytest.raises(InputError, match="weight has values beyond those of float16"):
        ship.halve(wide)


def test_ways_to_use_a_few_subjects_are_compared(varied, ad_nc, run_folder, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "EPOCHS", 1)
    monkeypatch.setattr(finetune, "RESAMPLES", 50)
    monkeypatch.setitem(finetune.train.SMALL, "epochs", 1)
    model = ["--checkpoint", str(run_folder / "best_model.pth")]
    words = [str(varied / "AD_NC"), *model]
    finetune.main([*words, "--subjects", "6", "--seeds", "2", "--slices", "3"])
    text = capsys.readouterr().out
    assert "6 subjects, half of them AD; the test are 6 others, 3 of them AD; 2 draws" in text
    for name in finetune.METHODS:
        assert f"| {name} " in text
    assert text.count("] |") >= 2 * len(finetune.METHODS) - 1

    with pytest.raises(InputError, match="6 subjects of a class are too few; expected more than 9"):
        finetune.main([*words, "--subjects", "18"])
    with pytest.raises(InputError, match="best_model.pth has seen 60 slices of .* their subjects"):
        finetune.main([str(ad_nc), *model])


def test_slices_of_a_subject_are_thinned_out_evenly(ad_nc):
    slices = decode_set(ad_nc, progress=None)
    few = finetune.thin_out(slices, 3)
    assert few.index.index.tolist() == list(range(len(few.index)))
    assert set(few.index.subject) == set(slices.index.subject)
    for subject, rows in few.index.groupby("subject"):
        whole = slices.index[slices.index.subject == subject].sort_values(["scan", "slice"])
        places = whole.path.tolist()
        kept = sorted(places.index(path) for path in rows.path)
        n = len(places)
        assert kept == [-(-part * n // 3) for part in range(3)]
    assert finetune.thin_out(slices, 1000).index.path.tolist() == slices.index.path.tolist()


def test_tries_beyond_the_dark_share_are_scored_with_it(varied, ad_nc, monkeypatch, capsys):
    monkeypatch.setitem(beyond.train.SMALL, "epochs", 1)
    monkeypatch.setattr(beyond, "IMAGE_SIZE", 32)
    ways = ("the recipe", "grey divided by the head's median", "classes, beside the share")
    monkeypatch.setattr(beyond, "WAYS", {name: beyond.WAYS[name] for name in ways})
    beyond.main([str(varied / "AD_NC"), "--sets", str(ad_nc), "--seeds", "1"])
    text = capsys.readouterr().out
    assert f"{ad_nc}: 18 subjects, dark share alone " in text
    for name in beyond.WAYS:
        assert f"| {name} " in text


def test_the_label_of_the_hippocampus_tells_the_disease_and_not_the_other_sizes(varied):
    slices = decode_set(varied / "AD_NC", progress=None)
    table = pd.read_csv(varied / "latents.csv", dtype={"scan": str}).set_index("scan")
    p_ad = pd.Series(beyond.hippocampus(slices), slices.index.scan).groupby(level=0).first()
    table = table.loc[p_ad.index]
    train = table.split == "train"
    label = np.log(p_ad / (1 - p_ad))
    for name in ("ventricle", "sulcus"):
        assert abs(np.corrcoef(label[train], np.log(table[name][train]))[0, 1]) < 0.01
    assert np.corrcoef(label, table.atrophy)[0, 1] > 0.7
    assert p_ad[table.label == "AD"].mean() > p_ad[table.label == "NC"].mean() + 0.2


def test_a_network_beside_the_share_learns_what_the_share_leaves(varied, monkeypatch):
    seen = []
    monkeypatch.setattr(
        beyond.train, "train_one_epoch",
        lambda state, batches, criterion, **options: seen.append((batches, criterion)) or {},
    )  # fmt: skip
    monkeypatch.setitem(beyond.train.SMALL, "epochs", 1)
    slices = decode_set(varied / "AD_NC", progress=None).part("train")
    way = beyond.Way(label=beyond.classes, beside_share=True)
    beyond.train_network(slices, way, torch.device("cpu"), seed=0)
    ((batches, criterion),) = seen
    labels, nothing = batches.labels, torch.zeros(len(slices.index), 2)
    offset = torch.from_numpy(beyond.share_logits(slices)).float()
    target = torch.from_numpy(slices.is_ad.astype(np.float32))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(offset, target)
    smoothed = torch.nn.functional.binary_cross_entropy_with_logits(offset, 0.9 * target + 0.05)
    loss = criterion(nothing, labels).mean()
    assert min(abs(loss - expected), abs(loss - smoothed)) < 1e-5


def test_normalised_slices_have_one_median(ad_nc):
    slices = decode_set(ad_nc, progress=None)
    changed = beyond.normalised(slices)
    for row in slices.rows[:5]:
        head = find_head(slices.images[row])
        assert abs(np.median(changed.images[row][head]) - beyond.MIDDLE) <= 2


def test_weights_are_pulled_to_the_start_and_statistics_kept():
    torch.manual_seed(0)
    model = finetune.keep_statistics(make_model("narrow"))
    loss = finetune.pull_to_start(model, strength=2.0)
    logits, labels = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    near = loss(logits, labels)
    with torch.no_grad():
        model.head.bias += 3.0
    far = loss(logits, labels)
    assert torch.allclose(far - near, torch.tensor(18.0))

    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.randn(8, 1, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_map_is_compared_with_the_fluid_and_fluid_is_filled(varied, capsys):
    pytest.importorskip("captum")
    pixels = np.zeros((40, 40), np.uint8)
    pixels[5:35, 5:35] = 120
    pixels[10:14, 10:20] = 30
    fluid, head, median = fluid_maps.find_fluid(pixels)
    assert (fluid.sum(), head.sum(), median) == (40, 900, 120)
    assert set(np.unique(fluid_maps.fill(pixels, fluid, median))) == {0, 120}
    assert fluid_maps.find_fluid(np.zeros((8, 8), np.uint8))[1].sum() == 0

    fluid_maps.main([str(varied / "AD_NC"), "--slices", "12"])
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == list(fluid_maps.COLUMNS.values())
    share = float(row.split("|")[3].split()[0])
    assert 0 < share < 0.5


def test_fluid_is_compared_with_a_map_of_the_same_crop():
    pytest.importorskip("captum")
    checkpoint = load_checkpoint(fluid_maps.PHANTOM)
    pixels = np.zeros((112, 212), np.uint8)
    pixels[6:106, 20:192] = 120
    pixels[40:70, 25:45] = 30  # left of the model's centre crop, which begins at 50
    (row,) = fluid_maps.look_at(checkpoint, pixels[None], CPU)
    assert row["fluid"] == row["map"] == row["turned"] == 0
    pixels[50:70, 100:120] = 30
    (row,) = fluid_maps.look_at(checkpoint, pixels[None], CPU)
    assert row["fluid"] == pytest.approx(400 / (100 * 112), abs=0.005) and row["map"] > 0


def test_the_true_gain_of_two_scores_is_that_of_many_subjects(monkeypatch, capsys):
    monkeypatch.setattr(both_together, "N_AD", 4000)
    monkeypatch.setattr(both_together, "N_NC", 4000)
    folds = both_together.draw_folds(0.5, np.random.default_rng(0))
    d, covariance = both_together.distances(), np.array([[1, 0.5], [0.5, 1]])
    covariance = covariance + np.eye(2) * both_together.NOISE**2 / both_together.SLICES
    best = np.linalg.solve(covariance, d)
    together = [both_together.two_logits(fold) @ best for fold in folds]
    gain = both_together.gain(folds, together)
    assert gain == pytest.approx(both_together.true_gain(0.5), abs=0.005)

    monkeypatch.undo()
    monkeypatch.setattr(both_together, "REPEATS", 2)
    both_together.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(both_together.CORRELATIONS)
