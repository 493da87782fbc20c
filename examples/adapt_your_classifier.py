"""Adapt a classifier of your own to test images whose classes are distributed unlike the training set's.

All that is used of it: its logits, and how many training images each class had. Given other class priors, its logits
become those of three experts, whose weights are learned from the unlabeled test images."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from tade import StabilityAggregator, class_prior, expert_log_priors, inverse_prior

x, y = load_digits(return_X_y=True)
profile = 0.03 ** (np.arange(10) / 9)  # images of each class over those of the first: a long tail
train = np.concatenate([np.flatnonzero(y == c)[: int(100 * profile[c])] for c in range(10)])
classifier = LogisticRegression(max_iter=5000).fit(x[train], y[train])

prior = class_prior(np.bincount(y[train]).tolist())
carried = expert_log_priors(prior, inverse_prior(prior), num_experts=3, tau=1.0)  # [3, 10]


def expert_logits(images):
    logits = torch.tensor(classifier.decision_function(images)).float()  # [N, 10]; they carry the training prior
    return (logits - prior.log())[:, None] + carried  # [N, 3, 10]


def view(images, random=np.random.default_rng(0)):  # digits moved by a pixel, with noise
    moved = np.roll(images.reshape(-1, 8, 8), random.integers(-1, 2, 2), axis=(1, 2))
    return (moved + random.normal(0, 2, moved.shape)).reshape(-1, 64)


for name, shares in {"as in training": profile, "the other way": profile[::-1]}.items():
    test = np.concatenate([np.flatnonzero(y == c)[100:][: int(70 * shares[c])] for c in range(10)])
    aggregator = StabilityAggregator(carried, prior.log(), batch_size=32)
    passes = ((expert_logits(view(x[test])), expert_logits(view(x[test]))) for _ in range(aggregator.epochs))
    aggregator.fit(expert_logits(x[test]), passes, torch.Generator().manual_seed(0))  # no label
    before = 100 * (classifier.predict(x[test]) == y[test]).mean()
    after = 100 * (aggregator.predict(expert_logits(x[test])).argmax(dim=1).numpy() == y[test]).mean()
    print(f"skewed {name}: {before:.1f} % before, {after:.1f} % after")
