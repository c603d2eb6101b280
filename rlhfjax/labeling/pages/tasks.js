// One function per task: (item, before, changed) -> {title, lead, node, keys, value, focus, ...}.
// `value` returns the label, or throws with a message for the labeler.

import { choices, el, letter } from "./dom.js";
import { rank } from "./rank.js";

const ROLES = { user: "User", assistant: "Assistant", system: "System" };

export function conversation(turns) {
  return turns.map((turn) =>
    el(
      "div",
      { class: `turn ${turn.role in ROLES ? turn.role : "other"}` },
      el("b", { class: "role", text: ROLES[turn.role] ?? turn.role }),
      el("div", { class: "text", dir: "auto", text: turn.content }),
    ),
  );
}

function area(label, text, rows, changed) {
  const input = el("textarea", { rows, dir: "auto", spellcheck: "true", oninput: changed });
  input.value = text;
  return { input, node: el("label", { class: "field card" }, el("b", { text: label }), input) };
}

function needed(input, message) {
  if (input.value.trim()) return input.value;
  input.focus();
  throw new Error(message);
}

// ---------------------------------------------------------------- demonstrate

function demonstrate(item, before, changed) {
  if (item.both_sides) return bothSides(item, before, changed);
  const text = before?.text ?? before?.messages?.at(-1).content ?? "";
  const { input, node } = area("Your response", text, 8, changed);
  return {
    title: "Write the response",
    lead: "Write what the assistant should answer.",
    node,
    focus: () => input.focus(),
    draft: () => ({ text: input.value }),
    value: () => ({ text: needed(input, "Write a response first.") }),
  };
}

function bothSides(item, before, changed) {
  const list = el("div", { class: "stack" });
  const inputs = [];
  const remove = el("button", { type: "button", onclick: removeTurn, text: "Remove last turn" });
  const more = el("button", { type: "button", onclick: () => addTurn("").focus() });

  function addTurn(text) {
    const role = inputs.length % 2 ? "assistant" : "user";
    const label = `Turn ${inputs.length + 1} · ${ROLES[role]}`;
    const { input, node } = area(label, text, 3, changed);
    node.classList.add("turn", role);
    inputs.push(input);
    list.append(node);
    update();
    return input;
  }

  function removeTurn() {
    inputs.pop();
    list.lastChild.remove();
    update();
    inputs.at(-1).focus();
    changed();
  }

  function update() {
    remove.disabled = inputs.length <= 2;
    more.textContent = `Add a turn of the ${inputs.length % 2 ? "assistant" : "user"}`;
  }

  const turns = (before?.messages ?? []).filter((turn) => turn.role !== "system");
  for (const turn of turns) addTurn(turn.content);
  while (inputs.length < 2) addTurn("");
  const messages = () =>
    inputs.map((input, i) => ({ role: i % 2 ? "assistant" : "user", content: input.value }));
  return {
    title: "Write a conversation",
    lead: "Write both sides. The user begins, and the assistant has the last word.",
    node: el("div", { class: "stack" }, list, el("div", { class: "row start" }, more, remove)),
    focus: () => inputs[0].focus(),
    draft: () => ({ messages: messages() }),
    value: () => {
      inputs.forEach((input, i) => needed(input, `Turn ${i + 1} is empty.`));
      if (inputs.length % 2) throw new Error("The last turn must be the assistant's.");
      return { messages: messages() };
    },
  };
}

// ---------------------------------------------------------------- compare

function compare(item, before, changed) {
  const cards = item.responses.map((text, i) =>
    el(
      "article",
      { class: "card response", "aria-label": `Response ${letter(i)}` },
      el("b", { class: "letter", text: letter(i) }),
      el("div", { class: "text", dir: "auto", text }),
    ),
  );
  const ranks = { a: [1, 2], tie: [1, 1], b: [2, 1] };
  const group = choices(
    "better",
    "Which response is better?",
    [
      ["a", "A is better"],
      ["tie", "Equally good"],
      ["b", "B is better"],
    ],
    update,
  );
  group.node.classList.add("wide");

  function update() {
    cards[0].classList.toggle("chosen", group.get() === "a");
    cards[1].classList.toggle("chosen", group.get() === "b");
    changed();
  }

  function choose(name) {
    group.set(name);
    group.focus();
    update();
  }

  if (before?.ranks) {
    const [a, b] = before.ranks;
    group.set(a < b ? "a" : a > b ? "b" : "tie");
    update();
  }
  return {
    title: "Which response is better?",
    lead: "Read both to the end.",
    node: el("div", { class: "stack" }, el("div", { class: "pair" }, ...cards), group.node),
    keys: {
      1: ["A is better", () => choose("a")],
      2: ["B is better", () => choose("b")],
      0: ["Equally good", () => choose("tie")],
    },
    focus: () => group.focus(),
    draft: () => (group.get() ? { ranks: ranks[group.get()] } : null),
    value: () => {
      if (group.get()) return { ranks: ranks[group.get()] };
      group.focus();
      throw new Error("Choose one of the three first.");
    },
  };
}

