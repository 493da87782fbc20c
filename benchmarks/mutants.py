"""Mutation testing: how many small changes of the code do the tests notice?

    pip install cosmic-ray==8.7.0
    python benchmarks/mutants.py --sample 12

The operators are cosmic-ray's. Of the places in a file that an operator can change, a random sample is drawn (fixed
seed), and at each place one of its changes. First the tests of TESTS run once, to see which lines each of them runs and
how long it takes. A mutant is then tried on the tests that run its lines, fastest first, up to --test_seconds of them,
until one fails. Each trial is a fork of a process that has imported torch and the other packages, in a copy of the
project: the checkout is not touched. What a test starts as a process of its own is not seen.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Files that are mutated, and the test files that concern them.
TESTS = {
    "tade/*.py": "prior asymmetry stability calibration given_prior choices metric loss state",
    "model/loss.py": "loss trainer choices",
    "trainer/*.py": "trainer evaluation choices schedule results inference given_prior calibrate prior stability "
    "stopping continuity precision scripts parse_config pretrained freeze checkpoint prediction report_page export "
    "state examples logger devices loss on_disk reference_config",
    "data_loader/class_profiles.py": "class_profiles data_loaders choices evaluation",
    "utils/checkpoint.py": "checkpoint continuity hostile_files pretrained trainer choices stopping",
}
#: Imported once, before the forks: no module of the project.
TRAINED = "digits_run"  # the fixture that takes longest
PACKAGES = "torch numpy pandas matplotlib.pyplot sklearn.datasets PIL.Image hypothesis pytest coverage"
COPIED = ("tade", "utils", "base", "model", "data_loader", "trainer", "comparison", "tests", "configs", "data_txt")
COPIED = (*COPIED, "benchmarks", "examples", "docs")


@dataclass
class Mutant:
    """One change of one file, and what the tests said."""

    file: str
    operator: str
    occurrence: int
    lines: list[int]
    before: str
    after: str
    outcome: str = ""
    seconds: float = 0.0
    tests: int = 0


def copy_project(folder: Path) -> None:
    """A copy of what the tests read; data/ is linked."""
    folder.mkdir()
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [p for p in ROOT.iterdir() if p.is_file() and p.suffix in (".py", ".toml", ".md", ".txt", "")]:
        if path.name != ".git":
            shutil.copy2(path, folder / path.name)
    if (ROOT / "data").exists():
        (folder / "data").symlink_to(ROOT / "data")


def forked(work, seconds: float, log: Path) -> int | None:
    """Exit status of work() in a process of its own; None after `seconds`."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # a group of its own to end, and the nice value of this process
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            os._exit(int(work()))
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
    end = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.02)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(child, 0)
    return status


def run_pytest(folder: Path, tests: list[str], plugin, *options: str) -> int:
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT), str(ROOT / "benchmarks")))]
    os.environ["PYTHONPATH"] = str(folder)
    base = folder.parent / "pytest"
    fixed = (
        "-q",
        "--disable-warnings",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--tb=line",
        f"--basetemp={base}",
        f"--rootdir={folder}",
    )
    return pytest.main([*fixed, *options, *(f"tests/test_{name}.py" for name in tests)], plugins=[plugin])


class Recorder:
    """Which lines of the project each test runs, set-up included, in how many seconds; the trained fixture is kept."""

    def __init__(self, folder: Path, kept: Path):
        import coverage

        self.folder, self.kept = folder, kept
        packages = [str(folder / name / "*") for name in ("tade", "model", "trainer", "data_loader", "utils")]
        self.coverage = coverage.Coverage(data_file=None, include=packages, config_file=False)
        self.coverage.start()
        self.tests: dict[str, dict] = {}

    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope in ("session", "module"):
            self.coverage.switch_context(f"fixture:{fixturedef.argname}")

    def pytest_runtest_setup(self, item):
        names = [f"fixture:{name}" for name in item.fixturenames]
        self.tests[item.nodeid] = {"seconds": 0.0, "contexts": [item.nodeid, *names], "passed": True}
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_call(self, item):
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report):
        entry = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "contexts": [report.nodeid], "passed": True})
        entry["seconds"] += report.duration
        entry["passed"] &= report.outcome == "passed"
        self.coverage.switch_context("between")

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {}
        for path in data.measured_files():
            found = data.contexts_by_lineno(path)
            lines[str(Path(path).relative_to(self.folder))] = {str(line): names for line, names in found.items()}
        self.kept.write_text(json.dumps({"tests": self.tests, "lines": lines}))


