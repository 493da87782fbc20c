"""Images on disk, named by list files of "relative/path.jpg label" lines; and how one image becomes pixels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class ImageList:
    """The paths and labels of a list file.

    Paths are one byte string with offsets, not a Python object each: half a million of them take some 30 MB that worker
    processes share instead of copying.

    Args:
        list_path: the file the list came from, for messages.
        data_dir: folder the paths are relative to.
        text: all paths, one after the other.
        offsets: where each path ends in `text`, with a leading 0, [N + 1].
        targets: labels, [N] int64.
    """

    def __init__(self, list_path: Path, data_dir: Path, text: bytes, offsets: np.ndarray, targets: np.ndarray):
        self.list_path, self.data_dir = list_path, data_dir
        self.text, self.offsets, self.targets = text, offsets, targets

    @classmethod
    def read(cls, list_path: str | Path, data_dir: str | Path) -> "ImageList":
        """Read a list file; a path may contain spaces, the label follows the last one.

        Raises:
            UserError: the file is missing or empty, or a line (named) has no label, or one that is no whole number.
        """
        list_path = Path(list_path)
        try:
            data = list_path.read_bytes()
        except OSError as error:
            raise UserError(
                f"The image list {list_path} cannot be read ({error.strerror}): see data_txt/README.md for "
                "where lists come from."
            ) from error
        return cls(list_path, Path(data_dir), *(_parse_regular(data) or _parse_any(data, list_path)))

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, row: int) -> str:
        """The path of an image as the list has it."""
        return self.text[self.offsets[row] : self.offsets[row + 1]].decode()

    def path(self, row: int) -> Path:
        return self.data_dir / self.name(row)

    def names(self) -> list[str]:
        """All paths; for comparing lists, not for keeping."""
        return [self.name(row) for row in range(len(self))]

    def check_labels(self, num_classes: int) -> None:
        """Raises UserError when a label is not below `num_classes`."""
        if self.targets.max() >= num_classes:
            row = int(self.targets.argmax())
            raise UserError(
                f"{self.list_path}: {self.name(row)} has the label {self.targets[row]}, and the training "
                f"list has {num_classes} classes (0 to {num_classes - 1}): mend the list."
            )

    def first(self, count: int) -> "ImageList":
        """The first images of the list."""
        return ImageList(self.list_path, self.data_dir, self.text, self.offsets[: count + 1], self.targets[:count])

    def with_targets(self, targets: np.ndarray) -> "ImageList":
        return ImageList(self.list_path, self.data_dir, self.text, self.offsets, targets)


def list_folder(folder: str | Path) -> ImageList:
    """All image files under a folder, in order of their paths, unlabelled (every target is 0).

    Raises:
        UserError: the folder is missing, or holds no image file.
    """
    folder = Path(folder)
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise UserError(
            f"There is no image file under {folder} ({', '.join(sorted(IMAGE_SUFFIXES))}): give a folder "
            "that holds some."
        )
    encoded = [path.encode() for path in sorted(paths)]
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in encoded])])
    return ImageList(folder, folder, b"".join(encoded), offsets, np.zeros(len(paths), np.int64))


Parsed = tuple[bytes, np.ndarray, np.ndarray]  # paths, offsets, targets


def _parse_regular(data: bytes) -> Parsed | None:
    """Lines of exactly "path label" with one end of line each, ten times as fast; None if anything else is in there."""
    codes = np.frombuffer(data.rstrip().replace(b"\r\n", b"\n") + b"\n", np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    blanks = np.flatnonzero(codes == ord(" "))
    if not len(blanks) or blanks[0] > ends[0]:
        return None
    split = blanks[np.searchsorted(blanks, ends) - 1]  # the last blank of every line
    digits = ends - split - 1
    if (split <= starts).any() or digits.min() < 1 or digits.max() > 9:
        return None
    targets = np.zeros(len(ends), np.int64)
    for place in range(int(digits.max())):
        rows = np.flatnonzero(digits > place)
        values = codes[ends[rows] - 1 - place].astype(np.int64) - ord("0")
        if ((values < 0) | (values > 9)).any():
            return None
        targets[rows] += values * 10**place
    in_path = np.zeros(len(codes) + 1, np.int8)
    in_path[starts] += 1
    in_path[split] -= 1
    text = codes[np.cumsum(in_path[:-1], dtype=np.int8).astype(bool)].tobytes()
    return text, np.concatenate([[0], np.cumsum(split - starts)]), targets


def _parse_any(data: bytes, list_path: Path) -> Parsed:
    """Also tabs, several blanks, empty lines; names the first line that is wrong."""
    paths, labels = [], []
    for number, line in enumerate(data.splitlines(), 1):
        parts = line.rsplit(None, 1)
        if not parts:
            continue
        if len(parts) == 1 or not parts[1].isdigit() or len(parts[1]) > 9:
            raise UserError(
                f'{list_path}, line {number}: "{line.decode(errors="replace")}" should be a path, a blank '
                "and a label (a whole number from 0): mend that line."
            )
        paths.append(parts[0])
        labels.append(int(parts[1]))
    if not paths:
        raise UserError(f"The image list {list_path} is empty: it should hold a path and a label a line.")
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in paths])])
    return b"".join(paths), offsets, np.array(labels, np.int64)


def decode(path: Path) -> Image.Image:
    """An image file as RGB, whatever it is: grey, palette, CMYK, 16-bit, turned by an EXIF tag.

    Raises:
        OSError: the file is missing, truncated, or no image.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16 bits: Pillow's own conversion would clip them
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [H, W, 3] uint8, as Pillow has it in memory; `collate` puts the channels first."""
    return torch.from_numpy(np.array(image))


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Within, torch's draws on the CPU follow from the seed; outside they go on as if nothing had been.

    torch.manual_seed would seed every device as well, which takes a tenth of an image's time.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ListDataset(Dataset):
    """Decoded and transformed images of a list; every item is drawn with a seed of its own.

    An item is asked for by (row, seed), so that what it shows depends neither on the worker nor on what came before:
    runs repeat with any number of workers, and a resumed run draws what an unbroken one would have drawn.

    Args:
        images: the list.
        transforms: each makes one picture of the decoded image; one for training and testing, two for two views.
        skip_bad: leave out files that cannot be decoded, instead of stopping.
    """

    def __init__(self, images: ImageList, transforms: Sequence[Callable[[Image.Image], Image.Image]], skip_bad: bool):
        self.images, self.transforms, self.skip_bad = images, transforms, skip_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple:
        """((row, seed)) -> (pictures [S, S, 3] uint8, one a transform; label), or the path of a file left out.

        Raises:
            UserError: the file is missing or cannot be decoded.
        """
        row, seed = item
        path = self.images.path(row)
        try:
            image = decode(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.skip_bad:
                return str(path)
            raise bad_image(path, error) from error
        with own_draws(seed):
            pictures = [to_tensor(transform(image)) for transform in self.transforms]
        return *pictures, int(self.images.targets[row])


def bad_image(path: Path, error: Exception) -> UserError:
    what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error})"
    return UserError(
        f"The image {path} {what}: mend or replace it, take it off the list, or set "
        'data_loader;args;on_bad_image to "skip" for training.'
    )


def collate(items: list[tuple | str]) -> tuple:
    """A batch: ([B, 3, S, S] uint8, channels last in memory, for every transform; labels [B]; paths left out)."""
    bad = [item for item in items if isinstance(item, str)]
    good = [item for item in items if not isinstance(item, str)]
    columns = list(zip(*good, strict=True))
    pictures = [torch.stack(column).permute(0, 3, 1, 2) for column in columns[:-1]]
    return pictures, torch.tensor(columns[-1] if columns else []), bad
