"""The estimate of a training step's memory (`train --gpu-mem`), beside what a GPU measured.

    python benchmarks/memory_estimate.py                  # beside results/step-*.json
    python benchmarks/memory_estimate.py --results FILE   # beside another file of throughput.py

Runs anywhere, in seconds. `throughput.py` measures what a step takes beside weights and optimizer;
the same part of the estimate is compared. Cases that the estimate knows nothing of (`compile`,
`channels_last`, the peers) are left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import results  # noqa: E402 - needs the path above
from benchmarks.bench_step import THRESHOLD, random_students  # noqa: E402
from benchmarks.inputs import BATCH  # noqa: E402
from co2s_fast.engine.footprint import step_peak  # noqa: E402
from co2s_fast.methods import get_method  # noqa: E402

CROP = 512
HALF = {"ours": True, "ours_float32": False}  # providers of bench_step, and whether in bfloat16


def estimates() -> dict[str, int]:
    """Bytes of a step of the ViT-B/16 pair, by provider."""
    method = get_method("co2s")
    of = partial(step_peak, method(random_students(False), method.Config(threshold=THRESHOLD)),
                 BATCH, CROP)  # fmt: skip
    return {provider: of(half=half) for provider, half in HALF.items()}


def measured(path: Path) -> dict[str, float]:
    """What a result file of `throughput.py` has of the same."""
    rows = json.loads(path.read_text())["rows"]
    return {
        row["provider"]: row["median"] for row in rows
        if (row["section"], row["case"], row["metric"]) == ("step", "vit_b16", "peak_memory")
        and row["provider"] in HALF
    }  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--results", "files", multiple=True, help="Files of throughput.py.",
              type=click.Path(path_type=Path, exists=True, dir_okay=False))  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file.")
def main(files: tuple[Path, ...], out: Path | None) -> None:
    files = files or tuple(sorted(results.FOLDER.glob("step-*.json")))
    begin = time.perf_counter()
    device = torch.device("cpu")
    header = results.make_header(device, 1, False)
    rows = []
    for provider, size in estimates().items():
        rows.append(results.row(("memory", provider, "estimate"), "step", "peak_memory", "B",
                                [float(size)]))  # fmt: skip
        for path in files:
            if provider in (found := measured(path)):
                rows.append(results.row(("memory", provider, path.stem), "step", "peak_memory",
                                        "B", [found[provider]]))  # fmt: skip
    header["load_after"] = [round(x, 2) for x in os.getloadavg()]
    header["seconds"] = round(time.perf_counter() - begin, 1)
    content = {"schema_version": results.SCHEMA_VERSION, "header": header, "rows": rows,
               "not_measured": [], "wrong": []}  # fmt: skip
    out = out or results.FOLDER / f"memory-estimate-{results.slug(device, header['threads'])}.json"
    results.save(out, content)
    for row in rows:
        click.echo(f"{row['case']:14} {row['provider']:36} {row['median'] / 2**30:6.2f} GiB")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