class Selected:
    """Runs the given tests alone, in the given order; a trained run that the mutant had no part in is trained once."""

    def __init__(self, order: list[str], kept: Path | None):
        self.place = {nodeid: place for place, nodeid in enumerate(order)}
        self.kept = kept

    def pytest_collection_modifyitems(self, session, config, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.argname != TRAINED or self.kept is None:
            return (yield)
        results, saved, copy = (self.kept / name for name in ("results.json", "saved", "copy"))
        if not results.exists():
            value = yield
            shutil.copytree(Path(value["run_dir"]).parents[1], saved)
            results.write_text(json.dumps(value).replace(str(Path(value["run_dir"]).parents[1]), str(copy)))
            return value
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        fixturedef.func = lambda: json.loads(results.read_text())
        fixturedef.argnames = ()
        return (yield)


def annotations(tree: ast.Module) -> list[tuple[int, int, int, int]]:
    """Where type annotations stand: they are not run."""
    found = []
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if part is not None:
                found.append((part.lineno, part.col_offset, part.end_lineno, part.end_col_offset))
    return found


def statement_lines(tree: ast.Module, line: int) -> list[int]:
    """Lines of the innermost statement at a line; of a compound one, its head."""
    best = (line, line)
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.excepthandler):
            continue
        body = getattr(node, "body", None)
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        end = max(start, body[0].lineno - 1) if body else node.end_lineno
        if start <= line <= end and (best == (line, line) or end - start < best[1] - best[0]):
            best = (start, end)
    return list(range(best[0], best[1] + 1))


def places(file: str) -> list[list[Mutant]]:
    """Every place in a file that an operator can change, with its changes."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / file).read_text()
    tree = ast.parse(source)
    rows, notes = source.split("\n"), annotations(tree)
    found = defaultdict(list)
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        operator, occurrence = get_operator(name)(), -1
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                occurrence += 1
                if any(note[:2] <= start < note[2:] for note in notes):
                    continue
                lines = statement_lines(tree, start[0])
                found[start].append(Mutant(file, name, occurrence, lines, rows[start[0] - 1].strip(), ""))
    return [found[start] for start in sorted(found)]


def mutated(mutant: Mutant) -> str:
    """The changed source; fills in `after`."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / mutant.file).read_text()
    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    pairs = zip(source.split("\n"), changed.split("\n"), strict=False)
    mutant.before, mutant.after = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))
    return changed


def draw(files: list[str], sample: int, seed: int) -> list[Mutant]:
    """At most `sample` mutants a file, the files by turns."""
    drawn = []
    for file in files:
        found = places(file)
        generator = random.Random(f"{seed} {file}")
        generator.shuffle(found)
        drawn.append([generator.choice(changes) for changes in found[:sample]])
    return [row[turn] for turn in range(sample) for row in drawn if turn < len(row)]


def contexts_of(mutant: Mutant, record: dict) -> set[str]:
    """The tests and fixtures that run a mutant's lines."""
    lines = record["lines"].get(mutant.file, {})
    return {context for line in mutant.lines for context in lines.get(str(line), [])}


def tests_of(mutant: Mutant, record: dict, test_seconds: float) -> list[str]:
    """The tests that run a mutant's lines, fastest files and tests first, up to test_seconds of them."""
    names = next(names for pattern, names in TESTS.items() if Path(mutant.file).match(pattern)).split()
    allowed = {f"tests/test_{name}.py" for name in names}
    contexts = contexts_of(mutant, record)
    everywhere = contexts <= {"", "between"} and bool(contexts)  # run on import alone
    chosen = [
        nodeid
        for nodeid, test in record["tests"].items()
        if test["passed"] and nodeid.split("::")[0] in allowed and (everywhere or contexts & set(test["contexts"]))
    ]
    chosen.sort(key=lambda nodeid: record["tests"][nodeid]["seconds"])
    total, kept = 0.0, []
    for nodeid in chosen:
        total += record["tests"][nodeid]["seconds"]
        if kept and total > test_seconds:
            break
        kept.append(nodeid)
    files = list(dict.fromkeys(nodeid.split("::")[0] for nodeid in kept))
    return sorted(kept, key=lambda nodeid: files.index(nodeid.split("::")[0]))


