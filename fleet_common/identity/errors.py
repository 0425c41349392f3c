"""Exceptions of the certificate authority and of enrolment.

::

    IdentityError
    ├── AuthorityError        the authority's folder or key cannot be used
    ├── NameRefused           the identity must not have this name, or the name is unknown
    ├── RequestRefused        the signing request must not be signed
    ├── CertificateRefused    the certificate or key does not fit its purpose
    └── CutOffFailed          the broker cannot be notified of a revocation, or does not obey it
"""

from schemas.errors import FleetError


class IdentityError(FleetError):
    """Base class of the errors of this package. Its message is one sentence for the user."""


class AuthorityError(IdentityError):
    """The authority's folder or key cannot be used."""


class NameRefused(IdentityError):  # noqa: N818 - reads as what it says
    """The identity must not have this name, or the name is unknown."""


class RequestRefused(IdentityError):  # noqa: N818
    """The signing request must not be signed."""


class CertificateRefused(IdentityError):  # noqa: N818
    """The certificate or key does not fit its purpose."""


class CutOffFailed(IdentityError):  # noqa: N818
    """The broker cannot be notified of a revocation, or does not obey it."""
