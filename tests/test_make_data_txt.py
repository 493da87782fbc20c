import hashlib
import json
import os
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

from commands import make_data_txt
from commands.command_line import parse
from commands.make_data_txt import main
from data_loader.class_profiles import distribution_counts
from data_loader.image_lists import ImageList
from trainer import train
from trainer.build import build_loader
from trainer.registry import read_config
from utils.errors import UserError

MANIFEST = json.loads(make_data_txt.MANIFEST.read_text())["files"]


def make_images(root: Path, counts: dict[str, int], suffix: str = "png") -> None:
    """Folders of a few images each, by their paths."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number:05d}.{suffix}")


def listed(folder: Path, split: str) -> list[tuple[str, int]]:
    images = ImageList.read(folder / f"{split}.txt", "")
    return list(zip(images.names(), images.targets.tolist(), strict=True))


def all_listed(folder: Path) -> list[str]:
    return [name for split in ("train", "test") for name, _ in listed(folder, split)]


def run(job: str, *options) -> dict:
    return main([job, *map(str, options)])


@pytest.fixture
def photos(tmp_path):
    """tmp_path/f with three classes; lists go to tmp_path/o."""
    make_images(tmp_path / "f", {"cat": 5, "dog": 9, "emu": 3})
    return tmp_path


# --- test distributions ---


@pytest.mark.parametrize(
    ("name", "classes", "per_class", "ratios"),
    [
        ("ImageNet_LT/ImageNet_LT", 1000, 50, (50, 25, 10, 5, 2)),
        ("Places_LT_v2/Places_LT", 365, 100, (50, 25, 10, 5, 2)),
        ("iNaturalist18/iNaturalist18", 8142, 3, (2,)),
    ],
)
def test_generated_totals_are_the_published_ones(name, classes, per_class, ratios):
    for kind in (f"{direction}{ratio}" for ratio in ratios for direction in ("forward", "backward")):
        counts = distribution_counts(per_class, list(range(classes, 0, -1)), kind)
        published = MANIFEST[f"{name}_{kind}.txt"]
        expected = [published[key] for key in ("lines", "max_per_class", "min_per_class")]
        assert [sum(counts), max(counts), min(counts)] == expected


def test_generate(tmp_path):
    lists = [tmp_path / "train.txt", tmp_path / "test.txt", tmp_path / "o"]
    lists[0].write_text("".join(f"t/{c}/{i}.jpg {c}\n" for c, count in enumerate((3, 30, 10)) for i in range(count)))
    lists[1].write_text("".join(f"v/{c}/{i}.jpg {c}\n" for c in range(3) for i in range(8)))
    assert run("generate", *lists, "--distributions", "forward4", "uniform") == {"forward4": 14, "uniform": 24}
    written = listed(tmp_path / "o", "forward4")
    assert np.bincount([label for _, label in written]).tolist() == [2, 8, 4] and len(set(written)) == 14
    with pytest.raises(UserError, match="unknown test distribution"):
        run("generate", *lists, "--distributions", "up")


# --- lists of a folder ---


def test_whatever_pillow_opens_without_what_file_managers_leave(tmp_path, capsys):
    make_images(tmp_path / "f", {"a": 4, "b": 3}, "ppm")
    for name in ("a/.DS_Store", "a/._00000.ppm", "a/Thumbs.db", "b/desktop.ini", "a/x.heic", "b/y.HEIC", "a/README"):
        (tmp_path / "f" / name).write_bytes(b"x")
    make_images(tmp_path / "f", {"__MACOSX/a": 2, ".git/a": 2, "b/__MACOSX": 1, "b/called.jpg": 1})
    Image.new("L", (8, 8)).save(tmp_path / "f" / "a" / "z.PGM", format="PPM")
    Image.new("L", (8, 8)).save(tmp_path / "f" / "loose.png")
    counts = run("from-folder", tmp_path / "f", tmp_path / "o", "--test_per_class", 1)
    assert counts == {"classes": 2, "train": 7, "test": 2}
    names = all_listed(tmp_path / "o")
    assert {"a/z.PGM", "b/called.jpg/00000.png"} < set(names) and "b/called.jpg" not in names
    assert not any("/." in name or "MACOSX" in name for name in names)
    text = capsys.readouterr().out
    assert "left out: 2 .heic, 1 without an ending." in text and "1 images that are in no class folder" in text
    assert run("check", tmp_path / "o" / "train.txt", tmp_path / "f", "--num_workers", 1)["images"] == 7


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "Testing")])
def test_a_layout_of_splits_is_taken_as_it_is(tmp_path, names, capsys):
    train, val, test = names
    make_images(tmp_path / "f", {f"{train}/a": 3, f"{train}/b": 2, f"{val}/a": 1, f"{test}/a": 2, f"{test}/b": 1})
    make_images(tmp_path / "f", {f"{test}/z": 1, f"{train}/empty": 0})
    counts = run("from-folder", tmp_path / "f", tmp_path / "o", "--group", r"(\d+).png")
    assert counts == {"classes": 2, "train": 5, "val": 1, "test": 3}
    assert listed(tmp_path / "o", "val") == [(f"{val}/a/00000.png", 0)]
    assert listed(tmp_path / "o", "test")[2] == (f"{test}/b/00000.png", 1)
    assert (tmp_path / "o" / "classes.txt").read_text() == "a\nb\n"
    text = capsys.readouterr().out
    assert "are no classes: empty." in text and "not trained on are left out: z." in text
    assert "2 groups are in training and in the folders given" in text


def test_validation_images_test_where_there_are_no_others(tmp_path):
    make_images(tmp_path / "f", {"train/a": 3, "train/b": 2, "valid/a": 1})
    assert run("from-folder", tmp_path / "f", tmp_path / "o") == {"classes": 2, "train": 5, "test": 1}
    assert listed(tmp_path / "o", "test") == [("valid/a/00000.png", 0)]


def test_other_folders_of_test_and_validation_images(tmp_path):
    make_images(tmp_path, {"f/a": 3, "f/b": 2, "t/a": 1, "t/b": 2, "f/v/a": 1})
    folders = (tmp_path / "f", tmp_path / "o", "--exclude", "v")
    counts = run("from-folder", *folders, "--test", tmp_path / "t", "--val", tmp_path / "f" / "v")
    assert counts == {"classes": 2, "train": 5, "test": 3, "val": 1}
    assert listed(tmp_path / "o", "test")[0] == (f"{tmp_path}/t/a/00000.png", 0)  # elsewhere: absolute
    assert listed(tmp_path / "o", "val") == [("v/a/00000.png", 0)]
    for test, message in ((tmp_path, "should hold folders with the names"), (tmp_path / "t/a", "no class folders")):
        with pytest.raises(UserError, match=message):
            run("from-folder", *folders, "--test", test)


def test_a_layout_that_is_not_clear_is_refused(tmp_path):
    make_images(tmp_path / "f", {"train/a": 2, "train/b": 2, "test/a": 1, "meta/x": 1})
    with pytest.raises(UserError, match=r"holds train/ beside other folders \(meta\): leave these out with --exclude"):
        run("from-folder", tmp_path / "f", tmp_path / "o")
    assert run("from-folder", tmp_path / "f", tmp_path / "o", "--exclude", "meta")["test"] == 1
    make_images(tmp_path / "f", {"Test/a": 2})
    with pytest.raises(UserError, match="mean the same: leave one out with --exclude"):
        run("from-folder", tmp_path / "f", tmp_path / "o", "--exclude", "meta")
    make_images(tmp_path / "vehicles", {"train": 3, "tram": 3})  # a class that is called so
    assert run("from-folder", tmp_path / "vehicles", tmp_path / "o", "--test_per_class", 1)["classes"] == 2


def test_test_images_without_labels_are_not_listed(tmp_path, capsys):
    make_images(tmp_path / "f", {"Train/a": 3, "Train/b": 3, "Test": 4})
    counts = run("from-folder", tmp_path / "f", tmp_path / "o", "--test_per_class", 1)
    assert counts == {"classes": 2, "train": 4, "test": 2}
    assert "have no labels: not listed" in capsys.readouterr().out


def test_small_classes_stay_in_training(tmp_path, capsys):
    make_images(tmp_path / "f", {"a": 9, "b": 6, "c": 2, "d": 1, "e": 0})
    folders = (tmp_path / "f", tmp_path / "o")
    counts = run("from-folder", *folders, "--test_per_class", 3, "--val_per_class", 2)
    assert counts == {"classes": 4, "train": 8, "test": 6, "val": 4}
    for split, expected in {"train": [4, 1, 2, 1], "test": [3, 3], "val": [2, 2]}.items():
        assert np.bincount([label for _, label in listed(tmp_path / "o", split)]).tolist() == expected
    text = capsys.readouterr().out
    assert "2 of 4 classes are too small for 3 images in the test list and are not in it: c, d." in text
    assert "1 class folders without a training image are no classes: e." in text
    counts = run("from-folder", *folders, "--min_images", 2, "--exclude", "b", "--test_per_class", 3)
    assert counts == {"classes": 2, "train": 8, "test": 3}
    assert not (tmp_path / "o" / "val.txt").exists()  # of the call before


def test_the_split_is_that_of_its_seed(photos):
    run("from-folder", photos / "f", photos / "o", "--test_per_class", 2, "--seed", 3)
    names = [name.replace("0000", "") for name, _ in listed(photos / "o", "test")]
    assert names == ["cat/3.png", "cat/4.png", "dog/4.png", "dog/6.png", "emu/0.png", "emu/1.png"]


def test_frames_of_one_object_stay_together(tmp_path, capsys):
    """As in GTSRB: CLASS/TRACK_FRAME.ppm; the third class has one track."""
    for label, tracks in (("a", 5), ("b", 4), ("c", 1)):
        (tmp_path / "f" / label).mkdir(parents=True)
        for track, frame in ((track, frame) for track in range(tracks) for frame in range(4)):
            name = f"{'abc'.index(label)}{track:04d}_{frame:05d}.ppm"
            Image.new("RGB", (8, 8)).save(tmp_path / "f" / label / name)
    options = ("--group", r"(\d+)_\d+", "--test_per_class", 3, "--val_per_class", 5)
    counts = run("from-folder", tmp_path / "f", tmp_path / "o", *options)
    assert counts == {"classes": 3, "train": 16, "test": 8, "val": 16}
    tracks = [{name.split("_")[0] for name, _ in listed(tmp_path / "o", s)} for s in ("train", "test", "val")]
    assert len(set.union(*tracks)) == sum(map(len, tracks)) == 10
    assert "1 of 3 classes are too small for 3 images in the test list and are not in it: c." in capsys.readouterr().out


def test_a_group_in_two_classes_stays_together(tmp_path):
    """Patient 1 has images in both classes."""
    for name in ("a/p1_0", "a/p2_0", "a/p3_0", "b/p1_0", "b/p1_1", "b/p4_0", "b/p5_0"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "f" / f"{name}.png")
    for seed in range(6):
        options = ("--group", r"(p\d)_", "--test_per_class", 1, "--seed", seed)
        run("from-folder", tmp_path / "f", tmp_path / "o", *options)
        train, test = ({name[2:4] for name, _ in listed(tmp_path / "o", split)} for split in ("train", "test"))
        assert not train & test and train | test == {"p1", "p2", "p3", "p4", "p5"}


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("f", ["--test_per_class", "9"], "No class of .* has an image left for the test list: lower --test_per_class"),
        ("f", ["--test_per_class", "0"], "--test_per_class must be at least 1, not 0"),
        ("f", ["--val_per_class", "1", "--val", "f"], "exclude each other"),
        ("f", ["--exclude", "caat"], 'Unknown class in --exclude "caat": did you mean "cat"'),
        ("f", ["--group", "x(y)"], "is found in none"),
        ("f", ["--group", "\\d+"], "has no group"),
        ("f", ["--group", "("], "no regular expression"),
        (".", [], "holds 1 class folder.s. with images.*: give .*f, or put"),
        ("f/cat", [], "holds 0 class folder"),
        ("absent", [], "There is no folder"),
    ],
)
def test_what_from_folder_refuses(photos, folder, options, message):
    with pytest.raises(UserError, match=message):
        run("from-folder", photos / folder, photos / "o", *options)
    assert not (photos / "o").exists()


@pytest.mark.parametrize("name", ["two\nlines.png", "a 1\rb.png"])
def test_from_folder_refuses_names_that_no_list_can_hold(photos, name):
    (photos / "f" / "cat" / name).write_bytes(b"")
    with pytest.raises(UserError, match="cannot stand in a list") as caught:
        run("from-folder", photos / "f", photos / "o", "--test_per_class", "1")
    assert "\n" not in str(caught.value) and "\r" not in str(caught.value)


def test_any_other_name_comes_back(photos):
    """Blanks, a label's look, letters of every script, and bytes that are no UTF-8."""
    names = [b"a  b.png", b" first.png", b"b 3 .png", "ä日本\u2028.png".encode(), b"latin \xe4\xff.png", b"\x0bv.png"]
    cats = os.fsencode(photos / "f" / "cat")
    for name in names:
        os.link(os.path.join(cats, b"00000.png"), os.path.join(cats, name))
    run("from-folder", photos / "f", photos / "o", "--test_per_class", 1)
    found = {os.fsencode(name) for name in all_listed(photos / "o")}
    assert {b"cat/" + name for name in names} <= found
    assert all(os.path.exists(os.path.join(os.fsencode(photos / "f"), path)) for path in found)


