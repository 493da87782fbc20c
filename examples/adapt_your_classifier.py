"""Adapt a classifier of your own to test images whose classes are distributed unlike the training set's.

All that is used of it: its logits, and how many training images each class had.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from tade import PriorAggregator, class_prior

x, y = load_digits(return_X_y=True)
profile = 0.03 ** (np.arange(10) / 9)  # images of each class over those of the first: a long tail
train = np.concatenate([np.flatnonzero(y == c)[: int(100 * profile[c])] for c in range(10)])
classifier = LogisticRegression(max_iter=5000).fit(x[train], y[train])
log_prior = class_prior(np.bincount(y[train]).tolist()).log()  # [10]

for name, shares in {"as in training": profile, "not at all": np.ones(10), "the other way": profile[::-1]}.items():
    test = np.concatenate([np.flatnonzero(y == c)[100:][: int(70 * shares[c])] for c in range(10)])
    logits = torch.tensor(classifier.decision_function(x[test])).float()  # [N, 10]
    aggregator = PriorAggregator(expert_log_priors=log_prior[None], log_prior=log_prior)  # a plain one carries log pi
    aggregator.fit(logits[:, None])  # [N, 1, 10]: one expert; no label
    predicted = aggregator.predict(logits[:, None]).argmax(dim=1).numpy()
    before, after = (100 * np.mean(labels == y[test]) for labels in (classifier.predict(x[test]), predicted))
    print(f"skewed {name}: {before:.1f} % before, {after:.1f} % after")
