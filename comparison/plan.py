"""The runs of a comparison: which methods, data sets and seeds, and the commands that each run consists of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.command_line import parse
from comparison.tables import display_name
from evaluation.loaded_run import evaluation_config
from evaluation.results_folder import results_dir
from trainer.registry import COMPONENTS, make_config
from trainer.schedule import moved_schedule
from trainer.training import training_config
from utils.errors import UserError, unknown
from utils.files import make_folder, write_atomically
from utils.parse_config import ConfigParser, merge, parameters_of, parse_assignment, read_json

CONFIGS = Path("configs")
SCRIPTS = {"imagenet": "imagenet", "places": "places", "iNaturalist": "inat"}  # first word of a data set -> suffix
RESERVED = ("name", "seed", "trainer;save_dir")
CHECKPOINTS = ("last", "model_best")
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
        tests: job -> the command that does it, without its checkpoint.
        on_device: the -d of all its commands, or nothing.
    """

    data: str
    method: str
    seed: int
    folder: Path
    config: ConfigParser
    train: list[str]
    tests: dict[str, list[str]]
    on_device: list[str]

    def __str__(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{name}.pth"

    def results(self, job: str, name: str) -> Path:
        return results_dir(self.checkpoint(name), job) / "results.json"

    def resume(self, checkpoint: Path) -> list[str]:
        return ["python", "train.py", "-r", str(checkpoint), *self.on_device]

    def test(self, job: str, name: str) -> list[str]:
        """The command of a job on the checkpoint "last" or "model_best"."""
        # The script of LEARNED does it as well: beside its results, those of PRIOR need a folder of their own.
        output = ["-o", str(self.results(job, name).parent)] if job == PRIOR else []
        return [*self.tests[job], "-r", str(self.checkpoint(name)), *output]

    def changes(self, job: str) -> Mapping:
        """What a job changes in the checkpoint's config, see evaluation.loaded_run.evaluation_config."""
        return parse("", self.test(job, "last")[2:], adapting=job != EQUAL).config

    @property
    def commands(self) -> list[list[str]]:
        """The commands for the last checkpoint, to type by hand."""
        return [self.train, *(self.test(job, "last") for job in self.tests)]


def plan_runs(
    data: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    *,
    configs: Mapping[str, Path] | None = None,
    **options,
) -> list[Run]:
    """One run for each data set, method and seed; their configs are checked, for training and for testing.

    Args:
        data, methods: as in configs/config_DATA_METHOD.json.
        seeds: one run each.
        output: folder of all runs.
        configs: the configs of the methods on one's own data, see `write_own_configs`.
        options: see `plan_run`.

    Raises:
        UserError: a config is missing, an option does not fit one, or two runs would share a folder.
    """
    runs: dict[Path, Run] = {}
    for name in data:
        for method in methods:
            path = configs[method] if configs else config_path(name, method)
            for seed in seeds:
                run = plan_run(name, method, path, seed, output, **options)
                if run.folder in runs:
                    raise UserError(
                        f"{run} and {runs[run.folder]} would both be {run.folder}: give every data set, method "
                        'and seed once, and every config a "name" of its own.'
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
    base = make_config(read_json(path))
    folder = output / base["name"] / f"seed{seed}"
    section = {text: parse_assignment(text)[0].split(";")[0] for text in assignments}
    for text in assignments:
        if (reserved := parse_assignment(text)[0]) in RESERVED:
            raise UserError(f"--set cannot change {reserved} of a comparison: use --output and --seeds.")
    if quick:
        section = {**quick_changes(base), **section}
    on_device = ["-d", device] if device else []

    def command(script: str, *words: object, given: Sequence[str]) -> list[str]:
        sets = [word for text in given for word in ("--set", text)]
        return ["python", script, *map(str, words), *on_device, *sets]

    training = [text for text, key in section.items() if key not in ("averaged_views", "aggregator")]
    testing = [text for text, key in section.items() if key in ("data_loader", "averaged_views")]
    learning = [text for text, key in section.items() if key in ("data_loader", "averaged_views", "aggregator")]
    words = ["-c", path, "--seed", seed, "--save_dir", output, "--run_id", folder.name]
    train = command("train.py", *words, *(["--epochs", epochs] if epochs else []), given=training)
    config = training_config(parse("", train[2:], training=True).config)
    config.build("trainer")
    own = config["data_loader"]["type"] == "ListDataLoader"
    suffix = "imagenet" if own else SCRIPTS.get(data.split("_")[0], "cifar")
    adapting = {PRIOR: ("prior", testing + ["averaged_views=0"] * quick)}
    if config["loss"]["type"] == "DiverseExpertLoss":
        adapting = {LEARNED: ("tade", learning), **adapting}
    tests = {EQUAL: command(f"test_all_{suffix}.py", given=testing)}
    for job, (kind, given) in adapting.items():
        words = ["-c", adapting_config(data, method, kind), "--seed", seed]
        tests[job] = command(f"test_train_{suffix}.py", *words, given=given)
    run = Run(data, method, seed, folder, config, train, tests, on_device)
    for job in tests:
        evaluation_config({"format": 1, "config": config.config}, run.changes(job), path)
    return run


def adapting_config(data: str, method: str, kind: str) -> Path:
    """The config/test_time_*.json of a method on a data set; the example's where they have none of their own.

    Args:
        data, method: as in configs/config_DATA_METHOD.json.
        kind: "tade", the published way, or "prior".
    """
    names = [f"{data}_{method}"] if kind == "tade" else []
    names += [f"{data}_{kind}", "custom_example" + ("" if kind == "tade" else "_prior")]
    return next(path for name in names if (path := CONFIGS / f"test_time_{name}.json").exists())


def write_own_configs(own: Path, methods: Sequence[str], output: Path) -> dict[str, Path]:
    """The configs of several methods on the data of one's own config, written into a folder.

    Args:
        own: a training config, of any method.
        methods: softmax, ride, tade.
        output: gets config_NAME_METHOD.json.

    Returns:
        Method -> file.

    Raises:
        UserError: the config is wrong, or a method is unknown.
    """
    base = make_config(read_json(own)).config
    contents = {method: json.dumps(method_config(base, method), indent=2) + "\n" for method in methods}
    files = {method: output / f"config_{own_name(own)}_{method}.json" for method in methods}
    make_folder(output)
    for method, content in contents.items():
        write_atomically(files[method], content.encode())
    return files


def own_name(own: Path) -> str:
    """What the data of one's own config are called in a comparison."""
    return own.stem.removeprefix("config_")


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


def quick_changes(config: ConfigParser) -> dict[str, str]:
    """Assignments of `quick` and their sections: three test distributions, one test-time pass."""
    names = config.complete()["data_loader"]["args"].get("distributions", ["uniform"])
    kept = list(dict.fromkeys([names[0], "uniform", names[-1]]))
    return {
        f"data_loader;args;distributions={json.dumps(kept)}": "data_loader",
        "aggregator;args;epochs=1": "aggregator",
    }
