import pytest

from utils.logger import file_log, get_logger, progress


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)


def test_a_line_a_minute_where_the_output_is_no_terminal(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    bar = progress("abcdef", "epoch 1/2", total=8, initial=2)
    taken = []
    for item in bar:
        clock[0] += 25
        taken.append(item)
        bar.set_postfix(loss="0.5", refresh=False)
    assert "".join(taken) == "abcdef"
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2: 5 of 8 after 01:15, loss=0.5",
        "epoch 1/2: 8 of 8 after 02:30, loss=0.5",
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
