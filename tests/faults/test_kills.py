"""Commands that are killed, stopped with Ctrl-C, starved of disk, doubled, or given a folder they may not write: what is complete stays, one line says what happened, and the same command ends at the same result."""
import json, os, signal, subprocess, sys
from pathlib import Path
import pytest

@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    "Gives orders to tests/faults/jobs.py"
    p = subprocess.Popen([sys.executable, Path(__file__).with_name("jobs.py"), tmp_path_factory.mktemp("jobs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert p.stdout.readline() == "ready\n"
    def order(do, **kw):
        p.stdin.write(json.dumps(dict(do=do, **kw)) + "\n"); p.stdin.flush()
        answer = json.loads(p.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer
    yield order
    p.stdin.close(); p.wait(60)

MANY = ["extraction", "training", "conversion to pickles", "conversion to shards", "evaluation"]
EACH = "extraction, training, conversion, evaluation"

@pytest.fixture
def provoke(jobs, record_property):
    "Give an order for one job or several and assert that nothing went wrong"
    def f(do, names=(None,), **kw):
        answers = [jobs(do, **({"job": j} if j else {}), **kw) for j in names]
        record_property("provoked", n := sum(a["provoked"] for a in answers))
        assert not (wrong := {j: a["wrong"] for j, a in zip(names, answers) if a["wrong"]}), wrong
        return n
    return f

@pytest.mark.fault("kill -9 at random moments", EACH, "the same command again ends at the same result")
def test_kill(provoke, times): # training at chosen moments in test_training, to the last bit
    jobs = times(["extraction", "conversion to shards", "evaluation"], MANY)
    assert provoke("stopped", jobs, times=times(1, 50), sig=signal.SIGKILL) >= times(1, 50)*len(jobs)

@pytest.mark.fault("Ctrl-C at random moments", EACH, "one line, exit code 130; the same command again ends at the same result")
def test_interrupt(provoke, times): provoke("stopped", times(["training"], MANY), times=times(2, 20), sig=signal.SIGINT)

@pytest.mark.fault("a full disk: no file may grow past some size", EACH, "one line, exit code 1; with space again it ends at the same result")
def test_full_disk(provoke, times): provoke("starved", times(["training"], MANY), times=times(1, 6))

@pytest.mark.fault("a folder that cannot be written, empty or half done", EACH, "one line, exit code 1, nothing changed; writable again it ends at the same result")
def test_read_only(provoke, times): provoke("read_only", times(["conversion to pickles"], MANY))

@pytest.mark.fault("the same command twice at once, into one folder", EACH, "each ends well or with one line; the same command again ends at the same result")
def test_two_writers(provoke, times): provoke("doubled", times(["conversion to shards"], MANY), times=times(1, 5))

@pytest.mark.fault("a shard that is gone", "training, conversion, evaluation", "one line that names it, nothing lost")
def test_vanished_shard(provoke, times): provoke("vanished", ["training", *times([], ["conversion to pickles", "evaluation"])])

@pytest.mark.fault("a clock that runs backwards, files from 1970 and 2100", EACH, "no difference")
def test_clock(provoke, times): provoke("clocks", times(["conversion to shards"], MANY))

@pytest.mark.fault("a process that reads pictures is killed", "extraction", "one line, exit code 1; the same command again ends at the same result")
def test_worker_dies(provoke, times): assert provoke("worker_dies", times=times(1, 10))

@pytest.mark.fault("a process of two stops answering", "training", "the other ends with one line after its patience; both go on from the last state")
def test_rank_hangs(provoke): provoke("rank_hangs")
