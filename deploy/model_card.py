"""The model card beside exported weights: what they are, what they were trained on, how to use them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.results import Results
from evaluation.results_folder import results_dir
from report.tables import markdown_table
from utils.errors import printable

JOBS = {
    "test_all": "Experts weighted equally",
    "test_train": "Adapted to each distribution",
    "test": "Balanced test set",
}


def model_card(priors: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, str], figures: str) -> str:
    """README.md in Markdown.

    Args:
        priors: content of priors.json.
        config: that the network was trained with; sections that are not there are left out.
        files: name of each file -> what it is.
        figures: Markdown, from `figures_of`.
    """
    counts = priors["class_counts"]
    checkpoint, size = priors["checkpoint"], priors["image_size"]
    experts = len(priors["expert_log_priors"])
    names = ", ".join(priors["class_names"][:10]) + (", ..." if len(counts) > 10 else "")
    table = "\n".join(f"| `{name}` | {what} |" for name, what in files.items())
    calibration = priors["calibration"]
    views = f", for logits averaged over {priors['averaged_views']} random crops" if priors["averaged_views"] else ""
    calibrated = f"`calibration` {[round(n, 3) for n in calibration]}{views}" if calibration else "not calibrated"
    training = "\n".join(f"- {name}: {value}" for name, value in recipe(config, checkpoint).items())
    text = f"""---
library_name: pytorch
pipeline_tag: image-classification
tags: [long-tailed-recognition, test-time-adaptation]
---
# {config.get("name", "A long-tailed classifier")}

An image classifier with {experts} expert{"s" if experts > 1 else ""} for {len(counts)} classes ({names}), trained on
{sum(counts)} images of which the largest class has {max(counts)} and the smallest {min(counts)}. It gives expert
logits; the library `tade` adapts them to the class mix of unlabeled images.

## Files

| file | |
|---|---|
{table}

## Input and output

- `images`: float32 [batch, 3, {size}, {size}], RGB in 0..1; the network normalizes them itself.
  {priors["preparation"]}
- `logits`: float32 [batch, {experts}, {len(counts)}].
{usage(files, size)}
The class mix is estimated from the images themselves ({calibrated}).
`GivenPriorAggregator(..., prior=shares)` takes one that is known.

## Training

{training}

Images of each class, in the order of the logits: {counts if len(counts) <= 200 else "`class_counts` in priors.json"}.

## Figures

{figures or "None were beside the checkpoint: test_all_*.py and test_train_*.py make them."}

## License

Not stated here: it is for whoever publishes these weights to choose, and the licenses of the training images may have
a say.
"""
    return printable(text, keep="\n")


#: File -> what imports are needed, and lines that make logits from images.
RUNNERS = {
    "network.onnx": (
        "import onnxruntime\n",
        'network = onnxruntime.InferenceSession("network.onnx")\n'
        'logits = torch.from_numpy(network.run(None, {"images": images.numpy()})[0])',
    ),
    "network.pt2": ("", 'logits = torch.export.load("network.pt2").module()(images)'),
}


def usage(files: Mapping[str, str], size: int) -> str:
    """How the exported network is run and adapted, where one was exported."""
    for name, (imports, lines) in RUNNERS.items():
        if name in files:
            return f"""
## Use

With torch, `tade` (`pip install .` in the checkout of the training code){" and onnxruntime" if imports else ""}:

```python
import json
{imports}import torch
from tade import PriorAggregator

priors = json.load(open("priors.json"))
images = torch.rand(8, 3, {size}, {size})  # yours
{lines}
aggregator = PriorAggregator(
    torch.tensor(priors["expert_log_priors"]), torch.tensor(priors["log_prior"]), priors["calibration"]
)
aggregator.fit(logits)  # all unlabeled images at once; `update` for a stream
predicted = aggregator.predict(logits).argmax(dim=1)
print([priors["class_names"][c] for c in predicted.tolist()])
```
"""
    return ""


def recipe(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """How the network was trained, a line each."""
    lines = {}
    for section in ("data_loader", "arch", "loss", "optimizer", "lr_scheduler"):
        content = config.get(section)
        if isinstance(content, Mapping) and "type" in content:
            arguments = content.get("args") or {}
            hidden = ("data_dir", "train_list", "val_list", "test_list", "class_names", "num_workers", "distributions")
            shown = {key: value for key, value in arguments.items() if key not in hidden}
            lines[section.replace("_", " ")] = f"`{content['type']}` `{json.dumps(shown)}`"
    trainer = config.get("trainer")
    if isinstance(trainer, Mapping) and "epochs" in trainer:
        lines["epochs"] = f"{checkpoint['epoch']} of {trainer['epochs']}"
    elif checkpoint["epoch"]:
        lines["epochs"] = str(checkpoint["epoch"])
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
