"""Exception tree of `fleet models`.

::

    ModelsError
    ├── SourceMissing      the package that carries the model is not installed
    ├── SourceDamaged      the model in that package is not what it was
    ├── NotEnoughSpace     the disk is too full to begin
    ├── FolderUnusable     the models folder cannot be written
    └── StepFailed         a conversion failed
"""

from schemas.errors import FleetError


class ModelsError(FleetError):
    """Base of the errors of this package. Its text is one sentence for the user."""


class SourceMissing(ModelsError):  # noqa: N818 - reads as what it says
    """The package that carries the model is not installed."""


class SourceDamaged(ModelsError):  # noqa: N818
    """The model in that package is not what it was."""


class NotEnoughSpace(ModelsError):  # noqa: N818
    """The disk is too full to begin."""


class FolderUnusable(ModelsError):  # noqa: N818
    """The models folder cannot be written."""


class StepFailed(ModelsError):  # noqa: N818
    """A conversion failed; what was finished before it is kept."""
