"""Charts in a browser: whatever is drawn, each label is inside the canvas and overlaps no other."""

import json
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest

from fleet_admin.dashboard.charts import Timeline, sparkline
from fleet_edge.session_log.periods import Grain, floor
from tests.support.chromium import Tab

END = datetime(2026, 3, 5, 12, 34, 56, tzinfo=UTC)
_SPANS = {
    Grain.MINUTE: (10, 48, 120),
    Grain.FIVE_MINUTES: (25, 100, 144),
    Grain.HOUR: (13, 24, 168),
    Grain.DAY: (9, 30, 100),
    Grain.MONTH: (4, 13, 36),
}
"""Lengths of time axes, in steps of each grain."""

_LENGTHS = {
    Grain.MINUTE: timedelta(minutes=1),
    Grain.FIVE_MINUTES: timedelta(minutes=5),
    Grain.HOUR: timedelta(hours=1),
    Grain.DAY: timedelta(days=1),
    Grain.MONTH: timedelta(days=30.4),
}
_SHAPES: dict[str, Callable[[random.Random, int], float | None]] = {
    "constant": lambda _chance, _number: 1.0,
    "zero": lambda _chance, _number: 0.0,
    "random": lambda chance, _number: chance.random(),
    "gaps": lambda chance, number: None if number % 7 < 3 else chance.random(),
    "one": lambda _chance, number: 1.0 if number == 3 else None,
    "none": lambda _chance, _number: None,
}


def timeline(grain: Grain, steps: int, *, end: datetime = END) -> Timeline:
    return Timeline("24h", floor(grain, end - steps * _LENGTHS[grain]), end, grain)


@pytest.mark.parametrize(
    ("grain", "time"), [(Grain.MONTH, "2026-02"), (Grain.DAY, "2026-03-04"), (Grain.HOUR, "2026-03-04 00:00")]
)
def test_days_and_months_have_no_hour(grain: Grain, time: str) -> None:
    line = timeline(grain, 40, end=END)
    start = floor(grain, datetime(2026, 2 if grain is Grain.MONTH else 3, 4, tzinfo=UTC))
    assert chart(line, {start: 1.0})["table"][0][0] == time


def chart(line: Timeline, values: dict[datetime | None, float | None], **options: Any) -> dict[str, Any]:
    return line.chart(values, {"a line": lambda each: each}, **options)


def generated() -> Iterator[dict[str, Any]]:
    """Return charts of each time axis, of each shape, from 10^-3 to 10^9, and as shares."""
    chance = random.Random(26)
    for (grain, spans), shape in product(_SPANS.items(), _SHAPES.values()):
        for steps, exponent in product(spans, (-3, -1, 0, 2, 5, 7, 9, None)):
            line = timeline(grain, steps, end=END - timedelta(seconds=chance.randrange(86_400)))
            size = 1.0 if exponent is None else 10.0**exponent * chance.choice((1, 1, 2.5, 9.99))
            starts = [datetime.fromtimestamp(at, UTC) for at in chart(line, {None: 0.0})["times"]]
            values = [shape(chance, number) for number in range(len(starts))]
            rows = {at: None if own is None else own * size for at, own in zip(starts, values, strict=True)}
            yield chart(line, dict(rows), kind="percent" if exponent is None else "figure")
    many = [{"name": "many", "values": [chance.random() * 1e4 for _ in range(10_000)]}]
    begin = int(END.timestamp()) - 10_000 * 60
    times = [begin + 60 * number for number in range(10_000)]
    yield {"times": times, "lines": many, "unit": "", "between": [begin, times[-1]]}
    for number in (1, 2):
        line = timeline(Grain.MINUTE, 10)
        at = [line.begin + each * timedelta(minutes=1) for each in range(number)]
        yield {**chart(line, dict.fromkeys(at, 5.0)), "times": [int(each.timestamp()) for each in at]}


