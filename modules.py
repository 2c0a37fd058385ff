"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), written from scratch.

    from modules import convnext
    model = convnext("tiny")                       # one grey channel in, two classes out (NC, AD)
    logits = model(torch.randn(8, 1, 224, 224))    # (8, 2)

Modules carry the names of the paper's code: downsample_layers, stages, dwconv, norm, pwconv1, act,
pwconv2, gamma, head. `load_weights` fills a model from a state dict of this project, the paper's
code, torchvision or timm. The project is binary by design: every other file expects the two classes
NC and AD.
"""

import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Depths and dims of tiny to large: Liu et al. 2022, section 2.3. The four below tiny have the sizes
# of timm and ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808, table 9) with the block of V1. narrow
# is ours, for few subjects: docs/recipes.md.
VARIANTS = {
    "narrow": dict(
        depths=(1, 1, 1), dims=(32, 64, 128),
        norm="batch", stem="conv", downsample="pool", layer_scale=1.0, init_std="fan_in",
    ),
    "atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}  # fmt: skip

# Arguments of ConvNeXt that may differ from the paper's, with their choices; None: any number.
MODEL_ARGS = {
    "norm": ("layer", "batch"),
    "stem": ("patch", "conv"),
    "downsample": ("patch", "pool"),
    "head_norm": ("layer", "batch"),
    "layer_scale": None,
    "init_std": None,
}


# ---------------------------------------------------------------- layers


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops a residual branch per sample.

    In training each sample is zeroed with probability `p` and the others are divided by 1 - p, so
    that the expectation is kept. In evaluation it is the identity.
    """

    def __init__(self, p=0.0):
        super().__init__()
        assert 0.0 <= p < 1.0, f"the drop-path rate is {p}; expected at least 0 and less than 1"
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        shape = [len(x), *(1 for _ in x.shape[1:])]
        keep = x.new_empty(shape).bernoulli_(1.0 - self.p)
        return x * (keep / (1.0 - self.p))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels (Ba et al. 2016, arXiv 1607.06450), epsilon 1e-6.

    With `channels_first` it takes (N, C, H, W) instead of (..., C). In memory format channels_last
    the two permutes are views, so both forms run the same kernel. Under autocast the output keeps
    the type of the input: the kernel sums in float32 anyway, and a float32 output would only be
    cast back.
    """

    def __init__(self, dim, channels_first=False):
        super().__init__(dim, eps=1e-6)
        self.channels_first = channels_first

    def forward(self, x):
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        if self.channels_first:
            y = y.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return y


def make_norm(kind, dim):
    """Normalisation of (N, C, H, W): "layer" over channels, or "batch" (arXiv 1502.03167)."""
    if kind == "layer":
        return LayerNorm(dim, channels_first=True)
    return nn.BatchNorm2d(dim)


class ConvNeXtBlock(nn.Module):
    """One residual block (paper, figure 4), (N, C, H, W) -> (N, C, H, W).

    Depthwise 7x7, norm, linear to 4C, GELU, linear to C, LayerScale, DropPath. `gamma` is
    LayerScale (Touvron et al. 2021, arXiv 2103.17239): a learned factor per channel. At its initial
    value of 1e-6 every block starts as the identity.
    """

    def __init__(self, dim, drop_path=0.0, layer_scale=1e-6, norm="layer"):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = make_norm(norm, dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)  # a 1x1 convolution, as a matrix product
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.norm(self.dwconv(x))
        y = y.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.pwconv2(self.act(self.pwconv1(y)))
        # gamma is float32, so that the residual stream is float32 under autocast, too. In 16 bits a
        # branch scaled by 1e-6 would change nothing.
        y = self.gamma * y
        y = y.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return x + self.drop_path(y)


def make_stem(kind, in_chans, dim, norm):
    """The stem, which divides the sides by 4.

    "patch" is the paper's: 4x4 with stride 4, norm. "conv": 3x3 with stride 2 and 3x3, each with
    norm and ReLU, then 2x2 max pooling.
    """
    # Built in both cases, also if it is not used: else the later layers would draw other random
    # weights than those with which the results in docs/ were made.
    patch = nn.Sequential(nn.Conv2d(in_chans, dim, kernel_size=4, stride=4), make_norm(norm, dim))
    if kind == "patch":
        return patch
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1),
        make_norm(norm, dim // 2),
        nn.ReLU(),
        nn.Conv2d(dim // 2, dim, kernel_size=3, padding=1),
        make_norm(norm, dim),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def make_downsample(kind, dim, dim_out, norm):
    """Between two stages: norm, then 2x2 with stride 2 ("patch", the paper's) or 3x3 and 2x2 max
    pooling ("pool")."""
    patch = nn.Conv2d(dim, dim_out, kernel_size=2, stride=2)  # built in both cases, as in make_stem
    if kind == "patch":
        return nn.Sequential(make_norm(norm, dim), patch)
    pool = [nn.Conv2d(dim, dim_out, kernel_size=3, padding=1), nn.MaxPool2d(2)]
    return nn.Sequential(make_norm(norm, dim), *pool)


# ---------------------------------------------------------------- models


class ConvNeXt(nn.Module):
    """ConvNeXt of any number of stages; `convnext(variant)` makes one by name.

    Args:
        depths, dims: blocks and channels of each stage.
        in_chans, num_classes: channels of the input, number of logits.
        drop_path_rate: rate of the last block; it grows linearly from 0 in the first.
        norm: "layer" (paper) or "batch", in stem, blocks and down-samplings.
        stem, downsample: see `make_stem` and `make_downsample`.
        head_norm: normalisation of the pooled features, "layer" (paper) or "batch".
        layer_scale: initial value of LayerScale.
        init_std: SD of the initial weights, or "fan_in" for 1 / sqrt(inputs of a neuron).

    Takes (N, in_chans, H, W), gives logits (N, num_classes). With four stages H and W are at least
    32.
    """

    def __init__(
        self, *, depths, dims, in_chans=1, num_classes=2, drop_path_rate=0.0,
        norm="layer", stem="patch", downsample="patch", head_norm="layer",
        layer_scale=1e-6, init_std=0.02,
    ):  # fmt: skip
        super().__init__()
        self.downsample_layers = nn.ModuleList([make_stem(stem, in_chans, dims[0], norm)])
        for dim, dim_out in zip(dims, dims[1:]):
            self.downsample_layers.append(make_downsample(downsample, dim, dim_out, norm))

        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims):
            blocks = [ConvNeXtBlock(dim, next(rates), layer_scale, norm) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))

        self.norm = LayerNorm(dims[-1]) if head_norm == "layer" else nn.BatchNorm1d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self._init_weights(init_std)

    def _init_weights(self, init_std):
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                std = init_std
                if init_std == "fan_in":
                    std = module.weight[0].numel() ** -0.5
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, dims[-1]): the normalised mean over the last feature map."""
        side = 2 * 2 ** len(self.stages)  # the stem divides by 4, each down-sampling by 2
        assert x.ndim == 4 and min(x.shape[2:]) >= side, (
            f"the input has shape {tuple(x.shape)}; expected (N, C, H, W) with H and W of at least "
            f"{side}"
        )
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x.mean((2, 3)))  # global average pool: (N, C, H, W) -> (N, C)

    def forward(self, x):
        return self.head(self.forward_features(x))


