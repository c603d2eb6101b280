// Requests to the API of this server: JSON, and server-sent events of a chat completion.

export class Failed extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Returns the JSON of a reply; throws Failed with the server's message. */
export async function request(path, { token = "", body, signal } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { headers, signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const reply = await fetch(path, options);
  if (reply.ok) return reply;
  let message = `${reply.status} ${reply.statusText}`, code = "";
  try {
    ({ message, code } = (await reply.json()).error);
  } catch {
    // not an error object: the status says what there is to say
  }
  throw new Failed(reply.status, message, code);
}

/** Yields the JSON values of an event stream until [DONE]. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice(6);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Failed(500, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Streams a chat completion; calls onText(piece) as text comes.
 * Returns { tokens, seconds, reason }: seconds from the first piece to the last.
 */
export async function complete(body, { token, signal, onText }) {
  const stream_options = { include_usage: true };
  const reply = await request("/v1/chat/completions", {
    token, signal, body: { ...body, stream: true, stream_options },
  });
  let first = 0, last = 0, pieces = 0, tokens = 0, reason = "";
  try {
    for await (const event of events(reply)) {
      if (event.usage) tokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        if (choice.finish_reason) reason = choice.finish_reason;
        if (!choice.delta.content) continue;
        last = performance.now();
        first ||= last;
        pieces += 1;
        onText(choice.delta.content);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    reason = "stopped";
  }
  return { tokens: tokens || pieces, seconds: (last - first) / 1000, reason };
}

/**
 * Completes a conversation; one that leaves less than `room` tokens for a response, without its
 * oldest turns. The last turn alone takes what room there is.
 */
export async function completeWhatFits(body, room, options) {
  let messages = body.messages;
  for (;;) {
    const shorter = withoutOldest(messages);
    try {
      const done = await complete({ ...body, messages, min_room: shorter ? room : 1 }, options);
      return { ...done, dropped: body.messages.length - messages.length };
    } catch (error) {
      if (error.code !== "context_length_exceeded" || !shorter) throw error;
      messages = shorter;
    }
  }
}

/** Returns the messages from the second user's turn on, with the system prompt; null if there is none. */
function withoutOldest(messages) {
  const users = messages.flatMap((message, i) => (message.role === "user" ? [i] : []));
  if (users.length < 2) return null;
  const system = messages.filter((message) => message.role === "system");
  return [...system, ...messages.slice(users[1])];
}
