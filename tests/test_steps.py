"""A training step, an epoch, and the state that they change."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import train_steps

import dataset
import train
from dataset import Batches
from modules import convnext, make_model
from train import TrainState, make_loss, train_one_epoch, train_step, validate
from utils import build_model, load_checkpoint

CPU = torch.device("cpu")
SCHEDULE = dict(steps_per_epoch=4, epochs=2, warmup_epochs=1, lr=2e-3)


def make_state(variant="atto", seed=0, **options):
    torch.manual_seed(seed)
    return TrainState(convnext(variant), device=CPU, amp=None, lr=1e-3, **options)


def step(state, x, y, label_smoothing=0.1, **options):
    return train_step(state, x, y, criterion=make_loss(label_smoothing), **options)


def weights_of(state):
    return [p.detach().clone() for p in state.model.parameters()]


@pytest.fixture(scope="module")
def slices(ad_nc):
    return dataset.load_set(ad_nc, val_fraction=0.25, progress=None)


def an_epoch(slices):
    """The row of one epoch, without its speed, and the state after it."""
    state = make_state()
    batches = Batches(slices.part("train"), 16, generator=torch.Generator().manual_seed(0))
    row = train_one_epoch(state, batches, criterion=make_loss(), schedule=SCHEDULE, image_size=32)
    row.update(validate(state, slices.part("val"), image_size=32, batch_size=16)[0])
    del row["images_per_s"]
    return row, state


# ---------------------------------------------------------------- batches


def test_batches_follow_randperm_and_hold_each_slice_once(slices):
    part = slices.part("train")
    batches = Batches(part, 16, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(3)).numpy()
    images = np.concatenate([x[:, 0].numpy() for x, _ in batches])
    labels = torch.cat([y for _, y in Batches(part, 16)])
    assert len(batches) == 4 and np.array_equal(images, part.images[part.rows[order]])
    assert labels.tolist() == part.is_ad.tolist()


def test_the_shares_of_several_processes_cover_a_batch_once(slices):
    part = slices.part("train")
    whole = [y.tolist() for _, y in Batches(part, 16)]
    for world in (2, 3):
        shares = [
            [y.tolist() for _, y in Batches(part, 16, rank=rank, world=world)]
            for rank in range(world)
        ]
        for number, batch in enumerate(whole):
            joined = [None for _ in batch]
            for rank in range(world):
                joined[rank::world] = shares[rank][number]
            assert joined == batch


def test_a_shuffled_and_relabelled_index_gives_the_same_batches_scores_and_weights(slices):
    order = np.random.default_rng(0).permutation(len(slices))
    index = slices.index.iloc[order]
    index.index = np.arange(len(index)) // 3  # neither in order, nor unique, nor rows
    shuffled = dataset.SliceSet(index, slices.images, slices.root)
    row, state = an_epoch(slices)
    other_row, other_state = an_epoch(shuffled)
    assert row == other_row and row["train_loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(weights_of(state), weights_of(other_state)))


# ---------------------------------------------------------------- a step


def test_a_step_counts_losses_and_correct_predictions():
    state, x, y = make_state(), torch.randn(5, 1, 32, 32), torch.tensor([0, 1, 0, 1, 1])
    with torch.no_grad():
        state.model.head.weight.zero_()
        state.model.head.bias.copy_(torch.tensor([1.0, 0.0]))  # predicts NC for every slice
    loss, correct, n_slices, skipped = step(state, x, y, label_smoothing=0.0).tolist()
    right, wrong = np.log(1 + np.exp(-1)), np.log(1 + np.exp(1))
    assert loss == pytest.approx(2 * right + 3 * wrong, rel=1e-5)
    assert (correct, n_slices, skipped) == (2, 5, 0)


def test_the_gradient_of_a_step_is_that_of_the_mean_loss_and_clipped():
    x, y = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 1, 0])
    norms = []
    for clip_grad in (1e9, 0.01):
        state = make_state()
        step(state, x, y, clip_grad=clip_grad)
        norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()]).item()
        )
    model = make_state().model
    torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert norms[0] == pytest.approx(expected, rel=1e-4) and expected > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_state_that_was_saved_and_loaded_takes_the_same_steps():
    x, y = torch.randn(6, 1, 32, 32), torch.arange(6) % 2
    one = make_state(ema=0.5)
    step(one, x, y)
    other = make_state(seed=1, ema=0.5)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    step(one, x, y)
    step(other, x, y)
    for a, b in ((one.model, other.model), (one.ema, other.ema)):
        assert all(
            torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values())
        )


def test_the_scale_of_another_precision_is_not_restored():
    saved = make_state().state_dict()
    saved["scaler"]["scale"] = 0.25
    state = make_state()
    state.load_state_dict(saved)
    assert state.scaler.get_scale() == 0.25
    state = TrainState(convnext("atto"), device=CPU, amp=torch.float16, lr=1e-3)
    state.load_state_dict(saved, same_precision=False)
    assert state.scaler.get_scale() == 2.0**16


def test_weight_decay_is_kept_off_one_dimensional_parameters():
    model = convnext("atto")
    decayed, others = train.make_optimizer(model, 1e-4, 0.05).param_groups
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0
    assert min(p.ndim for p in decayed["params"]) == 2 and decayed["weight_decay"] == 0.05
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert decayed["fused"] and others["fused"]


def test_layer_scale_gives_no_gradient_in_fp16_without_the_scaler():
    """At 1e-6 the gradients of a block's linear layers are below the smallest number of fp16."""
    torch.manual_seed(0)
    block, x = convnext("atto").stages[0][0].half(), torch.randn(2, 40, 7, 7).half()
    largest = {}
    for scale in (1.0, 2.0**16):  # GradScaler starts at 2**16
        block.zero_grad()
        (block(x).float().square().mean() * scale).backward()
        largest[scale] = block.pwconv1.weight.grad.abs().max()
    assert largest[1.0] == 0 < largest[2.0**16]


