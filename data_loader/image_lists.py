"""Images on disk, named by list files of "relative/path.jpg label" lines; and how one image becomes pixels."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from data_loader.image_folders import others_text, scan_folder
from utils.bad_images import BadImage, bad_images_sentence, none_decoded, reason_of
from utils.errors import UserError, nearest_path, unknown
from utils.logger import get_logger, progress

LONGEST_LABEL = 7  # digits: as many classes take 80 MB to count
PATH_MAX = 4096  # bytes of a path: Linux opens none that is longer


@dataclass(eq=False)
class ImageList:
    """The paths and labels of a list file.

    Paths are one array of bytes, not a Python object each: half a million of them take some 30 MB that worker processes
    share instead of copying.

    Args:
        list_path: the file the list came from, for messages.
        data_dir: folder the paths are relative to.
        paths: as the list has them, [N] bytes.
        targets: labels, [N] int64.
    """

    list_path: Path
    data_dir: Path
    paths: np.ndarray
    targets: np.ndarray

    @classmethod
    def read(cls, list_path: str | Path, data_dir: str | Path) -> "ImageList":
        """Read a list file; a path may contain blanks, the label follows the last one. Empty lines are skipped.

        Between path and label may be tabs or several blanks.

        Raises:
            UserError: the file is missing or empty, or a line (named) has no label, or one that is no whole number.
        """
        list_path = Path(list_path)
        try:
            data = list_path.read_bytes()
        except OSError as error:
            raise UserError(
                f"The image list {list_path} cannot be read ({error.strerror}): {nearest_path(list_path)}see "
                "data_txt/README.md for where lists come from."
            ) from error
        paths, labels = [], []
        for number, line in enumerate(data.splitlines(), 1):
            parts = line.rsplit(None, 1)
            if not parts:
                continue
            path, label = parts if len(parts) == 2 else (line, b"")
            if not label.isdigit() or len(label) > LONGEST_LABEL or len(path) > PATH_MAX or b"\0" in path:
                raise UserError(
                    f'{list_path}, line {number}: "{line[:500].decode(errors="replace")}" should be a path, a blank '
                    f"and a label (a whole number from 0, of {LONGEST_LABEL} digits at most): mend that line."
                )
            paths.append(path)
            labels.append(int(label))
        if not paths:
            raise UserError(f"The image list {list_path} is empty: it should hold a path and a label a line.")
        return cls(list_path, Path(data_dir), np.array(paths), np.array(labels, np.int64))

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> "ImageList":
        """Some files of a folder, unlabeled: every target is 0."""
        paths = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        return cls(folder, folder, paths, np.zeros(len(paths), np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """The path of an image as the list has it; bytes that are no UTF-8 come as the system has them in names."""
        return os.fsdecode(self.paths[index])

    def path(self, index: int) -> Path:
        return self.data_dir / self.name(index)

    def names(self) -> list[str]:
        """All paths; for comparing lists, not for keeping."""
        return [os.fsdecode(path) for path in self.paths.tolist()]

    def check_labels(self, num_classes: int) -> None:
        """Raises UserError when a label is not below `num_classes`."""
        if self.targets.max() >= num_classes:
            worst = int(self.targets.argmax())
            raise UserError(
                f"{self.list_path}: {self.name(worst)} has the label {self.targets[worst]}, and the training "
                f"list has {num_classes} classes (0 to {num_classes - 1}): mend the list."
            )

    def select(self, indices: np.ndarray) -> "ImageList":
        """Some images of the list, [M] indices."""
        return replace(self, paths=self.paths[indices], targets=self.targets[indices])

    def with_targets(self, targets: np.ndarray) -> "ImageList":
        return replace(self, targets=targets)

    def bad_image(self, index: int, error: Exception) -> BadImage:
        """The record of an image that could not be decoded."""
        return BadImage(index, self.name(index), reason_of(self.path(index), error), str(self.list_path))


def list_folder(folder: str | Path) -> ImageList:
    """All image files under a folder, in order of their paths, unlabeled (every target is 0).

    Raises:
        UserError: the folder is missing, or holds no image file.
    """
    folder = Path(folder)
    images, endings = scan_folder(folder)
    others = others_text(endings)
    if not images:
        found = f"it holds {others}" if others else "it is empty" if folder.is_dir() else "there is no such folder"
        raise UserError(f"There is no image file under {folder} ({found}): give a folder that holds some.")
    if others:
        _say_once(f"{folder}: files that are no images by their endings are left out: {others}.")
    return ImageList.of(folder, images)


@functools.cache
def _say_once(message: str) -> None:
    get_logger().info(message)


def list_class_folders(folder: str | Path, class_names: Sequence[str]) -> ImageList:
    """All image files under a folder that holds a folder for each class, labeled by their names.

    Args:
        folder: not every class needs a folder in it.
        class_names: in the order of the labels, [C].

    Raises:
        UserError: there is no image, or one that is in no folder with the name of a class.
    """
    images = list_folder(folder)
    labels = {name: label for label, name in enumerate(class_names)}
    folders = [name.partition("/")[0] for name in images.names()]
    for name in folders:
        if name not in labels:
            raise unknown(f"class folder in {folder}", name, labels)
    return images.with_targets(np.array([labels[name] for name in folders]))


def decode(path: Path) -> Image.Image:
    """An image file as RGB, whatever it is: gray, palette, CMYK, 16-bit, turned by an EXIF tag.

    Raises:
        OSError: the file is missing, truncated, or no image.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16 bits: Pillow's own conversion would clip them
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")


