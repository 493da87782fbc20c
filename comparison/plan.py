"""The runs of a comparison: which methods, data sets and seeds, and the commands that each run consists of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.command_line import parse
from commands.jobs import run_test_all, run_test_train
from comparison.tables import display_name
from evaluation.results_folder import results_dir
from trainer.registry import COMPONENTS, read_config
from trainer.schedule import moved_schedule
from trainer.training import train as run_training
from utils.errors import UserError, unknown
from utils.files import make_folder, write_atomically
from utils.parse_config import ConfigParser, merge, parameters_of, parse_assignment, read_json

CONFIGS = Path("configs")
SCRIPTS = {"imagenet": "imagenet", "places": "places", "iNaturalist": "inat"}  # first word of a data set -> suffix
RESERVED = ("name", "seed", "trainer;save_dir")
CHECKPOINTS = {"last": "last epoch", "model_best": "best epoch"}
#: Jobs after training, each with results in a folder of its name: experts weighted equally, weights learned as
#: published (only for TADE), test prior estimated (only on the last checkpoint: it takes more passes).
EQUAL, LEARNED, PRIOR = "test_all", "test_train", "test_prior"
#: Arguments of `arch` that belong to a method, as the loss does.
PARTS = ("num_experts", "reduce_dimension", "use_norm", "share_layer3")


@dataclass(frozen=True, eq=False)
class Run:
    """One training and its tests.

    Args:
        data, method: as in configs/config_DATA_METHOD.json.
        seed: of everything random.
        folder: the run's folder.
        config: of its training.
        train: the command that trains it.
        resume: the command that trains it further, without its checkpoint.
        tests: job -> the command that does it, without its checkpoint.
    """

    data: str
    method: str
    seed: int
    folder: Path
    config: ConfigParser
    train: list[str]
    resume: list[str]
    tests: dict[str, list[str]]

    def __str__(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{name}.pth"

    def results(self, job: str, name: str) -> Path:
        return results_dir(self.checkpoint(name), job) / "results.json"

    def test(self, job: str, name: str) -> list[str]:
        """The command of a job on the checkpoint "last" or "model_best"."""
        # It is the script of LEARNED that does PRIOR: each needs a folder of its own.
        output = ["-o", str(self.results(job, name).parent)] if job == PRIOR else []
        return [*self.tests[job], "-r", str(self.checkpoint(name)), *output]

    def changes(self, job: str) -> Mapping:
        """What a job changes in the checkpoint's config, see trainer.registry.read_config."""
        return parse(run_test_all if job == EQUAL else run_test_train, "", self.test(job, "last")[2:])["config"]

    @property
    def commands(self) -> list[list[str]]:
        """The commands for the last checkpoint, to type by hand."""
        return [self.train, *(self.test(job, "last") for job in self.tests)]


def plan_runs(configs: Mapping[tuple[str, str], Path], seeds: Sequence[int], output: Path, **options) -> list[Run]:
    """One run for each config and seed; all is checked that can be without reading data.

    Args:
        configs: (data, method) -> training config, see `config_path` and `write_own_configs`.
        seeds: one run each.
        output: folder of all runs.
        options: see `plan_run`.

    Raises:
        UserError: an option does not fit a config, or two runs would share a folder.
    """
    runs: dict[Path, Run] = {}
    for (data, method), path in configs.items():
        for seed in seeds:
            run = plan_run(data, method, path, seed, output, **options)
            if run.folder in runs:
                raise UserError(
                    f"{run} and {runs[run.folder]} would both be {run.folder}: give every seed once, and every "
                    'config a "name" of its own.'
                )
            runs[run.folder] = run
    return list(runs.values())


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


