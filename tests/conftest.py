"""Notebooks are started with the first test, so that both cores have work."""
import os, subprocess, sys, threading
from concurrent.futures import Future
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count()//2))) # two processes at a time: more threads than cores wait for each other

def run(path): return subprocess.run([Path(sys.executable).parent/"nbdev-test", path], cwd=ROOT, capture_output=True, text=True)

class Runs:
    "Notebooks that run beside the other tests, which keep one core busy, and two at a time when those are done"
    def __init__(self, paths): self.todo, self.done = list(paths), {p: Future() for p in paths} # taken from the end: the long ones come last in the book
    def start(self): threading.Thread(target=self.work, daemon=True).start(); return self
    def work(self):
        while self.todo:
            path = self.todo.pop()
            try: self.done[path].set_result(run(path))
            except Exception as e: self.done[path].set_exception(e)

@pytest.fixture(scope="session", autouse=True)
def runs(request):
    runs = Runs([i.callspec.params["path"] for i in request.session.items if i.path.name == "test_notebooks.py"]).start()
    yield runs
    runs.todo.clear()
