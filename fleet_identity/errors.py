"""Exceptions of the certificate authority and of enrolment.

::

    IdentityError
    ├── AuthorityError        the authority's folder or key cannot be used
    ├── NameRefused           a name that this identity must not have, or that nobody has
    ├── RequestRefused        a signing request that must not be signed
    ├── CertificateRefused    a certificate or key that does not fit what it is meant for
    └── CutOffFailed          a broker that cannot be told of a revocation, or does not obey
"""

from schemas.errors import FleetError

__all__ = [
    "AuthorityError",
    "CertificateRefused",
    "CutOffFailed",
    "IdentityError",
    "NameRefused",
    "RequestRefused",
]


class IdentityError(FleetError):
    """Base of all errors of this package. Its text is one sentence for the user."""


class AuthorityError(IdentityError):
    """The authority's folder or key cannot be used."""


class NameRefused(IdentityError):  # noqa: N818 - reads as what it says
    """A name that this identity must not have, or that nobody has."""


class RequestRefused(IdentityError):  # noqa: N818
    """A signing request that must not be signed."""


class CertificateRefused(IdentityError):  # noqa: N818
    """A certificate or key that does not fit what it is meant for."""


class CutOffFailed(IdentityError):  # noqa: N818
    """A broker that cannot be told of a revocation, or does not obey."""
