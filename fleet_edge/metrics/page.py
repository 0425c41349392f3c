"""Table of all metrics in docs/metrics.md, made of the catalogue: `python -m fleet_edge.metrics.page` writes it."""

from pathlib import Path
from typing import Final

from fleet_edge.metrics.catalogue import CATALOGUE

PAGE: Final = Path(__file__).parents[2] / "docs" / "metrics.md"
_BEGIN: Final = "<!-- table: begin; written by `python -m fleet_edge.metrics.page` -->"
_END: Final = "<!-- table: end -->"


def with_table(text: str) -> str:
    """Return the page's text with the table in its place.

    Raises:
        ValueError: The text has no place for it.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError("The text lacks the marks of the table.")
    rows = ["| metric | kind | meaning |", "| --- | --- | --- |"]
    for each in CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        kind = f"{each.kind} by {labels}" if labels else each.kind
        rows.append(f"| `{each.name}` | {kind} | {each.meaning} |")
    table = "\n".join(rows)
    return f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}"


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
