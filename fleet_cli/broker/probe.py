"""Access probe: finds out what a broker really lets its clients do, by what arrives.

An inspector, whom a trial's rules let do everything, publishes to every topic, and each user's inbox tells what it may
read; then each user publishes to every topic, and the inspector's inbox tells what it may write.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from broker_config.broker import Broker
from broker_config.matrix import may_publish, may_receive
from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import Link, Message, publish_confirmed
from schemas.topics import ROOT, TREE, TopicRule, build

PATIENCE_S: Final = 10.0
SYS_TOPIC: Final = "$SYS/broker/version"
STRAY: Final = "stray"


class Form(Enum):
    """How a reader subscribes."""

    LITERAL = "by name"
    WILDCARD = "by wildcard"
    SHARED = "by a shared subscription"


@dataclass(frozen=True, slots=True)
class Deviation:
    """Something that the broker does otherwise than the table says.

    Attributes:
        user: Whose certificate it was.
        topic: Where.
        writing: Whether it published, or else subscribed.
        let: Whether the broker let it.
        form: How it subscribed.
    """

    user: str
    topic: str
    writing: bool
    let: bool
    form: Form | None = None

    def __str__(self) -> str:
        deed = "publish to" if self.writing else "receive from"
        how = f" {self.form.value}" if self.form is not None else ""
        return f"{self.user} {'can' if self.let else 'cannot'} {deed} {self.topic}{how}"


def topics_to_try(broker: Broker, users: Iterable[str]) -> tuple[str, ...]:
    """Return every topic of the tree for every user as the device and for every edge, and what lies just beside.

    Beside lies whatever a rule would let through that is one level too wide or too long, or of another fleet; the
    first user's topics are enough for that.
    """
    users = tuple(users)
    topics = [topic for rule in TREE for topic in _instances(rule, broker, users)]
    beside = []
    for topic in (topic for rule in TREE for topic in _instances(rule, broker, users[:1])):
        head = topic.rpartition("/")[0]
        beside += [f"{head}/{STRAY}", f"{topic}/{STRAY}", topic.replace(f"/{broker.fleet}/", f"/{STRAY}/")]
    return tuple(dict.fromkeys([*topics, *beside, ROOT, STRAY]))


def _instances(rule: TopicRule, broker: Broker, users: Sequence[str]) -> Iterable[str]:
    devices: Sequence[str | None] = users if "{device}" in rule.template else [None]
    edges: Sequence[str | None] = broker.edges if "{edge}" in rule.template else [None]
    for device, edge in itertools.product(devices, edges):
        yield build(rule.topic, fleet=broker.fleet, device=device, edge=edge)


class Prober:
    """Asks a broker through links that are connected. One at a time for a set of links.

    Args:
        broker: What the broker should be.
        links: By the user that the broker takes each for.
        inspector: The link of the user that may do everything.
        topics: What to try.
    """

    def __init__(self, broker: Broker, links: Mapping[str, Link], inspector: Link, topics: Sequence[str]) -> None:
        self._broker = broker
        self._links = links
        self._inspector = inspector
        self._topics = topics
        self._numbers = itertools.count()
        self._heard: list[Message] = []
        inspector.subscribe("#", self._heard.append)
        self._arrived(self._inspector)

    def deviations(self, forms: Iterable[Form] = tuple(Form)) -> Iterator[Deviation]:
        """Yield all that is otherwise than the table says: first on writing, then on reading in each form."""
        yield from self._writing()
        for form in forms:
            yield from self._reading(form)

    def _writing(self) -> list[Deviation]:
        mark = b"%d:" % next(self._numbers)
        self._heard.clear()
        for user, link in self._links.items():
            for topic in self._topics:
                link.publish(topic, mark + user.encode())
        for link in self._links.values():
            self._arrived(link)
        self._arrived(self._inspector)
        heard = {(message.payload, message.topic) for message in tuple(self._heard)}
        return [
            Deviation(user, topic, writing=True, let=not may_publish(self._broker, user, topic))
            for user in self._links
            for topic in self._topics
            if ((mark + user.encode(), topic) in heard) != may_publish(self._broker, user, topic)
        ]

    def _reading(self, form: Form) -> list[Deviation]:
        mark = b"%d" % next(self._numbers)
        inboxes: dict[str, list[Message]] = {user: [] for user in self._links}
        for user, link in self._links.items():
            for name in self._filters(user, form):
                link.subscribe(name, inboxes[user].append)
            self._arrived(link)
        for topic in self._topics:
            self._inspector.publish(topic, mark)
        self._arrived(self._inspector)
        for user, link in self._links.items():
            self._arrived(link)
            for name in self._filters(user, form):
                link.unsubscribe(name)
        found = []
        for user, inbox in inboxes.items():
            got = {message.topic for message in inbox if message.payload == mark or message.topic == SYS_TOPIC}
            found += [
                Deviation(user, topic, writing=False, let=topic in got, form=form)
                for topic in (*self._topics, *self._sys_topics(form))
                if (topic in got) != may_receive(self._broker, user, topic)
            ]
        return found

    def _filters(self, user: str, form: Form) -> tuple[str, ...]:
        match form:
            case Form.LITERAL:
                return (*self._topics, *self._sys_topics(form))
            case Form.WILDCARD:
                return ("#", *(("$SYS/#",) if self._broker.sys_interval_s else ()))
            case Form.SHARED:
                # A group to itself, or the messages would be dealt out among the users.
                return (f"$share/{user.replace('/', '-')}/#",)

    def _sys_topics(self, form: Form) -> tuple[str, ...]:
        # Only the broker publishes there; what it retains is what a new subscriber gets, a shared one excepted.
        return (SYS_TOPIC,) if self._broker.sys_interval_s and form is not Form.SHARED else ()

    def _arrived(self, link: Link) -> None:
        """Wait until `link` has all that the broker had for it.

        The broker answers a publish after what it had queued for the same client, and the link handles both in order.
        """
        try:
            publish_confirmed(link, STRAY, b"", timeout_s=PATIENCE_S)
        except PublishRejected as error:
            if error.reason is None:
                raise
