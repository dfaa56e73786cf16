"""Time of every kernel that the losses of one co2s step launch on a GPU, by torch.profiler.

\b
python benchmarks/kernel_times.py        into results/kernels-<device>.json

`throughput.py` says how long a pass takes; this says where the time goes. A row is the mean of
PASSES passes; `provider` is the kernel, and "all kernels" their sum, without the gaps between.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import bench_loss_section, harness, results, tables  # noqa: E402 - needs the path

SECTION = "kernels"
PASSES = 5
WARM_UP = 3


def short_name(kernel: str) -> str:
    """Name and first template argument of our kernels; PyTorch's small ones are added up."""
    found = re.search(r"co2s::cuda::(?:\(anonymous namespace\)::)?(\w+)<(?:c10::)?(\w+)", kernel)
    if found:
        return f"{found[1]} ({found[2].lower()})"
    return "copies" if kernel.startswith("Memcpy") else "PyTorch's"


def rows_of(case: str, kernels: Iterable[tuple[str, float]]) -> list[results.Row]:
    """Rows of `case` from (kernel, seconds of all passes), the longest first."""
    totals: dict[str, float] = {}
    for kernel, seconds in kernels:
        name = short_name(kernel)
        totals[name] = totals.get(name, 0.0) + seconds / PASSES
    totals = dict(sorted(totals.items(), key=lambda item: -item[1]))
    totals["all kernels"] = sum(totals.values())
    return [results.row((SECTION, case, name), "both", "time", "s", [seconds])
            for name, seconds in totals.items()]  # fmt: skip


def measure(case: harness.Case, device: torch.device) -> list[results.Row]:
    """Profile PASSES forward and backward passes of our CUDA losses."""
    workload = case.build("cuda", device)
    with harness.scope("cuda"):
        for _ in range(WARM_UP):
            harness.run_pass(workload)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(PASSES):
                harness.run_pass(workload)
                torch.cuda.synchronize()
    events = [(e.key, e.device_time_total / 1e6) for e in found.key_averages()]
    return rows_of(case.name, [(name, seconds) for name, seconds in events if seconds > 0])


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file.")
def main(out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no CUDA GPU, so nothing was measured")
    device, begin = torch.device("cuda"), time.perf_counter()
    header = results.make_header(device, PASSES, False)
    rows: list[dict[str, Any]] = []
    for case in bench_loss_section.cases(device, quick=False):
        rows += measure(case, device)
    header["load_after"] = [round(x, 2) for x in os.getloadavg()]
    header["seconds"] = round(time.perf_counter() - begin, 1)
    content = {"schema_version": results.SCHEMA_VERSION, "header": header, "rows": rows,
               "not_measured": [], "wrong": []}  # fmt: skip
    name = f"{SECTION}-{results.slug(device, torch.get_num_threads())}.json"
    results.save(out or results.FOLDER / name, content)
    lines = [[r["case"], r["provider"], f"{r['median'] * 1e6:.1f}"] for r in rows]
    click.echo(tables.plain(["case", "kernel", "us a pass"], lines))


if __name__ == "__main__":
    main()
