"""Models that are worth nothing: the last lines of the run, metrics.json and the report say so."""

import json

import numpy as np
import pytest
from conftest import train_small, write_slice
from PIL import Image
from test_report import Page

import predict
from adnc.errors import InputError
from adnc.scoring.assess import NOT_SHOWN, SWAPPED


def write_noise(path, bright, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (40, 48), np.uint8)
    Image.fromarray(noise).save(path)


def write_subjects(root, write, swapped=False, subjects=12):
    """A set of `subjects` in train and as many in test, half of them AD, with two slices each. If
    `swapped`, the labels of test are the wrong ones."""
    rows = ["scan,subject"]
    for split, first in (("train", 100), ("test", 200)):
        for scan in range(first, first + subjects):
            is_ad = scan % 2 == 1
            label = "AD" if is_ad != (swapped and split == "test") else "NC"
            for number in (70, 71):
                path = root / "AD_NC" / split / label / f"{scan}_{number}.png"
                write(path, is_ad, 1000 * scan + number)
            rows.append(f"{scan},p{scan}")
    (root / "subjects.csv").write_text("\n".join(rows) + "\n")
    return root / "AD_NC"


@pytest.mark.parametrize("kind, verdict, said", [
    ("noise", NOT_SHOWN, "NOT shown to beat guessing"),
    ("swapped", SWAPPED, "WORSE THAN CHANCE: are AD and NC swapped"),
    ("lr 50", NOT_SHOWN, "NOT shown to beat guessing"),
])  # fmt: skip
def test_the_truth_about_a_useless_model_is_in_three_places(tmp_path, kind, verdict, said):
    write = write_noise if kind == "noise" else write_slice
    root = write_subjects(tmp_path, write, swapped=kind == "swapped")
    flags = ["--epochs", "2", "--keep", "last"]
    if kind == "lr 50":
        flags += ["--lr", "50", "--model", "cnn"]
    run = train_small(root, tmp_path / "run", *flags)

    conclusion = json.loads((run / "test" / "metrics.json").read_text())["conclusion"]
    assert conclusion["verdict"] == verdict
    lines = (run / "training_log.txt").read_text().splitlines()
    assert lines[-3:] == conclusion["sentences"] and said in lines[-2]

    words = ["--checkpoint", run, "--out", tmp_path / "out", "--report", tmp_path / "page.html"]
    predict.main([str(root / "test"), *map(str, words)])
    page = Page(tmp_path / "page.html")
    assert page.words().startswith(f"No verdicts are given. This model: {verdict}. ")
    assert set(page.verdicts.values()) == {"no verdict"}


def test_one_subject_a_class_and_tiny_crops_are_refused(tmp_path):
    alone = write_subjects(tmp_path / "alone", write_slice, subjects=2)
    with pytest.raises(InputError, match="have 1 NC and 1 AD subjects together; expected two or"):
        train_small(alone, tmp_path / "run", "--epochs", "1")
    assert not (tmp_path / "run").exists()

    def write_crop(path, bright, seed):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), 150 if bright else 90).save(path)

    crops = write_subjects(tmp_path / "crops", write_crop)
    with pytest.raises(InputError, match="2 x 2 pixels; expected 16 to 4096"):
        train_small(crops, tmp_path / "run", "--epochs", "1")
