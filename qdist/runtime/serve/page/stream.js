// Asks the server in OpenAI's protocol, and reads an answer as it comes. Every failure is a Trouble with one thing to do.

/** What went wrong, in a sentence, and one thing to do; `retryAfter`: seconds that the server asks to wait for. */
export class Trouble extends Error {
  constructor(message, remedy, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { remedy, status, retryAfter });
  }
}

const GONE = () => new Trouble("The server does not answer.", "See whether `qdist web` still runs in its terminal, then try again.");

/** A JSON document of the server. */
export async function readJson(path, key) {
  const response = await reach(path, { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** Yields {text}, {reason} and {usage} as they come. Aborted by `signal`: throws AbortError. */
export async function* streamAnswer(body, { signal, key }) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let done = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") { done = true; break; }
    yield* pieces(JSON.parse(data));
  }
  if (!done) throw new Trouble("The answer broke off: the connection ended.", "Try again; the server's terminal says more.");
}

function* pieces(message) {
  if (message.error) throw new Trouble(message.error.message || "The server failed.", "Try again; the server's terminal says more.");
  for (const choice of message.choices || []) {
    if (choice.delta && choice.delta.content) yield { text: choice.delta.content };
    if (choice.finish_reason) yield { reason: choice.finish_reason };
  }
  if (message.usage) yield { usage: message.usage };
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw GONE();
  }
}

/** Server-sent events of a body: the text behind `data:`. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const lines = (waiting + value).split(/\r?\n/);
      waiting = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw GONE();
  }
}

async function refusal(response) {
  const { status } = response, retryAfter = Number(response.headers.get("Retry-After")) || 0;
  const error = await response.json().then((body) => body.error || {}, () => ({})), said = capital(String(error.message || ""));
  const [text, stated] = said.split("; try: "), remedy = error.try || stated;
  const [message, usual] = sentences(status, text && remedy ? `${text}.` : text, retryAfter);
  return new Trouble(message, remedy && status !== 429 && status !== 401 ? `Try: ${remedy}` : usual, { status, retryAfter });
}

function capital(text) {
  return text.slice(0, 1).toUpperCase() + text.slice(1);
}

function sentences(status, said, retryAfter) {
  if (status === 429) return ["The server has as many answers at work as it takes.", retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment."];
  if (status === 401) return ["The server wants its API key.", "Enter it under Settings, then try again."];
  if (status === 503) return [said || "The server is not ready.", "Try again in a moment."];
  if (status >= 500) return [said || `The server failed (${status}).`, "Try again; the server's terminal says more."];
  if (/token|context|long/i.test(said)) return [said, "Shorten the message, or start a new conversation."];
  return [said || `The server refused this (${status}).`, "Change what it names under Settings, or edit the message."];
}
