"""List files, decoding, and the loaders for large images, on images made here."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, script
from PIL import Image

from commands.command_line import Options
from data_loader.data_loaders import ImageNetLTDataLoader, ListDataLoader, Places_LT
from data_loader.image_lists import ImageList, decode, list_folder, to_tensor
from data_loader.samplers import balanced_order
from data_loader.tensor_transforms import normalize
from evaluation import adapt, load_run
from evaluation.evaluation import chosen_distributions
from evaluation.results import Predictions
from trainer import train
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.parse_config import read_json
from utils.torchvision_import import torchvision

COUNTS = [12, 6, 3]  # training images of the three classes
SIZE = 32


def make_image(label: int, number: int) -> Image.Image:
    generator = np.random.RandomState(100 * label + number)
    pixels = generator.randint(0, 80, (40, 56, 3))
    pixels[..., label] += 150
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of images with a training and a balanced test list."""
    root = tmp_path_factory.mktemp("images")
    for split, counts in (("train", COUNTS), ("test", [4, 4, 4])):
        lines = []
        for label, count in enumerate(counts):
            (root / split / f"class {label}").mkdir(parents=True)
            for number in range(count):
                name = f"{split}/class {label}/{number}.png"
                make_image(label, number + 50 * (split == "test")).save(root / name)
                lines.append(f"{name} {label}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def list_options(folder, **options) -> dict:
    """Arguments of a ListDataLoader."""
    return {
        "data_dir": str(folder),
        "train_list": str(folder / "train.txt"),
        "test_list": str(folder / "test.txt"),
        "batch_size": 8,
        "image_size": SIZE,
        "num_workers": 0,
        "distributions": ["forward2", "uniform", "backward2"],
        **options,
    }


def make(folder, **options) -> ListDataLoader:
    return ListDataLoader(**list_options(folder, **options))


# --- lists ---


def test_lists_keep_paths_with_blanks_and_labels(folder):
    images = ImageList.read(folder / "train.txt", folder)
    assert len(images) == 21 and images.name(20) == "train/class 2/2.png" and images.path(0).exists()
    assert np.bincount(images.targets).tolist() == COUNTS


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg 0\nb c.jpg 12\n",
        "a.jpg 0\r\nb c.jpg 12\r\n",
        "a.jpg\t0\nb c.jpg 12",
        "\na.jpg   0\n\nb c.jpg 12 \n\n",
        "a.jpg 0\rb c.jpg 12\r",
    ],
)
def test_any_white_space_between_path_and_label(tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text.encode())
    images = ImageList.read(tmp_path / "list.txt", tmp_path)
    assert images.names() == ["a.jpg", "b c.jpg"] and images.targets.tolist() == [0, 12]
    assert [images.name(0), images.path(1)] == ["a.jpg", tmp_path / "b c.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\nc.jpg 1\n", 'line 2: "b.jpg" should be a path'),
        ("a.jpg 0\nb.jpg one\n", "line 2"),
        ("a.jpg -1\n", "line 1"),
        ("a.jpg 1.5\n", "line 1"),
        ("a.jpg 99999999\n", "of 7 digits at most"),
        ("a.jpg " + "9" * 5000, "line 1"),
        ("x" * 100_000, "line 1"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ],
)
def test_wrong_lists_name_the_line(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        ImageList.read(tmp_path / "list.txt", tmp_path)
    assert len(str(caught.value)) < 1000


def test_labels_of_seven_digits_take_no_memory_to_refuse(folder, tmp_path):
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 9999999\n")
    with pytest.raises(UserError, match="has no image of class 1: labels must run from 0"):
        make(folder, train_list=str(tmp_path / "train.txt"))


def test_missing_list_and_labels_out_of_range(folder, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        ImageList.read(tmp_path / "absent.txt", tmp_path)
    (tmp_path / "test.txt").write_text("a.png 3\n")
    with pytest.raises(UserError, match="a.png has the label 3, and the training list has 3 classes"):
        make(folder, test_list=str(tmp_path / "test.txt"))
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 2\n")
    with pytest.raises(UserError, match="has no image of class 1"):
        make(folder, train_list=str(tmp_path / "train.txt"))


# --- decoding ---


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = Image.fromarray(np.full((8, 12, 3), (200, 100, 50), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    kinds = {
        "rgb.png": rgb,
        "gray.png": rgb.convert("L"),
        "palette.png": rgb.convert("P"),
        "alpha.png": rgb.convert("RGBA"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "bits16.png": Image.fromarray(np.full((8, 12), 200 * 256, np.uint16)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        decoded = decode(tmp_path / name)
        assert decoded.mode == "RGB" and decoded.size == (12, 8)
        expected = {"gray.png": 124, "bits16.png": 200, "palette.png": None}.get(name, 200)
        if expected:
            assert abs(int(np.asarray(decoded)[4, 6, 0]) - expected) <= 4, name
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (8, 12)


def broken_list(folder, tmp_path, name: str):
    (tmp_path / "train.txt").write_text(f"{name} 0\n" + (folder / "train.txt").read_text())
    return str(tmp_path / "train.txt")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_and_is_named_or_is_left_out(folder, tmp_path, workers):
    data = (folder / "train" / "class 0" / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    train_list = broken_list(folder, tmp_path, "broken.png")
    loader = make(folder, train_list=train_list, num_workers=workers)
    stopping = make(folder, train_list=train_list, num_workers=workers, on_bad_image="stop")
    for batches in (loader, stopping.read(loader.train_images).batches()):
        with pytest.raises(UserError, match=r"^The image .*broken\.png cannot be decoded .*: mend") as caught:
            list(batches)
        assert "Traceback" not in str(caught.value)
    batches = list(make(folder, train_list=train_list, num_workers=workers, on_bad_image="skip"))
    assert sum(len(target) for _, target in batches) == sum(COUNTS)


@pytest.fixture
def damaged(folder, tmp_path):
    """Test and validation lists, each with the image before last cut off, and a folder with two such images."""
    data = (folder / "train" / "class 0" / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    lines = (folder / "test.txt").read_text().splitlines()
    (tmp_path / "test.txt").write_text("\n".join([*lines, "cut.png 2", "nowhere.png 1"]) + "\n")
    (tmp_path / "new").mkdir()
    for number in range(4):
        make_image(1, number).save(tmp_path / "new" / f"{number}.ppm")
    (tmp_path / "new" / "1.ppm").write_bytes(b"P6\n40 40\n255\nxx")
    (tmp_path / "new" / "2.ppm").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_in_evaluation(folder, damaged, workers):
    damaged_list = str(damaged / "test.txt")
    whole, loader = make(folder), make(folder, test_list=damaged_list, on_bad_image="skip", num_workers=workers)
    batches = loader.test.batches()
    ((images, targets),) = batches
    assert torch.equal(images[:12], next(iter(whole.test.batches()))[0]) and (images[12:] < -1).all()
    assert targets.tolist() == batches.targets.tolist() and targets[12:].tolist() == [2, 1]
    assert {index: (bad.name, bad.reason.split(" (")[0]) for index, bad in batches.bad.items()} == {
        12: ("cut.png", "cannot be decoded"),
        13: ("nowhere.png", "is missing"),
    }
    ((first, second),) = loader.test.views(np.array([12, 3]), pass_number=0)
    assert first.shape == second.shape == (2, 3, SIZE, SIZE) and not torch.equal(first[0], first[1])
    ((none, _),) = loader.test.select(np.array([12, 13])).batches()
    assert none.shape == (2, 3, SIZE, SIZE) and torch.equal(none, images[12:])
    with pytest.raises(UserError, match=r"cut\.png cannot be decoded"):
        list(make(folder, test_list=damaged_list, num_workers=workers).test.batches())


def small_list_config(folder, tmp_path, **options) -> dict:
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    config["arch"]["args"] |= {"num_classes": 3, "num_experts": 2, "layer2_output_dim": 16, "layer3_output_dim": 16}
    config["trainer"] |= {"epochs": 1, "save_dir": str(tmp_path), "tensorboard": False}
    data = list_options(folder, **{"distributions": ["uniform", "backward2"], **options})
    return {**config, "data_loader": {"type": "ListDataLoader", "args": data}}


def test_bad_images_are_left_out_and_listed_from_training_to_prediction(folder, damaged, capsys):
    data = (folder / "train" / "class 0" / "1.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    lists = {"train_list": broken_list(folder, damaged, "broken.png"), "test_list": str(damaged / "test.txt")}
    config = small_list_config(folder, damaged, on_bad_image="skip", **lists)
    config["trainer"]["epochs"] = 2
    trained = train(config)
    listed = pd.read_csv(Path(trained["run_dir"]) / "bad_images.csv")
    assert listed["path"].tolist() == ["broken.png", "cut.png", "nowhere.png"]
    assert listed["list"].tolist() == [lists["train_list"], *[lists["test_list"]] * 2]
    text = capsys.readouterr().out
    assert text.count("1 of 22 images are left out: broken.png cannot be decoded") == 1  # not in every epoch
    assert "2 of 14 images are left out: cut.png cannot be decoded" in text

    last = Path(trained["last"])
    tested = script("test").main(Options(checkpoint=last))
    assert tested["distributions"]["uniform"]["images"] == 12 and "2 of 14 test images cannot be" in tested["protocol"]
    assert tested["remark"] == "2 test images cannot be decoded and are left out"
    assert pd.read_csv(last.parent / "results/last/test/bad_images.csv")["path"].tolist() == ["cut.png", "nowhere.png"]
    run = load_run(last, overrides={"averaged_views": 1})
    assert run.excluded.tolist() == [12, 13] and len(run.without_bad_images().test_logits) == 12
    chosen = chosen_distributions(run, None)
    assert sorted(chosen["uniform"].tolist()) != list(range(12)) and not set(chosen["uniform"]) & {12, 13}
    assert not set(run.labeled_draw(2).tolist()) & {12, 13}
    learned = adapt(run, names=["uniform"])
    assert learned.distributions["uniform"].images == len(chosen["uniform"])

    # The list of an evaluation is removed where there is nothing to list any more.
    mended = Options({"data_loader;args;test_list": str(folder / "test.txt")}, last)
    assert "remark" not in script("test").main(mended)
    assert not (last.parent / "results/last/test/bad_images.csv").exists()


def test_predicting_skips_bad_images_unless_told_to_stop(folder, damaged, capsys):
    last = Path(train(small_list_config(folder, damaged))["last"])
    predicted = script("predict_folder").main(Options({}, last, output=damaged / "out", images=damaged / "new"))
    table, bad = (pd.read_csv(damaged / "out" / f"{name}.csv") for name in ("predictions", "bad_images"))
    assert table["path"].tolist() == ["0.ppm", "3.ppm"] and bad["path"].tolist() == ["1.ppm", "2.ppm"]
    assert (predicted["images"], predicted["bad_images"]) == (2, 2)
    assert "2 of 4 images are left out: 1.ppm cannot be decoded" in capsys.readouterr().out
    stop = {"data_loader;args;on_bad_image": "stop"}
    with pytest.raises(UserError, match=r"1\.ppm cannot be decoded"):
        script("predict_folder").main(Options(stop, last, output=damaged / "out", images=damaged / "new"))
    for name in ("0.ppm", "3.ppm"):
        (damaged / "new" / name).write_bytes(b"")
    with pytest.raises(UserError, match="None of the 4 images of .*new can be decoded"):
        script("predict_folder").main(Options({}, last, output=damaged / "none", images=damaged / "new"))


def test_a_mistyped_folder_is_refused_before_training(folder, tmp_path):
    with pytest.raises(UserError, match="There is no folder .*mistyped"):
        lists = {f"{split}_list": str(folder / f"{split}.txt") for split in ("train", "test")}
        train(small_list_config(folder / "mistyped", tmp_path, **lists))
    with pytest.raises(UserError, match=f"No image of .*train.txt .* did you mean the folder {folder} "):
        train(small_list_config(folder, tmp_path, data_dir=str(folder / "test")))
    listed = broken_list(folder, tmp_path, "nowhere.png")
    with pytest.raises(UserError, match=r"1 of 22 images .* that were looked up are missing, such as .*nowhere"):
        train(small_list_config(folder, tmp_path, train_list=listed))
    make(folder, train_list=listed, on_bad_image="skip").check_files()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no run folder was made


@pytest.mark.parametrize(
    "before",
    ["", "DataLoader._mark_worker_as_unavailable = lambda *_, **__: None"],
    ids=["told", "not told"],
)
def test_worker_processes_end_with_python(folder, before):
    """Also where the loader is part of a cycle, which Python does not take apart at its end, and where a worker does
    not hear that it is to end."""
    program = (
        "import sys; from data_loader.data_loaders import ListDataLoader\n"
        "from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as DataLoader\n"
        f"{before}\n"
        "root = sys.argv[1]\n"
        "loader = ListDataLoader(root, f'{root}/train.txt', f'{root}/test.txt', 8, image_size=32, num_workers=1)\n"
        "batches = iter(loader); next(batches); loader.cycle = [loader, batches]; del loader, batches\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, timeout=120, capture_output=True)
    assert done.returncode == 0 and not done.stderr


# --- augmentation ---


def training_batch(folder, **options) -> torch.Tensor:
    return torch.cat([images for images, _ in make(folder, shuffle=False, **options)])


def test_every_augmentation_argument_changes_training(folder):
    plain = training_batch(folder)
    explicit = {"flip": True, "crop_scale": [0.08, 1.0], "rand_augment": 0, "color_jitter": 0.4}
    assert torch.equal(training_batch(folder, **explicit), plain)
    for options in ({"flip": False}, {"crop_scale": [0.9, 1.0]}, {"rand_augment": 2}, {"color_jitter": 0.0}):
        assert not torch.equal(training_batch(folder, **options), plain), options
    weak, strong = (training_batch(folder, rand_augment=2, rand_augment_magnitude=m) for m in (1, 20))
    assert not torch.equal(weak, strong) and torch.equal(
        training_batch(folder, rand_augment=2), training_batch(folder, rand_augment=2, num_workers=2)
    )


def test_nothing_is_mirrored_where_flip_is_off(tmp_path):
    """Images that are dark on the left stay so, in training, in random views and in averaged ones."""
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    for number in range(16):
        Image.fromarray(ramp).save(tmp_path / f"{number}.png")
    (tmp_path / "list.txt").write_text("".join(f"{number}.png {number % 2}\n" for number in range(16)))

    def darker_left(images: torch.Tensor) -> torch.Tensor:
        rows = images.mean(dim=(1, 2))
        return rows[:, 0] < rows[:, -1]

    for flip in (True, False):
        loader = make(tmp_path, train_list=str(tmp_path / "list.txt"), test_list=str(tmp_path / "list.txt"), flip=flip)
        train_images = torch.cat([images for images, _ in loader])
        view, _ = next(iter(loader.test.views(np.arange(16), 0)))
        crops, _ = next(iter(loader.test.mild_view(2)))
        for images in (train_images, view, crops):
            assert bool(darker_left(images).all()) != flip
        assert loader.mild_view_numbers(1) == ([0, 1, 2] if flip else [0, 2])


def test_an_absent_image_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png is missing"):
        list(make(folder, train_list=broken_list(folder, tmp_path, "nowhere.png")))


# --- loaders ---


def test_training_batches(folder):
    loader = make(folder)
    batches = list(loader)
    assert len(batches) == len(loader) == 3 and loader.cls_num_list == COUNTS
    assert batches[0][0].shape == (8, 3, SIZE, SIZE) and batches[0][0].dtype == torch.float32
    assert torch.bincount(torch.cat([target for _, target in batches])).tolist() == COUNTS


def test_epochs_repeat_whatever_the_workers(folder):
    def epoch(loader, number):
        loader.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    alone, shared = make(folder), make(folder, num_workers=2)
    before = torch.get_rng_state()
    first = epoch(alone, 1)
    assert torch.equal(before, torch.get_rng_state())  # the loader leaves the global generator alone
    assert not torch.equal(first, epoch(alone, 2))
    assert torch.equal(epoch(shared, 5), epoch(alone, 5)) and torch.equal(epoch(shared, 1), first)


def test_test_images_are_resized_and_cropped_as_torchvision_does(folder):
    loader = make(folder)
    ((images, targets),) = loader.test.batches()
    t = torchvision().transforms
    pipeline = t.Compose([t.Resize(round(SIZE * 256 / 224)), t.CenterCrop(SIZE)])
    expected = to_tensor(pipeline(Image.open(loader.test_images.path(7)).convert("RGB"))).permute(2, 0, 1)
    torch.testing.assert_close(images[7], normalize(expected[None], loader.mean, loader.std)[0])
    assert targets.tolist() == loader.test.batches().targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loader.split_validation().source == "test set"
    assert make(folder, val_list=str(folder / "train.txt")).split_validation().source == "validation set"
    assert make(folder, val_list=str(folder / "test.txt")).split_validation().source == "test set"


def test_two_views(folder):
    loader = make(folder)
    ((first, second),) = loader.test.views(np.array([3, 11, 5]), pass_number=0)
    assert first.shape == (3, 3, SIZE, SIZE) and not torch.equal(first, second)
    ((again, _),) = loader.test.views(np.array([5, 3]), pass_number=0)
    torch.testing.assert_close(again, first[[2, 0]], rtol=0, atol=0)
    ((other, _),) = loader.test.views(np.array([5, 3]), pass_number=1)
    assert not torch.equal(other, again)


def test_mild_views(folder):
    loader, shared = make(folder), make(folder, num_workers=2)
    ((image, targets),) = loader.test.batches()
    views = {number: next(iter(loader.test.mild_view(number))) for number in loader.mild_view_numbers(2)}
    assert list(views) == [0, 1, 2, 3] and all(torch.equal(view[1], targets) for view in views.values())
    assert torch.equal(views[0][0], image) and torch.equal(views[1][0], image.flip(3))
    assert views[2][0].shape == (12, 3, SIZE, SIZE) and not torch.equal(views[2][0], views[3][0])
    assert torch.equal(next(iter(shared.test.mild_view(2)))[0], views[2][0])  # whatever the workers
    loader.prepare(torch.device("cpu"), seed=8)
    assert not torch.equal(next(iter(loader.test.mild_view(2)))[0], views[2][0])
    assert len(loader.read(folder / "train").mild_view(3).targets) == sum(COUNTS)


def test_a_slice_of_the_training_list_validates(folder):
    loader, whole = make(folder, val_fraction=0.25), make(folder)
    assert loader.cls_num_list == [9, 4, 2] and loader.has_held_out_validation
    held_out = loader.split_validation()
    assert np.bincount(held_out.targets).tolist() == [3, 2, 1] and held_out.source == "validation set"
    assert sorted(loader.train_images.names() + loader.val_images.names()) == sorted(whole.train_images.names())
    assert loader.read_labeled(None).names == loader.val_images.names()
    with pytest.raises(ValueError, match="val_fraction is for data without validation images"):
        make(folder, val_fraction=0.25, val_list=str(folder / "train.txt"))


def test_held_out_validation_is_neither_trained_nor_tested_on(folder, tmp_path):
    assert not make(folder).has_held_out_validation
    for shared in ("train", "test"):
        assert not make(folder, val_list=str(folder / f"{shared}.txt")).has_held_out_validation
    (tmp_path / "val.txt").write_text("elsewhere/1.png 0\n")
    loader = make(folder, val_list=str(tmp_path / "val.txt"))
    assert loader.has_held_out_validation


class Rare(ListDataLoader):
    renumber = True


def test_labeled_images_by_a_list_and_by_folders(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("class 0\nclass 1\nclass 2\n")
    names = str(tmp_path / "classes.txt")
    listed = tmp_path / "labeled.txt"
    listed.write_text(f"test/class 2/0.png 2\n{folder}/test/class 1/3.png 1\n")
    loader = make(folder, class_names=names)
    ((images, targets),) = loader.read_labeled(listed).batches()
    assert targets.tolist() == [2, 1] and torch.equal(images, next(iter(loader.test.batches()))[0][[8, 7]])
    of_folders = loader.read_labeled(folder / "test")
    assert of_folders.batches().targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    backward = tmp_path / "train.txt"
    lines = [f"train/class {label}/{n}.png {2 - label}\n" for label, count in enumerate(COUNTS) for n in range(count)]
    backward.write_text("".join(lines))
    other = Rare(str(folder), str(backward), str(folder / "test.txt"), 8, image_size=SIZE)
    assert other.class_map == [2, 1, 0] and other.read_labeled(listed).targets.tolist() == [0, 1]


def test_labeled_images_that_were_trained_on_are_refused(folder, tmp_path):
    (tmp_path / "link.png").symlink_to(folder / "train" / "class 0" / "0.png")
    for name in ("train/class 1/0.png", f"{folder}/train/../train/class 1/0.png", tmp_path / "link.png"):
        (tmp_path / "labeled.txt").write_text(f"test/class 2/0.png 2\n{name} 1\n")
        with pytest.raises(UserError, match="1 images of .*labeled.txt were trained on, such as .*train/class"):
            make(folder).read_labeled(tmp_path / "labeled.txt")
    with pytest.raises(UserError, match='Unknown class folder in .*train "class 0"'):
        make(folder).read_labeled(folder / "train")  # classes are called by number here
    (tmp_path / "labeled.txt").write_text("test/class 2/0.png 7\n")
    with pytest.raises(UserError, match="has the label 7, and the training list has 3 classes"):
        make(folder).read_labeled(tmp_path / "labeled.txt")


def test_other_test_images(folder):
    loader = make(folder)
    other = loader.read(folder / "train")
    assert len(other.batches().targets) == sum(COUNTS) and other.files.name(20) == "class 2/2.png"
    images = torch.cat([images for images, _ in other.batches()])
    ((of_list, _),) = loader.read(loader.train_images).batches()
    order = [loader.train_images.names().index(f"train/{name}") for name in other.files.names()]
    torch.testing.assert_close(images, of_list[order])
    ((first, _),) = other.views(np.array([20]), pass_number=0)
    assert first.shape == (1, 3, SIZE, SIZE)
    assert len(loader.test.batches().targets) == 12 and list(loader.test_distributions()) == list(loader.distributions)
    with pytest.raises(UserError, match="ListDataLoader reads image files: give a folder or an ImageList, not Tensor"):
        loader.read(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    with pytest.raises(UserError, match="no image file under"):
        loader.read(str(folder / "absent"))


def test_distributions_of_an_unbalanced_test_set(folder, tmp_path):
    lines = (folder / "test.txt").read_text().splitlines(keepends=True)
    (tmp_path / "test.txt").write_text("".join(lines[:4] + lines[4:6] + lines[8:11]))  # 4, 2, 3 images
    loader = make(folder, test_list=str(tmp_path / "test.txt"))
    counts = {
        name: np.bincount(loader.test_images.targets[indices], minlength=3).tolist()
        for name, indices in loader.test_distributions().items()
    }
    assert counts == {"forward2": [2, 1, 1], "uniform": [2, 2, 2], "backward2": [1, 1, 2]}


def test_balanced_sampling(folder):
    order = balanced_order(torch.tensor([0] * 90 + [1] * 9 + [2]), 6000, torch.Generator().manual_seed(0))
    times = torch.bincount(order, minlength=100)
    assert len(order) == 6000 and times.min() > 0
    classes = torch.stack([times[:90].sum(), times[90:99].sum(), times[99]])
    assert (classes - 2000).abs().max() < 150
    loader = make(folder, balanced=True, retain_epoch_size=False)
    assert sum(len(target) for _, target in loader) == 36 and len(loader) == 5
    assert sum(len(target) for _, target in make(folder, balanced=True)) == 21


def test_bad_arguments(folder):
    for options in (
        {"on_bad_image": "ignore"},
        {"image_size": 0},
        {"mean": [0.5]},
        {"distributions": ["up3"]},
        {"color_jitter": -0.1},
        {"color_jitter": float("nan")},
        {"crop_scale": [0.0, 1.0]},
        {"crop_scale": [0.9, 0.8]},
        {"crop_scale": [0.5]},
        {"crop_scale": [0.5, 1.5]},
        {"rand_augment": -1},
        {"rand_augment_magnitude": 31},
    ):
        with pytest.raises(ValueError):
            make(folder, **options)


# --- published data sets ---


def published(folder, tmp_path, name: str, train: list[int]):
    """Lists in the published places, with the classes numbered so that `train[c]` images are of class c."""
    root = tmp_path / name
    root.mkdir()
    prefix = name.split("_v2")[0]
    images = {split: ImageList.read(folder / f"{split}.txt", folder) for split in ("train", "test")}
    number = np.argsort(np.argsort(-np.array(train), kind="stable")).tolist()  # class c shows images of number[c]
    new = [number.index(old) for old in range(3)]
    for target, source in (("train", "train"), ("val", "test"), ("test", "test")):
        (root / f"{prefix}_{target}.txt").write_text(
            "".join(f"{images[source].name(i)} {new[images[source].targets[i]]}\n" for i in range(len(images[source])))
        )
    return root, prefix


def test_published_lists_give_the_distributions(folder, tmp_path):
    root, prefix = published(folder, tmp_path, "ImageNet_LT", [12, 6, 3])
    test = (root / f"{prefix}_test.txt").read_text().splitlines(keepends=True)
    (root / f"{prefix}_forward2.txt").write_text("".join(test[i] for i in (6, 0, 1, 9)))
    loader = ImageNetLTDataLoader(
        str(folder), 8, num_workers=0, image_size=SIZE, list_dir=str(tmp_path), distributions=["forward2"]
    )
    assert loader.test_distributions()["forward2"].tolist() == [6, 0, 1, 9]
    (root / f"{prefix}_forward2.txt").write_text("elsewhere.jpg 0\n")
    with pytest.raises(UserError, match="names elsewhere.jpg, which .* does not"):
        loader.test_distributions()


def test_places_labels_are_renumbered_by_frequency(folder, tmp_path):
    published(folder, tmp_path, "Places_LT_v2", [3, 12, 6])
    loader = Places_LT(str(folder), 8, num_workers=0, image_size=SIZE, list_dir=str(tmp_path))
    assert loader.cls_num_list == [12, 6, 3] and loader.class_map == [1, 2, 0] and loader.class_names == ["1", "2", "0"]
    assert np.bincount(loader.train_images.targets).tolist() == [12, 6, 3]
    assert loader.test_images.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


# --- from a folder of images to predictions, through the scripts ---


def test_one_s_own_images_from_end_to_end(folder, tmp_path):
    config = read_json(ROOT / "configs" / "config_custom_example.json")
    config["arch"]["args"] |= {"num_classes": 3, "layer3_output_dim": 32, "layer4_output_dim": 32}
    names = str(tmp_path / "classes.txt")
    config["data_loader"]["args"] |= list_options(folder, distributions=["forward2", "uniform"], class_names=names)
    config["trainer"] |= {"epochs": 2, "save_dir": str(tmp_path), "tensorboard": False}
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    last = Path(train(config)["last"])
    assert load_checkpoint(last)["class_names"] == ["red", "green", "blue"]
    results = script("test_all_imagenet").main(Options(checkpoint=last))
    assert [e["images"] for e in results["distributions"].values()] == [8, 12]
    test_time = read_json(ROOT / "configs" / "test_time_custom_example.json")
    learned = script("test_train_imagenet").main(Options(test_time, last))
    assert sum(learned["distributions"]["uniform"]["weights"]) == pytest.approx(1)

    options = Options(test_time, last, output=tmp_path / "out", images=folder / "test")
    predicted = script("predict_folder").main(options)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(table)[:3] == ["path", "class", "probability"] and len(table) == predicted["images"] == 12
    assert table["path"][5] == "class 1/1.png" and set(table["class"]) <= {"red", "green", "blue"}
    assert "averaged_views" not in predicted
    options = Options({**test_time, "averaged_views": 2}, last, output=tmp_path / "views", images=folder / "test")
    assert script("predict_folder").main(options)["averaged_views"] == 2
    options = Options(checkpoint=last, output=tmp_path / "recommended", images=folder / "test")
    recommended = script("predict_folder").main(options)
    assert recommended["aggregator"]["type"] == "PriorAggregator" and recommended["averaged_views"] == 4
    assert len(recommended["learning"]["prior"]) == 3 and recommended["weights"] is None
    averaged = pd.read_csv(tmp_path / "views" / "predictions.csv")
    assert (averaged["path"] == table["path"]).all() and (averaged["probability"] != table["probability"]).any()
    assert table["probability"].between(1 / 3, 1).all() and sum(predicted["weights"]) == pytest.approx(1)


def test_predicting_a_folder_without_images(trained_digits, tmp_path):
    with pytest.raises(UserError, match="no image file under"):
        list_folder(tmp_path)
    with pytest.raises(UserError, match="no image file under"):
        script("predict_folder").main(Options({}, Path(trained_digits), images=tmp_path))


def test_images_in_both_lists_are_warned_of(folder, capsys):
    make(folder, test_list=str(folder / "train.txt"))
    assert "21 images are in both" in capsys.readouterr().out


OVERLAPS = {
    "the same, written otherwise": "./train/class 0/0.png 0",
    "by dots": "test/../train/class 0/0.png 0",
    "by its absolute path": "{folder}/train/class 0/0.png 0",
    "through a link": "link/class 0/0.png 0",
    "with two strokes": "train//class 0/0.png 0",
}


@pytest.mark.parametrize("line", OVERLAPS.values(), ids=OVERLAPS)
def test_an_image_in_two_lists_is_noticed_however_it_is_written(folder, tmp_path, line, capsys):
    if not (folder / "link").exists():
        (folder / "link").symlink_to("train")
    lines = (folder / "test.txt").read_text() + line.format(folder=folder) + "\n"
    (tmp_path / "test.txt").write_text(lines)
    make(folder, test_list=str(tmp_path / "test.txt"))
    text = capsys.readouterr().out
    assert "1 images are in both" in text and "train/class 0/0.png: accuracy will be too high" in text
    assert text.count("images are in both") == 1
    (tmp_path / "test.txt").write_text(lines.replace(".png 0", ".png 1").replace("test/class", "test//class"))
    make(folder, test_list=str(tmp_path / "test.txt"))
    assert "train/class 0/0.png, 1 of them with two labels: accuracy" in capsys.readouterr().out


def test_the_published_way_to_list_is_not_remarked_on(folder, capsys):
    make(folder)
    make(folder, val_list=str(folder / "test.txt"))  # validation by test images, as with iNaturalist
    assert "image" not in capsys.readouterr().out


def test_validation_images_that_were_trained_on_or_are_tested(folder, tmp_path, capsys):
    make(folder, val_list=str(folder / "train.txt"))
    text = capsys.readouterr().out
    assert "21 images are in both" in text and "will be chosen by images that were trained on" in text
    (tmp_path / "val.txt").write_text((folder / "test.txt").read_text().splitlines()[3] + "\n")
    make(folder, val_list=str(tmp_path / "val.txt"))
    assert "the best checkpoint will be chosen by test images" in capsys.readouterr().out


def test_an_image_twice_in_a_list(folder, tmp_path, capsys):
    lines = (folder / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(lines + "train/class 0/1.png 0\n./train/class 0/1.png 0\n")
    make(folder, train_list=str(tmp_path / "train.txt"))
    text = capsys.readouterr().out
    assert "train.txt has 1 images more than once" in text and "two labels" not in text
    (tmp_path / "train.txt").write_text(lines + "train/class 0/1.png 2\n")
    make(folder, train_list=str(tmp_path / "train.txt"))
    assert "1 of them with two labels, such as" in capsys.readouterr().out


def test_names_that_are_no_utf8(folder, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9 \xff.png")
    make_image(0, 1).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    images = list_folder(tmp_path)
    assert list(images.paths.tolist()) == [b"caf\xe9 \xff.png"] and images.path(0).exists()
    ((batch, _),) = make(folder).read(tmp_path).batches()
    assert len(batch) == 1
    run = types.SimpleNamespace(path="last.pth", sha256="", epoch=1, selected_by="")
    predictions = Predictions(images.names(), torch.zeros(1, 2), ["a", "b"], {}, run)
    assert os.fsencode(predictions.table().to_csv(index=False)).splitlines()[1].startswith(b"caf\xe9 \xff.png,")


def test_thumbnails_of_files(folder, tmp_path):
    make_image(1, 2).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    good, bad = make(folder).read(tmp_path).thumbnails([0, 1], 28)
    assert good.size == (28, 20) and good.mode == "RGB" and bad is None


def test_class_names(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="has 2 lines and the training list 3 classes"):
        make(folder, class_names=str(tmp_path / "classes.txt"))
    with pytest.raises(UserError, match="class names .* cannot be read"):
        make(folder, class_names=str(tmp_path / "absent.txt"))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert make(folder, class_names=str(tmp_path / "classes.txt")).class_names == ["a", "b", "c"]
    assert make(folder).class_names == ["0", "1", "2"]
