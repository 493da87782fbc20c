"""Fifty signals and kills at random moments: nothing is lost, and the final weights are those of an unbroken run."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from trainer import train
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.signals import STOPPING

KILLS = 50


def sitting(config: dict, run_id: str, last: Path, log: Path) -> None:
    """A process that starts a run or goes on with it, as train.py does."""
    sys.stdout = sys.stderr = open(log, "a")
    torch.set_num_threads(1)
    try:
        if last.exists():
            train(resume=last)
        else:
            train(config, run_id=run_id)
    except UserError as error:
        print(error)
        sys.exit(error.status)
    except KeyboardInterrupt:  # before the training has begun
        sys.exit(130)


@pytest.mark.slow
def test_fifty_kills(digits_config, tmp_path):
    digits_config["arch"]["args"]["num_experts"] = 1
    digits_config["trainer"] |= {"epochs": 3, "mixup_alpha": 0.4, "verbosity": 1, "save_dir": str(tmp_path)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer", "torch._dynamo"])
    log = tmp_path / "log.txt"
    choose, kills, ends = random.Random(1), Counter(), Counter()

    def run(run_id: str, duration: float | None = None) -> dict:
        """Train until all is done, killed again and again after at most so many seconds; the last checkpoint."""
        last = tmp_path / digits_config["name"] / run_id / "last.pth"
        status = None
        while status != 0:
            process = context.Process(target=sitting, args=(digits_config, run_id, last, log))
            process.start()
            if duration and kills.total() < KILLS:
                process.join(timeout=choose.uniform(0, duration))
                number = choose.choice([*STOPPING, signal.SIGKILL])
                if process.is_alive():
                    os.kill(process.pid, number)
                    kills[number.name] += 1
            process.join(timeout=120)
            assert not process.is_alive(), "a stopped run did not end"
            status = process.exitcode
            ends[status] += 1
            # -n: killed, or a signal that came before the training had begun; 128 + n: stopped with its state saved.
            expected = {0, -signal.SIGKILL, *(-n for n in STOPPING), *(128 + n for n in STOPPING)}
            assert status in expected, log.read_text()
        return load_checkpoint(last)

    straight = run("straight")
    start, runs = time.monotonic(), 0
    run("again")
    duration = time.monotonic() - start
    while kills.total() < KILLS:
        runs += 1
        state = run(f"killed{runs}", 0.8 * duration)
        assert state["epoch"] == 3 and "mid_epoch" not in state
        assert all(torch.equal(tensor, state["model"][name]) for name, tensor in straight["model"].items())
        assert torch.equal(straight["random"]["torch"], state["random"]["torch"])
    within = sum("Stopped by" in line and ", step " in line for line in log.read_text().splitlines())
    print(f"\n{kills.total()} kills in {runs} runs: {dict(kills)}; saved in an epoch: {within}; statuses {dict(ends)}")