@pytest.mark.parametrize("closed", ["f", "f/dog"])
def test_a_folder_that_may_not_be_entered_is_named(photos, monkeypatch, closed):
    """Tests may run as root, who may enter all of them."""
    original = os.scandir

    def scandir(path):
        if Path(path) == photos / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"{closed} cannot be read .Permission denied"):
        run("from-folder", photos / "f", photos / "o", "--test_per_class", "1")


def test_the_printed_command_line_is_the_config(tmp_path, capsys):
    make_images(tmp_path / "my photos" / "2024", {"a": 3, "b": 3})
    run("from-folder", tmp_path / "my photos" / "2024", tmp_path / "o", "--test_per_class", 1, "--val_per_class", 1)
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py"))
    program, name, *words = shlex.split(command)
    assert (program, name) == ("python", "train.py")
    options = parse(train, "", [str(ROOT / word) if word.startswith("configs/") else word for word in words])
    loader = build_loader(read_config(options["config"], training=True), torch.device("cpu"))
    assert loader.class_names == ["a", "b"] and loader.cls_num_list == [1, 1] and options["run_id"] == "first"
    assert loader.has_held_out_validation
    loader.check_files()


# --- checking a list ---


def test_check_counts_classes(photos):
    run("from-folder", photos / "f", photos / "o", "--test_per_class", 2)
    counts = {"images": 11, "classes": 3, "imbalance_ratio": 7.0, "many": 0, "medium": 0, "few": 3, "empty": 0}
    assert run("check", photos / "o" / "train.txt", photos / "f") == {**counts, "duplicates": 0}
    written = pd.read_csv(photos / "o" / "train_class_counts.csv")
    assert written.to_numpy().tolist() == [["cat", 3, "few"], ["dog", 7, "few"], ["emu", 1, "few"]]
    assert (photos / "o" / "train_class_counts.svg").read_text().startswith("<")


