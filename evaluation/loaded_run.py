"""The one door from Python: a checkpoint with its network, its data and what its logits carry."""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import BaseDataLoader, ImageSource, TrainedOn
from base.base_model import BaseModel
from evaluation.aggregators import build_aggregator
from evaluation.calibration import CalibrationRecord, stored_calibration
from evaluation.results import CheckpointRecord
from model.inference import inference_copy
from model.logits import check_finite, expert_logits, selected
from model.loss import CrossEntropyLoss, DiverseExpertLoss
from tade import Aggregator, Calibration, class_prior, fit_calibration, prior_free_logits
from tade.priors import EPSILON
from trainer.build import build_loader, build_loss, build_network
from trainer.continuity import other_parts
from trainer.devices import choose_device, parallel
from trainer.registry import read_config
from utils import distributed
from utils.bad_images import BadImage, bad_images_sentence, none_decoded
from utils.checkpoint import load_checkpoint, load_weights, sha256
from utils.errors import UserError
from utils.logger import get_logger
from utils.parse_config import ConfigParser
from utils.reference_config import arguments_of
from utils.seed import CALIBRATION, epoch_generator, seed_everything


@dataclass
class LoadedRun:
    """A trained network, ready to be evaluated, adapted and asked for predictions.

    Args:
        network: as it was trained, in eval mode, on `device`; its parameters can be trained.
        loader: the data it was trained on, and the test images.
        device: where it runs.
        config: checked; of the checkpoint, with the overrides.
        checkpoint: which file it came from.
        expert_log_priors: the log prior that each expert's logits carry, by the loss it was trained with, [E, C].
        log_prior: log of the training class prior, [C].
        left_out: test images that are in no distribution, because their labels were used, indices [L].
        other_images: what takes the place of the loader's test images; None for these.
        gpus: numbers of those that share the work of `inference_network`; fewer than two means none.
    """

    network: BaseModel
    loader: BaseDataLoader
    device: torch.device
    config: ConfigParser
    checkpoint: CheckpointRecord
    expert_log_priors: Tensor
    log_prior: Tensor
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    other_images: ImageSource | None = None
    gpus: Sequence[int] = ()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.network.num_experts

    @cached_property
    def inference_network(self) -> nn.Module:
        """A frozen, faster copy of the network, for logits: images [B, 3, H, W] -> {"logits": [B, E, C], ...}."""
        return parallel(inference_copy(self.network, self.loader.image_size), self.device, self.gpus)

    @property
    def images(self) -> ImageSource:
        """The images that are evaluated or predicted."""
        return self.loader.test if self.other_images is None else self.other_images

    @property
    def cls_num_list(self) -> list[int]:
        """Training images per class, [C]."""
        return self.loader.cls_num_list

    @property
    def seed(self) -> int:
        return self.config.get("seed", 1)

    @property
    def averaged_views(self) -> int:
        """Random crops among the averaged views; 0 where images are used as they are."""
        return self.config.get("averaged_views", 0)

    @property
    def mild_views(self) -> list[int]:
        """The views whose logits are averaged, as the loader numbers them; empty where images are used as they are."""
        return self.loader.mild_view_numbers(self.averaged_views) if self.averaged_views else []

    @cached_property
    def test_logits(self) -> Tensor:
        """Expert logits of all test images in their order, [N, E, C], on the CPU. Several processes share the work.

        Of the un-augmented images, or with `averaged_views` in the config their mean over these views.

        Raises:
            UserError: some are not finite.
        """
        what = "test images"
        distributed.by_first_process(self.images.check_files)
        mild_views = (self.images.mild_view(number) for number in self.mild_views)
        views = mild_views if self.mild_views else [self.images.batches()]
        return check_finite(expert_logits(self.inference_network, views, self.device, what, shared=True), what)

    @cached_property
    def bad_images(self) -> dict[int, BadImage]:
        """Test images that cannot be decoded and are left out, by their index; where the config wants them skipped.

        The pass over the test images finds them. All processes call this, and get all of them.

        Raises:
            UserError: no image is left.
        """
        if self.images.bad is None:
            return {}
        total = len(self.test_logits)
        found: dict[int, BadImage] = {}
        for own in distributed.objects_of_all(self.images.bad):
            found |= own
        if len(found) == total:
            error = none_decoded([found[index] for index in sorted(found)])
            error.shared = True
            raise error
        if found and distributed.is_main():
            get_logger().warning(bad_images_sentence([found[index] for index in sorted(found)], total))
        return dict(sorted(found.items()))

    @property
    def excluded(self) -> np.ndarray:
        """Test images that are in no distribution: those of `left_out`, and bad ones; indices, sorted."""
        return np.union1d(self.left_out, np.array(list(self.bad_images), np.int64))

    def without_bad_images(self) -> "LoadedRun":
        """The same run without the test images that cannot be decoded; what was computed of the others is kept."""
        if not self.bad_images:
            return self
        good = np.setdiff1d(np.arange(len(self.test_logits)), list(self.bad_images))
        other = self.with_images(self.images.select(good))
        other.images.skipped = [*self.images.skipped, *self.bad_images.values()]
        other.test_logits = selected(self.test_logits, good)
        return other

    def with_images(self, images: ImageSource) -> "LoadedRun":
        """The same run with other images; they share the copy of the network."""
        other = replace(self, other_images=images)
        other.inference_network = self.inference_network
        return other

    @cached_property
    def targets(self) -> Tensor:
        """Labels of the test images, [N]."""
        return self.images.targets

    def make_aggregator(self, expert_log_priors: Tensor, log_prior: Tensor) -> Aggregator:
        """A new aggregator as the config names it; the published method where it names none.

        One that takes a calibration gets `calibration`, unless the config gives it three numbers or null.
        """
        return build_aggregator(self.config, expert_log_priors, log_prior, lambda: self.calibration)

    @property
    def calibration(self) -> Calibration | None:
        """Of this network: the one beside the checkpoint, else one fitted on the data's held-out validation images.

        None where there is neither. Whatever it takes is done when it is first asked for.
        """
        return self.calibration_record.calibration if self.calibration_record else None

    @cached_property
    def calibration_record(self) -> CalibrationRecord | None:
        """`calibration` with its source."""
        record = stored_calibration(self.checkpoint, self.averaged_views)
        reason = "there are no held-out labeled images"
        if record is None:
            run = self
            if not self.loader.has_data:
                try:
                    run = replace(self, loader=build_loader(self.config, self.device))
                    check_counts(run.loader, self.cls_num_list, self.checkpoint.path)
                except UserError:
                    run, reason = self, "the data of training are not here, nor a calibration beside the checkpoint"
            if run.loader.has_held_out_validation:
                try:
                    record = run.calibrate()
                except UserError as error:
                    get_logger().warning(f"{error} Going on without a calibration.")
        get_logger().info(record.sentence() if record else f"Not calibrated: {reason}.")
        return record

    def calibrate(self, images: Path | str | None = None) -> CalibrationRecord:
        """Fit a calibration on labeled images that were not trained on, with the run's averaged views.

        Args:
            images: a list file or a folder of class folders (ListDataLoader.read_labeled); None for the held-out
                validation images of the data.

        Raises:
            UserError: there are no such images, some were trained on, or nothing can be learned from them.
        """
        source = "held-out validation images" if images is None else f"the labeled images {images}"
        labeled = self.with_images(self.loader.read_labeled(images)).without_bad_images()
        return self._fit_calibration(labeled.test_logits, labeled.targets, source)

    def labeled_draw(self, per_class: int) -> np.ndarray:
        """Test images to calibrate on, drawn by the run's seed, their indices: `per_class` of each class that has any.

        Raises:
            UserError: no image of some class would be left to test with, or per_class is below 1.
        """
        usable = torch.ones(len(self.targets), dtype=torch.bool)
        usable[list(self.bad_images)] = False
        counts = torch.bincount(self.targets[usable])
        if per_class < 1:
            raise UserError(f"calibrate_on_test must be at least 1 image a class, not {per_class}.")
        emptied = ((counts > 0) & (counts <= per_class)).nonzero().flatten().tolist()
        if emptied:
            raise UserError(
                f"calibrate_on_test {per_class} leaves {len(emptied)} classes without a test image, such as "
                f'"{self.loader.class_names[emptied[0]]}", which has {int(counts[emptied[0]])}: use fewer.'
            )
        order = torch.randperm(len(self.targets), generator=epoch_generator(self.seed, 0, CALIBRATION))
        order = order[usable[order]]
        of_class = [order[self.targets[order] == label][:per_class] for label in counts.nonzero().flatten()]
        return torch.cat(of_class).sort().values.numpy()

    def calibrated_on_test(self, per_class: int) -> "LoadedRun":
        """A copy that is calibrated on labeled test images, which no distribution of the copy contains.

        Args:
            per_class: see `labeled_draw`.

        Raises:
            UserError: see `labeled_draw` and `calibrate`.
        """
        drawn = self.labeled_draw(per_class)
        images = "labeled test image" if per_class == 1 else "labeled test images"
        source = f"{per_class} {images} a class (seed {self.seed}), left out of every distribution"
        logits, targets = selected(self.test_logits, drawn), self.targets[torch.as_tensor(drawn)]
        other = copy.copy(self)
        other.left_out = drawn
        other.calibration_record = self._fit_calibration(logits, targets, source)
        get_logger().info(other.calibration_record.sentence())
        return other

    def _fit_calibration(self, logits: Tensor, targets: Tensor, source: str) -> CalibrationRecord:
        """Fit a calibration on labeled images that were not trained on: expert logits [N, E, C] and labels [N].

        The images may have any class mix: the log of their own class shares is added to the scores in the fit, so that
        it does not leak into the numbers. A class without an image has a share of 0 and does not compete: none of the
        images could have been of it. Its scores are calibrated by the curve that the other classes define.
        """
        source = f"{len(targets)} images: {source}"
        try:
            fitted = fit_calibration(prior_free_logits(logits, self.expert_log_priors), targets, self.log_prior)
        except ValueError as error:
            raise UserError(f"The network cannot be calibrated on {source}: {error}.") from error
        counts = torch.bincount(targets, minlength=len(self.cls_num_list)).tolist()
        missing = tuple(name for name, count in zip(self.loader.class_names, counts, strict=True) if not count)
        return CalibrationRecord(fitted, source, len(targets), missing, self.averaged_views, self.checkpoint.sha256)


