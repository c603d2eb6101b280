// The chat page. The conversation is `turns`; `render` draws it. Text is only ever put into the page
// as text (textContent), never as HTML.
import { completeWhatFits, Failed, request } from "/stream.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "system", "stop_text"]; // settings that the browser keeps
const LETTERS = ["A", "B"];
const ROOM = 1 / 4; // of a model's length, for a response; earlier turns give way

let models = []; // {name, length, defaults}; empty until the server has named them
let storesVotes = false;
let comparing = false;
let turns = []; // {role: "user", text} or {role: "assistant", responses, vote}
let running = null; // an AbortController while responses are made
let editing = -1; // the turn that is edited
let token = "";

// ---------------------------------------------------------------- storage

function load(key) {
  try { return localStorage.getItem(`rlhfjax.${key}`); } catch { return null; }
}

function save(key, value) {
  try { localStorage.setItem(`rlhfjax.${key}`, value); } catch { /* private mode */ }
}

// ---------------------------------------------------------------- the conversation

/** The response that the conversation goes on with: the better one, else the first. */
const chosen = (turn) => turn.responses[turn.vote === "second" ? 1 : 0];

/** The messages before a turn, as the API takes them. */
function messagesBefore(end) {
  const messages = [];
  const system = $("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const turn of turns.slice(0, end)) {
    if (turn.role === "user") messages.push({ role: "user", content: turn.text });
    else if (chosen(turn).text.trim()) messages.push({ role: "assistant", content: chosen(turn).text });
  }
  return messages;
}

function sampling() {
  const body = {};
  for (const name of NUMBERS) {
    const value = $(name).value.trim();
    if (value !== "" && Number.isFinite(Number(value))) body[name] = Number(value);
  }
  const stop = $("stop_text").value;
  if (stop) body.stop = stop;
  return body;
}

/** The models of the next response; in a comparison in random order, so that a vote is blind. */
function nextModels() {
  if (!comparing) return [$("model").value];
  const pair = [$("model").value, $("second").value];
  return Math.random() < 0.5 ? pair : pair.reverse();
}

async function respond(names) {
  const messages = messagesBefore(turns.length);
  const responses = names.map((model) => ({ model, text: "", state: "waiting", note: "" }));
  const turn = { role: "assistant", responses, vote: null };
  turns.push(turn);
  running = new AbortController();
  render();
  scrollDown(true);
  await Promise.all(responses.map((response, i) => stream(response, messages, i)));
  const near = isNearEnd();
  running = null;
  render();
  scrollDown(near); // what stands below a finished response, such as the votes
}

async function stream(response, messages, i) {
  const body = { ...sampling(), model: response.model, messages };
  // Two responses of one model with one seed would be the same.
  if (body.seed !== undefined && i) body.seed += i;
  const show = (piece) => {
    response.text += piece;
    response.state = "running";
    const bubble = response.bubble;
    bubble.classList.remove("waiting");
    bubble.textContent = response.text;
    scrollDown();
  };
  try {
    const options = { token, signal: running.signal, onText: show };
    const { length } = models.find((model) => model.name === response.model);
    const done = await completeWhatFits(body, Math.ceil(length * ROOM), options);
    response.state = "done";
    response.note = noteOf(done);
  } catch (error) {
    const stopped = error.name === "AbortError";
    response.state = stopped ? "done" : "failed";
    response.note = stopped ? "stopped" : error.message || "the connection was lost";
    if (error instanceof Failed && error.status === 401) await start();
  }
}

function noteOf({ tokens, seconds, reason, dropped }) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (seconds > 0 && tokens > 1) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (reason === "length") parts.push("cut: no more tokens allowed");
  if (reason === "stopped") parts.push("stopped");
  if (dropped) parts.push(`the oldest ${dropped} messages were left out`);
  return parts.join(" · ");
}

function send() {
  const text = $("text").value.trim();
  if (!text || running || !models.length) return;
  $("text").value = "";
  resize();
  turns.push({ role: "user", text });
  respond(nextModels());
}

function regenerate() {
  const last = turns.at(-1);
  if (running || last?.role !== "assistant") return;
  turns.pop();
  respond(nextModels());
}

function resend(index, text) {
  if (running || !text.trim()) return;
  editing = -1;
  turns = turns.slice(0, index);
  turns.push({ role: "user", text: text.trim() });
  respond(nextModels());
}

