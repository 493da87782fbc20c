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
from trainer.build import build_loader
from trainer.training import training_config
from utils.errors import UserError

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
    written = pd.read_csv(out / "train_class_counts.csv")
    assert written.to_numpy().tolist() == [["cat", 3, "few"], ["dog", 7, "few"], ["emu", 1, "few"]]
    assert "<title>dog: 7 images (few)</title>" in (out / "train_class_counts.svg").read_text()
    (folder / "images" / "dog" / "4.png").unlink()
    (folder / "images" / "dog" / "5.png").unlink()
    with pytest.raises(UserError, match=r"2 of 17 images .* are not under .*, the first is dog/[45].png"):
        (out / "all.txt").write_text((out / "train.txt").read_text() + (out / "test.txt").read_text())
        main(["check", str(out / "all.txt"), images])


def test_from_folder_bad_input(folder):
    with pytest.raises(UserError, match="No class of .* has an image left for the test list: lower --test_per_class"):
        main(["from-folder", str(folder / "images"), str(folder), "--test_per_class", "9"])
    with pytest.raises(UserError, match=f"holds 1 class folder.s. with images.*: give {folder / 'images'}, or put"):
        main(["from-folder", str(folder), str(folder / "lists")])
    with pytest.raises(UserError, match="There is no folder"):
        main(["from-folder", str(folder / "absent"), str(folder)])
    with pytest.raises(UserError, match="holds 0 class folder"):
        main(["from-folder", str(folder / "images" / "cat"), str(folder)])


