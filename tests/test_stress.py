"""Changes do what they say, and a model is called fragile where it is."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from tools import evaluate
from docs.experiments import stress
from adnc.scoring.assess import read_run
from modules import convnext, make_model
from adnc.distributed import Runtime

CPU = Runtime(torch.device("cpu"))


def load(run):
    return stress.load_test(run, read_run(run)[0])


@pytest.fixture
def pixels():
    """A bright square on black with a texture, uint8 (40, 48)."""
    picture = np.zeros((40, 48), np.uint8)
    picture[10:30, 14:34] = np.random.default_rng(0).integers(80, 180, (20, 20))
    return picture


def test_changes_do_what_their_names_say(pixels):
    moved = stress.shift(pixels, 4)
    assert np.array_equal(moved[4:, 4:], pixels[:-4, :-4]) and not moved[:4].any() and not moved[:, :4].any()
    assert np.array_equal(stress.rotate(pixels, 0), pixels)
    turned = stress.rotate(pixels, 15)
    assert turned.shape == pixels.shape and (turned != pixels).mean() > 0.1
    assert (stress.gamma(pixels, 1.4) <= pixels).all() and (stress.gamma(pixels, 0.7) >= pixels).all()
    assert stress.contrast(pixels, 0.5).max() == pytest.approx(pixels.max() / 2, abs=1)
    noisy = stress.noise(pixels, 10)
    assert np.array_equal(noisy, stress.noise(pixels, 10)) and not noisy[pixels == 0].any()
    assert np.std(noisy[pixels > 0].astype(float) - pixels[pixels > 0]) == pytest.approx(10, rel=0.15)
    assert stress.blur(pixels, 2).std() < pixels.std() and stress.blur(pixels, 2).shape == pixels.shape
    coarse, fine = (np.abs(stress.jpeg(pixels, q).astype(float) - pixels).mean() for q in (10, 95))
    assert coarse > 2 * fine > 0
    sides = stress.bias_field(pixels, 0.4)
    assert sides[:, 14].sum() < pixels[:, 14].sum() and sides[:, 33].sum() > pixels[:, 33].sum()


def test_every_change_is_a_row_with_its_share_and_interval_and_the_first_changes_nothing(run_folder):
    table = stress.stress(*load(run_folder), CPU)
    assert len(table) == 1 + sum(len(levels) for _, levels, _ in stress.CHANGES.values()) + len(stress.KEPT)
    first = table.iloc[0]
    assert (first.change, first.changed, first.n) == ("none", 0, 6) and first.accuracy == 1 and first.auroc == 1
    for row in table.itertuples():
        low, high = row.changed_ci95
        assert 0 <= low <= row.changed <= high <= 1
    # this set tells its classes apart by brightness alone: half of it is another class, a turn is nothing
    change = table.set_index(["change", "level"]).changed
    assert change["contrast", "0.7 times"] > 0 or change["gamma", "1.4"] > 0
    assert change["rotation", "2 degrees"] == change["slices left", "0.5 of them"] == 0


def test_missing_slices_leave_every_scan_one(run_folder, monkeypatch):
    seen, genuine = [], stress.predict_slices
    monkeypatch.setattr(stress, "CHANGES", {})

    def predict(checkpoint, part, *words, **more):
        seen.append(part)
        return genuine(checkpoint, part, *words, **more)

    monkeypatch.setattr(stress, "predict_slices", predict)
    stress.stress(*load(run_folder), CPU)
    half, few = (part.index.groupby("scan").size() for part in seen[-2:])
    assert set(half) <= {2, 3} and set(few) == {1} and len(half) == len(few) == 6  # of five


def test_a_read_out_finds_brightness_from_the_stem_on(run_folder):
    scores = stress.probe(*load(run_folder), CPU)
    assert list(scores) == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head norm"]
    assert scores["stage 4"][0] == 1 and all(0 <= auroc <= 1 and spread > 0 for auroc, spread in scores.values())
    assert list(stress.stages(make_model("cnn"))) == [f"stage {i}" for i in (1, 2, 3, 4)]
    assert len(stress.stages(convnext("atto"))) == 6


def test_a_read_out_of_a_class_with_one_subject_is_undefined(run_folder, capsys, monkeypatch):
    one, slices = load(run_folder)
    few = slices.where(~slices.index.scan.isin(["400", "401"]))
    assert all(np.isnan(auroc) and spread > 0 for auroc, spread in stress.probe(one, few, CPU).values())
    monkeypatch.setattr(stress, "CHANGES", {})
    monkeypatch.setattr(stress, "load_test", lambda *given: (one, few))
    evaluate.main(evaluate.parse_args([str(run_folder), "--stress"]))
    assert "| after stage 3   | undefined" in capsys.readouterr().out


def test_the_command_prints_tables_and_writes_them(run_folder, tmp_path, capsys, monkeypatch, pictures):
    monkeypatch.setattr(stress, "CHANGES", {"shift": (stress.shift, (1, 8), "px")})
    evaluate.main(evaluate.parse_args([str(run_folder), "--stress", "--out", str(tmp_path / "out")]))
    told = capsys.readouterr().out
    assert "| shift 8 px" in told and "| after stage 3" in told and ": changed" in told
    table = pd.read_csv(tmp_path / "out" / "stress.csv")
    assert set(table.run) == {str(run_folder)} and (tmp_path / "out" / "stress.png").stat().st_size > 5000


def test_memory_that_runs_out_is_one_sentence(run_folder, monkeypatch):
    def fail(*given, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(stress, "predict_slices", fail)
    with pytest.raises(OSError, match="the memory ran out .Def.*take a larger machine, or less at once"):
        evaluate.main(evaluate.parse_args([str(run_folder), "--stress"]))


def test_a_run_without_its_slices_or_model_is_refused(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "best_model.pth").unlink()
    with pytest.raises(ValueError, match="has no best_model.pth; expected the folder of a finished run"):
        load(run)
    path = run_folder / "test" / "predictions.csv"
    shutil.copy(run_folder / "best_model.pth", run)
    (run / "test" / "predictions.csv").write_text(path.read_text().replace("300_70.jpeg", "300_79.jpeg"))
    with pytest.raises(ValueError, match="1 test slices of .* are not where they were"):
        load(run)
