"""report.html of an evaluation: what it says in one sentence, tables with intervals, charts and example pictures."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from evaluation.outcomes import Outcomes, Thumbnails
from evaluation.results import DistributionResult, Results
from model.metric import calibration_error, class_hits, reliability
from report.charts import COLORS, Axis, Chart, Series, line_charts
from report.figures import class_chart, class_groups, mix_chart, weight_charts
from report.html_page import THUMBNAIL, checkpoint_settings, picture, render
from report.verdict import compared, evaluation_verdict

METHODS = {
    "PriorAggregator": "Prior estimation",
    "GivenPriorAggregator": "The given prior",
    "StabilityAggregator": "Test-time training",
}
WORST = 10  # classes that are named
CONFUSIONS, EXAMPLES = 6, 4  # pairs of classes, and pictures of each
MOST_PICTURES = 240  # on a page


def evaluation_page(results: Results, job: str) -> bytes:
    """The page of an evaluation; `job` made it."""
    entries, method, classes = results.distributions, method_of(results), results.classes
    shown = {name: result for name, result in entries.items() if classes and result.outcomes}
    chosen = "uniform" if "uniform" in shown else next(iter(shown), None)
    examples = min(EXAMPLES, MOST_PICTURES // max(1, CONFUSIONS * len(shown)))
    panels = [
        {
            "name": name,
            "checked": name == chosen,
            **panel(result, classes, method.lower(), len(shown)),
            **mistakes(result.outcomes, classes, results.thumbnails, examples),
        }
        for name, result in shown.items()
    ]
    kind, name = "Adaptation" if job == "test_train" else "Evaluation", results.config.get("name", "")
    top1 = [(entry.top1, entry.equal_weights_top1) for entry in entries.values()]
    return render(
        "evaluation.html",
        title=f"{kind} of {name or 'a network'}",
        kind=f"{kind} · {name}",
        verdict=evaluation_verdict(entries, method),
        means=np.array(top1, dtype=float).mean(axis=0).tolist(),
        remark=results.remark,
        entries=entries,
        compared=compared(entries),
        method=method.lower(),
        accuracy=accuracy_charts(results),
        weights=learned_weight_charts(results),
        panels=panels,
        settings=[
            ("protocol", results.protocol),
            *checkpoint_settings(results.checkpoint.to_json()),
            *(("seed", results.seed), ("torch", results.torch), ("device", results.device)),
        ],
        config=json.dumps(results.config, indent=2),
    )


def method_of(results: Results) -> str:
    """What predicts, in words."""
    if not compared(results.distributions):
        return "Equal weights"
    kind = (results.config.get("aggregator") or {}).get("type", "Adaptation")
    return METHODS.get(kind, kind)


def accuracy_charts(results: Results) -> list[Chart]:
    """Top-1 with its interval over several distributions, beside single experts and equal weights."""
    entries = list(results.distributions.values())
    if len(entries) < 2:
        return []
    experts = np.array([entry.experts_top1 for entry in entries]).T
    series = [
        Series(f"expert {e + 1} alone", COLORS[e % len(COLORS)], values.tolist(), style="thin dashed")
        for e, values in enumerate(experts)
        if len(experts) > 1
    ]
    if compared(results.distributions):
        series.append(Series("equal weights", "equal", [entry.equal_weights_top1 for entry in entries]))
    low, high = zip(*(entry.metrics["top1_interval"] for entry in entries), strict=True)
    series.append(Series(method_of(results).lower(), "main", [entry.top1 for entry in entries], low=low, high=high))
    label = "Top-1 accuracy over the test class distributions"
    return line_charts(label, list(results.distributions), series, "top-1 accuracy (%)")


def learned_weight_charts(results: Results) -> list[Chart]:
    """Expert weights over several distributions, where they were learned."""
    weights = [result.weights or [None] for result in results.distributions.values()]
    if len(weights) < 2 or not compared(results.distributions) or any(None in w for w in weights):
        return []
    return weight_charts(list(results.distributions), np.array(weights))


def panel(result: DistributionResult, classes: Mapping[str, list], method: str, panels: int) -> dict[str, Any]:
    """The charts of one of several distributions, and what stands above them."""
    outcomes, equal, number = result.outcomes, result.equal_outcomes, len(classes["names"])
    bins = reliability(outcomes.confidence, outcomes.correct)
    surplus = 100 * float((outcomes.confidence - outcomes.correct.double()).mean())
    calibration = f"Calibration error {calibration_error(bins):.1f} points"
    if equal is not None:
        calibration += f" (equal weights {calibration_error(reliability(equal.confidence, equal.correct)):.1f})"
    accuracies = {} if equal is None else {"equal weights": class_accuracy(equal, number)}
    accuracies[method] = class_accuracy(outcomes, number)
    true, predicted = (
        torch.bincount(classes, minlength=number).numpy() / result.images
        for classes in (outcomes.targets, outcomes.prediction)
    )
    prior = (result.learning or {}).get("prior")
    found, label = (np.array(prior), "estimated") if prior else (predicted, "predicted")
    moved, groups = 50 * np.abs(true - found).sum(), class_groups(classes, panels)
    return {
        "images": f"{result.images:,}",
        "per_class": class_chart(accuracies, {"equal weights": "equal"} | {method: "main"}, classes, panels),
        "means": len(groups) < number,
        "reliability": reliability_chart(bins),
        "calibration": f"{calibration}; on average the network is {abs(surplus):.1f} points too "
        f"{'sure' if surplus > 0 else 'unsure'}. Above the bars: images.",
        "mix": mix_chart(found, true, (label, "true"), groups),
        "mix_title": f"{label.capitalize()} over true class mix",
        "mix_note": f"{moved:.1f} % of the images would have to change class to make the two equal.",
    }


def class_accuracy(outcomes: Outcomes, classes: int) -> np.ndarray:
    """In percent, [C]; NaN for a class without an image."""
    hits, total = class_hits(outcomes.prediction, outcomes.targets, classes)
    return (100 * hits.double() / total).numpy()


def reliability_chart(bins: torch.Tensor) -> Chart:
    """Accuracy over confidence, of `reliability` [K, 3], with the number of images above each bar."""
    chart = Chart("Accuracy over confidence", Axis(0, 100, "confidence (%)"), Axis(0, 100, "accuracy (%)"))
    for k, (images, confidence, correct) in enumerate(bins.tolist()):
        if images:
            confidence, accuracy = 100 * confidence / images, 100 * correct / images
            title = f"{images:.0f} images: confidence {confidence:.1f} %, accuracy {accuracy:.1f} %"
            short = f"{images:.0f}" if images < 1000 else f"{images / 1000:.2g}k"
            chart.bar(100 * k / len(bins), 100 * (k + 1) / len(bins), accuracy, title, short)
    chart.diagonal()
    return chart


def mistakes(
    outcomes: Outcomes, classes: Mapping[str, list], thumbnails: Thumbnails | None, examples: int
) -> dict[str, Any]:
    """The classes with the lowest accuracy, and the pairs that are confused most often, with pictures."""
    names, counts = classes["names"], classes["training_images"]
    images = pd.DataFrame({key: value.numpy() for key, value in vars(outcomes).items()})
    wrong = images[images["targets"] != images["prediction"]].sort_values("confidence", ascending=False, kind="stable")
    pairs = wrong.groupby(["targets", "prediction"])
    times = pairs.size().sort_values(ascending=False, kind="stable")
    taken = times.reset_index(name="times").drop_duplicates("targets").set_index("targets")  # for what, most often
    total = images.groupby("targets").size()
    accuracy = images["prediction"].eq(images["targets"]).groupby(images["targets"]).mean()
    lowest = pd.DataFrame({"accuracy": 100 * accuracy, "images": total}).loc[taken.index.sort_values()]
    lowest = lowest.sort_values(["accuracy", "images"], ascending=[True, False], kind="stable").head(WORST)
    lowest["name"], lowest["training"] = [names[c] for c in lowest.index], [counts[c] for c in lowest.index]
    lowest["taken"], lowest["times"] = [names[c] for c in taken.prediction[lowest.index]], taken.times[lowest.index]
    confusions = []
    for (true, guess), number in times.head(CONFUSIONS).items():
        shown = pairs.get_group((true, guess)).head(examples)
        found = thumbnails(shown["indices"].tolist(), THUMBNAIL) if thumbnails and examples else []
        texts = [
            f"image {index}: {names[true]}, taken for {names[guess]} ({100 * confidence:.0f} %)"
            for index, confidence in zip(shown["indices"], shown["confidence"], strict=True)
        ]
        pictures = [picture(image, text) for image, text in zip(found, texts) if image]
        times_of = f"{number} of {total[true]} images"
        confusions.append({"true": names[true], "guess": names[guess], "times": times_of, "pictures": pictures})
    return {"worst": lowest.to_dict("records"), "confusions": confusions}
