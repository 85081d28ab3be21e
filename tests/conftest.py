"""Tests run in two processes; each keeps to its share of the cores, and so do the programs it starts."""
import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count()//workers)))
