// The curve of a job, live, and the frontier of a sweep. Both are drawn from the table beside them, which has the same figures for
// those who do not see a picture.
"use strict";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLOURS = ["--accent", "--warn", "--third", "--quiet", "--ink"];
const LEGEND = {
  live: false,
  markers: {
    width: 2,
    stroke: (plot, number) => plot.series[number].stroke(plot, number),
    fill: (plot, number) => plot.series[number].points.fill(plot, number),
  },
};
const HEIGHT = 250;
const short = (number) => Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(number);

function axes(xName, y = {}) {
  const look = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  return [
    { ...look, label: xName, labelSize: 22, size: 34, grid: { show: false }, values: (_, ticks) => ticks.map(short) },
    { ...look, size: 52, ...y },
  ];
}

/** A chart that is drawn anew when the room or the colours change. `make(width)` gives uPlot's options, `data()` what they show. */
function chart(place, make, data) {
  let plot = null;
  const draw = () => {
    const width = place.clientWidth;
    plot?.destroy();
    plot = width > 0 ? new uPlot({ width, height: HEIGHT, ...make() }, data(), place) : null;
  };
  new ResizeObserver(() => {
    if (!plot) draw();
    else if (plot.width !== place.clientWidth) plot.setSize({ width: place.clientWidth, height: HEIGHT });
  }).observe(place);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
  return { draw, update: () => (plot ? plot.setData(data()) : draw()) };
}

function curve(section) {
  const body = section.querySelector("tbody");
  const number = (text) => (text === "" ? null : +text);
  const rows = [...body.rows].map(({ dataset }) => ({
    phase: dataset.phase,
    tokens: +dataset.tokens,
    loss: number(dataset.loss),
    validation: number(dataset.validation),
  }));
  // At least a twenty-fifth of the value, so that a change which is next to nothing does not fill the picture.
  const range = (_, low, high) => {
    const beyond = Math.max(0.05 * (high - low), (0.04 * Math.abs(high) - (high - low)) / 2) || 1;
    return [low - beyond, high + beyond];
  };
  // What is trained and what is measured are two things, each with a scale of its own.
  const draw = (place) => {
    const series = place.dataset.series;
    const data = () => {
      const before = Math.max(0, ...rows.filter((row) => row.phase === "sparsify").map((row) => row.tokens));
      const at = (row) => row.tokens + (row.phase === "recover" ? before : 0);
      const known = rows.filter((row) => row[series] !== null);
      return [known.map(at), known.map((row) => row[series])];
    };
    const make = () => ({
      scales: { x: { time: false, range: (_, low, high) => [0, high || 1] }, y: { range } },
      legend: { show: false },
      cursor: { y: false },
      axes: axes("tokens trained on"),
      series: [{}, { stroke: colour(place.dataset.colour), width: 2, points: { show: series === "validation", size: 6 } }],
    });
    return chart(place, make, data);
  };
  const shown = [...section.querySelectorAll(".chart")].map(draw);
  return {
    add(phase, { tokens, loss = null, validation = null }) {
      // A job that goes on from a checkpoint tells again what it had told.
      const last = rows.findLastIndex((row) => row.phase !== phase || row.tokens < tokens);
      const again = rows.splice(last + 1).length;
      for (let number = 0; number < again; number++) body.lastElementChild.remove();
      rows.push({ phase, tokens, loss, validation });
      const row = body.insertRow();
      for (const text of [phase, tokens.toLocaleString("en"), loss?.toFixed(3) ?? "–", validation?.toFixed(3) ?? "–"]) {
        row.insertCell().textContent = text;
      }
      section.hidden = false;
      for (const one of shown) one.update();
    },
  };
}

function follow(section) {
  const losses = curve(section);
  if (!section.dataset.events) return;
  const began = {};
  const source = new EventSource(section.dataset.events);
  const changed = () => document.getElementById("live").dispatchEvent(new Event("changed"));
  for (const kind of ["state", "started", "finished", "notice", "failed"]) {
    source.addEventListener(kind, (message) => {
      const event = JSON.parse(message.data);
      if (kind === "started") began[event.phase] = Date.parse(event.time);
      changed();
    });
  }
  source.addEventListener("progress", (message) => {
    const { phase, time, data, message: more } = JSON.parse(message.data);
    const measured = Number.isFinite(data.loss) || Number.isFinite(data.validation);
    if (measured && Number.isFinite(data.tokens) && ["sparsify", "recover"].includes(phase)) {
      losses.add(phase, data);
    }
    const place = document.getElementById("progress");
    if (!place || !(data.total > 0)) return;
    place.hidden = false;
    const bar = place.querySelector("progress");
    bar.max = data.total;
    bar.value = data.done;
    const figure = `${data.done.toLocaleString("en")} of ${data.total.toLocaleString("en")}`;
    place.querySelector(".figure").textContent = more ? `${figure}, ${more}` : figure;
    // What began before this page was opened, the server has told.
    const since = began[phase] ?? (place.dataset.phase === phase ? Date.parse(place.dataset.began) : NaN);
    const seconds = ((Date.parse(time) - since) / 1000) * (data.total / data.done - 1);
    place.querySelector(".left").textContent = seconds > 0 && data.done > 0 ? `about ${spell(seconds)} left of this phase` : "";
  });
  source.addEventListener("end", () => {
    source.close();
    changed();
  });
}

