"""The command line as a whole: start-up, help, errors and exit codes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import click
import pytest

from rsedge import __version__
from rsedge.cli import main as cli_main
from rsedge.cli.main import COMMANDS, RetriesInOneLine, cli, run
from rsedge.errors import OptionError, RsedgeError


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_help_imports_nothing_heavy():
    code = "import sys; from rsedge.cli.main import run; run(['--help']); print(sorted(sys.modules))"
    loaded = python("-c", code).stdout
    for heavy in ("numpy", "rasterio", "onnxruntime", "rich", "PIL", "tokenizers", "torch", "rsedge.cli.caption"):
        assert f"'{heavy}'" not in loaded, heavy


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name):
    code = f"import sys; from rsedge.cli.main import run; run([{name!r}, '--help']); print(sorted(sys.modules))"
    result = python("-c", code)
    assert f"Usage: rsedge {name}" in result.stdout
    for heavy in ("numpy", "rasterio", "onnxruntime", "rich", "torch"):
        assert f"'{heavy}'" not in result.stdout, heavy


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_module(name):
    command = cli.get_command(click.Context(cli), name)
    assert command.name == name
    assert command.callback.__module__ == f"rsedge.cli.{name.replace('-', '_')}"
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))


def test_python_m_rsedge_and_the_version():
    result = python("-m", "rsedge", "--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"rsedge, version {__version__}")


def test_completion_works():
    result = python("-m", "rsedge", _RSEDGE_COMPLETE="bash_complete", COMP_WORDS="rsedge cap", COMP_CWORD="1")
    assert "plain,caption" in result.stdout
    result = python("-m", "rsedge", _RSEDGE_COMPLETE="bash_complete", COMP_WORDS="rsedge caption --ove", COMP_CWORD="2")
    assert {"plain,--overlap", "plain,--overwrite"} <= set(result.stdout.split())
    for words in ("caption sc", "caption x.tif -o sc", "export sc", "train blip --data sc", "evaluate captions sc"):
        now = {"COMP_WORDS": f"rsedge {words}", "COMP_CWORD": str(len(words.split()))}
        result = python("-m", "rsedge", _RSEDGE_COMPLETE="bash_complete", **now)
        assert result.stdout.split() == ["file,sc"], words


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RsedgeError("it failed"), 1, "Error: it failed"),
        (OptionError("not this"), 2, "Error: not this"),
        (click.UsageError("no such"), 2, "Error: no such"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero"),
    ],
)
def test_errors_end_in_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(cli_main.cli, "main", fail)
    assert run(["caption"]) == code
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""


@pytest.mark.parametrize(("error", "code"), [(OptionError("not this"), 2), (ZeroDivisionError("by zero"), 1)])
def test_debug_shows_where(monkeypatch, capsys, error, code):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(cli_main.cli, "main", fail)
    assert run(["--debug", "caption"]) == code
    output = capsys.readouterr()
    assert output.err.startswith("Traceback (most recent call last):")
    assert "in fail\n" in output.err
    assert output.err.endswith(f"{error}\n")
    assert output.out == ""


def test_an_unknown_command_is_a_usage_error(capsys):
    assert run(["captoin"]) == 2
    assert "captoin" in capsys.readouterr().err


def test_proj_fetches_no_grid():
    code = "import os; from rsedge.cli.main import main\ntry: main(['--version'])\nfinally: print(os.environ[NAME])"
    done = python("-c", code.replace("NAME", "'PROJ_NETWORK'"), PROJ_NETWORK="ON")
    assert done.stdout.split()[-1] == "OFF"


def test_a_misspelt_command_gets_a_suggestion(capsys):
    assert run(["capton"]) == 2
    assert "there is no command 'capton': did you mean caption?" in capsys.readouterr().err
    assert run(["xyzzy"]) == 2
    assert "rsedge --help lists them" in capsys.readouterr().err


def test_retries_of_the_hub_are_one_line():
    records = [
        logging.LogRecord("huggingface_hub.utils._http", logging.WARNING, "", 0, text, (), None)
        for text in ("'timed out' thrown while requesting HEAD https://x", "Retrying in 1s [Retry 1/5].", "other") * 2
    ]
    kept = list(filter(RetriesInOneLine().filter, records))
    assert [record.getMessage().partition(":")[0] for record in kept] == [
        "the Hugging Face hub does not answer (timed out)", "other", "other"
    ]  # fmt: skip
