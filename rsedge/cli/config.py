"""``rsedge config``: show and change the user's settings, such as the default bundle."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path

import click

from rsedge.bundle import read_bundle
from rsedge.cli.say import say
from rsedge.errors import BundleError, OptionError, OutputError
from rsedge.tomlfile import read_toml, write_toml

ENVIRONMENT = "RSEDGE_MODEL"
SETTINGS = {"model": "Bundle of commands without -m."}
"""Setting of ``rsedge config`` → its meaning."""


@click.group("config")
def command() -> None:
    """Show and change your settings: the default model of commands without -m.

    The environment variable RSEDGE_MODEL overrides the setting. Without either, commands use the built-in model.
    """


@command.command("show")
def show() -> None:
    """Print every setting and the default model."""
    values = read_settings()
    say(f"# {settings_path()}")
    for name, meaning in SETTINGS.items():
        say(f"{name} = {values.get(name, '(not set)')}  # {meaning}")
    path, reason = default_model()
    say(f"default model: {path} ({reason})")


@command.command("get")
@click.argument("name")
def get(name: str) -> int:
    """Print the value of the setting NAME. The exit code is 1 if it is not set."""
    _check_known(name)
    value = read_settings().get(name)
    if value is not None:
        say(value)
    return 0 if value is not None else 1


@command.command("set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Set NAME to VALUE. The setting model takes a bundle."""
    change_setting(name, value)


@command.command("unset")
@click.argument("name")
def unset(name: str) -> None:
    """Remove the setting NAME."""
    change_setting(name, None)


@command.command("path")
def path() -> None:
    """Print the path of the settings file."""
    say(str(settings_path()))


def default_model() -> tuple[Path, str]:
    """Return the path of the default bundle, and its source: ``RSEDGE_MODEL``, the user's settings, or built in.

    Raises:
        BundleError: The chosen path is no bundle; the message names the setting and the next step.
        OptionError: The settings cannot be read.
    """
    if given := os.environ.get(ENVIRONMENT):
        source, remedy = f"{ENVIRONMENT} in the environment", f"set {ENVIRONMENT} to a bundle, or unset it"
    elif given := read_settings().get("model"):
        source = f"model in {settings_path()}"
        remedy = "rsedge config set model BUNDLE chooses another, rsedge config unset model the built-in one"
    else:
        return (
            built_in_model(),
            "built in, for land cover in Sentinel-2 true colour at 10 m; choose your own with -m, or rsedge config set "
            "model BUNDLE",
        )
    path = Path(given).expanduser()
    try:
        read_bundle(path)
    except BundleError as error:
        raise BundleError(f"the default model, from {source}, cannot be used: {error}\n{remedy}") from error
    return path, source


def built_in_model() -> Path:
    """Return the bundle that is installed with rsedge."""
    return Path(str(files("rsedge").joinpath("builtin", "sentinel2-rgb.rsedge")))


def settings_path() -> Path:
    """Return the path of the user's settings file, which may not exist."""
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming"
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "rsedge" / "config.toml"


def read_settings() -> dict[str, str]:
    """Return the user's settings; empty without a file.

    Raises:
        OptionError: The file is not TOML, or has unknown keys or wrong values; the message names all of them.
    """
    path = settings_path()
    if not path.exists():
        return {}
    values = read_toml(path)
    problems = [f"unknown setting {name}" for name in sorted(set(values) - set(SETTINGS))]
    texts = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    problems += [
        f"{name} is {value!r}, expected text" for name, value in texts.items() if not (isinstance(value, str) and value)
    ]
    if problems:
        raise OptionError(f"{path}: {'; '.join(problems)}; known settings: {', '.join(SETTINGS)}")
    return values


def change_setting(name: str, value: str | None) -> None:
    """Set a setting, or remove it if ``value`` is None. A path is checked and stored as an absolute path.

    Raises:
        OptionError: The setting is unknown, or the settings cannot be read.
        BundleError: ``value`` is not a bundle.
        OutputError: The file cannot be written.
    """
    _check_known(name)
    settings = read_settings()
    if value is not None:
        value = str(read_bundle(Path(value).expanduser()).path.resolve())
    path = settings_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_toml(path, {**settings, name: value})
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _check_known(name: str) -> None:
    if name not in SETTINGS:
        raise OptionError(f"unknown setting {name!r}: expected {', '.join(SETTINGS)}")
