"""The figure at the top of the README, from the results.json of a test-time training.

python benchmarks/readme_figure.py RESULTS.json OUT.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

INK = "#222222"
GRAY = "#9a9a9a"
COLORS = ("#3b6fb6", "#e0a030", "#4a9a6a", "#b0508a", "#7a6ac0", "#909030")


def main(results_path: str, out: str) -> None:
    entries = json.loads(Path(results_path).read_text())["distributions"]
    names = list(entries)
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    accuracy, weights = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for key, color, label in (
        ("equal_weights_top1", GRAY, "experts weighted equally"),
        ("top1", INK, "weights learned from unlabeled test images"),
    ):
        accuracy.plot(names, [e[key] for e in entries.values()], color=color, marker="o", linewidth=2, label=label)
    below = [0.0] * len(names)
    for expert in range(len(entries[names[0]]["weights"])):
        alone = [e["experts_top1"][expert] for e in entries.values()]
        accuracy.plot(names, alone, color=COLORS[expert], linestyle=":", label=f"expert {expert + 1} alone")
        heights = [e["weights"][expert] for e in entries.values()]
        weights.bar(names, heights, bottom=below, color=COLORS[expert], width=0.7, label=f"expert {expert + 1}")
        below = [b + h for b, h in zip(below, heights, strict=True)]
    accuracy.set_ylabel("top-1 accuracy (%)")
    weights.set_ylabel("learned weights")
    weights.set_ylim(0, 1)
    weights.tick_params(axis="x", rotation=30)
    for axes in (accuracy, weights):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize="small")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