def thumbnail(path: Path, size: int) -> Image.Image | None:
    """A small picture of an image file, its longest side `size` pixels at most; None where it cannot be decoded."""
    try:
        image = decode(path)
    except Exception:  # see ListDataset
        return None
    image.thumbnail((size, size))
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [H, W, 3] uint8, as Pillow has it in memory; `collate` puts the channels first."""
    return torch.from_numpy(np.array(image))


class ListDataset(Dataset):
    """Decoded and transformed images of a list; every item has its own seed.

    An item is asked for by (index, seed), so that what it shows depends neither on the worker nor on what came before:
    runs repeat with any number of workers, and a resumed run goes on exactly as the uninterrupted one would have.

    Args:
        images: the list.
        transforms: each is applied to the decoded image; one for training and testing, two for two views.
    """

    def __init__(self, images: ImageList, transforms: Sequence[Callable[[Image.Image], Image.Image]]):
        self.images = images
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[list[Tensor], int, BadImage | None]:
        """One image for each transform, [S, S, 3] uint8; the label; what is wrong with the file, if anything.

        A file that is missing or cannot be decoded gives a black image: an error that is raised here, in a worker
        process, would arrive under that process's traceback.

        Args:
            item: (index, seed of the transforms).
        """
        index, seed = item
        bad = None
        try:
            image = decode(self.images.path(index))
        except Exception as error:  # damaged files make Pillow's decoders raise anything
            bad = self.images.bad_image(index, error)
            image = Image.new("RGB", (8, 8))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would take long to seed every device
            results = [to_tensor(transform(image)) for transform in self.transforms]
        return results, int(self.images.targets[index]), bad


def collate(items: Sequence[tuple]) -> tuple[list[Tensor], Tensor, list[BadImage | None]]:
    """A batch of items of ListDataset.

    Returns:
        [B, 3, S, S] uint8, channels last in memory, for each transform; labels [B]; what is wrong with each image.
    """
    images, labels, bad = zip(*items, strict=True)
    views = [torch.stack(view).permute(0, 3, 1, 2) for view in zip(*images, strict=True)]
    return views, torch.tensor(labels), list(bad)


def read_small(images: ImageList, size: int) -> tuple[Tensor, list[str], list[BadImage]]:
    """Decode images into memory, scaled to `size` on the shorter side and cropped to the middle.

    Those that cannot be decoded are skipped, with a warning that names them.

    Returns:
        [N, 3, size, size] uint8, the names of these images, and records of the others.

    Raises:
        UserError: none can be decoded.
    """
    decoded, names, bad = [], [], []
    for index in progress(range(len(images)), "reading images", unit="image"):
        try:
            image = ImageOps.fit(decode(images.path(index)), (size, size), Image.Resampling.BILINEAR)
        except Exception as error:  # see ListDataset
            bad.append(images.bad_image(index, error))
            continue
        decoded.append(to_tensor(image).permute(2, 0, 1))
        names.append(images.name(index))
    if not names:
        raise none_decoded(bad)
    if bad:
        get_logger().warning(bad_images_sentence(bad, len(images)))
    return torch.stack(decoded), names, bad
