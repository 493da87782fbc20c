"""List files: bring in the published ones, generate test distributions, check images, list a folder of class folders.

python -m utils.make_data_txt import FOLDER_OR_URL             published lists -> data_txt/, checked
python -m utils.make_data_txt generate TRAIN.txt TEST.txt OUT  OUT/uniform.txt, forward50.txt, ..., backward50.txt
python -m utils.make_data_txt check LIST.txt DATA_DIR          every image there? class counts, shot groups
python -m utils.make_data_txt from-folder FOLDER OUT           FOLDER/CLASS/*.jpg -> OUT/train.txt, OUT/test.txt
"""

import argparse
import hashlib
import io
import json
import os
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

from data_loader.class_profiles import CIFAR_DISTRIBUTIONS, distribution_indices
from data_loader.image_lists import ImageList, image_files
from model.metric import shot_groups
from utils.checkpoint import write_atomically
from utils.errors import UserError
from utils.logger import get_logger, progress

MANIFEST = Path(__file__).resolve().parents[1] / "data_txt" / "manifest.json"
INATURALIST_TRAIN, INATURALIST_ZIP = "iNaturalist18/iNaturalist18_train.txt", "iNaturalist18/iNaturalist_train.zip"


def import_lists(source: str, target: Path) -> dict[str, str]:
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
        reason = _differs(data, figures)
        if reason:
            wrong.append(f"{name} ({reason})")
            outcome[name] = f"refused: {reason}"
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


def _differs(data: bytes, figures: dict) -> str | None:
    lines = len(data.splitlines())
    if lines != figures["lines"]:
        return f"{lines} lines instead of {figures['lines']}"
    if figures["sha256"] and hashlib.sha256(data).hexdigest() != figures["sha256"]:
        return "another checksum"
    return None


def generate(train_list: Path, test_list: Path, out: Path, names: list[str]) -> dict[str, int]:
    """Write one list for each test distribution, chosen from a test list (see `distribution_indices`).

    Returns:
        Lines of each list written.
    """
    train, test = (ImageList.read(path, "") for path in (train_list, test_list))
    counts = np.bincount(train.targets)
    test.check_labels(len(counts))
    out.mkdir(parents=True, exist_ok=True)
    distributions = distribution_indices(test.targets, counts.tolist(), names)
    for name, indices in distributions.items():
        write_list(out / f"{name}.txt", [(test.name(index), int(test.targets[index])) for index in indices])
    return {name: len(indices) for name, indices in distributions.items()}


def write_list(path: Path, entries: list[tuple[str, int]]) -> None:
    write_atomically(path, os.fsencode("".join(f"{name} {label}\n" for name, label in entries)))


def check(list_path: Path, data_dir: Path) -> dict:
    """Whether every listed image exists, and what the class counts are.

    Returns:
        {"images", "classes", "imbalance_ratio", "many", "medium", "few" (classes), "empty" (classes), "duplicates"}.

    Raises:
        UserError: images are missing: how many, and the first.
    """
    images = ImageList.read(list_path, data_dir)
    names = images.names()
    missing = [name for name in progress(names, "images", unit="image") if not (data_dir / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images of {list_path} are not under {data_dir}, the first is "
            f"{missing[0]}: complete the data, or give the folder that the paths are relative to."
        )
    counts = np.bincount(images.targets)
    groups = {name: int((mask.numpy() & (counts > 0)).sum()) for name, mask in shot_groups(counts).items()}
    return {
        "images": len(images),
        "classes": len(counts),
        "imbalance_ratio": float(counts.max() / counts[counts > 0].min()),
        **groups,
        "empty": int((counts == 0).sum()),
        "duplicates": len(names) - len(set(names)),
    }


def from_folder(folder: Path, out: Path, test_per_class: int, seed: int = 0) -> dict[str, int]:
    """List a folder of class folders: some images of every class for testing, the others for training.

    The class folders in alphabetical order are the labels 0, 1, ...; classes.txt names them.

    Args:
        folder: holds one folder a class.
        out: gets train.txt, test.txt and classes.txt; paths are relative to `folder`.
        test_per_class: test images of every class.
        seed: of the split.

    Raises:
        UserError: test_per_class is below 1, a name cannot stand in a list, fewer than two class folders, or a class
            without an image left for training.
    """
    if test_per_class < 1:
        raise UserError(f"--test_per_class must be at least 1, not {test_per_class}.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give the one that holds a folder for each class.")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise UserError(
            f"{folder} holds {len(classes)} class folder(s), and two are the least: put the images of each "
            "class into a folder of its own."
        )
    generator = np.random.RandomState(seed)
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, class_folder in enumerate(progress(classes, "classes", unit="class")):
        names = [f"{class_folder.name}/{name}" for name in image_files(class_folder)]
        for name in names:
            _check_name(name)
        if len(names) <= test_per_class:
            raise UserError(
                f"{class_folder} has {len(names)} images, and {test_per_class} of every class go into the "
                "test set: add images, leave the class out, or lower --test_per_class."
            )
        order = generator.permutation(len(names))
        splits["test"] += [(names[i], label) for i in sorted(order[:test_per_class])]
        splits["train"] += [(names[i], label) for i in sorted(order[test_per_class:])]
    out.mkdir(parents=True, exist_ok=True)
    for split, entries in splits.items():
        write_list(out / f"{split}.txt", entries)
    write_atomically(out / "classes.txt", os.fsencode("".join(f"{path.name}\n" for path in classes)))
    return {"classes": len(classes), **{split: len(entries) for split, entries in splits.items()}}


def _check_name(name: str) -> None:
    """Raise UserError for a path that a line of a list cannot hold, such as one with a line end."""
    line = os.fsencode(name)
    if line.splitlines() != [line] or line.rstrip() != line:
        raise UserError(f"{name} cannot stand in a list of one image a line: rename it.")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    job = jobs.add_parser("import", help="bring in the published lists")
    job.add_argument("source", help="folder or URL laid out like the published data_txt")
    job.add_argument("--target", type=Path, default=MANIFEST.parent)
    job = jobs.add_parser("generate", help="choose test distributions from a test list")
    job.add_argument("train_list", type=Path)
    job.add_argument("test_list", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--distributions", nargs="+", default=list(CIFAR_DISTRIBUTIONS), metavar="NAME")
    job = jobs.add_parser("check", help="do the listed images exist, and how are the classes distributed")
    job.add_argument("list", type=Path)
    job.add_argument("data_dir", type=Path)
    job = jobs.add_parser("from-folder", help="list a folder of class folders")
    job.add_argument("folder", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--test_per_class", type=int, default=10)
    job.add_argument("--seed", type=int, default=0, help="of the split, below 2^32")
    args = parser.parse_args(arguments)
    try:
        if args.job == "import":
            result = import_lists(args.source, args.target)
        elif args.job == "generate":
            result = generate(args.train_list, args.test_list, args.out, args.distributions)
        elif args.job == "check":
            result = check(args.list, args.data_dir)
        else:
            result = from_folder(args.folder, args.out, args.test_per_class, args.seed)
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
