"""report.html: what it says, that it holds whatever names it is given, and how it looks to a browser."""

import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from comparison.tables import cost_table, records
from evaluation.evaluation import Scorer
from evaluation.outcomes import Outcomes
from evaluation.results import CheckpointRecord, DistributionResult, Predictions, Results
from report.charts import Chart, round_numbers
from report.comparison_page import Evaluated, comparison_page, leading
from report.evaluation_page import MOST_PICTURES, evaluation_page, mistakes, panel
from report.figures import counts_chart
from report.prediction_page import prediction_page
from report.save import save_results
from report.verdict import comparison_verdict, evaluation_verdict, prediction_verdict

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
    predictions = Predictions(
        names, scores, classes, {"prior": [0.05] * 20}, CHECKPOINT, scores.max(dim=1)[::-1], [1] * 20
    )
    record = {
        "images": 90,
        "folder": "images",
        "checkpoint": CHECKPOINT.to_json(),
        "aggregator": {"type": "PriorAggregator", "args": {}},
        "averaged_views": 4,
    }
    return prediction_page(predictions, list(range(20, 0, -1)), record, thumbnails)


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
    assert title.startswith("class 11, 1 training images: accuracy ") and title.endswith("(prior estimation)")


def test_the_page_holds_no_markup_of_strangers(pages):
    for path in pages.values():
        text = path.read_text()
        assert "<script" not in text and "&lt;script&gt;" in text and "<b>last</b>" not in text
        assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def adapted(**differences: tuple[float, float, float]) -> dict[str, DistributionResult]:
    return {
        name: DistributionResult(9, {}, [], difference_to_equal_weights={"points": points, "interval": [low, high]})
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
    assert expected in evaluation_verdict(adapted(**differences), "It")


def test_the_verdict_of_an_evaluation_alone():
    def result(top1: float) -> DistributionResult:
        return DistributionResult(9, {"top1": top1, "top1_interval": [47.8, 49.8]}, [])

    assert evaluation_verdict({"uniform": result(48.8)}, "") == (
        "48.8 % of the images of uniform are classified correctly (95 % interval 47.8 to 49.8)."
    )
    text = evaluation_verdict({"a": result(58.4), "uniform": result(48.8), "b": result(36.6)}, "")
    assert "of the balanced test images" in text and "from 36.6 % on b to 58.4 % on a elsewhere" in text


def test_the_verdict_of_a_comparison():
    def verdict(**rows: list[float]) -> str:
        mean = pd.DataFrame(rows).T.rename(columns=lambda i: f"d{i}").rename_axis("row").rename_axis("d", axis=1)
        return comparison_verdict(mean, leading(pd.DataFrame({"mean": mean.stack(), "variance": 2.0})))

    text = verdict(a=[50.0, 60.0], b=[40.0, 59.5])
    assert text.startswith("a is 5.2 points ahead of b in the mean over 2 distributions; ")
    assert text.endswith("beyond chance it leads on 1 of them and is behind on none.")
    assert verdict(a=[50.0, 60.0], b=[65.0, 42.0]).endswith("leads on 1 of them and is behind on 1 (d0).")
    assert verdict(a=[50.0], b=[49.0]) == "a is 1.0 points ahead of b in d0, not beyond chance."
    text = verdict(a=[50.0, 60.0], b=[50.0, 60.0])
    assert text.startswith("a and b are equal in the mean over 2") and "the first leads on none" in text
    assert verdict(a=[50.0]) == "a has 50.0 % in d0."


def test_the_verdict_of_a_prediction_names_classes_of_which_there_are_images():
    assert prediction_verdict(1200, [("ant", 900.4), ("bee", 299.0), ("cat", 0.4)], 3.04) == (
        "1,200 images, mostly ant (about 900) and bee (about 299); 3.0 % are predicted with less than 50 % confidence."
    )
    assert prediction_verdict(1, [("ant", 0.7), ("bee", 0.3)], 0.0).startswith("1 image, mostly ant (about 1); 0.0 %")
    assert prediction_verdict(1, [("ant", 0.4)], 0.0) == "1 image; 0.0 % are predicted with less than 50 % confidence."


def test_with_many_classes_dots_are_means_and_the_page_stays_small():
    page = evaluation_page(made_results(classes=1000, images=3000, distributions=5), "test_train")
    assert b"classes of 1 to 1 training images: accuracy" in page and len(page) < 3_000_000
    assert page.count(b"<img ") <= MOST_PICTURES


def test_ticks_are_round():
    assert round_numbers(0, 100) == [0, 20, 40, 60, 80, 100] and round_numbers(47.3, 61) == [50, 55, 60]
    assert round_numbers(4.2, 575, log=True) == [5, 10, 20, 50, 100, 200, 500]
    assert round_numbers(1, 5000, log=True) == [1, 10, 100, 1000] and round_numbers(0.6, 1.7, log=True) == [1, 1.5]


def titles(chart: Chart) -> list[str]:
    return [title.text for title in chart.svg.iter("title")]


def test_a_chart_in_a_file_is_xml_whatever_the_classes_are_called():
    names = [EVIL, "a\x00\x1b\udce9"]
    classes = pd.DataFrame({"class": names, "images": [200, 0], "group": ["many", "empty"]}, dtype=object)
    root = ElementTree.fromstring(counts_chart(classes).file(f"One & two\n{EVIL}"))
    assert not list(root.iter("script")) and EVIL in [element.text for element in root.iter()]
    assert r"a\x00\x1b\udce9: 0 images (empty)" in [element.text for element in root.iter()]
    assert root.find("{*}style").text.count("prefers-color-scheme: dark") == 1


def test_the_figures_of_a_prediction_by_hand():
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]))
    predictions = Predictions(
        ["x.png", "y.png", "z.png"], scores, ["ant", "bee", "cat"], {}, CHECKPOINT, scores.max(dim=1)[::-1], [6, 3, 1]
    )
    record = {"images": 3, "folder": "in", "checkpoint": CHECKPOINT.to_json(), "weights": [0.25, None]}
    record["aggregator"] = {"type": "StabilityAggregator", "args": {}}

    def page() -> str:
        return prediction_page(predictions, [6, 3, 1], record, thumbnails).decode().replace("\u00a0", " ")

    text = page()
    for said in (
        "3 images, mostly bee (about 1) and ant (about 1); 33.3 % are predicted with less than 50 % confidence.",
        "The estimated shares are the mean of the predicted probabilities.",
        "bee: 1.3 images expected, 1 predicted, 43.33 % estimated, 30.00 % of the training images",
        "ant: 1.2 images expected, 2 predicted, 40.00 % estimated, 60.00 % of the training images",
        "cat, 1 training images: estimated 16.67 %, training 10.00 %",
        "Median 70.0 %; 33.3 % of the images are below 50 %.",
        "70 to 75 %: 1 images",
        "40 to 45 %: 1 images",
        "y.png; bee: 80 %, ant: 10 %",
        "0.25, –",
    ):
        assert said in text, said
    assert text.index('title="y.png') < text.index('title="z.png')  # the surest first
    predictions.learning = {"prior": [0.2, 0.3, 0.5], "note": "the prior was hard to tell"}
    text = page()
    assert "mostly bee (about 1)" in text and "cat: 0.5 images expected, 0 predicted, 50.00 % estimated" in text
    assert "the prior was hard to tell" in text and "are the test prior that was estimated." in text
    record["aggregator"]["type"] = "GivenPriorAggregator"
    assert "are the test prior that was given." in page()


