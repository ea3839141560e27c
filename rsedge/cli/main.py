"""The ``rsedge`` command: a group that loads a command's module when it is named, and errors that end in exit codes.

Exit codes: 0 done, 1 failed, 2 usage, 3 done but some tiles failed, 130 interrupted (resumable).
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from rsedge.cli.say import Formatter, guard_process, say, say_traceback
from rsedge.errors import RsedgeError

COMMANDS = {
    "back-translate": "Reword the captions of a set by translating them there and back.",
    "build": "Build a bundle's TensorRT engines for this machine's GPU.",
    "bench": "Time a bundle on this machine: tiles per second, stages, memory.",
    "caption": "Caption every tile of a scene, in map coordinates.",
    "classify": "Find the class of every tile, among labels in words.",
    "config": "Show and change your settings, such as the default model.",
    "demo": "Make a scene and caption it with the built-in model, offline.",
    "doctor": "Tell what this machine has, what would be used, and what is missing.",
    "embed": "Embed every tile of a scene, and images, as GeoParquet.",
    "evaluate": "Score captions, zero-shot classes or retrieval of a checkpoint or bundle.",
    "export": "Export a checkpoint to a bundle, proved against torch.",
    "import-rsdix": "Turn a published RSDiX checkpoint into Hugging Face layout.",
    "info": "Tell what a run would do with a scene, or what a bundle is.",
    "locate": "Find where in a scene is what a text names, as a heat map.",
    "search": "Find tiles by text, image or tile, in embeddings.",
    "train": "Fine-tune a captioner or a dual encoder on images and captions.",
    "tune": "Search a recipe's settings, or find a learning rate to start from.",
}
"""Command → its line in ``rsedge --help``: command = module = test. Here, so that help imports no command."""


class LazyGroup(click.Group):
    """A group whose commands are the modules of :mod:`rsedge.cli`, imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The commands, as help lists them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command ``cmd_name``, or None."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"rsedge.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
@click.option("--debug", is_flag=True, help="Show tracebacks; stands before the command.")
@click.version_option(package_name="rsedge")
def cli(quiet: bool, debug: bool) -> None:  # noqa: ARG001 - run() looks for --debug itself
    """Caption whole Sentinel-2 scenes on an edge device, without torch.

    Fine-tune and export a captioner once, then run the bundle anywhere.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rsedge").setLevel(logging.ERROR if quiet else logging.INFO)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    guard_process()
    sys.exit(run(arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    debug = "--debug" in arguments
    try:
        result = cli.main(args=list(arguments), prog_name="rsedge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        message = io.StringIO()
        error.show(file=message)
        say(message.getvalue(), err=True, nl=False)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted", err=True)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RsedgeError as error:
        if debug:
            say_traceback(error)
        else:
            say(f"Error: {error}", err=True)
        return error.exit_code
    except Exception as error:
        if debug:
            say_traceback(error)
        else:
            say(f"Error: unexpected {type(error).__name__}: {error}", err=True)
            say("This is a fault of rsedge; see where with: rsedge --debug …", err=True)
        return 1
