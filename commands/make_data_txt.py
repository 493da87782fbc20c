"""List files: bring in the published ones, generate test distributions, check images, list a folder of class folders.

python -m commands.make_data_txt import FOLDER_OR_URL             published lists -> data_txt/, checked
python -m commands.make_data_txt generate TRAIN.txt TEST.txt OUT  OUT/uniform.txt, forward50.txt, ..., backward50.txt
python -m commands.make_data_txt check LIST.txt DATA_DIR          every image there and whole? class counts, shot groups
python -m commands.make_data_txt from-folder FOLDER OUT           FOLDER/CLASS/*.jpg -> OUT/train.txt, OUT/test.txt
"""

import argparse
import hashlib
import io
import json
import os
import shlex
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data_loader.class_folders import ClassFolders, SplitOptions, read_class_folders
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS, distribution_indices
from data_loader.file_check import check_listed_files, find_bad_images
from data_loader.image_lists import ImageList
from model.metric import shot_groups
from report.figures import counts_chart
from utils.bad_images import bad_images_sentence
from utils.bad_images import write_list as write_bad_images
from utils.errors import UserError
from utils.files import make_folder, write_atomically
from utils.logger import get_logger, progress

MANIFEST = Path(__file__).resolve().parents[1] / "data_txt" / "manifest.json"
SHOWN_CLASSES = 120  # rows of a table
INATURALIST_TRAIN, INATURALIST_ZIP = "iNaturalist18/iNaturalist18_train.txt", "iNaturalist18/iNaturalist_train.zip"


def import_lists(source: str, target: Path = MANIFEST.parent) -> dict[str, str]:
    """Copy or download the published lists that `source` has into `target`, each only if it is the published one.

    Args:
        source: a folder or URL laid out like the published data_txt.
        target: the project's data_txt.

    Returns:
        What became of each list of the manifest.

    Raises:
        UserError: the source has none of the lists, or one of them differs from the published one.
    """
    outcome, wrong = {}, []
    for name, figures in progress(json.loads(MANIFEST.read_text())["files"].items(), "lists", unit="list"):
        data = _fetch(source, name)
        if data is None and name == INATURALIST_TRAIN:
            data = _unzip(_fetch(source, INATURALIST_ZIP), Path(name).name)
        if data is None:
            outcome[name] = "not there"
            continue
        lines, digest = len(data.splitlines()), hashlib.sha256(data).hexdigest()
        if lines != figures["lines"]:
            wrong.append(f"{name} ({lines} lines instead of {figures['lines']})")
            continue
        if figures["sha256"] not in (None, digest):
            wrong.append(f"{name} (another checksum)")
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target / name, data)
        outcome[name] = "imported" + ("" if figures["sha256"] else " (by its line count; no checksum is known)")
    if wrong:
        raise UserError(
            f"{len(wrong)} list(s) are not the published ones and were left out: {', '.join(wrong)}; fetch them anew."
        )
    if set(outcome.values()) == {"not there"}:
        raise UserError(
            f"{source} has none of the published lists: give the folder or URL that holds ImageNet_LT/, "
            "Places_LT_v2/ and iNaturalist18/."
        )
    return outcome


def _fetch(source: str, name: str) -> bytes | None:
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{source.rstrip('/')}/{name}", timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError:
            return None
        except OSError as error:
            raise UserError(
                f"{source} cannot be reached ({error}): fetch the lists by other means and give their folder."
            ) from error
    path = Path(source) / name
    return path.read_bytes() if path.is_file() else None


def _unzip(data: bytes | None, name: str) -> bytes | None:
    """The one text file in a zip archive, preferably of the given name."""
    if data is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            lists = sorted((n for n in archive.namelist() if n.endswith(".txt")), key=lambda n: not n.endswith(name))
            return archive.read(lists[0]) if lists else None
    except zipfile.BadZipFile as error:
        raise UserError(f"{INATURALIST_ZIP} is no whole zip archive: fetch it anew.") from error


