// The page of the service. Texts go into the page by textContent alone, never as HTML.

const KEY = "aligner-key";
const PAUSE = 400; // milliseconds after the slider's last move
const SHOWN = 100; // rows of the live log
const at = (id) => document.getElementById(id);
let about = null;
let asked = null; // question and answer of the result that is shown
let result = null;
let asking = 0;
let stream = null;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function call(path, body) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the service does not answer");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const error = new Error(problem.error?.message ?? `status ${response.status}`);
  error.status = response.status;
  throw error;
}

const callJson = async (path, body) => (await call(path, body)).json();

// --- keys

async function start() {
  try {
    about = await callJson("/page/about");
  } catch (error) {
    if (error.status === 401) return askForKey(sessionStorage.getItem(KEY) ? error.message : "");
    at("about").textContent = `${error.message}; trying again`;
    setTimeout(start, 2000);
    return;
  }
  at("key-form").hidden = true;
  at("work").hidden = false;
  at("forget").hidden = !about.keys;
  const shadow = about.mode === "shadow" ? ", in shadow mode: answers leave unchanged" : "";
  at("about").textContent = `${about.aligner}, version ${about.version}; client ${about.client}${shadow}`;
  at("audit").hidden = !about.audit;
  at("threshold").disabled = !about.overrides;
  at("locked").hidden = about.overrides;
  showLevels();
  if (about.audit) search();
  watch();
}

function askForKey(message) {
  sessionStorage.removeItem(KEY);
  at("work").hidden = true;
  at("forget").hidden = true;
  at("about").textContent = "";
  at("key-form").hidden = false;
  at("key-error").textContent = message;
  at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  start();
});

at("forget").addEventListener("click", () => {
  stream?.abort();
  sessionStorage.removeItem(KEY);
  location.reload(); // nothing that the key has shown may stay
});

// --- one answer

async function correct(strength) {
  const mine = ++asking;
  const pair = { question: at("question").value, answer: at("answer").value };
  if (strength !== undefined) Object.assign(pair, asked);
  at("submit").disabled = true;
  at("result").setAttribute("aria-busy", "true");
  at("correct-error").textContent = "";
  try {
    const given = await callJson("/page/correct", strength === undefined ? pair : { ...pair, strength });
    if (mine !== asking) return;
    asked = pair;
    result = given;
    showResult(strength === undefined);
  } catch (error) {
    if (mine === asking) at("correct-error").textContent = error.message;
  } finally {
    if (mine === asking) {
      at("submit").disabled = false;
      at("result").removeAttribute("aria-busy");
    }
  }
}

function marked(parts) {
  const tags = { removed: "del", added: "ins" };
  return parts.map(({ kind, text }) => (tags[kind] ? make(tags[kind], { textContent: text }) : text));
}

function showResult(fresh) {
  at("parts").replaceChildren(...marked(result.parts));
  at("parts").hidden = false;
  at("legend").hidden = !result.changed;
  at("verdict").textContent = told(result);
  at("verdict").className = "";
  at("scale").hidden = result.score === null || result.threshold === null;
  if (fresh && result.threshold !== null) at("threshold").value = result.threshold;
  showThreshold();
}

function told({ verdict, changed, doubts, reason, seconds, mode }) {
  const done = changed ? (mode === "shadow" ? "Would be changed" : "Changed") : "Kept as it is";
  const parts = [verdict ? `${done} (${verdict})` : done];
  if (doubts.length) parts.push(`safeguards object: ${doubts.join(", ")}`);
  if (reason) parts.push(reason);
  return `${parts.join("; ")}, in ${Math.max(1, Math.round(seconds * 1000))} ms.`;
}

function showThreshold() {
  if (!result || result.score === null) return;
  const threshold = Number(at("threshold").value);
  const above = result.score > threshold;
  at("threshold-value").textContent = threshold.toFixed(2);
  at("score-bar").setAttribute("width", (result.score * 100).toFixed(2));
  at("score-bar").setAttribute("class", above ? "above" : "");
  const would = above ? "above the threshold: this answer is changed" : "not above the threshold: this answer is kept";
  at("would").textContent = `Score ${result.score.toFixed(3)} is ${would}.`;
  for (const button of at("levels").children) {
    button.setAttribute("aria-pressed", String(Math.abs(button.dataset.threshold - threshold) < 0.005));
  }
}

function showLevels() {
  const names = Object.entries(about.levels ?? {});
  at("levels").replaceChildren(
    ...names.map(([name, threshold]) => {
      const button = make("button", { type: "button", textContent: `${name} ${threshold.toFixed(2)}`, disabled: !about.overrides });
      button.dataset.threshold = threshold;
      button.addEventListener("click", () => {
        at("threshold").value = threshold;
        showThreshold();
        correct(threshold);
      });
      return button;
    }),
  );
}

at("correct-form").addEventListener("submit", (event) => {
  event.preventDefault();
  correct();
});

at("correct-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("correct-form").requestSubmit();
});

