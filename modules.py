"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), written from scratch.

    from modules import convnext
    model = convnext("tiny")           # one grey channel in, two classes out (NC, AD)
    logits = model(torch.randn(8, 1, 224, 224))        # (8, 2)

Modules carry the names of the paper's code (downsample_layers, stages, dwconv, norm, pwconv1, act, pwconv2, gamma,
head). `load_weights` fills a model from a state dict of ours, of torchvision's or of timm's ConvNeXt.
"""

import re
from collections import Counter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Liu et al. 2022, section 2.3, for tiny to large; the four below tiny are the sizes of timm and of ConvNeXt V2
# (Woo et al. 2023, arXiv 2301.00808, table 9) with the block of V1.
VARIANTS = {
    "narrow": dict(depths=(1, 1, 1), dims=(32, 64, 128), norm="batch", stem="conv", downsample="pool",
                   layer_scale=1.0, init_std="fan_in"),
    "atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}

PAPER = dict(norm="layer", stem="patch", downsample="patch", layer_scale=1e-6, init_std=0.02, head_norm="layer")


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops a whole residual branch for a sample.

    In training each sample of a batch is zeroed with probability `p` and the others are divided by 1 - p, so that the
    expectation is kept; in evaluation it is the identity.
    """

    def __init__(self, p=0.0):
        super().__init__()
        assert 0.0 <= p < 1.0, f"the drop-path rate is {p}; expected a number from 0 up to, but not including, 1"
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - self.p)
        return x * (keep / (1.0 - self.p))

    def extra_repr(self):
        return f"p={self.p:.3f}"


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels (Ba et al. 2016, arXiv 1607.06450), epsilon 1e-6 as in the paper's code.

    With `channels_first` it takes (N, C, H, W) instead of (..., C). In memory format channels_last the two permutes
    are views, so that both forms run the one kernel of PyTorch. Under autocast the output keeps the input's type: the
    kernel sums in float32 anyway, and a float32 output would be cast back, at twice the memory traffic.
    """

    def __init__(self, dim, channels_first=False):
        super().__init__(dim, eps=1e-6)
        self.channels_first = channels_first

    def forward(self, x):
        x = x.permute(0, 2, 3, 1) if self.channels_first else x  # (N, C, H, W) -> (N, H, W, C)
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.permute(0, 3, 1, 2) if self.channels_first else y


def make_norm(kind, dim):
    """Normalisation of (N, C, H, W): "layer" over the channels, or "batch" (Ioffe & Szegedy 2015, arXiv 1502.03167)."""
    return {"layer": lambda: LayerNorm(dim, channels_first=True), "batch": lambda: nn.BatchNorm2d(dim)}[kind]()


class _Depthwise(torch.autograd.Function):
    """Depthwise 7x7 convolution of x bfloat16 (N, C, H, W) on a CPU. The gradient of the weights is taken in float32:
    it is more exact, and oneDNN's kernel for it is faster (docs/speed.md)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=3, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dim, flipped = x.shape[1], weight.to(x.dtype).flip(2, 3)
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad.float(), x.float(), weight, [dim], [1, 1], [3, 3], [1, 1], False, [0, 0], dim, [False, True, True])
        return F.conv2d(grad, flipped, padding=3, groups=dim), of_weight, of_bias


class ConvNeXtBlock(nn.Module):
    """One residual block (paper, figure 4): depthwise 7x7, norm, C to 4C, GELU, 4C to C, LayerScale, DropPath.

    Takes and gives (N, C, H, W). `gamma` is LayerScale (Touvron et al. 2021, arXiv 2103.17239): a learned factor per
    channel that starts at `layer_scale`; at 1e-6 every block starts as the identity.
    """

    def __init__(self, dim, drop_path=0.0, layer_scale=1e-6, norm="layer"):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = make_norm(norm, dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)  # a 1x1 convolution, as a matrix product on (N, H, W, C)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def _depthwise(self, x):
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled():
            return _Depthwise.apply(x, self.dwconv.weight, self.dwconv.bias)
        return self.dwconv(x)

    def forward(self, x):
        y = self.norm(self._depthwise(x)).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.pwconv2(self.act(self.pwconv1(y)))
        y = (self.gamma.to(y.dtype) * y).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return x + self.drop_path(y)


