import json

import numpy as np
import pytest
import torch

from benchmarks import prior_study
from data_loader.class_profiles import distribution_indices
from tade import class_prior, expert_log_priors, inverse_prior

CLASSES, PER_CLASS = 6, 40


@pytest.fixture
def logits():
    """Of made-up images whose log p(x|y) is known."""
    generator = torch.Generator().manual_seed(0)
    counts = [200, 100, 50, 25, 12, 6]
    prior = class_prior(counts)
    carried = expert_log_priors(prior, inverse_prior(prior), num_experts=3, tau=2.0)
    targets = torch.arange(CLASSES * PER_CLASS) % CLASSES
    x = 1.5 * torch.eye(CLASSES)[targets] + torch.randn(len(targets), CLASSES, generator=generator)
    plain, *views = (
        (1.5 * (x + noise * torch.randn(x.shape, generator=generator)))[:, None] + carried for noise in (0, 0.4, 0.4)
    )
    names = ("forward10", "uniform", "backward10")
    own = distribution_indices(targets.numpy(), counts, names)
    return prior_study.Logits(
        plain=plain,
        averaged=plain,
        views=tuple(views),
        targets=targets,
        expert_log_priors=carried,
        log_prior=prior.log(),
        counts=counts,
        distributions={**own, **prior_study.free_shifts(targets, CLASSES)},
        published={},
    )


def test_free_shifts_are_ten_and_always_the_same(logits):
    shifts = prior_study.free_shifts(logits.targets, CLASSES)
    assert len(shifts) == 10 and all(len(np.unique(own)) == len(own) for own in shifts.values())
    again = prior_study.free_shifts(logits.targets, CLASSES)
    assert all(np.array_equal(again[name], own) for name, own in shifts.items())
    shown = {name: np.bincount(logits.targets[own], minlength=CLASSES) for name, own in shifts.items()}
    assert all(counts.max() == PER_CLASS for counts in shown.values())
    assert (shown["a fifth 1"] > 0).sum() == 2


def test_every_row_of_the_study(logits, monkeypatch, tmp_path):
    monkeypatch.setattr(prior_study, "SIZES", (20,))
    study = prior_study.Study(logits)
    table = study.table()
    names = ["forward10", "uniform", "backward10"]
    hits = logits.plain.mean(dim=1).argmax(dim=1) == logits.targets
    for name in names:
        expected = 100 * float(hits[torch.as_tensor(logits.distributions[name])].double().mean())
        assert table.loc["equal weights", name] == pytest.approx(expected)
    assert "published: learned weights" not in table.index  # there were none
    bound = table.loc["oracle: true prior (bound)"]
    assert bound["divergence"] == pytest.approx(0, abs=1e-6)
    assert bound["mean"] >= table.loc["no prior (u)", "mean"]
    assert table.loc["PriorAggregator (recommended)", "divergence"] < table.loc["no prior (u)", "divergence"]
    assert table["mean"].equals(table[names].mean(axis=1))
    few = study.few_images()
    assert list(few.index) == ["20", "all"] and list(few) == names
    text = prior_study.markdown(table, few, "made up")
    assert text.count("\n| ") == len(table) + len(few) + 2 + 2
    assert prior_study.figure(table, "made up").axes[0].get_title() == "made up"
    json.dumps(table.to_dict("index"))


def test_labeled_images_leave_the_figures(logits):
    study = prior_study.Study(logits)
    indices = torch.as_tensor(logits.distributions["uniform"])
    for draw in range(2):
        scores, used, report = study.labeled(prior_study.PriorAggregator, 5)("uniform", indices, draw)
        left = torch.bincount(logits.targets[used], minlength=CLASSES)
        assert left.tolist() == [PER_CLASS - 5] * CLASSES and len(scores) == len(used)
        assert report["calibration"] != [1, 0, 0] and report["bias"] == 0