def convnext(variant="tiny", *, in_chans=1, num_classes=2, drop_path_rate=0.0, **model_args):
    """A ConvNeXt with fresh weights. `model_args` (see MODEL_ARGS) replace those of the variant.
    ValueError for an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(
            f"there is no ConvNeXt variant {variant!r}; choose one of {', '.join(VARIANTS)}"
        )
    settings = dict(in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate)
    return ConvNeXt(**{**VARIANTS[variant], **settings, **model_args})


class PlainCNN(nn.Sequential):
    """The usual small CNN, for comparison: four times 3x3 convolution, BatchNorm, ReLU and 2x2 max
    pooling, then global average pool and a linear layer.

    Takes (N, in_chans, H, W) with H and W of at least 16, gives logits (N, num_classes).
    """

    def __init__(self, *, in_chans=1, num_classes=2, dims=(16, 32, 64, 128)):
        layers = []
        for dim, dim_out in zip((in_chans, *dims), dims):
            layers += [
                nn.Conv2d(dim, dim_out, kernel_size=3, padding=1),
                nn.BatchNorm2d(dim_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dims[-1], num_classes)]
        super().__init__(*layers, *head)


class Ensemble(nn.Module):
    """Several models as one: its margin z_AD - z_NC is the mean of its members' margins, each
    divided by the member's temperature.

    Takes images (N, 1, S, S) with S the largest image size of a member; the others get them
    shrunk. Gives logits (N, 2). Explanations use it; a prediction runs one member after the other
    (predict.predict_members), each on slices of exactly its size.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList([make_model(**member["model"]) for member in members])
        self.image_sizes = [member["image_size"] for member in members]
        self.temperatures = [member["temperature"] for member in members]

    def parts(self):
        """(member, image size, temperature) of each."""
        return zip(self.members, self.image_sizes, self.temperatures)

    def shrink(self, x, image_size):
        if x.shape[-1] == image_size:
            return x
        size = (image_size, image_size)
        return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)

    def forward(self, x):
        total = 0
        for member, size, temperature in self.parts():
            total = total + member(self.shrink(x, size)) / temperature
        return total / len(self.members)


