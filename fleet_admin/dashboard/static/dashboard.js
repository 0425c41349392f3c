// Pages of the dashboard work without this; with it they update live and have charts and keys.
"use strict";

// Every few seconds the page asks when the log last changed; what is live reloads itself then, and as ages grow.
const pulse = document.getElementById("pulse"), LOOK_MS = 2000, ANYWAY = 10;
let latest, looks = 0;
async function watch() {
  if (!pulse) return;
  if (!document.hidden) {
    try {
      const answer = await fetch(pulse.dataset.watch);
      if (answer.redirected) { location.reload(); return; }
      if (!answer.ok) throw new Error(answer.statusText);
      const changed = await answer.text();
      pulse.textContent = "Live.";
      if (latest !== undefined && (changed !== latest || ++looks >= ANYWAY)) {
        looks = 0;
        document.body.dispatchEvent(new CustomEvent("fleet:change"));
      }
      latest = changed;
    } catch { pulse.textContent = "Not live: the dashboard does not answer."; }
  }
  setTimeout(watch, LOOK_MS);
}

const drawn = new WeakMap();
const HEIGHT = 150, RIGHT = 12, FONT = "12px system-ui, sans-serif", MINUTE = 60, HOUR = 3600, DAY = 86400;
const STEPS = [1, 2, 5, 10, 15, 30].map((each) => each * MINUTE)
  .concat([1, 2, 3, 6, 12].map((each) => each * HOUR), [1, 2, 7, 14].map((each) => each * DAY));
const SIZES = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
const measure = document.createElement("canvas").getContext("2d");
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function widest(labels) {
  measure.font = FONT;
  return Math.max(0, ...labels.flatMap((each) => each.split("\n")).map((each) => measure.measureText(each).width));
}
function stamp(seconds) { return new Date(seconds * 1e3).toISOString().replace("T", " ").slice(0, 16); }

// A value of a legend: three digits, and its unit.
function figure(value, unit) {
  if (value == null) return "—";
  const [size, letter] = SIZES.find((each) => value >= each[0]) || [1, ""];
  const digits = (value / size).toLocaleString("en", { maximumSignificantDigits: 3 });
  return (unit.startsWith("B") ? `${digits} ${letter}${unit}` : `${digits}${letter} ${unit}`).trim();
}

// Ticks from zero to above the highest value, and their labels: at most seven characters.
function scaleY(highest, percent) {
  if (percent) return { top: 105, ticks: [0, 25, 50, 75, 100], labels: ["0", "25", "50", "75", "100"] };
  const wanted = (highest > 0 ? highest * 1.05 : 1) / 4, power = 10 ** Math.floor(Math.log10(wanted));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= wanted * 0.999999);
  const ticks = [];
  do ticks.push(ticks.length * step); while (ticks.at(-1) < wanted * 3.999999);
  const [unit, letter] = SIZES.find((each) => ticks.at(-1) >= each[0]) || [1, ""];
  const digits = Math.max(0, -Math.floor(Math.log10(step / unit) + 1e-9));
  const said = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return { top: ticks.at(-1), ticks, labels: ticks.map((each) => each ? (each / unit).toLocaleString("en", said) + letter : "0") };
}

