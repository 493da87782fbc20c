"""Folders of class folders: which images are for training, validation and testing.

FOLDER/CLASS/*.jpg is split; FOLDER/train/CLASS/*.jpg beside FOLDER/val or FOLDER/test is taken as it is.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_loader.image_folders import image_suffixes, others_text, scan_folder, subfolders, walk
from utils.errors import UserError, shown, unknown
from utils.logger import progress

#: Names of folders in a layout, in lower case.
LAYOUT = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test", "testing"}}

Entries = list[tuple[str, int]]
"""(path as a list has it, label)."""


@dataclass
class ClassFolders:
    """What becomes of a folder.

    Args:
        splits: "train", "test" and, if any, "val" -> their images.
        classes: names in the order of the labels.
        notices: what else one should know, a sentence each.
    """

    splits: dict[str, Entries] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitOptions:
    """How a folder is split.

    Args:
        test_per_class: test images of every class, where there is no folder of test images.
        val_per_class: validation images of every class, where there is no folder of them; 0 for none.
        test, val: folders of class folders, anywhere.
        min_images: classes with fewer training images are left out.
        exclude: names of classes, or of folders beside train/, to leave out.
        group: a regular expression; images of whose paths its first group matches the same text stay together.
        seed: of the split, below 2^32.
    """

    test_per_class: int = 10
    val_per_class: int = 0
    test: Path | None = None
    val: Path | None = None
    min_images: int = 1
    exclude: Sequence[str] = ()
    group: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.test_per_class < 1:
            raise UserError(f"--test_per_class must be at least 1, not {self.test_per_class}.")
        if self.val_per_class < 0 or self.min_images < 1:
            raise UserError("--val_per_class must be at least 0 and --min_images at least 1.")
        if self.val and self.val_per_class:
            raise UserError("--val and --val_per_class exclude each other: leave one of them out.")
        if self.group is not None:
            try:
                groups = re.compile(self.group).groups
            except re.error as error:
                raise UserError(f"--group {self.group} is no regular expression ({error}): mend it.") from error
            if not groups:
                raise UserError(rf'--group {self.group} has no group: put brackets around it, such as "(\d+)_\d+".')


def read_class_folders(folder: Path, options: SplitOptions) -> ClassFolders:
    """Find the classes and the images of a folder, and split them. Classes are the labels 0, 1, ... by their names.

    Paths are relative to `folder`; those of other folders that are not in it are absolute.

    Raises:
        UserError: fewer than two classes have training images, no class has a test image, a name cannot stand in a
            list, or the options do not fit the folder.
    """
    notices: list[str] = []
    layout = _layout(folder, options, notices)
    images = _images(folder, layout, notices)
    classes = _classes(folder, images["train"], options, notices)
    found = ClassFolders({"train": [], "test": []}, classes, notices)
    for split, by_class in images.items():
        found.splits[split] = [(path, label) for label, name in enumerate(classes) for path in by_class.get(name, ())]
        strange = [name for name, paths in by_class.items() if name not in classes and paths]
        if split != "train" and strange:
            notices.append(f"Classes of the {split} images that are not trained on are left out: {shown(strange)}.")
    wanted = {} if "test" in images else {"test": options.test_per_class}
    if options.val_per_class:
        wanted["val"] = options.val_per_class
    _move(found, wanted, options)
    for split, entries in found.splits.items():
        if not entries:
            advice = f"lower --{split}_per_class, or give a folder of such images with --{split}"
            if split in images:
                advice = f"{layout[split]} should hold folders with the names of the classes that are trained on"
            raise UserError(f"No class of {folder} has an image left for the {split} list: {advice}.")
    if options.group:
        _check_groups(found, options.group)
    return found


def _layout(folder: Path, options: SplitOptions, notices: list[str]) -> dict[str, Path]:
    """ "train" and, if there are such folders, "val" and "test" -> folder of class folders.

    Raises:
        UserError: folders called like splits stand beside others, or the options do not fit.
    """
    inside = [path for path in subfolders(folder) if path.name not in options.exclude]
    found = {split: [path for path in inside if path.name.lower() in names] for split, names in LAYOUT.items()}
    layout = {"train": folder}
    if found["train"] and subfolders(found["train"][0]):
        if twice := [paths for paths in found.values() if len(paths) > 1]:
            raise UserError(f"{twice[0][0]} and {twice[0][1]} mean the same: leave one out with --exclude.")
        layout = {split: paths[0] for split, paths in found.items() if paths}
        if rest := [path.name for path in inside if path not in layout.values()]:
            raise UserError(
                f"{folder} holds {layout['train'].name}/ beside other folders ({shown(rest)}): leave these out with "
                f"--exclude, or give {layout['train']} itself."
            )
        notices.append(f"Taken as it is: {', '.join(f'{path.name}/ ({split})' for split, path in layout.items())}.")
    for split, given in (("val", options.val), ("test", options.test)):
        if given is not None:
            if split in layout:
                notices.append(f"{layout[split]} is not used: --{split} is.")
            layout[split] = given
    if "val" in layout and options.val_per_class:
        raise UserError(f"{layout['val']} holds validation images: leave --val_per_class out.")
    for split, path in list(layout.items()):
        if split != "train" and not subfolders(path):
            if path in (options.val, options.test):
                raise UserError(
                    f"{path} holds no class folders: put the images of each class into a folder of its own."
                )
            notices.append(f"{path} holds no class folders, so that its images have no labels: not listed.")
            del layout[split]
    if "val" in layout and "test" not in layout:
        layout["test"] = layout.pop("val")
        notices.append(f"There are no other test images: {layout['test']} becomes the test list.")
    return layout


def _images(folder: Path, layout: Mapping[str, Path], notices: list[str]) -> dict[str, dict[str, list[str]]]:
    """Split -> name of a class -> its images, as a list has them: relative to `folder` where that holds them.

    Raises:
        UserError: a name cannot stand in a list.
    """
    images, others, loose = {}, Counter(), 0
    base = Path(os.path.abspath(folder))
    for split, root in layout.items():
        absolute = Path(os.path.abspath(root))
        start = absolute.relative_to(base) if absolute.is_relative_to(base) else absolute
        images[split] = {}
        for path in progress(subfolders(root), f"{split} classes", unit="class"):
            names, others_here = scan_folder(path)
            images[split][path.name] = [(start / path.name / name).as_posix() for name in names]
            others += others_here
        loose += sum(Path(name).suffix.lower() in image_suffixes() for name in next(walk(root))[2])
    for name in (name for by_class in images.values() for names in by_class.values() for name in names):
        line = os.fsencode(name)
        if line.splitlines() != [line] or line.rstrip() != line:
            raise UserError(f"{name} cannot stand in a list of one image a line: rename it.")
    if loose:
        notices.append(f"{loose} images that are in no class folder are left out.")
    if others:
        notices.append(f"Files that are no images by their endings are left out: {others_text(others)}.")
    return images


def _classes(folder: Path, images: Mapping[str, list[str]], options: SplitOptions, notices: list[str]) -> list[str]:
    """The names of the classes, in order, without those that are empty, too small or excluded.

    Raises:
        UserError: fewer than two are left, or there is none of the name of one that is excluded.
    """
    inside = subfolders(folder)
    known = {*images, *(path.name for path in inside)}
    for name in options.exclude:
        if name not in known:
            raise unknown("class in --exclude", name, known)
    counts = {name: len(paths) for name, paths in images.items() if name not in options.exclude}
    if empty := [name for name, count in counts.items() if not count]:
        notices.append(f"{len(empty)} class folders without a training image are no classes: {shown(empty)}.")
    if small := [name for name, count in counts.items() if 0 < count < options.min_images]:
        notices.append(f"{len(small)} classes with fewer than {options.min_images} images left out: {shown(small)}.")
    classes = [name for name, count in counts.items() if count >= options.min_images]
    if len(classes) < 2:
        deeper = f"give {inside[0]}, or " if len(inside) == 1 and len(subfolders(inside[0])) > 1 else ""
        raise UserError(
            f"{folder} holds {len(classes)} class folder(s) with images, and two are the least: {deeper}put the images "
            "of each class into a folder of its own."
        )
    return classes


def _move(found: ClassFolders, wanted: Mapping[str, int], options: SplitOptions) -> None:
    """Move images from training to testing and validation, `wanted` of every class that keeps some."""
    if not wanted:
        return
    whole, classes = found.splits["train"], found.classes
    generator = np.random.RandomState(options.seed)
    groups = groups_of([path for path, _ in whole], options.group) if options.group else None
    labels = np.array([label for _, label in whole])
    moved = _choose_groups(labels, groups, wanted, generator) if groups else _choose_images(labels, wanted, generator)
    for split, count in wanted.items():
        found.splits[split] = [whole[i] for i in sorted(moved[split])]
        there = {label for _, label in found.splits[split]}
        absent = [name for label, name in enumerate(classes) if label not in there]
        if there and absent:
            found.notices.append(
                f"{len(absent)} of {len(classes)} classes are too small for {count} images in the {split} list and are "
                f"not in it: {shown(absent)}."
            )
    taken = set().union(*moved.values())
    found.splits["train"] = [entry for i, entry in enumerate(whole) if i not in taken]


def _choose_images(
    labels: np.ndarray, wanted: Mapping[str, int], generator: np.random.RandomState
) -> dict[str, set[int]]:
    """Split -> indices of images at random, `wanted` of every class that keeps an image for training."""
    moved: dict[str, set[int]] = {split: set() for split in wanted}
    for label in range(labels.max() + 1):
        order = generator.permutation(np.flatnonzero(labels == label)).tolist()
        for split, count in wanted.items():
            if len(order) > count:
                moved[split] |= set(order[:count])
                order = order[count:]
    return moved


def _choose_groups(
    labels: np.ndarray, groups: Sequence[str], wanted: Mapping[str, int], generator: np.random.RandomState
) -> dict[str, set[int]]:
    """The same with whole groups, until there are `wanted` images; every class keeps a group for training."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    labels_of = {group: set(labels[own].tolist()) for group, own in members.items()}
    left = Counter(label for of_group in labels_of.values() for label in of_group)  # groups in training, by class
    moved: dict[str, set[int]] = {split: set() for split in wanted}
    for split, count in wanted.items():
        reached: Counter[int] = Counter()
        for label in range(labels.max() + 1):
            own = [group for group in labels_of if label in labels_of[group]]
            for place in generator.permutation(len(own)):
                group = own[place]
                if reached[label] >= count:
                    break
                if members[group] and min(left[other] for other in labels_of[group]) >= 2:
                    left.subtract(labels_of[group])
                    reached.update(labels[members[group]].tolist())
                    moved[split].update(members[group])
                    members[group] = []
    return moved


