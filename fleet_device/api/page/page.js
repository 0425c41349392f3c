// Chat page of a device: reads the API that applications use. Chats and settings stay in this browser.

const ORIGINS = {
  drafted: "drafted by the device, accepted by the edge",
  corrected: "corrected: replaces a rejected draft token",
  bonus: "drawn by the edge behind an accepted draft",
  "edge-only": "edge-only: decoded without a draft",
  forced: "forced by a grammar",
  "other-target": "of another target model",
  unverified: "unverified: generated without an edge",
};
const MAX_CHATS = 50;
const STATUS_MS = 5000;

const $ = (id) => document.getElementById(id);
const number = (value, digits = 1) => (value == null ? "–" : value.toFixed(digits));

// Chats

const read = (key, otherwise) => {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
};
let chats = read("chats", []);
if (!Array.isArray(chats) || !chats.length) chats = [{ name: "New chat", turns: [] }];
let chat = chats[0];
let running = null; // AbortController of the answer that is being generated

function save() {
  chats = chats.slice(0, MAX_CHATS);
  try {
    localStorage.setItem("chats", JSON.stringify(chats));
  } catch {
    report("This browser stores no more chats; delete some."); // full, or switched off
  }
}

function report(sentence) {
  $("progress").textContent = sentence;
}

function span(tokens, parent) {
  const last = parent.lastElementChild;
  for (const { text, origin } of tokens) {
    if (!text) continue;
    const before = parent.lastElementChild;
    if (before && before !== last && before.className === origin) before.append(text);
    else if (last && before === last && last.className === origin) last.append(text);
    else {
      const part = document.createElement("span");
      part.className = origin;
      part.title = ORIGINS[origin] ?? "";
      part.textContent = text;
      parent.append(part);
    }
  }
}

function item(turn) {
  const element = document.createElement("li");
  element.className = turn.role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = turn.role === "user" ? "You" : "Answer";
  element.append(who);
  if (turn.role === "user") {
    element.append(turn.content);
    return { element };
  }
  const thinking = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Thinking";
  const thoughts = document.createElement("div");
  thoughts.className = "thinking";
  thinking.append(summary, thoughts);
  thinking.hidden = true;
  const answer = document.createElement("span");
  const figures = document.createElement("span");
  figures.className = "figures";
  element.append(thinking, answer, figures);
  const shown = {
    element,
    add(tokens) {
      span(tokens, answer);
      const thought = tokens.filter((each) => each.reasoning).map((each) => ({ text: each.reasoning, origin: each.origin }));
      if (thought.length) thinking.hidden = false;
      span(thought, thoughts);
    },
    end(sentence, failed = false) {
      figures.textContent = sentence;
      figures.classList.toggle("problem", failed);
    },
  };
  if (turn.tokens) shown.add(turn.tokens);
  if (turn.figures) shown.end(turn.figures, turn.failed);
  return shown;
}

function showChat() {
  $("messages").replaceChildren(...chat.turns.map((turn) => item(turn).element));
  $("chat").replaceChildren(
    ...chats.map((each, place) => {
      const option = document.createElement("option");
      option.value = place;
      option.textContent = each.name;
      option.selected = each === chat;
      return option;
    }),
  );
  enable();
}

function enable() {
  $("send").disabled = running !== null;
  $("stop").disabled = running === null;
  $("retry").disabled = running !== null || chat.turns.at(-1)?.role !== "assistant";
  for (const id of ["chat", "new", "delete"]) $(id).disabled = running !== null;
}

// The API

const settings = () => Object.fromEntries(new FormData($("settings")));

function headers() {
  const { key } = settings();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function body() {
  const chosen = settings();
  const messages = chat.turns.filter((turn) => turn.content).map(({ role, content }) => ({ role, content }));
  if (chosen.system) messages.unshift({ role: "system", content: chosen.system });
  const request = {
    model: "fleet",
    messages,
    stream: true,
    stream_options: { include_usage: true, include_origins: true },
  };
  for (const name of ["temperature", "top_p", "top_k", "seed", "max_tokens"]) if (chosen[name]) request[name] = Number(chosen[name]);
  if (chosen.reasoning_effort) request.reasoning_effort = chosen.reasoning_effort;
  if (chosen.edge_only) request.edge_only = true;
  return JSON.stringify(request);
}

// Yields what a stream of server-sent events holds: {comment} or {data}.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) yield { comment: part.slice(1).trim() };
      else if (part.startsWith("data: ") && part !== "data: [DONE]") yield { data: JSON.parse(part.slice(6)) };
    }
  }
}

async function problemOf(response) {
  let sentence = `The device answered with status ${response.status}.`;
  try {
    sentence = (await response.json()).error.message;
  } catch {
    // it is not the API that answered
  }
  return response.status === 401 ? `${sentence} Settings has a field for the key.` : sentence;
}

