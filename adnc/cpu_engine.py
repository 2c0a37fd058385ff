"""A fast engine for predictions of a ConvNeXt on a CPU.

The engine computes the function of the model, up to rounding, in fewer and larger kernels:
LayerScale is folded into the linear layer before it, BatchNorm into the convolution before it, and
linear layers hold their weights in oneDNN's blocked layout, with GELU in the same kernel where that
is faster. Each thread has a few images, and computes wide layers in chunks of rows, so that
activations stay in its core's cache. On a GPU, and for any other model, the engine is the model
under autocast.
"""

import copy
import functools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

# The widest activations of a block that are computed at once: a core's share of the cache.
HIDDEN_BYTES = 2**20

# More threads would wait for Python's global lock. With more cores, each thread gets several.
MAX_WORKERS = 8


def images_at_once(device, height, width):
    """The number of images that go through the model at once.

    On a CPU 8 of 224 x 224 pixels, or more of fewer pixels: their activations stay in the cache. On
    a GPU all of them.
    """
    if device.type != "cpu":
        return 2**31
    return max(1, round(8 * 224**2 / (height * width)))


def make_engine(model, *, device, amp):
    """A function from images float32 (N, 1, S, S) to logits float32 (N, classes).

    `amp` is the dtype of autocast, or None for float32. The model is put into evaluation mode. On a
    CPU its weights are copied, so a later change of the model has no effect. The copy is compared
    with the model on one image; if it cannot be made or its answer differs, the model itself
    predicts, and a RuntimeWarning says so.
    """
    model.eval()
    plain = functools.partial(predict_plainly, model, device, amp)
    if device.type != "cpu" or not is_convnext(model):
        return plain

    x = torch.linspace(-20, 20, 64 * 64).sin().view(1, 1, 64, 64)  # a fixed image
    exact = predict_plainly(model, device, None, x)
    if not exact.isfinite().all():
        return plain
    # The packed linear layers are operators without a public name: another version of PyTorch may
    # lack them, or give them other arguments.
    try:
        folded = FoldedConvNeXt(model, amp or torch.float32)
        answer = folded(x)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        problem = str(error).splitlines()[0]
    else:
        size, difference = exact.abs().max().item(), (answer - exact).abs().max().item()
        tolerance = 1e-3 if amp is None else 0.1
        if difference <= tolerance * size:
            return folded
        problem = f"its logits differ by {difference:.2g} from {size:.2g}"
    message = f"the fast engine cannot be used here ({problem}); the plain model predicts, slower"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return plain


def is_convnext(model):
    """Whether the model has the attributes of a ConvNeXt that the engine reads."""
    return hasattr(model, "downsample_layers") and hasattr(model, "stages")


@torch.inference_mode()
def predict_plainly(model, device, amp, x):
    """The logits of the model as it is, under autocast."""
    with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
        return model(x.contiguous(memory_format=torch.channels_last)).float()


class FoldedConvNeXt:
    """A ConvNeXt for prediction on a CPU: see the docstring of this file.

    In bfloat16 the sum over blocks is bfloat16, too, for speed, while the model adds in float32:
    branches with the LayerScale of 1e-6 of a fresh model change nothing here.
    """

    @torch.inference_mode()
    def __init__(self, model, dtype):
        self.dtype = dtype
        self.stages = []
        for downsample, stage in zip(model.downsample_layers, model.stages):
            blocks = [self._block(block) for block in stage]
            self.stages.append((self._fold(downsample), blocks))
        self.norm = copy.deepcopy(model.norm)
        self.head = copy.deepcopy(model.head)

    def _fold(self, layers):
        """A copy of the layers, with each BatchNorm folded into the convolution before it.

        A BatchNorm that no convolution precedes stays as it is.
        """
        folded = []
        for layer in layers:
            if isinstance(layer, nn.BatchNorm2d) and folded and isinstance(folded[-1], nn.Conv2d):
                folded[-1] = nn.utils.fuse_conv_bn_eval(folded[-1], layer)
            else:
                folded.append(copy.deepcopy(layer))
        return nn.Sequential(*folded).to(self.dtype, memory_format=torch.channels_last)

    def _block(self, block):
        """The three functions of a block: depthwise convolution with norm, expand, project."""
        depthwise = self._fold([block.dwconv, block.norm])
        expand = make_linear(block.pwconv1.weight, block.pwconv1.bias, self.dtype, gelu=True)
        weight = block.pwconv2.weight * block.gamma[:, None]  # LayerScale
        bias = block.pwconv2.bias * block.gamma
        return depthwise, expand, make_linear(weight, bias, self.dtype)

    @torch.inference_mode()  # here, because each thread has a mode of its own
    def _forward(self, x):
        """The logits of some images, in the calling thread."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for downsample, blocks in self.stages:
            x = downsample(x)
            n, dim, height, width = x.shape
            stream = x.permute(0, 2, 3, 1).reshape(-1, dim)  # (N, C, H, W) -> (N H W, C)
            x = stream.view(n, height, width, dim).permute(0, 3, 1, 2)  # a view: `add_` changes it
            rows = max(256, HIDDEN_BYTES // (4 * dim * stream.element_size()))
            for depthwise, expand, project in blocks:
                y = depthwise(x).permute(0, 2, 3, 1).reshape(-1, dim)
                for into, part in zip(stream.split(rows), y.split(rows)):
                    into.add_(project(expand(part)))
        return self.head(self.norm(x.float().mean((2, 3))))

    def __call__(self, x):
        threads = torch.get_num_threads()
        workers = min(threads, MAX_WORKERS)
        size = min(images_at_once(x.device, *x.shape[2:]), math.ceil(len(x) / workers))
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
    """A function (..., in) -> (..., out): a linear layer, with GELU if asked for.

    It is packed into oneDNN's blocked layout if this PyTorch has that. With AVX2 alone, oneDNN's
    GELU takes longer than PyTorch's, which is then called after it.
    """
    if gelu and torch.backends.cpu.get_cpu_capability() == "AVX2":
        linear = make_linear(weight, bias, dtype)
        return lambda x: F.gelu(linear(x))
    weight, bias = weight.to(dtype, copy=True), bias.to(dtype, copy=True)
    ops = getattr(torch.ops, "mkldnn", None)  # the operators that torch.compile uses on a CPU
    if torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise"):
        packed = ops._reorder_linear_weight(weight.contiguous())
        kind = ("gelu", [], "none") if gelu else ("none", [], "")
        return lambda x: ops._linear_pointwise(x, packed, bias, *kind)
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias))
    return lambda x: F.linear(x, weight, bias)
