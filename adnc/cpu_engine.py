"""A trained model made ready to predict, and the one road from a SliceSet to calibrated predictions.

Not run by itself: validation, the final test and predict.py all come here.

On a GPU the engine is the model under autocast. On a CPU some things are done otherwise, to the same function (up to
rounding): LayerScale is folded into the linear layer before it, BatchNorm into the convolution before it; linear layers
hold their weights in oneDNN's blocked layout, with GELU in the same kernel; and every core works on a few images of its
own, in the wide layers on some rows of them, so that activations stay in its cache and no memory is given back and
faulted in again between layers.
"""

import copy
import functools
import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from adnc.scoring import metrics
from adnc.scoring.baselines import predict_baselines
from utils import build_model
from dataset import make_loader
from modules import ConvNeXt
from adnc.data.pixels import out_of_range
from adnc.data.subjects import find_exposure
from adnc.data.augment import MEAN, STD, eval_transform
from adnc.cli import CLASSES, InputError, Threads

COVERAGE = 0.9  # of the prediction sets of a run's own evaluation
HIDDEN_BYTES = 2**20  # of the widest activations of a block at once: a core's share of the cache
MOST_WORKERS = 8  # beyond, threads wait for the interpreter's lock; they get more than one core each instead

# ---------------------------------------------------------------- the engine


def micro_batch(device, height, width):
    """How many images of a batch go through the model at once. On a CPU 8 of 224 x 224 pixels, or as many smaller ones:
    more do not stay in its cache, and each layer then waits for fresh memory. On a GPU all of them."""
    return max(1, round(8 * 224**2 / (height * width))) if device.type == "cpu" else 2**31


def make_engine(model, runtime):
    """A function from images float32 (N, 1, S, S) to logits float32 (N, classes), in evaluation mode, in the precision
    of the Runtime. On a CPU the weights are copied, and a later change of the model is not seen; the copy is compared
    with the model, and where it cannot be made or answers otherwise, the model itself predicts and a warning says so.
    """
    model.eval()
    plain = functools.partial(_predict_plainly, model, runtime)
    if runtime.device.type != "cpu" or not isinstance(model, ConvNeXt):
        return plain
    try:
        folded = _Folded(model, runtime.amp or torch.float32)
        x = torch.linspace(-20, 20, 64 * 64).sin().view(1, 1, 64, 64)  # a fixed picture
        exact = _predict_plainly(model, replace(runtime, amp=None), x)
        size, difference = exact.abs().max().item(), (folded(x) - exact).abs().max().item()
        if difference <= (1e-3 if runtime.amp is None else 0.1) * size or not exact.isfinite().all():
            return folded
        problem = f"its logits differ by {difference:.2g} from {size:.2g}"
    except (RuntimeError, TypeError, AttributeError, ValueError) as found:  # of oneDNN operators without a public name
        problem = str(found).splitlines()[0]
    warnings.warn(f"the fast engine cannot be used here ({problem}); the plain model predicts, slower",
                  RuntimeWarning, stacklevel=2)
    return plain


@torch.inference_mode()
def _predict_plainly(model, runtime, x):
    """The model as it is, under the autocast of a Runtime."""
    with runtime.autocast():
        return model(x.contiguous(memory_format=torch.channels_last)).float()


