"""``rsedge config``: show and change the user's settings."""

from __future__ import annotations

import click

from rsedge.cli.say import say


@click.group("config")
def command() -> None:
    """Show and change your settings: the default model of commands without -m.

    The environment variable RSEDGE_MODEL overrides the setting. Without either, commands use the built-in model.
    """


@command.command("show")
def show() -> None:
    """Print every setting and the default model."""
    from rsedge.cli.settings import SETTINGS, default_model, read_settings, settings_path

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
    from rsedge.cli.settings import SETTINGS, read_settings
    from rsedge.errors import OptionError

    if name not in SETTINGS:
        raise OptionError(f"unknown setting {name!r}: expected {', '.join(SETTINGS)}")
    value = read_settings().get(name)
    if value is not None:
        say(value)
    return 0 if value is not None else 1


@command.command("set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Set NAME to VALUE. The setting model takes a bundle."""
    from rsedge.cli.settings import change_setting

    change_setting(name, value)


@command.command("unset")
@click.argument("name")
def unset(name: str) -> None:
    """Remove the setting NAME."""
    from rsedge.cli.settings import change_setting

    change_setting(name, None)


@command.command("path")
def path() -> None:
    """Print the path of the settings file."""
    from rsedge.cli.settings import settings_path

    say(str(settings_path()))
