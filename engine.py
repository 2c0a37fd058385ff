"""A trained ConvNeXt made ready to predict.

Not run by itself: `utils.evaluate` makes an engine and feeds it.

On a GPU it is the model under autocast. On a CPU three things are changed that change no function (up to rounding):
LayerScale and the affine part of LayerNorm are folded into the linear layers beside them; these hold their weights in
oneDNN's blocked layout, with GELU in the same kernel; and every core works on a few images of its own, so that
activations stay in its cache and no memory is given back and faulted in again between layers.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from modules import ConvNeXt

MICRO_BATCH = 4  # images of 224 x 224 on a core at once: about 10 MB at the widest layer
MOST_WORKERS = 8  # beyond, threads wait for the interpreter's lock; they get more than one core each instead


def make_engine(model, device, amp=None):
    """A function from images float32 (N, 1, S, S) to logits float32 (N, classes), in evaluation mode.

    `amp` is the dtype to compute in, None for float32. On a CPU the weights are copied, and a later change of the model
    is not seen.
    """
    model.eval()
    if device.type != "cpu" or not isinstance(model, ConvNeXt):
        return _Autocast(model, device, amp)
    return _Folded(model, amp or torch.float32)


class _Autocast:
    def __init__(self, model, device, amp):
        self.model, self.device, self.amp = model, device, amp

    @torch.inference_mode()
    def __call__(self, x):
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            return self.model(x.contiguous(memory_format=torch.channels_last)).float()


class _Folded:
    """The ConvNeXt on a CPU, as the docstring of this file says."""

    @torch.inference_mode()
    def __init__(self, model, dtype):
        self.dtype, self.stages = dtype, []
        for number, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages)):
            conv, norm = downsample if number == 0 else reversed(downsample)
            weight, bias = conv.weight, conv.bias
            affine = norm.weight.to(dtype, copy=True), norm.bias.to(dtype, copy=True)
            if number > 0:  # LayerNorm stands before the convolution: w * (a * x + b) = (w * a) * x + w * b
                bias = bias + (weight * norm.bias[None, :, None, None]).sum((1, 2, 3))
                weight, affine = weight * norm.weight[None, :, None, None], (None, None)
            self.stages.append((self._kernel(weight, bias), conv.stride, affine, [self._block(b) for b in stage]))
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)

    def _kernel(self, weight, bias):
        weight, bias = weight.to(self.dtype, copy=True), bias.to(self.dtype, copy=True)
        return weight.contiguous(memory_format=torch.channels_last), bias

    def _block(self, block):
        norm, one, two, gamma = block.norm, block.pwconv1, block.pwconv2, block.gamma
        return (
            self._kernel(block.dwconv.weight, block.dwconv.bias),
            make_linear(one.weight * norm.weight, one.bias + one.weight @ norm.bias, self.dtype, gelu=True),
            make_linear(two.weight * gamma[:, None], two.bias * gamma, self.dtype),
        )

    def _forward(self, x):
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for number, (kernel, stride, affine, blocks) in enumerate(self.stages):
            if number > 0:
                x = _normalise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = torch.conv2d(x, *kernel, stride)
            if number == 0:
                x = _normalise(x.permute(0, 2, 3, 1), *affine).permute(0, 3, 1, 2)
            for (weight, bias), expand, project in blocks:
                y = torch.conv2d(x, weight, bias, padding=3, groups=len(weight))
                y = project(expand(_normalise(y.permute(0, 2, 3, 1))))  # (N, C, H, W) -> (N, H, W, C)
                x = y.permute(0, 3, 1, 2).add_(x)
        return self.head(self.norm(x.float().mean((2, 3))))

    @torch.inference_mode()
    def __call__(self, x):
        threads = torch.get_num_threads()
        workers = min(threads, MOST_WORKERS)
        size = max(1, round(MICRO_BATCH * 224 * 224 / (x.shape[2] * x.shape[3])))
        parts = x.split(max(1, min(size, -(-len(x) // workers))))
        if workers == 1 or len(parts) == 1:
            return torch.cat([self._forward(part) for part in parts])
        with _one_at_a_time:  # the number of threads is the process's
            torch.set_num_threads(threads // workers)
            try:
                with ThreadPoolExecutor(workers) as pool:
                    return torch.cat(list(pool.map(self._work, parts)))
            finally:
                torch.set_num_threads(threads)

    def _work(self, part):
        with torch.inference_mode():  # a mode of the thread
            return self._forward(part)


_one_at_a_time = threading.Lock()


def _normalise(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


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