def generate(
    train_list: Path, test_list: Path, out: Path, distributions: Sequence[str] = CIFAR_DISTRIBUTIONS
) -> dict[str, int]:
    """Write one list for each test distribution, chosen from a test list (see `distribution_indices`).

    Returns:
        Lines of each list written.
    """
    train, test = (ImageList.read(path, "") for path in (train_list, test_list))
    counts = np.bincount(train.targets)
    test.check_labels(len(counts))
    out.mkdir(parents=True, exist_ok=True)
    chosen = distribution_indices(test.targets, counts.tolist(), distributions)
    for name, indices in chosen.items():
        write_list(out / f"{name}.txt", [(test.name(index), int(test.targets[index])) for index in indices])
    return {name: len(indices) for name, indices in chosen.items()}


def write_list(path: Path, entries: list[tuple[str, int]]) -> None:
    write_atomically(path, os.fsencode("".join(f"{name} {label}\n" for name, label in entries)))


def check(list_path: Path, data_dir: Path, output: Path | None = None, num_workers: int | None = None) -> dict:
    """Decode every listed image, and count the classes.

    Writes NAME_class_counts.csv and .svg beside the list NAME.txt, and NAME_bad_images.csv where there are such images.

    Args:
        list_path: the list; classes.txt beside it, if any, names the classes.
        data_dir: folder that its paths are relative to.
        output: folder for the files, in place of the list's.
        num_workers: threads that decode; None for one a core.

    Returns:
        {"images", "classes", "imbalance_ratio", "many", "medium", "few" (classes), "empty" (classes), "duplicates"}.

    Raises:
        UserError: images are missing or cannot be decoded; says how many.
    """
    images = ImageList.read(list_path, data_dir)
    check_listed_files(images, some=True)
    counts = np.bincount(images.targets)
    groups = {name: mask.numpy() & (counts > 0) for name, mask in shot_groups(counts).items()}
    called = class_names(list_path.parent / "classes.txt", len(counts))
    table = pd.DataFrame({"class": pd.Series(called, dtype=object), "images": counts})  # bytes that are no UTF-8, too
    table["group"] = np.select(list(groups.values()), list(groups), "empty")
    folder = output or list_path.parent
    make_folder(folder)
    write_atomically(folder / f"{list_path.stem}_class_counts.csv", os.fsencode(table.to_csv(index=False)))
    chart = counts_chart(table).file(f"Images of each class: {list_path}")
    write_atomically(folder / f"{list_path.stem}_class_counts.svg", chart)
    falling = table.sort_values("images", ascending=False, kind="stable")
    get_logger().info(falling.to_string(index=False, max_rows=SHOWN_CLASSES))
    bad = find_bad_images(images, num_workers)
    listed_in = write_bad_images(folder / f"{list_path.stem}_bad_images.csv", bad)
    if bad:
        get_logger().warning(bad_images_sentence(bad, len(images), "cannot be used", listed_in))
        raise UserError(
            f"{len(bad)} of {len(images)} images of {list_path} cannot be decoded, see {listed_in}: mend them, take "
            'them off the list, or set data_loader;args;on_bad_image to "skip".'
        )
    return {
        "images": len(images),
        "classes": len(counts),
        "imbalance_ratio": float(counts.max() / counts[counts > 0].min()),
        **{name: int(mask.sum()) for name, mask in groups.items()},
        "empty": int((counts == 0).sum()),
        "duplicates": len(images) - len(np.unique(images.paths)),
    }


def class_names(path: Path, count: int) -> list[str]:
    """The names in a file of one a line, or numbers where it is not there or has too few."""
    names = [os.fsdecode(name) for name in path.read_bytes().splitlines()] if path.is_file() else []
    return names[:count] if len(names) >= count else [str(label) for label in range(count)]


