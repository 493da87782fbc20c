"""Published ways to estimate a test prior from unlabeled images, to compare with."""

from typing import Any

import torch
from torch import Tensor

from tade.aggregator import Views
from tade.calibration import chunks
from tade.likelihood import LikelihoodAggregator
from tade.priors import EPSILON


class EMAggregator(LikelihoodAggregator):
    """The test prior of maximum likelihood, every class free, by expectation-maximization.

    q(c) <- mean over images of q(c) p(x_n|c) / sum_k q(k) p(x_n|k), from the training prior (Saerens, Latinne and
    Decaestecker, Neural Computation 14, 2002, section 2.2). The paper divides posteriors by the training prior to get
    the likelihoods; here they are the prior-free ensemble's. With `calibration` it is close to Alexandari et al. (ICML
    2020, arXiv 1901.06852). Needs the whole test set.

    Args:
        expert_log_priors, log_prior, calibration: see LikelihoodAggregator.
        steps: iterations, at most.
        tolerance: stop when q changes by less than this in all, sum_c |dq(c)|.
    """

    def __init__(self, *arguments: Any, steps: int = 1000, tolerance: float = 1e-5, **options: Any):
        self.steps = steps
        self.tolerance = tolerance
        super().__init__(*arguments, **options)

    def fit_pass(self, logits: Tensor, views: Views | None, generator: torch.Generator | None) -> None:
        if not self.can_learn_from(logits) or not len(logits):
            return
        likelihoods, q = self.likelihoods(logits), self.log_prior.double().cpu().softmax(dim=0)
        for _ in range(self.steps):
            evidence = likelihoods @ q.to(likelihoods)  # [N]
            images = q * (likelihoods.T @ evidence.reciprocal()).double().cpu()  # expected, of each class
            new = self.maximize(images)
            change, q = float((new - q).abs().sum()), new
            if change < self.tolerance:
                break
        self.log_test_prior = torch.log(q + EPSILON)

    def maximize(self, images: Tensor) -> Tensor:
        """The M-step: expected images of each class [C] -> q [C]."""
        return images / images.sum()


class MAPEMAggregator(EMAggregator):
    """EM with a Dirichlet prior on the test prior, its strength found from the data.

    q(c) = (n(c) + alpha) / (N + C alpha), with n(c) the expected images of class c: alpha pseudo-images of each class.
    After each E-step alpha moves by one step of Minka's fixed point for the evidence of counts under a symmetric
    Dirichlet ("Estimating a Dirichlet distribution", 2000, equation 55).

    The idea is that of MAPLS (Ye et al., WACV 2024: EM with a Dirichlet prior, its strength from the divergences
    between source, target and uniform priors) and of FMAPLS (Hu and Barria, arXiv 2511.18615: a number alpha for each
    class, found with q). Departs from both: one alpha for all classes, as a vector of C is free to follow every count;
    its strength by evidence and not by divergences; q is the posterior's mean (the mode is that for alpha + 1).

    Args:
        expert_log_priors, log_prior, calibration, steps, tolerance: see EMAggregator.
        largest: bound of alpha, in images a class.
    """

    def __init__(self, *arguments: Any, largest: float = 1000.0, **options: Any):
        self.largest = largest
        super().__init__(*arguments, **options)

    learned = (*EMAggregator.learned, "alpha")

    def reset(self) -> None:
        super().reset()
        self.alpha = 1.0

    def maximize(self, images: Tensor) -> Tensor:
        classes, alpha = len(images), torch.tensor(self.alpha, dtype=torch.float64)
        observed = (torch.digamma(images + alpha) - torch.digamma(alpha)).sum()
        expected = classes * (torch.digamma(images.sum() + classes * alpha) - torch.digamma(classes * alpha))
        self.alpha = min(self.largest, max(1e-3, self.alpha * float(observed / expected)))
        return (images + self.alpha) / (images.sum() + classes * self.alpha)

    def report(self) -> dict[str, object]:
        """LikelihoodAggregator's keys, and "alpha": pseudo-images of each class."""
        return {**super().report(), "alpha": self.alpha}


class BBSEAggregator(LikelihoodAggregator):
    """Black-box shift estimation (Lipton, Wang and Smola, ICML 2018, arXiv 1802.03916, section 4).

    With M(i, j) the share of held-out images of class j that are predicted as i, and mu(i) that of the test images,
    M q = mu. Solved by least squares; negative shares are set to 0, the sum to 1. The paper solves for q over the
    held-out prior, which is the same and needs a held-out set drawn like the training set; this form takes any class
    mix. Predictions are those of the calibrated prior-free ensemble.

    Args:
        expert_log_priors, log_prior, calibration: see LikelihoodAggregator.
        held_out: expert logits [M, E, C] and labels [M] of images that were not trained on. From Python only.

    Raises:
        ValueError: there are none, or a class has none.
    """

    def __init__(self, *arguments: Any, held_out: tuple[Tensor, Tensor] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        if held_out is None:
            raise ValueError("BBSEAggregator needs labeled images that were not trained on: give held_out from Python")
        logits, targets = held_out
        classes = len(self.log_prior)
        counts = torch.bincount(targets.cpu(), minlength=classes)
        if len(counts) > classes or int(counts.min()) == 0:
            raise ValueError(f"held_out needs images of all {classes} classes and of no other")
        pairs = self.predicted(logits).cpu() * classes + targets.cpu()
        self.confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double() / counts

    def predicted(self, logits: Tensor) -> Tensor:
        """Classes of the images: [N, E, C] -> [N]."""
        return torch.cat([self.scores(part).argmax(dim=1) for (part,) in chunks(logits)])

    def fit_pass(self, logits: Tensor, views: Views | None, generator: torch.Generator | None) -> None:
        if not self.can_learn_from(logits) or not len(logits):
            return
        shares = torch.bincount(self.predicted(logits).cpu(), minlength=len(self.log_prior)).double() / len(logits)
        q = (torch.linalg.pinv(self.confusion) @ shares).clamp(min=0)
        self.log_test_prior = torch.log(q / q.sum() + EPSILON)
