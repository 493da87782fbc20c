"""What a page says in one sentence, and the texts of its numbers."""

from collections.abc import Mapping, Sequence

import pandas as pd

from evaluation.results import DistributionResult

UNSURE = 50  # percent


def one(value: float | None) -> str:
    """With one decimal; a dash for none."""
    return "–" if value is None or pd.isna(value) else f"{value:.1f}"


def signed(value: float) -> str:
    """With one decimal and its sign; zero has none."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def compared(distributions: Mapping[str, DistributionResult]) -> bool:
    """Whether adaptation is compared with equal weights."""
    return any(result.difference_to_equal_weights for result in distributions.values())


def evaluation_verdict(distributions: Mapping[str, DistributionResult], method: str) -> str:
    """What an evaluation says: what adaptation gains and loses beyond chance, or how accurate the network is.

    Args:
        distributions: the results.
        method: what adapts, as the first word.
    """
    if not compared(distributions):
        return accuracy_verdict(distributions)
    differences = {name: d for name, r in distributions.items() if (d := r.difference_to_equal_weights)}
    gains = {name: d["points"] for name, d in differences.items() if d["interval"][0] > 0}
    losses = {name: -d["points"] for name, d in differences.items() if d["interval"][1] < 0}
    count, (first, *_) = len(differences), differences
    interval = "(95 % interval {} to {})".format(*map(signed, differences[first]["interval"]))
    if not gains and not losses:
        if count == 1:
            points = signed(differences[first]["points"])
            return f"{method} makes no difference beyond chance on {first}: {points} points {interval}."
        return f"{method} makes no difference beyond chance on any of the {count} distributions."
    most, worst = (max(found, key=found.__getitem__, default="") for found in (gains, losses))
    if not gains:
        text = f"{method} loses {losses[worst]:.1f} points on {worst}"
        if len(losses) > 1:
            text = f"{method} loses on {len(losses)} of {count} distributions ({losses[worst]:.1f} points on {worst})"
        return f"{text} and gains nothing beyond chance: equal weights are better here."
    text = f"{method} gains {gains[most]:.1f} points on {most}"
    if losses:
        also = f" ({len(losses)} of {count} distributions lose, {len(gains)} gain)" if count > 2 else ""
        return f"{text}, but loses {losses[worst]:.1f} points on {worst}{also}."
    if count == 1:
        return f"{text} {interval}."
    if len(gains) == count:
        return f"{text} and gains on all {count} distributions."
    return f"{text} and loses nothing beyond chance on the other {count - 1}; {len(gains)} of {count} gain."


def accuracy_verdict(distributions: Mapping[str, DistributionResult]) -> str:
    name = "uniform" if "uniform" in distributions else next(iter(distributions))
    what = "the balanced test images" if name == "uniform" and len(distributions) > 1 else f"the images of {name}"
    low, high = distributions[name].metrics["top1_interval"]
    text = (
        f"{distributions[name].top1:.1f} % of {what} are classified correctly (95 % interval {low:.1f} to {high:.1f})"
    )
    if len(distributions) == 1:
        return f"{text}."
    by_top1 = sorted(distributions, key=lambda name: distributions[name].top1)
    low, high = (f"{distributions[name].top1:.1f} % on {name}" for name in (by_top1[0], by_top1[-1]))
    return f"{text}: from {low} to {high} elsewhere."


def comparison_verdict(means: pd.DataFrame, first: pd.DataFrame) -> str:
    """What a comparison says: who is ahead, and whether beyond chance.

    Args:
        means: top-1 in percent, a row a method, a column a distribution.
        first: whether no other method is above this one beyond chance, of the same shape.
    """
    ranked = means.mean(axis=1).sort_values(ascending=False, kind="stable")
    best, count = ranked.index[0], means.shape[1]
    over = f"the mean over {count} distributions" if count > 1 else means.columns[0]
    if len(ranked) == 1:
        return f"{best} has {ranked.iloc[0]:.1f} % in {over}."
    lead = int((first.loc[best] & (first.sum() == 1)).sum())
    beaten = first.columns[~first.loc[best]]
    ahead, second = ranked.iloc[0] - ranked.iloc[1], ranked.index[1]
    if ahead < 0.05:
        text, who = f"{best} and {second} are equal in {over}", "the first"
    else:
        text, who = f"{best} is {ahead:.1f} points ahead of {second} in {over}", "it"
    if count == 1:
        return f"{text}, {'beyond' if lead else 'not beyond'} chance."
    text += f"; beyond chance {who} leads on {f'{lead} of them' if lead else 'none'}"
    if beaten.empty:
        return f"{text} and is behind on none."
    return f"{text} and is behind on {len(beaten)} ({', '.join(beaten[:3])}{', …' if len(beaten) > 3 else ''})."


def prediction_verdict(images: int, expected: Sequence[tuple[str, float]], unsure: float) -> str:
    """What a prediction says: the most frequent classes.

    Args:
        images: how many.
        expected: (class, expected images), the most first; those of which less than half an image is expected are
            left out.
        unsure: share of the images that are predicted with less than UNSURE percent confidence, in percent.
    """
    named = [f"{name} (about {number:,.0f})" for name, number in expected[:3] if number >= 0.5]
    listed = f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else "".join(named)
    return (
        f"{'1 image' if images == 1 else f'{images:,} images'}{f', mostly {listed}' if listed else ''}; "
        f"{unsure:.1f} % are predicted with less than {UNSURE} % confidence."
    )
