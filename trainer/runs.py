"""The runs of a comparison: which methods, data sets and seeds, and the commands that each consists of."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_loader.class_profiles import CIFAR_DISTRIBUTIONS
from trainer.setup import COMPONENTS, TESTING_SECTIONS, make_config, parse_command_line
from utils.errors import UserError, unknown
from utils.parse_config import ConfigParser, override, parse_assignment, read_json

CONFIGS = Path("configs")
SCRIPTS = {"imagenet": "imagenet", "places": "places", "iNaturalist": "inat"}  # first word of a data set -> suffix
RESERVED = ("name", "seed", "trainer;save_dir")


@dataclass(frozen=True)
class Run:
    """One training and its tests.

    Args:
        data, method: as in configs/config_DATA_METHOD.json.
        seed: of everything random.
        folder: the run's folder.
        arguments: of train.py.
        test_arguments: of test_all_*.py, without -r.
        adapt_arguments: of test_train_*.py, without -r; None where there are no expert weights to learn.
    """

    data: str
    method: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    test_arguments: tuple[str, ...]
    adapt_arguments: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def config(self) -> ConfigParser:
        return parse_command_line("", list(self.arguments), training=True)

    def commands(self) -> list[str]:
        """What one would type to do this run by hand."""
        suffix = SCRIPTS.get(self.data.split("_")[0], "cifar")
        checkpoint = ("-r", str(self.folder / "last.pth"))
        lines = [("train.py", *self.arguments), (f"test_all_{suffix}.py", *self.test_arguments, *checkpoint)]
        if self.adapt_arguments:
            lines.append((f"test_train_{suffix}.py", *self.adapt_arguments, *checkpoint))
        return [shlex.join(["python", *line]) for line in lines]


def plan_runs(
    data: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    *,
    epochs: int | None = None,
    assignments: Sequence[str] = (),
    device: str | None = None,
    quick: bool = False,
) -> list[Run]:
    """One run for each data set, method and seed; their configs are checked, for training and for testing.

    Args:
        data, methods: as in configs/config_DATA_METHOD.json.
        seeds: one run each.
        output: folder of all runs.
        epochs: shorten the schedule to so many epochs.
        assignments: "KEY;PATH=VALUE", for every config; those of data_loader count in testing as well, those of
            aggregator only there.
        device: as -d.
        quick: the first, the balanced and the last test distribution alone, and one test-time pass.

    Raises:
        UserError: a config is missing, an option does not fit one, or two runs would share a folder.
    """
    for text in assignments:
        if parse_assignment(text)[0] in RESERVED:
            raise UserError(
                f"--set cannot change {parse_assignment(text)[0]} of a comparison: use --output and --seeds."
            )
    runs = []
    for name in data:
        for method in methods:
            path = CONFIGS / f"config_{name}_{method}.json"
            if not path.exists():
                raise unknown(
                    "data set and method",
                    f"{name}_{method}",
                    [p.stem.removeprefix("config_") for p in CONFIGS.glob("config_*.json")],
                )
            base = make_config(read_json(path))
            changes = (scaled_schedule(base, epochs) if epochs else []) + (quick_changes(base) if quick else [])
            runs += [_plan_run(name, method, seed, output, path, [*changes, *assignments], device) for seed in seeds]
    folders: dict[Path, Run] = {}
    for run in runs:
        if run.folder in folders:
            raise UserError(
                f"{run} and {folders[run.folder]} would both be {run.folder}: give every data set, method "
                'and seed once, and every config a "name" of its own.'
            )
        folders[run.folder] = run
    return runs


def _plan_run(
    data: str, method: str, seed: int, output: Path, path: Path, assignments: Sequence[str], device: str | None
) -> Run:
    """One run of `plan_runs`."""
    sections = {text: parse_assignment(text)[0].split(";")[0] for text in assignments}
    on_device = ["-d", device] if device else []

    def options(*wanted: str, unwanted: Sequence[str] = ()) -> list[str]:
        kept = [t for t, section in sections.items() if (not wanted or section in wanted) and section not in unwanted]
        return on_device + [word for text in kept for word in ("--set", text)]

    base = read_json(path)
    arguments = [
        "-c",
        str(path),
        "--seed",
        str(seed),
        "--save_dir",
        str(output),
        "--run_id",
        f"seed{seed}",
        *options(unwanted=["aggregator"]),
    ]
    config = parse_command_line("", arguments, training=True)
    config.build("trainer")
    adapt_arguments = None
    if config["loss"]["type"] == "DiverseExpertLoss":
        own, usual = CONFIGS / f"test_time_{data}_{method}.json", CONFIGS / f"test_time_{data}_tade.json"
        test_time = own if own.exists() else usual
        adapt_arguments = ("-c", str(test_time), "--seed", str(seed), *options("data_loader", "aggregator"))
        merged = {k: v for k, v in config.config.items() if k in TESTING_SECTIONS} | read_json(test_time)
        for text, section in sections.items():
            if section in ("data_loader", "aggregator"):
                override(merged, *parse_assignment(text))
        make_config(merged)
    return Run(
        data,
        method,
        seed,
        output / base["name"] / f"seed{seed}",
        tuple(arguments),
        tuple(options("data_loader")),
        adapt_arguments,
    )


def scaled_schedule(config: ConfigParser, epochs: int) -> list[str]:
    """Assignments that shorten (or lengthen) a schedule.

    Steps and re-weighting move in proportion; warm-up ends before half of the first step.
    """
    whole = config["trainer"]["epochs"]

    def scaled(epoch: int) -> int:
        return max(1, round(epoch * epochs / whole))

    changes = {"trainer;epochs": epochs}
    schedule = config["lr_scheduler"].get("args", {})
    for key in ("step1", "step2", "T_max", "step_size"):
        if key in schedule:
            changes[f"lr_scheduler;args;{key}"] = scaled(schedule[key])
    if "milestones" in schedule:
        changes["lr_scheduler;args;milestones"] = [scaled(epoch) for epoch in schedule["milestones"]]
    if "step1" in schedule:
        changes["lr_scheduler;args;warmup_epoch"] = min(schedule.get("warmup_epoch", 0), scaled(schedule["step1"]) // 2)
    if config["loss"].get("args", {}).get("reweight_epoch", -1) > 0:
        changes["loss;args;reweight_epoch"] = scaled(config["loss"]["args"]["reweight_epoch"])
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def quick_changes(config: ConfigParser) -> list[str]:
    """Assignments that leave the first, the balanced and the last test distribution, and one test-time pass."""
    loader = config["data_loader"]
    names = loader.get("args", {}).get("distributions") or getattr(
        COMPONENTS["data_loader"][loader["type"]], "published", CIFAR_DISTRIBUTIONS
    )
    kept = list(dict.fromkeys([names[0], "uniform", names[-1]]))
    return [f"data_loader;args;distributions={json.dumps(kept)}", "aggregator;args;epochs=1"]