def load_run(
    path: Path | str,
    device: str | None = None,
    overrides: Mapping[str, object] | None = None,
    data: bool = True,
) -> LoadedRun:
    """Open a checkpoint of this project or of the reference.

    Args:
        path: the .pth file.
        device: "cpu", "cuda", "cuda:1", GPU numbers such as "0,1"; None for CUDA if present.
        overrides: what to change in its config: sections ("data_loader": {...}) or single values by path
            ("data_loader;args;data_dir": "photos").
        data: False for predictions alone: class counts and names are the checkpoint's, and no list or image of the data
            is read. One that carries no class counts, and a loader of your own that takes no `trained_on`, want their
            data all the same.

    Raises:
        UserError: the file is missing or damaged, carries no config that is understood and none is given, does not fit
            its network, or was trained on other class counts than the data has.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    config = read_config(overrides or {}, checkpoint, path)
    seed_everything(config.get("seed", 1))
    chosen_device, gpus = choose_device(device, config.get("n_gpu", 1))
    loader = build_loader(config, chosen_device, None if data else trained_on(checkpoint, config, path))
    check_counts(loader, checkpoint.get("cls_num_list"), path)
    if loader.has_data and (parts := other_parts(checkpoint, loader.fingerprint(read_images=False))):
        get_logger().warning(
            f"{path} was trained on other images than the config names, as many of each class: their "
            f"{' and '.join(parts)} differ. Figures are right if the classes are numbered as before."
        )
    network = build_network(config, loader.num_classes, chosen_device, checkpoint["model"])
    load_weights(network, checkpoint["model"], path)
    return LoadedRun(
        network=network.eval(),
        loader=loader,
        device=chosen_device,
        config=config,
        checkpoint=CheckpointRecord(
            str(path),
            sha256(path),
            checkpoint.get("epoch"),
            checkpoint.get("selected_by") or "unknown",
            checkpoint.get("fingerprint"),
        ),
        expert_log_priors=carried_log_priors(config, checkpoint.get("epoch"), loader, network.num_experts),
        log_prior=torch.log(class_prior(loader.cls_num_list) + EPSILON),
        gpus=gpus,
    )


def check_counts(loader: BaseDataLoader, counts: Sequence[int] | None, path: Path | str) -> None:
    """Raise UserError where a checkpoint's class counts, if it has any, are not those of the data."""
    if counts and list(counts) != list(loader.cls_num_list):
        raise UserError(
            f"{path} was trained on {sum(counts)} images in {len(counts)} classes, and "
            f"the config's data has {sum(loader.cls_num_list)} in {loader.num_classes}: use the test "
            "config of the same data set, imbalance ratio and val_fraction."
        )


