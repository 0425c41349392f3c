// Pages of the dashboard work without this; with it they are kept up to date and have charts and keys.
"use strict";

// One stream of events for each page: it says that something has changed, and what is live reloads itself.
const pulse = document.getElementById("pulse");
function watch() {
  if (!pulse || !window.EventSource) return;
  const source = new EventSource(pulse.dataset.watch);
  source.addEventListener("open", () => { pulse.textContent = "Kept up to date."; });
  source.addEventListener("error", () => { pulse.textContent = "Not kept up to date: the dashboard does not answer."; });
  source.addEventListener("change", () => {
    if (!document.hidden) document.body.dispatchEvent(new CustomEvent("fleet:change"));
  });
  window.addEventListener("pagehide", () => source.close());
  // A page that was put by and is shown again has closed its stream.
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
}

const drawn = new WeakMap();
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function draw(element) {
  const text = element.dataset.chart;
  const kept = drawn.get(element);
  if (kept && kept.text === text) return;
  const data = JSON.parse(text);
  const width = Math.max(element.clientWidth, 200);
  if (kept) kept.plot.destroy();
  const ink = colour("--quiet"), grid = { stroke: colour("--line"), width: 1 };
  const plot = new uPlot({
    width, height: 170,
    cursor: { drag: { x: false, y: false } },
    legend: { show: data.lines.length > 1, live: false },
    scales: { x: data.between ? { range: () => data.between } : {}, y: { range: (_plot, low, high) => [Math.min(low, 0), high > low ? high * 1.05 : low + 1] } },
    axes: [
      {
        stroke: ink, grid, ticks: grid,
        // Seconds between ticks, the hours, and the date where it changes.
        values: [
          [86400, "{YYYY}-{MM}-{DD}", null, null, null, null, null, null, 1],
          [60, "{HH}:{mm}", null, null, "\n{YYYY}-{MM}-{DD}", null, null, null, 1],
          [1, "{HH}:{mm}:{ss}", null, null, "\n{YYYY}-{MM}-{DD}", null, null, null, 1],
        ],
      },
      { stroke: ink, grid, ticks: grid, size: 56, values: (_plot, ticks) => ticks.map((each) => each.toLocaleString("en")) },
    ],
    tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "Etc/UTC"),
    series: [{}, ...data.lines.map((line, number) => ({
      label: line.name, stroke: colour(`--series-${number % 4 + 1}`), width: 2, spanGaps: false,
      points: { show: data.times.length < 3 },
    }))],
  }, [data.times, ...data.lines.map((line) => line.values)], element);
  drawn.set(element, { text, plot });
}

function drawAll() { for (const each of document.querySelectorAll(".chart")) draw(each); }

document.addEventListener("htmx:after:swap", drawAll);
window.addEventListener("resize", () => {
  for (const each of document.querySelectorAll(".chart")) {
    const kept = drawn.get(each);
    if (kept) kept.plot.setSize({ width: Math.max(each.clientWidth, 200), height: 170 });
  }
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const each of document.querySelectorAll(".chart")) { const kept = drawn.get(each); if (kept) kept.text = ""; }
  drawAll();
});

// Keys: / goes to the first field to filter by, Escape leaves it.
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && typing) { typing.blur(); return; }
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const first = document.querySelector("[data-first]");
  if (!first) return;
  event.preventDefault();
  const folded = first.closest("details");
  if (folded) folded.open = true;
  first.focus();
});

// One box ticks all of a page.
document.addEventListener("change", (event) => {
  const name = event.target.dataset.all;
  if (!name) return;
  for (const each of document.getElementsByName(name)) if (each.type === "checkbox") each.checked = event.target.checked;
});

document.addEventListener("DOMContentLoaded", () => { drawAll(); watch(); });
