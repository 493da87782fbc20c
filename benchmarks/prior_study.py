"""Every way of adapting a trained network to an unknown test distribution, beside each other.

python -m benchmarks.prior_study CHECKPOINT.pth [CHECKPOINT.pth ...] --output FOLDER [--set KEY;PATH=VALUE ...]

For each network: the test distributions of its data, and ten free shifts, which do not follow the training frequencies.
Accuracy, Kullback-Leibler divergence of the true test prior from the estimated one, calibration error, seconds. Then
how many images the estimate needs. Labels are used to evaluate; where a row uses some to adapt its name says so, and
those images are left out of all its figures.

Logits are computed once for each network, and kept under saved/prior_study.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.common import write_record
from data_loader.class_profiles import subset_indices
from evaluation import load_run
from evaluation.adaptation import fit_all, two_view_logits, view_source
from model.logits import expert_logits, selected
from model.metric import expected_calibration_error
from report.tables import markdown_lines
from tade import (
    Aggregator,
    BBSEAggregator,
    Calibration,
    EMAggregator,
    GivenPriorAggregator,
    MAPEMAggregator,
    PriorAggregator,
    StabilityAggregator,
    fit_calibration,
    prior_free_logits,
)
from tade.asymmetry import stability_asymmetry
from utils.logger import get_logger
from utils.parse_config import parse_assignment

CACHE = Path("saved/prior_study")
CROPS = 4  # of the averaged views, beside image and mirror image
DRAWS = 3  # of the labeled images, and of the free shifts' classes
SIZES = (1, 20, 100, 500)


@dataclass
class Logits:
    """All that the study wants of a network, computed once.

    Args:
        plain: expert logits of the test images as they are, [N, E, C].
        averaged: their mean over the averaged views, [N, E, C].
        views: expert logits of two random views, two of [N, E, C].
        targets: [N].
        expert_log_priors, log_prior, counts: see LoadedRun.
        distributions: name -> indices.
        published: name -> scores by the published method; empty for networks that it is not meant for.
    """

    plain: Tensor
    averaged: Tensor
    views: tuple[Tensor, Tensor]
    targets: Tensor
    expert_log_priors: Tensor
    log_prior: Tensor
    counts: list[int]
    distributions: dict[str, np.ndarray]
    published: dict[str, Tensor]


def free_shifts(targets: Tensor, classes: int) -> dict[str, np.ndarray]:
    """Ten test sets whose class mix has nothing to do with training: name -> indices.

    Three with ratio 50 in a random order of the classes, three from Dirichlet(1), two from Dirichlet(0.1), two with a
    fifth of the classes only. The most frequent class keeps all its images.
    """
    random = np.random.default_rng(0)
    smallest = int(torch.bincount(targets, minlength=classes).min())
    shares = {}
    for number in range(DRAWS):
        shares[f"any order {number + 1}"] = (1 / 50) ** (random.permutation(classes) / (classes - 1))
    for number in range(DRAWS):
        shares[f"Dirichlet(1) {number + 1}"] = random.dirichlet(np.ones(classes))
    for number in range(2):
        shares[f"Dirichlet(0.1) {number + 1}"] = random.dirichlet(np.full(classes, 0.1))
    for number in range(2):
        shares[f"a fifth {number + 1}"] = (random.permutation(classes) < max(2, classes // 5)).astype(float)
    return {
        name: subset_indices(targets.numpy(), [int(smallest * value) for value in share / share.max()])
        for name, share in shares.items()
    }


def gather(path: Path, overrides: Mapping[str, object]) -> Logits:
    """The logits of a network, from the cache where they are there."""
    run = load_run(path, overrides=overrides)
    file = CACHE / f"{path.stem}-{run.checkpoint.sha256[:12]}.pt"
    targets = run.targets
    distributions = {**run.loader.test_distributions(), **free_shifts(targets, len(run.cls_num_list))}
    if not file.exists():
        sums, plain, numbers = None, None, run.loader.mild_view_numbers(CROPS)
        for number in numbers:
            view = expert_logits(run.inference_network, [run.images.mild_view(number)], run.device, f"view {number}")
            plain, sums = (view, view.clone()) if plain is None else (plain, sums.add_(view))
        views = two_view_logits(run.inference_network, run.images, np.arange(len(targets)), 0, run.device)
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save({"plain": plain, "averaged": sums / len(numbers), "views": views}, file)
    logits = torch.load(file, mmap=True)
    published = file.with_suffix(".published.pt")
    if run.config.get("loss", {}).get("type") == "DiverseExpertLoss" and not published.exists():
        weighers = {n: StabilityAggregator(run.expert_log_priors, run.log_prior) for n in distributions}
        fit_all(weighers, logits["plain"], distributions, view_source(run), run.seed)
        torch.save({n: weigher.weights for n, weigher in weighers.items()}, published)
    weights = torch.load(published) if published.exists() else {}
    scores = {n: (selected(logits["plain"], distributions[n]) * w[:, None]).sum(1) for n, w in weights.items()}
    priors = run.expert_log_priors, run.log_prior
    return Logits(**logits, targets=targets, expert_log_priors=priors[0], log_prior=priors[1],
                  counts=run.cls_num_list, distributions=distributions, published=scores)  # fmt: skip


class AsymmetryAggregator(PriorAggregator):
    """An alternative: the skew is the mean asymmetry of stability over a scale that was set by hand."""

    needs = frozenset({"views"})
    SCALE = 0.055  # of the asymmetry for one unit of skew, on CIFAR100-LT

    def fit(self, logits, views=None, generator=None):
        scores = (prior_free_logits(view, self.expert_log_priors) for view in next(iter(views)))
        self.skew = float(stability_asymmetry(*scores, self.log_prior).mean()) / self.SCALE
        self.log_test_prior = self.skew * self.unit * self.z


class Study:
    """All methods on one network."""

    def __init__(self, logits: Logits):
        self.logits = logits
        self.classes = len(logits.counts)

    def methods(self) -> dict[str, Callable]:
        """Name of a row -> (indices of the images, seed of a draw of labels) -> what `run` returns."""
        prior = PriorAggregator
        methods = {
            "equal weights": self.equal("plain"),
            "equal weights, averaged views": self.equal("averaged"),
        }
        if self.logits.published:
            methods["published: learned weights"] = self.published
        for images, suffix in (("plain", ""), ("averaged", ", averaged views")):
            methods |= {
                f"no prior (u){suffix}": self.adapted(GivenPriorAggregator, images, prior=[1.0] * self.classes),
                f"likelihood{suffix}": self.adapted(prior, images, debias=False, classwise=False),
                f"likelihood, class by class{suffix}": self.adapted(prior, images, debias=False),
                f"stability and likelihood{suffix}": self.adapted(prior, images, classwise=False),
                f"PriorAggregator (recommended){suffix}": self.adapted(prior, images),
            }
        methods |= {
            "asymmetry, scale by hand, averaged views": self.adapted(AsymmetryAggregator, "averaged"),
            "EM, averaged views": self.adapted(EMAggregator, "averaged"),
            "MAP-EM, averaged views": self.adapted(MAPEMAggregator, "averaged"),
            "PriorAggregator, 1 label a class": self.labeled(prior, 1),
            "PriorAggregator, 2 labels a class": self.labeled(prior, 2),
            "PriorAggregator, 5 labels a class": self.labeled(prior, 5),
            "EM, 5 labels a class": self.labeled(EMAggregator, 5),
            "BBSE, 5 labels a class": self.labeled(BBSEAggregator, 5),
            "oracle: true prior (bound)": self.oracle("plain"),
            "oracle: true prior, averaged views (bound)": self.oracle("averaged"),
            "oracle, 5 labels a class (bound)": self.labeled(GivenPriorAggregator, 5),
        }
        return methods

    def true_prior(self, indices: Tensor) -> Tensor:
        return torch.bincount(self.logits.targets[indices], minlength=self.classes).double() / len(indices)

    def equal(self, images: str) -> Callable:
        return lambda name, indices, draw: (getattr(self.logits, images)[indices].mean(dim=1), indices, {})

    def published(self, name: str, indices: Tensor, draw: int):
        return self.logits.published[name], indices, {}

    def oracle(self, images: str) -> Callable:
        return lambda name, indices, draw: self.adapted(GivenPriorAggregator, images, prior=self.true_prior(indices))(
            name, indices, draw
        )

    def adapted(self, kind: type[Aggregator], images: str, **arguments) -> Callable:
        def run(name: str, indices: Tensor, draw: int):
            aggregator = kind(self.logits.expert_log_priors, self.logits.log_prior, **arguments)
            own = getattr(self.logits, images)[indices]
            views = [tuple(view[indices] for view in self.logits.views)] if "views" in aggregator.needs else None
            started = time.perf_counter()
            aggregator.fit(own, views)
            scores = aggregator.predict(own)
            report = aggregator.report() | {"seconds": time.perf_counter() - started}
            return scores, indices, report

        return run

    def labeled(self, kind: type[Aggregator], count: int) -> Callable:
        """`count` labeled images of each class calibrate (averaged views), and leave the distribution."""

        def run(name: str, indices: Tensor, draw: int):
            targets = self.logits.targets
            order = torch.from_numpy(np.random.default_rng(draw).permutation(len(targets)))
            held_out = torch.cat([order[targets[order] == c][:count] for c in range(self.classes)])
            labeled = self.logits.averaged[held_out]
            u = prior_free_logits(labeled, self.logits.expert_log_priors)
            calibration: Calibration = fit_calibration(u, targets[held_out], self.logits.log_prior)
            rest = indices[~torch.isin(indices, held_out)]
            arguments = {"held_out": (labeled, targets[held_out])} if kind is BBSEAggregator else {}
            if kind is GivenPriorAggregator:
                arguments = {"prior": self.true_prior(rest)}
            return self.adapted(kind, "averaged", calibration=calibration, **arguments)(name, rest, draw)

        return run

    def table(self) -> pd.DataFrame:
        """One row a method: accuracy on every test set, and means of accuracy, divergence, error and seconds."""
        rows = {}
        known = [name for name in self.logits.distributions if name.startswith(("forward", "uniform", "backward"))]
        for method, run in self.methods().items():
            accuracy, others = {}, {"divergence": [], "calibration error": [], "seconds": [], "skew": []}
            spread = []
            draws = DRAWS if "label" in method else 1
            for name, indices in self.logits.distributions.items():
                values = []
                for draw in range(draws):
                    scores, used, report = run(name, torch.as_tensor(indices), draw)
                    targets = self.logits.targets[used]
                    values.append(100 * float((scores.argmax(dim=1) == targets).double().mean()))
                accuracy[name] = float(np.mean(values))
                spread.append(values)
                if name in known:
                    true, q = self.true_prior(used), report.get("prior")
                    if q:
                        q = torch.tensor(q, dtype=torch.float64) + 1e-12
                        others["divergence"].append(float(torch.special.xlogy(true, true / q).sum()))
                    error = expected_calibration_error(scores, targets, self.logits.counts)
                    others["calibration error"].append(error)
                    others["seconds"].append(report.get("seconds", np.nan))
                    others["skew"].append(report.get("skew", np.nan))
            free = [name for name in accuracy if name not in known]
            means = {"mean": np.mean([accuracy[name] for name in known])}
            means |= {"free shifts": np.mean([accuracy[name] for name in free])}
            means |= {key: np.mean(values) if values else np.nan for key, values in others.items() if key != "skew"}
            if draws > 1:
                means["spread of the mean"] = np.std(np.mean(spread[: len(known)], axis=0), ddof=1)
            rows[method] = accuracy | means
            rows[method] |= {f"skew {name}": s for name, s in zip(known, others["skew"], strict=True)}
            get_logger().info(f"{method:<50} " + " ".join(f"{accuracy[name]:5.1f}" for name in known)
                              + f" | {means['mean']:.2f}  free {means['free shifts']:.2f}")  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index")

    def few_images(self) -> pd.DataFrame:
        """How far PriorAggregator's accuracy is above equal weights' when it learns from few images of a test set.

        Averaged views on both sides. Learned from a draw, evaluated on the whole distribution; mean over 10 draws.
        """
        rows = {}
        known = [name for name in self.logits.distributions if name.startswith(("forward", "uniform", "backward"))]
        for size in (*SIZES, None):
            row = {}
            for name in known:
                indices = torch.as_tensor(self.logits.distributions[name])
                own, targets = self.logits.averaged[indices], self.logits.targets[indices]
                equal = (own.mean(dim=1).argmax(dim=1) == targets).double().mean()
                gains = []
                for draw in range(10 if size and size < len(indices) else 1):
                    order = torch.from_numpy(np.random.default_rng(draw).permutation(len(indices)))[:size]
                    aggregator = PriorAggregator(self.logits.expert_log_priors, self.logits.log_prior)
                    aggregator.fit(own[order], [tuple(view[indices[order]] for view in self.logits.views)])
                    gains.append(float((aggregator.predict(own).argmax(dim=1) == targets).double().mean() - equal))
                row[name] = 100 * np.mean(gains)
            rows["all" if size is None else str(size)] = row
            get_logger().info(f"{size} images: " + " ".join(f"{gain:+.1f}" for gain in row.values()))
        return pd.DataFrame.from_dict(rows, orient="index")


SHOWN = {
    "equal weights": ("gray", "o"),
    "published: learned weights": ("C1", "s"),
    "likelihood, averaged views": ("C0", "v"),
    "PriorAggregator (recommended), averaged views": ("black", "o"),
    "PriorAggregator, 1 label a class": ("C2", "^"),
    "oracle: true prior, averaged views (bound)": ("C3", "_"),
}


def figure(table: pd.DataFrame, title: str):
    """Accuracy over the test distributions, of the methods that matter."""
    from matplotlib.figure import Figure

    known = [name for name in table if name.startswith(("forward", "uniform", "backward"))]
    plot = Figure(figsize=(9, 4.5), layout="constrained")
    axes = plot.subplots()
    for method, (color, marker) in SHOWN.items():
        if method in table.index:
            style = {"linestyle": "none", "markersize": 14} if "oracle" in method else {}
            axes.plot(known, table.loc[method, known], color=color, marker=marker, label=method, **style)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title)
    axes.legend(fontsize="small")
    axes.tick_params(axis="x", rotation=30)
    axes.spines[["top", "right"]].set_visible(False)
    return plot


def markdown(table: pd.DataFrame, few: pd.DataFrame, title: str) -> str:
    known = [name for name in table if name.startswith(("forward", "uniform", "backward"))]
    means = ["mean", "free shifts", "divergence", "calibration error", "seconds"]
    decimals = dict.fromkeys(known, 1) | dict(zip(means, (2, 1, 2, 1, 1), strict=True))
    text = pd.DataFrame(
        {c: [("-" if pd.isna(v) else f"{v:.{decimals[c]}f}") for v in table[c]] for c in decimals}, index=table.index
    )
    gains = few.map(lambda value: f"{value:+.1f}")
    return (
        f"## {title}\n\n{markdown_lines(text, 'method')}\nPriorAggregator less equal weights, both with averaged "
        f"views, learned from so many images:\n\n{markdown_lines(gains, 'images')}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="as in the scripts")
    args = parser.parse_args()
    overrides = dict(map(parse_assignment, args.assignments))
    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.checkpoints:
        get_logger().info(f"\n{path}")
        study = Study(gather(path, overrides))
        table, few = study.table(), study.few_images()
        name = path.stem if path.stem != "last" else path.parent.parent.name
        (args.output / f"{name}.md").write_text(markdown(table, few, name))
        figure(table, name).savefig(args.output / f"{name}.png", dpi=120)
        plain = table.astype(object).where(table.notna(), None)  # JSON has no NaN
        record = {"table": plain.to_dict("index"), "few_images": few.to_dict("index")}
        write_record(args.output / f"{name}.json", torch.device("cpu"), record)


if __name__ == "__main__":
    main()