def trained_on(checkpoint: Mapping, config: ConfigParser, path: Path) -> TrainedOn | None:
    """What a checkpoint says of its data; None where it has no class counts.

    Class names are its own. Where it has none, or an override names another file of them, they are left to the loader.

    Raises:
        UserError: its entries do not fit each other.
    """
    counts, class_map, names = (checkpoint.get(key) for key in ("cls_num_list", "class_map", "class_names"))
    if not counts:
        return None
    if (class_map and sorted(class_map) != list(range(len(counts)))) or (names and len(names) != len(counts)):
        raise UserError(f"{path} has class names or a class map that do not fit its {len(counts)} classes.")
    now, then = (arguments_of(of, "data_loader").get("class_names") for of in (config, checkpoint.get("config") or {}))
    return TrainedOn(counts, class_map, names if now == then else None)


def carried_log_priors(config: ConfigParser, epoch: int | None, loader: BaseDataLoader, num_experts: int) -> Tensor:
    """The log prior that each expert's logits carry, up to a constant, by the loss it was trained with: [E, C].

    Class-balanced sampling makes the prior of what was seen in training uniform: log pi is missing from every expert.

    Args:
        config: where it names no loss, cross entropy is assumed for one expert, and the method's own loss for several.
        epoch: the last of training, for losses with a schedule; where it is not known, training has reached its end.
        loader: the data of training.
        num_experts: E.
    """
    counts = loader.cls_num_list
    if "loss" in config:
        loss = build_loss(config, counts)
    else:
        loss = CrossEntropyLoss(counts) if num_experts == 1 else DiverseExpertLoss(counts)
        get_logger().info(f"The config names no loss: logits are taken to carry what {type(loss).__name__} leaves.")
    loss.set_epoch(sys.maxsize if epoch is None else epoch)
    carried = loss.log_priors(num_experts)
    return carried - torch.log(class_prior(counts) + EPSILON) if loader.balanced else carried