function stop() {
  running?.abort();
}

function clear() {
  stop();
  turns = [];
  editing = -1;
  render();
  $("text").focus();
}

async function vote(turn, preferred) {
  if (turn.vote || running) return;
  turn.vote = preferred;
  render();
  if (!storesVotes) return;
  const [first, second] = turn.responses;
  const body = {
    messages: messagesBefore(turns.indexOf(turn)),
    completions: [first.text, second.text],
    models: [first.model, second.model],
    preferred,
  };
  try {
    const { stored } = await (await request("/v1/comparisons", { token, body })).json();
    say(`Vote stored (${stored} since the server started).`);
  } catch (error) {
    turn.vote = null;
    render();
    say(`The vote was not stored: ${error.message}`);
  }
}

// ---------------------------------------------------------------- drawing

function element(tag, { text, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function button(text, onclick, properties = {}) {
  return element("button", { type: "button", text, onclick, ...properties });
}

function render() {
  const drawn = turns.map((turn, i) => (turn.role === "user" ? userTurn(turn, i) : answer(turn, i)));
  $("turns").replaceChildren(...(drawn.length ? drawn : [empty()]));
  $("send").hidden = Boolean(running);
  $("send").disabled = !models.length;
  $("stop").hidden = !running;
  $("compare").setAttribute("aria-pressed", String(comparing));
  $("second-pick").hidden = !comparing;
  $("turns").querySelector(".editor")?.focus();
}

function empty() {
  const names = comparing ? "Two models" : $("model").value;
  const hint = comparing
    ? "Each message gets two responses. Their names are shown after your vote."
    : "Write a message to begin.";
  return element("div", { className: "empty" }, element("strong", { text: names }), element("p", { text: hint }));
}

function userTurn(turn, index) {
  if (editing === index) return editor(turn, index);
  const edit = button("Edit", () => { editing = index; render(); }, { disabled: Boolean(running) });
  return element("div", { className: "turn user" },
    element("div", { className: "bubble", text: turn.text }),
    element("div", { className: "foot" }, edit));
}

function editor(turn, index) {
  const area = element("textarea", { className: "editor", value: turn.text, rows: 3 });
  area.setAttribute("aria-label", "Edit the message");
  const form = element("form", {}, area, element("div", { className: "edit-actions" },
    button("Cancel", () => { editing = -1; render(); $("text").focus(); }),
    element("button", { className: "main", text: "Resend" })));
  form.onsubmit = (event) => { event.preventDefault(); resend(index, area.value); };
  area.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      resend(index, area.value);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      editing = -1;
      render();
      $("text").focus();
    }
  };
  return element("div", { className: "turn user" }, form);
}

function answer(turn, index) {
  const isLast = index === turns.length - 1;
  if (turn.responses.length === 1) {
    const [response] = turn.responses;
    return element("div", { className: "turn" }, ...parts(response, response.model, isLast));
  }
  const done = turn.responses.every((response) => response.state === "done");
  const columns = turn.responses.map((response, i) => {
    const name = turn.vote ? response.model : `Response ${LETTERS[i]}`;
    const won = turn.vote === ["first", "second"][i];
    const className = won ? "column won" : "column";
    return element("div", { className }, ...parts(response, name, false));
  });
  const drawn = element("div", { className: "turn pair" }, element("div", { className: "columns" }, ...columns));
  if (turn.vote) drawn.append(element("p", { className: "voted", text: verdict(turn) }));
  else if (done && !running && isLast) drawn.append(votes(turn));
  if (isLast && !running) {
    const again = button("Regenerate both", regenerate);
    drawn.append(element("div", { className: "foot middle" }, again));
  }
  return drawn;
}

function parts(response, name, canRegenerate) {
  const waits = response.state === "waiting";
  const bubble = element("div", { className: waits ? "bubble waiting" : "bubble", text: response.text });
  response.bubble = bubble;
  const failed = response.state === "failed";
  const foot = element("div", { className: "foot" });
  if (response.note) foot.append(element("span", { className: failed ? "error" : "", text: response.note }));
  if (response.state === "done" && response.text) foot.append(button("Copy", () => copy(response.text)));
  if (canRegenerate && !running) foot.append(button(failed ? "Retry" : "Regenerate", regenerate));
  return [element("div", { className: "name", text: name }), bubble, foot];
}

