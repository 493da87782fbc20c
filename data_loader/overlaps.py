"""Images that lists share, or that one list has twice: by what files they are, not by how they are written."""

import os
from collections.abc import Iterable

from data_loader.image_lists import ImageList


def real_paths(images: ImageList) -> list[bytes]:
    """Where listed images really are: "./c0/1.png", an absolute path and a link to their folder are the same.

    Folders are looked up once each, so that half a million images cost a second; links to single images are not
    followed.
    """
    root = os.fsencode(images.data_dir)
    folders: dict[bytes, bytes] = {}
    found = []
    for path in images.paths.tolist():
        folder, slash, file = path.rpartition(b"/")
        real = folders.get(folder + slash)
        if real is None:
            real = folders[folder + slash] = os.path.realpath(os.path.join(root, folder + slash)) + b"/"
        found.append(real + file)
    return found


def compare_lists(train: ImageList, val: ImageList, test: ImageList) -> tuple[list[str], bool]:
    """What is wrong between lists and within them.

    Args:
        train, val, test: val is the same object as test where a data set has no validation images of its own.

    Returns:
        A sentence for each thing that is wrong; whether validation images are neither trained on nor tested.
    """
    found, labels = [], {}
    for images in (train, test) if val is test else (train, val, test):
        paths = real_paths(images)
        labels[id(images)] = label = dict(zip(paths, images.targets.tolist(), strict=True))
        if len(label) < len(paths):
            seen: set[bytes] = set()
            twice = {path for path in paths if path in seen or seen.add(path)}
            unlike = {path for path, own in zip(paths, images.targets.tolist(), strict=True) if label[path] != own}
            more = f", {len(unlike)} of them with two labels, such as {first(unlike)}" if unlike else ""
            found.append(
                f"{images.list_path} has {len(twice)} images more than once, such as {first(twice)}{more}: each entry "
                "counts."
            )
    pairs = [(train, test, "accuracy will be too high")]
    if val is not test:
        pairs += [
            (train, val, "the best checkpoint will be chosen by images that were trained on"),
            (val, test, "the best checkpoint will be chosen by test images"),
        ]
    for one, other, harm in pairs:
        label, others = labels[id(one)], labels[id(other)]
        if shared := label.keys() & others.keys():
            unlike = sum(label[path] != others[path] for path in shared)
            found.append(
                f"{len(shared)} images are in both {one.list_path} and {other.list_path}, such as "
                f"{first(shared)}{f', {unlike} of them with two labels' if unlike else ''}: {harm}."
            )
    apart = all(labels[id(val)].keys().isdisjoint(labels[id(images)]) for images in (train, test))
    return found, apart


def shared_files(train: ImageList, other: ImageList) -> set[bytes]:
    """Files of another list that the training list has, too, also where the other one links to them: their paths."""
    others = real_paths(other)
    return set(real_paths(train)) & {*others, *map(os.path.realpath, others)}


def first(paths: Iterable[bytes]) -> str:
    return os.fsdecode(min(paths))
