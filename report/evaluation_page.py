"""report.html of an evaluation: what it says in one sentence, tables with intervals, charts and example pictures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evaluation.outcomes import Outcomes, Thumbnails
from model.metric import calibration_error, reliability
from report.charts import Chart
from report.figures import (
    MOST_DOTS,
    accuracy_charts,
    adapted_series,
    class_chart,
    class_shares,
    mix_chart,
    reliability_chart,
    weight_charts,
)
from report.html_page import THUMBNAIL, Picture, checkpoint_settings, render

JOBS = {"test": "Evaluation", "test_all": "Evaluation", "test_train": "Adaptation"}
METHODS = {
    "PriorAggregator": "Prior estimation",
    "GivenPriorAggregator": "The given prior",
    "StabilityAggregator": "Test-time training",
}
WORST = 10  # classes that are named
CONFUSIONS, EXAMPLES = 6, 4  # pairs of classes, and pictures of each
MOST_PICTURES = 240  # on a page

Pair = tuple[Outcomes, Outcomes | None]


def evaluation_page(
    content: Mapping[str, Any], outcomes: Mapping[str, Pair], thumbnails: Thumbnails | None = None
) -> bytes:
    """The page of an evaluation.

    Args:
        content: of results.json.
        outcomes: name of a distribution -> image by image, and of equal weights where adaptation is compared with them;
            what needs them is left out where there are none.
        thumbnails: shows test images; without, there are no pictures.
    """
    entries = content["distributions"]
    method = method_name(content) if compared(entries) else "Equal weights"
    chosen = next((name for name in ("uniform", *outcomes) if name in outcomes), None)
    classes = content.get("classes")
    panels = []
    if classes:
        examples = min(EXAMPLES, MOST_PICTURES // max(1, CONFUSIONS * len(outcomes)))
        dots = len(classes["names"]) * len(outcomes) <= MOST_DOTS
        for name, pair in outcomes.items():
            panels.append(
                {
                    "name": name,
                    "checked": name == chosen,
                    **panel(entries[name], pair, classes, method, dots),
                    **mistakes(pair[0], classes, thumbnails, examples),
                }
            )
    return render(
        "evaluation.html",
        title=f"{JOBS.get(content['job'], 'Evaluation')} of {content['config'].get('name', 'a network')}",
        kind=f"{JOBS.get(content['job'], 'Evaluation')} · {content['config'].get('name', '')}",
        verdict=verdict(entries, method),
        lead=lead(entries, method),
        remark=content.get("remark"),
        notes=[f"{name}: {note}" for name, e in entries.items() if (note := (e.get("learning") or {}).get("note"))],
        table=table_rows(entries),
        compared=compared(entries),
        method=method,
        accuracy=accuracy_charts(list(entries), adapted_series(entries, method)),
        weights=learned_weight_charts(entries),
        panels=panels,
        settings=settings_of(content),
        config=json.dumps(content["config"], indent=2),
    )


def compared(entries: Mapping[str, Mapping]) -> bool:
    """Whether adaptation is compared with equal weights."""
    return any(entry.get("difference_to_equal_weights") for entry in entries.values())


def method_name(content: Mapping[str, Any]) -> str:
    kind = (content["config"].get("aggregator") or {}).get("type", "Adaptation")
    return METHODS.get(kind, kind)


def verdict(entries: Mapping[str, Mapping], method: str) -> str:
    """What the evaluation says, in one sentence."""
    if not compared(entries):
        return accuracy_verdict(entries)
    differences = {
        name: d for name, entry in entries.items() if (d := entry.get("difference_to_equal_weights")) is not None
    }
    gains = {name: d["points"] for name, d in differences.items() if d["interval"][0] > 0}
    losses = {name: -d["points"] for name, d in differences.items() if d["interval"][1] < 0}
    count = len(differences)
    if not gains and not losses:
        if count == 1:
            ((name, d),) = differences.items()
            low, high = d["interval"]
            return (
                f"{method} makes no difference beyond chance on {name}: {signed(d['points'])} points "
                f"(95 % interval {signed(low)} to {signed(high)})."
            )
        return f"{method} makes no difference beyond chance on any of the {count} distributions."
    if not gains:
        name = max(losses, key=losses.__getitem__)
        text = f"{method} loses {losses[name]:.1f} points on {name}"
        if len(losses) > 1:
            text = f"{method} loses on {len(losses)} of {count} distributions ({losses[name]:.1f} points on {name})"
        return f"{text} and gains nothing beyond chance: equal weights are better here."
    name = max(gains, key=gains.__getitem__)
    text = f"{method} gains {gains[name]:.1f} points on {name}"
    if losses:
        worst = max(losses, key=losses.__getitem__)
        also = f" ({len(losses)} of {count} distributions lose, {len(gains)} gain)" if count > 2 else ""
        return f"{text}, but loses {losses[worst]:.1f} points on {worst}{also}."
    if count == 1:
        low, high = differences[name]["interval"]
        return f"{text} (95 % interval {signed(low)} to {signed(high)})."
    if len(gains) == count:
        return f"{text} and gains on all {count} distributions."
    return f"{text} and loses nothing beyond chance on the other {count - 1}; {len(gains)} of {count} gain."


def accuracy_verdict(entries: Mapping[str, Mapping]) -> str:
    name = "uniform" if "uniform" in entries else next(iter(entries))
    entry = entries[name]
    what = "the balanced test images" if name == "uniform" and len(entries) > 1 else f"the images of {name}"
    text = f"{entry['top1']:.1f} % of {what} are classified correctly"
    if interval := entry.get("top1_interval"):
        text += f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f})"
    if len(entries) == 1:
        return f"{text}."
    low, high = (pick(entries, key=lambda n: entries[n]["top1"]) for pick in (min, max))
    return f"{text}: from {entries[low]['top1']:.1f} % on {low} to {entries[high]['top1']:.1f} % on {high} elsewhere."


def lead(entries: Mapping[str, Mapping], method: str) -> str:
    """What stands below the verdict."""
    parts = []
    if len(entries) > 1:
        mean = np.mean([entry["top1"] for entry in entries.values()])
        text = f"Mean over {len(entries)} test class distributions: {mean:.1f} %"
        if compared(entries):
            equal = np.mean([entry["equal_weights_top1"] for entry in entries.values()])
            text += f" ({method.lower()}), {equal:.1f} % (equal weights)"
        parts.append(f"{text}.")
    if compared(entries):
        parts.append(
            "A difference counts as beyond chance where its 95 % interval does not contain 0; one interval in twenty "
            "misses by chance."
        )
    return " ".join(parts)


def one(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def signed(value: float) -> str:
    """With one decimal and its sign; zero has none."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def table_rows(entries: Mapping[str, Mapping]) -> list[dict[str, Any]]:
    """The table as text: a dictionary a distribution."""
    rows = []
    for name, entry in entries.items():
        interval, difference = entry.get("top1_interval"), entry.get("difference_to_equal_weights")
        low, high = difference["interval"] if difference else (0.0, 0.0)
        rows.append(
            {
                "name": name,
                "images": f"{entry['images']:,}",
                "top1": one(entry["top1"]),
                "interval": f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "",
                "equal": one(entry.get("equal_weights_top1")),
                "difference": signed(difference["points"]) if difference else "–",
                "difference_interval": f"{signed(low)} to {signed(high)}" if difference else "",
                "mood": "good" if low > 0 else "bad" if high < 0 else "",
                "more": [
                    one(entry.get(key))
                    for key in ("many", "medium", "few", "balanced_accuracy", "macro_f1", "expected_calibration_error")
                ],
            }
        )
    return rows


