// The labeler's page: shows the next item, sends labels, and keeps what could not be sent.

import { ask, byId, choices, el, pause, Problem } from "./dom.js";
import { conversation, TASKS } from "./tasks.js";

const STATES = {
  finished: ["All done", "No more labels are needed. Thank you!"],
  waiting: ["Nothing to do right now", "Others have what is left. This page looks again by itself."],
  not_admitted: ["Thank you for taking the test", "The organizer will tell you how it goes on."],
};
const HERE = location.pathname; // holds the token: what is kept belongs to one labeler
let settings = {};
let reply = null; // the last one of api/next
let task = null;
let isBusy = false;
let reason = null;

// ---------------------------------------------------------------- what is kept in the browser

const kept = {
  get: (name) => JSON.parse(localStorage.getItem(HERE + name) ?? "null"),
  set: (name, value) => localStorage.setItem(HERE + name, JSON.stringify(value)),
  remove: (name) => localStorage.removeItem(HERE + name),
};

// ---------------------------------------------------------------- seconds of work

const clock = {
  total: 0,
  since: 0,
  start() {
    this.total = 0;
    this.since = document.visibilityState === "visible" ? performance.now() : 0;
  },
  change() {
    if (this.since) this.total += performance.now() - this.since;
    this.since = document.visibilityState === "visible" ? performance.now() : 0;
  },
  seconds() {
    this.change();
    return Math.round(this.total) / 1000;
  },
};

// ---------------------------------------------------------------- the loop

async function begin() {
  try {
    settings = await ask("start");
  } catch (problem) {
    return fail(problem, begin);
  }
  byId("name").textContent = settings.name;
  byId("guidelines-text").textContent = settings.guidelines;
  byId("open-guidelines").hidden = !settings.guidelines;
  reason = choices("reason", "Reason", Object.entries(settings.reasons));
  reason.node.classList.add("list");
  byId("reasons").replaceChildren(reason.node);
  await send(kept.get("unsent"));
}

async function next() {
  try {
    reply = await ask("next");
  } catch (problem) {
    return fail(problem, next);
  }
  show();
}

function show() {
  task?.end?.();
  task = null;
  const { done, left } = reply.progress;
  byId("progress").textContent = `${done} done · ${left} left`;
  byId("undo").disabled = !reply.can_undo;
  const isItem = reply.state === "item";
  byId("actions").hidden = !isItem && !reply.can_undo;
  byId("submit").hidden = byId("open-skip").hidden = !isItem;
  say("");
  if (isItem) showItem();
  else showState();
  scrollTo(0, 0);
}

function showState() {
  const [title, lead] = STATES[reply.state];
  byId("title").textContent = title;
  byId("lead").textContent = lead;
  byId("conversation").replaceChildren();
  byId("work").replaceChildren();
  byId("title").focus();
  if (reply.state !== "not_admitted") setTimeout(lookAgain, 5000, reply);
}

async function lookAgain(before) {
  if (reply === before && !isBusy) await next();
}

function showItem() {
  const { item, event, before, test } = reply;
  const draft = kept.get("draft");
  const start = draft?.event === event ? draft.value : before;
  task = TASKS[item.task](item, start, keepDraft, settings);
  byId("title").textContent = task.title;
  const number = test ? `Test, ${test.number} of ${test.of}. ` : "";
  byId("lead").textContent = number + task.lead;
  byId("conversation").replaceChildren(...conversation(item.prompt));
  byId("work").replaceChildren(task.node);
  byId("work").dataset.event = event;
  clock.start();
  task.focus();
}

function keepDraft() {
  if (!task?.draft) return;
  kept.set("draft", { event: reply.event, value: task.draft() });
}

// ---------------------------------------------------------------- actions

function submit() {
  if (!task || isBusy) return;
  let value;
  try {
    value = task.value();
  } catch (problem) {
    return say(problem.message, true);
  }
  send({ path: "submit", body: { event: reply.event, value, seconds: clock.seconds() } });
}

function skip() {
  const value = { reason: reason.get(), note: byId("note").value };
  if (!value.reason) return reason.focus();
  byId("skip").close();
  byId("note").value = "";
  reason.set(null);
  send({ path: "skip", body: { event: reply.event, value, seconds: clock.seconds() } });
}

function undo() {
  if (!isBusy && reply?.can_undo) send({ path: "undo", body: {} });
}

// Sends an action until the server has it; it is kept in the browser until then.
async function send(action) {
  if (!action) return next();
  isBusy = true;
  if (action.path !== "undo") kept.set("unsent", action);
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      await ask(action.path, action.body);
      break;
    } catch (problem) {
      if (problem.status && problem.status < 500) {
        isBusy = false;
        kept.remove("unsent");
        if (!reply) return next();
        return say(problem.message, true);
      }
      say("The server does not answer. Your work is kept here and sent again.", true);
      await pause(wait);
    }
  }
  isBusy = false;
  kept.remove("unsent");
  kept.remove("draft");
  await next();
}

async function fail(problem, again) {
  if (problem instanceof Problem && problem.status === 404) {
    byId("title").textContent = "This link is no longer valid";
    byId("lead").textContent = "Ask for a new invitation.";
    return;
  }
  byId("lead").textContent = problem.message + " This page tries again.";
  await pause(2000);
  await again();
}

function say(text, isProblem = false) {
  byId("message").textContent = text;
  byId("message").classList.toggle("problem", isProblem);
}

// ---------------------------------------------------------------- keys and dialogs

const KEYS = {
  u: ["Undo the last label", undo],
  s: ["Skip this item", () => open("skip")],
  g: ["Guidelines", () => settings.guidelines && open("guidelines")],
  "?": ["Keys", () => open("keys")],
};

function open(name) {
  if (name === "skip" && !task) return;
  if (name === "keys") listKeys();
  byId(name).showModal();
  if (name === "skip") reason.focus();
}

function listKeys() {
  const rows = Object.entries({ "Ctrl Enter": ["Submit"], Enter: ["Submit, outside of text"] });
  rows.push(...Object.entries(task?.keys ?? {}), ...Object.entries(KEYS));
  const lines = rows.filter(([, [text]]) => text).map(([key, [text]]) => {
    return el("tr", {}, el("td", {}, el("kbd", { text: key })), el("td", { text }));
  });
  byId("key-table").replaceChildren(...lines);
}

function onKey(event) {
  const isText = event.target.matches("textarea, input:not([type=radio], [type=checkbox])");
  const isControl = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (isControl || !(isText || event.target.matches("button, summary, a")))) {
    event.preventDefault();
    return submit();
  }
  if (isText || isControl || event.altKey || !byId("single-keys").checked) return;
  const action = (task?.keys?.[event.key] ?? KEYS[event.key])?.[1];
  if (!action) return;
  event.preventDefault();
  action();
}

byId("submit").addEventListener("click", submit);
byId("undo").addEventListener("click", undo);
byId("skip-form").addEventListener("submit", (event) => {
  event.preventDefault();
  skip();
});
for (const name of ["skip", "guidelines", "keys"]) {
  byId(`open-${name}`).addEventListener("click", () => open(name));
  for (const button of byId(name).querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => byId(name).close());
  }
}
byId("single-keys").checked = kept.get("single-keys") ?? true;
byId("single-keys").addEventListener("change", (event) => {
  kept.set("single-keys", event.target.checked);
});
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => clock.change());
begin();
