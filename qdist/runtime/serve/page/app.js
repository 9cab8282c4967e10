// The page: what is typed, sent, stopped, edited and kept. Data is in conversation.js, drawing in view.js.

import { baseOf, isOpen, jsonlOf, messagesFor, newAnswer, newTurn, turnsOf } from "./conversation.js";
import { drawChart, drawFigures } from "./curves.js";
import { element } from "./markdown.js";
import { readJson, streamAnswer, Trouble } from "./stream.js";
import { Announcer, drawTurn, showAnswer, showTrouble } from "./view.js";

const $ = (id) => document.getElementById(id);
const NEUTRAL = { top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 };
const REFRESH_MS = 10000;
const LOADING_MS = 1000;
const WIDE = matchMedia("(min-width: 1080px)");

const announcer = new Announcer($("status"));
let models = [];
let base = null;
let turns = turnsOf(kept(sessionStorage, "qdist.turns"));
let stopper = null;
let draft = null;

function kept(storage, name) {
  try { return storage.getItem(name); } catch { return null; }
}

function keep(storage, name, value) {
  try { storage.setItem(name, value); } catch { /* full, or not allowed: the page works without */ }
}

// Models and the run

async function connect() {
  showTrouble($("notice"), null);
  $("greeting").textContent = "Loading\u2026";
  try {
    models = (await readJson("v1/models", $("key").value)).data;
  } catch (error) {
    troubled(error, connect);
    return;
  }
  base = baseOf(models);
  const chosen = kept(sessionStorage, "qdist.model"), names = models.map((model) => model.id);
  $("model").replaceChildren(...names.map((name) => element("option", { value: name }, name === base ? `${name} (base)` : name)));
  $("model").value = names.includes(chosen) ? chosen : names.find((name) => name !== base) || names[0];
  $("model").disabled = names.length < 2;
  showBeside();
  $("send").disabled = false;
  welcome(null);
  readRun();
}

async function readRun() {
  let run;
  try {
    run = await readJson("run/report", $("key").value);
  } catch (error) {
    if (error.status !== 404) $("headline").textContent = `${error.message} ${error.remedy}`;
    $("run").hidden = error.status === 404;
    return;
  }
  showRun(run);
  if (run.state === "running") setTimeout(readRun, REFRESH_MS);
}

function showRun(run) {
  $("run").hidden = false;
  $("name").textContent = run.name;
  document.title = `${run.name}: qdist`;
  Object.assign($("state"), { textContent: run.state, className: `state ${run.state}`, hidden: false });
  $("headline").textContent = run.headline;
  $("charts").replaceChildren(...run.charts.filter((chart) => ["loss", "speed"].includes(chart.key)).map(drawChart));
  $("figures").hidden = !run.numbers.rows.length;
  $("figures").querySelector(".wide").replaceChildren(drawFigures(run.numbers));
  $("summary").replaceChildren(...run.summary.map(([label, value]) => element("div", {}, element("dt", {}, label), element("dd", {}, value))));
  welcome(run);
}

function welcome(run) {
  $("greeting").textContent = run ? `Talk to ${run.name}` : `Talk to ${$("model").value}`;
  if (!run) { $("about").textContent = ""; return; }
  const held = run.questions.slice(0, 3);
  $("about").textContent = held.length ? `${run.headline} Questions that it did not see in training:` : run.headline;
  $("questions").replaceChildren(...held.map((text) => element("button", { type: "button", class: "question" }, text)));
}

function showBeside() {
  const other = otherModel();
  $("beside").disabled = !other;
  $("beside").checked = Boolean(other) && kept(sessionStorage, "qdist.beside") === "yes";
  $("beside-name").textContent = other === base || !other ? "base" : other;
  $("beside-label").title = other ? `Ask ${other} the same` : "There is no other model to ask";
}

function otherModel() {
  const chosen = $("model").value;
  return chosen === base ? (models.find((model) => model.id !== base) || { id: null }).id : base;
}

const asked = () => ($("beside").checked ? [$("model").value, otherModel()] : [$("model").value]);

// Asking