function votes(turn) {
  return element("div", { className: "votes" },
    button("A is better", () => vote(turn, "first")),
    button("Tie", () => vote(turn, "tie")),
    button("B is better", () => vote(turn, "second")));
}

function verdict(turn) {
  const names = turn.responses.map((response) => response.model);
  const text = turn.vote === "tie" ? `A tie of ${names[0]} and ${names[1]}.` : `You preferred ${chosen(turn).model}.`;
  return storesVotes ? text : `${text} This server stores no votes.`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let this page copy.");
  }
}

function say(text) {
  $("status").textContent = text;
}

function isNearEnd() {
  const box = $("turns");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 120;
}

/** Scrolls to the end, unless the reader has scrolled up. */
function scrollDown(always = false) {
  if (always || isNearEnd()) $("turns").scrollTop = $("turns").scrollHeight;
}

function resize() {
  const area = $("text");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// ---------------------------------------------------------------- settings

function showDefaults() {
  const about = models.find((model) => model.name === $("model").value);
  for (const [name, value] of Object.entries(about?.defaults ?? {})) $(name).placeholder = String(value);
}

function setTheme(theme) {
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  for (const radio of document.getElementsByName("theme")) radio.checked = radio.value === theme;
}

function showSettings(visible) {
  $("settings").hidden = !visible;
  $("open-settings").setAttribute("aria-expanded", String(visible));
  (visible ? $("system") : $("text")).focus();
}

function fillModels() {
  for (const select of [$("model"), $("second")]) {
    const options = models.map((model) => element("option", { value: model.name, text: model.name }));
    select.replaceChildren(...options);
  }
  $("second").value = (models[1] ?? models[0]).name;
  showDefaults();
}

// ---------------------------------------------------------------- the start

async function start() {
  try {
    const about = await (await request("/settings", { token })).json();
    models = about.models;
    storesVotes = about.stores_comparisons;
    fillModels();
    render();
  } catch (error) {
    if (error instanceof Failed && error.status === 401) askToken(token ? "That was not the token." : "");
    else say(`The server does not answer: ${error.message}`);
  }
}

function askToken(mistake) {
  $("token-error").textContent = mistake;
  $("token").value = "";
  const dialog = $("ask-token");
  dialog.onclose = () => { token = $("token").value.trim(); sessionToken(token); start(); };
  dialog.oncancel = (event) => event.preventDefault();
  if (!dialog.open) dialog.showModal();
}

/** The token is kept until the tab is closed. */
function sessionToken(value) {
  try {
    if (value !== undefined) sessionStorage.setItem("rlhfjax.token", value);
    return sessionStorage.getItem("rlhfjax.token") ?? "";
  } catch {
    return token;
  }
}

function onKey(event) {
  if (event.key === "Escape") {
    if (running) stop();
    else if (!$("settings").hidden) showSettings(false);
    return;
  }
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const turn = turns.at(-1);
  const canVote = turn?.responses?.length === 2 && !turn.vote && !running;
  const actions = {
    KeyR: regenerate,
    KeyN: clear,
    Digit1: () => canVote && vote(turn, "first"),
    Digit2: () => canVote && vote(turn, "second"),
    Digit3: () => canVote && vote(turn, "tie"),
  };
  if (actions[event.code]) {
    event.preventDefault();
    actions[event.code]();
  }
}

function onComposerKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("text").value && !running) {
    const last = turns.findLastIndex((turn) => turn.role === "user");
    if (last < 0) return;
    event.preventDefault();
    editing = last;
    render();
  }
}

for (const name of KEPT) {
  $(name).value = load(name) ?? "";
  $(name).onchange = () => save(name, $(name).value);
}
setTheme(load("theme") ?? "auto");
for (const radio of document.getElementsByName("theme")) {
  radio.onchange = () => { setTheme(radio.value); save("theme", radio.value); };
}
$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("text").oninput = resize;
$("text").onkeydown = onComposerKey;
$("stop").onclick = stop;
$("new").onclick = clear;
$("compare").onclick = () => { comparing = !comparing; render(); $("text").focus(); };
$("model").onchange = () => { showDefaults(); render(); };
$("open-settings").onclick = () => showSettings($("settings").hidden);
$("close-settings").onclick = () => showSettings(false);
document.onkeydown = onKey;
token = sessionToken();
start();
$("text").focus();