function spell(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function frontier(section) {
  const measure = document.getElementById("measure");
  const read = () =>
    [...document.querySelectorAll("#points tr[data-method]")]
      .map(({ dataset, id }) => {
        const series = "beaten" in dataset ? `${dataset.method}, beaten` : dataset.method;
        return { id, method: dataset.method, series, x: +dataset.parameters, y: +dataset[measure.value] };
      })
      .sort((a, b) => a.x - b.x);
  let points = read();
  const methods = () => [...new Set(points.map((point) => point.method))].sort();
  const series = () => [...new Set(points.map((point) => point.series))].sort();
  const base = () => ({ x: +section.dataset.baseParameters, y: measure.value === "loss" ? +section.dataset.baseLoss : 1 });
  // uPlot's series share their xs: of each mark only its own series has a y.
  const data = () => {
    const marks = [...points, { ...base(), series: null }];
    return [marks.map((p) => p.x), ...[...series(), null].map((name) => marks.map((p) => (p.series === name ? p.y : null)))];
  };
  const mark = (label, stroke, size, fill = stroke) => ({ label, stroke, paths: () => null, points: { show: true, size, fill, width: 2 } });
  // A colour for each method; what is on the frontier is full, and what another run beats is hollow.
  const marks = () =>
    series().map((name) => {
      const { method } = points.find((point) => point.series === name);
      const own = colour(COLOURS[methods().indexOf(method) % COLOURS.length]);
      return mark(name, own, 11, name === method ? own : colour("--page"));
    });
  // By ratios where methods are far apart, as the frontier's own page has it, so that those near the base are told from each other.
  const far = () => {
    const losses = points.map((point) => point.y);
    return measure.value === "loss" && Math.max(...losses) >= 1.8 * Math.min(...losses);
  };
  // As many as tell the ticks apart; by ratios they are far apart as they are.
  const digits = (tick, step) => (far() ? +tick.toPrecision(3) : tick.toFixed(`${+step.toPrecision(3)}`.split(".")[1]?.length ?? 0));
  const beyond = (low, high) => 0.1 * (high - low || 1);
  const make = () => ({
    scales: {
      x: { time: false, range: (_, low, high) => [Math.max(0, low - 0.06 * high), 1.06 * high] },
      y: far()
        ? { distr: 3, range: (_, low, high) => [low / 1.1, high * 1.1] }
        : { range: (_, low, high) => [low - beyond(low, high), high + beyond(low, high)] },
    },
    legend: LEGEND,
    cursor: { drag: { x: false, y: false } },
    axes: axes("parameters", { filter: (_, ticks) => ticks, values: (_, ticks, axis, space, step) => ticks.map((tick) => digits(tick, step)) }),
    series: [{}, ...marks(), mark("the base", colour("--soft"), 7)],
    hooks: {
      ready: [
        (plot) =>
          plot.over.addEventListener("click", ({ offsetX, offsetY }) => {
            const away = (p) => Math.hypot(plot.valToPos(p.x, "x") - offsetX, plot.valToPos(p.y, "y") - offsetY);
            const nearest = points.reduce((a, b) => (away(b) < away(a) ? b : a), points[0]);
            if (nearest && away(nearest) < 24) location.assign(`/ui/jobs/${nearest.id}`);
          }),
      ],
    },
  });
  const shown = chart(section.querySelector(".chart"), make, data);
  const again = () => {
    points = read();
    shown.draw();
  };
  measure.addEventListener("change", again);
  let last = JSON.stringify(points);
  document.addEventListener("htmx:after:swap", () => {
    if (JSON.stringify(read()) !== last) again();
    last = JSON.stringify(points);
  });
}

const losses = document.getElementById("loss");
if (losses) follow(losses);
const points = document.getElementById("frontier");
if (points) frontier(points);
