"""Why: attribution maps of the slices that a model predicts, and the checks of the method that makes them.

Not run by itself; `predict.py SLICES --explain METHOD` is its command. An attribution map gives each pixel of the
model's input a share in the logit z_AD - z_NC: positive speaks for AD, negative for NC. Maps are float32 (S, S), of the
plain model in float32, never of the CPU engine that predicts, whose folded layers have no gradients.

A map always looks like an explanation. So each method is checked on the very model before its maps are shown: the
weights are randomised from the head down (Adebayo et al. 2018, arXiv 1810.03292), and a method whose maps stay as they
were shows the slice, not the model, and is marked UNUSABLE. What the methods are worth on the phantom, where the
altered anatomy is known, is in docs/explain.md.
"""

import itertools
import re
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import expit
from tqdm import tqdm

from adnc.scoring import plots
from utils import build_model
from adnc.files import make_folder, write_atomically, write_csv, write_json
from adnc.cpu_engine import micro_batch
from modules import ConvNeXt, make_model
from adnc.data.pixels import NEAR_BLACK
from adnc.data.augment import MEAN, STD, eval_transform
from adnc.cli import CLASSES, InputError, printable

STEPS = 32  # of integrated gradients
WINDOW = 7  # the occluded square has the side of the input divided by so much, and moves by half of that
LIMIT = 0.5  # a method whose maps correlate so much, or more, with those of random weights is unusable
CHECKED = 8  # slices that the weights are randomised for, step by step
DRAWS = 3  # of random weights for all parts, of which the mean decides
SMOOTH = 64  # pictures (not arrays) are smoothed by a Gaussian whose SD is the side divided by so much
AT_ONCE = 256  # images, at most: on a GPU, where `micro_batch` knows no limit

# ---------------------------------------------------------------- methods


def _captum():
    try:
        import captum.attr
    except ImportError:
        raise InputError("--explain needs captum, which is not installed; install it with: "
                         "pip install 'captum>=0.9'") from None
    return captum.attr


def margin(model):
    """A function from images (N, 1, S, S) to z_AD - z_NC (N,): what is explained."""
    ad, nc = CLASSES.index("AD"), CLASSES.index("NC")

    def of(x):
        z = model(x)
        return z[:, ad] - z[:, nc]

    return of


def integrated_gradients(model, x, baseline):
    """Sundararajan et al. 2017, arXiv 1703.01365. A map sums to the margin of the slice minus that of the baseline."""
    at_once = min(AT_ONCE, micro_batch(x.device, *x.shape[2:]))
    method = _captum().IntegratedGradients(margin(model))
    return method.attribute(x, baseline, n_steps=STEPS, internal_batch_size=at_once)


