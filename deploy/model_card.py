"""The model card beside exported weights: what they are, what they were trained on, how to use them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.results import Results
from evaluation.results_folder import results_dir
from report.tables import markdown_table
from utils.errors import printable
from utils.reference_config import arguments_of

JOBS = {
    "test_all": "Experts weighted equally",
    "test_train": "Adapted to each distribution",
    "test": "Balanced test set",
}
#: Arguments of a data loader that say where its files are, not what it does.
HIDDEN = ("data_dir", "train_list", "val_list", "test_list", "class_names", "num_workers", "distributions")


def model_card(priors: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, str], figures: str) -> str:
    """README.md in Markdown.

    Args:
        priors: content of priors.json.
        config: that the network was trained with; sections that are not there are left out.
        files: name of each file -> what it is.
        figures: Markdown, from `figures_of`.
    """
    calibration, views = priors["calibration"], priors["averaged_views"]
    calibrated = f"`calibration` {[round(n, 3) for n in calibration]}" if calibration else "not calibrated"
    if calibration and views:
        calibrated += f", for logits averaged over {views} random crops"
    environment = Environment(  # of Markdown, which escapes nothing
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("model_card.md").render(
        name=config.get("name", "A long-tailed classifier"),
        experts=len(priors["expert_log_priors"]),
        counts=priors["class_counts"],
        classes=priors["class_names"],
        size=priors["image_size"],
        preparation=priors["preparation"],
        calibrated=calibrated,
        files=files,
        recipe=recipe(config, priors["checkpoint"]),
        figures=figures,
    )
    return printable(text, keep="\n") + "\n"


def recipe(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """How the network was trained, a line each."""
    lines = {}
    for section in ("data_loader", "arch", "loss", "optimizer", "lr_scheduler"):
        content, arguments = config.get(section), arguments_of(config, section)
        if isinstance(content, Mapping) and "type" in content:
            shown = {name: value for name, value in arguments.items() if name not in HIDDEN}
            lines[section.replace("_", " ")] = f"`{content['type']}` `{json.dumps(shown)}`"
    trainer, epoch = config.get("trainer"), checkpoint["epoch"]
    of_all = f" of {trainer['epochs']}" if isinstance(trainer, Mapping) and "epochs" in trainer else ""
    if epoch or of_all:
        lines["epochs"] = f"{epoch}{of_all}"
    lines["checkpoint"] = f"SHA-256 {checkpoint['sha256']} ({checkpoint['selected_by']})"
    return lines


def figures_of(checkpoint: Path, sha256: str) -> str:
    """The tables of results beside a checkpoint that are of this very file, in Markdown; empty where there are none."""
    parts = []
    for job, title in JOBS.items():
        try:
            results = Results.from_json(json.loads((results_dir(checkpoint, job) / "results.json").read_bytes()))
            if results.checkpoint.sha256 == sha256:
                parts.append(f"{title}, top-1 in percent:\n\n{markdown_table(results.table())}\n{results.protocol}")
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            continue
    return "\n\n".join(parts)
