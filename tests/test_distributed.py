"""Several processes under torchrun train as one process does, and only the first writes."""

import json
import os
import re
import signal
import socket
import time
from datetime import timedelta

import command
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, train_small, train_steps, without_evaluation

import train
from adnc import distributed
from adnc.errors import InputError
from utils import load_checkpoint

EXACT = ["--amp", "off", "--augment", "no-flip", "--warmup-epochs", "0"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(*words, script=ROOT / "train.py"):
    """Run train.py, or another script, in two processes, with the variables that torchrun sets."""
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(rank, **options):
        environment = os.environ | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return command.run(script, *words, env=environment, **options)

    second = []
    first = start(0, meanwhile=lambda *started: second.append(start(1)))
    return [first, *second]


def test_torchrun_sets_the_variables_that_are_read(tmp_path, monkeypatch):
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os\nprint(f'VARIABLES {json.dumps(dict(os.environ))}\\n', end='')\n"
    )
    launcher = ["--standalone", "--nproc-per-node", "2"]
    done = command.run("torch.distributed.run", *launcher, script)
    assert done.returncode == 0, done.stderr
    read = []
    for line in re.findall("^VARIABLES (.*)$", done.stdout, re.MULTILINE):
        monkeypatch.setattr(os, "environ", json.loads(line))
        read.append(distributed.read_launcher())
    assert sorted(read) == [(0, 0, 2), (1, 1, 2)]


@pytest.mark.parametrize("name, expected", [
    ("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:1"), ("cpu", "cpu"),
])  # fmt: skip
def test_each_process_opens_the_gpu_of_its_number_alone(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device(name) == name  # of one process
    variables = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert distributed.own_device(name) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if expected != "cpu":
        with pytest.raises(InputError, match="has no GPU .1 available.; start with"):
            distributed.own_device(name)


def test_two_processes_take_the_steps_of_one(ad_nc, tmp_path):
    """Without MixUp and DropPath, whose random numbers each process draws for its own share."""
    flags = ["--epochs", "1", "--batch-size", "13", *EXACT]  # 4 uneven steps
    one = train_small(ad_nc, tmp_path / "one", *flags)
    first, second = start_two("--data", ad_nc, "--out", tmp_path / "two", *SMALL, *flags)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "2 processes" in first.stdout and "best epoch" in first.stdout
    assert second.stdout == ""
    a, b = (pd.read_csv(run / "training_history.csv") for run in (one, tmp_path / "two"))
    for column in ("lr", "train_loss", "val_loss", "val_accuracy"):
        np.testing.assert_allclose(a[column], b[column], rtol=2e-4)
    for part in ("val", "test"):
        p, q = (pd.read_csv(run / part / "predictions.csv") for run in (one, tmp_path / "two"))
        assert p.path.tolist() == q.path.tolist()
        np.testing.assert_allclose(p.p_AD, q.p_AD, atol=2e-3)

    with without_evaluation():  # any number of processes resumes it
        train.main(["--out", str(tmp_path / "two"), "--resume", "--epochs", "2"])
    assert load_checkpoint(tmp_path / "two" / "last.pth")["epoch"] == 2


BAD_STEP = """
import torch
import train
from adnc import distributed
from modules import convnext
from utils import pick_device, seed_everything
seed_everything(0)
world, device = distributed.join(pick_device("cpu"))
state = train.TrainState(convnext("atto"), device=device, amp=None, lr=1e-3, ema=0.5, world=world)
for bad_rank in (None, 1, None):
    x, y = torch.randn(2, 1, 32, 32), torch.tensor([0, 1])
    if world.rank == bad_rank:
        x[0, 0, 0, 0] = float("inf")
    before = [p.clone() for p in state.model.parameters()]
    sums = train.train_step(state, x, y, criterion=train.make_loss(), batch_size=4)
    changed = any((p != old).any() for p, old in zip(state.model.parameters(), before))
    weights = sum(p.double().sum() for p in state.model.parameters())
    print(int(sums[3]), bool(changed), repr(weights.item()))
world.leave()
"""


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(BAD_STEP)
    done = start_two(script=script)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (each.stdout.splitlines()[-3:] for each in done)
    assert first == second  # the same weights
    steps = [line.split()[:2] for line in first]
    assert steps == [["0", "True"], ["1", "False"], ["0", "True"]]


LAUNCHED = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}  # fmt: skip


