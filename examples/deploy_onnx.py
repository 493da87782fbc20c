"""Predict with an exported network and tade, without training code; and compare with the checkpoint.

  python export.py -r CKPT -o exported
  python examples/deploy_onnx.py -r CKPT --exported exported [--images 1000]

`deployed` is all that production needs: onnxruntime, torch and tade. `main` has the checkpoint predict the same test
images by evaluation.predict, and prints how often both agree. The checkpoint's data must be small images (CIFAR,
digits).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tade import PriorAggregator  # noqa: E402


def deployed(folder: Path, images: Tensor, views: tuple[Tensor, Tensor]) -> Tensor:
    """log p(y|x) under the class mix estimated from the images themselves.

    Args:
        folder: that export.py wrote.
        images: RGB in 0..1, [N, 3, S, S].
        views: two random augmentations of the images.

    Returns:
        [N, C].
    """
    priors = json.loads((folder / "priors.json").read_text())
    network = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])

    def logits(of: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(network.run(None, {"images": x.numpy()})[0]) for x in of.split(100)])

    log_priors = torch.tensor(priors["expert_log_priors"]), torch.tensor(priors["log_prior"])
    aggregator = PriorAggregator(*log_priors, calibration=priors["calibration"])
    own = logits(images)
    aggregator.fit(own, [(logits(views[0]), logits(views[1]))])
    return aggregator.predict(own)


def main(arguments: list[str] | None = None) -> None:
    from evaluation import load_run, predict
    from evaluation.prediction import with_images
    from utils.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--resume", type=Path, required=True, metavar="CKPT", help="checkpoint of the export")
    parser.add_argument("--exported", type=Path, required=True, metavar="FOLDER", help="what export.py wrote")
    parser.add_argument("--images", type=int, default=1000, help="test images (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        if not (args.exported / "network.onnx").is_file():
            raise UserError(f"There is no {args.exported / 'network.onnx'}: python export.py -r CKPT -o FOLDER first.")
        run = load_run(args.resume, "cpu")
        if not hasattr(run.images, "images"):
            raise UserError("This example takes test images from memory: use a checkpoint of CIFAR or of the digits.")
        whole = run.images
        order = torch.randperm(len(whole.targets), generator=torch.Generator().manual_seed(1))[: args.images]
        images, targets = whole.images[order], whole.targets[order]
        expected = predict(run, images, lambda *priors: PriorAggregator(*priors, calibration=run.calibration))
    except UserError as error:
        sys.exit(str(error))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (run.loader.mean, run.loader.std))
    batches = list(with_images(run, images).images.views(np.arange(len(order)), 0))
    views = tuple(torch.cat([batch[k] for batch in batches]) * std + mean for k in (0, 1))
    log_probabilities = deployed(args.exported, images / 255, views)
    same = (log_probabilities.argmax(dim=1) == expected.log_probabilities.argmax(dim=1)).sum()
    off = (log_probabilities.exp() - expected.log_probabilities.exp()).abs().max()
    right = 100 * (log_probabilities.argmax(dim=1) == targets).float().mean()
    print(
        f"{same} of {len(targets)} predictions agree with the checkpoint's; probabilities differ by {off:.1e} at most."
    )
    print(f"Accuracy: {right:.1f} %")


if __name__ == "__main__":
    main()