def from_folder(folder: Path, out: Path, **options) -> dict[str, int]:
    """List a folder of class folders (data_loader/class_folders.py), and say with which command to train on it.

    Args:
        folder: holds one folder a class, or train/ with such folders.
        out: gets train.txt, test.txt, val.txt (if there are validation images) and classes.txt.
        options: how to split, see SplitOptions.

    Returns:
        Numbers of classes and of images in each list.

    Raises:
        UserError: see `read_class_folders`.
    """
    found = read_class_folders(folder, SplitOptions(**options))
    make_folder(out)
    for split, entries in found.splits.items():
        write_list(out / f"{split}.txt", entries)
    if "val" not in found.splits:
        (out / "val.txt").unlink(missing_ok=True)  # of an earlier call
    write_atomically(out / "classes.txt", os.fsencode("".join(f"{name}\n" for name in found.classes)))
    for notice in found.notices:
        get_logger().info(notice)
    get_logger().info(f"Train with:\n{training_command(folder, out, found)}")
    return {"classes": len(found.classes), **{split: len(entries) for split, entries in found.splits.items()}}


def training_command(folder: Path, out: Path, found: ClassFolders) -> str:
    """The command line that trains on these lists."""
    lists = {f"{split}_list": out / f"{split}.txt" for split in found.splits}
    data = {"data_dir": folder, **lists, "class_names": out / "classes.txt"}
    values = [f"arch;args;num_classes={len(found.classes)}"]
    for name, path in data.items():
        try:
            json.loads(str(path))
            text = json.dumps(str(path))  # a folder called 2024, which would be taken for a number
        except ValueError:
            text = str(path)
        values.append(f"data_loader;args;{name}={text}")
    parts = [f"--set {_quoted(value)}" for value in values]
    return " ".join(["python train.py -c configs/config_custom_example.json --run_id first", *parts])


def _quoted(text: str) -> str:
    """A word of a command line; in double quotes, which every shell has, where these are enough."""
    return shlex.quote(text) if set(text) & set('"$`\\!%') else f'"{text}"'


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")

    def add_job(name: str, run: Callable[..., dict], text: str) -> argparse.ArgumentParser:
        """A job whose arguments are those of a function, which has the defaults."""
        job = jobs.add_parser(name, help=text, argument_default=argparse.SUPPRESS)
        job.set_defaults(run=run)
        return job

    job = add_job("import", import_lists, "bring in the published lists")
    job.add_argument("source", help="folder or URL laid out like the published data_txt")
    job.add_argument("--target", type=Path)
    job = add_job("generate", generate, "choose test distributions from a test list")
    job.add_argument("train_list", type=Path)
    job.add_argument("test_list", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--distributions", nargs="+", metavar="NAME")
    job = add_job("check", check, "can the listed images be decoded, and how are the classes distributed")
    job.add_argument("list_path", type=Path, metavar="list")
    job.add_argument("data_dir", type=Path)
    job.add_argument("--output", type=Path, help="folder for table, plot and bad images (default: the list's)")
    job.add_argument("--num_workers", type=int, help="threads that decode (default: one a core)")
    job = add_job("from-folder", from_folder, "list a folder of class folders, or of train/, val/ and test/ with such")
    job.add_argument("folder", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--test_per_class", type=int, metavar="N", help="test images a class (10)")
    job.add_argument("--val_per_class", type=int, metavar="N", help="validation images a class (0)")
    job.add_argument("--test", type=Path, metavar="FOLDER", help="class folders of test images, instead of a split")
    job.add_argument("--val", type=Path, metavar="FOLDER", help="class folders of validation images")
    job.add_argument("--min_images", type=int, metavar="N", help="leave out classes with fewer")
    job.add_argument("--exclude", nargs="+", metavar="CLASS", help="leave out these classes")
    job.add_argument(
        "--group", metavar="REGEX", help=r"images that agree in its first group stay together, e.g. '(\d+)_\d+'"
    )
    job.add_argument("--seed", type=int, help="of the split, below 2^32")
    given = vars(parser.parse_args(arguments))
    del given["job"]
    try:
        result = given.pop("run")(**given)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be used ({error.strerror}): mend its permissions, or give another."
        ) from error
    for name, value in result.items():
        get_logger().info(f"{name:<45} {value}")
    return result


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.status)
