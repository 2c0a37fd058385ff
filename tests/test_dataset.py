"""dataset.py: the audit, the split set, the inputs of a prediction."""

import command
import numpy as np
import pytest
from conftest import ROOT, SCANS, train_steps, write_set
from PIL import Image

import dataset
import predict
from adnc.data import subjects
from adnc.data.index import list_inputs
from adnc.data.pixels import common_size
from adnc.scoring.metrics import window_vote
from dataset import read_index
from utils import load_checkpoint


def audit(root):
    """The lines of the audit of a folder."""
    return list(dataset.audit(dataset.decode_set(root, use_cache=False, progress=None)))


# ---------------------------------------------------------------- audit


def test_the_audit_counts_and_finds_subjects_in_both_train_and_test(tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    text = "\n".join(audit(write_set(tmp_path, scans)))
    assert "LEAK: 2 of the 6 test subjects are also in train" in text
    assert "test AD         15       3         3" in text
    assert "48 wide x 40 high (90 slices)" in text and "in colour" not in text
    assert "slices per scan: 5 (18 scans)" in text and "slice numbers: 70 to 74" in text


def test_slices_that_are_resized_or_lose_their_colour_are_counted_by_class(tmp_path):
    root = write_set(tmp_path)
    for path in root.glob("test/AD/*"):
        Image.open(path).crop((0, 0, 30, 40)).save(path)
    for path in root.glob("train/NC/*"):
        grey = Image.open(path)
        Image.merge("RGB", (grey, grey, Image.new("L", grey.size))).save(path)
    notes = dataset.decode_set(root, use_cache=False, progress=None).notes
    resized = "15 of 90 slices (AD 15) are not 48 wide x 40 high"
    assert f"{resized}, and were scaled and cropped to that" in notes
    assert "30 of 90 slices (NC 30) are in colour, and were turned to grey" in notes
    plain = dataset.decode_set(write_set(tmp_path / "plain"), use_cache=False, progress=None)
    assert plain.notes == []


def test_without_metadata_the_audit_reports_what_it_cannot_check(tmp_path):
    lines = audit(write_set(tmp_path, subjects=False))
    assert any(
        line.startswith("NOT CHECKED: the subject of 18 of 18 scans is unknown") for line in lines
    )


def test_an_id_with_scans_of_both_classes_is_suspicious_in_audit_and_log(tmp_path):
    root = write_set(tmp_path, SCANS | {"100": ("train", "AD", "x"), "200": ("train", "NC", "x")})
    (line,) = [line for line in audit(root) if line.startswith("SUSPICIOUS")]
    run = train_steps(root, tmp_path / "run", "--epochs", "1")
    assert line in (run / "training_log.txt").read_text()


def test_the_window_vote_sees_a_shortcut_and_only_a_shortcut(tmp_path):
    for label, window in (("AD", range(67, 70)), ("NC", range(80, 83))):
        write_set(
            tmp_path, {scan: value for scan, value in SCANS.items() if value[1] == label}, window
        )
    index = read_index(tmp_path / "AD_NC")
    assert window_vote(index) == 1.0
    assert window_vote(index.assign(slice=0)) == 0.5


def test_the_audit_command_prints_it_and_wrong_input_is_one_line(ad_nc, tmp_path):
    done = command.run(ROOT / "dataset.py", ad_nc)
    assert done.returncode == 0 and "none of the 6 known test subjects is in train" in done.stdout
    done = command.run(ROOT / "dataset.py", tmp_path)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


def test_the_audit_ends_with_status_1_if_training_would_refuse_the_set(tmp_path):
    root = write_set(
        tmp_path, {scan: value for scan, value in SCANS.items() if scan[0] != "1" or scan == "100"}
    )
    done = command.run(ROOT / "dataset.py", root)
    assert done.returncode == 1 and "training would refuse this set" in done.stderr
    write_set(tmp_path)
    (root / "train" / "AD" / "100_70.jpeg").write_bytes(b"")
    done = command.run(ROOT / "dataset.py", root)
    assert (
        done.returncode == 1
        and "1 file cannot be used" in done.stderr
        and "100_70.jpeg" in done.stderr
    )


def test_the_audit_writes_no_cache_and_training_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_set(tmp_path / "set")
    audit(root)
    assert not (tmp_path / "cache").exists()
    first = dataset.decode_set(root, progress=None)
    assert list((tmp_path / "cache").rglob("*.npy"))
    again = dataset.decode_set(root, progress=None)
    assert np.array_equal(first.images, again.images) and first.index.equals(again.index)


def test_pictures_of_the_training_slices_are_drawn(ad_nc, tmp_path, pictures):
    words = [f"--{name}={tmp_path / name}.png" for name in ("montage", "augmented", "mean")]
    dataset.main([str(ad_nc), *words])
    assert all(
        (tmp_path / f"{name}.png").stat().st_size > 5000
        for name in ("montage", "augmented", "mean")
    )
    with pytest.raises(SystemExit):
        dataset.main([str(ad_nc), f"--mean={ad_nc / 'train' / 'AD' / 'x_1.png'}"])


# ---------------------------------------------------------------- one rule for 16 bits


def test_a_set_of_12_bits_is_read_as_such_and_predicted_by_the_same_rule(tmp_path, capsys):
    """A dark slice of it is not brightened because it is predicted alone."""
    root = write_set(tmp_path)
    for path in sorted(root.rglob("*.jpeg")):
        values = np.asarray(Image.open(path)).astype(np.uint16) * 16
        Image.fromarray(values).save(path.with_suffix(".png"))
        path.unlink()
    run = train_steps(root, tmp_path / "run", "--epochs", "1")
    assert "are read as 12-bit" in (run / "training_log.txt").read_text()
    checkpoint = load_checkpoint(run / "best_model.pth")
    path = root / "test" / "NC" / "400_70.png"
    alone = dataset.load_inputs(
        list_inputs([path]),
        slice_size=checkpoint["slice_size"],
        bits=checkpoint["bits"],
        progress=None,
    )
    whole = dataset.decode_set(root, progress=None)
    row = whole.index.row[whole.index.path == str(path)].item()
    assert checkpoint["bits"] == 12 and np.array_equal(alone.images[0], whole.images[row])

    values = np.asarray(Image.open(path))
    Image.fromarray(values * (8192 // values.max())).save(tmp_path / "other_1.png")
    words = [str(path), str(tmp_path / "other_1.png"), "--out", str(tmp_path / "out")]
    predict.main([*words, "--checkpoint", str(run / "best_model.pth")])
    assert "holds values up to" in capsys.readouterr().err


# ---------------------------------------------------------------- real slices


def test_oasis_is_what_its_readme_says(oasis):
    index = read_index(oasis)
    counts = index.groupby(["split", "label"]).agg(
        slices=("path", "size"), subjects=("subject", "nunique")
    )
    assert counts.slices.to_dict() == {
        ("test", "AD"): 640, ("test", "NC"): 448, ("train", "AD"): 1856, ("train", "NC"): 1408,
    }  # fmt: skip
    assert counts.subjects.tolist() == [20, 14, 58, 44]
    assert subjects.shared_subjects(index) == []
    assert tuple(common_size(index.path[:10])) == (208, 176)