# ---------------------------------------------------------------- steps that are not finite


def poison_step(number, factor, monkeypatch):
    """Multiply the images of training step `number` of the next run, counted over all epochs, by a
    factor."""
    transform, count = train.train_transform, []

    def poisoned(*args, **kwargs):
        count.append(1)
        x = transform(*args, **kwargs)
        return x * factor if len(count) == number else x

    monkeypatch.setattr(train, "train_transform", poisoned)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(
    ad_nc, tmp_path, monkeypatch, poison
):
    poison_step(6, poison, monkeypatch)
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "3")
    history = pd.read_csv(run / "training_history.csv")
    assert history.skipped_steps.tolist() == [0, 1, 0] and np.isfinite(history.train_loss).all()
    assert "1 steps skipped, not finite" in (run / "training_log.txt").read_text()
    last = load_checkpoint(run / "last.pth")
    assert all(state["step"] == 11 for state in last["optimizer"]["state"].values())  # of 12
    assert all(weight.isfinite().all() for weight in last["weights"].values())


NETWORKS = {
    "atto": {"variant": "atto"},
    "batch norm in the head": {"variant": "atto", "head_norm": "batch"},
    "narrow": {"variant": "narrow"},
    "cnn": {"variant": "cnn"},
}


def everything(state):
    """Tensors of all that a step changes, but for the scale of the scaler."""
    tensors = [*state.model.state_dict().values(), *state.ema.state_dict().values()]
    for moments in state.optimizer.state.values():
        tensors += moments.values()
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("network, amp, pixel, loss", [
    *((network, None, float("inf"), 1) for network in NETWORKS),
    *((network, None, 0, 1e25) for network in NETWORKS),
    ("narrow", None, 1e22, 1),
    ("narrow", None, 0, float("nan")),
    ("atto", None, 1e22, 1),
    ("narrow", torch.float16, float("inf"), 1),  # with a scaler that scales
    ("narrow", torch.float16, 0, 1e25),
])  # fmt: skip
def test_a_skipped_step_changes_nothing(network, amp, pixel, loss):
    """1e22 is a pixel whose square overflows, in the variance of BatchNorm; the last loss has
    finite gradients, whose norm overflows."""
    torch.manual_seed(0)
    model = make_model(in_chans=1, num_classes=2, **NETWORKS[network])
    state = TrainState(model, device=CPU, amp=amp, lr=1e-3, ema=0.5)
    state.amp = None  # a CPU has no float16
    x, y = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 1, 0])
    assert step(state, x, y)[3] == 0
    before = everything(state)
    x[2, 0, 9:11, 9] += pixel

    def criterion(logits, y):
        return make_loss()(logits, y) * loss

    sums = train_step(state, x, y, criterion=criterion)
    if sums[3] == 0:  # then all that it changed is finite
        assert pixel == 1e22 and network == "atto"
        assert all(tensor.isfinite().all() for tensor in everything(state))
        return
    assert sums.tolist() == [0, 0, 0, 1]
    assert all(torch.equal(old, new) for old, new in zip(before, everything(state)))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_model_with_batch_norm_learns_although_every_tenth_batch_is_bad(amp):
    """Of 100 steps, each tenth has an infinite pixel, a NaN, or values that overflow."""
    torch.manual_seed(0)
    state = TrainState(convnext("narrow"), device=CPU, amp=amp, lr=2e-3, ema=0.9)
    y = torch.arange(6) % 2
    bad = 0
    for number in range(100):
        x = torch.randn(6, 1, 16, 16) * 0.3
        x[y == 1, :, 4:12, 4:12] += 1
        if number % 10 == 9:
            worst = (float("inf"), float("nan"), 3e38, 1e22)[number // 10 % 4]
            x[3, 0, 5:9, 5] = worst
            bad += 1
        assert step(state, x, y)[3] == (number % 10 == 9)
    assert bad == 10
    assert {each["step"].item() for each in state.optimizer.state.values()} == {90}
    for model in (state.model, state.ema.module):
        assert all(values.isfinite().all() for values in model.state_dict().values())
        x = torch.randn(6, 1, 16, 16) * 0.3
        x[y == 1, :, 4:12, 4:12] += 1
        with torch.inference_mode():
            assert model.eval()(x).argmax(1).equal(y)


def test_many_skipped_steps_do_not_wear_out_the_scale_of_the_loss():
    torch.manual_seed(0)
    state = TrainState(convnext("narrow"), device=CPU, amp=None, lr=1e-3)
    x, y = torch.randn(4, 1, 16, 16), torch.arange(4) % 2
    bad = torch.full_like(x, float("nan"))
    for number in range(6):
        assert step(state, bad if number % 2 else x, y)[3] == number % 2
        assert state.scaler.get_scale() == 1  # halved each time, it would be 0 after 128 of them
    assert all(values.isfinite().all() for values in state.model.state_dict().values())


def test_many_such_steps_in_a_row_end_the_run(ad_nc, tmp_path, monkeypatch):
    transform, count = train.train_transform, []

    def poisoned(*args, **kwargs):
        count.append(1)
        x = transform(*args, **kwargs)
        if len(count) > 9:
            x = torch.full_like(x, float("nan"))
        return x

    monkeypatch.setattr(train, "train_transform", poisoned)
    with pytest.raises(ValueError, match=r"not finite in \d+ steps in a row"):
        train_steps(ad_nc, tmp_path / "run", "--epochs", "30", "--patience", "0")
    assert train.MAX_NONFINITE_STEPS <= len(count) - 9 <= 2 * train.MAX_NONFINITE_STEPS
    model = build_model(load_checkpoint(tmp_path / "run" / "last.pth"))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


# ---------------------------------------------------------------- BatchNorm, averages, compilation


@pytest.mark.parametrize(
    "flags", [["--model", "narrow"], ["--model-args", "norm=batch"], ["--model", "cnn"]]
)
def test_a_last_batch_of_one_slice_is_left_out_of_batch_norm_and_reported(ad_nc, tmp_path, flags):
    flags = [*flags, "--epochs", "2", "--batch-size", "7"]  # of 50 slices
    run = train_steps(ad_nc, tmp_path / "run", *flags)
    assert (
        "the last batch of each epoch has 1 of 50 slices" in (run / "training_log.txt").read_text()
    )
    last = load_checkpoint(run / "last.pth")
    assert {state["step"].item() for state in last["optimizer"]["state"].values()} == {14}


def test_layer_norm_trains_on_a_last_batch_of_one_slice(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--batch-size", "7")
    last = load_checkpoint(run / "last.pth")
    assert {state["step"].item() for state in last["optimizer"]["state"].values()} == {8}


def test_batch_norm_and_batches_of_one_are_refused(ad_nc, tmp_path):
    with pytest.raises(ValueError, match="a batch needs 2 slices or more .*; --batch-size is 1"):
        train_steps(ad_nc, tmp_path / "run", "--model", "narrow", "--batch-size", "1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["atto", "narrow", "cnn"])
def test_with_ema_the_averaged_weights_and_statistics_are_kept(ad_nc, tmp_path, model):
    flags = [
        "--model",
        model,
        "--epochs",
        "2",
        "--ema",
        "0.5",
        "--keep",
        "last",
        "--mixup",
        "0.2",
        "--cutmix",
        "1",
    ]
    run = train_steps(ad_nc, tmp_path / "run", *flags)
    last, best = load_checkpoint(run / "last.pth"), load_checkpoint(run / "best_model.pth")
    assert best["epoch"] == 2
    assert all(
        torch.equal(best["weights"][name], last["ema"][f"module.{name}"])
        for name in best["weights"]
    )
    name = list(best["weights"])[0]
    assert not torch.equal(best["weights"][name], last["weights"][name])


def test_an_average_over_more_steps_than_the_run_has_is_warmed_up_and_said(
    ad_nc, tmp_path, capsys
):
    run = train_steps(ad_nc, tmp_path / "run", "--ema", "0.999", "--epochs", "4", "--keep", "last")
    assert "--ema 0.999 averages over about 1,000 steps, and the run has 16" in (
        run / "training_log.txt"
    ).read_text()
    last = load_checkpoint(run / "last.pth")
    fresh = load_checkpoint(train_steps(ad_nc, tmp_path / "fresh", "--epochs", "1") / "last.pth")
    distance = {"to the weights": 0.0, "to the start": 0.0}
    for name, weight in last["weights"].items():
        average = last["ema"][f"module.{name}"]
        distance["to the weights"] += (average - weight).square().sum().item()
        distance["to the start"] += (average - fresh["weights"][name]).square().sum().item()
    assert distance["to the weights"] < distance["to the start"]


@pytest.mark.parametrize("decay, n, now", [(0.999, 1, 2 / 11), (0.999, 90, 0.91), (0.5, 90, 0.5)])
def test_the_decay_of_the_average_grows_with_the_steps(decay, n, now):
    averaged, current = [torch.ones(3)], [torch.zeros(3)]
    train.averaging(decay)(averaged, current, torch.tensor(n))
    assert averaged[0].tolist() == pytest.approx([now] * 3)


def test_a_run_longer_than_its_average_is_not_remarked():
    assert list(train.describe_average(0.99, 100)) == list(train.describe_average(0, 1)) == []


def test_a_compiled_run_has_clean_names_and_the_same_losses(ad_nc, tmp_path, monkeypatch):
    """The graph runs as it was traced, so that the test needs no C++ compiler."""
    compile_module, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_module(self, backend=backend)
    )
    flags = ["--model", "cnn", "--epochs", "1", "--amp", "off"]
    plain = train_steps(ad_nc, tmp_path / "plain", *flags)
    compiled = train_steps(ad_nc, tmp_path / "compiled", *flags, "--compile")
    if not graphs:
        pytest.skip("this PyTorch does not compile a Sequential")
    assert list(load_checkpoint(plain / "last.pth")["weights"]) == list(
        load_checkpoint(compiled / "last.pth")["weights"]
    )
    a, b = (pd.read_csv(run / "training_history.csv").train_loss for run in (plain, compiled))
    np.testing.assert_allclose(a, b, rtol=1e-3)
