"""``rsedge config``: the user's settings."""

from __future__ import annotations

import click

from rsedge.cli.say import say


@click.group("config")
def command() -> None:
    """Show and change your settings: the model that commands use where no -m is given.

    RSEDGE_MODEL in the environment wins over the setting; without either it is the model built into rsedge.
    """


@command.command("show")
def show() -> None:
    """Print every setting, and which model is used by default."""
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
    """Print the value of the setting NAME; exit code 1 if it is not set."""
    from rsedge.cli.settings import SETTINGS, read_settings
    from rsedge.errors import OptionError

    if name not in SETTINGS:
        raise OptionError(f"there is no setting {name!r}: there is {', '.join(SETTINGS)}")
    value = read_settings().get(name)
    if value is not None:
        say(value)
    return 0 if value is not None else 1


@command.command("set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Set NAME to VALUE: a bundle, for the setting model."""
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
    """Print where the settings are kept."""
    from rsedge.cli.settings import settings_path

    say(str(settings_path()))
