#!/usr/bin/env python3
"""Count what the processes of a run compute and send, and where more of them stop helping.

    python scripts/cluster_scaling.py [--flops 30e12] [--bytes 25e9] [--disk 2e9] [--windows 128] [--seq-len 2048]
                                      [--shards 64] [--rows]

One block of gptq-w4a16-g64, for the shapes of Llama-2-7B and Llama-3.1-70B. Nothing is measured: operations of float32,
bytes along the longest way of the tree and bytes that one process reads are counted as docs/cluster.md says, and divided by
the three speeds. --rows shows what would be if every linear were rounded by all processes. Standard library only.
"""

import argparse
import math
from dataclasses import dataclass


@dataclass
class Shape:
    name: str
    hidden: int
    intermediate: int
    kv: int

    def linears(self) -> dict[str, tuple[int, list[int]]]:
        """Features and rows of the linears that read a site."""
        return {"qkv": (self.hidden, [self.hidden, self.kv, self.kv]), "o": (self.hidden, [self.hidden]),
                "gate_up": (self.hidden, [self.intermediate] * 2), "down": (self.intermediate, [self.hidden])}


SHAPES = [Shape("7B", 4096, 11008, 4096), Shape("70B", 8192, 28672, 1024)]


def largest_load(parts: list[int], processes: int) -> int:
    """What the process that has most gets: the largest part first, each to the one that has least."""
    loads = [0] * processes
    for count in sorted(parts, reverse=True):
        loads[loads.index(min(loads))] += count
    return max(loads)


def shards_of(rank: int, processes: int, shards: int) -> int:
    return (rank + 1) * shards // processes - rank * shards // processes


def count(shape: Shape, processes: int, options) -> tuple[float, float, float, float]:
    """Operations of the process that has most of the windows, those of the rounding, bytes read, bytes along the tree."""
    tokens = options.windows * options.seq_len * max(
        shards_of(rank, processes, options.shards) for rank in range(processes)) / options.shards
    linears = shape.linears()
    weights = sum(features * sum(rows) for features, rows in linears.values())
    gate_up = linears["gate_up"][0] * sum(linears["gate_up"][1])
    attention = 2 * 2 * options.seq_len * shape.hidden  # scores and values of a token
    # The original block once, the rounded one once, gate and up of it twice.
    passes = tokens * (2 * (2 * weights + gate_up) + 2 * attention)
    moments = tokens * sum(features**2 for features, _ in linears.values())  # symmetric: half of the products
    load = (lambda rows: sum(rows) / processes) if options.rows else (lambda rows: largest_load(rows, processes))
    rounding = sum(features**3 / 3 + 2 * load(rows) * features**2 / 2 for features, rows in linears.values())
    tensors = [2 * features * count for features, rows in linears.values() for count in rows]  # of two bytes a weight
    levels = math.ceil(math.log2(processes)) if processes > 1 else 0
    # Up the tree, and down where several linears read the input: one alone is rounded where the sum is.
    sent = levels * sum(8 * features**2 * (1 + (len(rows) > 1)) for features, rows in linears.values())
    if processes > 1:
        sent += levels * (weights + sum(tensors))  # codes of a byte, and the block
    return passes + moments, rounding, largest_load(tensors, processes), sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=30e12, help="operations of float32 in a second")
    parser.add_argument("--bytes", type=float, default=25e9, help="bytes in a second between two processes")
    parser.add_argument("--disk", type=float, default=2e9, help="bytes in a second that one process reads")
    parser.add_argument("--rows", action="store_true", help="round all linears by all processes")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=64)
    options = parser.parse_args()
    print("| model | processes | passes and moments, s | rounding, s | reading, s | sent, s | block, s | speed-up |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for shape in SHAPES:
        alone = 0.0
        for processes in (1, 2, 4, 8, 16, 32, 64):
            work, rounding, read, sent = count(shape, processes, options)
            seconds = [work / options.flops, rounding / options.flops, read / options.disk, sent / options.bytes]
            alone = alone or sum(seconds)
            print(f"| {shape.name} | {processes} | " + " | ".join(f"{value:.2f}" for value in [*seconds, sum(seconds)]) +
                  f" | {alone / sum(seconds):.1f} |")


if __name__ == "__main__":
    main()
