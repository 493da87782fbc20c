import os
import re
import subprocess
import sys

from conftest import ROOT


def test_adapting_a_classifier_of_ones_own():
    """Short, with the library alone, and of use where the test set is skewed the other way."""
    path = ROOT / "examples" / "adapt_your_classifier.py"
    assert len(path.read_text().splitlines()) < 40
    assert set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.M)) == {"numpy", "sklearn", "tade", "torch"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # found without being installed
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (
        float(x) for x in re.search(r"other way: ([\d.]+) % before, ([\d.]+) % after", done.stdout).groups()
    )
    assert after > before + 5
