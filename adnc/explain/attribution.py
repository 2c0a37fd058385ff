"""Attribution maps of predicted slices, and a sanity check of the attribution method.

An attribution map gives each pixel of the model's input a share in the logit z_AD - z_NC: positive
towards AD, negative towards NC. Maps are float32 (S, S), computed with the plain model in float32.

Any map looks like an explanation. So each method is checked on the model at hand before its maps
are shown: the weights are randomised from the head down (Adebayo et al. 2018, arXiv 1810.03292). A
method whose maps do not change then shows the slice, not the model, and is marked UNUSABLE.
docs/explain.md measures the methods on the phantom, whose altered anatomy is known.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import expit
from scipy.stats import spearmanr
from tqdm import tqdm

from adnc import CLASSES
from adnc.cpu_engine import images_at_once, is_convnext
from adnc.data.augment import MEAN, STD, eval_transform
from adnc.data.pixels import NEAR_BLACK, find_head
from adnc.errors import InputError, count, printable
from adnc.files import new_folder, write_atomically, write_csv, write_json
from adnc.scoring import plots

STEPS = 32  # of integrated gradients
WINDOW = 7  # the occluded square has 1/7 of the side of the input, and moves by half of its own
LIMIT = 0.5  # from this correlation with maps of random weights on, a method is unusable
N_CHECKED = 8  # slices used in the check
N_DRAWS = 3  # draws of random weights for the whole model; their mean decides
N_SCALED = 8  # training slices whose maps set the scale of the colours
FULL = 0.995  # quantile of the sizes of their values that gets the full colour
SMOOTH = 64  # pictures, not arrays, are smoothed by a Gaussian with an SD of 1/64 of their side
MAX_AT_ONCE = 256  # images

# ---------------------------------------------------------------- methods


def import_captum():
    try:
        import captum.attr
    except ImportError:
        raise InputError(
            "--explain needs captum; install it with: python -m pip install -r "
            "requirements-extra.txt"
        ) from None
    return captum.attr


def margin(model):
    """A function from images (N, 1, S, S) to z_AD - z_NC (N,): what is explained."""
    ad, nc = CLASSES.index("AD"), CLASSES.index("NC")

    def z_ad_minus_z_nc(x):
        z = model(x)
        return z[:, ad] - z[:, nc]

    return z_ad_minus_z_nc


def at_once(x):
    return min(MAX_AT_ONCE, images_at_once(x.device, *x.shape[2:]))


def integrated_gradients(model, x, baseline):
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365).

    A map sums to the margin of the slice minus the margin of the baseline.
    """
    method = import_captum().IntegratedGradients(margin(model))
    return method.attribute(x, baseline, n_steps=STEPS, internal_batch_size=at_once(x))


