import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from tade import expert_log_priors, inverse_prior
from utils.checkpoint import sha256


def test_adapting_a_classifier_of_ones_own():
    """Short, with the library alone, and of use wherever the test set is skewed otherwise."""
    path = ROOT / "examples" / "adapt_your_classifier.py"
    assert len(path.read_text().splitlines()) < 40
    assert set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.M)) == {"numpy", "sklearn", "tade", "torch"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # found without being installed
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"([\d.]+) % before, ([\d.]+) % after", done.stdout)
    gains = [float(after) - float(before) for before, after in pairs]  # skewed as in training, not at all, backwards
    assert len(gains) == 3 and gains[0] > -1 and gains[1] > 2 and gains[2] > 10, done.stdout


@pytest.fixture(scope="module")
def turning():
    """examples/turning_stream.py as a module."""
    spec = importlib.util.spec_from_file_location("turning_stream", ROOT / "examples" / "turning_stream.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_forgets_follows_a_turning_stream(turning):
    """On images whose log p(x|y) is known."""
    classes, generator = 20, torch.Generator().manual_seed(0)
    prior = torch.linspace(0, -4, classes).softmax(dim=0)
    targets = torch.arange(2000) % classes
    carried = expert_log_priors(prior, inverse_prior(prior), num_experts=3, tau=2.0)
    x = 1.5 * torch.eye(classes)[targets] + torch.randn(2000, classes, generator=generator)
    logits, *views = (
        (1.5 * (x + noise * torch.randn(x.shape, generator=generator)))[:, None] + carried for noise in (0, 0.5, 0.5)
    )
    run = SimpleNamespace(
        expert_log_priors=carried, log_prior=prior.log(), test_logits=logits, targets=targets, calibration=None
    )
    stream = list(turning.draw(targets, prior.log(), 2000, 32, seed=1))
    assert sum(len(indices) for _, indices in stream) == 2000
    for of, ratio in ((slice(None, 15), 50), (slice(30, 33), 1), (slice(-15, None), 1 / 50)):
        counts = torch.bincount(targets[torch.cat([indices for _, indices in stream[of]])], minlength=classes)
        half = float(counts[:10].sum() / counts[10:].sum())  # of an exponential profile this is the ratio ** (10 / 19)
        assert half == pytest.approx(ratio ** (10 / 19), rel=0.4)
    batches = turning.follow(run, stream, lambda drawn, _: tuple(view[drawn] for view in views), forgetting=0.99)
    last = turning.thirds(batches)["last third"]
    assert last[turning.FORGETS] > last[turning.EQUAL] + 2 and last[turning.FORGETS] > last[turning.REMEMBERS] + 2
    assert last[turning.ORACLE] > last[turning.FORGETS] - 1
    off = {name: abs(batches[-1]["estimates"][name]["skew"] - batches[-1]["true_skew"]) for name in turning.LEARNED}
    assert off[turning.FORGETS] < 0.4 < off[turning.REMEMBERS]


def test_a_turning_stream_of_a_checkpoint(turning, trained_digits, tmp_path, capsys):
    turning.main(["-r", trained_digits, "-o", str(tmp_path), "--images", "330", "--batch", "32", "--seed", "2"])
    content = json.loads((tmp_path / "stream.json").read_text())
    assert content["checkpoint"]["sha256"] == sha256(trained_digits) and content["seed"] == 2
    assert "the oracle" in content["protocol"] and content["forgetting"] == 0.99
    batches = content["batches"]
    assert [entry["images"] for entry in batches] == [32] * 10 + [10]
    for entry in batches:
        assert set(entry["accuracy"]) == set(turning.STYLES) and sum(entry["weights"]) == pytest.approx(1)
        assert set(entry["estimates"]) == set(turning.LEARNED) and -1.5 < entry["true_skew"] < 1.5
    for name, row in content["accuracy"].items():
        assert set(row) == {*turning.THIRDS, "all"}
        mean = sum(entry["images"] * entry["accuracy"][name] for entry in batches) / 330
        assert row["all"] == pytest.approx(mean)
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(tmp_path / "stream.png") in printed and turning.ORACLE in printed
    turning.main(["-r", trained_digits, "-o", str(tmp_path), "--images", "330", "--batch", "32", "--seed", "2"])
    assert json.loads((tmp_path / "stream.json").read_text()) == content


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--images", "50"], ["--forgetting", "1"], ["-r", "none.pth"]])
def test_what_a_turning_stream_refuses(turning, trained_digits, tmp_path, wrong):
    with pytest.raises(SystemExit) as stopped:
        turning.main(["-r", trained_digits, "-o", str(tmp_path / "out"), *wrong])
    assert str(stopped.value).endswith(".") and "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()
