"""The `srd` command: one file per command, arguments and printing only.

Expected errors become one sentence on stderr and status 1, here and nowhere else; unexpected ones keep their
traceback. Heavy libraries are imported by the command that needs them, so `srd --help` is quick.
"""

import os
import sys

import typer

from srd_modifier.errors import SRDError

_EPILOG = "Set SRD_TRACEBACK=1 to see where an error came from."


def main() -> None:
    """Run the command line."""
    if not sys.stderr.isatty():
        # no bars in a log: tqdm reads this when it is imported, which is later
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        _app()()
    except SRDError as error:
        _fail(error, str(error))
    except OSError as error:
        _fail(error, f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _app() -> typer.Typer:
    from srd_modifier.cli import autoload, axm, card, compare, demo, export, inspect, met, plan, qat, quantize, trim
    from srd_modifier.cli import eval as eval_

    app = typer.Typer(
        name="srd",
        help="Keep what W4A16 quantization loses, and put it back.",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("quantize")(quantize.quantize)
    app.command("plan")(plan.plan)
    app.command("qat")(qat.qat)
    app.command("inspect")(inspect.inspect)
    app.command("eval")(eval_.evaluate)
    app.command("compare")(compare.compare)
    app.command("card")(card.card)
    app.command("trim")(trim.trim)
    app.add_typer(export.app, name="export")
    app.add_typer(axm.app, name="axm")
    app.command("met")(met.met)
    app.command("demo")(demo.demo)
    app.add_typer(autoload.app, name="autoload")
    return app


def _fail(error: Exception, message: str) -> None:
    if os.environ.get("SRD_TRACEBACK"):
        raise error
    print(f"srd: {message}", file=sys.stderr)
    sys.exit(1)