def occlusion(model, x, baseline):
    """Zeiler & Fergus 2014, arXiv 1311.2901: by how much the margin falls if a square is replaced by the baseline, the
    mean over all squares that a pixel is in."""
    side = max(2, x.shape[-1] // WINDOW)
    at_once = min(AT_ONCE, micro_batch(x.device, *x.shape[2:]))
    with torch.no_grad():
        return _captum().Occlusion(margin(model)).attribute(
            x, (1, side, side), strides=(1, side // 2, side // 2), baselines=baseline, perturbations_per_eval=at_once)


def grad_cam(model, x, baseline):
    """Selvaraju et al. 2017, arXiv 1610.02391, with its negative part, on `cam_layer`; the baseline plays no part."""
    small = _captum().LayerGradCam(margin(model), cam_layer(model)).attribute(x)
    return torch.nn.functional.interpolate(small.detach(), x.shape[2:], mode="bilinear", align_corners=False)


def cam_layer(model):
    """The layer of Grad-CAM: the output of the third stage, after its last residual, a sixteenth of the input's side
    (the fourth stage has 2 x 2 at 64 px); of the plain CNN the last convolution's, after ReLU, before it is pooled."""
    if isinstance(model, ConvNeXt):
        return model.stages[2]
    return [layer for layer in model if isinstance(layer, torch.nn.ReLU)][-1]


# the best first, see docs/explain.md: `--explain auto` takes the first that passes its check on the model at hand
METHODS = {"integrated-gradients": integrated_gradients, "occlusion": occlusion, "grad-cam": grad_cam}


def attribute(method, model, x, baseline, bar=None):
    """Attribution maps float32 (N, S, S) of images (N, 1, S, S), by one of METHODS or a function like them. A model in
    evaluation mode; the baseline is (1, 1, S, S)."""
    method = METHODS.get(method, method)
    each = tqdm(x.split(1), bar, unit=" slices", leave=False, disable=None if bar else True)
    maps = [method(model, one, baseline)[0, 0].detach().float().cpu().numpy() for one in each]
    return np.stack(maps) if maps else np.zeros((0, *x.shape[2:]), np.float32)


# ---------------------------------------------------------------- the check: does a map depend on the weights?


def parts(model):
    """The parts of a model from the head down: (name, beginnings of the names of its weights)."""
    if isinstance(model, ConvNeXt):
        stages = [(f"stage {k + 1}", (f"stages.{k}.", f"downsample_layers.{k}.")) for k in range(len(model.stages))]
        return [("head", ("norm.", "head.")), *reversed(stages)]
    convs = [i for i, layer in enumerate(model) if isinstance(layer, torch.nn.Conv2d)]
    blocks = [(f"block {k + 1}", (f"{i}.", f"{i + 1}.")) for k, i in enumerate(convs)]
    return [("head", (f"{len(model) - 1}.",)), *reversed(blocks)]


def randomised(checkpoint, draw=0):
    """The model of a checkpoint with ever more parts drawn like those of an untrained one: (name of the part, model)
    from the head alone to all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + draw)  # not of a run: one that began with these weights might keep some of them
        fresh = make_model(**checkpoint["model"]).state_dict()
    weights = dict(checkpoint["weights"])
    for name, begin in parts(build_model(checkpoint)):
        weights |= {key: value for key, value in fresh.items() if key.startswith(begin)}
        yield name, build_model(checkpoint | {"weights": weights})


def rank_correlation(a, b, where):
    """Spearman's correlation of two maps (S, S) over the pixels `where`: (of the maps, of their absolute values). It is
    0 where one has no order, and 1 if that is the first: a map that says nothing cannot change."""
    from scipy.stats import spearmanr  # its import changes the filters of warnings

    a, b = a[where], b[where]
    if np.ptp(a) == 0:
        return 1.0, 1.0
    if np.ptp(b) == 0:
        return 0.0, 0.0
    signed = spearmanr(a, b).statistic
    absolute = spearmanr(abs(a), abs(b)).statistic if np.ptp(abs(a)) and np.ptp(abs(b)) else signed
    return float(signed), float(absolute)


def compare(maps, others, where):
    """(signed, absolute): the means over slices of the size of `rank_correlation`, and of that of the absolute maps. A
    map that is only turned over shows the same picture."""
    pairs = np.array([rank_correlation(*each) for each in zip(maps, others, where)])
    return float(abs(pairs[:, 0]).mean()), float(pairs[:, 1].mean())


def check(method, checkpoint, x, baseline, bar=None):
    """The cascading randomisation of a checkpoint's model on images (N, 1, S, S). Returns a table: part (randomised
    with all parts before it), draw (of random weights, from 0), signed and absolute (see `compare`); a row a part, and
    for the last, with which no trained weight is left, one for each of DRAWS."""
    model, where = build_model(checkpoint).to(x.device).eval(), inside_head(x, baseline)
    maps = attribute(method, model, x, baseline)
    last = (deque(randomised(checkpoint, draw), maxlen=1)[0] for draw in range(1, DRAWS))
    others = tqdm(itertools.chain(randomised(checkpoint), last), bar, len(parts(model)) + DRAWS - 1, unit=" steps",
                  leave=False, disable=None if bar else True)  # one at a time: a large model fits into memory once
    rows = [(name, max(0, i + 1 - len(parts(model))),
             *compare(maps, attribute(method, other.to(x.device).eval(), x, baseline), where))
            for i, (name, other) in enumerate(others)]
    return pd.DataFrame(rows, columns=["part", "draw", "signed", "absolute"])


def without_weights(table):
    """The rows of `check` of which no trained weight is left, signed and absolute."""
    return table.loc[table.part == table.part.iloc[-1], ["signed", "absolute"]]


def is_usable(table):
    """Whether a method passes, from the table of `check`: both means over the draws are below LIMIT."""
    return bool((without_weights(table).mean() < LIMIT).all())


def describe(method, table, n):
    """The sentence that appears beside each map."""
    last = without_weights(table)
    mean, low, high = last.mean(), last.absolute.min(), last.absolute.max()
    found = (f"with all weights randomised, its maps of {n} slice{'s' * (n > 1)} keep a rank correlation of "
             f"{mean.signed:.2f} with the true ones, {mean.absolute:.2f} without signs ({low:.2f} to {high:.2f} in "
             f"{len(last)} draws)")
    if is_usable(table):
        return (f"{method} passes its check, that its maps depend on this model's weights (no proof that they are "
                f"right): {found}; unusable from {LIMIT:g}")
    return f"UNUSABLE: {method} does not depend enough on this model's weights: {found}; expected below {LIMIT:g}"


def inside_head(x, baseline):
    """Pixels bool (N, S, S) where the slice or the baseline, (N or 1, 1, S, S), is not near-black. Outside all maps
    are alike."""
    black = (NEAR_BLACK / 255 - MEAN) / STD
    where = ((x >= black) | (baseline >= black))[:, 0].cpu().numpy()
    return where | ~where.any((1, 2), keepdims=True)


# ---------------------------------------------------------------- how good a map is, where that can be known


def share_inside(maps, region):
    """The share of the positive attribution of each of the maps (N, S, S) that lies in its region bool (N, S, S); NaN
    for a map without any."""
    positive = maps.clip(min=0)
    with np.errstate(invalid="ignore"):
        return (positive * region).sum((1, 2)) / positive.sum((1, 2))


def scramble(maps, rng):
    """Random maps (N, S, S) with the power spectrum of the given ones, and so their smoothness: other phases."""
    phase = np.angle(np.fft.rfft2(rng.standard_normal(maps.shape)))
    size = np.abs(np.fft.rfft2(maps - maps.mean((1, 2), keepdims=True)))
    return np.fft.irfft2(size * np.exp(1j * phase), maps.shape[1:])


@torch.inference_mode()
def deletion(model, x, baseline, maps, where, share=0.05):
    """The margins (N,) of images (N, 1, S, S) after a share of all pixels, those that speak most for AD among the
    pixels `where`, is replaced by the baseline (Samek et al. 2017, arXiv 1509.06321)."""
    ranked = np.where(where, maps, -np.inf).reshape(len(maps), -1)
    n = int(share * ranked.shape[1])
    gone = np.zeros(ranked.shape, bool)
    np.put_along_axis(gone, np.argpartition(-ranked, n, axis=1)[:, :n], True, axis=1)
    gone = torch.from_numpy(gone.reshape(maps.shape)[:, None]).to(x.device)
    return margin(model)(torch.where(gone, baseline, x)).double().cpu().numpy()


# ---------------------------------------------------------------- from slices to a folder


class Explained(NamedTuple):
    """What `Explainer.write` left in a folder. `table` has a row a slice that could be read: path (as in
    predictions.csv), scan, slice, overlay (the name of a PNG in the folder), maps and place (the file of arrays, and
    which of them), for_AD and for_NC (the sums of its positive and negative values), full_colour (the value that is
    drawn in full colour), signed and absolute (rank correlation with the map of random weights). `sentence` says
    whether the method passed its check, `usable` whether it did, `caution` what a colour does not say."""

    folder: Path
    table: pd.DataFrame
    sentence: str
    usable: bool
    caution: str

    @property
    def overlays(self):
        """{path of a slice: its overlay}"""
        return {path: self.folder / name for path, name in zip(self.table.path, self.table.overlay)}


class Explainer:
    """A method of attribution for the model of a checkpoint. InputError where captum or the mean of the training slices
    is missing, so that it is known before anything is predicted."""

    def __init__(self, checkpoint, method, device):
        _captum()
        if "mean_slice" not in checkpoint:
            raise InputError("the checkpoint holds no mean of its training slices, which --explain compares a slice "
                             "with; train it again with this version, or leave out --explain")
        self.candidates = list(METHODS) if method == "auto" else [method]
        self.checkpoint, self.device = checkpoint, device
        self.model = build_model(checkpoint).to(device).eval()
        self.baseline = self.view(checkpoint["mean_slice"].numpy()[None])
        with torch.inference_mode():
            logit = float(margin(self.model)(self.baseline))
        self.start = float(expit(logit / checkpoint.get("calibration", {}).get("temperature", 1)))  # p_AD of it

    def view(self, images):
        """uint8 (N, H, W) -> float32 (N, 1, S, S), as the model sees them."""
        view = self.checkpoint["image_size"], self.checkpoint["mean"], self.checkpoint["std"]
        return eval_transform(torch.from_numpy(images)[:, None].to(self.device), *view)

    def write(self, slices, out):
        """Explain the slices of a SliceSet that could be read (one at least), into a new folder `out`: an overlay for
        each slice, for each scan its maps as they are (.npz: maps float32 (n, S, S), mean (S, S)) and a picture of
        their mean, legend.png, checks.csv, explanations.csv and summary.json. Returns Explained."""
        out = make_folder(out)
        index = slices.index.reset_index(drop=True)
        index = index.assign(number=index.index + 1)[index.error.isna()]
        some = index.iloc[np.unique(np.linspace(0, len(index) - 1, CHECKED).round().astype(int))]
        method, usable, sentence = self.choose(slices.images[some.row.to_numpy(np.int64)], out)
        ((_, random),) = deque(randomised(self.checkpoint), maxlen=1)
        models, mark, tables = (self.model, random.to(self.device).eval()), "" if usable else "UNUSABLE", []
        with tqdm(total=len(index), desc="explaining", unit=" slices", leave=False, disable=None) as bar:
            for _, part in index.groupby("scan", sort=False):
                images = slices.images[part.row.to_numpy(np.int64)]
                x = self.view(images)
                maps = [attribute(method, model, x, self.baseline) for model in models]
                kept = np.array([rank_correlation(*each) for each in zip(*maps, inside_head(x, self.baseline))])
                part = part.assign(signed=kept[:, 0], absolute=kept[:, 1])
                tables.append(write_scan(images, part, maps[0], out, method, mark))
                bar.update(len(part))
        table = pd.concat(tables)
        caution = self.caution(method)
        plots.plot_legend(out / "legend.png", f"{sentence}. {caution}")
        write_csv(out / "explanations.csv", table)
        write_json(out / "summary.json", {"method": method, "usable": usable, "sentence": sentence,
                                          "caution": caution, "mean_slice_p_AD": self.start})
        return Explained(out, table, sentence, usable, caution)

    def caution(self, method):
        """What a colour does not say."""
        start = ("" if method == "grad-cam" else "It is relative to the mean training slice, to which this model gives "
                 f"a p_AD of {self.start:.2f}, so that one colour may prevail in all slices. ")
        return ("A colour says where the model's output reacts, not where disease is, and not which class the model "
                f"sees: the same one can lie there in slices of either class. {start}The prediction is p_AD.")

    def choose(self, images, out):
        """Check the method, or with "auto" one after the other until one passes, on some slices uint8 (n, H, W).
        Returns (method, whether it passes, a sentence on it); the checks are written to checks.csv."""
        x, tables, failed = self.view(images), [], []
        for method in self.candidates:
            checked = check(method, self.checkpoint, x, self.baseline, bar=f"checking {method}")
            tables.append(checked.assign(method=method))
            if is_usable(checked):
                break
            failed.append(method)
        write_csv(out / "checks.csv", pd.concat(tables)[["method", "part", "draw", "signed", "absolute"]])
        others = ", ".join(name for name in failed if name != method)
        sentence = describe(method, checked, len(x)) + f"; {others} failed it" * bool(others)
        return method, method not in failed, sentence


def write_scan(images, part, maps, out, method, mark):
    """The pictures and arrays of one scan, from its slices uint8 (n, H, W), their rows of the index, with number,
    signed and absolute, and their maps (n, S, S). Returns its rows of `Explained.table`."""
    drawn = gaussian_filter(maps, (0, maps.shape[1] / SMOOTH, maps.shape[2] / SMOOTH))
    full = float(np.quantile(abs(drawn), 0.995))
    first = f"{part.number.iloc[0]:05d}_{safe(part.scan.iloc[0])}"
    names = [f"{number:05d}_{safe(Path(path).stem)}.png" for number, path in zip(part.number, part.path)]
    table = part[["path", "scan", "slice"]].assign(
        overlay=names, maps=f"{first}.npz", place=range(len(part)), for_AD=maps.clip(min=0).sum((1, 2)),
        for_NC=maps.clip(max=0).sum((1, 2)), full_colour=full, signed=part.signed, absolute=part.absolute)
    arrays = dict(maps=maps, mean=maps.mean(0))
    write_atomically(out / f"{first}.npz", lambda temporary: save_arrays(temporary, **arrays))
    for name, pixels, found in zip(names, images, drawn):
        plots.plot_overlay(out / name, pixels, to_slice(found, pixels.shape), full, mark)
    if len(part) > 1:
        title = f"scan {part.scan.iloc[0]}, {len(part)} slices, {' '.join([mark, method]).strip()}"
        smooth = to_slice(drawn.mean(0), images.shape[1:])
        plots.plot_scan_map(out / f"scan_{first}.png", images.mean(0), smooth, table, title)
    return table


def save_arrays(path, **arrays):
    with open(path, "wb") as file:  # np.savez would add an ending to a name
        np.savez_compressed(file, **arrays)


def safe(text):
    """A part of a file's name: letters, digits, hyphens and underscores, 40 at most. The number before it tells apart
    what becomes equal here."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", Path(printable(text)).name)[:40]


def to_slice(found, size):
    """A map (S, S) over the slice of `size` (H, W) that the model saw the centre of: 0 where it did not look."""
    side, (height, width) = len(found), size
    short = min(size)
    seen = torch.zeros(1, 1, side * height // short, side * width // short)
    top, left = (round((total - side) / 2) for total in seen.shape[2:])  # as in transforms.eval_transform
    seen[..., top : top + side, left : left + side] = torch.from_numpy(found)
    return torch.nn.functional.interpolate(seen, size, mode="bilinear", align_corners=False)[0, 0].numpy()
