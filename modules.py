"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), written from scratch.

    from modules import convnext
    model = convnext("tiny")           # one grey channel in, two classes out (NC, AD)
    logits = model(torch.randn(8, 1, 224, 224))        # (8, 2)

Modules carry the names of the paper's code (downsample_layers, stages, dwconv, norm, pwconv1, act, pwconv2, gamma,
head). `load_weights` fills a model from a state dict of ours, of torchvision's or of timm's ConvNeXt.
"""

import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Liu et al. 2022, section 2.3, for tiny to large; the four below tiny are the sizes of timm and of ConvNeXt V2
# (Woo et al. 2023, arXiv 2301.00808, table 9) with the block of V1.
VARIANTS = {
    "atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}


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
        if self.channels_first:
            return self._normalise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (N, C, H, W) -> (N, H, W, C) -> back
        return self._normalise(x)

    def _normalise(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ConvNeXtBlock(nn.Module):
    """One residual block (paper, figure 4): depthwise 7x7, LayerNorm, C to 4C, GELU, 4C to C, LayerScale, DropPath.

    Takes and gives (N, C, H, W). `gamma` is LayerScale (Touvron et al. 2021, arXiv 2103.17239): a learned factor per
    channel that starts at 1e-6, so that every block starts as the identity.
    """

    def __init__(self, dim, drop_path=0.0, layer_scale=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)  # a 1x1 convolution, as a matrix product on (N, H, W, C)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        y = (self.gamma.to(y.dtype) * y).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return x + self.drop_path(y)


class ConvNeXt(nn.Module):
    """ConvNeXt of four stages; `convnext(variant)` makes one by name.

    `downsample_layers[0]` is the stem, 4x4 with stride 4 and LayerNorm; the other three are LayerNorm and 2x2 with
    stride 2. Takes (N, in_chans, H, W) with H and W of at least 32, gives logits (N, num_classes).
    The drop-path rate grows linearly over the blocks, from 0 in the first to `drop_path_rate` in the last.
    """

    def __init__(self, *, depths, dims, in_chans=1, num_classes=2, drop_path_rate=0.0):
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm(dims[0], True))]
        )
        for before, after in zip(dims, dims[1:]):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm(before, True), nn.Conv2d(before, after, kernel_size=2, stride=2))
            )
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, next(rates)) for _ in range(depth))) for depth, dim in zip(depths, dims)
        )
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, dims[-1]): the normalised mean over the last feature map."""
        side = 32  # the stem and the three down-samplings divide by 4 * 2 * 2 * 2
        assert x.ndim == 4 and min(x.shape[2:]) >= side, (
            f"the input has shape {tuple(x.shape)}; expected (N, C, H, W) with H and W of at least {side}"
        )
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x.mean((2, 3)))  # global average pool, (N, C, H, W) -> (N, C)

    def forward(self, x):
        return self.head(self.forward_features(x))


def convnext(variant="tiny", *, in_chans=1, num_classes=2, drop_path_rate=0.0):
    """A ConvNeXt with fresh weights. `variant` is a key of `VARIANTS`; another name is a ValueError."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no ConvNeXt variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    return ConvNeXt(in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate, **VARIANTS[variant])


# Each pair rewrites a name of torchvision's (features, classifier) or timm's (stem, blocks, head.fc) into ours. Even
# features are the stem and the down-samplings, odd ones the stages; both count from 0 here.
_RENAMES = [
    (r"^(module\.|_orig_mod\.)+", lambda m: ""),
    (r"^features\.(\d*[02468])\.", lambda m: f"downsample_layers.{int(m[1]) // 2}."),
    (r"^features\.(\d*[13579])\.", lambda m: f"stages.{int(m[1]) // 2}."),
    (r"\.block\.0\.", lambda m: ".dwconv."),
    (r"\.block\.2\.", lambda m: ".norm."),
    (r"\.block\.3\.", lambda m: ".pwconv1."),
    (r"\.block\.5\.", lambda m: ".pwconv2."),
    (r"\.layer_scale$", lambda m: ".gamma"),
    (r"^classifier\.0\.", lambda m: "norm."),
    (r"^classifier\.2\.", lambda m: "head."),
    (r"^stem\.", lambda m: "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"downsample_layers.{m[1]}."),
    (r"^(stages\.\d+)\.blocks\.", lambda m: f"{m[1]}."),
    (r"\.conv_dw\.", lambda m: ".dwconv."),
    (r"\.mlp\.fc1\.", lambda m: ".pwconv1."),
    (r"\.mlp\.fc2\.", lambda m: ".pwconv2."),
    (r"^head\.norm\.", lambda m: "norm."),
    (r"^head\.fc\.", lambda m: "head."),
]


def _our_name(name):
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_weights(model, state_dict):
    """Fill `model` from a ConvNeXt state dict of ours, torchvision's, timm's or the paper's code.

    A stem of three channels is summed into a stem of one: on a grey image, copied three times, it gives the same.
    Tensors of other shape, such as a head for other classes, are left.

    Returns (loaded, left), two lists of names as this module has them: the parameters that were filled, and the names
    on either side that found no partner. Raises ValueError if no block of the model was filled.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"the weights are a {type(state_dict).__name__}; expected a state dict of names and tensors")
    # our checkpoints hold them under "weights", those of the paper's code under "model"
    state_dict = state_dict.get("weights", state_dict.get("model", state_dict))
    ours, loaded, left = model.state_dict(), [], []
    for theirs, tensor in state_dict.items():
        name = _our_name(theirs)
        target = ours.get(name)
        if target is None or not torch.is_tensor(tensor):
            left.append(name)
            continue
        if name == "downsample_layers.0.0.weight" and target.shape[1] == 1 and tensor.ndim == 4:
            tensor = tensor.sum(1, keepdim=True)
        # torchvision's layer_scale is (C, 1, 1), timm's small variants hold 1x1 convolutions, ours are (C,) and (4C, C)
        if tensor.numel() == target.numel() and tensor.squeeze().shape == target.squeeze().shape:
            target.copy_(tensor.reshape(target.shape))
            loaded.append(name)
        else:
            left.append(name)
    left += [name for name in ours if name not in loaded and name not in left]
    if not any(name.startswith("stages.") for name in loaded):
        found = ", ".join(list(state_dict)[:3]) or "nothing"
        raise ValueError(
            f"no block of the model could be filled: the weights are named {found} ...; "
            "expected a ConvNeXt of the same variant, as torchvision, timm or this project saves it"
        )
    return loaded, left
