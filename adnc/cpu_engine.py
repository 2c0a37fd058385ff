"""A fast engine for predictions of a ConvNeXt on a CPU.

On a GPU the engine is the model under autocast. On a CPU the same function is computed differently,
up to rounding: LayerScale is folded into the linear layer before it, BatchNorm into the convolution
before it; linear layers hold their weights in oneDNN's blocked layout, with GELU in the same
kernel; and every core works on a few images of its own, in the wide layers on some rows of them, so
that activations stay in its cache. """

import copy
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN_BYTES = 2**20  # of the widest activations of a block at once: a core's share of the cache
MAX_WORKERS = (
    8  # beyond, threads wait for the interpreter's lock; each gets more than one core instead
)


def images_at_once(device, height, width):
    """How many images go through the model at once. On a CPU 8 of 224 x 224 pixels, or as many
    smaller ones: more do not stay in its cache. On a GPU all of them."""
    if device.type != "cpu":
        return 2**31
    return max(1, round(8 * 224**2 / (height * width)))


def make_engine(model, *, device, amp):
    """A function from images float32 (N, 1, S, S) to logits float32 (N, classes), in evaluation
    mode and in the precision `amp`, a dtype or None for float32.

    On a CPU the weights are copied, so a later change of the model has no effect. The copy is
    compared with the model; if it cannot be made or gives other answers, the model itself predicts,
    and a warning says so. """
    model.eval()
    plain = functools.partial(predict_plainly, model, device, amp)
    if device.type != "cpu" or not is_convnext(model):
        return plain
    x = torch.linspace(-20, 20, 64 * 64).sin().view(1, 1, 64, 64)  # a fixed picture
    exact = predict_plainly(model, device, None, x)
    if not exact.isfinite().all():
        return plain
    try:
        folded = FoldedConvNeXt(model, amp or torch.float32)
        size, difference = exact.abs().max().item(), (folded(x) - exact).abs().max().item()
        if difference <= (1e-3 if amp is None else 0.1) * size:
            return folded
        problem = f"its logits differ by {difference:.2g} from {size:.2g}"
    except (
        RuntimeError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:  # of oneDNN operators without a public name
        problem = str(error).splitlines()[0]
    message = f"the fast engine cannot be used here ({problem}); the plain model predicts, slower"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return plain


def is_convnext(model):
    return hasattr(model, "downsample_layers") and hasattr(model, "stages")


@torch.inference_mode()
def predict_plainly(model, device, amp, x):
    """The model as it is, under autocast."""
    with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
        return model(x.contiguous(memory_format=torch.channels_last)).float()


class FoldedConvNeXt:
    """The ConvNeXt on a CPU, as the docstring of this file says."""

    @torch.inference_mode()
    def __init__(self, model, dtype):
        self.dtype = dtype
        self.stages = []
        for downsample, stage in zip(model.downsample_layers, model.stages):
            self.stages.append((self._fold(downsample), [self._block(block) for block in stage]))
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)

    def _fold(self, layers):
        """A copy of layers, with each BatchNorm in the convolution before it; one before a padded
        convolution stays."""
        folded = []
        for layer in layers:
            if isinstance(layer, nn.BatchNorm2d) and folded and isinstance(folded[-1], nn.Conv2d):
                folded[-1] = nn.utils.fuse_conv_bn_eval(folded[-1], layer)
            else:
                folded.append(copy.deepcopy(layer))
        return nn.Sequential(*folded).to(self.dtype, memory_format=torch.channels_last)

    def _block(self, block):
        depthwise = self._fold([block.dwconv, block.norm])
        expand = make_linear(block.pwconv1.weight, block.pwconv1.bias, self.dtype, gelu=True)
        weight, bias = block.pwconv2.weight * block.gamma[:, None], block.pwconv2.bias * block.gamma
        return depthwise, expand, make_linear(weight, bias, self.dtype)

    @torch.inference_mode()  # a mode of the thread
    def _forward(self, x):
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for downsample, blocks in self.stages:
            x = downsample(x)
            dim = x.shape[1]
            stream = x.permute(0, 2, 3, 1).reshape(-1, dim)  # (N, C, H, W) -> (N H W, C)
            x = stream.view(len(x), *x.shape[2:], dim).permute(0, 3, 1, 2)  # a view of the stream
            rows = max(256, HIDDEN_BYTES // (4 * dim * stream.element_size()))
            for depthwise, expand, project in blocks:
                y = depthwise(x).permute(0, 2, 3, 1).reshape(-1, dim)
                for into, part in zip(stream.split(rows), y.split(rows)):
                    into.add_(project(expand(part)))
        return self.head(self.norm(x.float().mean((2, 3))))

    def __call__(self, x):
        threads = torch.get_num_threads()
        workers = min(threads, MAX_WORKERS)
        size = min(images_at_once(x.device, *x.shape[2:]), -(-len(x) // workers))
        parts = x.split(max(1, size))
        if workers == 1 or len(parts) == 1:
            return torch.cat([self._forward(part) for part in parts])
        torch.set_num_threads(threads // workers)
        try:
            with ThreadPoolExecutor(workers) as pool:
                return torch.cat(list(pool.map(self._forward, parts)))
        finally:
            torch.set_num_threads(threads)


def make_linear(weight, bias, dtype, gelu=False):
    """x (..., in) -> (..., out), with GELU if asked for; in oneDNN's blocked layout if PyTorch has
    it."""
    weight, bias = weight.to(dtype, copy=True), bias.to(dtype, copy=True)
    ops = getattr(
        torch.ops, "mkldnn", None
    )  # the operators of torch.compile on a CPU; they have no public name
    if torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise"):
        packed = ops._reorder_linear_weight(weight.contiguous())
        kind = ("gelu", [], "none") if gelu else ("none", [], "")
        return lambda x: ops._linear_pointwise(x, packed, bias, *kind)
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias))
    return lambda x: F.linear(x, weight, bias)
