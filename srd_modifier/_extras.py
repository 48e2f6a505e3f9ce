"""The one place that knows which extra brings which optional library."""

from importlib.util import find_spec

from srd_modifier.errors import MissingExtraError


def require(module: str, *, extra: str) -> None:
    """Raise MissingExtraError, with the command that helps, unless `module` is installed."""
    if find_spec(module) is None:
        raise MissingExtraError(f"{module} is not installed; it comes with: pip install 'srd-modifier[{extra}]'")
