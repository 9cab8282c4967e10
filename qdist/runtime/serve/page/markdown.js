// Markdown as DOM nodes. A model's text becomes text nodes and elements made here, never HTML; links are http(s) only.

const DEEPEST = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const LINK = /!?\[([^[\]]*(?:\[[^[\]]*\][^[\]]*)*)\]\([ \t]*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:[ \t]+"[^"]*")?[ \t]*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*|]+/y;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** An element with children: nodes, or texts. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Show text in a place that may hold an earlier part of it: blocks that did not change stay, with what is selected. */
export function showMarkdown(place, text) {
  const blocks = blocksOf(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"));
  const sources = blocks.map(({ kind, lines }) => `${kind}\n${lines.join("\n")}`);
  const known = place.sources || [];
  let same = 0;
  while (same < sources.length && known[same] === sources[same]) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...blocks.slice(same).map((block) => drawBlock(block, 0)));
  place.sources = sources;
}

/** An address if it is one that may be opened, else null. */
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return address.protocol === "http:" || address.protocol === "https:" ? address.href : null;
  } catch {
    return null;
  }
}

function blocksOf(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) { at += 1; continue; }
    const kind = kindOf(lines, at), end = endOf(kind, lines, at);
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return blocks;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1])
    && cellsOf(line).length === cellsOf(lines[at + 1]).length) return "table";
  return "paragraph";
}

function endOf(kind, lines, at) {
  if (kind === "heading" || kind === "rule") return at + 1;
  if (kind === "fence") return endOfFence(lines, at);
  if (kind === "list") return endOfList(lines, at);
  let end = kind === "table" ? at + 2 : at + 1;
  const goesOn = {
    quote: (line) => QUOTE.test(line),
    table: (line) => line.includes("|"),
    paragraph: (line, place) => !interrupts(lines, place),
  }[kind];
  while (end < lines.length && lines[end].trim() && goesOn(lines[end], end)) end += 1;
  return end;
}

function interrupts(lines, at) {
  const kind = kindOf(lines, at);
  return kind !== "paragraph" && (kind !== "list" || /^ *(?:[-*+]|1[.)])[ \t]+\S/.test(lines[at]));
}

function endOfFence(lines, at) {
  const fence = FENCE.exec(lines[at])[1];
  for (let end = at + 1; end < lines.length; end += 1) {
    const closing = lines[end].trim();
    if (closing.length >= fence.length && closing === fence[0].repeat(closing.length)) return end + 1;
  }
  return lines.length;
}

function endOfList(lines, at) {
  const [, indent, marker] = ITEM.exec(lines[at]), ordered = /\d/.test(marker);
  let blank = false, end = at + 1, last = end;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (!line.trim()) { blank = true; continue; }
    const item = ITEM.exec(line), deeper = line.search(/\S/) > indent.length + 1;
    const next = item && !RULE.test(line) && /\d/.test(item[2]) === ordered;
    if (!(deeper || next || (!blank && !item && kindOf(lines, end) === "paragraph"))) break;
    blank = false;
    last = end + 1;
  }
  return last;
}

function drawBlock({ kind, lines }, depth) {
  const draw = { fence: drawFence, heading: drawHeading, rule: () => element("hr"), quote: drawQuote, list: drawList, table: drawTable };
  return (draw[kind] || ((all) => element("p", {}, ...inline(all.join("\n"), depth))))(lines, depth);
}

function drawInside(lines, depth) {
  if (depth >= DEEPEST) return [element("p", {}, lines.join("\n"))];
  return blocksOf(lines).map((block) => drawBlock(block, depth + 1));
}

function drawFence(lines) {
  const [, fence, info] = FENCE.exec(lines[0]), last = lines[lines.length - 1].trim();
  const closed = lines.length > 1 && last.length >= fence.length && last === fence[0].repeat(last.length);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n"), language = info.trim().split(/\s/)[0].slice(0, 24);
  const copy = element("button", { type: "button", class: "quiet copy", "data-copy": "code" }, "Copy");
  const code = element("pre", { tabindex: "0" }, element("code", {}, text));
  return element("figure", { class: "code" }, element("figcaption", {}, element("span", {}, language || "text"), copy), code);
}

function drawHeading(lines, depth) {
  const [, marks, text] = HEADING.exec(lines[0]);
  return element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text, depth));
}

function drawQuote(lines, depth) {
  return element("blockquote", {}, ...drawInside(lines.map((line) => line.replace(QUOTE, "")), depth));
}

function drawList(lines, depth) {
  const [, indent, first] = ITEM.exec(lines[0]), ordered = /\d/.test(first), items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) {
      items.push({ width: Math.min(item[0].length, item[1].length + item[2].length + 1), lines: [line.slice(item[0].length)] });
    } else {
      const own = items[items.length - 1];
      own.lines.push(line.slice(Math.min(own.width, Math.max(0, line.search(/\S|$/)))));
    }
  }
  const list = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(first, 10) !== 1) list.setAttribute("start", String(parseInt(first, 10)));
  list.append(...items.map((item) => drawItem(item.lines, depth)));
  return list;
}

