"""What the scripts do: each job from plain arguments to files, a table on the console and the content of the results.

Arguments that jobs share:
    checkpoint: .pth file to evaluate.
    config: what to change in the checkpoint's config: sections, or single values by path ("seed": 2).
    device: see trainer.devices.choose_device.
    output: folder for results, or None for one beside the checkpoint.
    stream, stream_batch: images arrive in batches of this size, each predicted right after learning from it.
    prior: a known test prior, see evaluation.given_prior.read_prior.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_loader.image_lists import list_folder
from deploy.export import FORMATS as EXPORTED
from deploy.export import check_packages, export_files
from deploy.prediction_files import PredictionWriter, check_format
from deploy.watch import watch as watch_folder
from evaluation.adaptation import STREAM_BATCH, adapt, new_aggregator
from evaluation.aggregators import aggregator_section, build_aggregator, wants_calibration
from evaluation.calibration import calibration_path, save_calibration
from evaluation.evaluation import evaluate, evaluate_test_set
from evaluation.given_prior import with_prior
from evaluation.loaded_run import LoadedRun, load_run
from evaluation.prediction import PredictionStream, predict
from evaluation.results import Results
from evaluation.results_folder import results_folder
from report.save import save_results
from trainer.registry import AGGREGATORS, read_config
from utils import distributed
from utils.bad_images import FILE_NAME, write_list
from utils.errors import UserError, shown
from utils.files import write_together
from utils.logger import get_logger

#: What adapts where nobody has chosen: configs/test_time_*_prior.json say the same.
RECOMMENDED = {"averaged_views": 4, "aggregator": {"type": "PriorAggregator", "args": {}}}

Config = Mapping[str, object]
NOTHING: Config = {}


def run_test(checkpoint: Path, config: Config = NOTHING, device: str | None = None, output: Path | None = None) -> dict:
    """Returns the content of results.json, with the one distribution "uniform"."""
    run = load_run(checkpoint, device, config)
    with results_folder(checkpoint, "test", output) as folder:
        return save_evaluation(run, evaluate_test_set(run), folder, "test")


def run_test_all(
    checkpoint: Path, config: Config = NOTHING, device: str | None = None, output: Path | None = None
) -> dict:
    """Returns the content of results.json."""
    run = load_run(checkpoint, device, config)
    with results_folder(checkpoint, "test_all", output) as folder:
        return save_evaluation(run, evaluate(run), folder, "test_all")


def run_test_train(
    checkpoint: Path,
    config: Config,
    device: str | None = None,
    output: Path | None = None,
    stream: bool = False,
    stream_batch: int = STREAM_BATCH,
    prior: str | None = None,
    calibrate_on_test: int = 0,
) -> dict:
    """Returns the content of results.json; `calibrate_on_test`: see LoadedRun.calibrated_on_test, 0 for none."""
    run = about_to_adapt(load_run(checkpoint, device, config), prior, stream, stream_batch)
    if calibrate_on_test:
        if not wants_calibration(run.config):
            raise UserError(
                f"--calibrate_on_test is for an aggregator that takes a calibration and has none in the config, "
                f"and not for this {aggregator_section(run.config)['type']}: leave it out, or name PriorAggregator."
            )
        run.labeled_draw(calibrate_on_test)  # refused before a folder is made
    with results_folder(checkpoint, "test_train", output) as folder:
        if calibrate_on_test:
            run = run.calibrated_on_test(calibrate_on_test)
        results = adapt(run, stream=stream, stream_batch=stream_batch)
        return save_evaluation(run, results, folder, "test_train")


def save_evaluation(run: LoadedRun, results: Results, folder: Path, job: str) -> dict:
    """`save_results`, with the test images that were skipped in a file beside them; returns results.json's content."""
    distributed.by_first_process(lambda: write_list(folder / FILE_NAME, run.bad_images.values()))
    return save_results(results, folder, job)