def test_check_decodes_and_lists_what_it_cannot(photos, capsys):
    images, listing = photos / "f", photos / "list.txt"
    Image.effect_noise((40, 40), 60).save(images / "dog" / "1.png")
    data = (images / "dog" / "1.png").read_bytes()
    for name, content in (("dog/1.png", data[: len(data) // 2]), ("dog/2.png", b""), ("cat/2.png", b"no image")):
        (images / name).write_bytes(content)
    listing.write_text("dog/1.png 1\ndog/2.png 1\ncat/2.png 0\ncat/00000.png 0\ndog/absent.png 1\n")
    with pytest.raises(UserError, match=r"4 of 5 images of .*list.txt cannot be decoded, see .*/plots/list_bad"):
        run("check", listing, images, "--output", photos / "plots")
    bad = pd.read_csv(photos / "plots" / "list_bad_images.csv")
    assert bad["path"].tolist() == ["dog/1.png", "dog/2.png", "cat/2.png", "dog/absent.png"]
    assert bad["reason"][0].startswith("cannot be decoded (")
    assert bad["reason"].tolist()[1:] == ["is an empty file", "is no image that Pillow knows", "is missing"]
    text = capsys.readouterr().out
    assert "4 of 5 images cannot be used: dog/1.png cannot be decoded" in text and "    1       3   few" in text


def test_the_right_folder_is_found(photos):
    images, out = photos / "f", photos / "o"
    run("from-folder", images, out, "--test_per_class", 1)
    for wrong, advice in (
        (photos / "ff", f"There is no folder .*: did you mean {images}"),
        (photos, f"did you mean the folder {images} "),
        (images / "cat", f"did you mean the folder {images} "),
        (out, "its paths start with cat/: give the folder that holds it"),
    ):
        with pytest.raises(UserError, match=advice):
            run("check", out / "train.txt", wrong)
    with pytest.raises(UserError, match="did you mean .*o/train.txt"):
        run("check", out / "trian.txt", images)


# --- the published lists ---


def test_import_takes_only_the_published_lists(tmp_path, monkeypatch):
    good, trained = b"a.jpg 0\nb.jpg 1\n", b"c.jpg 0\n"
    files = {
        "A/good.txt": {"lines": 2, "sha256": hashlib.sha256(good).hexdigest()},
        "A/absent.txt": {"lines": 2, "sha256": "0"},
        make_data_txt.INATURALIST_TRAIN: {"lines": 1, "sha256": None},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(make_data_txt, "MANIFEST", tmp_path / "manifest.json")
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "A").mkdir(parents=True)
    (source / "iNaturalist18").mkdir()
    with pytest.raises(UserError, match="none of the published lists"):
        run("import", source, "--target", target)
    (source / "A" / "good.txt").write_bytes(good)
    with zipfile.ZipFile(source / make_data_txt.INATURALIST_ZIP, "w") as archive:
        archive.writestr("iNaturalist18_train.txt", trained)
    outcome = run("import", source, "--target", target)
    assert outcome["A/good.txt"] == "imported" and outcome["A/absent.txt"] == "not there"
    assert (target / "A" / "good.txt").read_bytes() == good
    assert (target / make_data_txt.INATURALIST_TRAIN).read_bytes() == trained
    for data, reason in ((good + b"c.jpg 1\n", "3 lines instead of 2"), (b"a.jpg 0\nb.jpg 0\n", "another checksum")):
        (source / "A" / "good.txt").write_bytes(data)
        with pytest.raises(UserError, match=reason):
            run("import", source, "--target", target)
        assert (target / "A" / "good.txt").read_bytes() == good