function drawItem(lines, depth) {
  const inside = drawInside(lines, depth), only = inside[0];
  if (only && only.tagName === "P" && inside.slice(1).every((node) => node.tagName !== "P")) {
    inside.splice(0, 1, ...only.childNodes);
  }
  return element("li", {}, ...inside);
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (cells.length > 1 && !cells[cells.length - 1].trim()) cells.pop();
  return cells.map((cell) => cell.trim().replace(/\\\|/g, "|"));
}

function drawTable(lines, depth) {
  const sides = cellsOf(lines[1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "middle" : "right") : "left"));
  const row = (line, name) => {
    const cells = cellsOf(line);
    return element("tr", {}, ...sides.map((side, at) => element(name, { class: side }, ...inline(cells[at] || "", depth))));
  };
  const head = element("thead", {}, row(lines[0], "th")), body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, element("table", {}, head, body));
}

/** Nodes of a piece of text within a block. `missing` holds marks that are not closed further on: looked for once only. */
function inline(text, depth) {
  const nodes = [], missing = new Set();
  let plain = "";
  const flush = () => { if (plain) nodes.push(plain); plain = ""; };
  for (let at = 0; at < text.length;) {
    const found = depth < DEEPEST ? special(text, at, depth, missing) : null;
    if (found) {
      if (found.node === null) plain += found.text; else { flush(); nodes.push(found.node); }
      at = found.end;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return nodes;
}

function special(text, at, depth, missing) {
  const letter = text[at];
  if (letter === "\n") return { node: element("br"), end: at + 1 };
  if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] || "")) return { node: null, text: text[at + 1], end: at + 2 };
  if (letter === "`") return codeSpan(text, at, missing);
  if (letter === "[" || (letter === "!" && text[at + 1] === "[")) return link(text, at, depth);
  if (letter === "h" && !/\w/.test(text[at - 1] || "")) return bareLink(text, at);
  if (letter === "*" || letter === "_" || letter === "~") return emphasis(text, at, depth, missing);
  return null;
}

function codeSpan(text, at, missing) {
  const run = /`+/y;
  run.lastIndex = at;
  const ticks = run.exec(text)[0], start = at + ticks.length;
  for (let end = missing.has(ticks) ? -1 : text.indexOf(ticks, start); end >= 0;) {
    run.lastIndex = end;
    const length = run.exec(text)[0].length;
    if (length === ticks.length) {
      const content = text.slice(start, end), trimmed = content.trim() ? content.replace(/^ (.*) $/s, "$1") : content;
      return { node: element("code", {}, trimmed), end: end + length };
    }
    end = text.indexOf(ticks, end + length);
  }
  missing.add(ticks);
  return { node: null, text: ticks, end: start };
}

function link(text, at, depth) {
  LINK.lastIndex = at;
  const found = LINK.exec(text.length - at > 4000 ? text.slice(0, at + 4000) : text), address = found && safeAddress(found[2]);
  if (!found) return null;
  if (!address) return { node: null, text: found[0], end: at + found[0].length };
  return { node: anchor(address, inline(found[1] || found[2], depth + 1)), end: at + found[0].length };
}

function bareLink(text, at) {
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text);
  if (!found) return null;
  let shown = found[0].replace(/[.,;:!?\]}_]+$/, "");
  if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
  const address = safeAddress(shown);
  return address && { node: anchor(address, [shown]), end: at + shown.length };
}

function anchor(address, children) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function emphasis(text, at, depth, missing) {
  const [mark, name] = MARKS.find(([each]) => text.startsWith(each, at)) || [];
  if (!mark || missing.has(mark) || !/\S/.test(text[at + mark.length] || "")) return null;
  if (mark[0] === "_" && /\w/.test(text[at - 1] || "")) return null;
  const end = closing(text, at + mark.length, mark);
  if (end < 0) {
    missing.add(mark);
    return { node: null, text: mark, end: at + mark.length };
  }
  const inside = text.slice(at + mark.length, end);
  return { node: element(name, {}, ...inline(inside, depth + 1)), end: end + mark.length };
}

function closing(text, from, mark) {
  for (let at = from; at < text.length;) {
    if (text[at] === "\\") { at += 2; continue; }
    if (text[at] === "`") { at = Math.max(text.indexOf("`", at + 1), at) + 1; continue; }
    if (text[at] !== mark[0]) { at += 1; continue; }
    let end = at;
    while (text[end] === mark[0]) end += 1;
    const fits = end - at === mark.length || end - at === 3, ends = mark[0] !== "_" || !/\w/.test(text[end] || "");
    if (fits && ends && at > from && /\S/.test(text[at - 1])) return end - mark.length;
    at = end;
  }
  return -1;
}
