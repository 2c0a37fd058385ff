"""The CUDA path without CUDA: tensors that have a device, a type and a shape, and no numbers (FakeTensorMode). A tensor
that is left on the wrong device fails here, and not at the desk of the first user with a GPU."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import dataset
from adnc import engine
import train
from adnc.engine import TrainState, make_mix, train_one_epoch, validate
from modules import make_model
from adnc.distributed import Runtime, StopRequest

CUDA = torch.device("cuda", 0)


@pytest.fixture
def pretend(monkeypatch):
    """Tensors may be on a GPU; what has no numbers gives zeros; backward, which needs a real device, gives gradients
    like the weights."""

    def backward(loss):
        assert loss.device == CUDA and loss.ndim == 0
        for group in state.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)

    def zeros(tensor):
        # What is read from a GPU in a loop is small.
        assert tensor.device.type == "cpu" or tensor.numel() <= 8
        return np.zeros(tensor.shape, float if tensor.is_floating_point() else int)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: zeros(tensor).tolist())
    monkeypatch.setattr(torch.Tensor, "numpy", zeros)
    for name in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
        monkeypatch.setitem(op_implementations_dict, name, lambda mode, op, tensor: 0)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, std: weight)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))
    state = None

    def start(model, amp):
        nonlocal state
        with CUDA:  # such tensors cannot be moved in a module: it is made there
            module = make_model(model)
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, device, **how: self)
        state = TrainState(module, Runtime(CUDA, amp, StopRequest()), lr=1e-3)
        return state

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield start


@pytest.mark.parametrize("model, amp, flags", [
    ("atto", torch.float16, []), ("atto", torch.bfloat16, ["--mixup", "0.2", "--cutmix", "1"]),
    ("narrow", torch.float16, []), ("cnn", None, ["--no-augment"]),
])  # fmt: skip
def test_an_epoch_and_its_validation_keep_every_tensor_on_the_gpu(ad_nc, pretend, model, amp, flags):
    args = train.parse_args([*SMALL, "--epochs", "2", *flags])
    slices = dataset.load_set(args, ad_nc, bar=None)
    part = slices.part("train")
    state = pretend(model, amp)
    batches = dataset.make_loader(part, args.batch_size, generator=torch.Generator(), device=CUDA)
    with unset_fake_temporarily():
        mix = make_mix(args)
    row = train_one_epoch(state, batches, len(part), args, mix)
    assert state.step == len(batches) and set(row) >= {"train_loss", "lr"}
    assert state.scaler.is_enabled() and (state.scaler.get_scale() != 1 or amp != torch.float16)
    kept = [*state.model.state_dict().values(), *state.sums.values()]
    kept += [value for values in state.optimizer.state.values() for value in values.values()]
    assert {tensor.device for tensor in kept} == {CUDA}
    scores, _ = validate(state, slices.part("val"), args)
    assert scores["val_accuracy"] is not None


def test_a_tensor_on_the_wrong_device_is_found(ad_nc, pretend, monkeypatch):
    args = train.parse_args(SMALL)
    state = pretend("atto", torch.float16)
    monkeypatch.setattr(engine, "train_transform", lambda x, size, **how: torch.zeros(len(x), 1, size, size))
    part = dataset.load_set(args, ad_nc, bar=None).part("train")
    with pytest.raises(RuntimeError, match="device|should be the same"):
        train_one_epoch(state, dataset.make_loader(part, 16, device=CUDA), len(part), args)


def test_a_set_that_does_not_fit_onto_the_gpu_is_fetched_by_processes(ad_nc, pretend, monkeypatch):
    part = dataset.load_set(train.parse_args(SMALL), ad_nc, bar=None).part("train")
    assert dataset.make_loader(part, 16, device=CUDA).dataset.images.device == CUDA
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    loader = dataset.make_loader(part, 16, device=CUDA)
    assert loader.num_workers == 2 and loader.pin_memory and not torch.is_tensor(loader.dataset.images)
