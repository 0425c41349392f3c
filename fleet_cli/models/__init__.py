"""`fleet models`: makes the draft and target models that the demo and the tests use."""

from fleet_cli.models.commands import app

__all__ = ["app"]
