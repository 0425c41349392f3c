from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fleet_common.identity.authority import Authority, create_authority
from fleet_common.identity.certificates import IdentityRole, make_request, new_key


class FrozenClock:
    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def authority(tmp_path: Path, clock: FrozenClock) -> Authority:
    kept = [("north", IdentityRole.EDGE), ("desk", IdentityRole.MONITOR)]
    return create_authority(tmp_path / "ca", fleet="home", actor="tester", kept=kept, clock=clock)


def request_for(name: str) -> x509.CertificateSigningRequest:
    return x509.load_pem_x509_csr(make_request(new_key(), name))
