"""What averaging logits over mild views brings, on every test distribution.

python benchmarks/averaged_views.py CHECKPOINT.pth [--averaged_views 4] [--set KEY;PATH=VALUE ...]

Accuracy of the experts weighted equally, and of the experts freed of their priors with the test set's true class prior
added: a bound, since that prior is counted from the labels. Each of the images as they are, and averaged.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation import LoadedRun, load_run  # noqa: E402
from tade import class_prior  # noqa: E402
from tade.priors import EPSILON  # noqa: E402
from utils.parse_config import parse_assignment  # noqa: E402


def accuracies(run: LoadedRun) -> dict[str, dict[str, float]]:
    """Row of the table -> test distribution -> top-1 in percent."""
    equal = run.test_logits.mean(dim=1)
    likelihood = (run.test_logits - run.expert_log_priors).mean(dim=1)
    rows: dict[str, dict[str, float]] = {"equal weights": {}, "true prior (bound)": {}}
    for name, indices in run.loader.test_distributions().items():
        chosen = torch.from_numpy(indices)
        targets = run.targets[chosen]
        prior = class_prior(torch.bincount(targets, minlength=equal.shape[1]).tolist())
        for row, scores in zip(rows, (equal[chosen], likelihood[chosen] + torch.log(prior + EPSILON)), strict=True):
            rows[row][name] = 100 * (scores.argmax(dim=1) == targets).double().mean().item()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--averaged_views", type=int, default=4, help="random crops (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="as in the scripts")
    args = parser.parse_args()
    overrides = dict(map(parse_assignment, args.assignments))
    rows = {}
    for title, crops in (("image", 0), ("averaged views", args.averaged_views)):
        run = load_run(args.checkpoint, overrides={**overrides, "averaged_views": crops})
        rows |= {f"{row}, {title}": values for row, values in accuracies(run).items()}
    table = pd.DataFrame.from_dict(rows, orient="index").sort_index()
    print(table.assign(mean=table.mean(axis=1)).round(1).to_string())


if __name__ == "__main__":
    main()
