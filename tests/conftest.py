"""Notebooks are started with the first test, so that both cores have work. Faults are counted, for a table
of the documentation."""
import json, os, platform, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import Future
from pathlib import Path
import pytest
from fastcore.nbio import read_nb
from fresh import machine_cells
from long import FIRST, LONG

ROOT = Path(__file__).parents[1]
# What a shell starts in the background ignores Ctrl-C, which is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two processes at a time: more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count()//2)))

# What most notebooks load; nothing of this package.
LIBRARIES = ("torch, torchvision, fastai.learner, fastai.callback.schedule, open_clip, transformers, timm, "
             "seaborn, pandas")

SERVER = """
import os, sys
import nbdev.test
write_nb = nbdev.test.write_nb
for line in sys.stdin:
    path, said, fresh = line.rstrip().split(chr(9))
    pid = os.fork()
    if not pid:
        out = os.open(said, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        nbdev.test.write_nb = lambda nb, _: write_nb(nb, fresh)
        nbdev.test.nbdev_test(path, save=True)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

class Server:
    """Runs notebooks through nbdev one after the other, each in a fork of a process that has imported the
    large libraries, which saves a notebook ten seconds. What it shows is stored outside the tree."""
    def __init__(self, folder, libraries=LIBRARIES):
        self.folder = folder
        command = [sys.executable, "-c", f"import {libraries}\n{SERVER}"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
    def run(self, path):
        "Exit code, what was said, and the notebook with fresh outputs"
        handle, said = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        fresh = Path(said + ".ipynb")
        self.process.stdin.write(f"{path}\t{said}\t{fresh}\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        return int(code or 1), Path(said).read_text(), fresh
    def close(self):
        self.process.stdin.close()
        self.process.wait()

class Runs:
    "Notebooks run beside the other tests, which keep one core busy, and two at a time when those are done"
    seconds = {} # of each notebook
    def __init__(self, paths, folder):
        self.todo, self.done, self.folder = list(paths)[::-1], {p: Future() for p in paths}, folder
    def start(self):
        threading.Thread(target=self.work, daemon=True).start()
        return self
    def next(self):
        "The path of the next notebook; None when all are taken"
        try:
            return self.todo.pop()
        except IndexError:
            return None
    def work(self):
        server = Server(self.folder) if self.todo else None
        while path := self.next():
            start = time.time()
            try:
                self.done[path].set_result(server.run(path))
            except Exception as e:
                self.done[path].set_exception(e)
            self.seconds[path] = time.time() - start
        if server:
            server.close()

def pytest_terminal_summary(terminalreporter):
    slow = sorted(Runs.seconds, key=Runs.seconds.get, reverse=True)[:20]
    if slow:
        times = ", ".join(f"{p.stem} {Runs.seconds[p]:.0f} s" for p in slow)
        terminalreporter.write_line(f"slowest notebooks: {times}")
    for path in sorted(Runs.seconds):
        for i, reason in machine_cells(read_nb(path)):
            where = f"{path.relative_to(ROOT)}, cell {i}"
            terminalreporter.write_line(f"figures not compared: {where}: {reason}")

def test_of(nodeid):
    "The test without its case"
    return nodeid.partition("[")[0]

def is_notebook(item):
    return item.path.name == "test_notebooks.py"

def name_of(item):
    "The file of a notebook, or the id of another test, from the root of the repository"
    path = item.callspec.params["path"] if is_notebook(item) else None
    return path.relative_to(ROOT).as_posix() if path else item.nodeid

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What `long` lists gets the mark. Notebooks come last, because the second process that runs them starts
    when the other tests are done; those that take longest are the first of them."""
    for item in items:
        if {name_of(item), test_of(name_of(item))} & LONG.keys():
            item.add_marker(pytest.mark.long)
    seconds = FIRST | LONG
    def place(item):
        return (1, -seconds.get(name_of(item), 0)) if is_notebook(item) else (0, 0)
    items.sort(key=place)

@pytest.fixture(scope="session", autouse=True)
def runs(request, tmp_path_factory):
    paths = [i.callspec.params["path"] for i in request.session.items if is_notebook(i)]
    runs = Runs(paths, tmp_path_factory.mktemp("notebooks")).start()
    yield runs
    runs.todo.clear()

def pytest_addoption(parser):
    help = ("provoke faults in their full number and write what came of them to FILE, in the place of what "
            "stands there of the same tests")
    parser.addoption("--faults", metavar="FILE", help=help)

@pytest.fixture(scope="session")
def times(request):
    "How often a fault is provoked: `times(few, many)` is `many` in the full form"
    return lambda few, many: many if request.config.getoption("--faults") else few

FAULTS = {} # test -> (its mark, {case: [provoked, passed]})

@pytest.fixture(autouse=True)
def _fault(request):
    mark = request.node.get_closest_marker("fault")
    if mark:
        FAULTS.setdefault(test_of(request.node.nodeid), (mark.args, {}))
    yield

def pytest_runtest_logreport(report):
    test = FAULTS.get(test_of(report.nodeid))
    if test and report.when == "call" and not report.skipped:
        provoked = int(dict(report.user_properties).get("provoked", 1))
        test[1][report.nodeid] = [provoked, int(report.passed)]

def fault_row(test, args, cases):
    "A line of the table of faults"
    provoked = sum(n for n, _ in cases.values())
    survived = sum(n*ok for n, ok in cases.values())
    return dict(zip(("fault", "where", "outcome"), args), test=test, provoked=provoked, survived=survived)

def pytest_sessionfinish(session):
    file = session.config.getoption("--faults")
    if not file:
        return
    rows = [fault_row(test, args, cases) for test, (args, cases) in FAULTS.items() if cases]
    seen = {r["test"] for r in rows}
    if Path(file).exists(): # a run of some tests leaves the rows of the others
        rows += [r for r in json.loads(Path(file).read_text())["faults"] if r["test"] not in seen]
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    table = dict(machine=machine, faults=sorted(rows, key=lambda r: r["test"]))
    Path(file).write_text(json.dumps(table, indent=1) + "\n")
