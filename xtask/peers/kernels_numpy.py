"""numpy's products, which are OpenBLAS's, at a prompt: `gemm f32 m n k`.

Answers each line with calls per second, the median of calls over about 0.3 s. What the environment says
of kernels is not heeded: OpenBLAS takes those that it finds best, and the name says which.
"""
import argparse
import itertools
import json
import os
import statistics
import sys
import time

ap = argparse.ArgumentParser()
ap.add_argument("--threads", type=int, default=2)
args = ap.parse_args()
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)

import ctypes

import numpy as np


def name():
    """The library and the kernels it took."""
    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    with open("/proc/self/maps") as maps:
        path = next((m.split()[-1] for m in maps if "openblas" in m), None)
    kernels = "unknown"
    if path:
        library = ctypes.CDLL(path)
        for symbol in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
            if hasattr(library, symbol):
                get = getattr(library, symbol)
                get.restype = ctypes.c_char_p
                kernels = get().decode()
                break
    version = build["version"].split(".dev")[0]
    return f"{build['name'].replace('scipy-openblas', 'OpenBLAS')} {version} ({kernels}), numpy {np.__version__}"


print(json.dumps({"name": name()}), flush=True)
for line in sys.stdin:
    kernel, dtype, *sizes = line.split()
    if (kernel, dtype) != ("gemm", "f32"):
        print(json.dumps({"error": "no such case"}), flush=True)
        continue
    m, n, k = map(int, sizes)
    random = np.random.default_rng(0)
    x, y = random.random((m, k), np.float32), np.empty((m, n), np.float32)
    # As in kernels_torch.py: few rows are about reading weights, which no cache may hold.
    copies = max(2, (256 << 20) // (4 * n * k)) if m <= 16 else 1
    weights = itertools.cycle([random.random((n, k), np.float32) for _ in range(copies)])
    np.matmul(x, next(weights).T, out=y)
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < 0.3 or len(times) < 5:
        w = next(weights)
        start = time.perf_counter()
        np.matmul(x, w.T, out=y)
        times.append(time.perf_counter() - start)
    print(json.dumps({"speed": 1 / statistics.median(times)}), flush=True)