def learned_weight_charts(entries: Mapping[str, Mapping]) -> list[Chart]:
    """Expert weights over the distributions, for wide and narrow screens; none where nothing was learned of them."""
    weights = [entry.get("weights") for entry in entries.values()]
    if not compared(entries) or any(w is None or None in w for w in weights):
        return []
    return weight_charts("Expert weights over the test class distributions", list(entries), weights)


def panel(entry: Mapping[str, Any], pair: Pair, classes: Mapping[str, list], method: str, dots: bool) -> dict[str, Any]:
    """The charts of one distribution."""
    outcomes, equal = pair
    names, counts = classes["names"], classes["training_images"]
    bins = reliability(outcomes.confidence, outcomes.correct)
    surplus = 100 * float((outcomes.confidence - outcomes.correct.double()).mean())
    calibration = f"Calibration error {calibration_error(bins):.1f} points"
    rows = [(method.lower(), "main", entry.get("per_class_accuracy") or [None] * len(names))]
    if equal is not None:
        error = calibration_error(reliability(equal.confidence, equal.correct))
        calibration += f" (equal weights {error:.1f})"
        total = torch.bincount(equal.targets, minlength=len(names))
        hits = torch.bincount(equal.targets[equal.correct], minlength=len(names))
        before = [100 * h / n if n else None for h, n in zip(hits.tolist(), total.tolist(), strict=True)]
        rows.insert(0, ("equal weights", "equal", before))
    calibration += f"; on average the network is {abs(surplus):.1f} points too {'sure' if surplus > 0 else 'unsure'}."
    true, prior = class_shares(outcomes.targets, len(names)), (entry.get("learning") or {}).get("prior")
    found = torch.tensor(prior, dtype=torch.float64) if prior else class_shares(outcomes.prediction, len(names))
    distance = 50 * float((true - found).abs().sum())
    what = "Estimated" if prior else "Predicted"
    return {
        "images": f"{entry['images']:,}",
        "per_class": class_chart(rows, names, counts, dots),
        "per_class_note": "" if dots else "Each dot is the mean of classes with about as many training images.",
        "reliability": reliability_chart(bins),
        "calibration": calibration,
        "mix": mix_chart("Class mix of the test images", names, true, found, "true share", f"{what.lower()} share"),
        "mix_title": f"{what} and true class mix",
        "mix_note": f"{distance:.1f} % of the images would have to change class to make the two equal.",
    }