def plan_run(
    data: str,
    method: str,
    path: Path,
    seed: int,
    output: Path,
    *,
    epochs: int | None = None,
    assignments: Sequence[str] = (),
    device: str | None = None,
    quick: bool = False,
) -> Run:
    """One run of `plan_runs`.

    Args:
        data, method, seed, output: see `plan_runs`.
        path: the config.
        epochs: shorten the schedule to so many epochs.
        assignments: "KEY;PATH=VALUE", for training; those of data_loader and averaged_views count in testing, those of
            aggregator where weights are learned.
        device: as -d.
        quick: the first, the balanced and the last test distribution alone, one test-time pass, no averaged views.
    """
    base = read_config(read_json(path))
    folder = output / base["name"] / f"seed{seed}"
    for text in assignments:
        if (reserved := parse_assignment(text)[0]) in RESERVED:
            raise UserError(f"--set cannot change {reserved} of a comparison: use --output and --seeds.")
    section = {
        text: text.split(";")[0].split("=")[0] for text in [*(quick_changes(base) if quick else []), *assignments]
    }

    def command(script: str, *words: object, given: Sequence[str] = ()) -> list[str]:
        on_device = ["-d", device] if device else []
        sets = [word for text in given for word in ("--set", text)]
        return ["python", script, *map(str, words), *on_device, *sets]

    words = ["-c", path, "--seed", seed, "--save_dir", output, "--run_id", folder.name]
    words += ["--epochs", epochs] if epochs else []
    training = [text for text, key in section.items() if key not in ("averaged_views", "aggregator")]
    train = command("train.py", *words, given=training)
    config = read_config(parse(run_training, "", train[2:])["config"], training=True)
    config.build("trainer")
    own = config["data_loader"]["type"] == "ListDataLoader"
    suffix = "imagenet" if own else SCRIPTS.get(data.split("_")[0], "cifar")
    testing = [text for text, key in section.items() if key in ("data_loader", "averaged_views")]
    learning = [text for text, key in section.items() if text in testing or key == "aggregator"]
    adapting = {PRIOR: testing + ["averaged_views=0"] * quick}
    if config["loss"]["type"] == "DiverseExpertLoss":
        adapting = {LEARNED: learning, **adapting}
    tests = {EQUAL: command(f"test_all_{suffix}.py", given=testing)}
    for job, given in adapting.items():
        words = ["-c", adapting_config(data, method, job), "--seed", seed]
        tests[job] = command(f"test_train_{suffix}.py", *words, given=given)
    run = Run(data, method, seed, folder, config, train, command("train.py"), tests)
    for job in tests:
        read_config(run.changes(job), {"format": 1, "config": config.config}, path)
    return run


def adapting_config(data: str, method: str, job: str) -> Path:
    """The config of a job after training; the example's where data set and method have none of their own."""
    names = {
        LEARNED: [f"{data}_{method}", f"{data}_tade", "custom_example"],
        PRIOR: [f"{data}_prior", "custom_example_prior"],
    }
    return next(path for name in names[job] if (path := CONFIGS / f"test_time_{name}.json").exists())


def write_own_configs(own: Path, methods: Sequence[str], output: Path) -> dict[tuple[str, str], Path]:
    """The configs of several methods on the data of one's own config, written into a folder.

    Args:
        own: a training config, of any method.
        methods: softmax, ride, tade.
        output: gets config_NAME_METHOD.json.

    Returns:
        (NAME, method) -> file.

    Raises:
        UserError: the config is wrong, or a method is unknown.
    """
    base, name = read_config(read_json(own)).config, own.stem.removeprefix("config_")
    files = {}
    make_folder(output)
    for method in methods:
        files[name, method] = output / f"config_{name}_{method}.json"
        content = json.dumps(method_config(base, method), indent=2) + "\n"
        write_atomically(files[name, method], content.encode())
    return files


def method_config(own: Mapping, method: str) -> dict:
    """Another method on the data, network and schedule of a training config.

    The loss, the number of experts and how wide they are come from the method's recipe on CIFAR100-LT, for ResNet-32,
    or on ImageNet-LT; the config's own stay where it has that loss. Stages that start from given weights keep their
    full width.
    """
    small = own["arch"]["type"] == "ResNet32Model"
    recipe = read_json(config_path("cifar100_ir100" if small else "imagenet_lt_resnext50", method))
    config = {**own, "name": f"{own['name']}_{display_name(method)}"}
    if own["loss"]["type"] == recipe["loss"]["type"]:
        return config
    arguments, parts = dict(own["arch"].get("args", {})), recipe["arch"]["args"]
    experts = arguments.get("num_experts", 1)
    accepted = parameters_of(COMPONENTS["arch"][own["arch"]["type"]])
    arguments |= {name: parts[name] for name in PARTS if name in parts and name in accepted}
    if parts["num_experts"] > 1:
        arguments["num_experts"] = max(parts["num_experts"], experts)
    if "weights" in own and arguments.get("reduce_dimension"):
        arguments["reduce_dimension"] = False
    made_for = {**own, "loss": recipe["loss"], "trainer": {"epochs": recipe["trainer"]["epochs"]}}
    moved = moved_schedule(made_for, own["trainer"]["epochs"])
    loss = {path: value for path, value in moved.items() if path.startswith("loss;")}
    return {**merge({**config, "loss": recipe["loss"]}, loss), "arch": {**own["arch"], "args": arguments}}


def quick_changes(config: ConfigParser) -> list[str]:
    """Assignments of `quick`: three test distributions, one test-time pass."""
    names = config.complete()["data_loader"]["args"].get("distributions", ["uniform"])
    kept = list(dict.fromkeys([names[0], "uniform", names[-1]]))
    return [f"data_loader;args;distributions={json.dumps(kept)}", "aggregator;args;epochs=1"]