class ConvNeXt(nn.Module):
    """ConvNeXt of any number of stages; `convnext(variant)` makes one by name. The options have the paper's values by
    default.

    `downsample_layers[0]` is the stem, which divides the sides by 4: "patch", 4x4 with stride 4 and norm, or "conv",
    3x3 with stride 2 and 3x3, each with norm and ReLU, then 2x2 max pooling. The others are norm and "patch", 2x2 with
    stride 2, or "pool", 3x3 and 2x2 max pooling. `init_std` is the SD of the initial weights, or "fan_in": one over the
    root of the inputs of a neuron. `head_norm` is that of the pooled features, "layer" or "batch". Takes (N, in_chans,
    H, W) with sides of at least 4 for the first stage, twice that for the second, and so on; gives logits
    (N, num_classes). The drop-path rate grows linearly over the blocks, from 0 to `drop_path_rate` in the last.
    """

    def __init__(self, *, depths, dims, in_chans=1, num_classes=2, drop_path_rate=0.0, **options):
        super().__init__()
        options = PAPER | options
        norm, layer_scale = options["norm"], options["layer_scale"]
        first = [nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), make_norm(norm, dims[0])]
        if options["stem"] == "conv":
            half = dims[0] // 2
            first = [nn.Conv2d(in_chans, half, kernel_size=3, stride=2, padding=1), make_norm(norm, half), nn.ReLU(),
                     nn.Conv2d(half, dims[0], kernel_size=3, padding=1), make_norm(norm, dims[0]), nn.ReLU(),
                     nn.MaxPool2d(2)]  # fmt: skip
        self.downsample_layers = nn.ModuleList([nn.Sequential(*first)])
        for before, after in zip(dims, dims[1:]):
            halve = [nn.Conv2d(before, after, kernel_size=2, stride=2)]
            if options["downsample"] == "pool":
                halve = [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.MaxPool2d(2)]
            self.downsample_layers.append(nn.Sequential(make_norm(norm, before), *halve))
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, next(rates), layer_scale, norm) for _ in range(depth)))
            for depth, dim in zip(depths, dims)
        )
        self.norm = LayerNorm(dims[-1]) if options["head_norm"] == "layer" else nn.BatchNorm1d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan_in = module.weight[0].numel()
                std = fan_in**-0.5 if options["init_std"] == "fan_in" else options["init_std"]
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, dims[-1]): the normalised mean over the last feature map."""
        side = 2 * 2 ** len(self.stages)  # the stem divides by 4, each down-sampling by 2
        assert x.ndim == 4 and min(x.shape[2:]) >= side, (
            f"the input has shape {tuple(x.shape)}; expected (N, C, H, W) with H and W of at least {side}"
        )
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x.mean((2, 3)))  # global average pool, (N, C, H, W) -> (N, C)

    def forward(self, x):
        return self.head(self.forward_features(x))


def convnext(variant="tiny", *, in_chans=1, num_classes=2, drop_path_rate=0.0, **options):
    """A ConvNeXt with fresh weights. `variant` is a key of `VARIANTS`; another name is a ValueError. Options are those
    of `PAPER`; where they are not given they are the variant's, or the paper's."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no ConvNeXt variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    given = dict(in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate) | options
    return ConvNeXt(**VARIANTS[variant] | given)


class PlainCNN(nn.Sequential):
    """What one would train instead: four times 3x3 convolution, BatchNorm, ReLU and 2x2 max pooling, then mean and
    linear layer. Takes (N, in_chans, H, W) with H and W of at least 16, gives logits (N, num_classes)."""

    def __init__(self, *, in_chans=1, num_classes=2, dims=(16, 32, 64, 128)):
        layers = []
        for before, after in zip((in_chans, *dims), dims):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dims[-1], num_classes))


def make_model(variant, *, in_chans=1, num_classes=2, **options):
    """The ConvNeXt of that name, or for "cnn" the plain one, to which options mean nothing."""
    if variant == "cnn":
        return PlainCNN(in_chans=in_chans, num_classes=num_classes)
    return convnext(variant, in_chans=in_chans, num_classes=num_classes, **options)


def describe_model(variant):
    return "plain CNN" if variant == "cnn" else f"ConvNeXt {variant}"