def make_images(root: Path, counts: dict[str, int], suffix: str = "png") -> None:
    """Folders of a few images each, by their paths."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number:05d}.{suffix}")


def listed(folder: Path, split: str) -> list[tuple[str, int]]:
    images = ImageList.read(folder / f"{split}.txt", "")
    return list(zip(images.names(), images.targets.tolist(), strict=True))


def from_folder(folder: Path, out: Path, *options) -> dict:
    return main(["from-folder", str(folder), str(out), *map(str, options)])


def test_whatever_pillow_opens_without_what_file_managers_leave(tmp_path, capsys):
    make_images(tmp_path / "f", {"a": 4, "b": 3}, "ppm")
    for name in ("a/.DS_Store", "a/._00000.ppm", "a/Thumbs.db", "b/desktop.ini", "a/x.heic", "b/y.HEIC", "a/README"):
        (tmp_path / "f" / name).write_bytes(b"x")
    make_images(tmp_path / "f", {"__MACOSX/a": 2, ".git/a": 2, "b/__MACOSX": 1})
    Image.new("L", (8, 8)).save(tmp_path / "f" / "a" / "z.PGM", format="PPM")
    Image.new("L", (8, 8)).save(tmp_path / "f" / "loose.png")
    assert from_folder(tmp_path / "f", tmp_path / "o", "--test_per_class", 1) == {"classes": 2, "train": 6, "test": 2}
    names = [name for split in ("train", "test") for name, _ in listed(tmp_path / "o", split)]
    assert "a/z.PGM" in names and all(name.lower().endswith(("ppm", "pgm")) and "/." not in name for name in names)
    text = capsys.readouterr().out
    assert "left out: 2 .heic, 1 without an ending." in text and "1 images that are in no class folder" in text
    assert main(["check", str(tmp_path / "o" / "train.txt"), str(tmp_path / "f"), "--num_workers", "0"])["images"] == 6


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "Testing")])
def test_a_layout_of_splits_is_taken_as_it_is(tmp_path, names, capsys):
    train, val, test = names
    make_images(tmp_path / "f", {f"{train}/a": 3, f"{train}/b": 2, f"{val}/a": 1, f"{test}/a": 2, f"{test}/b": 1})
    make_images(tmp_path / "f", {f"{test}/z": 1, f"{train}/empty": 0})
    counts = from_folder(tmp_path / "f", tmp_path / "o")
    assert counts == {"classes": 2, "train": 5, "val": 1, "test": 3}
    assert listed(tmp_path / "o", "val") == [(f"{val}/a/00000.png", 0)]
    assert listed(tmp_path / "o", "test")[2] == (f"{test}/b/00000.png", 1)
    assert (tmp_path / "o" / "classes.txt").read_text() == "a\nb\n"
    text = capsys.readouterr().out
    assert "are no classes: empty." in text and "not trained on are left out: z." in text
    assert f'--set "data_loader;args;val_list={tmp_path / "o" / "val.txt"}"' in text and "num_classes=2" in text


def test_validation_images_test_where_there_are_no_others(tmp_path):
    make_images(tmp_path / "f", {"train/a": 3, "train/b": 2, "valid/a": 1})
    assert from_folder(tmp_path / "f", tmp_path / "o") == {"classes": 2, "train": 5, "test": 1}
    assert listed(tmp_path / "o", "test") == [("valid/a/00000.png", 0)]


def test_other_folders_of_test_and_validation_images(tmp_path):
    make_images(tmp_path, {"f/a": 3, "f/b": 2, "t/a": 1, "t/b": 2, "f/v/a": 1})
    options = ("--test", tmp_path / "t", "--val", tmp_path / "f" / "v", "--exclude", "v")
    assert from_folder(tmp_path / "f", tmp_path / "o", *options) == {"classes": 2, "train": 5, "test": 3, "val": 1}
    assert listed(tmp_path / "o", "test")[0] == (f"{tmp_path}/t/a/00000.png", 0)  # elsewhere: absolute
    assert listed(tmp_path / "o", "val") == [("v/a/00000.png", 0)]
    with pytest.raises(UserError, match="should hold folders with the names of the classes"):
        from_folder(tmp_path / "f", tmp_path / "o", "--test", tmp_path, "--exclude", "v")
    with pytest.raises(UserError, match="holds no class folders"):
        from_folder(tmp_path / "f", tmp_path / "o", "--test", tmp_path / "t" / "a", "--exclude", "v")


def test_a_layout_that_is_not_clear_is_refused(tmp_path):
    make_images(tmp_path / "f", {"train/a": 2, "train/b": 2, "test/a": 1, "meta/x": 1})
    with pytest.raises(UserError, match=r"holds train/ beside other folders \(meta\): leave these out with --exclude"):
        from_folder(tmp_path / "f", tmp_path / "o")
    assert from_folder(tmp_path / "f", tmp_path / "o", "--exclude", "meta")["test"] == 1
    make_images(tmp_path / "f", {"Test/a": 2})
    with pytest.raises(UserError, match="mean the same: leave one out with --exclude"):
        from_folder(tmp_path / "f", tmp_path / "o", "--exclude", "meta")
    make_images(tmp_path / "vehicles", {"train": 3, "tram": 3})  # a class that is called so
    assert from_folder(tmp_path / "vehicles", tmp_path / "o", "--test_per_class", 1)["classes"] == 2


def test_test_images_without_labels_are_not_listed(tmp_path, capsys):
    make_images(tmp_path / "f", {"Train/a": 3, "Train/b": 3, "Test": 4})
    assert from_folder(tmp_path / "f", tmp_path / "o", "--test_per_class", 1) == {"classes": 2, "train": 4, "test": 2}
    assert "have no labels: not listed" in capsys.readouterr().out


def test_small_classes_stay_in_training(tmp_path, capsys):
    make_images(tmp_path / "f", {"a": 9, "b": 6, "c": 2, "d": 1, "e": 0})
    options = ("--test_per_class", 3, "--val_per_class", 2)
    counts = from_folder(tmp_path / "f", tmp_path / "o", *options)
    assert counts == {"classes": 4, "train": 8, "test": 6, "val": 4}
    by_class = {
        split: np.bincount([label for _, label in listed(tmp_path / "o", split)])
        for split in counts
        if split != "classes"
    }
    assert {split: of.tolist() for split, of in by_class.items()} == {
        "train": [4, 1, 2, 1],
        "test": [3, 3],
        "val": [2, 2],
    }
    text = capsys.readouterr().out
    assert "2 of 4 classes are too small for 3 images in the test list and are not in it: c, d." in text
    assert "1 class folders without a training image are no classes: e." in text
    assert from_folder(tmp_path / "f", tmp_path / "o", "--min_images", 2, "--exclude", "b", "--test_per_class", 3) == {
        "classes": 2,
        "train": 8,
        "test": 3,
    }
    assert not (tmp_path / "o" / "val.txt").exists()  # of the call before
    with pytest.raises(UserError, match='Unknown class in --exclude "aa": did you mean "a"'):
        from_folder(tmp_path / "f", tmp_path / "o", "--exclude", "aa")
    with pytest.raises(UserError, match="exclude each other"):
        from_folder(tmp_path / "f", tmp_path / "o", "--val_per_class", 1, "--val", tmp_path / "f")


def test_frames_of_one_object_stay_together(tmp_path, capsys):
    """As in GTSRB: CLASS/TRACK_FRAME.ppm; the third class has one track."""
    for label, tracks in (("a", 5), ("b", 4), ("c", 1)):
        (tmp_path / "f" / label).mkdir(parents=True)
        for track in range(tracks):
            for frame in range(4):
                image = Image.new("RGB", (8, 8))
                image.save(tmp_path / "f" / label / f"{'abc'.index(label)}{track:04d}_{frame:05d}.ppm")
    options = ("--group", r"(\d+)_\d+", "--test_per_class", 3, "--val_per_class", 5)
    assert from_folder(tmp_path / "f", tmp_path / "o", *options) == {"classes": 3, "train": 16, "test": 8, "val": 16}
    tracks = {s: {name.split("_")[0] for name, _ in listed(tmp_path / "o", s)} for s in ("train", "test", "val")}
    assert not tracks["train"] & tracks["test"] and not tracks["train"] & tracks["val"]
    assert not tracks["test"] & tracks["val"] and sum(map(len, tracks.values())) == 10
    assert "1 of 3 classes are too small for 3 images in the test list and are not in it: c." in capsys.readouterr().out
    for pattern, message in (("x(y)", "is found in none"), ("\\d+", "has no group"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=message):
            from_folder(tmp_path / "f", tmp_path / "o", "--group", pattern)


def test_a_group_in_two_classes_stays_together(tmp_path):
    """Patient 1 has images in both classes."""
    for name in ("a/p1_0", "a/p2_0", "a/p3_0", "b/p1_0", "b/p1_1", "b/p4_0", "b/p5_0"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "f" / f"{name}.png")
    for seed in range(6):
        from_folder(tmp_path / "f", tmp_path / "o", "--group", r"(p\d)_", "--test_per_class", 1, "--seed", seed)
        train, test = ({name[2:4] for name, _ in listed(tmp_path / "o", split)} for split in ("train", "test"))
        assert not train & test and train | test == {"p1", "p2", "p3", "p4", "p5"}


def test_groups_on_both_sides_of_given_folders_are_named(tmp_path, capsys):
    make_images(tmp_path / "f", {"train/a": 3, "train/b": 3, "test/a": 1})
    from_folder(tmp_path / "f", tmp_path / "o", "--group", r"(\d+).png")
    assert "1 groups are in training and in the folders given" in capsys.readouterr().out


def test_the_printed_command_line_is_the_config(tmp_path, capsys):
    make_images(tmp_path / "my photos" / "2024", {"a": 3, "b": 3})
    from_folder(tmp_path / "my photos" / "2024", tmp_path / "o", "--test_per_class", 1)
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py"))
    program, name, *words = shlex.split(command)
    assert (program, name) == ("python", "train.py")
    options = parse("", [str(ROOT / word) if word.startswith("configs/") else word for word in words], training=True)
    loader = build_loader(training_config(options.config), torch.device("cpu"))
    assert loader.class_names == ["a", "b"] and loader.cls_num_list == [2, 2] and options.run_id == "first"
    loader.check_files()


def test_check_decodes_and_lists_what_it_cannot(folder, capsys):
    images, out = folder / "images", folder / "lists"
    from_folder(images, out, "--test_per_class", 1)
    Image.effect_noise((40, 40), 60).save(images / "dog" / "1.png")
    data = (images / "dog" / "1.png").read_bytes()
    for name, content in (("dog/1.png", data[: len(data) // 2]), ("dog/2.png", b""), ("cat/2.png", b"no image")):
        (images / name).write_bytes(content)
    (out / "train.txt").write_text("dog/1.png 1\ndog/2.png 1\ncat/2.png 0\ncat/0.png 0\n")
    with pytest.raises(UserError, match=r"3 of 4 images of .*train.txt cannot be decoded, see .*/plots/train_bad"):
        main(["check", str(out / "train.txt"), str(images), "--output", str(folder / "plots")])
    bad = pd.read_csv(folder / "plots" / "train_bad_images.csv")
    assert bad["path"].tolist() == ["dog/1.png", "dog/2.png", "cat/2.png"]
    assert bad["reason"][0].startswith("cannot be decoded (") and bad["reason"][1] == "is an empty file"
    assert bad["reason"][2] == "is no image that Pillow knows"
    text = capsys.readouterr().out
    assert "3 of 4 images cannot be used: dog/1.png cannot be decoded" in text and "  dog       2   few" in text


def test_the_right_folder_is_found(folder):
    images, out = folder / "images", folder / "lists"
    from_folder(images, out, "--test_per_class", 1)
    for wrong, advice in (
        (folder / "imagse", f"There is no folder .*: did you mean {images}?"),
        (folder, f"did you mean the folder {images} "),
        (images / "cat", f"did you mean the folder {images} "),
        (out, "its paths start with cat/: give the folder that holds it"),
    ):
        with pytest.raises(UserError, match=advice.replace("?", r"\?")):
            main(["check", str(out / "train.txt"), str(wrong)])
    with pytest.raises(UserError, match="did you mean .*lists/train.txt"):
        main(["check", str(out / "trian.txt"), str(images)])


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
    image = (folder / "images" / "cat" / "0.png").read_bytes()
    for name in names:
        with open(os.path.join(os.fsencode(folder / "images" / "cat"), name), "wb") as file:
            file.write(image)
    main(["from-folder", str(folder / "images"), str(folder / "lists"), "--test_per_class", "1"])
    listed = {
        path
        for split in ("train", "test")
        for path in ImageList.read(folder / "lists" / f"{split}.txt", "").paths.tolist()
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