def make_model(variant, *, in_chans=1, num_classes=2, drop_path_rate=0.0, **model_args):
    """The ConvNeXt of that name, for "cnn" the plain CNN, which has neither DropPath nor
    MODEL_ARGS, or for "ensemble" an Ensemble of its `members`."""
    if variant == "ensemble":
        return Ensemble(**model_args)
    if variant == "cnn":
        return PlainCNN(in_chans=in_chans, num_classes=num_classes)
    sizes = dict(in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate)
    return convnext(variant, **sizes, **model_args)


def describe_model(variant, members=()):
    """What a model is called, given the first arguments of `make_model`."""
    if variant == "ensemble":
        names = [describe_model(member["model"]["variant"]) for member in members]
        counts = {name: names.count(name) for name in names}
        return f"ensemble of {', '.join(f'{n} {name}' for name, n in counts.items())}"
    return "plain CNN" if variant == "cnn" else f"ConvNeXt {variant}"


def has_batchnorm(model):
    """Whether a training step depends on the statistics of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# ---------------------------------------------------------------- weights of other projects

# Each pair rewrites a name of torchvision (features, block, classifier) or timm (stem, blocks,
# conv_dw, mlp, head.norm, head.fc) into ours. Even features are the stem and the down-samplings,
# odd ones the stages; both count from 0 here.
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

# What wrappers put before a name: module. (DataParallel), _orig_mod. (torch.compile), model.
# (Lightning).
_PREFIX = re.compile(
    r"^(?:.*?\.)??(?=(?:downsample_layers|stages|features|stem|norm|head|classifier)\.)"
)


def our_name(name):
    """The name that a tensor of torchvision, timm or the paper's code has in this module."""
    name = _PREFIX.sub("", name, count=1)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def is_like(tensor, ours):
    """Whether a tensor of a file can be a parameter or buffer like `ours`: dense, finite, real
    where ours is."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    if not ours.is_floating_point():
        return True
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())


def load_weights(model, state_dict):
    """Fill `model` from a ConvNeXt state dict of this project, the paper's code, torchvision or
    timm.

    A stem of three channels is summed into a stem of one: on a grey image, copied three times, it
    gives the same output. Tensors of another shape, such as a head for other classes, are left.

    Returns (loaded, left): names of the parameters that were filled, and names on either side
    without a partner. Raises ValueError if no block of the model was filled, or if the tensors are
    not dense real numbers.
    """
    ours = model.state_dict()
    loaded, left = [], []
    for theirs, tensor in state_dict.items():
        name = our_name(theirs)
        if name in ours and not is_like(tensor, ours[name]):
            raise ValueError(
                f"{theirs} ({tensor.dtype}, {tensor.layout}, {tensor.device}) holds no dense, "
                "finite, real numbers; expected the weights of a trained model"
            )
        stem = name == "downsample_layers.0.0.weight" and name in ours and tensor.ndim == 4
        if stem and ours[name].shape[1] == 1:
            tensor = tensor.sum(1, keepdim=True)
        # torchvision's layer_scale is (C, 1, 1) and timm's linear layers may be (4C, C, 1, 1)
        if (
            name in ours
            and name not in loaded
            and tensor.squeeze().shape == ours[name].squeeze().shape
        ):
            ours[name].copy_(tensor.reshape(ours[name].shape))
            loaded.append(name)
        else:
            left.append(name)
    if not any(name.startswith("stages.") for name in loaded):
        examples = ", ".join(list(state_dict)[:3])
        raise ValueError(
            f"no block of the model could be filled: the weights are named {examples} ...; "
            "expected a ConvNeXt of the same variant, as torchvision, timm or this project saves "
            "it"
        )
    left += [name for name in ours if name not in loaded and name not in left]
    return loaded, left
