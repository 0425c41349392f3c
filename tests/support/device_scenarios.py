"""What happens to a request, and what it does next: one table for the pure decision and for the protocol model."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

from fleet_device.client.decision import Decision, Fail, Local, Repeat, Resume, RetryPolicy, Send, Wait
from fleet_device.settings import OfflinePolicy, Outages

POLICY = RetryPolicy(open_s=40.0, resume_s=50.0, verdict_s=6.0, close_s=2.0, retry_s=1.0)
FAIL = Outages(policy=OfflinePolicy.FAIL, after_s=3.0, answer_s=30.0)
LOCAL = Outages(policy=OfflinePolicy.LOCAL, after_s=3.0, answer_s=30.0)
WAIT = Outages(policy=OfflinePolicy.WAIT)
OTHER = Outages(policy=OfflinePolicy.OTHER_TARGET, after_s=3.0, answer_s=30.0)
PATIENT = Outages(policy=OfflinePolicy.FAIL, after_s=math.inf, answer_s=math.inf)


class Scene(Protocol):
    """A request that begins at two edges; each method is a step of the table."""

    def ask(self) -> None:
        """Send an Open; no edge answers it yet."""

    def grant(self) -> None: ...
    def draft(self) -> None:
        """Send a draft; no edge answers it yet."""

    def verdict(self) -> None: ...
    def progress(self) -> None:
        """The edge reports that it computes."""

    def other_gone(self) -> None:
        """The edge goes that does not have the session, or the second."""

    def edge_gone(self) -> None:
        """The edge goes that has the session."""

    def edge_back(self) -> None:
        """An edge that has gone is back."""

    def broker_gone(self) -> None: ...
    def broker_back(self) -> None: ...
    def pass_time(self, seconds: float) -> None:
        """Let time pass."""

    def decide(self) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """Steps, each a method of `Scene` or a number of seconds, and the decision that follows."""

    steps: str
    decision: type[Decision]
    outages: Outages = PATIENT
    other_target: bool = False
    any_target: bool = False
    reported: bool = False

    def play(self, scene: Scene) -> Decision:
        for step in self.steps.split():
            if step.replace(".", "").isdigit():
                scene.pass_time(float(step))
            else:
                getattr(scene, step)()
        return scene.decide()

    def check(self, decided: Decision) -> None:
        assert type(decided) is self.decision
        assert isinstance(decided, Resume) <= (getattr(decided, "any_target", None) is self.any_target)
        assert isinstance(decided, Wait) <= ((getattr(decided, "reason", None) is not None) is self.reported)


GRANTED = "ask grant"
DRAFTED = f"{GRANTED} draft"
SCENARIOS: dict[str, Scenario] = {
    "a new request asks": Scenario("", Send),
    "an Open that was just sent": Scenario("ask", Wait),
    "an Open without an answer": Scenario("ask 1", Repeat),
    "a grant": Scenario(GRANTED, Send),
    "a draft in flight": Scenario(DRAFTED, Wait),
    "a verdict": Scenario(f"{DRAFTED} verdict", Send),
    "a late verdict of a lone edge": Scenario(f"{DRAFTED} other_gone 6", Repeat),
    "not yet late": Scenario(f"{DRAFTED} other_gone 5", Wait),
    "a late verdict, and another edge": Scenario(f"{DRAFTED} 6", Resume),
    "a late verdict, and another edge that is gone and back": Scenario(f"{DRAFTED} other_gone edge_back 6", Resume),
    "an edge that works": Scenario(f"{DRAFTED} 5 progress 5", Wait),
    "an edge that works, and then hangs": Scenario(f"{DRAFTED} 5 progress 6", Resume),
    "an edge that goes": Scenario(f"{DRAFTED} other_gone edge_gone", Wait),
    "an edge that went a second ago": Scenario(f"{DRAFTED} other_gone edge_gone 1", Repeat),
    "an edge that goes, and is back": Scenario(f"{DRAFTED} other_gone edge_gone 0.5 edge_back", Wait),
    "no edge for ten seconds is reported": Scenario(f"{DRAFTED} other_gone edge_gone 10", Wait, reported=True),
    "a hung edge is reported": Scenario(f"{DRAFTED} other_gone 10", Wait, reported=True),
    "an edge that drafts are not owed to is not waited for": Scenario(f"{DRAFTED} verdict 1000", Send),
    "no edge": Scenario(f"{DRAFTED} other_gone edge_gone 2.9", Repeat, FAIL),
    "no edge for too long": Scenario(f"{DRAFTED} other_gone edge_gone 3", Fail, FAIL),
    "no edge for too long, a draft model": Scenario(f"{DRAFTED} other_gone edge_gone 3", Local, LOCAL),
    "no edge, and more patience than for an answer": Scenario(
        f"{DRAFTED} other_gone edge_gone 30 25", Wait, replace(LOCAL, after_s=60.0), reported=True
    ),
    "no edge, for as long as it takes": Scenario(f"{DRAFTED} other_gone edge_gone 9 1", Wait, WAIT, reported=True),
    "no broker": Scenario(f"{DRAFTED} broker_gone 2.9", Wait, LOCAL),
    "no broker for too long": Scenario(f"{DRAFTED} broker_gone 3", Local, LOCAL),
    "no broker for too long, without a draft model": Scenario(f"{DRAFTED} broker_gone 3", Fail, FAIL),
    "a broker that is back is sent what was lost": Scenario(f"{DRAFTED} broker_gone 2 broker_back", Repeat, LOCAL),
    "no edge is left while there is no broker": Scenario(f"{DRAFTED} broker_gone 6", Repeat),
    "a hung edge": Scenario(f"{DRAFTED} other_gone 29.9", Wait, FAIL, reported=True),
    "an edge that hangs for too long": Scenario(f"{DRAFTED} other_gone 30", Fail, FAIL),
    "an edge that hangs for too long, a draft model": Scenario(f"{DRAFTED} other_gone 30", Local, LOCAL),
    "an edge that hangs, for as long as a resume may take": Scenario(f"{DRAFTED} other_gone 10 41", Fail),
    "an edge that hangs, and a request that waits": Scenario(f"{DRAFTED} other_gone 1000", Wait, WAIT, reported=True),
    "an edge with another target is not asked": Scenario(
        f"{DRAFTED} verdict edge_gone 2.9", Wait, FAIL, other_target=True
    ),
    "no edge with the target": Scenario(f"{DRAFTED} verdict edge_gone 3", Fail, FAIL, other_target=True),
    "another target, if that is allowed": Scenario(
        f"{DRAFTED} verdict edge_gone 3", Resume, OTHER, other_target=True, any_target=True
    ),
    "another target, if that is allowed, after a hang": Scenario(
        f"{DRAFTED} verdict draft 30", Resume, OTHER, other_target=True, any_target=True
    ),
    "nothing was generated, so any target will do": Scenario(f"{DRAFTED} edge_gone", Wait, FAIL, other_target=True),
}
