"""A network in formats that need nothing of this project, with what `tade` needs to adapt its logits."""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploy.model_card import figures_of, model_card
from evaluation.loaded_run import LoadedRun
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

#: What an exported network's logits may differ by from the checkpoint's, for logits with a standard deviation of 1 or
#: less; rounding is a tenth of it.
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 7)


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
        self.run = run
        self.network = Deployed(run.inference_network, loader.mean, loader.std).eval()
        self.image_size = loader.image_size
        self._program: Any = None

    def images(self, count: int) -> Tensor:
        """Random images, the same every time, [count, 3, S, S] in 0..1."""
        generator = torch.Generator().manual_seed(count)
        return torch.rand(count, 3, self.image_size, self.image_size, generator=generator)

    @property
    def program(self) -> Any:
        """The traced network, for any number of images: a torch.export.ExportedProgram."""
        if self._program is None:
            from torch.export import Dim, export  # slow to import

            with quiet():
                shapes = {"images": {0: Dim("batch", min=1)}}
                self._program = export(self.network, (self.images(2),), dynamic_shapes=shapes)
        return self._program

    def onnx(self) -> bytes:
        """ONNX: input "images" [batch, 3, S, S] float32, output "logits" [batch, E, C]."""
        with quiet():
            exported = torch.onnx.export(
                self.program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
            )
        assert exported is not None
        proto = exported.model_proto
        graph = proto.graph
        symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == symbol:
                    dim.dim_param = "batch"
        content: bytes = proto.SerializeToString()
        return content

    def torch_program(self) -> bytes:
        """The same as torch.export.save writes it."""
        buffer = io.BytesIO()
        with quiet():
            torch.export.save(self.program, buffer)
        return buffer.getvalue()

    def safetensors(self) -> bytes:
        """The checkpoint's own weights, by the names of this project's network."""
        import safetensors.torch

        state = load_checkpoint(self.run.checkpoint.path)["model"]
        metadata = {"format": "pt", "arch": json.dumps(self.run.config["arch"])}
        content: bytes = safetensors.torch.save({name: t.clone().contiguous() for name, t in state.items()}, metadata)
        return content

    def differences(self, run_exported: Callable[[Tensor], Tensor]) -> float:
        """Largest difference of logits between an exported network and the checkpoint's, over random images."""
        largest = 0.0
        for count in CHECKED_BATCHES:
            images = self.images(count)
            with torch.no_grad():
                largest = max(largest, float((run_exported(images) - self.network(images)).abs().max()))
        return largest

    def check(self, name: str, content: bytes) -> float | None:
        """The largest difference of an exported network's logits, if it can be run here; None if not.

        Raises:
            UserError: it is larger than TOLERANCE.
        """
        difference = None
        if name == "onnx":
            with contextlib.suppress(ImportError):
                difference = self.differences(onnx_runner(content))
        elif name == "torch":
            with quiet():
                difference = self.differences(torch.export.load(io.BytesIO(content)).module())
        with torch.no_grad():
            spread = float(self.network(self.images(max(CHECKED_BATCHES))).std())
        if difference is not None and not difference <= TOLERANCE * max(1.0, spread):
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


#: Format -> (file, method of Exporter, packages of the extra "export" that it needs).
FORMATS: dict[str, tuple[str, Callable[[Exporter], bytes], tuple[str, ...]]] = {
    "onnx": ("network.onnx", Exporter.onnx, ("onnx", "onnxscript")),
    "torch": ("network.pt2", Exporter.torch_program, ()),
    "safetensors": ("model.safetensors", Exporter.safetensors, ("safetensors",)),
}

DESCRIPTIONS = {
    "onnx": "the network, for onnxruntime and others",
    "torch": "the same for `torch.export.load`",
    "safetensors": "the weights, for the network class of the training code",
}


def check_packages(formats: Sequence[str]) -> None:
    """See that formats can be written, before anything is computed.

    Raises:
        UserError: a package is missing.
    """
    for name in formats:
        for module in FORMATS[name][2]:
            try:
                __import__(module)
            except ImportError as error:
                raise UserError(
                    f'The format {name} needs {module}, which is not installed: pip install ".[export]" in the '
                    "checkout, or leave it out of --formats."
                ) from error


def export_files(run: LoadedRun, formats: Sequence[str]) -> tuple[dict[str, bytes], dict, dict[str, float | None]]:
    """The network in some formats, priors.json and a model card.

    Returns:
        File name -> content, in the order in which they are written; the content of priors.json; format -> largest
        difference of logits, None where it could not be measured here.
    """
    exporter, written, descriptions, differences = Exporter(run), {}, {}, {}
    for name in formats:
        file, write, _ = FORMATS[name]
        written[file] = write(exporter)
        differences[name] = exporter.check(name, written[file])
        descriptions[file] = f"{DESCRIPTIONS[name]}, {len(written[file]) / 1e6:.1f} MB"
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of torch's exporters on their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