let pause = 0;
at("threshold").addEventListener("input", () => {
  clearTimeout(pause);
  showThreshold();
});
at("threshold").addEventListener("change", () => {
  clearTimeout(pause); // arrow keys release at each step
  pause = setTimeout(() => asked && correct(Number(at("threshold").value)), PAUSE);
});

// --- rows of the live log and of the audit log

function row(decision) {
  const { verdict, changed, score, threshold, route, seconds, doubts, error, mode } = decision;
  const label = error ?? (changed ? (mode === "shadow" ? "would change" : verdict) : verdict === "none" ? "passed" : "kept");
  const badge = make("span", { className: `badge ${error ? "" : changed ? "changed" : "kept"}`, textContent: label });
  const facts = [new Date(decision.at).toLocaleTimeString(), route];
  if (score !== null) facts.push(`score ${score.toFixed(2)}${threshold === null ? "" : ` of ${threshold.toFixed(2)}`}`);
  facts.push(`${Math.round(seconds * 1000)} ms`);
  if (doubts.length) facts.push(`safeguards: ${doubts.join(", ")}`);
  const line = make("div", { className: "row" }, make("p", { className: "facts" }, badge, ` ${facts.join(" · ")}`));
  if (about.audit) line.append(markButtons(decision));
  const item = make("li", {}, line);
  if (typeof decision.question === "string") item.append(details(decision));
  return item;
}

function details({ question, answer, text, instruction }) {
  const compared = make("div", { className: "text" });
  const shown = make("details", {}, make("summary", { textContent: question.slice(0, 120) || "(no question)" }));
  if (question.length > 120) shown.append(make("div", { className: "text", textContent: question }));
  if (instruction) shown.append(make("p", { className: "facts", textContent: `instruction: ${instruction}` }));
  shown.append(compared);
  shown.addEventListener("toggle", async () => {
    if (!shown.open || compared.hasChildNodes()) return;
    try {
      compared.replaceChildren(...marked((await callJson("/page/compare", { old: answer, new: text })).parts));
    } catch (error) {
      compared.textContent = error.message;
    }
  });
  return shown;
}

function markButtons(decision) {
  const group = make("div", { className: "row", role: "group", ariaLabel: "Mark of this decision" });
  const show = () => {
    for (const button of group.children) button.setAttribute("aria-pressed", String(button.value === decision.mark));
  };
  for (const value of ["right", "wrong"]) {
    const button = make("button", { type: "button", value, textContent: value });
    button.addEventListener("click", async () => {
      const wanted = decision.mark === value ? "none" : value;
      try {
        decision.mark = (await callJson("/page/mark", { id: decision.id, mark: wanted })).mark;
        at("search-state").textContent = decision.mark ? `Marked as ${decision.mark}.` : "The mark is taken off.";
      } catch (error) {
        at("search-state").textContent = error.message;
      }
      show();
    });
    group.append(button);
  }
  show();
  return group;
}

async function search() {
  at("search-state").textContent = "Searching …";
  try {
    const { rows, most } = await callJson(`/page/log?search=${encodeURIComponent(at("search").value)}`);
    at("found").replaceChildren(...rows.map(row));
    at("search-state").textContent =
      rows.length === most ? `The last ${most} rows.` : `${rows.length} row${rows.length === 1 ? "" : "s"}.`;
  } catch (error) {
    at("search-state").textContent = error.message;
  }
}

at("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

// --- the live log: server-sent events by fetch, as an EventSource sends no key

async function watch() {
  stream?.abort();
  const mine = (stream = new AbortController());
  const known = new Set();
  for (let wait = 1000; !mine.signal.aborted; wait = Math.min(wait * 2, 30000)) {
    try {
      await read(mine.signal, known, () => (wait = 1000));
    } catch (error) {
      if (error.status === 401) return askForKey(error.message);
    }
    if (mine.signal.aborted) return;
    liveState("reconnecting");
    await new Promise((done) => setTimeout(done, wait));
  }
}

async function read(signal, known, connected) {
  const key = sessionStorage.getItem(KEY);
  const response = await fetch("/page/events", { signal, headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (!response.ok) throw Object.assign(new Error("no events"), { status: response.status });
  connected();
  liveState("live");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) take(event, known);
  }
}

function take(event, known) {
  const fields = Object.fromEntries(event.split("\n").map((line) => [line.split(":")[0], line.slice(line.indexOf(":") + 2)]));
  if (!fields.data) return;
  const data = JSON.parse(fields.data);
  if (fields.event === "missed") {
    at("live").prepend(make("li", { className: "hint", textContent: `${data.count} more that this page was too slow for` }));
  } else if (!known.has(data.id)) {
    known.add(data.id);
    if (known.size > 10 * SHOWN) known.delete(known.values().next().value);
    at("live-hint").hidden = true;
    at("live").prepend(row(data));
  }
  while (at("live").children.length > SHOWN) at("live").lastElementChild.remove();
}

function liveState(text) {
  if (at("live-state").textContent !== text) at("live-state").textContent = text;
  at("live-state").className = text === "live" ? "badge kept" : "badge";
}

start();
