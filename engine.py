"""A trained ConvNeXt made ready to predict.

Not run by itself: `utils.evaluate` makes an engine and feeds it.

On a GPU it is the model under autocast. On a CPU some things are done otherwise, to the same function (up to rounding):
LayerScale is folded into the linear layer before it; linear layers hold their weights in oneDNN's blocked layout, with
GELU in the same kernel; and every core works on a few images of its own, in the wide layers on some rows of them, so
that activations stay in its cache and no memory is given back and faulted in again between layers.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from modules import ConvNeXt

HIDDEN_BYTES = 2**20  # of the widest activations of a block at once: a core's share of the cache
MOST_WORKERS = 8  # beyond, threads wait for the interpreter's lock; they get more than one core each instead


def micro_batch(device, height, width):
    """How many images of a batch go through the model at once. On a CPU 8 of 224 x 224 pixels, or as many smaller ones:
    more do not stay in its cache, and each layer then waits for fresh memory. On a GPU all of them."""
    return max(1, round(8 * 224**2 / (height * width))) if device.type == "cpu" else 2**31


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
            self.stages.append((self._copy(conv), conv.stride, self._copy(norm), [self._block(b) for b in stage]))
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)

    def _copy(self, layer):
        weight, bias = layer.weight.to(self.dtype, copy=True), layer.bias.to(self.dtype, copy=True)
        return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight, bias

    def _block(self, block):
        expand = make_linear(block.pwconv1.weight, block.pwconv1.bias, self.dtype, gelu=True)
        weight, bias = block.pwconv2.weight * block.gamma[:, None], block.pwconv2.bias * block.gamma
        return self._copy(block.dwconv), self._copy(block.norm), expand, make_linear(weight, bias, self.dtype)

    @torch.inference_mode()  # a mode of the thread
    def _forward(self, x):
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for number, (kernel, stride, norm, blocks) in enumerate(self.stages):
            if number > 0:
                x = _normalise(x, norm)
            x = torch.conv2d(x, *kernel, stride)
            if number == 0:
                x = _normalise(x, norm)
            dim = x.shape[1]
            stream = x.permute(0, 2, 3, 1).reshape(-1, dim)  # (N, C, H, W) -> (N H W, C); what x is a view of
            x = stream.view(len(x), *x.shape[2:], dim).permute(0, 3, 1, 2)
            rows = max(256, HIDDEN_BYTES // (4 * dim * stream.element_size()))
            for (weight, bias), norm, expand, project in blocks:
                y = _normalise(torch.conv2d(x, weight, bias, padding=3, groups=dim), norm)
                y = y.permute(0, 2, 3, 1).reshape(-1, dim)
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
            with ThreadPoolExecutor(workers) as pool:
                return torch.cat(list(pool.map(self._forward, parts)))
        finally:
            torch.set_num_threads(threads)


def _normalise(x, norm):
    """LayerNorm over the channels of (N, C, H, W) in memory format channels_last."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *norm, eps=1e-6).permute(0, 3, 1, 2)


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
