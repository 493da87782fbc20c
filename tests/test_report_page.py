"""report.html: what it says, that it holds whatever names it is given, and how it looks to a browser."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from comparison.tables import cost_table, records
from evaluation.evaluation import Scorer
from evaluation.outcomes import Outcomes
from evaluation.results import CheckpointRecord, Predictions, Results
from report import evaluation_page, figures, prediction_page
from report.charts import linear_ticks, log_ticks
from report.comparison_page import Cell, Evaluated, comparison_page, verdict
from report.save import save_results

EVIL = "<script>document.title='gone'</script>"
CHECKPOINT = CheckpointRecord("runs/<b>last</b>.pth", "ab" * 32, 3, "the last so far", {"labels": "cd" * 16})


def thumbnails(indices, size: int) -> list[Image.Image | None]:
    """Pictures of two sizes; every fifth cannot be shown."""
    shapes = [(16, 16), (64, 40)]
    return [Image.new("RGB", shapes[i % 2], (i % 256, 80, 120)) if i % 5 else None for i in indices]


def made_results(classes: int = 12, images: int = 600, distributions: int = 3, adapted: bool = True) -> Results:
    """Results of random logits, adapted by what makes them better on the first distribution and worse on the last."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(images) % classes
    logits = torch.randn(images, 2, classes, generator=generator)
    logits[torch.arange(images), :, targets] += 1.5
    counts = [max(1, int(500 * 0.6**c)) for c in range(classes)]
    scorer = Scorer(logits, targets, counts)
    results = Results(CHECKPOINT, "In some way.", 1, "2", "cpu", {"aggregator": {"type": "PriorAggregator"}})
    results.classes = {"names": [EVIL, *(f"class {c}" for c in range(1, classes))], "training_images": counts}
    results.thumbnails = thumbnails
    names = ["forward10", "uniform", "backward10", *(f"more{k}" for k in range(distributions - 3))][:distributions]
    for number, name in enumerate(names):
        indices = np.arange(images)[number % 2 :]
        scores = torch.log_softmax(logits[indices].mean(dim=1), dim=1)
        scores[torch.arange(len(indices)), targets[indices]] += (0.8, 0.0, -0.8)[min(number, 2)]
        results.distributions[name] = (
            scorer.score_beside_equal_weights(indices, scores) if adapted else scorer.score_equal_weights(indices)
        )
        if adapted:
            results.distributions[name].learning = {"prior": [1 / classes] * classes, "note": None}
            results.distributions[name].weights = [0.5 + 0.1 * number, 0.5 - 0.1 * number]
    return results


def made_prediction() -> bytes:
    generator = torch.Generator().manual_seed(0)
    scores: Tensor = torch.log_softmax(3 * torch.randn(90, 20, generator=generator), dim=1)
    names = [f"folder/{EVIL}_{n}.png" for n in range(90)]
    classes = [EVIL, *(f"class {c}" for c in range(1, 20))]
    predictions = Predictions(names, scores, classes, {"prior": [0.05] * 20}, CHECKPOINT)
    record = {
        "images": 90,
        "folder": "images",
        "checkpoint": CHECKPOINT.to_json(),
        "aggregator": {"type": "PriorAggregator", "args": {}},
        "averaged_views": 4,
    }
    return prediction_page.prediction_page(predictions, list(range(20, 0, -1)), record, thumbnails)


