import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCANS, write_set, write_slice
from PIL import Image
from torchvision.transforms import v2

import dataset
from dataset import audit, fold_index, read_index, split_index

TF = v2.functional


# ---------------------------------------------------------------- index


def test_index_has_a_row_a_slice_and_knows_three_units(ad_nc):
    index = read_index(ad_nc)
    assert list(index.columns) == ["path", "label", "scan", "slice", "subject", "split"]
    assert len(index) == 18 * 5 and index.scan.nunique() == 18
    row = index[(index.scan == "301") & (index.slice == 72)].iloc[0]
    assert (row.label, row.subject, row.split) == ("AD", "ta1", "test")
    assert Image.open(row.path).size == (48, 40)


def test_the_parent_of_ad_nc_will_do(ad_nc):
    assert read_index(ad_nc.parent).equals(read_index(ad_nc))


def test_junk_is_passed_over_and_extensions_may_be_of_any_case(tmp_path):
    root = write_set(tmp_path)
    folder = root / "train" / "AD"
    for name in (".DS_Store", "._100_70.jpeg", "notes.txt", "Thumbs.db"):
        (folder / name).write_bytes(b"junk")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
        write_slice(folder / name / "100_70.jpeg", True, 0)
    for extension in ("JPG", "png", "JPEG"):
        write_slice(folder / f"x_y_{len(extension)}{ord(extension[0])}.{extension}", True, 0)
    index = read_index(root)
    assert len(index) == 18 * 5 + 3
    assert (index.scan == "x_y").sum() == 3  # the scan is all before the last underscore


@pytest.mark.parametrize("name", ["holiday.jpeg", "100_.png", "_70.jpeg", "100_7a.jpg", "1_99999999999999999999.png"])
def test_an_image_of_another_name_is_an_error_that_names_it(tmp_path, name):
    root = write_set(tmp_path)
    write_slice(root / "test" / "NC" / name, False, 0)
    with pytest.raises(ValueError, match=f"{name} is not named <scan>_<slice>"):
        read_index(root)


def test_a_missing_or_empty_class_folder_is_an_error_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="train/AD is not a folder; expected AD_NC with"):
        read_index(tmp_path)
    root = write_set(tmp_path, {k: v for k, v in SCANS.items() if v[:2] != ("test", "NC")})
    (root / "test" / "NC").mkdir()
    with pytest.raises(ValueError, match="test/NC holds no images"):
        read_index(root)


def test_a_subfolder_with_slices_is_not_silently_lost(tmp_path):
    root = write_set(tmp_path)
    write_slice(root / "train" / "AD" / "more" / "900_70.jpeg", True, 0)
    with pytest.raises(ValueError, match="more is a folder"):
        read_index(root)


@pytest.mark.parametrize("twin, sentence", [
    (("train", "NC"), "of both classes"), (("test", "AD"), "in both train and test"),
])  # fmt: skip
def test_a_scan_stands_in_one_class_and_one_split(tmp_path, twin, sentence):
    root = write_set(tmp_path)
    write_slice(root / twin[0] / twin[1] / "100_99.jpeg", True, 0)
    with pytest.raises(ValueError, match=f"scan 100 stands {sentence}"):
        read_index(root)


def test_a_slice_that_is_there_twice_is_an_error(tmp_path):
    root = write_set(tmp_path)
    write_slice(root / "train" / "AD" / "100_70.png", True, 0)
    with pytest.raises(ValueError, match="100_70.jpeg and .*100_70.png stands there twice"):
        read_index(root)


def write_metadata(root, **changes):
    """The JSON of ADNI, of the test's scans: labels 0 and 2, the subject in a file name."""
    entries = {}
    for i, (scan, (_, label, _)) in enumerate(SCANS.items()):
        raw = f"/data/ADNI/x/ADNI_{i:03}_S_{1000 + i}_MR_MPRAGE_br_raw_2007_S1_I{scan}.nii"
        entries[scan] = {"label": {"AD": 2, "NC": 0}[label], "raw": raw, "age": 71.5}
    entries["999"] = {"label": 1, "raw": "/data/ADNI_999_S_9999_MR_I999.nii"}  # neither, and not in the folders
    (root.parent / "meta_data_with_label.json").write_text(json.dumps(entries | changes))


