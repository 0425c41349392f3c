from typing import Any

import pytest

from dssd.distribution import point_mass
from dssd.sampling import propose
from fleet_device.errors import ProtocolViolation
from fleet_device.session.sequence import Rejection
from schemas.downlink import Samples, Sparse
from schemas.policy import Mode, SamplingPolicy

P = Sparse(ids=(6,), probs=(1.0,))


def policy(mode: Mode = Mode.RESIDUAL) -> SamplingPolicy:
    return SamplingPolicy(mode=mode, seed=1)


def rejection(mode: Mode = Mode.RESIDUAL) -> Rejection:
    """Token 4, drafted for certain, was rejected."""
    return Rejection(propose(point_mass(4), policy=policy(mode), position=3), position=3)


def samples(start: int, *ids: int) -> Samples:
    """A sample of 4 never passes where the draft was certain of it; any other always does."""
    return Samples(start=start, ids=ids, probs=(0.5,) * len(ids))


def test_in_residual_mode_the_device_draws_from_what_the_edge_sent() -> None:
    rejected = rejection()
    assert rejected.device_draws
    assert rejected.correction(P, policy=policy()) == 6


def test_in_coupled_mode_the_edge_has_drawn() -> None:
    rejected = rejection(Mode.COUPLED)
    assert not rejected.device_draws
    assert rejected.correction(8, policy=policy(Mode.COUPLED)) == 8


def test_samples_are_tried_in_their_order_until_one_passes() -> None:
    rejected = rejection()
    assert rejected.correction(samples(0, 4, 4, 4), policy=policy()) is None
    assert rejected.tried == 3
    assert rejected.correction(samples(3, 4, 7, 8), policy=policy()) == 7


@pytest.mark.parametrize("start", [0, 2, 4])
def test_samples_that_do_not_begin_where_the_last_ended_are_refused(start: int) -> None:
    rejected = rejection()
    rejected.correction(samples(0, 4, 4, 4), policy=policy())
    with pytest.raises(ProtocolViolation, match="samples"):
        rejected.correction(samples(start, 4), policy=policy())
    assert rejected.tried == 3


@pytest.mark.parametrize(
    ("mode", "following"), [(Mode.RESIDUAL, None), (Mode.COUPLED, None), (Mode.RESIDUAL, 6), (Mode.COUPLED, P)]
)
def test_nothing_is_drawn_from_what_belongs_to_no_rejection(mode: Mode, following: Any) -> None:
    with pytest.raises(ProtocolViolation):
        rejection(mode).correction(following, policy=policy(mode))