function submit(event) {
  event.preventDefault();
  const text = $("question").value;
  if (!text.trim() || stopper || $("send").disabled || !settingsHold()) return;
  if (draft !== null) turns.pop();
  endEdit("");
  turns.push(newTurn(text, asked()));
  redraw();
  answerLast(turns[turns.length - 1].answers);
}

/** Whether all settings are in their ranges; else the first that is not is shown. */
function settingsHold() {
  if ($("settings").checkValidity()) return true;
  showPanel(true);
  $("settings").reportValidity();
  return false;
}

function again() {
  if (stopper || !turns.length || !settingsHold()) return;
  const turn = turns[turns.length - 1];
  turn.answers = asked().map(newAnswer);
  redraw();
  answerLast(turn.answers);
}

async function answerLast(answers) {
  stopper = new AbortController();
  working(true);
  announcer.begin();
  announcer.say("Answering");
  const places = [...$("log").lastElementChild.querySelectorAll(".answer")], seed = seedOf();
  const started = answers.map((answer, at) => follow(answer, places[at], seed, stopper.signal, at === 0));
  toEnd();
  await Promise.all(started);
  stopper = null;
  working(false);
  announcer.end(closingWords(answers));
  keep(sessionStorage, "qdist.turns", JSON.stringify(turns));
}

function closingWords(answers) {
  const words = { done: "answered", stopped: "was stopped", failed: "failed" };
  return answers.map((answer) => `${answer.model} ${words[answer.state]}.`).join(" ");
}

/** Stream one answer into its place; what goes wrong is shown there. */
async function follow(answer, place, seed, signal, spoken) {
  const begun = performance.now(), since = () => (performance.now() - begun) / 1000;
  const draw = drawingOf(place, answer);
  answer.seed = seed;
  try {
    const body = { model: answer.model, messages: messagesFor(turns, answer.model, $("system").value), ...sampling(seed) };
    for await (const piece of streamAnswer(body, { signal, key: $("key").value })) {
      if (piece.text) {
        if (answer.first_s === null) answer.first_s = since();
        Object.assign(answer, { text: answer.text + piece.text, state: "running", total_s: since() });
        if (spoken) announcer.grow(answer.text);
      }
      if (piece.reason) answer.reason = piece.reason;
      if (piece.usage) answer.usage = piece.usage;
      draw();
    }
    answer.state = "done";
  } catch (error) {
    failed(answer, error);
  }
  showFollowing(place, answer);
}

/** Bring an answer up to date; who reads at the end stays there. */
function showFollowing(place, answer) {
  const follows = nearEnd();
  showAnswer(place, answer);
  if (follows) toEnd();
}

function failed(answer, error) {
  if (error.name === "AbortError") { answer.state = "stopped"; return; }
  if (!(error instanceof Trouble)) throw error;
  answer.state = "failed";
  answer.trouble = { message: error.message, remedy: error.remedy };
  if (error.status === 401) wantKey();
}

/** A function that draws an answer at the next frame, once for all pieces that have come until then. */
function drawingOf(place, answer) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      if (isOpen(answer)) showFollowing(place, answer);
    });
  };
}

function sampling(seed) {
  const given = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"]) {
    const text = $(name).value, value = Number(text);
    if (text !== "" && NEUTRAL[name] !== value) given[name] = value;
  }
  return { ...given, seed };
}

/** The seed that is set, or a new one: it is shown under the answer, so that the answer can be had again. */
function seedOf() {
  return $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] % 1000000 : Number($("seed").value);
}

function stop() {
  if (stopper) stopper.abort();
}

// Showing

function redraw() {
  $("welcome").hidden = turns.length > 0;
  $("log").replaceChildren(...turns.map(drawTurn));
  $("export").disabled = $("new").disabled = !turns.length;
  toEnd();
}

function working(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("log").classList.toggle("busy", busy);
  $("export").disabled = $("new").disabled = busy;
}

const nearEnd = () => $("scroller").scrollHeight - $("scroller").scrollTop - $("scroller").clientHeight < 80;
const toEnd = () => { $("scroller").scrollTop = $("scroller").scrollHeight; };

function troubled(error, retry) {
  if (!(error instanceof Trouble)) throw error;
  if (error.status === 503) { // the model is still being loaded
    $("about").textContent = error.message;
    setTimeout(retry, LOADING_MS);
    return;
  }
  if (error.status === 401) wantKey();
  const button = element("button", { type: "button", class: "quiet" }, "Try again");
  button.addEventListener("click", retry);
  $("greeting").textContent = "Not connected";
  showTrouble($("notice"), error, button);
}