def test_subjects_come_from_the_metadata_beside_the_folder(tmp_path):
    root = write_set(tmp_path, subjects=False)
    write_metadata(root)
    index = read_index(root)
    assert index[index.scan == "101"].subject.unique().tolist() == ["001_S_1001"]
    assert index.subject.notna().all() and index.subject.nunique() == 18


def test_metadata_that_disagrees_with_the_folder_is_an_error(tmp_path):
    root = write_set(tmp_path, subjects=False)
    write_metadata(root, **{"100": {"label": 0}, "101": {"label": "2"}})
    with pytest.raises(ValueError, match="100_70.jpeg is in folder AD, but .*json says NC"):
        read_index(root)


def test_without_metadata_the_subject_is_unknown_and_the_audit_says_so(tmp_path):
    index = read_index(write_set(tmp_path, subjects=False))
    assert index.subject.isna().all()
    assert any(line.startswith("NOT CHECKED: 18 of 18 scans") for line in audit(index))


def test_broken_metadata_is_an_error_in_one_sentence(tmp_path):
    root = write_set(tmp_path)
    (tmp_path / "meta_data_with_label.json").write_text('{"100": ')
    with pytest.raises(ValueError, match="is not a JSON object of scans"):
        read_index(root)
    (tmp_path / "meta_data_with_label.json").unlink()
    (tmp_path / "subjects.csv").write_text("image,patient\n1,2\n")
    with pytest.raises(ValueError, match="has the columns image, patient; expected scan and subject"):
        read_index(root)
    (tmp_path / "subjects.csv").write_text("")
    with pytest.raises(ValueError, match="subjects.csv cannot be read .No columns"):
        read_index(root)


# ---------------------------------------------------------------- audit


