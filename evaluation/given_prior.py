"""A test prior that is known: what `--prior` takes, a run that uses it, and the bound that takes it from the labels."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from base.base_data_loader import BaseDataLoader
from evaluation.adaptation import adapted_results
from evaluation.aggregators import aggregator_section
from evaluation.evaluation import chosen_distributions
from evaluation.loaded_run import LoadedRun
from evaluation.results import Results
from tade import Calibration, GivenPriorAggregator
from trainer.registry import read_config
from utils.errors import UserError, shown, unknown

PRIOR = "The prior"


def with_prior(run: LoadedRun, prior: str | Path | Mapping[str, float]) -> LoadedRun:
    """A copy of a run whose config's aggregator takes the test prior as given.

    What the config says of a calibration stays.

    Args:
        run: from `load_run`.
        prior: see `read_prior`.

    Raises:
        UserError: see `read_prior`.
    """
    arguments = aggregator_section(run.config).get("args", {})
    kept = {key: value for key, value in arguments.items() if key == "calibration"}
    section = {"type": "GivenPriorAggregator", "args": {**kept, "prior": read_prior(prior, run.loader)}}
    return replace(run, config=read_config({**run.config.config, "aggregator": section}))


def adapt_oracle(run: LoadedRun, names: Sequence[str] | None = None, calibration: Calibration | None = None) -> Results:
    """Evaluate each test distribution with its own true label shares as the prior, which takes its labels.

    What an estimate of the test prior can reach at best, with the same network, views and calibration. No method, and
    never a default.

    Args:
        run: from `load_run`.
        names: of the distributions; all of the data loader's by default.
        calibration: e.g. `run.calibration`; none by default.

    Raises:
        UserError: the data have no test distribution of that name.
    """
    distributions, oracles = chosen_distributions(run, names), {}
    for name, indices in distributions.items():
        counts = torch.bincount(run.targets[torch.as_tensor(indices)], minlength=len(run.cls_num_list))
        oracles[name] = GivenPriorAggregator(run.expert_log_priors, run.log_prior, calibration, prior=counts)
    protocol = "a bound, uses the labels: each distribution's true label shares are its prior"
    results = adapted_results(run, distributions, oracles, f"Oracle (GivenPriorAggregator): {protocol}")
    results.remark = "oracle: a bound, uses the labels"
    return results


def read_prior(prior: str | Path | Mapping[str, float], loader: BaseDataLoader) -> list[float]:
    """Images or shares of each class, as given, in the order of the loader's labels: [C].

    Args:
        prior: "uniform"; "training", the class counts of training; "cat=30,dog=70"; a JSON file {"cat": 30, "dog": 70};
            a text or CSV file with a class and a number a line, with or without a heading; or a dict of the kind.
            Classes are called by the loader's `class_names`, or by their number in the data set's own files.
        loader: says which classes there are.

    Raises:
        UserError: there is no such file, a class is unknown, missing or there twice, or a number is none, negative, or
            all are 0.
    """
    if prior == "uniform":
        return [1.0] * loader.num_classes
    if prior == "training":
        return [float(count) for count in loader.cls_num_list]
    source, pairs = (PRIOR, prior.items()) if isinstance(prior, Mapping) else _pairs(prior)
    numbers = loader.class_map or range(loader.num_classes)
    labels = {str(number): label for label, number in enumerate(numbers)}
    labels |= {name: label for label, name in enumerate(loader.class_names)}
    shares: dict[int, float] = {}
    for name, value in pairs:
        if name not in labels:
            raise unknown(f"class in {source.lower() if source == PRIOR else source}", name, loader.class_names)
        if labels[name] in shares:
            raise UserError(f'{source} has class "{name}" twice: give each class one number.')
        share = _number(value)
        if share is None or not math.isfinite(share) or share < 0:
            raise UserError(f'{source} has "{value}" for class "{name}": give a number of at least 0.')
        shares[labels[name]] = share
    missing = [name for label, name in enumerate(loader.class_names) if label not in shares]
    if missing:
        raise UserError(
            f"{source} has no number for {len(missing)} of {loader.num_classes} classes ({shown(missing)}): give every "
            "class one, 0 where no image is expected."
        )
    if not any(shares.values()):
        raise UserError(f"{source} is 0 for every class: give one class at least a positive number.")
    return [shares[label] for label in range(loader.num_classes)]


def _pairs(text: str | Path) -> tuple[str, Iterable[tuple[str, object]]]:
    """What is read, for messages, and its classes and values."""
    path, source = Path(text), str(text)
    if "=" in source and not path.is_file():
        rows, source = [part.rsplit("=", 1) for part in source.split(",")], PRIOR
    else:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(
                f'The prior "{text}" is no file that can be read ({reason}): give a '
                "JSON, CSV or text file of classes and their counts or shares, CLASS=NUMBER,..., uniform or training."
            ) from error
        if path.suffix.lower() == ".json":
            return source, _json_object(content, path).items()
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        rows = list(csv.reader(lines)) if "," in content else [line.rsplit(None, 1) for line in lines]
        if rows and _number(rows[0][-1]) is None:  # a heading
            rows = rows[1:]
    for row in rows:
        if len(row) != 2:
            raise UserError(f'{source}: "{" ".join(row)}" should be a class and a number: mend that.')
    return source, [(name.strip(), value.strip()) for name, value in rows]


def _json_object(content: str, path: Path) -> dict:
    try:
        read = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    if not isinstance(read, dict):
        raise UserError(f'{path} must hold one JSON object, {{"CLASS": NUMBER, ...}}.')
    return read


def _number(value: object) -> float | None:
    try:
        return float(value) if not isinstance(value, bool) else None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