function wantKey() {
  for (const id of ["key", "key-label", "key-note"]) $(id).hidden = false;
  showPanel(true);
  $("key").focus();
}

function showPanel(open) {
  $("panel").hidden = !open;
  $("toggle-panel").setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("with-panel", open);
}

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

// Editing, copying, exporting

function edit() {
  if (stopper || draft !== null || !turns.length) return;
  draft = $("question").value;
  $("editing").hidden = false;
  setQuestion(turns[turns.length - 1].text);
}

function endEdit(text) {
  draft = null;
  $("editing").hidden = true;
  setQuestion(text);
}

function setQuestion(text) {
  $("question").value = text;
  grow();
  $("question").focus();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    announcer.say("Copied");
  } catch {
    button.textContent = "Select and copy by hand";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function startNew() {
  turns = [];
  keep(sessionStorage, "qdist.turns", "[]");
  redraw();
  endEdit("");
}

function exportConversation() {
  const text = jsonlOf(turns, $("model").value, $("system").value);
  if (!text) {
    showTrouble($("notice"), { message: "Nothing was answered yet.", remedy: "Export once there is an answer." });
    return;
  }
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  element("a", { href: address, download: "conversation.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
  announcer.say("Exported as conversation.jsonl");
}

function act(event) {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.copy) copy(button.closest("figure").querySelector("code").textContent, button);
  else if (button.dataset.act === "edit") edit();
  else if (button.dataset.act === "again") again();
  else if (button.dataset.act === "copy") {
    const turn = turns[[...$("log").children].indexOf(button.closest(".turn"))];
    copy(turn.answers[button.closest(".answer").dataset.answer].text, button);
  }
}

// Keys and settings

function typed(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
}

function pressed(event) {
  if (event.altKey && event.key === "ArrowUp") { event.preventDefault(); edit(); }
  if (event.key !== "Escape") return;
  if (stopper) stop();
  else if (draft !== null) endEdit(draft);
  else if (!$("panel").hidden && !WIDE.matches) { showPanel(false); $("toggle-panel").focus(); }
}

function keepSettings() {
  const given = Object.fromEntries(new FormData($("settings")));
  keep(localStorage, "qdist.settings", JSON.stringify(given));
  if (given.theme) document.documentElement.dataset.theme = given.theme;
  else delete document.documentElement.dataset.theme;
}

function restoreSettings() {
  let given = {};
  try { given = JSON.parse(kept(localStorage, "qdist.settings") || "{}"); } catch { /* of another page: the defaults */ }
  for (const [name, value] of Object.entries(given)) if ($("settings").elements[name]) $("settings").elements[name].value = value;
}

function start() {
  restoreSettings();
  showPanel(WIDE.matches);
  redraw();
  $("composer").addEventListener("submit", submit);
  $("question").addEventListener("keydown", typed);
  $("question").addEventListener("input", grow);
  document.addEventListener("keydown", pressed);
  WIDE.addEventListener("change", () => showPanel(WIDE.matches));
  $("log").addEventListener("click", act);
  $("questions").addEventListener("click", (event) => { if (event.target.closest("button")) setQuestion(event.target.textContent); });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", startNew);
  $("export").addEventListener("click", exportConversation);
  $("cancel-edit").addEventListener("click", () => endEdit(draft));
  $("toggle-panel").addEventListener("click", () => { showPanel($("panel").hidden); if (!$("panel").hidden) $("close-panel").focus(); });
  $("close-panel").addEventListener("click", () => { showPanel(false); $("toggle-panel").focus(); });
  $("settings").addEventListener("input", keepSettings);
  $("settings").addEventListener("reset", () => setTimeout(keepSettings));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("key").addEventListener("change", connect);
  $("model").addEventListener("change", () => { keep(sessionStorage, "qdist.model", $("model").value); showBeside(); });
  $("beside").addEventListener("change", () => keep(sessionStorage, "qdist.beside", $("beside").checked ? "yes" : ""));
  $("question").focus();
  connect();
}

start();
