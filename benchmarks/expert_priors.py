"""What the experts know, with and without the class priors that their logits carry.

  python benchmarks/expert_priors.py CHECKPOINT.pth [MORE.pth ...]

Training softmax(v_e + a_e) leaves v_e, up to a constant for each image, as log likelihood plus a known log prior
(`expert_log_priors` in model/loss.py). Accuracy on three test distributions of: the experts, the mean of their logits,
and the same after each expert's prior is subtracted.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.loss import class_prior, expert_log_priors, inverse_prior  # noqa: E402
from trainer.evaluator import expert_logits  # noqa: E402
from trainer.setup import parse_command_line  # noqa: E402
from trainer.testing import open_subject  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    for path in parser.parse_args().checkpoints:
        subject = open_subject(parse_command_line("", ["-r", str(path)]))
        batches, tau = subject.loader.test_batches(), load_checkpoint(path)["config"]["loss"]["args"]["tau"]
        logits = expert_logits(subject.network, batches, subject.device, "test images")
        prior = class_prior(subject.loader.cls_num_list)
        free = logits - expert_log_priors(prior, inverse_prior(prior), subject.num_experts, tau)
        print(path)
        distributions = subject.loader.test_distributions()
        for name in ("forward50", "uniform", "backward50"):
            rows = torch.from_numpy(distributions[name])

            def accuracy(scores: torch.Tensor, rows=rows) -> str:
                return f"{100 * float((scores[rows].argmax(1) == batches.targets[rows]).float().mean()):.1f}"

            for title, v in (("as they are", logits), ("freed of priors", free)):
                experts = " ".join(accuracy(v[:, e]) for e in range(v.shape[1]))
                print(f"  {name:<11}{title:<16} experts {experts}   mean {accuracy(v.mean(dim=1))}")


if __name__ == "__main__":
    main()