_RECORD = """
globalThis.labels = [];
const write = CanvasRenderingContext2D.prototype.fillText, clear = CanvasRenderingContext2D.prototype.clearRect;
CanvasRenderingContext2D.prototype.clearRect = function (...area) { labels = []; return clear.apply(this, area); };
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const size = this.measureText(text), at = this.getTransform();
  if (text) labels.push({
    text, left: x + at.e - size.actualBoundingBoxLeft, right: x + at.e + size.actualBoundingBoxRight,
    top: y + at.f - size.actualBoundingBoxAscent, bottom: y + at.f + size.actualBoundingBoxDescent,
  });
  return write.call(this, text, x, y);
};
globalThis.rendered = async (data, width) => {
  const place = document.createElement("div");
  place.className = "chart";
  place.style.width = `${width}px`;
  place.dataset.chart = JSON.stringify(data);
  document.querySelector("main").replaceChildren(place);
  draw(place);
  await new Promise((done) => setTimeout(done));
  const canvas = place.querySelector("canvas");
  const { x, y } = drawn.get(place).plot.scales;
  return { labels, width: canvas.width, height: canvas.height, between: [x.min, x.max], top: y.max };
};0
"""


def wrong(data: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return what is wrong with a chart as it was drawn."""
    labels = found["labels"]
    cut = [
        f"{each['text']} is cut"
        for each in labels
        if each["left"] < 0 or each["top"] < 0 or each["right"] > found["width"] or each["bottom"] > found["height"]
    ]
    overlapping = [
        f"{one['text']} and {other['text']} overlap"
        for number, one in enumerate(labels)
        for other in labels[:number]
        if min(one["right"], other["right"]) > max(one["left"], other["left"])
        and min(one["bottom"], other["bottom"]) > max(one["top"], other["top"])
    ]
    highest = max((each for each in data["lines"][0]["values"] if each is not None), default=0)
    others = {
        "fewer than two figures and a time": len(labels) < 3,
        "no room above the line": found["top"] <= highest,
        "another time": found["between"] != data["between"],
    }
    return cut + overlapping + [what for what, true in others.items() if true]


@pytest.mark.slow
@pytest.mark.xdist_group("chromium")
@pytest.mark.parametrize("width", [620, 390, 300])
def test_each_label_of_a_chart_can_be_read(log_in_tab: Callable[..., Tab], served: str, width: int) -> None:
    tab = log_in_tab()
    tab.goto(f"{served}/audit")
    tab.evaluate(_RECORD)
    cases = list(generated())
    assert len(cases) == 723
    for number in range(0, len(cases), 40):
        some = cases[number : number + 40]
        shown = tab.evaluate(
            f"(async () => {{ const all = []; for (const each of {json.dumps(some)})"
            f" all.push(await rendered(each, {width})); return all; }})()"
        )
        bad = {
            json.dumps(case)[:200]: faults
            for case, each in zip(some, shown, strict=True)
            if (faults := wrong(case, each))
        }
        assert bad == {}
    assert tab.complaints == []


def test_idle_times_are_zero_for_sums_and_gaps_for_means() -> None:
    line = timeline(Grain.HOUR, 4)
    rows: dict[datetime | None, float | None] = {line.begin: 1.0, line.begin + timedelta(hours=3): 2.0}
    assert chart(line, rows, sums=True)["lines"][0]["values"] == [1, 0, 0, 2, 0]
    assert chart(line, rows)["lines"][0]["values"] == [1, None, None, 2, None]
    assert sparkline(chart(line, rows)) == ["0.0,12.0 0.0,12.0", "75.0,1.0 75.0,1.0"]
    assert chart(line, {})["times"] == []


def test_the_rate_of_the_last_step_is_of_the_time_that_has_passed() -> None:
    line = timeline(Grain.HOUR, 4)
    assert line.per_second(line.begin, 3_600) == 1
    assert line.per_second(floor(Grain.HOUR, END), 2_096) == 1
