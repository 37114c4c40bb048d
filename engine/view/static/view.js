"use strict";
// Shows a run's rows. Every text goes into the page as textContent, never as HTML.

const POLL_MS = 2000;
const ROW = /^\d+\.\d+$/;
const at = (id) => document.getElementById(id);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}

// Controls, bidirectional overrides and other characters that cannot be seen become their name.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}]/gu;
function visible(text) {
  return String(text).replace(HIDDEN, (char) => char === "\n" || char === "\t"
    ? char : `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function shown(text, className = "block") {
  const block = element("bdi", className, visible(text));
  block.style.display = "block";
  return block;
}

const number = (value, digits = 0) => value === null || value === undefined
  ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });
// With two decimals, or two digits where those would show nothing.
const money = (cost) => cost >= 0.1 || !cost ? number(cost, 2) : String(Number(cost.toPrecision(2)));

async function ask(path) {
  const response = await fetch(path, { credentials: "same-origin" });
  if (!response.ok) throw new Error((await response.text()).slice(0, 200));
  return response.json();
}

// -- stages -------------------------------------------------------------------------------------

let stage = new URLSearchParams(location.search).get("stage") ?? "";

const ofStage = (path) => stage ? `${path}${path.includes("?") ? "&" : "?"}${new URLSearchParams({ stage })}` : path;

// What is looked for stands in the address, so that a link or a reload shows the same rows.
const filter = () => Object.entries({ q: at("words").value, status: at("status").value, reason: at("reason").value })
  .filter(([name, value]) => value && !(name === "status" && value === "all"));
function address(id) {
  const told = new URLSearchParams([...filter(), ...(stage ? [["stage", stage]] : [])]).toString();
  return `${location.pathname}${told ? `?${told}` : ""}${id ? `#${id}` : ""}`;
}

function restoreFilter() {
  const told = new URLSearchParams(location.search);
  at("words").value = told.get("q") ?? "";
  if (told.has("status")) at("status").value = told.get("status");
  if (!at("status").value) at("status").value = "all";
  const reason = told.get("reason");
  if (reason) at("reason").append(new Option(visible(reason), reason, true, true));
}

function showStages(state) {
  const select = at("stage");
  select.hidden = state.stages.length < 2;
  at("report").href = ofStage("/report");
  if (select.dataset.shown !== state.stages.join("\n")) {
    select.dataset.shown = state.stages.join("\n");
    select.replaceChildren(...state.stages.map((name) => {
      const option = element("option", "", `stage ${visible(name)}`);
      option.value = name;
      return option;
    }));
  }
  select.value = state.stage;
}

function enter(name, id = null) {
  stage = name;
  lastDecided = "";
  at("list").scrollTop = 0;
  leave();
  Object.assign(speed, { at: 0, answers: 0, perSecond: null });
  at("reason").value = "";
  history.replaceState(null, "", address(id));
  if (id === null) {
    current = null;
    at("one").replaceChildren(element("p", "dim", "Choose a row to see where it comes from."));
  }
  return refresh();
}

// -- the head -----------------------------------------------------------------------------------

let lastDecided = "";
const speed = { at: 0, answers: 0, perSecond: null };

function showState(state) {
  showStages(state);
  at("run").textContent = visible(`${state.run} · ${state.model}`);
  document.title = `${number(state.accepted)} · Woolmill`;
  const [done, all] = state.target ? [state.accepted, state.target] : state.input_rows || [0, 0];
  const share = all ? Math.min(1, done / all) : 0;
  at("bar").style.width = `${100 * share}%`;
  const now = Date.now() / 1000;
  const answers = state.responses;
  if (speed.at && now > speed.at) speed.perSecond = (answers - speed.answers) / (now - speed.at);
  Object.assign(speed, { at: now, answers });
  const several = state.stages.length > 1;
  const tiles = [
    [several ? "accepted in this stage" : "accepted", state.target ? `${number(state.accepted)} / ${number(state.target)}` : number(state.accepted)],
    ["of all pieces", state.pieces ? `${number(100 * state.accepted / state.pieces, 1)} %` : "–"],
    ["answers", number(answers)], ["answers/s now", number(speed.perSecond, 1)],
    ["failed", number(state.failed)], ["in flight", number(state.in_flight)],
    ["tokens per row", number(state.tokens_per_accepted)],
  ];
  if (!state.target && all) tiles.splice(2, 0, ["input rows", `${number(done)} / ${number(all)}`]);
  const unread = state.not_compared_by_meaning;
  if (unread) tiles.push(["not compared by meaning", number(unread)]);
  if (state.input_rows_left_out) tiles.push(["input rows cannot be read", number(state.input_rows_left_out)]);
  if (state.cost !== null) tiles.push([several ? "cost of this stage" : "cost", money(state.cost)]);
  if (several && state.cost_of_all_stages !== null) tiles.push(["cost of all stages", money(state.cost_of_all_stages)]);
  at("tiles").replaceChildren(...tiles.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }));
  const idle = state.last_at_s ? now - state.last_at_s : 0;
  const since = state.last_at_s ? `last answer ${new Date(state.last_at_s * 1000).toLocaleString()}` : "no answer yet";
  at("state").textContent = !state.running ? `ended · ${since}` : idle < 10 ? "live" : since;
  showReasons(state.rejected);
  showLimits(state.limits, state.running);
  const changed = state.decided_as !== lastDecided;
  lastDecided = state.decided_as;
  return changed;
}

// How many requests may be in flight, or were in the end, why, and how that came about; the latest first.
function showLimits(changes, running) {
  const details = at("limits");
  details.hidden = changes.length === 0;
  if (!changes.length) return;
  const latest = changes[changes.length - 1];
  const key = `${changes.length} ${latest.at_s} ${running}`;
  if (details.dataset.shown === key) return;
  details.dataset.shown = key;
  const several = new Set(changes.map((change) => change.endpoint)).size > 1;
  const words = (change) => visible(`${change.new} in flight: ${change.why}`)
    + (several ? ` · ${visible(change.endpoint)}` : "");
  details.querySelector("summary").textContent = `${running ? "limit" : "last limit"} ${words(latest)}`;
  details.querySelector("ol").replaceChildren(...changes.toReversed().map((change) => element("li", "dim",
    `${new Date(change.at_s * 1000).toLocaleTimeString()} · ${change.old} → ${words(change)} (${visible(change.who)})`)));
}

function showReasons(rejected) {
  const select = at("reason");
  const wanted = Object.entries(rejected).map(([reason, count]) => `${visible(reason)} (${number(count)})`);
  if (select.dataset.shown === wanted.join("\n")) return;
  select.dataset.shown = wanted.join("\n");
  const chosen = select.value;
  const options = Object.keys(rejected).map((reason, i) => {
    const option = element("option", "", wanted[i]);
    option.value = reason;
    return option;
  });
  select.replaceChildren(select.options[0], ...options);
  select.value = chosen in rejected ? chosen : "";
  if (chosen && !select.value) { // decided again: nothing is refused for that any more
    at("status").value = "all";
    again();
  }
}

// -- the list -----------------------------------------------------------------------------------

let next = null;
let asked = 0;
let current = null;

function query(before) {
  const parameters = new URLSearchParams({
    q: at("words").value, status: at("status").value, reason: at("reason").value,
  });
  if (before !== null) parameters.set("before", before);
  return ofStage(`/api/rows?${parameters}`);
}

async function search(before = null) {
  const mine = ++asked;
  const found = await ask(query(before));
  if (mine !== asked) return; // a later question was faster
  const items = found.rows.map(item);
  if (before === null) at("rows").replaceChildren(...items);
  else at("rows").append(...items);
  next = found.next;
  at("more").hidden = next === null;
  if (before === null) showElsewhere(found.elsewhere);
  at("matches").textContent = found.matches > 10000 ? "10,000+ rows" : `${number(found.matches)} rows`;
  document.body.dataset.rows = String(at("rows").children.length);
}

// The other stages that hold what is looked for, each with a button that leads there.
function showElsewhere(stages) {
  at("elsewhere").hidden = !stages.length;
  at("elsewhere").replaceChildren("also in", ...stages.map(([name, matches]) => {
    const there = element("button", "", `stage ${visible(name)}: ${matches > 10000 ? "10,000+" : number(matches)}`);
    there.type = "button";
    there.addEventListener("click", () => enter(name).catch(complain));
    return there;
  }));
}

function item(row) {
  const line = element("li", row.reason === null ? "accepted" : "refused");
  const button = element("button");
  const head = row.reason === null ? row.id : `${row.id} · ${row.reason}${row.score !== null ? ` ${row.score.toFixed(2)}` : ""}`;
  button.append(shown(head, "dim"), shown(row.text ?? row.begins ?? row.detail, "text"));
  if (row.others.length) button.append(shown(row.others.map(([name, value]) => `${name}: ${value}`).join(" · "), "others dim"));
  button.setAttribute("aria-current", String(row.id === current));
  button.addEventListener("click", () => read(row.id).catch(complain));
  line.append(button);
  line.dataset.id = row.id;
  return line;
}

// -- one row ------------------------------------------------------------------------------------

async function open(id) {
  const [request, position] = id.split(".");
  const row = await ask(ofStage(`/api/row/${request}/${position}`));
  current = id;
  if (location.hash !== `#${id}`) history.replaceState(history.state, "", address(id));
  for (const line of at("rows").children) {
    line.firstChild.setAttribute("aria-current", String(line.dataset.id === id));
  }
  const pane = at("one");
  pane.replaceChildren();
  const add = (title, ...content) => pane.append(element("h2", "", title), ...content);
  const verdict = row.reason === null ? "accepted" : row.reason + (row.detail ? `: ${row.detail}` : "");
  add(`row ${row.id}`, shown(verdict, row.reason === null ? "kept" : "reason"));
  for (const [name, value] of row.fields ?? []) if (value) add(visible(name), shown(value));
  if (row.nearest) {
    add(`nearest: ${visible(row.nearest.source)}, ${row.nearest.score.toFixed(3)}`, shown(row.nearest.text));
  }
  if (row.attempts !== 0) add("answer of", shown(answeredBy(row)));
  if (row.demonstrations?.length || !row.place) {
    add("demonstrations", shown((row.demonstrations ?? []).join(", ") || "none"));
  }
  if (row.input && !row.parent) {
    add(row.place);
    // What gave no row is told by what was asked about.
    for (const [name, value] of row.input) row.fields ? fold(pane, visible(name), value) : add(visible(name), shown(value));
  }
  foldAnswer(pane, row);
  const near = (row.most_similar ?? []).map(([text, score]) => `${score.toFixed(3)}  ${text}`);
  if (near.length) fold(pane, "nearest by ROUGE-L", near.join("\n"));
  if (row.mean_similarity === null) add("nearest by ROUGE-L", shown("not looked for beyond the first million"));
  if (row.parent) add(`made of ${row.place}`);
  for (let parent = row.parent; parent; parent = parent.parent) pane.append(ancestor(parent));
  at("row").scrollTop = 0;
  if (!document.body.classList.contains("reading")) listTop = scrollY;
  document.body.classList.add("reading");
  if (narrow.matches) scrollTo(0, 0);
}

// -- from the list to a row and back, where there is room for one of them only --------------------

const narrow = matchMedia("(max-width: 760px)");
let listTop = 0;

async function read(id) {
  const pushed = narrow.matches && !document.body.classList.contains("reading");
  if (pushed) history.pushState({ fromList: true }, "", address(id)); // so that "back" leads back
  try {
    await open(id);
  } catch (error) {
    if (pushed) history.back();
    throw error;
  }
}

function leave() {
  if (!document.body.classList.contains("reading")) return;
  document.body.classList.remove("reading");
  if (narrow.matches) scrollTo(0, listTop);
}

function back() {
  if (history.state?.fromList) history.back();
  else {
    history.replaceState(null, "", address(null));
    leave();
  }
}

function answeredBy(row) {
  const model = [row.model, row.backend, row.finish_reason, row.latency_s === null ? "" : `${number(row.latency_s, 2)} s`,
    `${number(row.prompt_tokens)} + ${number(row.completion_tokens)} tokens`, `attempt ${row.attempts}`];
  return model.filter(Boolean).join(" · ");
}

function foldAnswer(pane, row) {
  if (row.reasoning) fold(pane, "reasoning", row.reasoning);
  fold(pane, "raw answer", row.answer ?? `${row.failure}: ${row.message}`);
  fold(pane, "prompt", row.prompt ?? (row.truncated
    ? "not shown: it was shortened to fit the context, and the store keeps only its hash"
    : "not shown: the run's recipe or its seed tasks are not here, or were changed; see woolmill view --seeds"));
}

// The row of an earlier stage that this one was made of, folded; a button leads to it.
function ancestor(row) {
  const details = element("details", "ancestor");
  if (row.missing) {
    details.append(element("summary", "", `stage ${visible(row.stage)}`), shown(row.missing, "reason"));
    return details;
  }
  details.append(element("summary", "", `stage ${visible(row.stage)}, row ${row.id}`));
  const verdict = row.reason === null ? `accepted${row.detail ? `: ${row.detail}` : ""}` : `${row.reason}: ${row.detail}`;
  details.append(shown(verdict, row.reason === null ? "kept" : "reason"));
  for (const [name, value] of row.fields ?? []) details.append(element("h2", "", visible(name)), shown(value));
  details.append(element("h2", "", "answer of"), shown(answeredBy(row)));
  foldAnswer(details, row);
  if (row.place && !row.parent) for (const [name, value] of row.input ?? []) fold(details, `${row.place}: ${visible(name)}`, value);
  const there = element("button", "", "show it in its stage");
  there.addEventListener("click", () => enter(row.stage, row.id).then(() => open(row.id)).catch(complain));
  details.append(there);
  return details;
}

function fold(pane, title, text) {
  const details = element("details");
  details.append(element("summary", "", title), shown(text));
  pane.append(details);
}

// -- keeping up ---------------------------------------------------------------------------------

function complain(error) {
  at("state").textContent = error instanceof TypeError ? "woolmill view has ended" : String(error.message);
}

async function refresh() {
  const mine = stage;
  const state = await ask(ofStage("/api/state"));
  if (mine !== stage) return; // another stage was chosen meanwhile
  const changed = showState(state);
  const top = narrow.matches ? scrollY === 0 : at("list").scrollTop === 0;
  if (changed && top) await search();
}

async function poll() {
  try {
    await refresh();
  } catch (error) {
    complain(error);
  }
  setTimeout(poll, POLL_MS);
}

function again() {
  history.replaceState(history.state, "", address(location.hash.slice(1)));
  search().catch(complain);
}
at("search").addEventListener("submit", (event) => { event.preventDefault(); again(); });
at("words").addEventListener("input", again);
at("stage").addEventListener("change", () => enter(at("stage").value).catch(complain));
at("status").addEventListener("change", () => { if (at("status").value !== "refused") at("reason").value = ""; again(); });
at("reason").addEventListener("change", () => { if (at("reason").value) at("status").value = "refused"; again(); });
at("back").addEventListener("click", back);
addEventListener("popstate", () => {
  const id = location.hash.slice(1);
  if (ROW.test(id)) open(id).catch(complain);
  else leave();
});
at("more").addEventListener("click", () => search(next).catch(complain));
restoreFilter();
if (ROW.test(location.hash.slice(1))) open(location.hash.slice(1)).catch(complain);
if (!narrow.matches) at("words").focus(); // on a phone the keyboard would cover the rows
poll();
