"""The ``rsedge`` command: a group that imports each command when it runs, and errors as exit codes.

Exit codes: 0 done, 1 failed, 2 usage, 3 done but some tiles failed, 130 interrupted (resumable).
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from rsedge.cli.sandbox import FILES_READ, INPUTS, OUTPUTS
from rsedge.cli.say import Formatter, guard_process, say, say_traceback, shown
from rsedge.errors import RsedgeError
from rsedge.host import interrupted, is_out_of_memory
from rsedge.texts import first_line

COMMANDS = {
    "back-translate": "Paraphrase the captions of a data set by translation and back-translation.",
    "batch": "Caption or embed the scenes of a catalogue, a file per scene, and continue what is missing.",
    "build": "Build the TensorRT engines of a bundle for this machine's GPU.",
    "bench": "Measure the speed of a bundle on this machine: tiles per second, stages, memory.",
    "caption": "Write a caption for every tile of a scene, in map coordinates.",
    "classify": "Classify every tile of a scene by labels in words, without training.",
    "config": "Show and change your settings, such as the default model.",
    "demo": "Generate a scene and caption it with the built-in model, offline.",
    "doctor": "Show versions, devices and missing parts of this installation.",
    "embed": "Compute embeddings of tiles and images and write them as GeoParquet.",
    "evaluate": "Score the captions, classes or retrieval of a checkpoint or bundle.",
    "export": "Export a checkpoint to a bundle and compare it with torch.",
    "import-rsdix": "Convert a published RSDiX checkpoint to Hugging Face layout.",
    "info": "Describe a scene or a bundle: bands, tiles, expected time, graphs.",
    "locate": "Locate a described feature in a scene and write a heat map.",
    "search": "Search embeddings for the tiles most similar to a text, image or tile.",
    "train": "Fine-tune a captioner or a dual encoder on images and captions.",
    "tune": "Search for the best settings of a recipe, or suggest a learning rate.",
}
"""Command → its line in ``rsedge --help``. They stand here so that help imports no command; each has one module and one
test of its name.
"""


class RetriesInOneLine(logging.Filter):
    """Replaces the messages of the hub's retries by one line."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the first message of a retry pass, with other words, and drop the others."""
        text = record.getMessage()
        if "thrown while requesting" not in text and "Retrying in" not in text:
            return True
        if self.said:
            return False
        self.said = True
        reason = shown(text.split(" thrown while")[0].strip("'"))
        record.msg, record.args = (
            (
                f"the Hugging Face hub does not answer ({reason}): trying again for up to half a minute; with "
                "HF_HUB_OFFLINE=1 only the cache is used"
            ),
            (),
        )
        return True


# Parameters of type text that take a path, beside a hub id, an address or a list.
_FILES = {*INPUTS, *FILES_READ, *OUTPUTS, "sources", "source", "recipe", "init", "checkpoint", "tokenizer", "value"}


class _FileName(click.types.StringParamType):
    """Text that a shell completes as a path."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Return the word itself as the beginning of a path."""
        return [CompletionItem(incomplete, type="file")]


class LazyGroup(click.Group):
    """A group of the commands in :mod:`rsedge.cli`. It imports a command when the command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return the command ``cmd_name``, or None."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"rsedge.cli.{cmd_name.replace('-', '_')}").command
        for part in (command, *getattr(command, "commands", {}).values()):
            for parameter in part.params:
                if parameter.name in _FILES and parameter.type is click.STRING:
                    parameter.type = _FileName()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with a suggestion for a misspelt command."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f": did you mean {near[0]}?" if near else "; rsedge --help lists them"
            raise click.UsageError(f"there is no command {name!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
@click.option("--debug", is_flag=True, help="Print tracebacks. Give it before the command.")
@click.version_option(package_name="rsedge")
def cli(quiet: bool, debug: bool) -> None:  # noqa: ARG001 - run() looks for --debug itself
    """Caption, embed, search and classify Sentinel-2 scenes on an edge device, without torch.

    Fine-tune and export a model once, then run the bundle on any machine.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rsedge").setLevel(logging.ERROR if quiet else logging.INFO)
    # The hub's library prints its lines itself, two for each of its tries.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("huggingface_hub.utils._http").addFilter(RetriesInOneLine())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    guard_process()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and & in a script ignore SIGINT
            signal.signal(number, _interrupt)
    if hasattr(os, "register_at_fork"):  # a worker of a pool ends as its parent asks
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    sys.exit(run(arguments))


def _interrupt(*_: object) -> None:
    """Interrupt the run, which then keeps what is finished; the next signal ends this process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    interrupted.set()
    raise KeyboardInterrupt


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    debug = "--debug" in arguments
    try:
        # --sandbox passes the arguments to a second process, so the context keeps them.
        result = cli.main(args=list(arguments), prog_name="rsedge", standalone_mode=False, obj=tuple(arguments))
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
    except BrokenPipeError:  # the program that read our output has ended, for example `head`
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
        elif is_out_of_memory(error):
            remedy = (
                "pass a smaller --batch-size or raise the limit; the same command continues from the finished tiles"
            )
            say(f"Error: out of memory ({type(error).__name__}: {first_line(error)[:200]}): {remedy}", err=True)
        else:
            say(f"Error: unexpected {type(error).__name__}: {error}", err=True)
            say("This is an error in rsedge; print the traceback with: rsedge --debug …", err=True)
        return 1
