"""A stream of test images whose class mix turns from forward50 over uniform to backward50, and who can follow it.

  python examples/turning_stream.py -r CKPT [-o FOLDER] [--images 2000] [--batch 32] [--forgetting 0.99]

The class mix is q_s(c), proportional to pi_c^s. The skew s stays at that of forward50 for the first quarter of the
stream, falls in a straight line to 0 (uniform), stays there for a sixth, falls on to that of backward50, and stays for
the last quarter. Test images are drawn with replacement. Every method learns from a batch, then predicts it; none sees
a label, but the oracle, which is told the true s, and takes over the bias that the forgetting one found: a bound.

Written to FOLDER (turning_stream/ beside the checkpoint): stream.json and stream.png.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation import LoadedRun, load_run  # noqa: E402
from evaluation.adaptation import ViewsOf, view_source  # noqa: E402
from report.tables import console_table  # noqa: E402
from tade import GivenPriorAggregator, PriorAggregator, StabilityAggregator  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.files import make_folder, write_atomically

PARTS = (0, 1 / 4, 5 / 12, 7 / 12, 3 / 4, 1)  # of the stream, and the skew there in units of forward50's
SKEWS = (1, 1, 0, 0, -1, -1)
EQUAL, PUBLISHED, ORACLE = "equal weights", "published streaming weights", "oracle (bound: told the true s)"
FORGETS, REMEMBERS = "test prior, forgetting", "test prior, without forgetting"
LEARNED = (REMEMBERS, FORGETS)  # those that estimate s
STYLES = {  # Okabe and Ito's colors, told apart by color-blind eyes, and by line style
    EQUAL: ("#999999", "-"),
    PUBLISHED: ("#E69F00", "-"),
    REMEMBERS: ("#56B4E9", "--"),
    FORGETS: ("#0072B2", "-"),
    ORACLE: ("#000000", ":"),
}
THIRDS = ("first third", "middle third", "last third")


def draw(targets: Tensor, log_prior: Tensor, images: int, batch: int, seed: int) -> Iterator[tuple[float, Tensor]]:
    """(true s, indices of test images) of every batch; targets [N], log_prior [C]."""
    generator = torch.Generator().manual_seed(seed)
    end = math.log(50) / float(log_prior.max() - log_prior.min())  # the most frequent class has 50 times the rarest's
    of_class = torch.bincount(targets, minlength=len(log_prior)).clamp(min=1)
    for start in range(0, images, batch):
        size = min(batch, images - start)
        s = end * float(np.interp((start + size / 2) / images, PARTS, SKEWS))
        shares = (s * log_prior).softmax(dim=0) / of_class
        yield s, torch.multinomial(shares[targets], size, replacement=True, generator=generator)


def follow(run: LoadedRun, stream: list[tuple[float, Tensor]], views_of: ViewsOf, forgetting: float) -> list[dict]:
    """What every method makes of every batch of a stream from `draw`: the content of "batches" in stream.json."""
    priors, calibration = (run.expert_log_priors, run.log_prior), run.calibration
    learners = {
        PUBLISHED: StabilityAggregator(*priors),
        REMEMBERS: PriorAggregator(*priors, calibration),
        FORGETS: PriorAggregator(*priors, calibration, forgetting=forgetting),
    }
    drawn = np.unique(torch.cat([indices for _, indices in stream]).numpy())
    views = views_of(drawn, 0)
    batches = []
    for s, indices in stream:
        positions = np.searchsorted(drawn, indices.numpy())
        logits, pair = run.test_logits[indices], (views[0][positions], views[1][positions])
        scores, entry = {EQUAL: logits.mean(dim=1)}, {"images": len(indices), "true_skew": s}
        for name, learner in learners.items():
            learner.update(logits, pair)
            scores[name] = learner.predict(logits)
        reports = {name: learners[name].report() for name in LEARNED}
        keys = ("skew", "skew_standard_error", "bias", "note")
        entry["estimates"] = {name: {key: report[key] for key in keys} for name, report in reports.items()}
        entry["weights"] = learners[PUBLISHED].weights.tolist()
        known = (s * run.log_prior.double()).softmax(dim=0)
        oracle = GivenPriorAggregator(*priors, calibration or [1.0, reports[FORGETS]["bias"], 0.0], prior=known)
        scores[ORACLE] = oracle.predict(logits)
        right = {name: (scores[name].argmax(dim=1) == run.targets[indices]).double().mean() for name in STYLES}
        batches.append(entry | {"accuracy": {name: 100 * share.item() for name, share in right.items()}})
    return batches


def thirds(batches: list[dict]) -> pd.DataFrame:
    """Accuracy in percent over the images of every third of the stream, and over all: a row a method."""
    accuracy = pd.DataFrame([entry["accuracy"] for entry in batches])
    images = pd.Series([entry["images"] for entry in batches])
    third = (3 * (images.cumsum() - images / 2) / images.sum()).astype(int)
    columns = {name: third == k for k, name in enumerate(THIRDS)} | {"all": third >= 0}
    return pd.DataFrame({c: accuracy[of].mul(images[of], axis=0).sum() / images[of].sum() for c, of in columns.items()})


def plot(batches: list[dict], window: int, title: str) -> Figure:
    """Accuracy over a sliding window of batches, and the true and the estimated skew below it."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    seen = np.cumsum([entry["images"] for entry in batches])
    accuracy = pd.DataFrame([entry["accuracy"] for entry in batches]).rolling(window, center=True, min_periods=1).mean()
    for name, (color, line) in STYLES.items():
        top.plot(seen, accuracy[name], color=color, linestyle=line, linewidth=2, label=name)
    true = [entry["true_skew"] for entry in batches]
    bottom.plot(seen, true, color="black", linestyle=":", linewidth=2, label="true")
    for name in LEARNED:
        skew = np.array([entry["estimates"][name]["skew"] for entry in batches])
        color, line = STYLES[name]
        bottom.plot(seen, skew, color=color, linestyle=line, linewidth=2, label=name)
        if name == FORGETS:
            error = np.array([entry["estimates"][name]["skew_standard_error"] or np.nan for entry in batches])
            band = {"color": color, "alpha": 0.2, "linewidth": 0, "label": "± a standard error"}
            bottom.fill_between(seen, skew - error, skew + error, **band)
    top.set_title(f"{title}\naccuracy over {window} batches around each", fontsize="medium")
    top.set_ylabel("accuracy (%)")
    bottom.set_ylabel("skew s of the class mix\n(1: as in training, 0: uniform)")
    bottom.set_xlabel("images of the stream so far")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--resume", type=Path, required=True, metavar="CKPT", help="checkpoint to test")
    parser.add_argument("-o", "--output", type=Path, help="folder for results (default: beside the checkpoint)")
    parser.add_argument("--images", type=int, default=2000, help="length of the stream (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images that arrive together (default: %(default)s)")
    parser.add_argument("--forgetting", type=float, default=0.99, help="see PriorAggregator (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw and the random views (default: %(default)s)")
    parser.add_argument("--averaged_views", type=int, default=0, help="see docs/results.md (default: off)")
    args = parser.parse_args(arguments)
    try:
        if args.batch < 1 or args.images < 3 * args.batch:
            raise UserError(f"--images must be at least three batches, and --batch at least 1, not {args.batch}.")
        run = load_run(args.resume, overrides={"seed": args.seed, "averaged_views": args.averaged_views})
        if not 0 < args.forgetting < 1 or run.num_experts < 2:
            raise UserError("--forgetting must lie between 0 and 1, and the network have two experts or more.")
        folder = args.output or args.resume.parent / "turning_stream"
        make_folder(folder)
        stream = list(draw(run.targets, run.log_prior, args.images, args.batch, args.seed))
        batches = follow(run, stream, view_source(run), args.forgetting)
    except UserError as error:
        sys.exit(str(error))
    table, window = thirds(batches), max(1, len(batches) // 8)
    settings = {key: getattr(args, key) for key in ("images", "batch", "forgetting", "seed", "averaged_views")}
    content = {"checkpoint": run.checkpoint.to_json(), **settings, "smoothed_over_batches": window}
    content |= {"protocol": __doc__.split("\n\n")[2], "accuracy": table.to_dict("index"), "batches": batches}
    write_atomically(folder / "stream.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    title = f"The class mix turns: forward50, uniform, backward50 ({run.config['name']})"
    plot(batches, window, title).savefig(folder / "stream.png", dpi=120)
    print(f"Accuracy in percent:\n{console_table(table)}")
    print(f"Figures: {folder / 'stream.json'}\nPlot:    {folder / 'stream.png'}")


if __name__ == "__main__":
    main()
