"""The table of README.md: who may do what on which topic, made of `broker_config.matrix`.

`python -m broker_config.table` writes it anew.
"""

from pathlib import Path
from typing import Final

from broker_config.broker import Broker
from broker_config.matrix import may_publish, may_receive
from schemas.topics import TREE, Rule, build

__all__ = ["README", "main", "render_table", "with_table"]

README: Final = Path(__file__).with_name("README.md")
BEGIN: Final = "<!-- table: begin; written by `python -m broker_config.table` -->"
END: Final = "<!-- table: end -->"

DEVICE, EDGE = "device-a", "edge-1"
COLUMNS: Final = {
    "the device itself": DEVICE,
    "another device": "device-b",
    "the edge itself": EDGE,
    "another edge": "edge-2",
    "monitor": "monitor",
    "banned, or without an accepted certificate": "nobody",
}


def render_table() -> str:
    """Return the table as Markdown: `w` may publish, `r` receives."""
    broker = Broker(edges=(EDGE, "edge-2"), banned=("nobody",))
    rows = [["topic below `dssd/v1/<fleet>/`", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for rule in TREE:
        topic = _example(rule, broker)
        shown = rule.template.replace("{device}", "<device>").replace("{edge}", "<edge>")
        rows.append([f"`{shown}`", *(_cell(broker, user, topic) for user in COLUMNS.values())])
    sys = "$SYS/broker/version"
    rows.append(["`$SYS/#` (not below it)", *(_cell(broker, user, sys) for user in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """Return README's text with the table in its place.

    Raises:
        ValueError: The text has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("The text lacks the marks of the table.")
    return f"{before}{BEGIN}\n\n{render_table()}\n\n{END}{after}"


def main() -> None:
    """Write the table into README.md."""
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def _example(rule: Rule, broker: Broker) -> str:
    return build(
        rule.topic,
        fleet=broker.fleet,
        device=DEVICE if "{device}" in rule.template else None,
        edge=EDGE if "{edge}" in rule.template else None,
    )


def _cell(broker: Broker, user: str, topic: str) -> str:
    ways = "w" * may_publish(broker, user, topic) + "r" * may_receive(broker, user, topic)
    return ways or "-"


if __name__ == "__main__":
    main()
