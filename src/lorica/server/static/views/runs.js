// All runs: their loss curves on one chart, and where each of them stands.

import { API, get } from "../api.js";
import { COLOURS, colour, lines } from "../charts.js";
import { card, fill, h, soon, table } from "../dom.js";
import { ago, count, loss, methodName, runName } from "../format.js";

const AT_FIRST = 4;

export async function show(main, { overview, at, remember }) {
  let runs = [];
  let total = 0;
  const curves = new Map();
  const chart = lines({ x: "step", height: 320, format: loss });
  const list = h("div", {});
  const note = h("p.note", {});
  fill(main, card("Loss of one token", chart.box, note), card("Runs", list));

  let picked = at.query.has("on") ? new Set(at.query.getAll("on")) : null;
  const on = () => picked ?? new Set(runs.filter((run) => run.last).slice(0, AT_FIRST).map((run) => run.id));
  const shade = (run) => colour(runs.indexOf(run) % COLOURS);

  function draw() {
    const drawn = runs.filter((run) => on().has(run.id) && curves.get(run.id)?.step.length);
    chart.show(drawn.map((run) => ({
      name: runName(run), colour: shade(run), x: curves.get(run.id).step, y: curves.get(run.id).loss,
    })));
    const thinned = drawn.filter((run) => curves.get(run.id).stride > 1);
    note.textContent = !drawn.length
      ? "No step yet: a curve begins with a run's first optim_step."
      : thinned.length ? `Thinned: ${thinned.map((run) => `${runName(run)} shows every ${curves.get(run.id).stride}th step`).join(", ")}.` : "";
    fill(list, table(columns(), runs, { empty: "No runs yet. The first client that trains will appear here.", row: (run) => ({ "data-run": run.id }) }),
      total > runs.length ? h("p.note", {}, `The newest ${runs.length} of ${total} runs.`) : null);
  }
  const redraw = soon(draw);

  function columns() {
    return [
      { name: "", class: "pick", of: (run) => h("input", {
        type: "checkbox", checked: on().has(run.id), style: `accent-color: ${shade(run)}`, "aria-label": `Draw ${runName(run)}`,
        onchange: (event) => pick(run, event.target.checked) }) },
      { name: "run", of: (run) => h("a", { href: `#/runs/${encodeURIComponent(run.id)}`, title: run.id }, runName(run)) },
      ...(overview.operator ? [{ name: "tenant", of: (run) => run.tenant }] : []),
      { name: "model", of: (run) => run.base_model },
      { name: "method", of: methodName },
      { name: "state", of: (run) => h(`span.state.${run.state}`, { title: run.corruption }, run.state) },
      { name: "steps", number: true, of: (run) => count(run.last?.step ?? 0) },
      { name: "loss", number: true, title: "of one token, in the last step", of: (run) => loss(run.last?.loss) },
      { name: "tokens", number: true, of: (run) => count(run.last?.tokens ?? 0) },
      { name: "last request", number: true, of: (run) => ago(run.last_request) },
    ];
  }

  async function pick(run, checked) {
    picked = new Set(on());
    if (checked) picked.add(run.id);
    else picked.delete(run.id);
    remember(new URLSearchParams([...(picked.size ? picked : [""])].map((id) => ["on", id])));
    await fetchCurves();
    draw();
  }

  async function fetchCurves() {
    const missing = runs.filter((run) => on().has(run.id) && !curves.has(run.id));
    await Promise.all(missing.map(async (run) => {
      const told = await get(`${API}/runs/${encodeURIComponent(run.id)}`);
      curves.set(run.id, { ...told.curve, stride: told.stride });
    }));
  }

  async function refresh() {
    const told = await get(`${API}/runs?limit=100`);
    runs = told.runs;
    total = told.cursor.total_count;
    await fetchCurves();
    draw();
  }
  const refreshSoon = soon(() => refresh().catch(() => {}), 300);

  function heard(kind, data) {
    if (kind === "reload") {
      curves.clear();
      refreshSoon();
    } else if (kind === "runs" || kind === "engine") refreshSoon();
    else if (kind === "stats" && !data.values.queue_depth && runs.some((run) => run.state === "working")) refreshSoon();
    else if (kind === "point") {
      const run = runs.find((one) => one.id === data.run);
      if (!run) return refreshSoon();
      Object.assign(run, { last: data, state: "working", last_request: data.at });
      extend(curves.get(data.run), data);
      if (on().has(data.run) && !curves.has(data.run)) refreshSoon();
      redraw();
    }
  }

  await refresh();
  const clock = setInterval(redraw, 10000); // "… ago" grows older by itself
  return { heard, end: () => { clearInterval(clock); chart.end(); } };
}

// One more step of a curve, once.
export function extend(curve, point) {
  if (!curve || (curve.step.length && curve.step.at(-1) >= point.step)) return;
  for (const name of ["step", "loss", "tokens", "grad_norm", "lr", "at"]) curve[name].push(point[name]);
}
