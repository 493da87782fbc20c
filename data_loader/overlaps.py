"""Images that lists share, or that one list has twice: by what files they are, not by how they are written."""

import os
from collections.abc import Iterator

from data_loader.image_lists import ImageList

DEEPEST = 200  # folders in one another that are looked up one by one


class RealPaths:
    """Where listed images really are: "./c0/1.png", an absolute path and a link to their folder are the same.

    Folders are looked up once each, so that half a million images cost a second; links to single images are not
    followed.
    """

    def __init__(self) -> None:
        self.folders: dict[bytes, bytes] = {}

    def of(self, images: ImageList) -> dict[bytes, int]:
        """Path -> label of every image of a list; of one that it has twice, the last label."""
        return dict(zip(self.paths(images), images.targets.tolist(), strict=True))

    def paths(self, images: ImageList) -> Iterator[bytes]:
        """Of every image of a list, in its order."""
        root = os.path.abspath(os.fsencode(images.data_dir))
        folders: dict[bytes, bytes] = {}
        for name in images.raw_names():
            folder, slash, file = name.rpartition(b"/")
            real = folders.get(folder)
            if real is None:
                whole = os.path.normpath(os.path.join(root, folder + slash))
                real = folders[folder] = self.folder(b"/" + whole.lstrip(b"/"))
            yield real + b"/" + file

    def folder(self, path: bytes) -> bytes:
        """A folder with every link on the way to it resolved; `path` is absolute and has no dots."""
        known = self.folders.get(path)
        if known is None and path.count(b"/") > DEEPEST:
            return os.path.realpath(path)
        if known is None:
            parent, name = os.path.split(path)
            known = os.path.join(self.folder(parent), name) if name else path
            if name and os.path.islink(known):
                known = os.path.realpath(known)
            self.folders[path] = known
        return known


def compare_lists(train: ImageList, val: ImageList, test: ImageList) -> tuple[list[str], bool]:
    """What is wrong between lists and within them.

    Args:
        train, val, test: val is the same object as test where a data set has no validation images of its own.

    Returns:
        A sentence for each thing that is wrong; whether validation images are neither trained on nor tested.
    """
    real, found = RealPaths(), []
    distinct = {id(images): images for images in (train, val, test)}
    labels = {key: real.of(images) for key, images in distinct.items()}
    for key, images in distinct.items():
        if len(labels[key]) < len(images):
            found.append(_repeats(images, list(real.paths(images)), labels[key]))
    pairs = [(train, test, "accuracy will be too high")]
    if val is not test:
        pairs += [
            (train, val, "the best checkpoint will be chosen by images that were trained on"),
            (val, test, "the best checkpoint will be chosen by test images"),
        ]
    for one, other, harm in pairs:
        first, second = labels[id(one)], labels[id(other)]
        if shared := first.keys() & second.keys():
            unlike = sum(first[path] != second[path] for path in shared)
            found.append(
                f"{len(shared)} images are in both {one.list_path} and {other.list_path}, such as "
                f"{os.fsdecode(min(shared))}{f', {unlike} of them with two labels' if unlike else ''}: {harm}."
            )
    held_out = labels[id(val)].keys()
    apart = all(held_out.isdisjoint(labels[id(images)]) for images in (train, test))
    return found, apart


def shared_files(train: ImageList, other: ImageList) -> set[bytes]:
    """Files of another list that the training list has, too, also where the other one links to them: their paths."""
    real = RealPaths()
    others = set(real.paths(other))
    return set(real.paths(train)) & (others | {os.path.realpath(path) for path in others})


def _repeats(images: ImageList, paths: list[bytes], label: dict[bytes, int]) -> str:
    seen: set[bytes] = set()
    twice = {path for path in paths if path in seen or seen.add(path)}
    unlike = {path for path, target in zip(paths, images.targets.tolist(), strict=True) if label[path] != target}
    more = f", {len(unlike)} of them with two labels, such as {os.fsdecode(min(unlike))}" if unlike else ""
    return (
        f"{images.list_path} has {len(twice)} images more than once, such as {os.fsdecode(min(twice))}{more}: "
        "each entry counts."
    )
