"""The runs of a comparison: which methods, data sets and seeds, and what each run consists of."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.command_line import Options
from comparison.tables import display_name
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS
from evaluation.loaded_run import SECTIONS as TESTING_SECTIONS
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
#: published (where there are such), test prior estimated (on the last checkpoint alone: it takes more passes).
EQUAL, LEARNED, PRIOR = "test_all", "test_train", "test_prior"
#: What makes a method of a config: what replaces arguments of `arch`, and the loss.
PARTS = ("num_experts", "reduce_dimension", "use_norm", "share_layer3")


@dataclass(frozen=True, eq=False)
class Run:
    """One training and its tests.

    Args:
        data, method: as in configs/config_DATA_METHOD.json.
        seed: of everything random.
        folder: the run's folder.
        training: its config.
        testing: of each job, what is changed in the checkpoint's config.
        device: as -d.
        commands: what one would type to do this run by hand.
    """

    data: str
    method: str
    seed: int
    folder: Path
    training: Mapping
    testing: Mapping[str, Mapping]
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
        files = [self.folder / f"{name}.pth" for name in CHECKPOINTS]
        return [
            (job, Options(config, file, self.device, output=results_dir(file, job)))
            for file in files
            if file.exists()
            for job, config in self.testing.items()
            if job != PRIOR or file.stem == "last"
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
    configs: Mapping[str, Path] | None = None,
) -> list[Run]:
    """One run for each data set, method and seed; their configs are checked, for training and for testing.

    Args:
        data, methods: as in configs/config_DATA_METHOD.json.
        seeds: one run each.
        output: folder of all runs.
        epochs: shorten the schedule to so many epochs.
        assignments: "KEY;PATH=VALUE", for every config; those of data_loader count in testing as well, those of
            averaged_views and aggregator only there (the latter where weights are learned).
        device: as -d.
        quick: the first, the balanced and the last test distribution alone, one test-time pass, no averaged views.
        configs: the configs of the methods on one's own data, see `write_own_configs`.

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
            path = configs[method] if configs else config_path(name, method)
            base = make_config(read_json(path))
            changes = (scaled_schedule(base, epochs) if epochs else []) + (quick_changes(base) if quick else [])
            chosen = [*changes, *assignments]
            runs += [plan_run(name, method, path, seed, output, chosen, device, quick) for seed in seeds]
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


def plan_run(
    data: str,
    method: str,
    path: Path,
    seed: int,
    output: Path,
    assignments: Sequence[str],
    device: str | None,
    quick: bool = False,
) -> Run:
    """One run of `plan_runs`, of the config at `path`."""
    base = read_json(path)
    folder = output / base["name"] / f"seed{seed}"
    sections = {text: parse_assignment(text)[0].split(";")[0] for text in assignments}
    for_training = [text for text, section in sections.items() if section not in ("aggregator", "averaged_views")]
    for_testing = [text for text, section in sections.items() if section in ("data_loader", "averaged_views")]
    for_learning = [text for text, section in sections.items() if text in for_testing or section == "aggregator"]

    def values(texts: Sequence[str]) -> dict:
        return dict(parse_assignment(text) for text in texts)

    def typed(script: str, *arguments: str, texts: Sequence[str]) -> str:
        on_device = ["-d", device] if device else []
        return shlex.join(["python", script, *arguments, *on_device, *(w for t in texts for w in ("--set", t))])

    training = merge(base, {"seed": seed, "trainer;save_dir": str(output), **values(for_training)})
    config = training_config(training)
    config.build("trainer")
    own = config["data_loader"]["type"] == "ListDataLoader"
    suffix = "imagenet" if own else SCRIPTS.get(data.split("_")[0], "cifar")
    last = folder / "last.pth"
    commands = [
        typed(
            "train.py",
            *("-c", str(path), "--seed", str(seed), "--save_dir", str(output), "--run_id", folder.name),
            texts=for_training,
        ),
        typed(f"test_all_{suffix}.py", "-r", str(last), texts=for_testing),
    ]
    testing: dict[str, Mapping] = {EQUAL: values(for_testing)}
    adapting = [(PRIOR, adapting_config(data, method, "prior"), for_testing + ["averaged_views=0"] * quick)]
    if config["loss"]["type"] == "DiverseExpertLoss":
        adapting.insert(0, (LEARNED, adapting_config(data, method, "tade"), for_learning))
    for job, file, texts in adapting:
        testing[job] = {**read_json(file), "seed": seed, **values(texts)}
        make_config(merge({k: v for k, v in config.config.items() if k in TESTING_SECTIONS}, testing[job]))
        arguments = ["-c", str(file), "--seed", str(seed), "-r", str(last)]
        if job == PRIOR:
            arguments += ["-o", str(results_dir(last, PRIOR))]
        commands.append(typed(f"test_train_{suffix}.py", *arguments, texts=texts))
    return Run(data, method, seed, folder, training, testing, device, commands)


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
    base, files = make_config(read_json(own)).config, {}
    make_folder(output)
    for method in methods:
        files[method] = output / f"config_{own_name(own)}_{method}.json"
        content = json.dumps(method_config(base, method), indent=2) + "\n"
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
    for name in parameters_of(COMPONENTS["arch"][own["arch"]["type"]]).keys() & parts.keys() & set(PARTS):
        arguments[name] = parts[name]
    if parts["num_experts"] > 1:
        arguments["num_experts"] = max(parts["num_experts"], own["arch"].get("args", {}).get("num_experts", 1))
    if "weights" in own and arguments.get("reduce_dimension"):
        arguments["reduce_dimension"] = False
    made_for = {**own, "loss": recipe["loss"], "trainer": {"epochs": recipe["trainer"]["epochs"]}}
    moved = moved_schedule(made_for, own["trainer"]["epochs"])
    loss = merge({"loss": recipe["loss"]}, {path: v for path, v in moved.items() if path.startswith("loss;")})["loss"]
    return {**config, "arch": {**own["arch"], "args": arguments}, "loss": loss}


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
