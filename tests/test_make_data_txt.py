import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader.class_profiles import distribution_counts
from data_loader.image_lists import ImageList
from utils import make_data_txt
from utils.errors import UserError
from utils.make_data_txt import main

MANIFEST = json.loads(make_data_txt.MANIFEST.read_text())["files"]
RATIOS = (50, 25, 10, 5, 2)


@pytest.mark.parametrize(
    ("name", "classes", "per_class", "ratios"),
    [
        ("ImageNet_LT/ImageNet_LT", 1000, 50, RATIOS),
        ("Places_LT_v2/Places_LT", 365, 100, RATIOS),
        ("iNaturalist18/iNaturalist18", 8142, 3, (2,)),
    ],
)
def test_generated_totals_are_the_published_ones(name, classes, per_class, ratios):
    falling = list(range(classes, 0, -1))
    for ratio in ratios:
        for direction in ("forward", "backward"):
            counts = distribution_counts(per_class, falling, f"{direction}{ratio}")
            published = MANIFEST[f"{name}_{direction}{ratio}.txt"]
            assert (sum(counts), max(counts), min(counts)) == (
                published["lines"],
                published["max_per_class"],
                published["min_per_class"],
            )


def test_generate(tmp_path):
    counts = (3, 30, 10)
    (tmp_path / "train.txt").write_text("".join(f"t/{c}/{i}.jpg {c}\n" for c in range(3) for i in range(counts[c])))
    (tmp_path / "test.txt").write_text("".join(f"v/{c}/{i}.jpg {c}\n" for c in range(3) for i in range(8)))
    lines = main(
        [
            "generate",
            str(tmp_path / "train.txt"),
            str(tmp_path / "test.txt"),
            str(tmp_path / "out"),
            "--distributions",
            "forward4",
            "uniform",
        ]
    )
    assert lines == {"forward4": 14, "uniform": 24}
    written = ImageList.read(tmp_path / "out" / "forward4.txt", tmp_path)
    assert np.bincount(written.targets).tolist() == [2, 8, 4] and len(set(written.names())) == 14
    with pytest.raises(UserError, match="unknown test distribution"):
        main(
            [
                "generate",
                str(tmp_path / "train.txt"),
                str(tmp_path / "test.txt"),
                str(tmp_path / "out"),
                "--distributions",
                "up",
            ]
        )


@pytest.fixture
def folder(tmp_path):
    for name, count in (("cat", 5), ("dog", 9), ("emu", 3)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "cat" / "notes.md").write_text("not an image")
    return tmp_path


def test_from_folder_and_check(folder):
    images, out = str(folder / "images"), folder / "lists"
    assert main(["from-folder", images, str(out), "--test_per_class", "2"]) == {"classes": 3, "train": 11, "test": 6}
    assert (out / "classes.txt").read_text() == "cat\ndog\nemu\n"
    train, test = (set(ImageList.read(out / f"{split}.txt", images).names()) for split in ("train", "test"))
    assert not train & test and len(train | test) == 17
    report = main(["check", str(out / "train.txt"), images])
    assert report == {
        "images": 11,
        "classes": 3,
        "imbalance_ratio": 7.0,
        "many": 0,
        "medium": 0,
        "few": 3,
        "empty": 0,
        "duplicates": 0,
    }
    (folder / "images" / "dog" / "4.png").unlink()
    (folder / "images" / "dog" / "5.png").unlink()
    with pytest.raises(UserError, match=r"2 of 17 images .* are not under .*, the first is dog/[45].png"):
        (out / "all.txt").write_text((out / "train.txt").read_text() + (out / "test.txt").read_text())
        main(["check", str(out / "all.txt"), images])


def test_from_folder_bad_input(folder):
    with pytest.raises(UserError, match="emu has 3 images, and 3 of every class"):
        main(["from-folder", str(folder / "images"), str(folder), "--test_per_class", "3"])
    with pytest.raises(UserError, match="There is no folder"):
        main(["from-folder", str(folder / "absent"), str(folder)])
    with pytest.raises(UserError, match="holds 0 class folder"):
        main(["from-folder", str(folder / "images" / "cat"), str(folder)])


@pytest.mark.parametrize("count", ["0", "-1"])
def test_from_folder_wants_test_images(folder, count):
    with pytest.raises(UserError, match=f"--test_per_class must be at least 1, not {count}"):
        main(["from-folder", str(folder / "images"), str(folder / "lists"), "--test_per_class", count])
    assert not (folder / "lists").exists()


