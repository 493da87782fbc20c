import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

import model.metric
from model.metric import (
    accuracy,
    balanced_accuracy,
    class_hits,
    expected_calibration_error,
    macro_f1,
    paired_difference,
    per_class_accuracy,
    percent_correct,
    shot_group_accuracy,
    shot_groups,
    top5_accuracy,
    wilson_interval,
)

COUNTS = [101, 100, 20, 19]  # many, medium, medium, few


def test_every_metric_takes_the_same_arguments():
    scores, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    kinds = {name: type(getattr(model.metric, name)(scores, targets, COUNTS)) for name in model.metric.__all__}
    assert kinds == {
        "accuracy": float,
        "top5_accuracy": float,
        "shot_group_accuracy": dict,
        "expected_calibration_error": float,
        "per_class_accuracy": list,
        "balanced_accuracy": float,
        "macro_f1": float,
    }


def test_accuracy():
    counts = [10] * 8
    scores = torch.eye(8)[[0, 1, 2, 3]] + torch.arange(8) * 0.01  # predicts 0, 1, 2, 3
    assert accuracy(scores, torch.tensor([0, 1, 2, 0]), counts) == 75
    # the five highest are the predicted class and 7, 6, 5, 4
    assert top5_accuracy(scores, torch.tensor([0, 7, 4, 0]), counts) == 75
    assert top5_accuracy(scores[:, :3], torch.tensor([0, 1, 2, 0]), counts[:3]) == 100


def test_shot_groups_include_their_limits():
    groups = shot_groups(COUNTS)
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "many": [True, False, False, False],
        "medium": [False, True, True, False],
        "few": [False, False, False, True],
    }
    assert all(mask.dtype == torch.bool for mask in groups.values())


def test_accuracy_of_groups_and_classes_by_hand():
    scores = torch.eye(4)[[0, 0, 1, 2, 1, 1]]  # predictions
    targets = torch.tensor([0, 1, 1, 2, 2, 2])
    assert shot_group_accuracy(scores, targets, COUNTS) == {"many": 100, "medium": 40, "few": None}
    assert per_class_accuracy(scores, targets, COUNTS) == [100, 50, pytest.approx(100 / 3), None]


@pytest.mark.parametrize("scale", [0.1, 1, 5])
def test_expected_calibration_error_against_a_direct_computation(scale):
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(400, 7, generator=generator)
    targets = torch.randint(7, (400,), generator=generator)
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, target in zip(scores.double(), targets, strict=True):
        p = [float(torch.exp(v) / torch.exp(row).sum()) for v in row]
        confidence = max(p)
        for k in range(15):
            if k / 15 < confidence <= (k + 1) / 15:
                bins[k].append((confidence, p.index(confidence) == int(target)))
    assert sum(map(len, bins)) == 400
    error = sum(
        len(b) / 400 * abs(sum(hit for _, hit in b) / len(b) - sum(c for c, _ in b) / len(b)) for b in bins if b
    )
    assert expected_calibration_error(scores, targets, [10] * 7) == pytest.approx(100 * error, abs=1e-6)
    log_probabilities = torch.log_softmax(scores, dim=1)
    assert expected_calibration_error(log_probabilities, targets, [10] * 7) == pytest.approx(100 * error, abs=1e-4)


def test_hits_by_class_and_percent():
    correct, total = class_hits(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), num_classes=4)
    assert correct.tolist() == [1, 1, 1, 0] and total.tolist() == [1, 1, 2, 0]
    assert percent_correct(correct, total) == 75
    assert percent_correct(correct, total, torch.tensor([False, False, True, True])) == 50
    assert percent_correct(correct, total, torch.tensor([False, False, False, True])) is None
    assert percent_correct(correct, total, torch.zeros(4, dtype=torch.bool)) is None


def test_means_over_classes_as_scikit_learn_has_them():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 8, generator=generator)
    scores[:, 7] -= 100  # never predicted
    targets = torch.randint(5, (300,), generator=generator)  # classes 5 to 7 have no image
    scores[torch.arange(300), targets] += 1
    prediction = scores.argmax(dim=1)
    assert set(prediction.tolist()) == set(range(7))
    counts = [10] * 8
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(targets, prediction)
    assert balanced_accuracy(scores, targets, counts) == pytest.approx(100 * expected)
    expected = f1_score(targets, prediction, average="macro")
    assert macro_f1(scores, targets, counts) == pytest.approx(100 * expected)


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (10, 10), (1, 3), (4880, 10000), (1, 1)])
def test_ends_of_wilsons_interval_are_196_standard_errors_away(correct, images):
    low, high = (end / 100 for end in wilson_interval(correct, images))
    share = correct / images
    assert 0 <= low <= share <= high <= 1 and low < high
    for end in (low, high):
        distance = 1.959964 * (end * (1 - end) / images) ** 0.5
        assert abs(end - share) == pytest.approx(distance, rel=1e-5, abs=1e-12)
    assert wilson_interval(8, 10) == pytest.approx([49.02, 94.33], abs=0.01)  # a published example


def test_the_bootstrap_draws_images_with_both_predictions():
    generator = torch.Generator().manual_seed(0)
    correct, other = (torch.rand(400, generator=generator) < p for p in (0.7, 0.6))
    found = paired_difference(correct, other)
    per_image = correct.numpy().astype(float) - other.numpy()
    random = np.random.default_rng(5)
    means = [100 * per_image[random.integers(400, size=400)].mean() for _ in range(4000)]
    assert found["points"] == pytest.approx(100 * per_image.mean())
    assert found["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.6)
    assert paired_difference(correct, other) == found  # the same random numbers
    backwards = paired_difference(other, correct)
    assert backwards["points"] == -found["points"] and backwards["interval"][0] < 0
    assert paired_difference(correct, correct) == {"points": 0.0, "interval": [0.0, 0.0]}
