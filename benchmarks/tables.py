"""Tables from result files: plain ones for the terminal, Markdown ones for the documents.

    python benchmarks/tables.py            rewrite the tables in README.md and benchmarks/RESULTS.md
    python benchmarks/tables.py --check    exit with 1 when they are not what the results say

A table stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`. NAME is a section of
throughput.py, `goals`, or `accuracy_<dataset>`. `section@device` takes one result file only, and
`goals@one+other` those of two, for sections that were measured at different times.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md")
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import results  # noqa: E402 - needs the path above

MARKER = re.compile(
    r"(<!-- benchmark:(?P<name>[\w@.+-]+) -->\n)(?P<body>.*?)(<!-- /benchmark -->)", re.DOTALL
)
TIMES = ("forward", "backward", "both", "step", "load", "predict")
NAMES = {
    "eager_in_batch": "eager, partner in batch",
    "eager_our_networks": "eager on our networks",
    "eager_autocast": "eager, bfloat16 autocast",
    "compile": "torch.compile",
    "compile_autocast": "torch.compile + autocast",
    "ours_float32": "ours, float32",
    "ours_channels_last": "ours, channels last",
    "ours_compile": "ours, torch.compile",
    "liger": "liger-kernel",
    "loop": "NumPy, colour by colour",
    "loop_our_png": "the same, tiles written by our PNG writer",
    "pil": "PIL + torchvision",
    "pil_mix": "PIL + torchvision, second loader for partners",
    "torch": "ours, torch loader",
    "dali": "ours, DALI loader",
}


def plain(head: list[str], lines: list[list[str]]) -> str:
    """Columns lined up by spaces: text left, numbers right."""
    table = [head, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]

    def show(line: list[str]) -> str:
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([show(head), "  ".join("-" * w for w in widths), *map(show, lines)])


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A GitHub table: text columns left, numbers right."""
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def seconds(row: dict[str, Any] | None, spread: bool) -> str:
    """Milliseconds to three digits, with the 20th to 80th percentile when asked for."""
    if row is None:
        return "-"

    def ms(value: float) -> str:
        shown = value * 1e3
        return f"{shown:.0f}" if shown >= 100 else f"{shown:.3g}"

    text = ms(row["median"])
    return f"{text} ({ms(row['p20'])}-{ms(row['p80'])})" if spread else text


def _memory(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['median'] / 2**20:.3g}" if (
        row["median"] < 100 * 2**20
    ) else f"{row['median'] / 2**20:.0f}"  # fmt: skip


def _times_faster(rows: list[dict[str, Any]], row: dict[str, Any], first: str) -> str:
    keys = {k: row[k] for k in ("section", "case", "mode", "metric")}
    yardstick = results.lookup(rows, provider=first, **keys)
    if yardstick is None or not row["median"]:
        return "-"
    times = yardstick["median"] / row["median"]
    return f"{times:.0f}x" if times >= 100 else f"{times:.3g}x"


