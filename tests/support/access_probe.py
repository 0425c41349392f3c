"""Access probe: find out by test messages what a broker lets its clients do."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from broker_config.broker import Broker
from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import Link, Message, publish_confirmed
from schemas.topics import HOME_ASSISTANT, ROOT, TREE, TopicRule, build
from tests.support.access_matrix import may_publish, may_receive
from tests.support.waiting import PATIENCE_S

SYS_TOPIC: Final = "$SYS/broker/version"
STRAY: Final = "stray"


class SubscriptionForm(Enum):
    LITERAL = "by name"
    WILDCARD = "by wildcard"
    SHARED = "by a shared subscription"


@dataclass(frozen=True, slots=True)
class Deviation:
    """A right that the broker grants or denies other than the table says."""

    user: str
    topic: str
    writing: bool  # or else subscribing
    let: bool  # whether the broker allowed it
    form: SubscriptionForm | None = None

    def __str__(self) -> str:
        deed = "publish to" if self.writing else "receive from"
        how = f" {self.form.value}" if self.form is not None else ""
        return f"{self.user} {'can' if self.let else 'cannot'} {deed} {self.topic}{how}"


def topics_to_try(broker: Broker, users: Iterable[str]) -> tuple[str, ...]:
    """Return every topic of the tree, for every user as the device and for every edge, and their neighbours.

    A neighbour is what a rule that is one level too wide or too long, or of another fleet, would let through. The first
    user's topics are enough for these.
    """
    users = tuple(users)
    topics = [topic for rule in TREE for topic in _instances(rule, broker, users)]
    neighbours = []
    for topic in (topic for rule in TREE for topic in _instances(rule, broker, users[:1])):
        head = topic.rpartition("/")[0]
        neighbours += [f"{head}/{STRAY}", f"{topic}/{STRAY}", topic.replace(f"/{broker.fleet}/", f"/{STRAY}/")]
    shown = [f"{HOME_ASSISTANT}/device/{users[0]}/{level}" for level in ("config", "state", STRAY)]
    home = [HOME_ASSISTANT, f"{HOME_ASSISTANT}/status", f"{HOME_ASSISTANT}/{STRAY}/{users[0]}/config", *shown]
    return tuple(dict.fromkeys([*topics, *neighbours, *home, ROOT, STRAY]))


def _instances(rule: TopicRule, broker: Broker, users: Sequence[str]) -> Iterable[str]:
    devices: Sequence[str | None] = users if "{device}" in rule.template else [None]
    edges: Sequence[str | None] = broker.edges if "{edge}" in rule.template else [None]
    for device, edge in itertools.product(devices, edges):
        yield build(rule.topic, fleet=broker.fleet, device=device, edge=edge)


class Prober:
    """Compare a broker's behaviour with the access matrix, through connected links by user."""

    def __init__(self, broker: Broker, links: Mapping[str, Link], inspector: Link, topics: Sequence[str]) -> None:
        self._broker = broker
        self._links = links
        self._inspector = inspector
        self._topics = topics
        self._numbers = itertools.count()
        self._heard: list[Message] = []
        inspector.subscribe("#", self._heard.append)
        self._arrived(self._inspector)

    def deviations(self, forms: Iterable[SubscriptionForm] = tuple(SubscriptionForm)) -> Iterator[Deviation]:
        """Yield the deviations from the table: first of writing, then of reading in each form."""
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

    def _reading(self, form: SubscriptionForm) -> list[Deviation]:
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

    def _filters(self, user: str, form: SubscriptionForm) -> tuple[str, ...]:
        match form:
            case SubscriptionForm.LITERAL:
                return (*self._topics, *self._sys_topics(form))
            case SubscriptionForm.WILDCARD:
                return ("#", *(("$SYS/#",) if self._broker.sys_interval_s else ()))
            case SubscriptionForm.SHARED:
                # A group to itself, or the messages would be dealt out among the users.
                return (f"$share/{user.replace('/', '-')}/#",)

    def _sys_topics(self, form: SubscriptionForm) -> tuple[str, ...]:
        # Only the broker publishes there; what it retains is what a new subscriber gets, a shared one excepted.
        return (SYS_TOPIC,) if self._broker.sys_interval_s and form is not SubscriptionForm.SHARED else ()

    def _arrived(self, link: Link) -> None:
        """Wait until `link` has all that the broker had for it.

        The broker answers a publish after what it had queued for the same client, and the link handles both in order.
        """
        try:
            publish_confirmed(link, STRAY, b"", timeout_s=PATIENCE_S)
        except PublishRejected as error:
            if error.reason is None:
                raise
