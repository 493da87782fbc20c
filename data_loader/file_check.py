"""Whether listed images are where a config says, and can be decoded."""

from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from data_loader.image_folders import subfolders
from data_loader.image_lists import ImageList, decode
from data_loader.workers import usable_cores
from utils.bad_images import BadImage
from utils.errors import UserError, nearest_path
from utils.logger import progress

PROBED = 200  # images of a list that are looked up, spread evenly: the whole of a large list takes too long
TRIED = 100  # folders that are tried in place of a wrong one


def check_listed_files(images: ImageList, some: bool = False) -> None:
    """Look up some images of a list.

    Args:
        images: the list, with its folder.
        some: it is enough that some are there, for the others will be skipped.

    Raises:
        UserError: images are not there; says where they may be.
    """
    data_dir = images.data_dir
    if not len(images):
        return
    probed = np.unique(np.linspace(0, len(images) - 1, PROBED).astype(int)).tolist()
    missing = [index for index in probed if not _exists(images.path(index))]
    if not missing or (some and len(missing) < len(probed)):
        return
    name = images.name(missing[0])
    if len(missing) < len(probed):
        raise UserError(
            f"{len(missing)} of {len(probed)} images of {images.list_path} that were looked up are missing, such as "
            f"{images.path(missing[0])}: complete the data, or take them off the list (python -m "
            f'commands.make_data_txt check names them), or leave them out, --set "data_loader;args;on_bad_image=skip".'
        )
    if not data_dir.is_dir():
        advice = nearest_path(data_dir) or "give the folder that the paths of the lists are relative to. "
        raise UserError(f"There is no folder {data_dir} (data_loader;args;data_dir): {advice.strip()}")
    start = name.partition("/")[0]
    if better := _better_folder(data_dir, name):
        advice = f"did you mean the folder {better} (data_loader;args;data_dir={better})?"
    elif Path(name).is_absolute():
        advice = "its paths are absolute: make the list anew where the images are now."
    else:
        advice = f"its paths start with {start}/: give the folder that holds it (data_loader;args;data_dir)."
    raise UserError(f"No image of {images.list_path} is under data_dir {data_dir}, such as {name}: {advice}")


def _better_folder(data_dir: Path, name: str) -> Path | None:
    """A folder above or below another that holds an image of this name, relative to it."""
    below = [child for child in subfolders(data_dir)[:TRIED]]
    deeper = [grandchild for child in below[:10] for grandchild in subfolders(child)[:10]]
    above = list(data_dir.absolute().parents)[:4]
    relative = [Path(*data_dir.parts[:-count]) for count in range(1, 1 + min(len(above), len(data_dir.parts)))]
    for folder in [*below, *deeper, *relative, *above]:
        if _exists(folder / name):
            return folder
    return None


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def find_bad_images(images: ImageList, num_workers: int | None = None) -> list[BadImage]:
    """Decode every image of a list, several at a time, with a progress bar.

    Args:
        images: the list.
        num_workers: threads; None for one a usable core. (Decoders run beside each other: they hold no Python lock.)

    Returns:
        Those that cannot be decoded, in the order of the list.
    """

    def problem(index: int) -> BadImage | None:
        try:
            decode(images.path(index))
        except Exception as error:  # damaged files make Pillow's decoders raise anything
            return images.bad_image(index, error)
        return None

    with ThreadPool(num_workers or usable_cores()) as pool:
        found = pool.imap(problem, range(len(images)), chunksize=16)
        return [bad for bad in progress(found, "images decoded", total=len(images), unit="image") if bad]
