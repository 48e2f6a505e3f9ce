"""`srd autoload`: find the plugin in every Python process, with no import."""

import typer

app = typer.Typer(help="Let every Python process of this environment find the plugin.", no_args_is_help=True)


@app.command("on")
def on() -> None:
    """Write the one-line .pth file."""
    from srd_modifier.autoload import turn_on

    typer.echo(f"on: {turn_on()}")


@app.command("off")
def off() -> None:
    """Remove it."""
    from srd_modifier.autoload import turn_off

    typer.echo("off" if turn_off() else "off already")


@app.command("status")
def status() -> None:
    """Say whether it is there, and where."""
    from srd_modifier.autoload import is_on, pth_file

    typer.echo(f"{'on' if is_on() else 'off'}: {pth_file()}")
