import torch

from model.metric import accuracy, class_hits, percent_correct, top5_accuracy


def test_accuracy():
    scores = torch.eye(8)[[0, 1, 2, 3]] + torch.arange(8) * 0.01  # predicts 0, 1, 2, 3
    assert accuracy(scores, torch.tensor([0, 1, 2, 0])) == 0.75
    # the five highest are the predicted class and 7, 6, 5, 4
    assert top5_accuracy(scores, torch.tensor([0, 7, 4, 0])) == 0.75
    assert top5_accuracy(scores[:, :3], torch.tensor([0, 1, 2, 0])) == 1


def test_hits_by_class_and_percent():
    correct, total = class_hits(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), num_classes=4)
    assert correct.tolist() == [1, 1, 1, 0] and total.tolist() == [1, 1, 2, 0]
    assert percent_correct(correct, total) == 75
    assert percent_correct(correct, total, torch.tensor([False, False, True, True])) == 50
    assert percent_correct(correct, total, torch.tensor([False, False, False, True])) is None
    assert percent_correct(correct, total, torch.zeros(4, dtype=torch.bool)) is None