// ---------------------------------------------------------------- edit

function edit(item, before, changed) {
  const { input, node } = area("Your version", before?.text ?? item.response, 6, changed);
  const original = el(
    "article",
    { class: "card response", "aria-label": "The response as it was" },
    el("b", { class: "role", text: "The response as it was" }),
    el("div", { class: "text", dir: "auto", text: item.response }),
  );
  const reset = el("button", {
    type: "button",
    text: "Start again from the original",
    onclick: () => {
      input.value = item.response;
      input.focus();
      changed();
    },
  });
  return {
    title: "Improve the response",
    lead: "Change as much as is needed. Skip a response that needs no change.",
    node: el("div", { class: "stack" }, original, node, el("div", { class: "row start" }, reset)),
    focus: () => input.focus(),
    draft: () => ({ text: input.value }),
    value: () => {
      const text = needed(input, "Write a response first.");
      if (text.trim() !== item.response.trim()) return { text };
      input.focus();
      throw new Error("Nothing was changed yet.");
    },
  };
}

// ---------------------------------------------------------------- feedback in time

function feedback(item, before) {
  const pace = item.seconds_per_token * 1000;
  const length = item.pieces.length * pace;
  const tail = 3000; // to react to the last words
  let marks = [];
  let began = 0;
  let state = "ready"; // ready, running, done
  let timer = 0;

  const text = el("div", { class: "text stream", dir: "auto", "aria-label": "Response" });
  const bar = el("div", { class: "timeline", "aria-hidden": "true" });
  const count = el("p", { class: "muted", role: "status" });
  const start = el("button", { type: "button", class: "primary big", onclick: run });
  const minus = el("button", { type: "button", class: "big bad", text: "− Worse" });
  const plus = el("button", { type: "button", class: "big good", text: "+ Good" });
  minus.addEventListener("click", () => mark(-1));
  plus.addEventListener("click", () => mark(1));

  function run() {
    marks = [];
    began = performance.now();
    state = "running";
    clearInterval(timer);
    timer = setInterval(tick, 30);
    tick();
    update();
    plus.focus();
  }

  function tick() {
    const elapsed = performance.now() - began;
    const shown = Math.min(item.pieces.length, 1 + Math.floor(elapsed / pace));
    const now = item.pieces.slice(0, shown).join("");
    if (text.textContent !== now) text.textContent = now;
    bar.style.setProperty("--at", Math.min(1, elapsed / (length + tail)));
    if (elapsed >= length + tail) stop("done");
  }

  function stop(next) {
    clearInterval(timer);
    state = next;
    update();
    if (next === "done") start.focus();
  }

  function mark(value) {
    if (state !== "running") return;
    const at = performance.now() - began;
    marks.push([Math.round(at) / 1000, value]);
    draw(at / 1000, value);
    update();
  }

  function draw(at, value) {
    const mark = el("i", { class: value > 0 ? "up" : "down" });
    mark.style.setProperty("--x", (at * 1000) / (length + tail));
    bar.append(mark);
  }

  function update() {
    if (state === "running" && !marks.length) bar.replaceChildren();
    minus.disabled = plus.disabled = state !== "running";
    start.textContent = state === "ready" ? "Start" : "Watch it again";
    start.classList.toggle("primary", state === "ready");
    start.disabled = state === "running";
    const good = marks.filter(([, value]) => value > 0).length;
    const counted = `Good: ${good}. Worse: ${marks.length - good}.`;
    count.textContent = state === "ready" ? "" : counted;
  }

  function onHide() {
    if (document.visibilityState === "visible" || state !== "running") return;
    marks = [];
    stop("ready");
    text.textContent = "";
    bar.replaceChildren();
  }

  document.addEventListener("visibilitychange", onHide);
  if (before?.feedback) {
    marks = before.feedback;
    text.textContent = item.pieces.join("");
    for (const [at, value] of marks) draw(at, value);
    state = "done";
  }
  update();
  return {
    title: "React while you read",
    lead: "The response appears word by word. Press + or − whenever you like or dislike it.",
    node: el(
      "div",
      { class: "stack" },
      el("article", { class: "card response" }, text),
      bar,
      el("div", { class: "row center" }, minus, start, plus),
      count,
    ),
    keys: {
      "+": ["Good", () => mark(1)],
      "-": ["Worse", () => mark(-1)],
      "=": [null, () => mark(1)],
      ArrowUp: [null, () => mark(1)],
      ArrowDown: [null, () => mark(-1)],
    },
    focus: () => start.focus(),
    value: () => {
      if (state === "running") throw new Error("Wait until the response has ended.");
      if (!marks.length) throw new Error("Press + or − at least once while it appears.");
      return { feedback: marks };
    },
    end: () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", onHide);
    },
  };
}

export const TASKS = { demonstrate, rank, compare, edit, feedback };