# Each pair rewrites a name of torchvision's (features, block, classifier) or timm's (stem, blocks, conv_dw, mlp,
# head.norm, head.fc) into ours. Even features are the stem and the down-samplings, odd ones the stages; both count
# from 0 here.
_RENAMES = [
    (r"^features\.(\d*[02468])\.", lambda m: f"downsample_layers.{int(m[1]) // 2}."),
    (r"^features\.(\d*[13579])\.", lambda m: f"stages.{int(m[1]) // 2}."),
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^(stages\.\d+)\.blocks\.", r"\1."),
    (r"\.(block\.0|conv_dw)\.", ".dwconv."),
    (r"\.block\.2\.", ".norm."),
    (r"\.(block\.3|mlp\.fc1)\.", ".pwconv1."),
    (r"\.(block\.5|mlp\.fc2)\.", ".pwconv2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^(classifier\.0|head\.norm)\.", "norm."),
    (r"^(classifier\.2|head\.fc)\.", "head."),
]


def _our_name(name):
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name, count=1)
    return name


# What wrappers put before the names: module. (several processes), _orig_mod. (torch.compile), model. (Lightning).
_PREFIX = re.compile(r"(.*?\.)??(?=(downsample_layers|stages|features|stem|norm|head|classifier)\.)")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?|teacher|momentum|target)(?![a-z])")


def _sets(content, where=""):
    """The sets of tensors in what a training script saved, by what is before their names: {"state_dict.student.":
    {name: tensor}}."""
    sets = {}
    for name, value in content.items():
        if isinstance(value, dict):
            sets |= _sets(value, f"{where}{name}.")
        elif torch.is_tensor(value):
            prefix = (_PREFIX.match(str(name)) or [""])[0]
            sets.setdefault(where + prefix, {})[str(name)[len(prefix):]] = value
    return sets


def load_weights(model, content):
    """Fill `model` from a ConvNeXt state dict of ours, torchvision's, timm's or the paper's code, or from the dict that
    a training script put it into. Of several sets of weights the one is taken that fills most of the model; of equal
    ones not the one that is named an average (ema, teacher), then the first.

    A stem of three channels is summed into a stem of one: on a grey image, copied three times, it gives the same.
    Tensors of other shape, such as a head for other classes, are left.

    Returns (loaded, left, taken): two lists of names as this module has them, of the parameters that were filled and of
    those on either side that found no partner, and what was before the names of the set that was taken. Raises
    ValueError if no block of the model was filled.
    """
    if not isinstance(content, dict):
        raise ValueError(f"the weights are a {type(content).__name__}; expected a state dict of names and tensors")
    ours, sets, fitting = model.state_dict(), _sets(content), {}
    stem = "downsample_layers.0.0.weight"
    for where, tensors in sets.items():
        fitting[where] = found = {}
        for theirs, tensor in tensors.items():
            name = _our_name(theirs)
            if name == stem and ours[stem].shape[1] == 1 and tensor.ndim == 4:
                tensor = tensor.sum(1, keepdim=True)
            # torchvision's layer_scale is (C, 1, 1), timm's small variants hold 1x1 convolutions, ours (C,) and (4C, C)
            if name in ours and name not in found and tensor.squeeze().shape == ours[name].squeeze().shape:
                found[name] = where, theirs, tensor
    taken = max(sets, key=lambda where: (len(fitting[where]), not _AVERAGED.search(where.lower())), default="")
    loaded = {}
    for where in sorted(where for where in sets if taken.startswith(where)):  # a head may be beside the backbone
        loaded |= fitting[where]
    if not any(name.startswith("stages.") for name in loaded):
        found = ", ".join([taken + name for name in sets.get(taken, [])][:3]) or "nothing"
        raise ValueError(
            f"no block of the model could be filled: the weights are named {found} ...; "
            "expected a ConvNeXt of the same variant, as torchvision, timm or this project saves it"
        )
    for name, (where, theirs, tensor) in loaded.items():
        ours[name].copy_(tensor.reshape(ours[name].shape))
        del sets[where][theirs]
    left = [theirs if _our_name(theirs) in loaded else _our_name(theirs) for theirs in sets.pop(taken)]
    left += [name for name in ours if name not in loaded and name not in left]
    others = Counter(re.sub(r"\.\d+(?=\.)", "", where).strip(".") or theirs
                     for where, tensors in sets.items() for theirs in tensors)  # fmt: skip
    return list(loaded), left + [f"{n} of {where}" for where, n in others.items()], taken.strip(".")
