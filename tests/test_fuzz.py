"""Damaged files, folders and checkpoints, by the thousand: each is used or refused in a sentence."""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import CONVERTED, JPEG, REFUSED, L, encoded, rotated, use

import utils as checkpoint
import dataset
from adnc import files
from adnc.data import index as listing
import predict
from adnc.data import pixels as slices
import train

SEEDS = [JPEG, rotated(), *(data for data, *_ in CONVERTED.values()), *(data for data, _ in REFUSED.values() if
                                                                     len(data) < 10_000)]  # fmt: skip
FUZZ = settings(deadline=20_000, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
MUTATION = st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "swap"]), st.integers(0, 2**31),
                     st.binary(max_size=12))  # fmt: skip


def mutated(data, mutations):
    data = bytearray(data)
    for kind, at, extra in mutations:
        at %= len(data) + 1
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << (len(extra) % 8)
        elif kind == "set":
            data[at : at + len(extra)] = extra
        elif kind == "cut":
            del data[at : at + 1 + 7 * len(extra)]
        elif kind == "insert":
            data[at:at] = extra
        elif kind == "repeat":
            data[at:at] = data[: 10 * len(extra)]
        elif kind == "swap":
            data[at:], data[:at] = data[:at], data[at:]
    return bytes(data)


def test_mutated_files_are_used_or_refused_in_a_sentence(tmp_path, repeats):
    outcomes, n = {True: 0, False: 0}, repeats(1000, 5000)

    @settings(FUZZ, max_examples=n)
    @given(st.sampled_from(SEEDS), st.lists(MUTATION, min_size=1, max_size=6), st.sampled_from(["png", "jpeg"]))
    def fuzz(seed, mutations, extension):
        path = tmp_path / f"1_1.{extension}"
        path.write_bytes(mutated(seed, mutations))
        pixels, error, stats = use(path, (40, 48))
        with slices.quiet_pillow():
            slices.header(path)
        slices.hash_pixels(pixels)
        assert pixels.shape == (40, 48) and np.isfinite(stats).all()
        assert error is None or (isinstance(error, str) and 5 < len(error) < 300)
        outcomes[error is None] += 1

    fuzz()
    assert min(outcomes.values()) > 0.06 * n  # neither a toy of a mutation nor only noise


NAME = st.one_of(
    st.sampled_from(["100_70.jpeg", "100_70.png", "200_70.jpeg", "x.jpeg", ".DS_Store", "1_1.JPG", "a_b_3.jpg"]),
    st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=12).map(
        lambda text: f"{text}_1.png"),
)  # fmt: skip
ENTRY = st.tuples(st.sampled_from(["train/AD", "train/NC", "test/AD", "test/NC", "train", "."]), NAME,
                  st.sampled_from(["good", "good", "empty", "text", "folder", "link", "pipe"]))  # fmt: skip
METADATA = st.sampled_from([
    None, "", "[]", "{", '{"100": 1}', '{"100": {"label": 9}}', '{"1": {"raw": "ADNI_001_S_0001_x ADNI_002_S_0002_"}}',
    '{"100": {"label": [1], "raw": null}}', "\ufeff{}", '{"a": ' + "[" * 3000 + "]" * 3000 + "}",
])  # fmt: skip


def build(folder, entries, metadata, table):
    for place in ("train/AD", "train/NC", "test/AD", "test/NC"):
        (folder / "AD_NC" / place).mkdir(parents=True)
    for place, name, kind in entries:
        path = folder / "AD_NC" / place / name
        try:
            if os.path.lexists(path):
                continue
            if kind in ("good", "empty", "text"):
                path.write_bytes({"good": encoded(L), "empty": b"", "text": b"text"}[kind])
            elif kind == "folder":
                path.mkdir()
            elif kind == "link":
                path.symlink_to("nowhere")
            else:
                os.mkfifo(path)
        except OSError:  # a name that this file system does not take
            continue
    for name, content in (("meta_data_with_label.json", metadata), ("subjects.csv", table)):
        if content is not None:
            (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    return folder / "AD_NC"


def audit(root):
    list(dataset.audit(dataset.decode_set(root, keep=False, bar=None)))


def test_mutated_folders_are_used_or_refused_in_a_sentence(monkeypatch, repeats):
    outcomes, n = {True: 0, False: 0}, repeats(150, 500)
    args = train.parse_args([*SMALL, "--skip-bad", "--no-cache"])

    @settings(FUZZ, max_examples=n)
    @given(st.lists(ENTRY, max_size=12), METADATA,
           st.one_of(st.none(), st.text(max_size=20), st.just("scan,subject\n100,a\n100,b\n")),
           st.booleans())  # fmt: skip
    def fuzz(entries, metadata, table, whole):
        with tempfile.TemporaryDirectory() as folder:
            if whole:  # so that something is left to use
                entries = [(f"{split}/{label}", f"{scan}_1.png", "good") for split, label, scans in (
                    ("train", "AD", (1, 2, 3)), ("train", "NC", (4, 5, 6)), ("test", "AD", (7,)), ("test", "NC", (8,)))
                    for scan in scans] + entries  # fmt: skip
            root = build(Path(folder), entries, metadata, table)
            for work in (lambda: dataset.load_set(args, root, None), lambda: listing.list_inputs([root / "test"]),
                         lambda: audit(root),
                         lambda: listing.list_inputs([root / "train" / name for _, name, _ in entries] or [root])):
                try:
                    work()
                    outcomes[True] += 1
                except (ValueError, OSError) as problem:
                    assert 5 < len(str(problem)) and "\x00" not in str(problem)
                    outcomes[False] += 1

    fuzz()
    assert min(outcomes.values()) > 100


def test_mutated_checkpoints_are_refused_in_a_sentence_or_equal(run_folder, tmp_path):
    """The small parts of a checkpoint, each byte of which says something."""
    small = checkpoint.load_checkpoint(run_folder / "best_model.pth")
    small["weights"] = {"head.bias": small["weights"]["head.bias"]}
    small.pop("format")
    checkpoint.save_checkpoint(tmp_path / "m.pth", **small)
    data = (tmp_path / "m.pth").read_bytes()

    @settings(FUZZ, max_examples=300)
    @given(st.lists(MUTATION, min_size=1, max_size=3))
    def fuzz(mutations):
        (tmp_path / "x.pth").write_bytes(mutated(data, mutations))
        try:
            checkpoint.load_checkpoint(tmp_path / "x.pth")
        except ValueError as problem:
            assert str(tmp_path / "x.pth") in str(problem) and len(str(problem)) < 400

    fuzz()


def test_a_whole_prediction_of_many_mutated_files_ends_with_a_table(run_folder, ad_nc, tmp_path, capsys):
    generator = random.Random(0)
    (tmp_path / "in").mkdir()
    for number in range(400):
        changes = [(generator.choice(["flip", "set", "cut", "insert", "swap"]), generator.randrange(2**31),
                    generator.randbytes(generator.randrange(12))) for _ in range(generator.randrange(1, 4))]
        (tmp_path / "in" / f"{number}_1.{generator.choice(['png', 'jpeg'])}").write_bytes(
            mutated(generator.choice(SEEDS), changes))
    words = [str(tmp_path / "in"), "--checkpoint", str(run_folder / "best_model.pth"), "--out", str(tmp_path / "out")]
    predict.main(predict.parse_args(words))
    table = files.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(table) == 400 and (table.error.notna() ^ table.p_AD.notna()).all()
    assert table.error.notna().sum() > 20 < table.p_AD.notna().sum()
