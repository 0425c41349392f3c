"""Registry of attacks: by name, with their rates.

A new attack is a function that takes an `Attacker`, and a line here.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from benchmarks.hostile.attacks import broker, floods, grammars, granted
from benchmarks.hostile.attacks.contract import Attack

_SWARM: Final = 50

_ALL: Final = (
    Attack("random-bytes", "random bytes, 1,000/s", partial(floods.random_payloads, rate=1000)),
    Attack(
        "unknown-session-qos0",
        "drafts of an unknown session, 2,000/s, QoS 0",
        partial(floods.unknown_session, rate=2000, qos=0),
    ),
    Attack(
        "unknown-session",
        "drafts of an unknown session, 2,000/s, QoS 1",
        partial(floods.unknown_session, rate=2000, qos=1),
    ),
    Attack("out-of-epoch", "drafts out of epoch, 2,000/s", partial(granted.out_of_epoch, rate=2000)),
    Attack("opens", "Opens, 3,400/s", partial(floods.opens, rate=3400)),
    Attack("closes", "Closes, 2,000/s", partial(floods.closes, rate=2000)),
    Attack("long-prompts", "prompts of greatest length, opened and closed, 7/s", partial(granted.long_prompts, rate=7)),
    Attack(
        "prompts",
        "prompts of 500 tokens, opened and closed, 1.9/s: within the default quotas",
        partial(granted.prompts, rate=1.9, length=500),
    ),
    Attack(
        "top-k",
        "top_k near the vocabulary, 8 sessions at full rate",
        partial(granted.nearly_all, sessions=8),
        control=False,
    ),
    Attack(
        "whole-vocabulary",
        "top_k 0, which keeps all tokens, 8 sessions at full rate",
        partial(granted.drafting, sessions=8, policy=granted.wide_policy()),
        control=False,
    ),
    Attack("more-samples", "asking for more samples, 400/s", partial(granted.more_samples, rate=400)),
    Attack(
        "long-drafts",
        "longest drafts at full rate, 8 sessions",
        partial(granted.drafting, sessions=8),
        control=False,
    ),
    Attack("own-state", "own retained state, 1,000/s", partial(floods.own_state, rate=1000)),
    Attack("huge-opens", "Opens of 1 MB, 20/s", partial(floods.huge_opens, rate=20)),
    Attack("replays", "own messages of before, 2,000/s", partial(granted.replays, rate=2000)),
    Attack("filters", "subscriptions to 10,000 filters", partial(broker.filters, number=10_000), control=False),
    Attack("wills", "wills of 64 KB, 20 connections/s, cut", partial(broker.wills, rate=20)),
    Attack(
        "slow-reader",
        "drafts of an unknown session, 1,000/s, answers never read",
        partial(broker.slow_reader, rate=1000),
    ),
    Attack(
        "connections",
        "1,000 TLS connections with one certificate",
        partial(broker.connections, number=1000),
        control=False,
    ),
    Attack("retained", "300 retained messages of 1 MiB on up/draft/…", partial(broker.retained, number=300)),
    Attack(
        "swarm",
        f"{_SWARM} devices at once, 100 messages/s each: bytes, drafts, Opens, Closes, states",
        partial(floods.swarm, rate=100),
        devices=_SWARM,
    ),
    Attack(
        "deadly-grammars",
        "grammars that overflow a stack or compile for minutes, 1/s",
        partial(grammars.deadly, rate=1),
        control=False,
    ),
    Attack(
        "forced-text",
        "constants of 15,000 characters, 4 requests that the edge decodes",
        partial(grammars.forced, sessions=4),
        plain=partial(grammars.forced, sessions=4, plain=True),
    ),
    Attack(
        "dear-masks",
        "a grammar with dear masks, 4 requests that the edge decodes",
        partial(grammars.dear, sessions=4),
        plain=partial(grammars.dear, sessions=4, plain=True),
    ),
    Attack(
        "known-grammar",
        "a known schema of 1,900 properties, opened and closed, 2/s",
        partial(grammars.known, rate=2),
        plain=partial(grammars.known, rate=2, plain=True),
    ),
    Attack(
        "large-grammars",
        "new schemas of 1,900 properties, 4 waiting",
        partial(grammars.large, at_once=4),
        plain=partial(grammars.large, at_once=4, plain=True),
        newcomer=grammars.SMALL,
    ),
    Attack(
        "grammar-bombs",
        "200 random grammars of 10 devices, each followed for 32 tokens",
        grammars.bombs,
        plain=partial(grammars.bombs, plain=True),
        devices=10,
        newcomer=grammars.SMALL,
    ),
)

ATTACKS: Final[Mapping[str, Attack]] = MappingProxyType({attack.name: attack for attack in _ALL})
"""By name, in the order of the table in the report."""