def occlusion(model, x, baseline):
    """Occlusion (Zeiler & Fergus 2014, arXiv 1311.2901).

    How much the margin falls if a square is replaced by the baseline: for each pixel the mean over
    all squares that contain it.
    """
    side = max(2, x.shape[-1] // WINDOW)
    method = import_captum().Occlusion(margin(model))
    with torch.no_grad():
        return method.attribute(
            x,
            (1, side, side),
            strides=(1, side // 2, side // 2),
            baselines=baseline,
            perturbations_per_eval=at_once(x),
        )


def grad_cam(model, x, baseline):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) with its negative part.

    The baseline is not used. Of an ensemble it is the mean of the maps of its members.
    """
    if is_ensemble(model):
        maps = []
        for member, size, temperature in model.parts():
            values = grad_cam(member, model.shrink(x, size), None) / temperature
            maps.append(resize(values, x.shape[2:]))
        return torch.stack(maps).mean(0)
    small = import_captum().LayerGradCam(margin(model), cam_layer(model)).attribute(x)
    return resize(small.detach(), x.shape[2:])


def resize(maps, size):
    """Maps (N, 1, H, W) in another size, by bilinear interpolation."""
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def is_ensemble(model):
    """Whether the model is a modules.Ensemble."""
    return hasattr(model, "members")


def cam_layer(model):
    """The layer of Grad-CAM.

    ConvNeXt: the output of the third stage, whose side is a sixteenth of the input's; the fourth
    has 2 x 2 at 64 px. Plain CNN: the last ReLU, before pooling.
    """
    if is_convnext(model):
        return model.stages[2]
    return [layer for layer in model if isinstance(layer, torch.nn.ReLU)][-1]


# The best first (docs/explain.md): `--explain auto` takes the first that passes its check.
METHODS = {
    "integrated-gradients": integrated_gradients,
    "occlusion": occlusion,
    "grad-cam": grad_cam,
}

# What the numbers of a map are.
UNITS = {
    "integrated-gradients": "share of a pixel in z_AD - z_NC",
    "occlusion": "fall of z_AD - z_NC if the square around a pixel is hidden",
    "grad-cam": "weighted activation",
}


def attribute(method, model, x, baseline, progress=None):
    """Attribution maps float32 (N, S, S) of images (N, 1, S, S) with a baseline (1, 1, S, S).

    `method` is a name in METHODS or a function like those; the model is in evaluation mode.
    `progress` labels a progress bar.
    """
    method = METHODS.get(method, method)
    maps = []
    hidden = None if progress else True  # None: hidden unless it is a terminal
    for image in tqdm(x.split(1), progress, unit=" slices", leave=False, disable=hidden):
        values = method(model, image, baseline)[0, 0]
        maps.append(values.detach().float().cpu().numpy())
    if not maps:
        return np.zeros((0, *x.shape[2:]), np.float32)
    return np.stack(maps)


# ---------------------------------------------------------------- does a map depend on the weights?


def model_parts(model):
    """The parts of a model from the head down: (name, prefixes of the names of its weights).

    A part of an ensemble has that part of every member; the deepest member has the most.
    """
    if is_ensemble(model):
        parts = []
        each = [model_parts(member) for member in model.members]
        for step in itertools.zip_longest(*each, fillvalue=("", ())):
            names = [name for name, _ in step if name]
            prefixes = []
            for i, (_, member_prefixes) in enumerate(step):
                prefixes += [f"members.{i}.{prefix}" for prefix in member_prefixes]
            parts.append((" and ".join(dict.fromkeys(names)), tuple(prefixes)))
        return parts
    if is_convnext(model):
        parts = [("head", ("norm.", "head."))]
        for k in reversed(range(len(model.stages))):
            parts.append((f"stage {k + 1}", (f"stages.{k}.", f"downsample_layers.{k}.")))
        return parts
    convolutions = [i for i, layer in enumerate(model) if isinstance(layer, torch.nn.Conv2d)]
    parts = [("head", (f"{len(model) - 1}.",))]
    for k in reversed(range(len(convolutions))):
        i = convolutions[k]
        parts.append((f"block {k + 1}", (f"{i}.", f"{i + 1}.")))
    return parts


def randomise(model, fresh_model, n_parts, draw=0):
    """A copy of the model whose first `n_parts` parts have random weights.

    Parts are counted from the head down. `fresh_model()` builds the same architecture untrained.
    """
    prefixes = []
    for _, part_prefixes in model_parts(model)[:n_parts]:
        prefixes.extend(part_prefixes)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + draw)  # the model may have been trained from seeds 0, 1, ...
        copy = fresh_model()
    kept = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(prefixes)):
            kept[name] = tensor
    copy.load_state_dict(kept, strict=False)
    return copy.to(next(model.parameters()).device).eval()


def rank_correlation(a, b, mask):
    """Spearman's correlation of two maps (S, S) over a mask: (of the maps, of their sizes).

    It is 1 if the first map is constant, since such a map cannot change, and 0 if only the second
    is.
    """
    a, b = a[mask], b[mask]
    if np.ptp(a) == 0:
        return 1.0, 1.0
    if np.ptp(b) == 0:
        return 0.0, 0.0
    signed = float(spearmanr(a, b).statistic)
    if np.ptp(abs(a)) == 0 or np.ptp(abs(b)) == 0:
        return signed, signed
    return signed, float(spearmanr(abs(a), abs(b)).statistic)


def compare(maps, others, masks):
    """(signed, absolute): means over slices of the two rank correlations.

    Of the signed one the size counts, since a map with inverted signs shows the same picture.
    """
    pairs = np.array([rank_correlation(*each) for each in zip(maps, others, masks)])
    return float(abs(pairs[:, 0]).mean()), float(pairs[:, 1].mean())


def check(method, model, fresh_model, x, baseline, progress=None):
    """The cascading randomisation of a model on images (N, 1, S, S).

    Returns a table with one row per part: part (randomised together with all parts before it), draw
    (of random weights), signed and absolute (see `compare`). The last part, after which no trained
    weight is left, has N_DRAWS rows.
    """
    masks = inside_head(x, baseline)
    maps = attribute(method, model, x, baseline)
    names = [name for name, _ in model_parts(model)]
    steps = [(name, k + 1, 0) for k, name in enumerate(names)]
    steps += [(names[-1], len(names), draw) for draw in range(1, N_DRAWS)]
    rows = []
    hidden = None if progress else True
    for name, n_parts, draw in tqdm(steps, progress, unit=" steps", leave=False, disable=hidden):
        other = attribute(method, randomise(model, fresh_model, n_parts, draw), x, baseline)
        rows.append((name, draw, *compare(maps, other, masks)))
    return pd.DataFrame(rows, columns=["part", "draw", "signed", "absolute"])


def without_weights(table):
    """The columns signed and absolute of `check`, in the rows without any trained weight."""
    return table.loc[table.part == table.part.iloc[-1], ["signed", "absolute"]]


def is_usable(table):
    """Whether a method passes its `check`: both means over the draws are below LIMIT."""
    return bool((without_weights(table).mean() < LIMIT).all())


def describe(method, table, n_slices):
    """The sentence that appears beside each map."""
    last = without_weights(table)
    mean, low, high = last.mean(), last.absolute.min(), last.absolute.max()
    result = (
        f"with all weights randomised, its maps of {count(n_slices, 'slice')} "
        f"keep a rank correlation of {mean.signed:.2f} with the original ones, {mean.absolute:.2f} "
        f"without signs ({low:.2f} to {high:.2f} in {len(last)} draws)"
    )
    if is_usable(table):
        return (
            f"{method} passes its check that its maps depend on this model's weights (no proof "
            f"that they are right): {result}; unusable from {LIMIT:g}"
        )
    return (
        f"UNUSABLE: {method} does not depend enough on this model's weights: {result}; expected "
        f"below {LIMIT:g}"
    )


def inside_head(x, baseline):
    """Mask bool (N, S, S) of the pixels where the slice or the baseline is not near-black.

    Elsewhere the maps of all models are alike. A slice without such a pixel has a full mask.
    """
    black = (NEAR_BLACK / 255 - MEAN) / STD
    mask = ((x >= black) | (baseline >= black))[:, 0].cpu().numpy()
    return mask | ~mask.any((1, 2), keepdims=True)


# ---------------------------------------------------------------- the scale of the colours


def smooth(maps):
    """Maps (N, S, S) as they are drawn."""
    return gaussian_filter(maps, (0, maps.shape[1] / SMOOTH, maps.shape[2] / SMOOTH))


def full_colour(maps, masks):
    """The size of a value that is drawn in full colour, from maps (N, S, S) and `inside_head`."""
    return float(np.quantile(abs(smooth(maps))[masks], FULL))


def view(checkpoint, images, device):
    """uint8 (N, H, W) -> float32 (N, 1, S, S), as the model of a checkpoint sees them."""
    images = torch.from_numpy(images)[:, None].to(device)
    return eval_transform(images, checkpoint["image_size"], checkpoint["mean"], checkpoint["std"])


def measure_map_scale(checkpoint, model, slices, device):
    """{method: `full_colour` of its maps of some slices of a SliceSet, that of training}.

    Recorded in the checkpoint, so that the maps of every prediction are drawn on the scale of the
    training slices, and little signal looks little. None if captum is not installed.
    """
    try:
        import_captum()
    except InputError:
        return None
    rows = slices.index.sort_values(["label", "scan", "slice"]).row.to_numpy(np.int64)
    x = view(checkpoint, slices.images[plots.evenly(rows, N_SCALED)], device)
    baseline = view(checkpoint, checkpoint["mean_slice"].numpy()[None], device)
    model = model.to(device).eval()
    masks = inside_head(x, baseline)
    scale = {}
    for method in METHODS:
        scale[method] = full_colour(attribute(method, model, x, baseline), masks)
    return scale


# ---------------------------------------------------------------- from slices to a folder


@dataclass
class Explained:
    """The content of the folder that `Explainer.write` filled.

    table: one row per slice that could be read: path (as in predictions.csv), scan, slice, overlay
        (name of a PNG), maps and place (name of a .npz, position in its arrays), for_AD and for_NC
        (sums of the positive and negative values), signed and absolute (rank correlations with the
        map of random weights).
    sentence, usable: whether the method passed its check.
    caution: what a colour does not mean.
    full_colour, unit, scale: the value drawn in full colour, what it is, and where it is from.
    """

    folder: Path
    table: pd.DataFrame
    sentence: str
    usable: bool
    caution: str
    full_colour: float
    unit: str
    scale: str

    @property
    def overlays(self):
        """{path of a slice: its overlay}"""
        return {path: self.folder / name for path, name in zip(self.table.path, self.table.overlay)}


class Explainer:
    """Explains slices with one method, or with "auto" the first of METHODS that passes its check.

    `fresh_model()` builds the architecture of the model untrained. Of the checkpoint, the mean
    training slice, the view of the model and the temperature are used. InputError if captum is
    missing.
    """

    def __init__(self, model, fresh_model, checkpoint, method, device):
        import_captum()
        self.candidates = list(METHODS) if method == "auto" else [method]
        self.model = model.to(device).eval()
        self.fresh_model = fresh_model
        self.checkpoint = checkpoint
        self.device = device
        self.baseline = view(checkpoint, checkpoint["mean_slice"].numpy()[None], device)
        temperature = checkpoint.get("calibration", {}).get("temperature", 1)
        with torch.inference_mode():
            logit = float(margin(self.model)(self.baseline))
        self.baseline_p_ad = float(expit(logit / temperature))

    def write(self, slices, out):
        """Explain the readable slices of a SliceSet, at least one, in a new folder `out`.

        Returns Explained. The folder gets an overlay for each slice, for each scan its maps (.npz:
        maps float32 (n, S, S), mean (S, S)) and a picture of their mean, and legend.png,
        checks.csv, explanations.csv and summary.json.
        """
        out = new_folder(out)
        index = slices.index.reset_index(drop=True)
        index["number"] = index.index + 1
        index = index[index.error.isna()]
        some = index.loc[plots.evenly(index.index.to_numpy(), N_CHECKED)]
        x = view(self.checkpoint, slices.images[some.row.to_numpy(np.int64)], self.device)
        method, usable, sentence = self.choose(x, out)
        full, scale = self.scale(method, x)

        random_model = randomise(self.model, self.fresh_model, len(model_parts(self.model)))
        mark = "" if usable else "UNUSABLE"
        tables = []
        bar = tqdm(total=len(index), desc="explaining", unit=" slices", leave=False, disable=None)
        for _, part in index.groupby("scan", sort=False):
            images = slices.images[part.row.to_numpy(np.int64)]
            x = view(self.checkpoint, images, self.device)
            maps = attribute(method, self.model, x, self.baseline)
            others = attribute(method, random_model, x, self.baseline)
            masks = inside_head(x, self.baseline)
            kept = [rank_correlation(*each) for each in zip(maps, others, masks)]
            signed, absolute = np.array(kept).T
            part = part.assign(signed=signed, absolute=absolute)
            tables.append(write_scan(images, part, maps, out, method, full, mark))
            bar.update(len(part))
        bar.close()

        table = pd.concat(tables)
        caution = self.caution(method)
        unit = UNITS[method]
        plots.plot_legend(
            out / "legend.png", f"{sentence}. {caution}", full, f"{unit}; full colour: {scale}"
        )
        write_csv(out / "explanations.csv", table)
        summary = {
            "method": method,
            "usable": usable,
            "sentence": sentence,
            "caution": caution,
            "mean_slice_p_AD": self.baseline_p_ad,
            "full_colour": full,
            "unit": unit,
            "scale": scale,
        }
        write_json(out / "summary.json", summary)
        return Explained(out, table, sentence, usable, caution, full, unit, scale)

    def scale(self, method, x):
        """(the value drawn in full colour, where it is from): for all scans the same.

        x: slices of this prediction (n, 1, S, S), which are taken if the checkpoint has no record.
        """
        what = f"the {100 * FULL:g} % quantile of the maps of"
        recorded = self.checkpoint.get("map_scale")
        if recorded:
            return recorded[method], f"{what} {N_SCALED} training slices"
        maps = attribute(method, self.model, x, self.baseline)
        full = full_colour(maps, inside_head(x, self.baseline))
        where = "of these slices, since the checkpoint has none of its training"
        return full, f"{what} {len(x)} {where}"

    def caution(self, method):
        """What a colour does not mean."""
        relative = ""
        if method != "grad-cam":
            relative = (
                "It is relative to the mean training slice, which gets a p_AD of "
                f"{self.baseline_p_ad:.2f} from this model, so one colour may prevail in all "
                "slices. "
            )
        if is_ensemble(self.model):
            relative += (
                "The map is that of all members together, also of those that do not predict a scan "
                "because they have seen its subject. "
            )
        worth = ""
        if self.checkpoint.get("maps"):  # what is known about the maps of this model
            worth = f"{self.checkpoint['maps']} "
        return (
            f"{worth}"
            "A colour shows where the model's output reacts, not where disease is, and not which "
            "class the model predicts: slices of both classes can have the same colour. "
            f"{relative}The prediction is p_AD."
        )

    def choose(self, x, out):
        """Check the candidates on slices (n, 1, S, S) until one passes; write checks.csv.

        Returns (method, whether it passes, a sentence about it). If none passes, the method is the
        last candidate.
        """
        tables, failed = [], []
        for method in self.candidates:
            progress = f"checking {method}"
            checked = check(method, self.model, self.fresh_model, x, self.baseline, progress)
            tables.append(checked.assign(method=method))
            if is_usable(checked):
                break
            failed.append(method)
        columns = ["method", "part", "draw", "signed", "absolute"]
        write_csv(out / "checks.csv", pd.concat(tables)[columns])

        sentence = describe(method, checked, len(x))
        others = [name for name in failed if name != method]
        if others:
            sentence += f"; {', '.join(others)} failed it"
        return method, method not in failed, sentence


def write_scan(images, part, maps, out, method, full, mark):
    """Write the pictures and arrays of one scan; returns its rows of `Explained.table`.

    images: its slices uint8 (n, H, W). part: their rows of the index, with number, signed and
    absolute. maps: (n, S, S). full: the value drawn in full colour. Nothing is painted outside the
    head.
    """
    smoothed = smooth(maps)
    first = f"{part.number.iloc[0]:05d}_{safe_name(part.scan.iloc[0])}"
    names = []
    for number, path in zip(part.number, part.path):
        names.append(f"{number:05d}_{safe_name(Path(path).stem)}.png")
    table = part[["path", "scan", "slice"]].assign(
        overlay=names,
        maps=f"{first}.npz",
        place=range(len(part)),
        for_AD=maps.clip(min=0).sum((1, 2)),
        for_NC=maps.clip(max=0).sum((1, 2)),
        signed=part.signed,
        absolute=part.absolute,
    )

    def save(temporary):
        with open(temporary, "wb") as file:  # np.savez would append .npz to a name
            np.savez_compressed(file, maps=maps, mean=maps.mean(0))

    write_atomically(out / f"{first}.npz", save)
    for name, pixels, values in zip(names, images, smoothed):
        values = np.where(find_head(pixels), to_slice(values, pixels.shape), 0)
        plots.plot_overlay(out / name, pixels, values, full, mark)
    if len(part) > 1:
        marked = f"{mark} {method}".strip()
        title = f"scan {part.scan.iloc[0]}, {len(part)} slices, {marked}"
        pixels = images.mean(0)
        mean = np.where(find_head(pixels), to_slice(smoothed.mean(0), pixels.shape), 0)
        plots.plot_scan_map(out / f"scan_{first}.png", pixels, mean, full, table, title)
    return table


def safe_name(text):
    """A text reduced to at most 40 letters, digits, hyphens and underscores, for a file's name.

    Different texts may become equal; the number before it in a name tells them apart.
    """
    return re.sub(r"[^A-Za-z0-9-]+", "_", Path(printable(text)).name)[:40]


def to_slice(values, size):
    """A map (S, S) laid over its slice of `size` (H, W); 0 outside the model's centre crop."""
    side, (height, width) = len(values), size
    short = min(size)
    resized = torch.zeros(1, 1, side * height // short, side * width // short)
    top, left = (round((total - side) / 2) for total in resized.shape[2:])  # as eval_transform
    resized[..., top : top + side, left : left + side] = torch.from_numpy(values)
    full = torch.nn.functional.interpolate(resized, size, mode="bilinear", align_corners=False)
    return full[0, 0].numpy()
