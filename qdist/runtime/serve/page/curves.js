// Draws a run's curves as small SVG charts; the pointer reads the values of a step.

import { element } from "./markdown.js";

const WIDTH = 296, HEIGHT = 108, LEFT = 44, BOTTOM = 18, TOP = 6;

/** A figure with one chart: {title, series: [{name, style, x, y}]}; a y that is null is a gap. */
export function drawChart(chart) {
  const series = chart.series.filter((each) => each.x.length), range = rangeOf(series, chart.key === "speed");
  const readout = element("span", { class: "readout" }), caption = element("figcaption", {}, element("b", {}, chart.title), readout);
  const figure = element("figure", { "data-chart": chart.key }, caption);
  if (!range) return figure;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spoken(chart.title, series) });
  picture.append(...axes(range), ...series.map((each, at) => curve(each, at, range)));
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  picture.append(cursor);
  readOnHover(picture, cursor, readout, series, range);
  figure.append(picture);
  if (series.length > 1) figure.append(key(series));
  return figure;
}

/** Headers and rows of texts as a table. */
export function drawFigures({ headers, rows }) {
  const row = (cells, name) => element("tr", {}, ...cells.map((cell) => element(name, {}, cell)));
  return element("table", {}, element("thead", {}, row(headers, "th")), element("tbody", {}, ...rows.map((cells) => row(cells, "td"))));
}

function svg(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** fromZero: a curve of which the wobble matters less than the height. */
function rangeOf(series, fromZero) {
  const ys = series.flatMap((each) => each.y).filter(Number.isFinite), xs = series.flatMap((each) => each.x);
  if (!ys.length) return null;
  const least = (numbers) => numbers.reduce((a, b) => Math.min(a, b)), most = (numbers) => numbers.reduce((a, b) => Math.max(a, b));
  const [low, high, first, last] = [least(ys), most(ys), least(xs), most(xs)];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return { low: fromZero ? 0 : low - margin, high: high + margin, first, last, least: fromZero ? 0 : low, most: high };
}

const across = (x, { first, last }) => LEFT + ((x - first) / (last - first || 1)) * (WIDTH - LEFT - 4);
const down = (y, { low, high }) => TOP + ((high - y) / (high - low)) * (HEIGHT - BOTTOM - TOP);

function axes(range) {
  const values = range.most > range.least ? [range.most, range.least] : [range.most], lines = [];
  for (const value of values) {
    const y = down(value, range).toFixed(1);
    lines.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - 4, y1: y, y2: y }));
    lines.push(svg("text", { x: LEFT - 5, y, "text-anchor": "end", "dominant-baseline": "middle" }, short(value)));
  }
  lines.push(svg("text", { x: LEFT, y: HEIGHT - 4 }, short(range.first)));
  if (range.last > range.first) lines.push(svg("text", { x: WIDTH - 4, y: HEIGHT - 4, "text-anchor": "end" }, `step ${short(range.last)}`));
  return lines;
}

function curve({ style, x, y }, at, range) {
  const place = (index) => `${across(x[index], range).toFixed(1)} ${down(y[index], range).toFixed(1)}`;
  const shown = [...x.keys()].filter((index) => Number.isFinite(y[index]));
  const dots = style === "points" || shown.length === 1;
  const path = dots
    ? shown.map((index) => `M${place(index)}h0`)
    : shown.map((index) => `${index && Number.isFinite(y[index - 1]) ? "L" : "M"}${place(index)}`);
  return svg("path", { class: `curve c${at} ${dots ? "dots" : style}`, d: path.join("") });
}

function readOnHover(picture, cursor, readout, series, range) {
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * WIDTH;
    const wanted = range.first + ((x - LEFT) / (WIDTH - LEFT - 4)) * (range.last - range.first);
    const step = nearest(series[0].x, wanted), place = across(step, range);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    readout.textContent = [`step ${step}`, ...series.map((each) => valueAt(each, step)).filter(Boolean)].join(" \u00b7 ");
  });
  picture.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "";
  });
}

function nearest(steps, wanted) {
  return steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best));
}

function valueAt({ style, x, y }, step) {
  const at = x.indexOf(step);
  if (at < 0 || !Number.isFinite(y[at])) return "";
  return `${style === "points" ? "held-out " : ""}${short(y[at])}`;
}

function key(series) {
  return element("p", { class: "key" }, ...series.map((each, at) => element("span", {}, element("i", { class: `c${at}` }), each.name)));
}

function spoken(title, series) {
  const ends = series.map(({ name, x, y }) => `${name} ${short(y[0])} at step ${x[0]}, ${short(y[y.length - 1])} at step ${x[x.length - 1]}`);
  return `${title}: ${ends.join("; ")}`;
}

function short(value) {
  if (!Number.isFinite(value)) return "not a number";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  if (size && size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}
