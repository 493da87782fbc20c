"""What the experts know, with and without the class priors that their logits carry.

python -m benchmarks.expert_priors CHECKPOINT.pth [MORE.pth ...] [--tilt T ...]

Training leaves each expert's logits, up to a constant for each image, as log likelihood plus a known log prior (the
loss says which, `log_priors` in model/loss.py). Accuracy on five test distributions of: the experts, the mean of
their logits, the same after each expert's prior is subtracted, and with T times the log training prior added, which
leans the network towards frequent classes (T above 0) or rare ones.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.common import TABLE_DISTRIBUTIONS
from evaluation import load_run
from model.metric import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--tilt", nargs="+", type=float, default=[], metavar="T")
    args = parser.parse_args()
    for path in args.checkpoints:
        run = load_run(path)
        logits, distributions = run.test_logits, run.loader.test_distributions()
        print(path)
        ways = {"as they are": logits, "freed of priors": logits - run.expert_log_priors}
        ways |= {f"tilted by {tilt:g}": logits + tilt * run.log_prior for tilt in args.tilt}
        for name in (name for name in TABLE_DISTRIBUTIONS if name in distributions):
            chosen = torch.from_numpy(distributions[name])
            targets = run.targets[chosen]
            for title, v in ways.items():
                scores = [*v[chosen].unbind(dim=1), v[chosen].mean(dim=1)]
                *experts, mean = (f"{accuracy(s, targets, run.cls_num_list):.1f}" for s in scores)
                print(f"  {name:<11}{title:<16} experts {' '.join(experts)}   mean {mean}")


if __name__ == "__main__":
    main()