def mistakes(
    outcomes: Outcomes, classes: Mapping[str, list], thumbnails: Thumbnails | None, examples: int
) -> dict[str, Any]:
    """The classes with the lowest accuracy, and the pairs that are confused most often, with pictures."""
    names, counts = classes["names"], classes["training_images"]
    number = len(names)
    targets, prediction = outcomes.targets.numpy(), outcomes.prediction.numpy()
    wrong = targets != prediction
    keys, times = np.unique(targets[wrong].astype(np.int64) * number + prediction[wrong], return_counts=True)
    total = np.bincount(targets, minlength=number)
    correct = np.bincount(targets[~wrong], minlength=number)
    taken = {}  # class -> what it is most often taken for, and how often
    for place in np.lexsort((keys, -times)):
        taken.setdefault(int(keys[place]) // number, (int(keys[place]) % number, int(times[place])))
    present = np.flatnonzero(total)
    order = present[np.lexsort((present, -total[present], correct[present] / total[present]))]
    worst = [
        {
            "name": names[c],
            "training": f"{counts[c]:,}",
            "images": f"{total[c]:,}",
            "accuracy": f"{100 * correct[c] / total[c]:.1f}",
            "taken": f"{names[taken[c][0]]} ({taken[c][1]})" if c in taken else "–",
        }
        for c in map(int, order[:WORST])
        if correct[c] < total[c]
    ]
    confusions = []
    for place in np.lexsort((keys, -times))[:CONFUSIONS]:
        true, guess = divmod(int(keys[place]), number)
        own = np.flatnonzero((targets == true) & (prediction == guess))
        own = own[np.argsort(-outcomes.confidence.numpy()[own], kind="stable")][:examples]
        confusions.append(
            {
                "true": names[true],
                "guess": names[guess],
                "times": f"{times[place]} of {total[true]} images",
                "pictures": pictures(outcomes, own, names, thumbnails),
            }
        )
    return {"worst": worst, "confusions": confusions}


def pictures(
    outcomes: Outcomes, places: np.ndarray, names: Sequence[str], thumbnails: Thumbnails | None
) -> list[Picture]:
    """Pictures of the images at some places of the outcomes."""
    if thumbnails is None or not len(places):
        return []
    found = thumbnails(outcomes.indices.numpy()[places].tolist(), THUMBNAIL)
    texts = [
        f"image {int(outcomes.indices[i])}: {names[int(outcomes.targets[i])]}, taken for "
        f"{names[int(outcomes.prediction[i])]} ({100 * float(outcomes.confidence[i]):.0f} %)"
        for i in places
    ]
    return [Picture.of(image, text) for image, text in zip(found, texts, strict=True) if image is not None]


def settings_of(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the figures were made, name by name."""
    rows = [("protocol", content["protocol"]), *checkpoint_settings(content["checkpoint"])]
    rows += [("seed", str(content["seed"])), ("torch", content["torch"]), ("device", content["device"])]
    rows.append(
        (
            "intervals",
            "95 %; of accuracies by Wilson's score, of differences by a bootstrap over the images, which both "
            "predictions share",
        )
    )
    return rows