async function answer() {
  const turn = { role: "assistant", content: "", tokens: [] };
  const shown = item(turn);
  $("messages").append(shown.element);
  running = new AbortController();
  enable();
  report("Sent.");
  const began = performance.now();
  let [first, count, queued, summary, usage, whole] = [null, 0, 0, null, null, false];
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: body(),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    queued = Number(response.headers.get("X-Fleet-Queue-Ms"));
    for await (const { comment, data } of events(response.body)) {
      if (comment !== undefined) {
        report(comment === "waiting" ? "Waiting …" : comment);
        continue;
      }
      if (data.error) throw new Error(data.error.message);
      let tokens = data.fleet?.tokens ?? [];
      count += tokens.length;
      const held = data.choices?.[0]?.delta?.content;
      if (!tokens.length && held) tokens = [{ text: held, origin: turn.tokens.at(-1)?.origin }];
      if (tokens.length) {
        first ??= performance.now();
        const seconds = (performance.now() - first) / 1000;
        report(`${count} tokens${seconds > 0.5 ? `, ${number(count / seconds)} tokens/s` : ""}`);
        turn.tokens.push(...tokens.filter((each) => each.text || each.reasoning));
        turn.content += tokens.map((each) => each.text).join("");
        shown.add(tokens);
        shown.element.scrollIntoView({ block: "end" });
      }
      if (data.fleet?.session) summary = data.fleet;
      if (data.usage) usage = data.usage;
      if (data.choices?.[0]?.finish_reason) whole = true;
    }
    if (!whole) throw new Error("The stream ended in the middle; see whether the device runs, and retry.");
    const seconds = (performance.now() - began) / 1000;
    turn.figures = `${usage.completion_tokens} tokens in ${number(seconds)} s, ${number(usage.completion_tokens / seconds)} tokens/s`;
    if (summary && !summary.verified) turn.figures += `; unverified: ${summary.unverified_tokens}`;
    shown.end(turn.figures);
    report(`The answer is complete: ${turn.figures}.`);
    happened(summary, usage, { first: first === null ? null : (first - began) / 1000, queued, seconds });
  } catch (error) {
    const stopped = error.name === "AbortError";
    const sentence = error instanceof TypeError ? "The device cannot be reached; see whether it runs, and retry." : error.message;
    turn.figures = stopped ? `Stopped after ${count} tokens.` : sentence;
    turn.failed = !stopped;
    shown.end(turn.figures, turn.failed);
    report(turn.figures);
  }
  running = null;
  chat.turns.push(turn);
  save();
  enable();
}

// What happens

function facts(rows) {
  $("facts").replaceChildren(
    ...rows.flatMap(([name, value]) => {
      const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, detail.textContent] = [name, value];
      return [term, detail];
    }),
  );
}

function happened(summary, usage, { first, queued, seconds }) {
  if (!summary) return;
  facts([
    ["plan", summary.plan ?? "–"],
    ["tokens/s", number(usage.completion_tokens / seconds)],
    ["queued here", `${queued} ms`],
    ["first token", first === null ? "–" : `${number(first, 2)} s`],
    ["acceptance", summary.acceptance === null ? "no draft was tested" : `${Math.round(100 * summary.acceptance)} %`],
    ["bytes up, down", `${summary.uplink_bytes}, ${summary.downlink_bytes}`],
    ["rounds", summary.rounds],
    ["round trip", summary.round_trip_ms === null ? "–" : `${number(summary.round_trip_ms, 0)} ms`],
    ["prompt", `${usage.prompt_tokens} tokens, ${usage.fleet.cached} of them known`],
    ["resumes", summary.resumes],
    ["seed", summary.seed],
  ]);
  $("reason").textContent = summary.plan_reason ?? "";
}

async function look() {
  let sentence = "The device does not answer.";
  try {
    const response = await fetch("status", { headers: headers() });
    if (response.ok) {
      const status = await response.json();
      sentence = `${status.device} of fleet ${status.fleet}: ${status.reason ?? "an edge is online."}`;
    } else sentence = await problemOf(response);
  } catch {
    // the next look may succeed
  }
  if ($("state").textContent !== sentence) $("state").textContent = sentence;
}

// Controls

$("legend").replaceChildren(
  ...Object.entries(ORIGINS).map(([origin, meaning]) => {
    const element = document.createElement("li");
    const [name, ...rest] = meaning.split(":");
    const sample = document.createElement("span");
    sample.className = origin;
    sample.textContent = name;
    element.append(sample, rest.length ? `:${rest.join(":")}` : "");
    return element;
  }),
);

const colour = () => document.body.classList.toggle("coloured", $("coloured").checked);
$("coloured").addEventListener("change", colour);
colour();

function ask() {
  const question = $("question").value.trim();
  if (!question || running) return;
  if (!chat.turns.length) chat.name = question.slice(0, 40);
  const turn = { role: "user", content: question };
  chat.turns.push(turn);
  $("question").value = "";
  showChat();
  answer();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("question").focus();
});
$("retry").addEventListener("click", () => {
  chat.turns.pop();
  showChat();
  answer();
  $("question").focus();
});
$("chats").addEventListener("submit", (event) => event.preventDefault());
$("chat").addEventListener("change", () => {
  chat = chats[$("chat").value];
  showChat();
});
$("new").addEventListener("click", () => {
  chat = { name: "New chat", turns: [] };
  chats.unshift(chat);
  showChat();
  $("question").focus();
});
$("delete").addEventListener("click", () => {
  chats = chats.filter((each) => each !== chat);
  if (!chats.length) chats = [{ name: "New chat", turns: [] }];
  chat = chats[0];
  save();
  showChat();
});
for (const [name, value] of Object.entries({ ...read("settings", {}), key: sessionStorage.getItem("key") ?? "" })) {
  const field = $("settings").elements[name];
  if (field) field.value = value;
}
$("settings").addEventListener("input", () => {
  const { key, ...others } = settings();
  sessionStorage.setItem("key", key);
  localStorage.setItem("settings", JSON.stringify(others));
});
$("settings").addEventListener("submit", (event) => event.preventDefault());

showChat();
look();
setInterval(look, STATUS_MS);
