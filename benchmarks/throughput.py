"""Times our ops, losses, training step and input pipeline beside their peers, in one run.

\b
python benchmarks/throughput.py                          everything, into results/<device>.json
python benchmarks/throughput.py --section loss_section   one section, only printed
python benchmarks/throughput.py --quick                  few repetitions, only printed
python benchmarks/throughput.py --compare old.json --fail-below 0.8
python benchmarks/throughput.py --fail-below loss_section/128to512/both/time/eager:cpp=15
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import harness, memory, results, tables  # noqa: E402 - needs the path above

SECTIONS = (
    "loss_section",
    "softmax_confidence",
    "masked_cross_entropy",
    "stability_loss",
    "confusion_matrix",
    "cutmix",
    "step",
    "input",
)
# Not of interest in every run: minutes of preparation, and where eager wins.
ASKED_FOR = ("prepare", "crossover")
REPEATS = {"cpu": 7, "cuda": 31}
QUICK_REPEATS = 3
BUSY = 0.5  # load average a core above which the numbers are marked as taken on a busy machine


def measure_case(
    module: ModuleType, case: harness.Case, device: torch.device, repeats: int, quick: bool,
    copy_rate: float | None, without: tuple[str, ...] = (),
) -> tuple[list[results.Row], harness.Measured]:  # fmt: skip
    """Times, rates and peak memory of one case, as rows."""
    found = harness.measure(case, device, repeats, lambda name: name not in without)
    found.absent |= {name: "left out" for name in case.providers if name in without}
    rows = []
    traffic = {"forward": case.bytes_forward, "backward": case.bytes_backward}
    traffic["both"] = sum(traffic.values())
    for provider, modes in found.samples.items():
        where = (module.SECTION, case.name, provider)
        for mode, samples in modes.items():
            rows.append(results.row(where, mode, "time", "s", samples))
            if found.items[provider] and mode != "wall":
                rates = [found.items[provider] / s for s in samples]
                rows.append(results.row(where, mode, "images_per_s", "1/s", rates))
            if copy_rate and traffic.get(mode):
                moved = traffic[mode]
                rows.append(results.row(where, mode, "bytes_moved", "B", [float(moved)]))
                shares = [moved / s / copy_rate for s in samples]
                rows.append(results.row(where, mode, "bandwidth_share", "1", shares))
        if provider in case.memory and memory.unavailable(device) is None:
            ready = found.ready[provider]
            peak = memory.peak_extra_bytes(module.__name__, case, provider, device, quick, ready)
            mode = "both" if "both" in modes else next(iter(modes))
            rows.append(results.row(where, mode, "peak_memory", "B", [float(peak)]))
    return rows, found


def run_sections(
    names: tuple[str, ...], device: torch.device, repeats: int, quick: bool,
    without: tuple[str, ...] = (), out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the named sections and return the content of a result file.

    What is measured so far is in `out` after every case, for a run that is cut short.
    """
    begin = time.perf_counter()
    check_left_out(names, device, quick, without)
    header = results.make_header(device, repeats, quick)
    copy_rate = harness.percentiles(harness.copy_bandwidth(device, repeats))[0]
    header["copy_bandwidth_bytes_per_s"] = copy_rate
    content: dict[str, Any] = {
        "schema_version": results.SCHEMA_VERSION, "header": header, "rows": [],
        "not_measured": [], "wrong": [],
    }  # fmt: skip
    for name in names:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        for case in module.cases(device, quick):
            started = time.perf_counter()
            rows, found = measure_case(module, case, device, repeats, quick, copy_rate, without)
            content["rows"] += rows
            for key, reasons in (("not_measured", found.absent), ("wrong", found.wrong)):
                content[key] += [
                    {"section": name, "case": case.name, "provider": p, "reason": why}
                    for p, why in reasons.items()
                ]
            click.echo(f"  {name}/{case.name}: {time.perf_counter() - started:.0f} s", err=True)
            header["load_after"] = [round(x, 2) for x in os.getloadavg()]
            header["seconds"] = round(time.perf_counter() - begin, 1)
            if out is not None:
                results.save(out, content)
    return content


def check_left_out(
    names: tuple[str, ...], device: torch.device, quick: bool, without: tuple[str, ...]
) -> None:
    """A UsageError for a provider that no section has."""
    if not without:
        return
    modules = [importlib.import_module(f"benchmarks.bench_{name}") for name in names]
    known = {p for module in modules for case in module.cases(device, quick)
             for p in case.providers}
    unknown = [name for name in without if name not in known]
    if unknown:
        raise click.UsageError(f"--without {unknown[0]}: expected one of "
                               f"{', '.join(sorted(known))}")


