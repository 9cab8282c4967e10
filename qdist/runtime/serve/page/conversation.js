// A conversation as plain data: turns, each a question with one answer a model. Nothing here touches the page.

/** A question that waits for answers of these models. */
export function newTurn(text, models) {
  return { text, answers: models.map((model) => newAnswer(model)) };
}

/** An answer that has not begun. `state`: waiting, running, done, stopped or failed; times are in seconds. */
export function newAnswer(model) {
  return { model, text: "", state: "waiting", reason: "", usage: null, seed: null, first_s: null, total_s: null, trouble: null };
}

/** Whether an answer is at work. */
export const isOpen = (answer) => answer.state === "waiting" || answer.state === "running";

/** What to send so that `model` answers the last of `turns`: its own earlier answers where it gave some. */
export function messagesFor(turns, model, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, -1)) {
    const said = answerOf(turn, model);
    if (said) messages.push({ role: "user", content: turn.text }, { role: "assistant", content: said });
  }
  return [...messages, { role: "user", content: turns[turns.length - 1].text }];
}

/** The conversation with `model` as one JSONL record that `qdist launch --data` takes; empty if nothing was answered. */
export function jsonlOf(turns, model, system) {
  const answered = turns.filter((turn) => answerOf(turn, model));
  if (!answered.length) return "";
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of answered) {
    messages.push({ role: "user", content: turn.text }, { role: "assistant", content: answerOf(turn, model) });
  }
  return `${JSON.stringify({ messages })}\n`;
}

/** What stands under an answer: tokens, speed, time to the first token, seed, and why it ended if not by itself. */
export function footOf(answer) {
  const { usage, reason, state, seed, first_s: first, total_s: total } = answer, parts = [];
  if (usage) parts.push(`${count(usage.prompt_tokens)} in, ${count(usage.completion_tokens)} out`);
  const spent = total - first;
  if (usage && usage.completion_tokens > 1 && first !== null && spent > 0) {
    parts.push(`${rounded((usage.completion_tokens - 1) / spent)} tokens/s`);
  }
  if (first !== null) parts.push(`first after ${first < 10 ? first.toFixed(2) : first.toFixed(0)} s`);
  if (seed !== null && state !== "failed") parts.push(`seed ${seed}`);
  if (state === "stopped") parts.push("stopped");
  if (reason === "length") parts.push("cut at the most tokens");
  return parts;
}

/** Turns of text that `JSON.stringify` made of them; none if it is something else. Open answers come back as stopped. */
export function turnsOf(text) {
  try {
    const turns = JSON.parse(text || "[]");
    for (const answer of turns.flatMap((turn) => turn.answers)) if (isOpen(answer)) answer.state = "stopped";
    return turns;
  } catch {
    return [];
  }
}

/** The model that has no adapter, of a list in OpenAI's form; null if there is none beside the others. */
export function baseOf(models) {
  const parents = new Set(models.map((model) => model.parent).filter(Boolean));
  return (models.find((model) => parents.has(model.id)) || { id: null }).id;
}

function answerOf(turn, model) {
  const own = turn.answers.find((answer) => answer.model === model && answer.text);
  return (own || turn.answers.find((answer) => answer.text) || { text: "" }).text;
}

const count = (number) => number.toLocaleString("en");
const rounded = (number) => (number < 100 ? number.toFixed(1) : Math.round(number).toLocaleString("en"));