def test_audit_counts_and_finds_the_subjects_that_train_and_test_share(tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    text = "\n".join(audit(read_index(write_set(tmp_path, scans))))
    assert "LEAK: 2 of the 6 test subjects also stand in train" in text
    assert "test AD         15       3         3" in text
    assert "48 wide x 40 high, mode L (90 slices)" in text
    assert "slices a scan: 5 (18 scans)" in text and "slice numbers: 70 to 74" in text


def test_window_vote_finds_a_shortcut_and_only_a_shortcut(tmp_path):
    tied = {scan: value for scan, value in SCANS.items()}
    root = tmp_path / "tied"
    for label, slices in (("AD", range(67, 70)), ("NC", range(80, 83))):
        write_set(root, {k: v for k, v in tied.items() if v[1] == label}, slices)
    index = read_index(root / "AD_NC")
    assert dataset.window_vote(index) == 1.0
    assert dataset.window_vote(index.assign(slice=0)) == 0.5


def test_the_audit_command_prints_it_and_wrong_input_exits_with_2(ad_nc, tmp_path):
    done = subprocess.run([sys.executable, "dataset.py", ad_nc], capture_output=True, text=True)
    assert done.returncode == 0 and "none of the 6 known test subjects stands in train" in done.stdout
    done = subprocess.run([sys.executable, "dataset.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- split


def fake_index(subjects):
    """An index without files, of (subject, label, scans) with four slices a scan; a subject of None is unknown."""
    rows = []
    for i, (subject, label, scans) in enumerate(subjects):
        for scan in range(scans):
            rows += [(f"/x/{label}/{i}s{scan}_{n}.jpeg", label, f"{i}s{scan}", n, subject, "train") for n in range(4)]
    index = pd.DataFrame(rows, columns=["path", "label", "scan", "slice", "subject", "split"])
    return index.astype({"subject": "string"})


ODD = {
    "usual": [(f"s{i}", "AD" if i % 2 else "NC", 1 + i % 8) for i in range(40)],
    "one subject": [("s", "AD", 3)],
    "one class": [(f"s{i}", "NC", 2) for i in range(12)],
    "no metadata": [(None, "AD" if i % 2 else "NC", 2) for i in range(20)],
    "some metadata": [(f"s{i}" if i % 3 else None, "AD" if i % 2 else "NC", 2) for i in range(20)],
    "one giant": [("giant", "AD", 60)] + [(f"s{i}", "AD" if i % 2 else "NC", 1) for i in range(10)],
    "a converter": [("both", "AD", 2), ("both", "NC", 2)] + [(f"s{i}", "AD" if i % 2 else "NC", 1) for i in range(10)],
    "two subjects": [("s0", "AD", 1), ("s1", "NC", 1)],
    "empty": [],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("seed", range(5))
def test_train_and_val_share_no_subject_and_no_scan_whatever_comes_in(odd, seed):
    index = fake_index(ODD[odd])
    split = split_index(index, 0.3, seed=seed)
    assert len(split) == len(index) and set(split.split) <= {"train", "val"}
    train, val = split[split.split == "train"], split[split.split == "val"]
    assert not set(train.subject.dropna()) & set(val.subject.dropna())
    assert not set(train.scan) & set(val.scan)


def test_the_split_is_stratified_and_near_the_fraction():
    split = split_index(fake_index(ODD["usual"]), 0.25)
    share = (split.split == "val").groupby(split.label).mean()
    assert share.between(0.15, 0.35).all()


def test_the_split_depends_on_the_seed_alone():
    index = fake_index(ODD["usual"])
    assert split_index(index, seed=3).equals(split_index(index, seed=3))
    assert not split_index(index, seed=3).equals(split_index(index, seed=4))


def test_the_split_does_not_depend_on_the_order_of_rows():
    index = fake_index(ODD["usual"])
    a, b = split_index(index), split_index(index.iloc[::-1])
    assert a.sort_values("path").split.tolist() == b.sort_values("path").split.tolist()


def test_the_test_set_is_never_split(ad_nc):
    index = read_index(ad_nc)
    for by in ("subject", "slice"):
        split = split_index(index, 0.3, by)
        assert ((split.split == "test") == (index.split == "test")).all()


def test_a_split_by_slice_leaks_and_the_check_would_catch_it():
    leaky = split_index(fake_index(ODD["usual"]), 0.25, by="slice")
    assert set(leaky.scan[leaky.split == "val"]) & set(leaky.scan[leaky.split == "train"])
    with pytest.raises(RuntimeError, match="train and val share .* subjects"):
        dataset.check_disjoint(leaky)


def test_split_refuses_what_it_cannot_do():
    index = fake_index(ODD["usual"])
    with pytest.raises(ValueError, match="validation fraction is 1.5"):
        split_index(index, 1.5)
    with pytest.raises(ValueError, match="split by 'patient' is not known"):
        split_index(index, by="patient")


def test_folds_hold_out_every_slice_once_and_no_subject_twice():
    index = fake_index(ODD["usual"])
    parts = [fold_index(index, k, 4) for k in range(4)]
    held_out = [part[part.split == "test"] for part in parts]
    assert sorted(pd.concat(held_out).path) == sorted(index.path)
    for part in parts:
        assert not set(part.subject[part.split == "test"]) & set(part.subject[part.split == "train"])
    with pytest.raises(ValueError, match="fold 4 of 4 does not exist"):
        fold_index(index, 4, 4)
    with pytest.raises(ValueError, match="the smaller class has"):
        fold_index(index, 0, 30)


def test_folds_never_touch_the_official_test_set(ad_nc):
    index = read_index(ad_nc)
    assert set(fold_index(index, 0, 3).scan) == set(index.scan[index.split == "train"])


def test_the_hash_tells_splits_apart(ad_nc):
    index = read_index(ad_nc)
    a, b = split_index(index, 0.3, seed=0), split_index(index, 0.3, seed=1)
    assert dataset.split_hash(a) == dataset.split_hash(a.iloc[::-1]) != dataset.split_hash(b)


# ---------------------------------------------------------------- decoding and batches


def test_decoding_gives_the_files_pixels_and_reports_what_it_cannot_read(ad_nc, tmp_path):
    paths = read_index(ad_nc).path.tolist()[:4]
    (tmp_path / "x_1.jpeg").write_bytes(b"not an image")
    assert dataset.common_size(paths) == (40, 48)
    images, errors = dataset.load_slices([*paths, str(tmp_path / "x_1.jpeg")], (40, 48), bar=None)
    assert images.shape == (5, 40, 48) and images.dtype == np.uint8
    for image, path in zip(images, paths):
        assert np.array_equal(image, np.asarray(Image.open(path)))
    assert errors[:4] == [None] * 4 and "cannot be read" in errors[4] and images[4].max() == 0


def test_an_image_of_another_size_is_scaled_to_cover_and_cropped(tmp_path):
    Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (40, 1))).save(tmp_path / "a.png")
    image = dataset.decode(tmp_path / "a.png", (40, 60))
    assert image.shape == (40, 60)
    assert image[0, 0] == 20 and image[0, -1] == 79  # the middle 60 of 100 columns


def test_a_loader_visits_every_slice_once_an_epoch():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1)
    shuffled = list(dataset.make_loader(images, np.arange(10), 4, torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in shuffled] == [4, 4, 2] and shuffled[0][0].shape == (4, 1, 1, 1)
    order = torch.cat([y for _, y in shuffled])
    assert sorted(order.tolist()) == list(range(10)) != order.tolist()
    assert torch.equal(torch.cat([x for x, _ in shuffled]).flatten(), order.to(torch.uint8))
    assert torch.cat([y for _, y in dataset.make_loader(images, np.arange(10), 4)]).tolist() == list(range(10))


# ---------------------------------------------------------------- transforms


@pytest.fixture
def smooth():
    """A smooth random image, uint8 (1, 1, 240, 256)."""
    noise = torch.rand(1, 1, 240, 256, generator=torch.Generator().manual_seed(0))
    return (TF.gaussian_blur(noise, [9, 9]) * 255).to(torch.uint8)


def warp_one(image, x0=0.0, y0=0.0, w=256.0, h=240.0, mirror=1.0, degrees=0.0, size=224):
    """`warp` by one map, on the scale [0, 1]."""
    numbers = [torch.tensor([v]) for v in (x0, y0, w, h)]
    angle = torch.deg2rad(torch.tensor([degrees]))
    theta = dataset.affine(*numbers, *image.shape[2:], torch.tensor([mirror]), angle)
    return dataset.warp(image, theta, size) * dataset.STD + dataset.MEAN


def inner(x):
    return x[..., 1:-1, 1:-1]  # at the very edge torchvision repeats the crop's border, the map looks beyond it


def test_a_crop_equals_torchvisions(smooth):
    expected = TF.resized_crop(smooth / 255, 20, 30, 200, 210, [224, 224], antialias=False)
    assert (inner(warp_one(smooth, 30, 20, 210, 200)) - inner(expected)).abs().max() < 1e-5


def test_a_flip_equals_torchvisions(smooth):
    expected = TF.horizontal_flip(TF.resized_crop(smooth / 255, 20, 30, 200, 210, [224, 224], antialias=False))
    assert (inner(warp_one(smooth, 30, 20, 210, 200, mirror=-1.0)) - inner(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("degrees", [-10.0, 3.0, 10.0])
def test_a_rotation_equals_torchvisions(smooth, degrees):
    def rotate(x):
        return TF.rotate(x, degrees, interpolation=v2.InterpolationMode.BILINEAR)

    crop = TF.crop(smooth / 255, 8, 16, 224, 224)
    inside = rotate(torch.ones_like(crop)) > 1 - 1e-6
    difference = (warp_one(smooth, 16, 8, 224, 224, degrees=degrees) - rotate(crop)).abs()
    assert difference[inside].max() < 1e-5


def test_augmentation_keeps_range_shape_and_number():
    images = torch.randint(0, 256, (32, 1, 60, 64), dtype=torch.uint8)
    x = dataset.warp(images, dataset.sample_affine(32, 60, 64), 48)
    assert x.shape == (32, 1, 48, 48) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.1


def test_augmentation_keeps_the_label_with_its_image():
    images = torch.arange(0, 250, 10, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 60, 64)
    centre = dataset.warp(images, dataset.sample_affine(25, 60, 64), 32)[:, 0, 16, 16]
    assert torch.allclose(centre, images[:, 0, 0, 0] / 127.5 - 1, atol=1e-5)


def test_training_without_augmentation_sees_what_evaluation_sees():
    images = torch.randint(0, 256, (4, 1, 60, 64), dtype=torch.uint8)
    assert torch.equal(dataset.train_transform(images, 48, augment=False), dataset.eval_transform(images, 48))
    assert not torch.equal(dataset.train_transform(images, 48), dataset.train_transform(images, 48))


def test_crops_have_the_area_and_aspect_of_the_recipe():
    theta = dataset.sample_affine(4000, 240, 256, flip=False, degrees=0, generator=torch.Generator().manual_seed(0))
    w, h = theta[:, 0, 0] * 256, theta[:, 1, 1] * 240
    area = w * h / (240 * 256)
    assert area.min() >= 0.8 - 1e-4 and area.max() <= 1 + 1e-4
    assert 0.85 < area.mean() < 0.95
    assert (w / h).min() >= 3 / 4 - 1e-4 and (w / h).max() <= 4 / 3 + 1e-4
    assert (theta[:, 0, 2].abs() + theta[:, 0, 0] <= 1 + 1e-5).all()  # the crop stays inside the image
    assert (theta[:, 1, 2].abs() + theta[:, 1, 1] <= 1 + 1e-5).all()


def test_half_of_the_images_are_flipped_unless_it_is_turned_off():
    generator = torch.Generator().manual_seed(0)
    flipped = dataset.sample_affine(4000, 60, 64, generator=generator)[:, 0, 0] < 0
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.04)  # 5 standard errors
    assert (dataset.sample_affine(4000, 60, 64, flip=False)[:, 0, 0] > 0).all()


def test_augmentation_repeats_with_the_seed():
    one, two = (dataset.sample_affine(8, 60, 64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, dataset.sample_affine(8, 60, 64))


def test_shrinking_averages_instead_of_skipping():
    stripes = (torch.arange(224) % 2 * 255).to(torch.uint8).expand(1, 1, 224, 224)  # one pixel wide
    assert warp_one(stripes, w=224.0, h=224.0, size=112).std() < 1e-5
    assert dataset.eval_transform(stripes, 56).std() < 0.05


def test_evaluation_transform_equals_torchvisions_and_is_deterministic(smooth):
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(224), v2.CenterCrop(224),
                           v2.Normalize([0.5], [0.5])])(smooth)  # fmt: skip
    x = dataset.eval_transform(smooth, 224)
    assert x.shape == (1, 1, 224, 224) and (x - expected).abs().max() < 1e-6
    assert torch.equal(x, dataset.eval_transform(smooth, 224))


# ---------------------------------------------------------------- real slices


def test_oasis_is_what_its_readme_says(oasis):
    index = read_index(oasis)
    counts = index.groupby(["split", "label"]).agg(slices=("path", "size"), subjects=("subject", "nunique"))
    assert counts.slices.to_dict() == {("test", "AD"): 640, ("test", "NC"): 448, ("train", "AD"): 1856,
                                       ("train", "NC"): 1408}  # fmt: skip
    assert counts.subjects.tolist() == [20, 14, 58, 44]
    assert dataset.shared_subjects(index) == []
    assert dataset.common_size(index.path[:10]) == (208, 176)
