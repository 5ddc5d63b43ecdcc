// One run: its curves, and what it is.

import { API, get } from "../api.js";
import { colour, lines } from "../charts.js";
import { card, fill, h, soon } from "../dom.js";
import { ago, count, loss, methodName, moment, runName } from "../format.js";
import { extend } from "./runs.js";

export async function show(main, { at }) {
  const path = `${API}/runs/${encodeURIComponent(at.rest)}`;
  let run = await get(path);
  const big = lines({ x: "step", height: 320, format: loss });
  const norm = lines({ x: "step", height: 190, format: loss, floor: true });
  const rate = lines({ x: "step", height: 190, format: (v) => String(Number(v.toPrecision(3))), floor: true });
  const facts = h("div", {});
  const title = h("h1.heading", {});
  fill(main,
    h("p.crumb", {}, h("a", { href: "#/runs" }, "Runs"), " / ", runName(run)),
    title,
    card("Loss of one token", big.box),
    h("div.two", {}, card("Gradient norm, before clipping", norm.box), card("Learning rate", rate.box)),
    card("About", facts));

  function draw() {
    const curve = run.curve;
    fill(title, runName(run), " ", h(`span.state.${run.state}`, {}, run.state));
    big.show([{ name: "loss per token", colour: colour(0), x: curve.step, y: curve.loss }]);
    norm.show([{ name: "gradient norm", colour: colour(1), x: curve.step, y: curve.grad_norm }]);
    rate.show([{ name: "learning rate", colour: colour(2), x: curve.step, y: curve.lr }]);
    const rows = [
      ["id", h("code", {}, run.id)],
      ["tenant", run.tenant],
      ["model", run.base_model],
      ["method", methodName(run)],
      ["settings", h("code", {}, text(run.config))],
      ["targets", h("code", {}, text(run.targets))],
      ["trained parameters", count(run.parameters)],
      ["steps", count(run.last?.step ?? 0)],
      ["last loss", loss(run.last?.loss)],
      ["tokens", count(run.last?.tokens ?? 0)],
      ["unfinished requests", count(run.pending)],
      ["begun", moment(run.created)],
      ["last request", ago(run.last_request)],
      ["damage", run.corruption],
      ["notes of its owner", run.user_metadata ? h("code", {}, text(run.user_metadata)) : null],
      ["curve", run.stride > 1 ? `every ${run.stride}th step` : null],
    ];
    fill(facts, h("dl.facts", {}, rows.filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
  }
  const redraw = soon(draw);
  const refresh = soon(async () => {
    run = await get(path);
    draw();
  }, 300);

  function heard(kind, data) {
    if (kind === "point" && data.run === run.id) {
      extend(run.curve, data);
      Object.assign(run, { last: data, state: "working", last_request: data.at });
      redraw();
    } else if (["reload", "runs", "engine"].includes(kind) || (kind === "stats" && !data.values.queue_depth && run.state === "working")) refresh();
  }
  draw();
  return { heard, end: () => [big, norm, rate].forEach((chart) => chart.end()) };
}

function text(value) {
  const told = Object.entries(value ?? {}).filter(([, inner]) => inner !== null && !(typeof inner === "object" && !Object.keys(inner).length));
  return told.map(([key, inner]) => `${key}=${typeof inner === "string" ? inner : JSON.stringify(inner)}`).join("   ") || "–";
}
