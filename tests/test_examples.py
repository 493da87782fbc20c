import os
import re
import subprocess
import sys

from conftest import ROOT


def test_adapting_a_classifier_of_ones_own():
    """Short, with the library alone, and of use wherever the test set is skewed otherwise."""
    path = ROOT / "examples" / "adapt_your_classifier.py"
    assert len(path.read_text().splitlines()) < 40
    assert set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.M)) == {"numpy", "sklearn", "tade", "torch"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # found without being installed
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"([\d.]+) % before, ([\d.]+) % after", done.stdout)
    gains = [float(after) - float(before) for before, after in pairs]  # skewed as in training, not at all, backwards
    assert len(gains) == 3 and gains[0] > -1 and gains[1] > 2 and gains[2] > 10, done.stdout
