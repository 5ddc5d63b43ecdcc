// Tenants: what each has, what it used today, and what it may.

import { API, get } from "../api.js";
import { card, fill, h, soon, table } from "../dom.js";
import { bytes, count } from "../format.js";

const KINDS = ["train", "forward", "prefill", "sample"];

export async function show(main) {
  const list = h("div", {});
  const quotas = h("div", {});
  const today = h("p.note", {});
  fill(main, card("Used today", list, today), card("Limits", quotas, h("p.note", {}, "Bold limits are the tenant's own; the others are the server's.")));

  async function refresh() {
    const told = await get(`${API}/tenants`);
    fill(list, table([
      { name: "tenant", of: (one) => one.name },
      ...KINDS.map((kind) => ({ name: `${kind} tokens`, number: true, of: (one) => count(one.tokens[kind] ?? 0) })),
      { name: "samples now", number: true, of: (one) => count(one.samples) },
      { name: "runs", number: true, of: (one) => count(one.runs) },
      { name: "checkpoints", number: true, of: (one) => count(one.checkpoints) },
      { name: "storage", number: true, of: (one) => bytes(one.storage_bytes) },
      { name: "open keys", number: true, of: (one) => count(one.keys) },
    ], told.tenants, { empty: "No tenants." }));
    today.textContent = `Tokens since ${told.day}, 00:00 UTC. They are written down every few seconds.`;
    const limit = (name, format) => (one) => {
      const value = one.limits[name];
      const text = value === undefined || value === 0 ? "no limit" : format(value);
      return one.own_limits.includes(name) ? h("strong", {}, text) : text;
    };
    fill(quotas, table([
      { name: "tenant", of: (one) => one.name },
      { name: "tokens per minute", number: true, of: limit("tokens_per_minute", count) },
      { name: "samples at once", number: true, of: limit("concurrent_samples", count) },
      { name: "rank", number: true, of: limit("max_rank", count) },
      { name: "storage", number: true, of: limit("storage_bytes", bytes) },
      { name: "runs in memory", number: true, of: limit("resident_adapters", count) },
    ], told.tenants, { empty: "No tenants." }));
  }
  await refresh();
  const soonRefresh = soon(() => refresh().catch(() => {}), 5000);
  return { heard: (kind) => { if (["reload", "runs", "checkpoints", "stats"].includes(kind)) soonRefresh(); } };
}
