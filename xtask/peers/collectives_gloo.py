"""Times collectives over gloo as colossal-comm/examples/collectives.rs does: a line
`verb bytes microseconds` each.

    python -m torch.distributed.run --standalone --nproc-per-node 2 collectives_gloo.py [LARGEST_BYTES]
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
largest = int(sys.argv[1]) if len(sys.argv) > 1 else 16 << 20
for size, repeats in ((1 << 10, 60), (64 << 10, 40), (1 << 20, 15), (16 << 20, 3), (64 << 20, 1)):
    if size > largest:
        break
    n = size // 4
    full, other, part = torch.zeros(n), torch.zeros(n), torch.zeros(n // ranks)
    verbs = {
        "all_reduce": lambda: dist.all_reduce(full),
        "all_gather": lambda: dist.all_gather_into_tensor(other, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, full),
        "all_to_all": lambda: dist.all_to_all_single(other, full),
        "broadcast": lambda: dist.broadcast(full, 0),
        "reduce": lambda: dist.reduce(full, 0),
        "gather": lambda: dist.gather(part, list(other.chunk(ranks)) if rank == 0 else None, 0),
        "scatter": lambda: dist.scatter(part, list(full.chunk(ranks)) if rank == 0 else None, 0),
        "shift": lambda: [
            work.wait()
            for work in dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, full, (rank + 1) % ranks),
                    dist.P2POp(dist.irecv, other, (rank - 1) % ranks),
                ]
            )
        ],
    }
    if size == 1 << 10:
        verbs["barrier"] = dist.barrier
    for name, call in verbs.items():
        call()
        call()
        turns = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            mine = torch.tensor([(time.perf_counter() - start) / repeats], dtype=torch.float64)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            turns.append(mine.item())
        if rank == 0:
            print(f"{name} {0 if name == 'barrier' else size} {statistics.median(turns) * 1e6:.2f}", flush=True)
dist.barrier()
dist.destroy_process_group()
