"""What the files of the command line have in common; imports nothing heavy."""

from __future__ import annotations

import errno
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from co2s_fast.errors import DataError, UsageError

PATH = click.Path(path_type=Path)


def set_offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Callback of `--offline`, before anything that could open a connection is imported."""
    if value:
        from co2s_fast.offline import go_offline

        go_offline()


offline_option = click.option("--offline", is_flag=True, expose_value=False, is_eager=True,
                              callback=set_offline, help="Open no connection; as HF_HUB_OFFLINE=1.")


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our kinds of error, and what a file system says, into one line and an exit code.

    Ctrl-C is 130, as of a training run; click would make it 1, which is that of wrong data.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (UsageError, DataError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            if error.errno == errno.EPIPE or not error.strerror:
                raise  # a reader that has left; errors of libraries, which say nothing in one line
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {where}{error.strerror}", err=True)
            sys.exit(DataError.exit_code)

    return run
