"""What the scripts do: each job from plain options to files, a table on the console and the content of the results."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trainer.adaptation import adapt, new_aggregator
from trainer.build import aggregator_maker, aggregator_section, wants_calibration
from trainer.calibration import calibration_path, save_calibration, shown
from trainer.command_line import Options
from trainer.evaluation import evaluate, evaluate_test_set
from trainer.given_prior import with_prior
from trainer.loaded_run import LoadedRun, load_run
from trainer.prediction import predict
from trainer.registry import make_config
from trainer.results import Predictions, Results, save_results
from trainer.run_folder import results_folder
from trainer.training import train
from utils import distributed
from utils.bad_images import FILE_NAME, write_list
from utils.checkpoint import write_together
from utils.errors import UserError
from utils.logger import get_logger

#: What adapts where nobody has chosen: configs/test_time_*_prior.json say the same.
RECOMMENDED = {"averaged_views": 4, "aggregator": {"type": "PriorAggregator", "args": {}}}


def run_train(options: Options) -> dict:
    """Returns the last epoch's values and the paths of the checkpoints."""
    return train(
        options.config,
        resume=options.checkpoint,
        device=options.device,
        run_id=options.run_id,
        allow_changes=options.allow_changes,
    )


def run_test(options: Options) -> dict:
    """Returns the content of results.json, with the one distribution "uniform"."""
    run = open_run(options)
    with results_folder(options.checkpoint, "test", options.output) as folder:
        return save_evaluation(run, evaluate_test_set(run), folder, "test")


def run_test_all(options: Options) -> dict:
    """Returns the content of results.json."""
    run = open_run(options)
    with results_folder(options.checkpoint, "test_all", options.output) as folder:
        return save_evaluation(run, evaluate(run), folder, "test_all")


def run_test_train(options: Options) -> dict:
    """Returns the content of results.json."""
    run = open_run(options)
    check_adaptation(run, options)
    if options.calibrate_on_test:
        if not wants_calibration(run.config):
            raise UserError(
                f"--calibrate_on_test is for an aggregator that takes a calibration and has none in the config, "
                f"and not for this {aggregator_section(run.config)['type']}: leave it out, or name PriorAggregator."
            )
        run.labeled_draw(options.calibrate_on_test)  # refused before a folder is made
    with results_folder(options.checkpoint, "test_train", options.output) as folder:
        if options.calibrate_on_test:
            run = run.calibrated_on_test(options.calibrate_on_test)
        results = adapt(run, stream=options.stream, stream_batch=options.stream_batch)
        return save_evaluation(run, results, folder, "test_train")


def save_evaluation(run: LoadedRun, results: Results, folder: Path, job: str) -> dict:
    """`save_results`, with the test images that were left out in a file beside them; returns results.json's content."""
    distributed.by_first_process(lambda: write_list(folder / FILE_NAME, run.bad_images.values()))
    return save_results(results, folder, job)


def run_predict_folder(options: Options) -> dict:
    """Predict the images of a folder.

    Writes predictions.csv (path, class, probability) and weights.json (what was learned). Where neither the options nor
    the checkpoint name an aggregator, it is RECOMMENDED.

    Returns:
        The content of weights.json.
    """
    run = open_run(options, RECOMMENDED)
    check_adaptation(run, options)
    run.loader.with_test_images(options.images)
    with results_folder(options.checkpoint, "predict", options.output) as folder:
        predictions = predict(run, options.images, run.make_aggregator, options.stream, options.stream_batch)
        return distributed.by_first_process(lambda: save_predictions(run, predictions, options, folder))


def save_predictions(run: LoadedRun, predictions: Predictions, options: Options, folder: Path) -> dict:
    """Write predictions.csv, weights.json and any bad_images.csv, and say what was predicted most.

    Returns:
        The content of weights.json.
    """
    table, learning = predictions.table(), dict(predictions.learning)
    write_list(folder / FILE_NAME, predictions.bad_images)
    record = {
        "weights": learning.pop("weights", None),
        "images": len(table),
        **({"bad_images": len(predictions.bad_images)} if predictions.bad_images else {}),
        "folder": str(options.images),
        "checkpoint": run.checkpoint.to_json(),
        "aggregator": aggregator_section(run.config),
        "learning": learning,
    }
    if predictions.calibration:
        record["calibration"] = predictions.calibration
    if run.mild_views:
        record["averaged_views"] = run.averaged_views
    written = {
        "predictions.csv": os.fsencode(table.to_csv(index=False, float_format="%.4f")),
        "weights.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
    }
    write_together(folder, written)
    weights = ", ".join("nan" if w is None else f"{w:.2f}" for w in record["weights"] or [])
    get_logger().info(
        f"{len(table)} images" + (f", expert weights {weights}" if weights else "") + ". Most frequent classes:\n"
        f"{table['class'].value_counts().head(5).to_string(header=False)}\n"
        f"Written: {folder / 'predictions.csv'}, {folder / 'weights.json'}"
    )
    return record


def check_adaptation(run: LoadedRun, options: Options) -> None:
    """Raise UserError for what adaptation will refuse, before a folder for its results is made.

    No calibration is looked for yet: that may take a pass of the network.
    """
    new_aggregator(run, aggregator_maker(run.config), options.stream, options.stream_batch)


def run_calibrate(options: Options) -> dict:
    """Fit a calibration on labeled images and put it beside the checkpoint; views as RECOMMENDED unless told otherwise.

    Returns:
        The content of NAME.calibration.json.
    """
    run = open_run(options, RECOMMENDED)
    record = run.calibrate(options.images)
    path = calibration_path(options.checkpoint)
    distributed.by_first_process(lambda: save_calibration(record, path))
    lacking = record.classes_without_image
    get_logger().info(
        record.sentence()
        + (f"\n{len(lacking)} classes have no labeled image: {shown(lacking)}." if lacking else "")
        + f"\nWritten: {path}"
    )
    return record.to_json()


def open_run(options: Options, default: Mapping[str, object] | None = None) -> LoadedRun:
    """The run of the options; sections of `default` count where neither they nor the checkpoint have an aggregator."""
    run = load_run(options.checkpoint, options.device, options.config)
    if default and "aggregator" not in run.config:
        run = replace(run, config=make_config({**default, **run.config.config}))
    return run if options.prior is None else with_prior(run, options.prior)
