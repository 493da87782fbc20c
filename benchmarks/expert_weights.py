"""What expert weights can reach on a network, and what the published objective makes of them.

python -m benchmarks.expert_weights CHECKPOINT.pth [--weights 0.40 0.35 0.24] [--steps 20] [--set KEY;PATH=VALUE ...]

For five test distributions, accuracy and prediction stability S (mean cosine similarity of the predictions of two
random views, the objective of test-time training) of: equal weights, the given ones, the most stable ones, and the most
accurate ones, which only labels tell: a bound for any way to choose weights. The last two are of a grid of steps 1/20.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.common import TABLE_DISTRIBUTIONS
from evaluation import load_run
from evaluation.adaptation import two_view_logits
from model.metric import accuracy
from tade.stability import prediction_stability, weighted_logits
from utils.parse_config import parse_assignment


def grid(experts: int, steps: int) -> list[tuple[float, ...]]:
    """All weights of E experts that are multiples of 1/steps and sum to 1."""
    counts = itertools.product(range(steps + 1), repeat=experts - 1)
    return [(*(n / steps for n in some), 1 - sum(some) / steps) for some in counts if sum(some) <= steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--weights", type=float, nargs="+", help="of the experts, in any unit, to be looked at too")
    parser.add_argument("--steps", type=int, default=20, help="steps of the grid from 0 to 1 (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="as in the scripts")
    args = parser.parse_args()
    run = load_run(args.checkpoint, overrides=dict(map(parse_assignment, args.assignments)))
    views = two_view_logits(run.inference_network, run.images, np.arange(len(run.targets)), 0, run.device)
    experts = run.test_logits.shape[1]
    distributions = run.loader.test_distributions()
    rows = []
    for name in (name for name in TABLE_DISTRIBUTIONS if name in distributions):
        chosen = torch.from_numpy(distributions[name])
        logits, targets, (view1, view2) = run.test_logits[chosen], run.targets[chosen], (v[chosen] for v in views)

        def measured(title: str, weights: tuple[float, ...]) -> dict:
            values = torch.tensor(weights)
            top1 = accuracy(weighted_logits(values, logits), targets, run.cls_num_list)  # noqa: B023 (called at once)
            stability = prediction_stability(values, view1, view2).item()  # noqa: B023
            return {"distribution": name, "weights": title, "": weights, "top1": top1, "S": stability}  # noqa: B023

        points = [measured("", weights) for weights in grid(experts, args.steps)]
        rows.append(measured("equal", (1 / experts,) * experts))
        if args.weights:
            rows.append(measured("given", tuple(weight / sum(args.weights) for weight in args.weights)))
        rows.append({**max(points, key=lambda point: point["S"]), "weights": "most stable"})
        rows.append({**max(points, key=lambda point: point["top1"]), "weights": "most accurate (bound)"})
    table = pd.DataFrame(rows)
    table[""] = [" ".join(f"{weight:.2f}" for weight in weights) for weights in table[""]]
    print(table.round({"top1": 1, "S": 4}).to_string(index=False))


if __name__ == "__main__":
    main()
