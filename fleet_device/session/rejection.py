"""Rejection whose correction is not drawn yet: the rejected token's place in the text is empty until then.

In residual mode the device draws it, from what the target's distribution has over the draft's; if all samples that the
edge sent fail, it takes more of them. In coupled mode the edge has drawn it.
"""

from dataclasses import dataclass
from typing import Final

from dssd.downlink import correct
from dssd.sampling import Proposal
from fleet_device.errors import ProtocolViolation, SessionFailed
from schemas.downlink import DownlinkForm, Samples, UnknownForm
from schemas.policy import SamplingPolicy

__all__ = ["MOST_REQUESTS", "Rejection"]

MOST_REQUESTS: Final = 32
"""Most requests of further samples at one position: each lot is up to four times as long as all before it, so that an
honest edge is hardly ever asked for a third."""


@dataclass(slots=True)
class Rejection:
    """A rejected position whose correction is not drawn yet.

    Attributes:
        proposal: What was rejected.
        position: Where.
        tried: Samples that have failed so far.
    """

    proposal: Proposal
    position: int
    tried: int = 0
    _requests: int = 0

    @property
    def device_draws(self) -> bool:
        """Whether the correction is the device's to draw, so that the edge has to be told of it."""
        return self.proposal.quantized is not None

    def ask_again(self) -> None:
        """Count a request of further samples.

        Raises:
            SessionFailed: There were too many: the samples can hardly be drawn from the distribution that rejected.
        """
        self._requests += 1
        if self._requests > MOST_REQUESTS:
            raise SessionFailed(
                f"The edge has sent {self.tried} samples in place of a rejected token, and none of them can take it; "
                "ask again with another seed, or have the edge send another downlink form."
            )

    def correction(self, following: int | DownlinkForm | UnknownForm | None, *, policy: SamplingPolicy) -> int | None:
        """Return the token that takes the rejected one's place.

        Args:
            following: What the edge sent to correct it with.
            policy: The session's.

        Returns:
            The token, which the vocabulary may not have; None if more samples are needed.

        Raises:
            ProtocolViolation: Nothing can be drawn from that.
        """
        quantized = self.proposal.quantized
        if following is None:
            raise ProtocolViolation("The edge rejected a token and sent nothing to correct it with.")
        if isinstance(following, UnknownForm):
            raise ProtocolViolation(
                f"The edge sent the target distribution in form {following.number}, which this device does not know; "
                "update the device, or have the edge use another form."
            )
        if quantized is None:
            if not isinstance(following, int):
                raise ProtocolViolation("In coupled mode a correction is a token.")
            return following
        if isinstance(following, int):
            raise ProtocolViolation("In residual mode a correction is drawn by the device.")
        if isinstance(following, Samples) and following.start != self.tried:
            # Each index is one draw: to look at some again, or to skip some, would bend the law.
            raise ProtocolViolation(
                f"The edge sent samples from {following.start} on, the device has tried {self.tried}."
            )
        token = correct(following, quantized, policy=policy, position=self.position)
        if token is None:
            assert isinstance(following, Samples)
            self.tried += len(following.ids)
        return token
