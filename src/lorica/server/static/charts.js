// Lines by uPlot, which is installed beside the server and may be absent; then a sentence stands where they would.

import { h } from "./dom.js";

let uPlot = null;
const alive = new Set();

export async function load(installed) {
  if (!installed || uPlot) return;
  try {
    uPlot = (await import("/static/uplot/uPlot.esm.js")).default;
    document.head.append(h("link", { rel: "stylesheet", href: "/static/uplot/uPlot.min.css" }));
  } catch {
    uPlot = null;
  }
}

export const COLOURS = 8;

export function colour(index) {
  return css(`--line-${index % COLOURS}`);
}

// A custom property as a colour that a canvas can read: `light-dark()` is resolved by an element that has it.
const probe = h("span", { hidden: true });
document.body.append(probe);
const resolved = new Map();

function css(name) {
  if (!resolved.has(name)) {
    probe.style.color = `var(${name})`;
    resolved.set(name, getComputedStyle(probe).color);
  }
  return resolved.get(name);
}

const clock = (t) => (t === null || t === undefined ? "–" : new Date(1000 * t).toLocaleTimeString("en-GB"));
const tick = (v) => (v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(0) : String(Number(v.toPrecision(4))));

function axis(label, format) {
  return {
    label,
    labelSize: label ? 20 : 0,
    gap: 6,
    labelFont: "12px system-ui, sans-serif",
    font: "12px system-ui, sans-serif",
    stroke: () => css("--faint"),
    grid: { stroke: () => css("--grid"), width: 1 },
    ticks: { show: false },
    ...(format ? { values: (_, ticks) => ticks.map(format) } : {}),
  };
}

// A chart of lines over one axis. `show(series)` draws [{name, colour, x, y, value?}]; it may be called at any time.
export function lines({ height = 260, x = "", y = "", time = false, format = (v) => v, ticks = tick, floor = false } = {}) {
  const box = h("div.chart", {});
  if (!uPlot) {
    box.append(h("p.sentence", {}, "Charts need uPlot, which is not installed here: run ", h("code", {}, "python -m lorica.server.assets"), " on the server and reload."));
    return { box, show: () => {}, end: () => {} };
  }
  let plot = null;
  let shape = "";
  const observer = new ResizeObserver(() => plot?.setSize({ width: box.clientWidth, height }));
  const shown = (v) => (v === null || v === undefined ? "–" : format(v));
  const options = (series) => ({
    width: box.clientWidth || 600,
    height,
    cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    legend: { live: true },
    scales: { x: { time }, y: { range: { min: { pad: 0.08, soft: 0, mode: floor ? 1 : 3 }, max: { pad: 0.08, ...(floor ? { soft: 1e-9, mode: 2 } : {}) } } } },
    axes: [{ ...axis(x, time ? clock : null), size: 28, ...(time ? { space: 90 } : {}) }, { ...axis(y, ticks), size: 50 }],
    series: [
      { label: x || "time", value: (_, v) => (time ? clock(v) : v ?? "–") },
      ...series.map((one) => ({
        label: one.name,
        stroke: one.colour,
        width: 1.75,
        spanGaps: false,
        points: { show: one.x.length < 2, size: 6, fill: one.colour },
        value: (_, v) => shown(v),
      })),
    ],
  });

  function show(series) {
    if (!box.isConnected) return;
    const wanted = JSON.stringify(series.map((one) => [one.name, one.colour, one.x.length < 2]));
    const data = series.length
      ? uPlot.join(series.map((one) => [one.x, one.y]), series.map(() => [2]))
      : [[]];
    if (plot && wanted === shape) {
      plot.setData(data);
      return;
    }
    plot?.destroy();
    shape = wanted;
    plot = new uPlot(options(series), data, box);
    observer.observe(box);
  }
  function end() {
    observer.disconnect();
    plot?.destroy();
    plot = null;
    shape = "";
    alive.delete(redraw);
  }
  const redraw = () => { shape = ""; };
  alive.add(redraw);
  return { box, show, end };
}

// The scheme changed: every chart takes its colours anew when it is shown next.
export function recolour() {
  resolved.clear();
  for (const redraw of alive) redraw();
}