def section_lines(content: dict[str, Any], section: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of one section's table: every provider of every case, losers included."""
    rows = [r for r in content["rows"] if r["section"] == section]
    modes = [m for m in TIMES if any(r["mode"] == m and r["metric"] == "time" for r in rows)]
    order = ("both", "step", "load", "predict", "forward")
    total = next((m for m in order if m in modes), "forward")
    has_rate = any(r["metric"] == "images_per_s" for r in rows)
    has_share = any(r["metric"] == "bandwidth_share" for r in rows)
    head = ["case", "provider", *(f"{mode}, ms" for mode in modes)]
    head += ["images/s"] * has_rate + ["against first", "peak extra, MiB"]
    head += ["copy bandwidth"] * has_share
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        names = list(dict.fromkeys(r["provider"] for r in rows if r["case"] == case))
        for name in names:
            own = [r for r in rows if r["case"] == case and r["provider"] == name]
            at = {m: results.lookup(own, mode=m, metric="time") for m in modes}
            line = [case, NAMES.get(name, name)]
            line += [seconds(at[m], spread=m == total) for m in modes]
            if has_rate:
                rate = results.lookup(own, metric="images_per_s")
                line.append("-" if rate is None else f"{rate['median']:.3g}")
            per_item = _rate_against(rows, own, names[0]) if has_rate else None
            line.append(per_item or _times_faster(rows, at[total] or own[0], names[0]))
            line.append(_memory(results.lookup(own, metric="peak_memory")))
            if has_share:
                share = results.lookup(own, metric="bandwidth_share", mode=total)
                line.append("-" if share is None else f"{100 * share['median']:.0f} %")
            lines.append(line)
    return head, lines


def _rate_against(rows: list[dict], own: list[dict], first: str) -> str | None:
    mine = results.lookup(own, metric="images_per_s")
    if mine is None:
        return None
    keys = {k: mine[k] for k in ("section", "case", "mode", "metric")}
    yardstick = results.lookup(rows, provider=first, **keys)
    return None if yardstick is None else f"{mine['median'] / yardstick['median']:.3g}x"


def absences(content: dict[str, Any], section: str) -> list[str]:
    """One line for each provider that was not measured or came out wrong, cases gathered."""
    entries = (*content["rows"], *content["not_measured"], *content["wrong"])
    all_cases = {entry["case"] for entry in entries if entry["section"] == section}
    gathered: dict[tuple[str, str, str], list[str]] = {}
    for key, word in (("not_measured", "not measured"), ("wrong", "wrong result")):
        for entry in content[key]:
            if entry["section"] == section:
                what = (entry["provider"], word, entry["reason"])
                gathered.setdefault(what, []).append(entry["case"])
    return [
        f"{NAMES.get(provider, provider)} {word} "
        f"({'any case' if len(cases) == len(all_cases) > 1 else ', '.join(cases)}): {reason}"
        for (provider, word, reason), cases in gathered.items()
    ]


def caption(content: dict[str, Any]) -> str:
    """One line that says where the numbers come from."""
    h = content["header"]
    commit = h["commit"][:10] + (" with local changes" if h["dirty"] else "")
    parts = [
        h["device"],
        f"{h['threads']} threads of {h['cores']} cores",
        f"torch {h['versions']['torch']}",
        h["date"][:10],
        f"commit {commit}",
        f"median of {h['repeats']} (p20-p80)",
        f"load before {h['load_before'][0]:g}",
    ]
    if "copy_bandwidth_bytes_per_s" in h:
        rate = h["copy_bandwidth_bytes_per_s"]
        shown = f"{rate / 1e12:.2f} TB/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GB/s"
        parts.append(f"copy bandwidth {shown}")
    return ", ".join(parts)


def goal_lines(*contents: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the goals; of several files, the first that measured one tells."""
    found: dict[str, tuple[float, float | None]] = {}
    for name, goal, value in (each for content in contents for each in results.goals(content)):
        if found.get(name, (goal, None))[1] is None:
            found[name] = (goal, value)
    lines = [
        [name, "not measured" if value is None else "reached" if value >= goal else "missed",
         f"{goal:g}", "-" if value is None else f"{value:.3g}"]
        for name, (goal, value) in found.items()
    ]  # fmt: skip
    return ["ratio", "state", "goal", "measured"], lines


def report(content: dict[str, Any]) -> str:
    """Everything in a result file, for the terminal."""
    parts = [caption(content)]
    sections = [r["section"] for r in (*content["rows"], *content["not_measured"])]
    for section in dict.fromkeys(sections):
        head, lines = section_lines(content, section)
        parts.append(f"\n{section}\n" + plain(head, lines))
        parts += ["  " + line for line in absences(content, section)]
    head, lines = goal_lines(content)
    parts.append("\ngoals\n" + plain(head, lines))
    return "\n".join(parts)


def _throughput_table(name: str, folder: Path) -> str:
    section, _, device = name.partition("@")
    if section == "goals" and "+" in device:
        contents = [results.load(folder / f"{stem}.json") for stem in device.split("+")]
        captions = "\n\n".join(map(caption, contents))
        return f"{captions}\n\n{markdown(*goal_lines(*contents))}"
    parts = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("accuracy_") or (device and path.stem != device):
            continue
        content = results.load(path)
        head, lines = goal_lines(content) if section == "goals" else section_lines(content, section)
        if not lines:
            continue
        missing = absences(content, section)
        notes = "".join(f"\n- {line}" for line in missing)
        parts.append(f"{caption(content)}\n\n{markdown(head, lines)}" + (notes and "\n" + notes))
    if not parts:
        raise ValueError(f"benchmark:{name}: no file in {folder} has such a table")
    return "\n\n".join(parts)


def accuracy_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean ± standard deviation over seeds of the final and the best mIoU."""
    students = content["students"]
    head = ["labelled", "method", "seeds"]
    head += [f"{s} {w}" for w in ("final", "best") for s in students]
    lines = []
    for group in content["summary"]:
        line = [str(group["labels"]), group["method"], str(group["n"])]
        for when in ("final", "best"):
            for student in students:
                at = group[when][student]
                spread = "" if at["std"] is None else f" ± {100 * at['std']:.1f}"
                line.append(f"{100 * at['mean']:.1f}{spread}")
        lines.append(line)
    return head, lines


def table(name: str, folder: Path) -> str:
    """The Markdown that belongs between the markers of `name`."""
    if not name.startswith("accuracy_"):
        return _throughput_table(name, folder)
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"benchmark:{name}: there is no {path}")
    content = json.loads(path.read_text())
    h = content["header"]
    # Runs may have been trained before the file was written, by other code.
    commits = [each for each in content["runs"] if "commit" in each] or [h]
    shown = dict.fromkeys(each["commit"][:10] + (" with local changes" if each["dirty"] else "")
                          for each in commits)
    note = f"mIoU in %, {h['date'][:10]}, commit {' and '.join(shown)}, {h['device']}"
    return f"{note}\n\n{markdown(*accuracy_table(content))}"


def render(text: str, folder: Path) -> str:
    """`text` with every marked table made anew from the result files."""
    if text.count("<!-- benchmark:") != len(MARKER.findall(text)):
        raise ValueError("a benchmark marker has no <!-- /benchmark --> after it")
    return MARKER.sub(lambda m: f"{m[1]}{table(m['name'], folder)}\n{m[4]}", text)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.argument("documents", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--results", "folder", type=click.Path(path_type=Path), default=results.FOLDER)
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a table is stale.")
def main(documents: tuple[Path, ...], folder: Path, check: bool) -> None:
    for document in documents or DOCUMENTS:
        before = document.read_text()
        after = render(before, folder)
        if check and after != before:
            raise click.ClickException(
                f"{document}: tables are stale; run python benchmarks/tables.py"
            )
        if after != before:
            partial = document.with_name(document.name + ".part")
            partial.write_text(after)
            partial.replace(document)
        click.echo(f"{document}: " + ("unchanged" if after == before else "tables written"))


if __name__ == "__main__":
    main()
