"""The command line: its commands, and how a run ends.

Exit codes: 0 done, 2 wrong use or an impossible request (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any, NoReturn

from bitatlas.errors import UserError, file_trouble

INTERRUPTED = "bitatlas: interrupted; what was measured is kept: run the same command with --resume to go on"
QUANTIZE_INTERRUPTED = "bitatlas: interrupted; what was measured is kept: the same command goes on"
TUNE_INTERRUPTED = "bitatlas: interrupted; the same command goes on from the last quarter of the steps"
try:
    import typer
except KeyboardInterrupt:  # most of the time before main() goes by here
    print(INTERRUPTED, file=sys.stderr)
    raise SystemExit(1) from None

from bitatlas.cli import commands  # noqa: E402  (it imports typer)
from bitatlas.cli.options import command  # noqa: E402

app = typer.Typer(
    help="What low-bit weights do to a language model: measured, planned, verified.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What typer raises for wrong words on the command line: click's own class, or typer's copy of it.
WrongUse: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
TYPER_INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        print(f"bitatlas {metadata.version('bitatlas')}")
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: command(function)
    for function in (
        commands.survey,
        commands.quantize,
        commands.plan,
        commands.tune,
        commands.apply,
        commands.export,
        commands.verify,
        commands.compare,
        commands.report,
    )
}
for name, function in COMMANDS.items():
    app.command(name)(function)


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False) or 0
    except (UserError, WrongUse) as error:
        _end(f"bitatlas: {_message(error)}", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = TYPER_INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output went away, like `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        line = file_trouble(error)
        if line is None:
            raise
        _end(f"bitatlas: {line}", 2)
    if code == TYPER_INTERRUPTED:
        texts = {"survey": INTERRUPTED, "quantize": QUANTIZE_INTERRUPTED, "tune": TUNE_INTERRUPTED}
        _end(texts.get("".join(sys.argv[1:2]), "bitatlas: interrupted"), 1)
    raise SystemExit(code)


def _message(error: Any) -> str:
    """Return what is wrong; for wrong words on the command line, also where the right ones are listed."""
    if isinstance(error, UserError):
        return str(error)
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already, or is the message
        print(error.format_message(), end="", file=sys.stderr)
        raise SystemExit(2)
    hint = f" (see {context.command_path} --help)" if context else ""
    return f"{error.format_message().strip().rstrip('.')}{hint}"


def _end(line: str, code: int) -> NoReturn:
    from bitatlas.records.text import visible

    print(visible(" ".join(line.split())), file=sys.stderr)
    raise SystemExit(code)