class _Folded:
    """The ConvNeXt on a CPU, as the docstring of this file says."""

    @torch.inference_mode()
    def __init__(self, model, dtype):
        self.dtype = dtype
        self.stages = [(self._fold(downsample), [self._block(block) for block in stage])
                       for downsample, stage in zip(model.downsample_layers, model.stages)]  # fmt: skip
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)

    def _fold(self, layers):
        """A copy of layers, with each BatchNorm in the convolution before it; one before a padded convolution stays."""
        folded = []
        for layer in layers:
            if isinstance(layer, nn.BatchNorm2d) and folded and isinstance(folded[-1], nn.Conv2d):
                folded[-1] = nn.utils.fuse_conv_bn_eval(folded[-1], layer)
            else:
                folded.append(copy.deepcopy(layer))
        return nn.Sequential(*folded).to(self.dtype, memory_format=torch.channels_last)

    def _block(self, block):
        expand = make_linear(block.pwconv1.weight, block.pwconv1.bias, self.dtype, gelu=True)
        weight, bias = block.pwconv2.weight * block.gamma[:, None], block.pwconv2.bias * block.gamma
        return self._fold([block.dwconv, block.norm]), expand, make_linear(weight, bias, self.dtype)

    @torch.inference_mode()  # a mode of the thread
    def _forward(self, x):
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for downsample, blocks in self.stages:
            x = downsample(x)
            dim = x.shape[1]
            stream = x.permute(0, 2, 3, 1).reshape(-1, dim)  # (N, C, H, W) -> (N H W, C); what x is a view of
            x = stream.view(len(x), *x.shape[2:], dim).permute(0, 3, 1, 2)
            rows = max(256, HIDDEN_BYTES // (4 * dim * stream.element_size()))
            for depthwise, expand, project in blocks:
                y = depthwise(x).permute(0, 2, 3, 1).reshape(-1, dim)
                for into, part in zip(stream.split(rows), y.split(rows)):
                    into.add_(project(expand(part)))
        return self.head(self.norm(x.float().mean((2, 3))))

    def __call__(self, x):
        threads = torch.get_num_threads()
        workers = min(threads, MOST_WORKERS)
        parts = x.split(max(1, min(micro_batch(x.device, *x.shape[2:]), -(-len(x) // workers))))
        if workers == 1 or len(parts) == 1:
            return torch.cat([self._forward(part) for part in parts])
        torch.set_num_threads(threads // workers)
        try:
            with Threads(workers) as pool:
                return torch.cat(list(pool.map(self._forward, parts)))
        finally:
            torch.set_num_threads(threads)


def make_linear(weight, bias, dtype, gelu=False):
    """x (..., in) -> (..., out), with GELU if asked for; in oneDNN's blocked layout where PyTorch has it."""
    weight, bias = weight.to(dtype, copy=True), bias.to(dtype, copy=True)
    ops = getattr(torch.ops, "mkldnn", None)  # the ops that torch.compile uses on a CPU; they have no public name
    if torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise"):
        packed = ops._reorder_linear_weight(weight.contiguous())
        kind = ("gelu", [], "none") if gelu else ("none", [], "")
        return lambda x: ops._linear_pointwise(x, packed, bias, *kind)
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias))
    return lambda x: F.linear(x, weight, bias)


# ---------------------------------------------------------------- from slices to logits


@torch.inference_mode()
def predict_logits(model, slices, view, runtime, *, batch_size=64, bar=None):
    """z_AD - z_NC of a model for each of the N slices of a SliceSet, float64 (N,), in the order of its index.

    `view` holds image_size and, if they are not the usual ones, mean and std. InputError if an output is not finite, as
    happens when fp16 overflows. None if the run is to stop (see runtime.StopRequest). `bar` labels a progress bar.
    """
    engine, logits = make_engine(model, runtime), []
    size, mean, std = view["image_size"], view.get("mean", MEAN), view.get("std", STD)
    batches = make_loader(slices, batch_size, device=runtime.device)
    for x, _ in tqdm(batches, bar, unit=" batches", leave=False, disable=None if bar else True):
        logits.append(engine(eval_transform(x.to(runtime.device, non_blocking=True), size, mean, std)))
        if runtime.stop and runtime.stop.caught and runtime.world == 1:  # several agree after the whole of it
            return None
    z = torch.cat(logits).double().cpu().numpy() if logits else np.zeros((0, len(CLASSES)))
    z = z[:, CLASSES.index("AD")] - z[:, CLASSES.index("NC")]
    lost = int((~np.isfinite(z)).sum())
    if lost:
        raise InputError(f"the model gives no finite output for {lost} of {len(z)} slices in {runtime.precision}; "
                         "try --amp off, or a lower --lr if it is being trained")
    return z


# ---------------------------------------------------------------- from logits to calibrated predictions


def predict_slices(checkpoint, slices, runtime, *, batch_size=64, exposure=None):
    """Predict a SliceSet with a checkpoint's model, and its baselines, as far as its files could be read.

    Returns a table with metrics.PREDICTIONS for each row of the index; p_AD, the softmax probability of AD, is not yet
    calibrated (see `calibrated`). `exposure` replaces that of the checkpoint's training.
    """
    slices = replace(slices, index=slices.index.reset_index(drop=True))
    index, readable = slices.index, slices.where(slices.index.error.isna())
    model = build_model(checkpoint).to(runtime.device, memory_format=torch.channels_last)
    z = predict_logits(model, readable, checkpoint, runtime, batch_size=batch_size, bar="predicting")
    found = readable.index[[]].assign(
        logit=z, p_AD=metrics.expit(z), out_of_range=out_of_range(readable.index, checkpoint["slice_stats"]),
        exposure=find_exposure(readable.index, checkpoint["exposure"] if exposure is None else exposure))  # fmt: skip
    if checkpoint.get("baselines"):
        found = found.join(predict_baselines(checkpoint["baselines"], readable))
    table = index.join(found).reindex(columns=metrics.PREDICTIONS)
    types = dict.fromkeys(metrics.PREDICTIONS, "string") | metrics.NUMBERS
    return table.astype(types).assign(threshold=metrics.THRESHOLD)


def calibrated(predictions, checkpoint, coverage=None):
    """Predictions as the checkpoint's calibration has them: p_AD at its temperature, prediction at its threshold, and
    where a coverage is asked for prediction_set, "AD", "NC" or "AD|NC", that of the whole scan. A scan with a slice out
    of the training range has "AD|NC": what was promised was promised for others."""
    calibration = checkpoint.get("calibration")
    if calibration is None:
        if coverage is not None:
            raise InputError("the checkpoint was not calibrated, since its run did not finish; finish it with "
                             "--resume, or leave out --coverage")
        calibration = {"temperature": 1.0, "threshold": metrics.THRESHOLD}
    # seven digits from here on, as the files have them, so that scores can be repeated from files
    p_ad = metrics.expit(predictions.logit / calibration["temperature"]).round(7)
    table = metrics.with_predictions(predictions.assign(p_AD=p_ad, threshold=calibration["threshold"]))
    if coverage is not None:
        quantile = metrics.conformal_quantile(calibration, coverage)
        scans = metrics.aggregate(table[table.p_AD.notna()], "scan")
        sets = metrics.prediction_sets(scans.p_AD.to_numpy(float), scans.prediction.to_numpy(str), quantile)
        sets = np.where(scans.n_out_of_range > 0, "AD|NC", sets)
        table["prediction_set"] = table.scan.map(dict(zip(scans.scan, sets))).astype("string")
    return table


def most_coverage(checkpoint, coverage):
    """The largest coverage that the checkpoint's validation can promise, if that is less than `coverage`; else None."""
    most = checkpoint["calibration"]["groups"] / (checkpoint["calibration"]["groups"] + 1)
    return most if most < coverage - 1e-9 else None  # else `metrics.conformal_quantile` is finite
