import pytest

from utils import logger
from utils.logger import duration, file_log, get_logger, progress


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)


def test_a_line_a_minute_where_the_output_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(logger.time, "perf_counter", lambda: float(next(clock)))
    bar = progress("abcdef", "epoch 1/2", total=8, initial=2)
    taken = []
    for item in bar:
        taken.append(item)
        bar.set_postfix(loss="0.5")
    assert "".join(taken) == "abcdef"
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2: 4 of 8 after 1:15  loss 0.5",
        "epoch 1/2: 7 of 8 after 2:30  loss 0.5",
    ]


def test_a_quick_loop_says_nothing(capsys):
    assert list(progress(range(5), "images")) == list(range(5)) and not capsys.readouterr().out


def test_details_are_for_the_log_file(tmp_path, capsys):
    get_logger(verbosity=2)
    with file_log(get_logger(), tmp_path / "log.txt"):
        get_logger().debug("a detail")
        get_logger().info("a message")
    assert capsys.readouterr().out == "a message\n"
    assert "DEBUG a detail" in (tmp_path / "log.txt").read_text()


def test_duration():
    assert [duration(seconds) for seconds in (0, 59.4, 59.6, 3600, 90061)] == [
        "0:00",
        "0:59",
        "1:00",
        "1:00:00",
        "25:01:01",
    ]