// Ticks at round times, as many as their labels leave room for; those whose label would be cut have none.
function scaleX([low, high], left, width) {
  const [time, date] = [widest(["08:38"]) + 14, widest(["2028-08-28"]) + 14];
  const step = STEPS.find((each) => (high - low) / each <= Math.max(1, Math.floor(width / (each < DAY ? time : date))));
  const ticks = [], place = (at) => left + (at - low) / (high - low) * width;
  if (step) for (let at = Math.ceil(low / step) * step; at <= high; at += step) ticks.push(at);
  else {
    const months = Math.ceil((high - low) / (28 * DAY) / Math.max(1, Math.floor(width / date))), begin = new Date(low * 1e3);
    for (let each = 0; ; each += months) {
      const at = Date.UTC(begin.getUTCFullYear(), begin.getUTCMonth() + each) / 1e3;
      if (at > high) break;
      if (at >= low) ticks.push(at);
    }
  }
  const fits = (at, label) => place(at) >= widest([label]) / 2 && place(at) + widest([label]) / 2 <= left + width + RIGHT;
  const dated = [ticks[0], ...ticks.filter((at, number) => number > 0 && at % DAY === 0)];
  if (dated.length > 1 && place(dated[1]) - place(dated[0]) < date) dated.shift();
  const labels = ticks.map((at) => {
    const [day, hour] = stamp(at).split(" ");
    const wanted = !step ? [day.slice(0, 7)] : step >= DAY ? [day] : dated.includes(at) ? [`${hour}\n${day}`, hour] : [hour];
    return wanted.find((each) => fits(at, each)) || "";
  });
  return { ticks, labels };
}
function draw(element) {
  const text = element.dataset.chart, width = Math.max(element.clientWidth, 200);
  const kept = drawn.get(element);
  if (kept && kept.text === text && kept.width === width) return;
  const data = JSON.parse(text);
  if (kept) kept.plot.destroy();
  const y = scaleY(Math.max(0, ...data.lines.map((line) => line.values.reduce((most, each) => Math.max(most, each || 0), 0))), data.unit === "%");
  const left = Math.ceil(widest(y.labels)) + 18;
  const x = scaleX(data.between, left, width - left - RIGHT);
  const grid = { stroke: colour("--line"), width: 1 }, axis = { stroke: colour("--quiet"), font: FONT, grid, ticks: grid };
  const latest = data.times.findLastIndex((_time, at) => data.lines.some((line) => line.values[at] != null));
  const plot = new uPlot({
    width, height: HEIGHT, padding: [8, RIGHT, 0, 0],
    // The legend has the values under the pointer; without a pointer the latest ones.
    hooks: { setLegend: [(each) => { if (each.cursor.idx == null) each.setLegend({ idx: latest }, false); }] },
    cursor: { y: false, drag: { x: false, y: false }, sync: { key: "page" } },
    scales: { x: { range: () => data.between }, y: { range: () => [0, y.top] } },
    axes: [
      { ...axis, size: 44, splits: () => x.ticks, values: () => x.labels },
      { ...axis, size: left, splits: () => y.ticks, values: () => y.labels },
    ],
    series: [{ label: "time", value: (_plot, at) => at == null ? "—" : stamp(at).slice(0, data.digits) }, ...data.lines.map((line, number) => {
      // Between two gaps there is no line to see.
      const alone = line.values.flatMap((each, at) => each != null && line.values[at - 1] == null && line.values[at + 1] == null ? [at] : []);
      return {
        label: line.name, stroke: colour(`--series-${number % 5 + 1}`), width: 2, spanGaps: false,
        value: (_plot, value) => figure(value, data.unit), points: { show: alone.length > 0, filter: () => alone },
      };
    })],
  }, [data.times, ...data.lines.map((line) => line.values)], element);
  plot.setLegend({ idx: latest }, false);
  drawn.set(element, { text, width, plot });
}

function drawAll() { for (const each of document.querySelectorAll(".chart")) draw(each); }

document.addEventListener("htmx:after:swap", drawAll);
window.addEventListener("resize", drawAll);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const each of document.querySelectorAll(".chart")) { const kept = drawn.get(each); if (kept) kept.text = ""; }
  drawAll();
});

// Keys: / goes to the filter, Escape leaves it.
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && typing) { typing.blur(); return; }
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const first = document.querySelector("[data-first]");
  if (!first) return;
  event.preventDefault();
  first.focus();
});

// One box ticks all of a page.
document.addEventListener("change", (event) => {
  const name = event.target.dataset.all;
  if (!name) return;
  for (const each of document.getElementsByName(name)) if (each.type === "checkbox") each.checked = event.target.checked;
});

document.addEventListener("DOMContentLoaded", () => {
  drawAll();
  watch();
  // On a phone the navigation and the time ranges are lines that scroll.
  for (const each of document.querySelectorAll("nav [aria-current]")) each.scrollIntoView({ block: "nearest", inline: "center" });
});