def test_the_figures_of_a_distribution_by_hand():
    """Five images of three classes; confidences 0.9, 0.8, 0.7 right and 0.6, 0.5 wrong."""
    targets, prediction = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 2, 0])
    outcomes = Outcomes(torch.arange(5), targets, prediction, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    classes = {"names": ["ant", "bee", "cat"], "training_images": [10, 40, 20]}
    found = panel(DistributionResult(5, {}, [], outcomes=outcomes), classes, "some way", 1)
    assert titles(found["mix"]) == [
        "ant, 10 training images: predicted 60.00 %, true 40.00 %",
        "bee, 40 training images: predicted 20.00 %, true 40.00 %",
        "cat, 20 training images: predicted 20.00 %, true 20.00 %",
    ]
    assert found["mix_title"].startswith("Predicted") and found["mix_note"].startswith("20.0 % of the images")
    assert titles(found["per_class"]) == [
        f"{name} training images: accuracy {value} % (some way)"
        for name, value in (("ant, 10", "100.0"), ("bee, 40", "50.0"), ("cat, 20", "0.0"))
    ]
    assert titles(found["reliability"])[-1] == "1 images: confidence 90.0 %, accuracy 100.0 %"
    # |0.9 - 1| + |0.8 - 1| + |0.7 - 1| + 0.6 + 0.5, a fifth of it; 0.7 sure on average and 0.6 right
    assert found["calibration"].startswith(
        "Calibration error 34.0 points; on average the network is 10.0 points too sure."
    )
    sure = Outcomes(torch.arange(5), targets, targets, torch.full((5,), 0.75))
    learned = DistributionResult(5, {}, [], learning={"prior": [0.5, 0.3, 0.2]}, outcomes=sure, equal_outcomes=outcomes)
    found = panel(learned, classes, "some way", 1)
    assert titles(found["mix"])[1] == "bee, 40 training images: estimated 30.00 %, true 40.00 %"
    assert found["calibration"].startswith(
        "Calibration error 25.0 points (equal weights 34.0); on average the network is 25.0 points too unsure."
    )
    assert found["mix_title"].startswith("Estimated") and found["mix_note"].startswith("10.0 % of the images")
    assert titles(found["per_class"])[1] == "bee, 40 training images: accuracy 50.0 % (equal weights)"
    places = [dot.get("cx") for dot in found["per_class"].svg.iter("circle")]
    assert len(set(places)) == len(places) == 6  # no dot hides another

    wrong = mistakes(outcomes, classes, lambda places, size: [Image.new("RGB", (4, 4))] * len(places), 4)
    assert [[picture["title"] for picture in pair["pictures"]] for pair in wrong["confusions"]] == [
        ["image 3: bee, taken for cat (60 %)"],
        ["image 4: cat, taken for ant (50 %)"],
    ]
    assert [(row["name"], row["accuracy"], row["taken"], row["times"]) for row in wrong["worst"]] == [
        ("cat", 0.0, "ant", 1),
        ("bee", 50.0, "cat", 1),
    ]
    assert [(row["true"], row["guess"], row["times"]) for row in wrong["confusions"]] == [
        ("bee", "cat", "1 of 2 images"),
        ("cat", "ant", "1 of 1 images"),
    ]