def groups_of(paths: Sequence[str], pattern: str) -> list[str]:
    """The group of each image: what the pattern's first group matches in its path; one of its own without a match.

    Raises:
        UserError: the pattern is found in no path.
    """
    matches = [re.search(pattern, path) for path in paths]
    if not any(matches):
        raise UserError(f"--group {pattern} is found in none of the paths, such as {paths[0]}: mend it.")
    return [
        f"group {match[1]}" if match and match[1] is not None else f"image {path}"
        for match, path in zip(matches, paths, strict=True)
    ]


def _check_groups(found: ClassFolders, pattern: str) -> None:
    """Say how many groups there are, and which are in two splits that were given as they are."""
    groups = iter(groups_of([path for entries in found.splits.values() for path, _ in entries], pattern))
    of_split = {split: {next(groups) for _ in entries} for split, entries in found.splits.items()}
    every = set().union(*of_split.values())
    alone = sum(group.startswith("image ") for group in every)
    found.notices.append(
        f"{len(every) - alone} groups by --group; {alone} images are in none of them and count by themselves."
    )
    shared = of_split["train"] & (of_split["test"] | of_split.get("val", set()))
    if shared:
        found.notices.append(
            f"{len(shared)} groups are in training and in the folders given for testing or validation, such as "
            f"{min(shared).removeprefix('group ')}: accuracy will be too high, unless groups of the same name have "
            "nothing in common."
        )
