// Checkpoints that were named, newest first.

import { API, get } from "../api.js";
import { card, fill, h, soon, table } from "../dom.js";
import { ago, bytes, moment, shortId } from "../format.js";

export async function show(main, { overview }) {
  const list = h("div", {});
  fill(main, card("Checkpoints", list));

  async function refresh() {
    const told = await get(`${API}/checkpoints?limit=200`);
    const total = told.cursor.total_count;
    fill(list, table([
      { name: "name", of: (one) => h("span", { title: one.tinker_path }, one.name) },
      { name: "kind", of: (one) => one.checkpoint_type },
      { name: "run", of: (one) => h("a", { href: `#/runs/${encodeURIComponent(one.run)}`, title: one.run }, shortId(one.run)) },
      ...(overview.operator ? [{ name: "tenant", of: (one) => one.tenant }] : []),
      { name: "model", of: (one) => one.base_model ?? "–" },
      { name: "method", of: (one) => one.method ?? "–" },
      { name: "size", number: true, of: (one) => bytes(one.size_bytes) },
      { name: "made", number: true, of: (one) => ago(Date.parse(one.time) / 1000) },
      { name: "goes", number: true, of: (one) => (one.expires_at ? moment(Date.parse(one.expires_at) / 1000) : "never") },
      { name: "", of: (one) => [
        one.public ? h("span.state", {}, "public") : null,
        one.checkpoint_type === "sampler" && one.tenant === overview.tenant
          ? h("a", { href: `#/sample?base=${encodeURIComponent(one.base_model ?? "")}&a=${encodeURIComponent(one.tinker_path)}` }, "sample") : null] },
    ], told.checkpoints, { empty: "No checkpoints yet." }),
    total > told.checkpoints.length ? h("p.note", {}, `The newest ${told.checkpoints.length} of ${total}.`) : null);
  }
  await refresh();
  const soonRefresh = soon(() => refresh().catch(() => {}), 300);
  return { heard: (kind) => { if (kind === "reload" || kind === "checkpoints") soonRefresh(); } };
}
