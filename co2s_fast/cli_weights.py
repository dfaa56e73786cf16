"""`co2s-fast weights`: list, fetch, import and verify pretrained weights."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from co2s_fast.cli_shared import PATH, offline_option, one_line_errors
from co2s_fast.errors import DataError


@click.group()
def weights() -> None:
    """List, fetch, import and verify pretrained weights."""


@weights.command("list")
@offline_option
@one_line_errors
def list_weights() -> None:
    """Show the known weights: model, licence, source, and where they lie on this machine."""
    from co2s_fast.models.weights.convert import table

    click.echo(table())


@weights.command("fetch")
@click.argument("names", nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, help="Folder for a copy, to take to another machine.")
@offline_option
@one_line_errors
def fetch_weights(names: tuple[str, ...], out: Path | None) -> None:
    """Download weights by name, and note their checksums."""
    from co2s_fast.models.weights.files import is_torchscript, torchscript_hint
    from co2s_fast.models.weights.registry import entry_named
    from co2s_fast.models.weights.store import fetch

    for entry in [entry_named(name) for name in names]:
        path = fetch(entry, out)
        click.echo(path)
        if is_torchscript(path):
            click.echo(f"this is {torchscript_hint(path)}", err=True)


@weights.command("import")
@click.argument("file", type=PATH)
@click.option("--as", "name", metavar="NAME", help="What the file is: a name of `weights list`.")
@click.option("--layout", help="How the file names its tensors. Default: told by its keys.")
@click.option("-o", "--out", type=PATH, metavar="FILE.safetensors",
              help="Default: where --as NAME is looked for.")
@offline_option
@one_line_errors
def import_weights(file: Path, out: Path | None, name: str | None, layout: str | None) -> None:
    """Convert an original release's file to safetensors with model, mean and deviation inside.

    \b
    co2s-fast weights import simmim_pretrain__vit_base__img224__800ep.pth --as simmim
    co2s-fast weights import checkpoint_teacher.pth --layout ibot -o ibot.safetensors
    """  # noqa: D301, click's mark for lines as they are
    from co2s_fast.models.weights.convert import import_weights

    click.echo(import_weights(file, out, name=name, layout=layout))


@weights.command("verify")
@click.argument("paths", nargs=-1, type=PATH, metavar="[FILE]...")
@offline_option
@one_line_errors
def verify_weights(paths: tuple[Path, ...]) -> None:
    """Check keys, shapes and checksums of files, or of all known weights on this machine."""
    from co2s_fast.models.weights.convert import verify, verify_all

    if paths:
        for path in paths:
            click.echo(f"{path}: {verify(path)}")
        return
    found = verify_all()
    for name, told, _ in found:
        click.echo(f"{name}: {told}")
    if not found:
        click.echo("none of the known weights is on this machine; see co2s-fast weights list")
    if not all(well for _, _, well in found):
        sys.exit(DataError.exit_code)