@pytest.mark.parametrize("name", ["two\nlines.png", "a 1\rb.png"])
def test_from_folder_refuses_names_that_no_list_can_hold(folder, name):
    (folder / "images" / "cat" / name).write_bytes(b"")
    with pytest.raises(UserError, match="cannot stand in a list") as caught:
        main(["from-folder", str(folder / "images"), str(folder / "lists"), "--test_per_class", "1"])
    assert "\n" not in str(caught.value) and "\r" not in str(caught.value)


def test_any_other_name_comes_back(folder):
    """Blanks, a label's look, letters of every script, and bytes that are no UTF-8."""
    names = [b"a  b.png", b" first.png", b"b 3 .png", "ä日本\u2028.png".encode(), b"latin \xe4\xff.png", b"\x0bv.png"]
    for name in names:
        with open(os.path.join(os.fsencode(folder / "images" / "cat"), name), "wb"):
            pass
    main(["from-folder", str(folder / "images"), str(folder / "lists"), "--test_per_class", "1"])
    listed = {
        path
        for split in ("train", "test")
        for path in ImageList.read(folder / "lists" / f"{split}.txt", "").raw_names()
    }
    assert {b"cat/" + name for name in names} <= listed
    assert all(os.path.exists(os.path.join(os.fsencode(folder / "images"), path)) for path in listed)
    assert main(["check", str(folder / "lists" / "train.txt"), str(folder / "images")])["duplicates"] == 0


def test_folders_called_like_images_are_no_images(folder):
    (folder / "images" / "cat" / "album.jpg").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "cat" / "album.jpg" / "0.png")
    main(["from-folder", str(folder / "images"), str(folder / "lists"), "--test_per_class", "1"])
    names = [n for s in ("train", "test") for n in ImageList.read(folder / "lists" / f"{s}.txt", "").names()]
    assert "cat/album.jpg" not in names and "cat/album.jpg/0.png" in names


@pytest.mark.parametrize("closed", ["images", "images/dog"])
def test_a_folder_that_may_not_be_entered_is_named(folder, monkeypatch, closed):
    """Tests may run as root, who may enter all of them."""
    original = os.scandir

    def scandir(path):
        if Path(path) == folder / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    listdir = os.listdir
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", lambda path: list(scandir(path)) and listdir(path))
    with pytest.raises(UserError, match=f"{closed}.* cannot be (read|used) .Permission denied"):
        main(["from-folder", str(folder / "images"), str(folder / "lists"), "--test_per_class", "1"])


def test_import_takes_only_the_published_lists(tmp_path, monkeypatch):
    good, trained = b"a.jpg 0\nb.jpg 1\n", b"c.jpg 0\n"
    manifest = {
        "files": {
            "A/good.txt": {"lines": 2, "sha256": hashlib.sha256(good).hexdigest()},
            "A/absent.txt": {"lines": 2, "sha256": "0"},
            make_data_txt.INATURALIST_TRAIN: {"lines": 1, "sha256": None},
        }
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(make_data_txt, "MANIFEST", tmp_path / "manifest.json")
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "A").mkdir(parents=True)
    (source / "iNaturalist18").mkdir()
    with pytest.raises(UserError, match="none of the published lists"):
        main(["import", str(source), "--target", str(target)])
    (source / "A" / "good.txt").write_bytes(good)
    with zipfile.ZipFile(source / make_data_txt.INATURALIST_ZIP, "w") as archive:
        archive.writestr("iNaturalist18_train.txt", trained)
    outcome = main(["import", str(source), "--target", str(target)])
    assert outcome["A/good.txt"] == "imported" and outcome["A/absent.txt"] == "not there"
    assert (target / "A" / "good.txt").read_bytes() == good
    assert (target / make_data_txt.INATURALIST_TRAIN).read_bytes() == trained
    for data, reason in ((good + b"c.jpg 1\n", "3 lines instead of 2"), (b"a.jpg 0\nb.jpg 0\n", "another checksum")):
        (source / "A" / "good.txt").write_bytes(data)
        with pytest.raises(UserError, match=reason):
            main(["import", str(source), "--target", str(target)])
        assert (target / "A" / "good.txt").read_bytes() == good
