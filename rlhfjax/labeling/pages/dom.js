// Makes elements and asks the server. Text is only ever set as text, so that it stays text.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: the server did not answer
  }
}

// Returns the JSON of a reply. Throws Problem.
export async function ask(path, body) {
  const options = { cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let reply;
  try {
    reply = await fetch("api/" + path, options);
  } catch {
    throw new Problem(0, "The server does not answer.");
  }
  const content = await reply.json().catch(() => ({}));
  if (reply.ok) return content;
  throw new Problem(reply.status, content.error?.message ?? "The server has a problem.");
}

export const pause = (milliseconds) =>
  new Promise((resolve) => setTimeout(resolve, milliseconds));

// A group of radio buttons that look like a row of keys. Returns {node, get, set}.
export function choices(name, label, options, onchange = () => {}) {
  const inputs = options.map(([value, text, title]) => {
    const input = el("input", { type: "radio", name, value, onchange: () => onchange() });
    if (title) input.setAttribute("aria-label", title);
    return [input, el("label", { class: "key", title }, input, el("span", { text }))];
  });
  const node = el(
    "div",
    { class: "choices", role: "radiogroup", "aria-label": label },
    ...inputs.map(([, wrapped]) => wrapped),
  );
  return {
    node,
    get: () => inputs.find(([input]) => input.checked)?.[0].value ?? null,
    set: (value) => {
      for (const [input] of inputs) input.checked = input.value === String(value);
    },
    focus: () => (inputs.find(([input]) => input.checked) ?? inputs[0])[0].focus(),
  };
}

export const letter = (i) => String.fromCharCode(65 + i);