def set_launcher(monkeypatch, changes):
    for name, value in {**LAUNCHED, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("changes, sentence", [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    ({"WORLD_SIZE": None}, "RANK is set, and WORLD_SIZE is not"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ({"RANK": "-1"}, "RANK is '-1', not a number"),
    ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK is '0.5', not a number"),
    ({"LOCAL_RANK": None}, "but without LOCAL_RANK"),  # Kubeflow
    ({"MASTER_ADDR": None}, "but without MASTER_ADDR"),
    ({"MASTER_ADDR": "", "MASTER_PORT": None}, "but without MASTER_ADDR and MASTER_PORT"),
    ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE 2"),
    ({"MASTER_PORT": "no port"}, "127.0.0.1:no port is not known on this machine"),
    ({"MASTER_ADDR": "no.such.host"}, "no.such.host:29511 is not known on this machine"),
])  # fmt: skip
def test_variables_of_a_launcher_that_do_not_fit_are_one_sentence(monkeypatch, changes, sentence):
    set_launcher(monkeypatch, changes)
    with pytest.raises(InputError, match=sentence) as problem:
        distributed.join(torch.device("cpu"))
    assert "torchrun" in str(problem.value)


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        set_launcher(monkeypatch, {"MASTER_PORT": str(busy.getsockname()[1])})
        with pytest.raises(InputError, match="cannot join the others at 127.0.0.1"):
            distributed.join(torch.device("cpu"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_never_come_are_waited_for_two_minutes_and_named(monkeypatch, capsys, rank):
    assert distributed.LONGEST_START == timedelta(minutes=2)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(distributed, "LONGEST_START", timedelta(seconds=1))
    set_launcher(monkeypatch, {"RANK": rank, "MASTER_PORT": str(free_port())})
    with pytest.raises(InputError, match=f"process {rank} of 2 cannot join the others at 127.0.0"):
        distributed.join(torch.device("cpu"))
    assert f"process {rank} of 2 waits for the others at 127.0.0.1:" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_ends_the_wait_for_others(ad_nc, rank, number):
    def stop(process, stdout):
        while process.is_alive() and not (stdout.exists() and "waits" in stdout.read_text()):
            time.sleep(0.05)
        time.sleep(0.3)  # until it waits
        os.kill(process.pid, number)

    launcher = {**LAUNCHED, "RANK": rank, "MASTER_PORT": str(free_port())}
    words = ["--data", ad_nc, *SMALL]
    done = command.run(ROOT / "train.py", *words, env=os.environ | launcher, meanwhile=stop)
    assert done.returncode == -number


@pytest.mark.parametrize("changes, line", [
    ({"WORLD_SIZE": None, "RANK": None}, ""),
    ({"WORLD_SIZE": "1"}, ""),
    ({"WORLD_SIZE": "4", "RANK": None}, "WORLD_SIZE is 4, and this process trains alone"),
    ({"WORLD_SIZE": None, "RANK": None, "SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4, and this"),
    ({"WORLD_SIZE": None, "RANK": None, "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
])  # fmt: skip
def test_one_process_is_a_world_of_its_own_and_says_so_where_several_were_meant(
    monkeypatch, capsys, changes, line
):
    set_launcher(monkeypatch, changes)
    world, _ = distributed.join(torch.device("cpu"))
    assert (world.rank, world.size) == (0, 1)
    printed = capsys.readouterr().out
    assert printed.startswith(line) and bool(printed) == bool(line)


def test_wrong_input_ends_all_processes(ad_nc, run_folder, tmp_path):
    done = start_two("--data", ad_nc, "--out", run_folder, *SMALL)
    assert all(process.returncode != 0 for process in done)
    assert "exists, and nothing is overwritten" in done[0].stderr
    done = start_two("--data", tmp_path / "none", *SMALL)
    assert "none does not exist" in done[0].stderr
    error = done[1].stderr.splitlines()[-1]  # the first may have ended before the second joined it
    assert error.startswith(("error: another process has ended", "error: process 1 of 2 cannot"))


def test_several_processes_on_a_cpu_do_not_train_batch_norm(ad_nc):
    state = train.TrainState(
        train.make_model("narrow"), device=torch.device("cpu"), amp=None, lr=1e-3
    )
    state.world = distributed.World(0, 2)
    with pytest.raises(ValueError, match="BatchNorm over several processes on CUDA only"):
        list(train.check_batches(state, 100, 16))


def test_the_optimizer_of_a_run_is_the_fused_one(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1")
    groups = load_checkpoint(run / "last.pth")["optimizer"]["param_groups"]
    assert all(group["fused"] for group in groups)
