"""Version of this package as installed, which both ends report."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("dssd-fleet")
except PackageNotFoundError:
    # Run from a source tree that was never installed.
    VERSION = "0+unknown"
