"""Notebooks are started with the first test, so that both cores have work; faults are counted, for the table of the documentation."""
import json, os, platform, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import Future
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell in the background makes what it starts deaf to Ctrl-C, which is tested
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count()//2))) # two processes at a time: more threads than cores wait for each other

LIBRARIES = "torch, torchvision, fastai.learner, fastai.callback.schedule, open_clip, transformers, timm, seaborn, pandas" # that most notebooks load; nothing of this package

SERVER = f"""
import os, sys
from nbdev.test import nbdev_test
import {LIBRARIES}
for line in sys.stdin:
    path, out = line.rstrip().split(chr(9))
    if not (pid := os.fork()):
        os.dup2(f := os.open(out, os.O_WRONLY), 1); os.dup2(f, 2)
        nbdev_test(path); sys.stdout.flush(); os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

class Server:
    "Runs notebooks through nbdev one after the other, each in a fork of a process that has imported the large libraries: a notebook saves their ten seconds"
    seconds = {} # of each notebook
    def __init__(self): self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    def run(self, path):
        with tempfile.NamedTemporaryFile("r") as out:
            start = time.time()
            self.process.stdin.write(f"{path}\t{out.name}\n"); self.process.stdin.flush()
            code = self.process.stdout.readline()
            self.seconds[path] = time.time() - start
            return int(code or 1), out.read()
    def close(self): self.process.stdin.close(); self.process.wait()

def pytest_terminal_summary(terminalreporter):
    slow = sorted(Server.seconds, key=Server.seconds.get, reverse=True)[:12]
    if slow: terminalreporter.write_line("slowest notebooks: " + ", ".join(f"{p.stem} {Server.seconds[p]:.0f} s" for p in slow))

class Runs:
    "Notebooks that run beside the other tests, which keep one core busy, and two at a time when those are done"
    def __init__(self, paths): self.todo, self.done = list(paths), {p: Future() for p in paths} # taken from the end: the long ones come last in the book
    def start(self): threading.Thread(target=self.work, daemon=True).start(); return self
    def work(self):
        server = Server() if self.todo else None
        while self.todo:
            path = self.todo.pop()
            try: self.done[path].set_result(server.run(path))
            except Exception as e: self.done[path].set_exception(e)
        if server: server.close()

@pytest.fixture(scope="session", autouse=True)
def runs(request):
    runs = Runs([i.callspec.params["path"] for i in request.session.items if i.path.name == "test_notebooks.py"]).start()
    yield runs
    runs.todo.clear()

def pytest_addoption(parser): parser.addoption("--faults", metavar="FILE", help="provoke faults in their full number and write what came of them to FILE, in the place of what stands there of the same tests")

@pytest.fixture(scope="session")
def times(request):
    "How often a fault is provoked: `times(few, many)` is `many` in the full form"
    return lambda few, many: many if request.config.getoption("--faults") else few

FAULTS = {} # test -> (its mark, {case: [provoked, passed]})

@pytest.fixture(autouse=True)
def _fault(request):
    mark = request.node.get_closest_marker("fault")
    if mark: FAULTS.setdefault(request.node.nodeid.partition("[")[0], (mark.args, {}))
    yield

def pytest_runtest_logreport(report):
    test = FAULTS.get(report.nodeid.partition("[")[0])
    if test and report.when == "call" and not report.skipped: test[1][report.nodeid] = [int(dict(report.user_properties).get("provoked", 1)), int(report.passed)]

def pytest_sessionfinish(session):
    file = session.config.getoption("--faults")
    if not file: return
    rows = [dict(zip(("fault", "where", "outcome"), args), test=test, provoked=sum(n for n, _ in cases.values()), survived=sum(n*ok for n, ok in cases.values())) for test, (args, cases) in FAULTS.items() if cases]
    seen = {r["test"] for r in rows}
    if Path(file).exists(): rows += [r for r in json.loads(Path(file).read_text())["faults"] if r["test"] not in seen] # a run of some tests leaves the rows of the others
    Path(file).write_text(json.dumps(dict(machine=f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}", faults=sorted(rows, key=lambda r: r["test"])), indent=1) + "\n")
