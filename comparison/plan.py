"""The runs of a comparison: which methods, data sets and seeds, and what each run consists of."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_loader.class_profiles import CIFAR_DISTRIBUTIONS
from trainer.command_line import Options
from trainer.loaded_run import SECTIONS as TESTING_SECTIONS
from trainer.registry import COMPONENTS, make_config
from trainer.schedule import moved_schedule
from trainer.training import training_config
from utils.errors import UserError, unknown
from utils.parse_config import ConfigParser, merge, parse_assignment, read_json

CONFIGS = Path("configs")
SCRIPTS = {"imagenet": "imagenet", "places": "places", "iNaturalist": "inat"}  # first word of a data set -> suffix
RESERVED = ("name", "seed", "trainer;save_dir")
CHECKPOINTS = ("last", "model_best")


@dataclass(frozen=True, eq=False)
class Run:
    """One training and its tests.

    Args:
        data, method: as in configs/config_DATA_METHOD.json.
        seed: of everything random.
        folder: the run's folder.
        training: its config.
        testing: what is changed in the checkpoint's config for test_all_*.py.
        adapting: the same for test_train_*.py; None where there are no expert weights to learn.
        device: as -d.
        commands: what one would type to do this run by hand.
    """

    data: str
    method: str
    seed: int
    folder: Path
    training: Mapping
    testing: Mapping
    adapting: Mapping | None
    device: str | None
    commands: Sequence[str]

    def __str__(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def run_id(self) -> str:
        return self.folder.name

    def config(self) -> ConfigParser:
        return training_config(self.training)

    def tests(self) -> list[tuple[str, Options]]:
        """The jobs after training and their options, for the checkpoints that are there."""
        jobs = {"test_all": self.testing} | ({"test_train": self.adapting} if self.adapting is not None else {})
        files = [self.folder / f"{name}.pth" for name in CHECKPOINTS]
        return [
            (job, Options(config, file, self.device)) for file in files if file.exists() for job, config in jobs.items()
        ]


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
            path = config_path(name, method)
            base = make_config(read_json(path))
            changes = (scaled_schedule(base, epochs) if epochs else []) + (quick_changes(base) if quick else [])
            runs += [plan_run(name, method, seed, output, [*changes, *assignments], device) for seed in seeds]
    folders: dict[Path, Run] = {}
    for run in runs:
        if run.folder in folders:
            raise UserError(
                f"{run} and {folders[run.folder]} would both be {run.folder}: give every data set, method "
                'and seed once, and every config a "name" of its own.'
            )
        folders[run.folder] = run
    return runs


def config_path(data: str, method: str) -> Path:
    """The config of a method on a data set.

    Raises:
        UserError: there is none; names the methods that the data set has, or the data sets.
    """
    path = CONFIGS / f"config_{data}_{method}.json"
    if path.exists():
        return path
    stems = {config.stem.removeprefix("config_") for config in CONFIGS.glob("config_*.json")}
    data_sets = {stem.removesuffix("_softmax") for stem in stems if stem.endswith("_softmax")}
    if data not in data_sets:
        raise unknown("data set", data, data_sets)
    prefix = f"{data}_"
    raise unknown(f"method for {data}", method, {s.removeprefix(prefix) for s in stems if s.startswith(prefix)})


def plan_run(data: str, method: str, seed: int, output: Path, assignments: Sequence[str], device: str | None) -> Run:
    """One run of `plan_runs`."""
    path = config_path(data, method)
    base = read_json(path)
    folder = output / base["name"] / f"seed{seed}"
    sections = {text: parse_assignment(text)[0].split(";")[0] for text in assignments}
    for_training = [text for text, section in sections.items() if section != "aggregator"]
    for_testing = [text for text, section in sections.items() if section == "data_loader"]
    for_adapting = [text for text, section in sections.items() if section in ("data_loader", "aggregator")]

    def values(texts: Sequence[str]) -> dict:
        return dict(parse_assignment(text) for text in texts)

    def typed(script: str, *arguments: str, texts: Sequence[str]) -> str:
        on_device = ["-d", device] if device else []
        return shlex.join(["python", script, *arguments, *on_device, *(w for t in texts for w in ("--set", t))])

    training = merge(base, {"seed": seed, "trainer;save_dir": str(output), **values(for_training)})
    config = training_config(training)
    config.build("trainer")
    suffix = SCRIPTS.get(data.split("_")[0], "cifar")
    checkpoint = ("-r", str(folder / "last.pth"))
    commands = [
        typed(
            "train.py",
            *("-c", str(path), "--seed", str(seed), "--save_dir", str(output), "--run_id", folder.name),
            texts=for_training,
        ),
        typed(f"test_all_{suffix}.py", *checkpoint, texts=for_testing),
    ]
    adapting = None
    if config["loss"]["type"] == "DiverseExpertLoss":
        own = CONFIGS / f"test_time_{data}_{method}.json"
        test_time = own if own.exists() else CONFIGS / f"test_time_{data}_tade.json"
        adapting = {**read_json(test_time), "seed": seed, **values(for_adapting)}
        make_config(merge({k: v for k, v in config.config.items() if k in TESTING_SECTIONS}, adapting))
        commands.append(
            typed(
                f"test_train_{suffix}.py",
                *("-c", str(test_time), "--seed", str(seed), *checkpoint),
                texts=for_adapting,
            )
        )
    return Run(data, method, seed, folder, training, values(for_testing), adapting, device, commands)


def scaled_schedule(config: ConfigParser, epochs: int) -> list[str]:
    """Assignments that shorten (or lengthen) a schedule, see `moved_schedule`."""
    return [f"{path}={json.dumps(value)}" for path, value in moved_schedule(config.config, epochs).items()]


def quick_changes(config: ConfigParser) -> list[str]:
    """Assignments that leave the first, the balanced and the last test distribution, and one test-time pass."""
    loader = config["data_loader"]
    names = loader.get("args", {}).get("distributions") or getattr(
        COMPONENTS["data_loader"][loader["type"]], "published", CIFAR_DISTRIBUTIONS
    )
    kept = list(dict.fromkeys([names[0], "uniform", names[-1]]))
    return [f"data_loader;args;distributions={json.dumps(kept)}", "aggregator;args;epochs=1"]
