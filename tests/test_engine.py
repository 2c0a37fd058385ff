"""A step, an epoch, and the state that they change."""

import argparse
import copy

import numpy as np
import pytest
import torch
from conftest import SMALL

import dataset
import train
from dataset import make_loader
from adnc.engine import SUMS, TrainState, train_one_epoch, train_step, validate
from modules import convnext
from adnc.distributed import Runtime, StopRequest


def make_state(seed=0, **how):
    torch.manual_seed(seed)
    return TrainState(convnext("atto"), Runtime(torch.device("cpu"), None, StopRequest()), lr=1e-3, **how)


@pytest.fixture(scope="module")
def flags():
    return train.parse_args([*SMALL, "--epochs", "2", "--amp", "off"])


@pytest.fixture(scope="module")
def slices(ad_nc, flags):
    return dataset.load_set(flags, ad_nc, bar=None)


def an_epoch(slices, flags):
    state, part = make_state(), slices.part("train")
    batches = make_loader(part, 16, generator=torch.Generator().manual_seed(0))
    row = train_one_epoch(state, batches, len(part), flags)
    row |= validate(state, slices.part("val"), flags)[0]
    return {name: value for name, value in row.items() if name != "images_per_s"}, state


def test_a_shuffled_and_relabelled_index_gives_the_same_batches_scores_and_weights(slices, flags):
    order = np.random.default_rng(0).permutation(len(slices))
    index = slices.index.iloc[order]
    index.index = np.arange(len(index)) // 3  # neither in order, nor unique, nor rows
    shuffled = dataset.SliceSet(index, slices.images, slices.root)
    for one, other in zip(make_loader(slices.part("train"), 16), make_loader(shuffled.part("train"), 16)):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    (row, state), (other_row, other_state) = an_epoch(slices, flags), an_epoch(shuffled, flags)
    assert row == other_row and row["train_loss"] > 0
    weights = zip(state.model.state_dict().values(), other_state.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_state_that_was_saved_and_loaded_takes_the_same_steps(slices):
    x, y = torch.randn(6, 1, 32, 32), torch.arange(6) % 2
    one = make_state(ema=0.5)
    train_step(one, x, y)
    other = make_state(seed=1, ema=0.5)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for state in (one, other):
        train_step(state, x, y)
    assert one.step == other.step == 2 and one.numbers() == other.numbers()
    for a, b in ((one.model, other.model), (one.ema, other.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_running_sums_count_what_their_names_say():
    state, x = make_state(), torch.randn(5, 1, 32, 32)
    y = torch.tensor([0, 1, 0, 1, 1])
    with torch.no_grad():
        state.model.head.weight.zero_()
        state.model.head.bias.copy_(torch.tensor([1.0, 0.0]))  # NC for everybody
    train_step(state, x, y, label_smoothing=0.0)
    sums = state.numbers()
    assert list(sums) == list(SUMS) and (sums["correct"], sums["slices"], sums["skipped"]) == (2, 5, 0)
    right, wrong = np.log(1 + np.exp(-1)), np.log(1 + np.exp(1))
    assert sums["loss"] == pytest.approx(2 * right + 3 * wrong, rel=1e-5)
    train_step(state, x * float("nan"), y)
    assert state.numbers() == sums | {"skipped": 1, "skipped_in_a_row": 1} and state.step == 2
    train_step(state, x, y)
    assert state.numbers()["skipped_in_a_row"] == 0
    state.start_epoch()
    assert state.numbers() == dict.fromkeys(SUMS, 0) and state.step == 0


def test_the_gradient_of_a_step_is_clipped_and_that_of_the_mean_loss():
    x, y, norms = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 1, 0]), []
    for clip in (1e9, 0.01):
        state = make_state()
        train_step(state, x, y, clip_grad=clip)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()]).item())
    model = make_state().model
    torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert norms[0] == pytest.approx(expected, rel=1e-4) and expected > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_validation_that_is_asked_to_stop_leaves_at_once(slices, flags):
    state = make_state()
    state.runtime.stop.caught = 15
    assert validate(state, slices.part("val"), argparse.Namespace(image_size=32, batch_size=4)) is None
