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

from commands.jobs import run_predict_folder
from data_loader.data_loaders import ImageNetLTDataLoader, ListDataLoader, Places_LT
from data_loader.image_lists import ImageList, decode, list_folder, to_tensor
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
        (None, "cannot be read"),
    ],
)
def test_wrong_lists_name_the_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        ImageList.read(tmp_path / "list.txt", tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "a.png 0\nb.png 2\n", "has no image of class 1: labels must run from 0"),
        ("train", "a.png 0\nb.png 9999999\n", "has no image of class 1"),  # takes no memory to refuse
        ("test", "a.png 3\n", "a.png has the label 3, and the training list has 3 classes"),
    ],
)
def test_labels_that_do_not_fit(folder, tmp_path, split, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        make(folder, **{f"{split}_list": str(tmp_path / "list.txt")})


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
def test_a_broken_image_stops_and_is_named_or_is_skipped(folder, tmp_path, workers):
    data = (folder / "train" / "class 0" / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    options = {"train_list": broken_list(folder, tmp_path, "broken.png"), "num_workers": workers}
    stopping = make(folder, on_bad_image="stop", **options)
    for batches in (make(folder, **options), stopping.read(stopping.train_images).batches()):
        with pytest.raises(UserError, match=r"^The image .*broken\.png cannot be decoded .*: mend") as caught:
            list(batches)
        assert "Traceback" not in str(caught.value)
    batches = list(make(folder, on_bad_image="skip", **options))
    assert sum(len(target) for _, target in batches) == sum(len(images) for images, _ in batches) == sum(COUNTS)


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
    tested = script("test").main(checkpoint=last)
    assert tested["distributions"]["uniform"]["images"] == 12 and "2 of 14 test images cannot be" in tested["protocol"]
    assert tested["remark"] == "2 test images cannot be decoded and are left out"
    assert pd.read_csv(last.parent / "results/last/test/bad_images.csv")["path"].tolist() == ["cut.png", "nowhere.png"]
    run = load_run(last, overrides={"averaged_views": 1})
    assert run.excluded.tolist() == [12, 13] and len(run.without_bad_images().test_logits) == 12
    chosen = chosen_distributions(run, None)
    assert sorted(chosen["uniform"].tolist()) != list(range(12)) and not set(chosen["uniform"]) & {12, 13}
    assert not set(run.labeled_draw(2).tolist()) & {12, 13}
    assert adapt(run, names=["uniform"]).distributions["uniform"].images == len(chosen["uniform"])

    # The list of an evaluation is removed where there is nothing to list any more.
    mended = dict(config={"data_loader;args;test_list": str(folder / "test.txt")}, checkpoint=last)
    assert "remark" not in script("test").main(**mended)
    assert not (last.parent / "results/last/test/bad_images.csv").exists()

    def predict(on_bad_image: str | None) -> dict:
        options = {"data_loader;args;on_bad_image": on_bad_image}
        arguments = dict(config=options, checkpoint=last, output=damaged / "out", images=damaged / "new")
        return run_predict_folder(**arguments)

    predicted = predict(None)
    table, bad = (pd.read_csv(damaged / "out" / f"{name}.csv") for name in ("predictions", "bad_images"))
    assert table["path"].tolist() == ["0.ppm", "3.ppm"] and bad["path"].tolist() == ["1.ppm", "2.ppm"]
    assert (predicted["images"], predicted["bad_images"]) == (2, 2)
    assert predicted["aggregator"]["type"] == "PriorAggregator" and predicted["averaged_views"] == 4
    assert "2 of 4 images are left out: 1.ppm cannot be decoded" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1\.ppm cannot be decoded"):
        predict("stop")
    for name in ("0.ppm", "3.ppm"):
        (damaged / "new" / name).write_bytes(b"")
    with pytest.raises(UserError, match="None of the 4 images of .*new can be decoded"):
        predict(None)


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


# --- loaders ---


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
        views = (
            batch[0] for batches in (loader.test.views(np.arange(16), 0), loader.test.mild_view(2)) for batch in batches
        )
        for images in (torch.cat([images for images, _ in loader]), *views):
            assert bool(darker_left(images).all()) != flip
            assert len({image.numpy().tobytes() for image in images}) >= 4  # each has a seed of its own
        assert loader.mild_view_numbers(1) == ([0, 1, 2] if flip else [0, 2])


def test_epochs_and_views_repeat_whatever_the_workers(folder):
    alone, shared = make(folder, rand_augment=2), make(folder, rand_augment=2, num_workers=2)
    for number in (5, 1):  # the workers stay alive
        for loader in (alone, shared):
            loader.set_epoch(number)
        for (images, _), (again, _) in zip(alone, shared, strict=True):
            assert torch.equal(images, again)
    assert torch.equal(next(iter(shared.test.mild_view(2)))[0], next(iter(alone.test.mild_view(2)))[0])


def test_test_images_are_resized_and_cropped_as_torchvision_does(folder):
    loader = make(folder)
    ((images, targets),) = loader.test.batches()
    t = torchvision().transforms
    pipeline = t.Compose([t.Resize(round(SIZE * 256 / 224)), t.CenterCrop(SIZE)])
    expected = to_tensor(pipeline(Image.open(loader.test_images.path(7)).convert("RGB"))).permute(2, 0, 1)
    torch.testing.assert_close(images[7], normalize(expected[None], loader.mean, loader.std)[0])
    assert targets.tolist() == loader.test.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_validation_images_of_a_list(folder, tmp_path):
    (tmp_path / "val.txt").write_text("elsewhere/1.png 0\n")
    for val_list, name, held_out in (
        (None, "test set", False),
        (folder / "test.txt", "test set", False),
        (folder / "train.txt", "validation set", False),
        (tmp_path / "val.txt", "validation set", True),
    ):
        loader = make(folder, val_list=val_list and str(val_list))
        assert (loader.split_validation().source, loader.has_held_out_validation) == (name, held_out)


def test_labeled_images_by_a_list_and_by_folders(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("class 0\nclass 1\nclass 2\n")
    listed = tmp_path / "labeled.txt"
    listed.write_text(f"test/class 2/0.png 2\n{folder}/test/class 1/3.png 1\n")
    loader = make(folder, class_names=str(tmp_path / "classes.txt"))
    ((images, targets),) = loader.read_labeled(listed).batches()
    assert targets.tolist() == [2, 1] and torch.equal(images, next(iter(loader.test.batches()))[0][[8, 7]])
    assert loader.read_labeled(folder / "test").targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    loader = Places_LT(**published(folder, tmp_path / "lists", "Places_LT_v2/Places_LT", [1, 2, 0]))
    assert loader.class_map == [1, 2, 0] and loader.read_labeled(listed).targets.tolist() == [1, 0]


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


def test_unlabeled_images_of_a_folder_or_a_list(folder):
    loader = make(folder)
    source, of_list = loader.read(folder / "train"), loader.read(loader.train_images)
    assert source.names[20] == "class 2/2.png" and source.targets.tolist() == [0] * sum(COUNTS)
    order = [of_list.names.index(f"train/{name}") for name in source.names]
    assert torch.equal(next(iter(source.batches()))[0], next(iter(of_list.batches()))[0][order])
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


@pytest.mark.parametrize(
    "options",
    [
        {"on_bad_image": "ignore"},
        {"image_size": 0},
        {"mean": [0.5]},
        {"crop_scale": [0.0, 1.0]},
        {"crop_scale": [0.9, 0.8]},
        {"crop_scale": [0.5]},
        {"crop_scale": [0.5, 1.5]},
        {"val_fraction": 0.25, "val_list": "val.txt"},
    ],
    ids=str,
)
def test_bad_arguments(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(folder, **options)


# --- published data sets ---


def published(folder, root: Path, name: str, labels: list[int], **options) -> dict:
    """Arguments of a loader of published lists: those of the folder, its labels 0, 1, 2 replaced by others."""
    path = root / name
    path.parent.mkdir(parents=True)
    for split, source in (("train", "train"), ("val", "test"), ("test", "test")):
        lines = (line[:-1] + str(labels[int(line[-1])]) for line in (folder / f"{source}.txt").read_text().splitlines())
        (root / f"{name}_{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    common = {"data_dir": str(folder), "batch_size": 8, "list_dir": str(root), "num_workers": 0, "image_size": SIZE}
    return {**common, **options}


def test_published_lists_give_the_distributions(folder, tmp_path):
    options = published(folder, tmp_path, "ImageNet_LT/ImageNet_LT", [0, 1, 2], distributions=["forward2"])
    listed = tmp_path / "ImageNet_LT" / "ImageNet_LT_forward2.txt"
    test = (folder / "test.txt").read_text().splitlines(keepends=True)
    listed.write_text("".join(test[i] for i in (6, 0, 1, 9)))
    loader = ImageNetLTDataLoader(**options)
    assert loader.test_distributions()["forward2"].tolist() == [6, 0, 1, 9]
    listed.write_text("elsewhere.jpg 0\n")
    with pytest.raises(UserError, match="names elsewhere.jpg, which .* does not"):
        loader.test_distributions()


def test_places_labels_are_renumbered_by_frequency(folder, tmp_path):
    (tmp_path / "names.txt").write_text("zero\none\ntwo\n")
    options = published(folder, tmp_path, "Places_LT_v2/Places_LT", [1, 2, 0])
    loader = Places_LT(**options)
    assert loader.cls_num_list == [12, 6, 3] and loader.class_map == [1, 2, 0] and loader.class_names == ["1", "2", "0"]
    assert np.bincount(loader.train_images.targets).tolist() == [12, 6, 3]
    assert loader.test_images.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert Places_LT(class_names=str(tmp_path / "names.txt"), **options).class_names == ["one", "two", "zero"]


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
    results = script("test_all_imagenet").main(checkpoint=last)
    assert [e["images"] for e in results["distributions"].values()] == [8, 12]
    test_time = read_json(ROOT / "configs" / "test_time_custom_example.json")
    learned = script("test_train_imagenet").main(config=test_time, checkpoint=last)
    assert sum(learned["distributions"]["uniform"]["weights"]) == pytest.approx(1)

    options = dict(config=test_time, checkpoint=last, output=tmp_path / "out", images=folder / "test")
    predicted = run_predict_folder(**options)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(table)[:3] == ["path", "class", "probability"] and len(table) == predicted["images"] == 12
    assert table["path"][5] == "class 1/1.png" and set(table["class"]) <= {"red", "green", "blue"}
    assert "averaged_views" not in predicted
    options = dict(
        config={**test_time, "averaged_views": 2}, checkpoint=last, output=tmp_path / "views", images=folder / "test"
    )
    assert run_predict_folder(**options)["averaged_views"] == 2
    averaged = pd.read_csv(tmp_path / "views" / "predictions.csv")
    assert (averaged["path"] == table["path"]).all() and (averaged["probability"] != table["probability"]).any()
    assert table["probability"].between(1 / 3, 1).all() and sum(predicted["weights"]) == pytest.approx(1)


# --- images that lists share ---


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


def test_which_lists_are_remarked_on(folder, tmp_path, capsys):
    (tmp_path / "val.txt").write_text((folder / "test.txt").read_text().splitlines()[3] + "\n")
    for val_list, remark in (
        (None, ""),
        (folder / "test.txt", ""),  # as with iNaturalist
        (folder / "train.txt", "the best checkpoint will be chosen by images that were trained on"),
        (tmp_path / "val.txt", "the best checkpoint will be chosen by test images"),
    ):
        make(folder, val_list=val_list and str(val_list))
        text = capsys.readouterr().out
        assert remark in text and bool(text) == bool(remark)


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
    predictions = Predictions(
        images.names(), torch.zeros(1, 2), ["a", "b"], {}, run, torch.zeros(2, 1, dtype=torch.int64), [1, 1]
    )
    assert os.fsencode(predictions.table().to_csv(index=False)).splitlines()[1].startswith(b"caf\xe9 \xff.png,")


def test_thumbnails_of_files(folder, tmp_path):
    make_image(1, 2).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    good, bad = make(folder).read(tmp_path).thumbnails([0, 1], 28)
    assert good.size == (28, 20) and good.mode == "RGB" and bad is None


def test_class_names(folder, tmp_path):
    path = tmp_path / "classes.txt"
    for text, message in ((None, "class names .* cannot be read"), ("a\nb\n", "has 2 lines and the training list 3")):
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            make(folder, class_names=str(path))
    path.write_text("a\nb\nc\n")
    assert make(folder, class_names=str(path)).class_names == ["a", "b", "c"]
    assert make(folder).class_names == ["0", "1", "2"]
