"""A loss or gradient that is not a number costs its step, is counted, and never reaches the weights."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import train_steps
from test_interruption import at_step

import utils as checkpoint
from adnc import engine
from utils import load_checkpoint


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(ad_nc, tmp_path, monkeypatch, poison):
    at_step(6, lambda x: x * poison, monkeypatch)
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "3")
    assert pd.read_csv(run / "training_history.csv").skipped_steps.tolist() == [0, 1, 0]
    assert re.search(r"^ +2 .*1 steps skipped, not finite", (run / "training_log.txt").read_text(), re.MULTILINE)
    last = load_checkpoint(run / "last.pth")
    assert all(state["step"] == 11 for state in last["optimizer"]["state"].values())  # of 12
    assert all(weight.isfinite().all() for weight in last["weights"].values())
    assert np.isfinite(pd.read_csv(run / "training_history.csv").train_loss).all()


def test_a_skipped_step_changes_nothing(ad_nc, tmp_path, monkeypatch):
    """With the last step of the only epoch poisoned, the weights are those after the steps before it."""
    states = []

    def look(x):
        states.append([p.detach().clone() for p in states.pop().parameters()])
        return x * float("nan")

    genuine = checkpoint.make_model
    monkeypatch.setattr(checkpoint, "make_model", lambda *a, **k: states.append(genuine(*a, **k)) or states[-1])
    at_step(4, look, monkeypatch)
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1")
    after = load_checkpoint(run / "last.pth")["weights"].values()
    assert all(torch.equal(a, b) for a, b in zip(states[0], after))


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(ad_nc, tmp_path, monkeypatch):
    class Infinite(torch.nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            return super().forward(logits, labels) + float("inf")  # as a logit of -inf gives it

    monkeypatch.setattr(engine.nn, "CrossEntropyLoss", Infinite)
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1")
    assert pd.read_csv(run / "training_history.csv").skipped_steps.tolist() == [4]
    assert load_checkpoint(run / "last.pth")["optimizer"]["state"] == {} or all(
        state["step"] == 0 for state in load_checkpoint(run / "last.pth")["optimizer"]["state"].values())


def test_many_such_steps_in_a_row_end_the_run_and_the_last_good_checkpoint_is_named(ad_nc, tmp_path, monkeypatch):
    genuine, count = engine.train_transform, []

    def poisoned(*args, **kwargs):
        count.append(1)
        return genuine(*args, **kwargs) * (float("nan") if len(count) > 9 else 1)

    monkeypatch.setattr(engine, "train_transform", poisoned)
    with pytest.raises(ValueError, match=r"not finite in \d+ steps in a row") as problem:
        train_steps(ad_nc, tmp_path / "run", "--epochs", "30", "--patience", "0")
    assert engine.NOT_FINITE <= len(count) - 9 <= 2 * engine.NOT_FINITE
    text = str(problem.value)
    assert f"the last good checkpoint is {tmp_path / 'run' / 'last.pth'}, after epoch" in text
    assert "best_model.pth the best epoch so far" in text
    model = checkpoint.build_model(load_checkpoint(tmp_path / "run" / "last.pth"))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


