"""What the scripts do: each job from plain options to files, a table on the console and the content of the results."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from commands.command_line import Options
from data_loader.image_lists import list_folder, thumbnail
from deploy.export import DESCRIPTIONS, Exporter, check_packages, priors_record
from deploy.export import FORMATS as EXPORT_FORMATS
from deploy.model_card import figures_of, model_card
from deploy.prediction_files import FORMATS, check_format, paths_in
from deploy.watch import Inbox, watch
from evaluation.adaptation import adapt, new_aggregator
from evaluation.aggregators import aggregator_section, build_aggregator, wants_calibration
from evaluation.calibration import calibration_path, save_calibration
from evaluation.evaluation import evaluate, evaluate_test_set
from evaluation.given_prior import with_prior
from evaluation.loaded_run import LoadedRun, load_run
from evaluation.prediction import PredictionStream, predict
from evaluation.results import ClassCounts, Predictions, Results
from evaluation.results_folder import results_folder
from report.prediction_page import prediction_page
from report.save import save_results
from trainer.registry import AGGREGATORS, read_config
from trainer.training import train
from utils import distributed
from utils.bad_images import FILE_NAME, write_list
from utils.checkpoint import load_checkpoint
from utils.errors import UserError, shown
from utils.files import make_folder, write_atomically, write_together
from utils.logger import get_logger
from utils.signals import StopSignals

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
    """Predict the images of a folder: those that are there, or with `watch` those that appear.

    The data of training are not needed. Where neither the options nor the checkpoint name an aggregator, it is
    RECOMMENDED. For what is written see `save_predictions` and `watch_folder`.

    Returns:
        The content of weights.json.
    """
    run = open_run(options, RECOMMENDED, data=False)
    check_prediction(run, options)
    stream = PredictionStream(run, state=options.state) if options.state else None
    if options.watch:
        with results_folder(options.checkpoint, "predict", options.output) as folder:
            learned = AGGREGATORS[aggregator_section(run.config)["type"]].learned
            own_state = folder / "stream.state" if learned is not None else None
            return watch_folder(stream or PredictionStream(run, state=own_state), options, folder)
    images = list_folder(options.images)
    with results_folder(options.checkpoint, "predict", options.output) as folder:
        if stream:
            predictions = stream.predict(images, options.stream_batch if options.stream else None)
        else:
            predictions = predict(run, images, run.make_aggregator, options.stream, options.stream_batch)
        record = distributed.by_first_process(lambda: save_predictions(run, predictions, options, folder))
        if stream:
            stream.save()
        return record


def check_prediction(run: LoadedRun, options: Options) -> None:
    """Raise UserError for what predicting a folder will refuse, before a folder for its results is made."""
    check_format(options.format)
    if options.top_k < 1:
        raise UserError(f"--top_k must be at least 1, not {options.top_k}.")
    if not options.poll > 0:
        raise UserError(f"--poll must be more than 0 seconds, not {options.poll}.")
    if options.state and not options.state.parent.is_dir():
        raise UserError(f"There is no folder {options.state.parent} for --state: create it first.")
    if options.watch and distributed.world_size() > 1:
        raise UserError("--watch works in one process: start it without torchrun.")
    check_adaptation(run, replace(options, stream=options.stream or options.watch or options.state is not None))


def watch_folder(stream: PredictionStream, options: Options, folder: Path) -> dict:
    """Predict the images that appear in a folder, until a signal asks to stop.

    Writes predictions/000001.csv, ... in the folder of results, one a batch, and after each batch class_mix.csv and
    weights.json of all images so far, and the state. Images that have predictions there are not predicted again.

    Returns:
        The content of weights.json; of a run without an image an empty one.
    """
    tables = folder / "predictions"
    make_folder(tables)
    inbox = Inbox(options.images, paths_in(tables))
    number = max((int(path.stem) for path in tables.glob("*.*") if path.stem.isdigit()), default=0)
    stop = threading.Event()
    kept: dict = {}

    def keep(predictions: Predictions) -> None:
        nonlocal number
        number += 1
        table = predictions.table(options.top_k)
        write_atomically(tables / f"{number:06}.{options.format}", FORMATS[options.format](table))
        record = prediction_record(stream.run, predictions, options, stream.images)
        record |= {"batches": stream.batches, "last_batch": {"images": len(table), **certainty(predictions)}}
        write_together(folder, summary_files(predictions, record, options, stream.counts))
        kept.update(record)
        get_logger().info(f"{len(table)} images: {tables / f'{number:06}.{options.format}'}, {stream.images} so far.")

    get_logger().info(
        f"Watching {options.images}: {len(inbox.done)} images there have predictions already, and {stream.images} were "
        "learned from. Ctrl-C or SIGTERM ends it."
    )
    with StopSignals(lambda _: stop.set()):
        watch(stream, inbox, keep, options.stream_batch, options.poll, stop)
    get_logger().info(f"Stopped after {stream.images} images; everything is written: {folder}")
    return kept


def save_predictions(run: LoadedRun, predictions: Predictions, options: Options, folder: Path) -> dict:
    """Write predictions.csv, class_mix.csv (or the format chosen), report.html, weights.json and any bad_images.csv,
    and say what was predicted most.

    Returns:
        The content of weights.json.
    """
    table, name = predictions.table(options.top_k), f"predictions.{options.format}"
    record = prediction_record(run, predictions, options, len(table)) | certainty(predictions)
    counts = predictions.counts()
    write_list(folder / FILE_NAME, predictions.bad_images)

    def thumbnails(places: Sequence[int], size: int) -> list[Image.Image | None]:
        return [thumbnail(Path(options.images, predictions.names[place]), size) for place in places]

    written = {
        name: FORMATS[options.format](table),
        "report.html": prediction_page(predictions, run.cls_num_list, record, thumbnails),
        **summary_files(predictions, record, options, counts),
    }
    others = {f"{stem}.{ending}": None for stem in ("predictions", "class_mix") for ending in FORMATS}
    write_together(folder, {**others, **written})
    weights = ", ".join("nan" if w is None else f"{w:.2f}" for w in record["weights"] or [])
    mix = predictions.class_mix(counts).sort_values("expected_count", ascending=False, kind="stable").head(5)
    shown = mix[["class", "expected_count", "predicted_count"]].to_string(index=False, float_format="%.1f")
    get_logger().info(
        f"{len(table)} images"
        + (f", expert weights {weights}" if weights else "")
        + f", mean confidence {record['mean_confidence']:.2f}; {record['changed']} of them are predicted otherwise "
        f"than by equal weights. Most frequent classes:\n{shown}\n"
        f"Written: {', '.join(str(folder / file) for file in written)}"
    )
    return record


def prediction_record(run: LoadedRun, predictions: Predictions, options: Options, images: int) -> dict:
    """The content of weights.json: what predicted, and what was learned from how many images."""
    learning = dict(predictions.learning)
    record = {
        "weights": learning.pop("weights", None),
        "images": images,
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
    return record


def certainty(predictions: Predictions) -> dict[str, float | int]:
    """Mean probability of the predicted classes, and how many images the experts weighted equally call otherwise."""
    probability, label = predictions.log_probabilities.max(dim=1)
    changed = int((label != predictions.equal_weights[0]).sum())
    return {"mean_confidence": float(probability.exp().mean()), "changed": changed}


def summary_files(predictions: Predictions, record: dict, options: Options, counts: ClassCounts) -> dict[str, bytes]:
    """What stands beside a table of predictions: the class mix, and last the record, by name."""
    return {
        f"class_mix.{options.format}": FORMATS[options.format](predictions.class_mix(counts), 6),
        "weights.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
    }


def check_adaptation(run: LoadedRun, options: Options) -> None:
    """Raise UserError for what adaptation will refuse, before a folder for its results is made.

    No calibration is looked for yet: that may take a pass of the network.
    """
    new_aggregator(run, partial(build_aggregator, run.config), options.stream, options.stream_batch)


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


def run_export(options: Options) -> dict:
    """Write the network in the formats of the options, priors.json and a model card.

    Returns:
        The content of priors.json, with the largest difference of logits by format under "differences".
    """
    check_packages(options.formats)
    run = load_run(options.checkpoint, "cpu", options.config, data=False)
    exporter = Exporter(run)
    with results_folder(options.checkpoint, "export", options.output) as folder:
        get_logger().info(f"Exporting {', '.join(options.formats)}: a minute or so.")
        written, files, differences = {}, {}, {}
        for name in options.formats:
            file, write, _ = EXPORT_FORMATS[name]
            written[file] = write(exporter)
            differences[name] = exporter.check(name, written[file])
            files[file] = f"{DESCRIPTIONS[name]}, {len(written[file]) / 1e6:.1f} MB"
        priors = priors_record(run)
        files["priors.json"] = "class names and counts, log priors, calibration: what `tade` needs"
        config = load_checkpoint(options.checkpoint).get("config") or run.config.config
        card = model_card(priors, config, files, figures_of(options.checkpoint, run.checkpoint.sha256))
        content = json.dumps(priors, indent=1, allow_nan=False) + "\n"
        write_together(folder, {**written, "README.md": os.fsencode(card), "priors.json": content.encode()})
        checked = ", ".join(f"{name} {value:.1e}" for name, value in differences.items() if value is not None)
        get_logger().info(
            (f"Largest difference of logits to the checkpoint's: {checked}.\n" if checked else "")
            + f"Written: {', '.join(str(folder / name) for name in (*files, 'README.md'))}"
        )
    return {**priors, "differences": differences}


def open_run(options: Options, default: Mapping[str, object] | None = None, data: bool = True) -> LoadedRun:
    """The run of the options, with its data or without.

    Sections of `default` count where neither the options nor the checkpoint have an aggregator.
    """
    run = load_run(options.checkpoint, options.device, options.config, data)
    if default and "aggregator" not in run.config:
        run = replace(run, config=read_config({**default, **run.config.config}))
    return run if options.prior is None else with_prior(run, options.prior)
