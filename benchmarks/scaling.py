"""Two processes beside one, with torch's DistributedDataParallel over gloo (nccl on GPUs), each CPU process with one thread: weak scaling (each process keeps its batch)
and strong (the batch is shared), and one process with both threads."""
import json, os, sys
import torch, torch.distributed as dist
from machine import DEVICE, in_child, median, spread
from steps import batch, build, one_step, optimiser, sizes

def child(preset, bs, steps, quick):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if DEVICE == "cuda": torch.cuda.set_device(rank)
    if world > 1: dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    torch.manual_seed(0)
    s = sizes(preset, **(dict(layers=2, tokens=16, target=32, cond=64) if quick else {}))
    net = build("blip3o_nb", s); f = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    opt, xs, took = optimiser("blip3o_nb", net), batch(s, bs), []
    for i in range(steps + 1):
        if world > 1: dist.barrier()
        t = sum(one_step(net, f, opt, xs, "fp32" if DEVICE == "cpu" else "bf16"))
        if i: took.append(t)
    if world > 1: dist.destroy_process_group()
    if rank == 0: print(json.dumps(took))

def two(*args, threads=1):
    import subprocess
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--child", *map(str, args)], capture_output=True, text=True,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if r.returncode: sys.exit(r.stderr)
    return json.loads(next(l for l in reversed(r.stdout.splitlines()) if l.startswith("[")))

def main(quick=False, preset="tiny", bs=8, rounds=3, steps=2):
    if DEVICE == "cuda" and torch.cuda.device_count() < 2: return dict(not_measured="one GPU")
    if quick: bs, rounds, steps = 2, 1, 1
    one = lambda b, threads: in_child(__file__, preset, b, steps, int(quick), env=dict(OMP_NUM_THREADS=str(threads)))
    ways = {"one process, one thread": lambda: one(bs, 1), "one process, two threads": lambda: one(bs, 2), "one process, one thread, half the batch": lambda: one(bs//2, 1),
            "two processes, each the batch": lambda: two(preset, bs, steps, int(quick)), "two processes, each half": lambda: two(preset, bs//2, steps, int(quick))}
    took = {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items(): took[k] += f()
    t = {k: median(v) for k, v in took.items()}
    return dict(preset=preset, batch=bs, step_s=t, spread={k: spread(v) for k, v in took.items()}, weak=t["one process, one thread"]/t["two processes, each the batch"],
                strong=t["one process, one thread"]/t["two processes, each half"], threads=t["one process, one thread"]/t["one process, two threads"])

if __name__ == "__main__" and sys.argv[1] == "--child": child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
