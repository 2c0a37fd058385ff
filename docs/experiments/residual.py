"""What does the float32 residual stream cost under autocast, and does it change what is learned?

    python -m docs.experiments.residual                 # time of a training step, by stream
    python -m docs.experiments.residual --train FLAGS   # train.py FLAGS, with a 16-bit stream
    python -m docs.experiments.residual --imitate 16-bit FLAGS      # both streams, on a CPU that
    python -m docs.experiments.residual --imitate float32 FLAGS     # has no bfloat16

FLAGS are those of train.py, with --out for the run folder.

In 16 bits the sum of a block's input and its branch is rounded to 8 (bfloat16) or 11 bits, so that
a branch with a LayerScale of 1e-6 changes nothing. The model therefore adds in float32, as
torchvision's does. The first command times steps of `atto` in bfloat16 with either stream in turns,
on one machine, and prints the median ratio. The second trains with the 16-bit stream: compare its
validation with that of the same flags given to train.py.

A CPU without bfloat16 takes about 13 times as long with it as with float32. `--imitate` therefore
computes in float32 and rounds what autocast would have in bfloat16, forwards and backwards. Only
the training is rounded; give `--amp off`.
"""

import sys
from contextlib import ExitStack
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import train
from adnc.cli import COUNT, Parser, run_script
from adnc.resources import wait_for
from modules import ConvNeXtBlock, make_model
from tools.benchmark import take_turns
from utils import has_native_bf16, pick_device


def forward_in_16_bits(block, x):
    """ConvNeXtBlock.forward with LayerScale and the sum in the precision of autocast."""
    y = block.norm(block.dwconv(x)).permute(0, 2, 3, 1)
    y = block.pwconv2(block.act(block.pwconv1(y)))
    y = (block.gamma.to(y.dtype) * y).permute(0, 3, 1, 2)
    return x.to(y.dtype) + block.drop_path(y)


def stream_in_16_bits():
    """A context in which the residual stream has the precision of autocast."""
    return mock.patch.object(ConvNeXtBlock, "forward", forward_in_16_bits)


# ---------------------------------------------------------------- bfloat16 imitated

FORWARD = ConvNeXtBlock.forward


def rounded(x):
    """A float32 tensor rounded to bfloat16, and its gradient, too."""
    return x.bfloat16().float()


class Imitation(TorchFunctionMode):
    """In this context convolutions, linear layers and GELU round their inputs and weights, and
    their result, to bfloat16, as autocast's kernels do, which add in float32. LayerNorm computes in
    float32 in both."""

    ROUNDED = (torch.conv2d, torch.nn.functional.linear, torch.nn.functional.gelu)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in self.ROUNDED or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        args = [
            rounded(item) if torch.is_tensor(item) and item.is_floating_point() else item
            for item in args
        ]
        return rounded(function(*args, **kwargs))


def forward_imitated_in_16_bits(block, x):
    """`forward_in_16_bits` in float32 with the roundings of bfloat16."""
    if not torch.is_grad_enabled():
        return FORWARD(block, x)
    y = block.norm(block.dwconv(x)).permute(0, 2, 3, 1)
    y = block.pwconv2(block.act(block.pwconv1(y)))
    y = rounded(rounded(block.gamma) * y).permute(0, 3, 1, 2)
    return rounded(rounded(x) + block.drop_path(y))


def imitation(stream):
    """A context in which training imitates bfloat16, with that stream: "16-bit" or "float32"."""
    context = ExitStack()
    context.enter_context(Imitation())
    if stream == "16-bit":
        patch = mock.patch.object(ConvNeXtBlock, "forward", forward_imitated_in_16_bits)
        context.enter_context(patch)
    return context


# ---------------------------------------------------------------- command


def measure(device, image_size, batch_size, repeats):
    """The result of `take_turns` for a training step with either stream."""
    torch.manual_seed(0)
    model = make_model(variant="atto", in_chans=1, num_classes=2)
    state = train.TrainState(model, device=device, amp=torch.bfloat16, lr=1e-6)
    x = torch.randn(batch_size, 1, image_size, image_size, device=device)
    y = torch.arange(batch_size, device=device) % 2
    criterion = train.make_loss()

    def in_float32():
        train.train_step(state, x, y, criterion=criterion)

    def in_16_bits():
        with stream_in_16_bits():
            in_float32()

    candidates = {"16-bit stream": in_16_bits, "float32 stream": in_float32}
    return take_turns(candidates, repeats, wait=lambda: wait_for(device))


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--train"]:
        with stream_in_16_bits():
            train.main(words[1:])
        return
    if words[:1] == ["--imitate"] and words[1:2] in (["16-bit"], ["float32"]):
        with imitation(words[1]):
            train.main(words[2:])
        return
    parser = Parser(__doc__)
    parser.add_argument("--image-size", type=COUNT, default=112, metavar="PX", help="(112)")
    parser.add_argument("--batch-size", type=COUNT, default=32, metavar="N", help="(32)")
    parser.add_argument("--repeats", type=COUNT, default=9, metavar="N", help="turns (9)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (auto)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if device.type == "cpu" and not has_native_bf16():
        print("warning: this CPU emulates bfloat16: the ratio is not that of one that has it")
    rows = measure(device, args.image_size, args.batch_size, args.repeats)
    ratio = rows["float32 stream"]["ratio"]
    print(f"a step with the float32 stream takes {1 / ratio:.3f} times that with a 16-bit stream")


if __name__ == "__main__":
    run_script(main)
