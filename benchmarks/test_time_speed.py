"""Evaluating eleven test distributions, and test-time training on them, against the plain way of doing each.

  python -m benchmarks.test_time_speed [--images 1000] [--repeats 3] [--job evaluation] [--output FILE.json]

Plain evaluation: the network runs over the images of every distribution, batch norm and all, NCHW.
Plain test-time training: every distribution by itself; each image is augmented by torchvision and Pillow, twice; the
gradient goes through the whole network. Both sides make one pass of updates over every distribution.

Images are random numbers in CIFAR's shape (speed does not depend on what they show). The sides run in turn; medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.common import RandomCIFAR100, write_record
from data_loader.tensor_transforms import normalize
from evaluation.adaptation import fit_all, two_view_logits
from evaluation.evaluation import Scorer
from model.inference import inference_copy
from model.logits import expert_logits
from model.model import ResNet32Model
from tade import StabilityAggregator, prediction_stability
from trainer.devices import choose_device
from utils.logger import get_logger
from utils.torchvision_import import torchvision

BATCH = 128


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def plain_evaluation(network, loader, distributions, device):
    accuracy = {}
    for name, indices in distributions.items():
        correct = 0
        for part in torch.as_tensor(indices).split(BATCH):
            images = normalize(loader.test.images[part].to(device), loader.mean, loader.std)
            with torch.no_grad():
                prediction = network(images)["output"].argmax(dim=1).cpu()
            correct += int((prediction == loader.test.targets[part]).sum())
        accuracy[name] = 100 * correct / len(indices)
    return accuracy


def our_evaluation(network, loader, distributions, device):
    batches = loader.test.batches()
    logits = expert_logits(inference_copy(network, loader.image_size), [batches], device, "evaluation")
    scorer = Scorer(logits, batches.targets, loader.cls_num_list)
    return {name: scorer.score_equal_weights(indices).top1 for name, indices in distributions.items()}


def pillow_views(loader):
    t = torchvision().transforms
    return t.Compose(
        [
            t.RandomCrop(32, padding=4),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([t.GaussianBlur(17, (0.1, 2.0))], p=0.2),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize(loader.mean, loader.std),
        ]
    )


def plain_test_time_training(network, loader, distributions, device):
    view = pillow_views(loader)
    for indices in distributions.values():
        parameter = torch.nn.Parameter(torch.full((3,), 1 / 3, device=device))
        optimizer = sgd([parameter])
        indices = torch.as_tensor(indices)
        for part in indices[torch.randperm(len(indices))].split(BATCH):
            images = [Image.fromarray(i.numpy()) for i in loader.test.images[part].permute(0, 2, 3, 1)]
            views = [torch.stack([view(image) for image in images]).to(device) for _ in range(2)]
            stability = prediction_stability(torch.softmax(parameter, 0), *(network(v)["logits"] for v in views))
            optimizer.zero_grad()
            (-stability).backward()
            optimizer.step()


def our_test_time_training(network, loader, distributions, device):
    copy = inference_copy(network, loader.image_size)
    logits = torch.zeros(len(loader.test.targets), 3, 100)  # the published method learns from the views alone
    priors = torch.zeros(3, 100), torch.zeros(100)
    aggregators = {
        name: StabilityAggregator(*priors, epochs=1, batch_size=BATCH, make_optimizer=sgd) for name in distributions
    }
    fit_all(
        aggregators,
        logits,
        distributions,
        lambda indices, pass_number: two_view_logits(copy, loader.test, indices, pass_number, device),
        seed=1,
    )


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="test images, a multiple of 100")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", choices=("evaluation", "test-time training"), help="only this one")
    parser.add_argument("-d", "--device")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device, _ = choose_device(args.device)
    get_logger().setLevel("WARNING")
    RandomCIFAR100.per_class = args.images // 100
    loader = RandomCIFAR100(data_dir="", batch_size=BATCH)
    loader.prepare(device, seed=1)
    network = ResNet32Model(100, reduce_dimension=True, use_norm=True, num_experts=3).to(device).eval()
    distributions = loader.test_distributions()

    plain, ours = (f(network, loader, distributions, device) for f in (plain_evaluation, our_evaluation))
    assert max(abs(plain[n] - ours[n]) for n in plain) < 0.5, "the two ways of evaluating disagree"
    results = {}
    jobs = {
        "evaluation": (plain_evaluation, our_evaluation),
        "test-time training": (plain_test_time_training, our_test_time_training),
    }
    for job, sides in jobs.items():
        if args.job not in (None, job):
            continue
        times = [[seconds(side, network, loader, distributions, device) for side in sides] for _ in range(args.repeats)]
        plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(p / o for p, o in times)
        results[job] = {"plain_seconds": plain, "our_seconds": ours, "ratio": ratio}
        print(f"{job:<20} plain {plain:7.2f} s   here {ours:6.2f} s   {ratio:5.1f} times faster", flush=True)
    if args.output:
        content = {
            "images": args.images,
            "distributions": len(distributions),
            "repeats": args.repeats,
            "results": results,
        }
        write_record(args.output, device, content)


if __name__ == "__main__":
    main()
