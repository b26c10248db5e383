"""The command line: reads the arguments, runs the command, and says in a line what stopped it.

Parsing needs nothing but the standard library, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from rsaft_fast.cli.parser import build_parser, parse_arguments
from rsaft_fast.errors import UserError, printable
from rsaft_fast.paths import require_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 when the input or the disk is wrong, 130 or 143 when a signal stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _say_all_characters()
    command = ""
    try:
        for argument in argv:
            _require_text(argument)
        try:
            arguments = parse_arguments(build_parser(), argv or ["--help"])
        except SystemExit:  # of --help and --version
            _flush_output()
            raise
        command = arguments.command
        code = _run(arguments)
        _flush_output()
        return code
    except UserError as error:
        _say_error(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        kept = "; a run's newest complete checkpoint stays (resume=auto)" if command in ("train", "demo") else ""
        print(f"rsaft-fast: interrupted at once{kept}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except BrokenPipeError:
        # The reader (head, less) has gone; what it wanted to see, it saw.
        _drop_output()
        return 0
    except OSError as error:
        from rsaft_fast.files import describe_io_error, mend_of

        _drop_output()
        with suppress(OSError):  # standard error may be on the same full disk
            _say_error(f"{describe_io_error(error)}; {mend_of(error)}")
        return 2


def _say_error(text: str) -> None:
    for line in text.split("\n"):
        print(f"rsaft-fast: error: {printable(line)}", file=sys.stderr)


def _flush_output() -> None:
    """Write out what was printed: what a full disk does not take is found here, and not at the interpreter's end."""
    try:
        print(end="", flush=True)
    except OSError as error:
        error.filename = error.filename or "standard output"
        raise


def _drop_output() -> None:
    """Let go of what standard output does not take; the interpreter would try it again at its end, and exit by 120."""
    try:
        print(end="", flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _say_all_characters() -> None:
    """A terminal or file that lacks a character (`±` in ASCII) gets its number: no work is lost for want of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_text(argument: str) -> None:
    try:
        require_text(argument)
    except ValueError as error:
        raise UserError(f"the argument {argument[:60]!r}: {error}") from error


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train" and arguments.recipe is None and arguments.help_config is None:
        raise UserError("train needs a recipe: rsaft-fast train RECIPE.yaml [key=value ...]")
    from rsaft_fast.process import prepare_process

    prepare_process(quieten=arguments.command != "bench")
    command = importlib.import_module(f"rsaft_fast.commands.{arguments.command}")
    if arguments.command == "train" and arguments.help_config is not None:
        return command.print_keys(arguments.help_config)
    return command.run(arguments)
