// What the engines do, and what waits for them.

import { API, get } from "../api.js";
import { colour, lines } from "../charts.js";
import { card, fill, h, soon, table } from "../dom.js";
import { ago, bytes, count, percent, shortId } from "../format.js";

const KEPT = 600;
const whole = (v) => (Number.isInteger(v) ? count(v) : "");

export async function show(main) {
  let told = await get(`${API}/overview`);
  const tiles = h("div.tiles", {});
  const queue = h("div", {});
  const engines = new Map();
  const boxes = h("div", {});
  fill(main, tiles, card("Waiting runs", queue), boxes);

  function build() {
    for (const { charts } of engines.values()) charts.forEach(([chart]) => chart.end());
    engines.clear();
    fill(boxes, told.engines.map((engine) => {
      const charts = [
        [lines({ time: true, height: 180, format: count, ticks: whole, floor: true }), "Waiting in the engine", [["queue_depth", "training requests"], ["sampler_waiting", "requests for samples"]]],
        [lines({ time: true, height: 180, format: percent, ticks: percent, floor: true }), "Batch occupancy", [["batch_occupancy", "of the token budget"]]],
        [lines({ time: true, height: 180, format: count, ticks: whole, floor: true }), "Residency", [["resident_runs", "runs in memory"], ["spilled_runs", "spilled runs"], ["sampler_adapters", "adapters for sampling"]]],
        [lines({ time: true, height: 180, format: count, ticks: whole, floor: true }), "Sampling", [["sampler_live", "samples being drawn"]]],
      ];
      const facts = h("p.note", {});
      engines.set(engine.model, { engine, charts, facts });
      return card(null,
        h("div.heading", {}, h("h2", {}, engine.model), h("span", { className: `state ${engine.ready ? "working" : "corrupted"}` }, engine.ready ? "ready" : "not ready")),
        facts,
        h("div.two", {}, charts.map(([chart, title]) => h("div", {}, h("h3", {}, title), chart.box))));
    }));
  }

  function draw() {
    const last = told.engines.map((engine) => engine.reports.at(-1) ?? {});
    const sum = (name) => last.reduce((total, report) => total + (report[name] ?? 0), 0);
    fill(tiles, [
      ["unfinished requests", count(told.queue.open)],
      ["tokens waiting", count(sum("queue_tokens"))],
      ["runs in memory", count(sum("resident_runs")), `${count(sum("spilled_runs"))} spilled`],
      ["journal", bytes(told.journal.bytes), `${count(told.journal.entries)} requests`],
      ["engine restarts", count(told.engines.reduce((total, engine) => total + engine.restarts, 0))],
      ["server", told.draining ? "stopping" : "up", `since ${ago(told.started)} · ${told.version}`],
    ].map(([name, value, more]) => h("div.tile", {}, h("span", {}, name), h("strong", {}, value), h("small", {}, more ?? ""))));
    fill(queue, table([
      { name: "run", of: (one) => h("a", { href: `#/runs/${encodeURIComponent(one.run)}` }, shortId(one.run)) },
      { name: "tenant", of: (one) => one.tenant },
      { name: "model", of: (one) => one.model },
      { name: "requests", number: true, of: (one) => count(one.pending) },
      { name: "state", of: (one) => one.state.replaceAll("_", " ") },
      { name: "why its last one waits", of: (one) => one.reason },
    ], told.queue.runs, { empty: "Nothing waits." }));
    for (const { engine, charts, facts } of engines.values()) {
      const info = engine.info;
      facts.textContent = [info.family, info.parameters && `${count(info.parameters)} parameters`, info.layers && `${info.layers} layers`,
        info.context && `context ${count(info.context)}`, info.dtype, engine.restarts ? `started again ${engine.restarts}×` : null].filter(Boolean).join(" · ");
      const at = engine.reports.map((report) => report.at);
      for (const [chart, , series] of charts) {
        chart.show(series.map(([name, label], i) => ({ name: label, colour: colour(i), x: at, y: engine.reports.map((report) => report[name] ?? 0) })));
      }
    }
  }
  const redraw = soon(draw);
  const refresh = soon(async () => {
    told = await get(`${API}/overview`);
    build();
    draw();
  }, 200);
  const look = soon(async () => {
    const now = await get(`${API}/overview`);
    Object.assign(told, { queue: now.queue, journal: now.journal });
    redraw();
  }, 1000);

  function heard(kind, data) {
    if (kind === "reload" || kind === "engine") refresh();
    else if (kind === "stats") {
      const engine = told.engines.find((one) => one.model === data.model);
      if (!engine) return refresh();
      engine.reports.push(data.values);
      engine.reports.splice(0, engine.reports.length - KEPT);
      redraw();
      look();
    }
  }
  build();
  draw();
  return { heard, end: () => { for (const { charts } of engines.values()) charts.forEach(([chart]) => chart.end()); } };
}
