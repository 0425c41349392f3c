"""Which exceptions are the user's to mend: their text is a sentence that says what to do."""

import sys
from typing import Final

__all__ = ["CommandError", "user_errors"]

# Each package has one exception tree. They are looked up by name so that reporting an error imports neither end.
_TREES: Final = {
    "broker_config.errors": "BrokerError",
    "fleet_cli.models.errors": "ModelsError",
    "fleet_device.drafter": "DrafterError",
    "fleet_device.errors": "DeviceError",
    "fleet_edge.errors": "EdgeError",
    "fleet_edge.jobs": "JobsError",
    "fleet_edge.store.errors": "StoreError",
    "fleet_edge.verifier.protocol": "VerifierError",
    "fleet_identity.errors": "IdentityError",
    "fleet_link.errors": "LinkError",
    "schemas.errors": "SchemaError",
}


class CommandError(Exception):
    """A command cannot do what it was asked. Its text is one sentence for the user."""


def user_errors() -> tuple[type[BaseException], ...]:
    """Return the bases of all error trees that have been imported."""
    trees: list[type[BaseException]] = [CommandError]
    for module, name in _TREES.items():
        if module in sys.modules:
            trees.append(getattr(sys.modules[module], name))
    return tuple(trees)