def run_predict_folder(
    checkpoint: Path,
    images: Path,
    config: Config = NOTHING,
    device: str | None = None,
    output: Path | None = None,
    stream: bool = False,
    stream_batch: int = STREAM_BATCH,
    prior: str | None = None,
    top_k: int = 5,
    file_format: str = "csv",
    watch: bool = False,
    poll: float = 2.0,
    state: Path | None = None,
) -> dict:
    """Predict the images of a folder: those that are there, or with `watch` those that appear.

    The data of training are not needed. Where neither the config nor the checkpoint names an aggregator, it is
    RECOMMENDED. For what is written see PredictionWriter.

    Args:
        checkpoint, config, device, output, stream, stream_batch, prior: see above.
        images: the folder.
        top_k: likeliest classes to write of every image.
        file_format: of the tables of predictions, see deploy.prediction_files.FORMATS.
        watch: go on with images that appear, until told to stop, looking every `poll` seconds.
        state: file that keeps what was learned of a stream from one run to the next.

    Returns:
        The content of weights.json.
    """
    run = recommended(load_run(checkpoint, device, config, data=False))
    check_format(file_format)
    if top_k < 1:
        raise UserError(f"--top_k must be at least 1, not {top_k}.")
    if not poll > 0:
        raise UserError(f"--poll must be more than 0 seconds, not {poll}.")
    if state and not state.parent.is_dir():
        raise UserError(f"There is no folder {state.parent} for --state: create it first.")
    if watch and distributed.world_size() > 1:
        raise UserError("--watch works in one process: start it without torchrun.")
    run = about_to_adapt(run, prior, stream or watch or state is not None, stream_batch)
    follower = PredictionStream(run, state=state) if state else None
    listed = None if watch else list_folder(images)
    with results_folder(checkpoint, "predict", output) as folder:
        writer = PredictionWriter(run, images, folder, file_format, top_k)
        if listed is None:
            keeps = AGGREGATORS[aggregator_section(run.config)["type"]].learned is not None
            follower = follower or PredictionStream(run, state=folder / "stream.state" if keeps else None)
            return watch_folder(writer, follower, stream_batch, poll)
        if follower:
            predictions = follower.predict(listed, stream_batch if stream else None)
        else:
            predictions = predict(run, listed, run.make_aggregator, stream, stream_batch)
        record = distributed.by_first_process(lambda: writer.save(predictions))
        if follower:
            follower.save()
        return record


def about_to_adapt(run: LoadedRun, prior: str | None, stream: bool, stream_batch: int) -> LoadedRun:
    """The run, with a known test prior if there is one.

    Raises:
        UserError: adaptation will refuse it. Said before a folder for results is made, and before a calibration is
            looked for, which may take a pass of the network.
    """
    run = run if prior is None else with_prior(run, prior)
    new_aggregator(run, partial(build_aggregator, run.config), stream, stream_batch)
    return run


def run_calibrate(
    checkpoint: Path, config: Config = NOTHING, device: str | None = None, labeled: Path | None = None
) -> dict:
    """Fit a calibration on labeled images and put it beside the checkpoint; views as RECOMMENDED unless told otherwise.

    Args:
        checkpoint, config, device: see above.
        labeled: see LoadedRun.calibrate.

    Returns:
        The content of NAME.calibration.json.
    """
    run = recommended(load_run(checkpoint, device, config))
    record = run.calibrate(labeled)
    path = calibration_path(checkpoint)
    distributed.by_first_process(lambda: save_calibration(record, path))
    lacking = record.classes_without_image
    get_logger().info(
        record.sentence()
        + (f"\n{len(lacking)} classes have no labeled image: {shown(lacking)}." if lacking else "")
        + f"\nWritten: {path}"
    )
    return record.to_json()


def run_export(
    checkpoint: Path, config: Config = NOTHING, output: Path | None = None, formats: Sequence[str] = tuple(EXPORTED)
) -> dict:
    """Write the network in some formats, priors.json and a model card; see deploy.export.

    Returns:
        The content of priors.json, with the largest difference of logits by format under "differences".
    """
    check_packages(formats)
    run = load_run(checkpoint, "cpu", config, data=False)
    with results_folder(checkpoint, "export", output) as folder:
        get_logger().info(f"Exporting {', '.join(formats)}: a minute or so.")
        files, priors, differences = export_files(run, formats)
        write_together(folder, files)
        checked = ", ".join(f"{name} {value:.1e}" for name, value in differences.items() if value is not None)
        get_logger().info(
            (f"Largest difference of logits to the checkpoint's: {checked}.\n" if checked else "")
            + f"Written: {', '.join(str(folder / name) for name in files)}"
        )
    return {**priors, "differences": differences}


def recommended(run: LoadedRun) -> LoadedRun:
    """The run with the sections of RECOMMENDED that its config lacks, where it names no aggregator."""
    if "aggregator" in run.config:
        return run
    return replace(run, config=read_config({**RECOMMENDED, **run.config.config}))
