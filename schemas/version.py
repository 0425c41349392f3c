"""The installed version of this package, as both ends report it."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("dssd-fleet")
except PackageNotFoundError:
    # Run from a source tree that was never installed.
    VERSION = "0+unknown"