def made_comparison() -> bytes:
    evaluated, rows = [], []
    for seed in (1, 2):
        for learned in (False, True):
            results = made_results(adapted=learned)
            row = "TADE, test-time training" if learned else "TADE, equal weights"
            where = {"data": "digits", "row": row, "seed": seed, "checkpoint": "last epoch"}
            evaluated.append(Evaluated(results=results, **where))
            rows += records(results, method="tade", **where)
    run = {"data": "digits", "method": "tade", "epochs": 2, "seconds": 60.0, "device": "cpu", "torch": "2"}
    cost = cost_table([run], {("digits", "tade"): pd.Series({"parameters": 1e6, "MACs": 1e9})})
    published = {"digits": pd.DataFrame({"uniform": ["49.8"]}, index=["TADE"])}
    return comparison_page(pd.DataFrame(rows), evaluated, cost, published, "reproduce.py", "abc", EVIL, ["python x.py"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    save_results(made_results(), folder, "test_train")
    (folder / "prediction.html").write_bytes(made_prediction())
    (folder / "comparison.html").write_bytes(made_comparison())
    files = {"evaluation": "report", "prediction": "prediction", "comparison": "comparison"}
    return {name: folder / f"{file}.html" for name, file in files.items()}


@pytest.fixture(scope="module")
def tab():
    """A page of a browser, and what it complained about or asked a network for."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("there is no Chromium to open the page in")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        yield page, problems
        browser.close()


PARTS = {
    "evaluation": [
        "#verdict",
        "#table tbody tr >> nth=2",
        ".accuracy svg >> visible=true",
        ".weights svg >> visible=true",
        ".per-class circle >> visible=true",
        ".reliability rect >> visible=true",
        ".mix svg >> visible=true",
        ".confusions img >> visible=true",
        ".worst tbody tr >> visible=true",
        "#settings",
    ],
    "prediction": [
        "#verdict",
        ".shares .track >> nth=14",
        ".mix svg",
        ".confidence rect",
        ".surest img",
        ".least img",
        "#settings",
    ],
    "comparison": [
        "#verdict",
        ".data tbody tr >> nth=1",
        ".accuracy svg >> visible=true",
        ".per-class svg >> visible=true",
        ".weights svg >> visible=true",
        "#cost tbody tr",
        "#commands pre",
        "#settings",
    ],
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_browser_finds_every_part_on_every_screen(kind, pages, tab):
    page, problems = tab
    for width, scheme in ((1280, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(pages[kind].as_uri())
        for selector in PARTS[kind]:
            assert page.locator(selector).first.is_visible(), (selector, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
        assert page.locator("script").count() == 0 and page.title() != "gone"
    assert page.get_by_text(EVIL).count() + page.get_by_title(EVIL).count() > 0
    assert problems == []


def test_a_distribution_is_chosen_without_a_script(pages, tab):
    page, _ = tab
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(pages["evaluation"].as_uri())
    assert page.locator(".panel >> visible=true").inner_text().startswith("uniform, 599 images")
    page.locator(".choice label", has_text="backward10").click()
    assert page.locator(".panel >> visible=true").inner_text().startswith("backward10, 600 images")
    title = page.locator(".panel3 .per-class circle").last.text_content()
    assert title.startswith("class 11: 1 training images, accuracy ") and title.endswith("(prior estimation)")


def test_the_page_holds_no_markup_of_strangers(pages):
    for path in pages.values():
        text = path.read_text()
        assert "<script" not in text and "&lt;script&gt;" in text and "<b>last</b>" not in text
        assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def entries(**differences: tuple[float, float, float]) -> dict:
    return {
        name: {"top1": 50.0, "difference_to_equal_weights": {"points": points, "interval": [low, high]}}
        for name, (points, low, high) in differences.items()
    }


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({"a": (15.2, 12, 18), "b": (0.1, -1, 1)}, "gains 15.2 points on a and loses nothing beyond chance"),
        ({"a": (15.2, 12, 18), "b": (-3.0, -4, -2)}, "gains 15.2 points on a, but loses 3.0 points on b."),
        ({"a": (2.0, 1, 3), "b": (3.0, 2, 4)}, "gains 3.0 points on b and gains on all 2"),
        ({"a": (0.3, -1, 1), "b": (-0.5, -2, 1)}, "no difference beyond chance on any of the 2"),
        ({"a": (0.0, 0, 0)}, "no difference beyond chance on a: 0.0 points (95 % interval 0.0 to 0.0)"),
        ({"a": (-3.0, -4, -2), "b": (0.0, -1, 1)}, "loses 3.0 points on a and gains nothing beyond chance"),
        ({"a": (-3.0, -4, -2), "b": (-5.0, -6, -4)}, "loses on 2 of 2 distributions (5.0 points on b)"),
        ({"a": (1.5, 1, 2)}, "gains 1.5 points on a (95 % interval +1.0 to +2.0)."),
    ],
)
def test_the_verdict_counts_what_is_beyond_chance(differences, expected):
    assert expected in evaluation_page.verdict(entries(**differences), "It")


def test_the_verdict_of_an_evaluation_alone():
    one = {"top1": 48.8, "top1_interval": [47.8, 49.8]}
    assert evaluation_page.verdict({"uniform": one}, "") == (
        "48.8 % of the images of uniform are classified correctly (95 % interval 47.8 to 49.8)."
    )
    text = evaluation_page.verdict({"a": {"top1": 58.4}, "uniform": one, "b": {"top1": 36.6}}, "")
    assert "of the balanced test images" in text and "from 36.6 % on b to 58.4 % on a elsewhere" in text


def test_files_of_before_and_single_experts_make_a_page():
    old = {"images": 10, "top1": 62.5, "many": 70.0, "medium": None, "few": 1.0, "experts_top1": [62.5]}
    content = {**Results(CHECKPOINT, "p", 1, "2", "cpu", {}).to_json(), "job": "test", "distributions": {"a": old}}
    text = evaluation_page.evaluation_page(content, {}).decode()
    assert "62.5\u00a0% of the images of a are classified correctly." in text and "A closer look" not in text


def test_with_many_classes_dots_are_means_and_the_page_stays_small():
    results = made_results(classes=1000, images=3000, distributions=5)
    outcomes = {name: (r.outcomes, r.equal_outcomes) for name, r in results.distributions.items()}
    content = {"job": "test_train", **results.to_json()}
    page = evaluation_page.evaluation_page(content, outcomes, thumbnails)
    assert b"classes of 1 to 1 images, mean" in page and len(page) < 3_000_000
    assert page.count(b"<img ") <= evaluation_page.MOST_PICTURES


def test_worst_classes_and_confusions_are_counted():
    results = made_results()
    outcomes = results.distributions["uniform"].outcomes
    found = evaluation_page.mistakes(outcomes, results.classes, None, 4)
    table = torch.zeros(12, 12, dtype=torch.int64).index_put_(
        (outcomes.targets, outcomes.prediction), torch.tensor(1), accumulate=True
    )
    accuracy = 100 * table.diagonal() / table.sum(dim=1)
    assert [row["accuracy"] for row in found["worst"]] == [f"{a:.1f}" for a in accuracy.sort().values.tolist()[:10]]
    wrong = table - table.diagonal().diag()
    assert found["confusions"][0]["times"].startswith(f"{int(wrong.max())} of ")
    assert not found["confusions"][0]["pictures"]


def cells(**rows: list[float]) -> dict:
    return {
        row: {f"d{i}": Cell(mean, 0.5, 2, 1000, None) for i, mean in enumerate(means)} for row, means in rows.items()
    }


def test_the_verdict_of_a_comparison():
    text = verdict(cells(a=[50.0, 60.0], b=[40.0, 59.5]))
    assert text.startswith("a is 5.2 points ahead of b in the mean over 2 distributions; ")
    assert text.endswith("beyond chance it leads on 1 of them and is behind on none.")
    assert verdict(cells(a=[50.0, 60.0], b=[65.0, 42.0])).endswith("leads on 1 of them and is behind on 1 (d0).")
    assert verdict(cells(a=[50.0], b=[49.0])) == "a is 1.0 points ahead of b in d0, not beyond chance."
    text = verdict(cells(a=[50.0, 60.0], b=[50.0, 60.0]))
    assert text.startswith("a and b are equal in the mean over 2") and "the first leads on none" in text
    assert verdict(cells(a=[50.0])) == "a has 50.0 % in d0."


def test_ticks_are_round():
    assert linear_ticks(0, 100) == [0, 20, 40, 60, 80, 100] and linear_ticks(47.3, 61) == [50, 55, 60]
    assert log_ticks(4.2, 575) == [5, 10, 20, 50, 100, 200, 500] and log_ticks(1, 5000) == [1, 10, 100, 1000]


def test_three_classes_stand_for_a_prediction():
    assert re.search(r"90 images, mostly [^,]* \(about \d+\), class \d+ \(about \d+\) and ", made_prediction().decode())


def test_the_figures_of_a_prediction_by_hand():
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]))
    predictions = Predictions(["x.png", "y.png", "z.png"], scores, ["ant", "bee", "cat"], {}, CHECKPOINT)
    record = {"images": 3, "folder": "in", "checkpoint": CHECKPOINT.to_json(), "weights": [0.25, None]}
    record["aggregator"] = {"type": "StabilityAggregator", "args": {}}

    def page() -> str:
        return prediction_page.prediction_page(predictions, [6, 3, 1], record, thumbnails).decode()

    text = page()
    for said in (
        "3 images, mostly bee (about 1) and ant (about 1); "
        "33.3\u00a0% are predicted with less than 50\u00a0% confidence.",
        "The class mix is the mean of the predicted probabilities.",
        "bee: 43.33\u00a0% estimated, 1 images predicted, 30.00\u00a0% of the training images",
        "ant: 40.00\u00a0% estimated, 2 images predicted, 60.00\u00a0% of the training images",
        "cat: 10.00\u00a0% training share, 16.67\u00a0% share here",
        "Median 70.0\u00a0%; 33.3\u00a0% of the images are below 50\u00a0%.",
        "70 to 75\u00a0%: 1 images",
        "40 to 45\u00a0%: 1 images",
        "y.png; bee: 80\u00a0%, ant: 10\u00a0%",
        "0.25, –",
    ):
        assert said.replace("\u00a0", " ") in text.replace("\u00a0", " "), said
    assert text.index('title="y.png') < text.index('title="z.png')  # the surest first

    assert prediction_page.verdict(1, [("ant", 0.7), ("bee", 0.2), ("cat", 0.1)], 0.0) == (
        "1 image, mostly ant (about 1); 0.0 % are predicted with less than 50 % confidence."
    )
    predictions.learning = {"prior": [0.2, 0.3, 0.5], "note": "the prior was hard to tell"}
    text = page()  # the headline goes by these images, not by the estimated prior
    assert "mostly bee (about 1)" in text and "cat: 50.00" in text and "the prior was hard to tell" in text
    assert "The class mix is the test prior that was estimated." in page()
    record["aggregator"]["type"] = "GivenPriorAggregator"
    assert "The class mix is the test prior that was given." in page()


def test_the_figures_of_a_distribution_by_hand():
    """Five images of three classes; confidences 0.9, 0.8, 0.7 right and 0.6, 0.5 wrong."""
    targets, prediction = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 2, 0])
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    outcomes = Outcomes(torch.arange(5), targets, prediction, confidence)
    classes = {"names": ["ant", "bee", "cat"], "training_images": [10, 40, 20]}
    entry = {"images": 5, "per_class_accuracy": [100.0, 50.0, 0.0]}

    def shown(entry: dict, pair: tuple) -> tuple[dict, list[str]]:
        panel = evaluation_page.panel(entry, pair, classes, "Some Way", True)
        return panel, [mark.title for mark in panel["mix"].marks if mark.title]

    panel, titles = shown(entry, (outcomes, None))
    assert titles == [
        "ant: 40.00 % true share, 60.00 % predicted share",
        "bee: 40.00 % true share, 20.00 % predicted share",
        "cat: 20.00 % true share, 20.00 % predicted share",
    ]
    assert panel["mix_title"].startswith("Predicted") and panel["mix_note"].startswith("20.0 % of the images")
    assert [m.title for m in panel["per_class"].marks if m.title] == [
        f"{name}: {count} training images, accuracy {value} % (some way)"
        for name, count, value in (("ant", 10, "100.0"), ("bee", 40, "50.0"), ("cat", 20, "0.0"))
    ]
    # |0.9 - 1| + |0.8 - 1| + |0.7 - 1| + 0.6 + 0.5, a fifth of it; 0.7 sure on average and 0.6 right
    assert panel["calibration"] == ("Calibration error 34.0 points; on average the network is 10.0 points too sure.")
    sure = Outcomes(torch.arange(5), targets, targets, torch.full((5,), 0.75))
    panel, titles = shown({**entry, "learning": {"prior": [0.5, 0.3, 0.2]}}, (sure, outcomes))
    assert titles[1] == "bee: 40.00 % true share, 30.00 % estimated share"
    assert panel["calibration"] == (
        "Calibration error 25.0 points (equal weights 34.0); on average the network is 25.0 points too unsure."
    )
    assert panel["mix_title"].startswith("Estimated") and panel["mix_note"].startswith("10.0 % of the images")
    assert [m.title for m in panel["per_class"].marks if m.title][:2] == [
        "ant: 10 training images, accuracy 100.0 % (equal weights)",
        "bee: 40 training images, accuracy 50.0 % (equal weights)",
    ]
    assert figures.class_means([("a", 1, 20.0), ("b", 1, 40.0), ("c", 1000, 90.0)]) == [
        (1.0, 30.0, "2 classes of 1 to 1 images, mean 30.0 %"),
        (1000.0, 90.0, "1 classes of 1000 to 1000 images, mean 90.0 %"),
    ]
    found = evaluation_page.mistakes(
        outcomes, classes, lambda places, size: [Image.new("RGB", (4, 4))] * len(places), 4
    )
    assert [[picture.title for picture in pair["pictures"]] for pair in found["confusions"]] == [
        ["image 3: bee, taken for cat (60 %)"],
        ["image 4: cat, taken for ant (50 %)"],
    ]
    assert [(row["name"], row["accuracy"], row["taken"]) for row in found["worst"]] == [
        ("cat", "0.0", "ant (1)"),
        ("bee", "50.0", "cat (1)"),
    ]
    assert [(row["true"], row["guess"], row["times"]) for row in found["confusions"]] == [
        ("bee", "cat", "1 of 2 images"),
        ("cat", "ant", "1 of 1 images"),
    ]
