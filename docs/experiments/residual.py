"""What does the float32 residual stream cost under autocast, and does it change what is learned?

    python -m docs.experiments.residual                 # time of a training step, by stream
    python -m docs.experiments.residual --train FLAGS   # train.py FLAGS, with a 16-bit stream

In 16 bits the sum of a block's input and its branch is rounded to 8 (bfloat16) or 11 bits, so that
a branch with a LayerScale of 1e-6 changes nothing. The model therefore adds in float32, as
torchvision's does. The first command times steps of `atto` in bfloat16 with either stream in turns,
on one machine, and prints the median ratio. The second trains with the 16-bit stream: compare its
validation with that of the same flags given to train.py.
"""

import sys
from unittest import mock

import torch

import train
from adnc.cli import COUNT, Parser, run_script
from modules import ConvNeXtBlock, make_model
from tools.benchmark import take_turns, wait_for
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
