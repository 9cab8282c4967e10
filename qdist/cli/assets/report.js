"use strict";
(function () {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const figures = Array.from(document.querySelectorAll("figure[data-chart]"));
  const plots = new Map();
  const logarithmic = new Set();
  const sync = uPlot.sync("steps");
  const letters = ["a", "b"];

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function shown(value) {
    if (value === null || value === undefined) return "-";
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
    if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(3).replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(4)));
  }

  function curvesOf(key) {
    const found = [];
    runs.forEach((run, index) => {
      const chart = run.charts.find((one) => one.key === key);
      if (!chart) return;
      chart.series.forEach((series) => {
        const label = runs.length > 1 ? run.name + ": " + series.name : series.name;
        found.push({ series, label, letter: letters[index] });
      });
    });
    return found;
  }

  function lineOf(curve) {
    const style = curve.series.style;
    const stroke = colour(curve.letter + (style === "raw" ? "-raw" : style === "points" ? "-point" : ""));
    const line = { label: curve.label, stroke, width: style === "line" && (curve.series.name === "smoothed" || curve.series.x.length < 300) ? 1.75 : 1, spanGaps: false, value: (_, v) => shown(v) };
    line.points = { show: curve.series.x.length === 1 };
    if (style === "points") {
      line.width = 0;
      line.paths = () => null;
      line.points = { show: true, size: 8, fill: stroke, stroke };
    }
    return line;
  }

  // Checkpoints are ticks at the bottom, resumes dashed lines over the whole height.
  function drawMarks(plot) {
    const context = plot.ctx, { left, top, width, height } = plot.bbox, ratio = devicePixelRatio;
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    runs.forEach((run, index) => {
      context.strokeStyle = colour(runs.length > 1 ? letters[index] : "dim");
      context.lineWidth = ratio;
      context.setLineDash([]);
      context.beginPath();
      run.marks.checkpoints.forEach((step) => {
        const x = plot.valToPos(step, "x", true);
        context.moveTo(x, top + height);
        context.lineTo(x, top + height - 6 * ratio);
      });
      context.stroke();
      context.strokeStyle = runs.length > 1 ? colour(letters[index]) : colour("warn");
      context.setLineDash([4 * ratio, 4 * ratio]);
      context.beginPath();
      run.marks.resumes.forEach((step) => {
        const x = plot.valToPos(step, "x", true);
        context.moveTo(x, top);
        context.lineTo(x, top + height);
      });
      context.stroke();
    });
    context.restore();
  }

  function axis(size) {
    return {
      stroke: colour("dim"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1 },
      font: "12px system-ui, sans-serif", size,
      values: (_, splits) => splits.map((value) => (value === null ? "" : shown(value))),
    };
  }

  function positive(values) {
    return values.map((value) => (value > 0 ? value : null));
  }

  function draw(figure) {
    const key = figure.dataset.chart, place = figure.querySelector(".plot"), log = logarithmic.has(key);
    const old = plots.get(key), curves = curvesOf(key);
    const hidden = old ? old.series.map((one) => one.show === false) : [];
    const zoom = old ? [old.scales.x.min, old.scales.x.max] : null;
    if (old) { sync.unsub(old); old.destroy(); }
    const tables = curves.map((curve) => [curve.series.x, log ? positive(curve.series.y) : curve.series.y]);
    const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const series = curves.map(lineOf);
    series.forEach((line, index) => { if (hidden[index + 1]) line.show = false; });
    const plot = new uPlot({
      width: Math.max(120, place.clientWidth), height: key === "loss" ? 300 : 220,
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [axis(32), axis(62)],
      series: [{ label: "step", value: (_, value) => shown(value) }, ...series],
      cursor: { sync: { key: sync.key }, drag: { x: true, y: false }, focus: { prox: 24 } },
      legend: { markers: { width: 2 } },
      hooks: { draw: [drawMarks] },
    }, data, place);
    if (zoom && zoom[0] !== null && old) plot.setScale("x", { min: zoom[0], max: zoom[1] });
    plots.set(key, plot);
  }

  function addLogarithm(figure) {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.addEventListener("change", () => {
      if (box.checked) logarithmic.add(figure.dataset.chart); else logarithmic.delete(figure.dataset.chart);
      draw(figure);
    });
    label.append(box, " logarithmic");
    figure.querySelector("figcaption").append(label);
  }

  function fit() {
    figures.forEach((figure) => {
      const plot = plots.get(figure.dataset.chart), width = figure.querySelector(".plot").clientWidth;
      if (width > 0 && plot.width !== width) plot.setSize({ width, height: plot.height });
    });
  }

  figures.forEach(draw);
  figures.filter((figure) => figure.dataset.chart === "loss").forEach(addLogarithm);
  if (figures.length) new ResizeObserver(fit).observe(document.querySelector(".charts"));
  ["(prefers-color-scheme: dark)", "print"].forEach((query) => {
    matchMedia(query).addEventListener("change", () => figures.forEach(draw));
  });
  window.qdistPlots = plots;
})();
