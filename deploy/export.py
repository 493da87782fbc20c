"""A network in formats that need nothing of this project, with what `tade` needs to adapt its logits."""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from deploy.model_card import figures_of, model_card
from evaluation.loaded_run import LoadedRun
from utils.checkpoint import load_checkpoint
from utils.errors import UserError, need

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: What an exported network's logits may differ by from the checkpoint's, for logits with a standard deviation of 1 or
#: less; rounding is a tenth of it.
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 7)


class Format(NamedTuple):
    """Its file, what it is, and the packages of the extra "export" that it needs."""

    file: str
    description: str
    packages: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format("network.onnx", "the network, for onnxruntime and others", ("onnx", "onnxscript")),
    "torch": Format("network.pt2", "the same for `torch.export.load`"),
    "safetensors": Format(
        "model.safetensors", "the weights, for the network class of the training code", ("safetensors",)
    ),
}


def check_packages(formats: Sequence[str]) -> None:
    """See that formats can be written, before anything is computed.

    Raises:
        UserError: a package is missing.
    """
    for name in formats:
        for package in FORMATS[name].packages:
            need(package, f"The format {name}", "export", "leave it out of --formats")


class Deployed(nn.Module):
    """A network that normalizes its images itself: what needs no explanation cannot be done wrong.

    Args:
        network: images [B, 3, S, S], normalized -> {"logits": [B, E, C], ...}.
        mean, std: of each channel, in 0..1.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """RGB in 0..1, [B, 3, S, S] float32 -> expert logits [B, E, C]."""
        logits: Tensor = self.network((images - self.mean) / self.std)["logits"]
        return logits


class Exporter:
    """Writes one network in several formats; what two formats share is computed once.

    Args:
        run: from `load_run`, on the CPU; one that was opened without its data will do.

    Raises:
        UserError: its loader says no mean and standard deviation of the images.
    """

    def __init__(self, run: LoadedRun):
        loader = run.loader
        if not hasattr(loader, "mean") or not hasattr(loader, "std"):
            raise UserError(
                f"{type(loader).__name__} does not say how it normalizes images: give it attributes mean and std, in "
                "0..1 for each channel."
            )
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else it remarks on its own insides
        self.run = run
        self.network = Deployed(run.inference_network, loader.mean, loader.std).eval()

    def images(self, count: int) -> Tensor:
        """Random images, the same every time, [count, 3, S, S] in 0..1."""
        size = self.run.loader.image_size
        return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))

    @cached_property
    def program(self) -> "ExportedProgram":
        """The traced network, for any number of images."""
        from torch.export import Dim, export

        return export(self.network, (self.images(2),), dynamic_shapes={"images": {0: Dim("batch", min=1)}})

    def write(self, name: str) -> bytes:
        """The content of a format's file.

        Args:
            name: "onnx" for input "images" [batch, 3, S, S] float32 and output "logits" [batch, E, C]; "torch" for the
                same as torch.export.save writes it; "safetensors" for the checkpoint's weights by their own names.
        """
        if name == "safetensors":
            from safetensors.torch import save

            state = load_checkpoint(self.run.checkpoint.path)["model"]
            metadata = {"format": "pt", "arch": json.dumps(self.run.config["arch"])}
            return bytes(save({key: tensor.clone().contiguous() for key, tensor in state.items()}, metadata))
        with warnings.catch_warnings(action="ignore"):
            if name == "onnx":
                exported = torch.onnx.export(
                    self.program,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_shapes={"images": {0: "batch"}},
                    dynamo=True,
                    verbose=False,
                )
                assert exported is not None
                return bytes(exported.model_proto.SerializeToString())
            buffer = io.BytesIO()
            torch.export.save(self.program, buffer)
            return buffer.getvalue()

    def check(self, name: str, content: bytes) -> float | None:
        """The largest difference of an exported network's logits over random images, if it can be run here.

        Raises:
            UserError: it is larger than TOLERANCE.
        """
        run_exported = None
        if name == "onnx":
            with contextlib.suppress(ImportError):
                run_exported = onnx_runner(content)
        elif name == "torch":
            run_exported = torch.export.load(io.BytesIO(content)).module()
        if run_exported is None:
            return None
        difference = 0.0
        with torch.no_grad():
            for count in CHECKED_BATCHES:
                logits = self.network(self.images(count))
                difference = max(difference, float((run_exported(self.images(count)) - logits).abs().max()))
        if not difference <= TOLERANCE * max(1.0, float(logits.std())):
            raise UserError(
                f"The logits of the exported network ({name}) differ by {difference:.1e} from the checkpoint's: "
                "nothing was written; leave this format out of --formats."
            )
        return difference


def onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX network in onnxruntime on the CPU: images -> logits.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def export_files(run: LoadedRun, formats: Sequence[str]) -> tuple[dict[str, bytes], dict, dict[str, float | None]]:
    """The network in some formats, priors.json and a model card.

    Returns:
        File name -> content, in the order in which they are written; the content of priors.json; format -> largest
        difference of logits, None if it cannot be run here.
    """
    exporter, written, descriptions, differences = Exporter(run), {}, {}, {}
    for name in formats:
        file, description, _ = FORMATS[name]
        written[file] = exporter.write(name)
        differences[name] = exporter.check(name, written[file])
        descriptions[file] = f"{description}, {len(written[file]) / 1e6:.1f} MB"
    priors = priors_record(run)
    descriptions["priors.json"] = "class names and counts, log priors, calibration: what `tade` needs"
    config = load_checkpoint(run.checkpoint.path).get("config") or run.config.config
    card = model_card(priors, config, descriptions, figures_of(Path(run.checkpoint.path), run.checkpoint.sha256))
    content = json.dumps(priors, indent=1, allow_nan=False) + "\n"
    return {**written, "README.md": os.fsencode(card), "priors.json": content.encode()}, priors, differences


def priors_record(run: LoadedRun) -> dict[str, Any]:
    """The content of priors.json: all that `tade` and who prepares the images must know.

    Numbers are float32 and come back from JSON as they were.
    """
    loader, record = run.loader, run.calibration_record
    return {
        "class_names": loader.class_names,
        "class_counts": list(run.cls_num_list),
        "expert_log_priors": run.expert_log_priors.tolist(),
        "log_prior": run.log_prior.tolist(),
        "calibration": record.calibration.numbers if record else None,
        "calibration_source": record.to_json() if record else None,
        "averaged_views": run.averaged_views,
        "image_size": loader.image_size,
        "input": "images: float32 [batch, 3, image_size, image_size], RGB in 0..1, not normalized",
        "output": "logits: float32 [batch, experts, classes]",
        "preparation": loader.preparation,
        "normalization_inside": {"mean": list(loader.mean), "std": list(loader.std)},
        "checkpoint": run.checkpoint.to_json(),
    }