def parse_bounds(texts: tuple[str, ...]) -> tuple[float | None, dict[str, float]]:
    """A bare number bounds new ratio over old ratio; NAME=NUMBER bounds one ratio itself."""
    relative, absolute = None, {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise click.UsageError(
                f"--fail-below: got {text!r}, expected a number or NAME=NUMBER"
            ) from None
        if name:
            absolute[name] = value
        else:
            relative = value
    return relative, absolute


def regressions(
    content: dict[str, Any], old: dict[str, Any] | None, bounds: tuple[str, ...]
) -> list[str]:
    """What fell under its bound, a line each. A bounded ratio that was not measured counts too."""
    relative, absolute = parse_bounds(bounds)
    if relative is not None and old is None:
        raise click.UsageError("--fail-below with a bare number needs --compare FILE")
    now = results.ratios(content)
    failed = []
    for name, bound in absolute.items():
        if name not in now:
            failed.append(f"{name}: not measured, bound {bound:g}")
        elif now[name] < bound:
            failed.append(f"{name}: {now[name]:.3g} is under {bound:g}")
    if relative is not None and old is not None:
        before = results.ratios(old)
        for name in sorted(now.keys() & before.keys()):
            kept = now[name] / before[name]
            if kept < relative:
                failed.append(
                    f"{name}: {before[name]:.3g} became {now[name]:.3g}, "
                    f"{kept:.2f} of it, under {relative:g}"
                )
    return failed


def print_comparison(content: dict[str, Any], old: dict[str, Any]) -> None:
    """Old and new value of every ratio that both files have."""
    now, before = results.ratios(content), results.ratios(old)
    lines = [
        [name, f"{before[name]:.2f}", f"{now[name]:.2f}", f"{now[name] / before[name]:.2f}"]
        for name in now
        if name in before
    ]
    click.echo("\nRatios against " + old["header"]["date"] + ", commit "
               + old["header"]["commit"][:10])  # fmt: skip
    click.echo(tables.plain(["ratio", "then", "now", "now / then"], lines))


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no CUDA GPU, so nothing was measured")
    return torch.device(name)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--section", "chosen", multiple=True, type=click.Choice((*SECTIONS, *ASKED_FOR)),
              help="Measure this section only. Repeatable.")  # fmt: skip
@click.option("--without", multiple=True, metavar="PROVIDER",
              help="Leave a provider out, such as compile. Repeatable.")  # fmt: skip
@click.option("--device", "device_name", type=click.Choice(["auto", "cpu", "cuda"]),
              default="auto", show_default=True)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Default: what torch chooses.")
@click.option("--repeats", type=click.IntRange(1), help="Rounds. Default: 7 on a CPU, 31 on a GPU.")
@click.option("--quick", is_flag=True, help=f"{QUICK_REPEATS} rounds.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="Result file. Default with all sections: results/<device>.json.")  # fmt: skip
@click.option("--compare", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Print ratios beside those of an earlier result file.")  # fmt: skip
@click.option("--fail-below", "bounds", multiple=True, metavar="RATIO|NAME=RATIO",
              help="Exit with 1 when a ratio falls under a share of the earlier one, or a named "
              "ratio under a value. Repeatable.")  # fmt: skip
def main(
    chosen: tuple[str, ...], without: tuple[str, ...], device_name: str, threads: int | None,
    repeats: int | None, quick: bool, out: Path | None, compare: Path | None,
    bounds: tuple[str, ...],
) -> None:  # fmt: skip
    parse_bounds(bounds)
    old = results.load(compare) if compare else None
    device = choose_device(device_name)
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":  # the released step: float32 with TF32, for every provider alike
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rounds = repeats or (QUICK_REPEATS if quick else REPEATS[device.type])
    if out is None and not chosen and not quick:
        count = torch.get_num_threads()
        out = results.FOLDER / (results.slug(device, count) + ".json")
    content = run_sections(chosen or SECTIONS, device, rounds, quick, without, out)
    click.echo(tables.report(content))
    header = content["header"]
    if max(header["load_before"][0], header["load_after"][0] - header["threads"]) > (
        BUSY * header["cores"]
    ):
        click.echo("Note: the machine was busy with other work; the spread shows how much.")
    if device.type == "cpu":
        click.echo("No GPU was measured: " + (
            "torch sees none." if not torch.cuda.is_available() else "--device cpu."
        ))  # fmt: skip
    if out is not None:
        click.echo(f"wrote {out}")
    if old is not None:
        print_comparison(content, old)
    failed = regressions(content, old, bounds)
    for line in failed:
        click.echo(f"below the bound: {line}", err=True)
    for entry in content["wrong"]:
        place = "/".join(entry[k] for k in ("section", "case", "provider"))
        click.echo(f"wrong result: {place} {entry['reason']}", err=True)
    if failed or content["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
