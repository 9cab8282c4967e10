// Draws turns of a conversation, and what screen readers are told of them.

import { footOf, isOpen } from "./conversation.js";
import { element, showMarkdown } from "./markdown.js";

const PAUSE_MS = 1500;
const WORDS = { waiting: "Waiting for the first token", running: "Answering", stopped: "Stopped", failed: "Failed", done: "" };

/** A turn: the question, and its answers beside each other. Buttons carry what they do in `data-act`. */
export function drawTurn(turn, place) {
  const asked = element("div", { class: "asked" }, element("h2", { class: "hidden" }, `Message ${place + 1}`));
  asked.append(element("div", { class: "text" }, turn.text), element("div", { class: "acts" }, button("Edit", "edit", "Edit this message", "only-last")));
  const answers = element("div", { class: turn.answers.length > 1 ? "answers two" : "answers" });
  answers.append(...turn.answers.map(drawAnswer));
  return element("article", { class: "turn", "aria-label": `Turn ${place + 1}` }, asked, answers);
}

function drawAnswer(answer, at) {
  const place = element("section", { class: "answer", "aria-label": `Answer of ${answer.model}`, "data-answer": at });
  place.append(
    element("h3", { class: `who w${at}` }, answer.model, element("span", { class: "state-word" })),
    element("div", { class: "said" }),
    element("div", { class: "trouble", role: "alert", hidden: "" }),
    element("div", { class: "foot" }),
  );
  showAnswer(place, answer);
  return place;
}

/** Bring a drawn answer up to date. */
export function showAnswer(place, answer) {
  const open = isOpen(answer), [who, said, trouble, foot] = place.children;
  place.dataset.state = answer.state;
  place.setAttribute("aria-busy", String(open));
  who.lastChild.textContent = open ? WORDS[answer.state] : "";
  showMarkdown(said, answer.text);
  if (answer.state === "done" && !answer.text) said.replaceChildren(element("p", { class: "dim" }, "An empty answer."));
  showTrouble(trouble, answer.trouble, button("Try again", "again", "Try again", "only-last"));
  if (open) return;
  foot.replaceChildren(element("span", { class: "figures" }, ...footOf(answer).map((part) => element("span", {}, part))), acts(answer));
}

function acts(answer) {
  const buttons = answer.text ? [button("Copy", "copy", "Copy this answer", "")] : [];
  if (!answer.trouble) buttons.push(button("Regenerate", "again", "Answer the last message again", "only-last"));
  return element("span", { class: "acts" }, ...buttons);
}

/** Show what went wrong and what to do about it, or hide the place. */
export function showTrouble(place, trouble, ...buttons) {
  place.hidden = !trouble;
  if (!trouble) { place.replaceChildren(); return; }
  place.replaceChildren(element("p", {}, element("b", {}, trouble.message), ` ${trouble.remedy} `, ...buttons));
}

function button(text, act, label, kind) {
  return element("button", { type: "button", class: `quiet ${kind}`, "data-act": act, "aria-label": label, title: label }, text);
}

/** Tells a live region whole sentences of a growing text, no more often than each one and a half seconds. */
export class Announcer {
  constructor(region) {
    this.region = region;
    this.begin();
  }

  begin() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.text = "";
    this.told = 0;
  }

  /** Take the text as far as it has come. */
  grow(text) {
    this.text = text;
    if (!this.timer) this.timer = setTimeout(() => { this.timer = 0; this.tell(); }, PAUSE_MS);
  }

  /** Tell the rest, and how it ended. */
  end(word) {
    clearTimeout(this.timer);
    this.timer = 0;
    this.say(`${this.text.slice(this.told)} ${word}`.trim());
    this.told = this.text.length;
  }

  say(words) {
    this.region.textContent = words;
  }

  tell() {
    const fresh = this.text.slice(this.told), whole = Math.max(fresh.lastIndexOf(". "), fresh.lastIndexOf("\n"), fresh.lastIndexOf("? "), fresh.lastIndexOf("! "));
    if (whole < 0) return;
    this.say(fresh.slice(0, whole + 1));
    this.told += whole + 1;
  }
}