def try_out(mutant: Mutant, folder: Path, record: dict, test_seconds: float) -> None:
    """Fill in the outcome: killed, survived, timeout (counts as killed) or no test."""
    changed = mutated(mutant)
    tests = tests_of(mutant, record, test_seconds)
    mutant.tests = len(tests)
    if not tests:
        mutant.outcome = "no test"
        return
    path = folder / mutant.file
    original = path.read_text()
    for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        cached.unlink()
    path.write_text(changed)
    start = time.monotonic()
    files = list(dict.fromkeys(nodeid.split("::")[0][len("tests/test_") : -len(".py")] for nodeid in tests))

    def work() -> int:
        sys.dont_write_bytecode = True
        return run_pytest(folder, files, Selected(tests, None if trained else folder.parent), "-x")

    contexts = contexts_of(mutant, record)
    trained = f"fixture:{TRAINED}" in contexts or contexts <= {"", "between"}

    expected = sum(record["tests"][nodeid]["seconds"] for nodeid in tests)
    status = forked(work, 30 + 5 * expected, folder.parent / "log.txt")
    path.write_text(original)
    mutant.seconds = round(time.monotonic() - start, 1)
    mutant.outcome = "timeout" if status is None else "survived" if status == 0 else "killed"


def key(mutant: Mutant) -> tuple:
    return mutant.file, mutant.operator, mutant.occurrence


def table(mutants: list[Mutant]) -> str:
    """Counts by file, and those that no test noticed."""
    counts = defaultdict(Counter)
    for mutant in mutants:
        counts[mutant.file][mutant.outcome] += 1
        counts["all"][mutant.outcome] += 1
    kinds = ("killed", "timeout", "survived", "no test")
    rows = ["| file | mutants | killed | timeout | survived | no test runs the line |", "|---|" + "---:|" * 5]
    for file in [*sorted(set(counts) - {"all"}), "all"]:
        count = counts[file]
        rows.append("| " + " | ".join([file, str(sum(count.values())), *(str(count[kind]) for kind in kinds)]) + " |")
    rows.append("")
    for m in sorted(mutants, key=lambda m: (m.file, m.lines)):
        if m.outcome in ("survived", "no test"):
            rows.append(f"{m.file}:{m.lines[0]} {m.operator.split('/')[1]} #{m.occurrence}, {m.outcome}")
            rows += [f"  - {m.before}", f"  + {m.after}"]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=12, help="mutants of each file (12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (0)")
    parser.add_argument("--files", nargs="*", help="only these files")
    parser.add_argument("--test_seconds", type=float, default=15, help="tests of one mutant, in seconds (15)")
    parser.add_argument("--again", type=Path, help="try the survivors in this file of an earlier run again")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("mutants.json"),
        help="every mutant; goes on with those that it lacks (mutants.json)",
    )
    parser.add_argument(
        "--record", type=Path, help="keep the lines of each test here, and read them when they are there"
    )
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for package in PACKAGES.split():
        importlib.import_module(package)

    known = [str(p.relative_to(ROOT)) for pattern in TESTS for p in sorted(ROOT.glob(pattern)) if p.read_text().strip()]
    files = options.files or known
    if options.again:
        fields = [
            entry for entry in json.loads(options.again.read_text()) if entry["outcome"] in ("survived", "no test")
        ]
        mutants = [Mutant(**entry) for entry in fields if entry["file"] in files]
    else:
        mutants = draw(files, options.sample, options.seed)

    before = {}
    if options.output.exists():
        before = {key(mutant): mutant for mutant in (Mutant(**m) for m in json.loads(options.output.read_text()))}

    work = Path(tempfile.mkdtemp(prefix="mutants"))
    try:
        folder = work / "project"
        copy_project(folder)
        kept = options.record.resolve() if options.record else work / "record.json"
        if not kept.exists():
            used = [p for p in TESTS if any(Path(file).match(p) for file in files)]
            names = list(dict.fromkeys(name for pattern in used for name in TESTS[pattern].split()))
            print(f"Recording {len(names)} test files", flush=True)
            forked(lambda: run_pytest(folder, names, Recorder(folder, kept)), 7200, work / "record.log")
            print((work / "record.log").read_text()[-3000:], flush=True)
        record = json.loads(kept.read_text())
        for number, mutant in enumerate(mutants, 1):
            if key(mutant) in before:
                mutants[number - 1] = before[key(mutant)]
                continue
            try_out(mutant, folder, record, options.test_seconds)
            print(
                f"{number}/{len(mutants)} {mutant.outcome} {mutant.seconds} s {mutant.file}:{mutant.lines[0]}",
                flush=True,
            )
            options.output.write_text(json.dumps([asdict(m) for m in mutants[:number]], indent=1) + "\n")
    finally:
        shutil.rmtree(work)
    print(table(mutants))


if __name__ == "__main__":
    main()
