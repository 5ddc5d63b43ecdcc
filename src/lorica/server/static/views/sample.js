// One prompt, side by side from the base and up to three adapters. The form stands in the address, and a seed with it,
// so a reload draws the same text again.

import { get, stream } from "../api.js";
import { fill, h } from "../dom.js";
import { shortId } from "../format.js";

const SLOTS = ["a", "b", "c"];
const DEFAULTS = { prompt: "", as: "chat", tokens: "64", temperature: "0.7", seed: "1" };

export async function show(main, { at, remember }) {
  const models = (await get("/v1/models")).data;
  const bases = models.filter((model) => !model.parent);
  const value = (name) => at.query.get(name) ?? DEFAULTS[name] ?? "";
  const field = (name, element) => Object.assign(element, { id: `field-${name}`, name });
  const number = (name, more) => field(name, h("input", { type: "number", value: value(name), ...more }));

  const prompt = field("prompt", h("textarea", { rows: 3, value: value("prompt"), placeholder: "What is the capital of France?" }));
  const as = field("as", h("select", {}, [["chat", "a question to the assistant"], ["text", "text to go on from"]].map(([id, text]) => h("option", { value: id, selected: id === value("as") }, text))));
  const base = field("base", h("select", {}, bases.map((model) => h("option", { value: model.id, selected: model.id === value("base") }, model.id))));
  const tokens = number("tokens", { min: 1, max: 4096 });
  const temperature = number("temperature", { min: 0, max: 4, step: 0.1 });
  const seed = number("seed", { min: 0, step: 1 });
  const picks = SLOTS.map((slot) => field(slot, h("select", { "aria-label": `Adapter ${slot}` })));
  const columns = h("div.columns", {});
  const button = h("button.primary", { type: "submit" }, "Sample");
  let running = null;

  function offer() {
    const own = models.filter((model) => model.parent === base.value && model.id.startsWith("tinker://"));
    picks.forEach((pick, i) => {
      const wanted = pick.value || value(SLOTS[i]);
      fill(pick, h("option", { value: "" }, own.length ? "no adapter" : "no adapter was saved for this base"),
        own.map((model) => h("option", { value: model.id, selected: model.id === wanted }, label(model.id))));
    });
  }
  base.addEventListener("change", () => { offer(); lay(); });
  picks.forEach((pick) => pick.addEventListener("change", () => lay()));

  const chosen = () => [base.value, ...picks.map((pick) => pick.value).filter(Boolean)];
  function lay() {
    const made = chosen().map((model, i) => ({ model, text: h("div.text", {}), note: h("p.note", {}, ""), first: i === 0 }));
    fill(columns, made.map((one) => h("section.card.column", { "data-model": one.model },
      h("h3", { title: one.model }, one.first ? one.model : nameOf(one.model), h("small", {}, one.first ? "base" : `run ${shortId(runOf(one.model))}`)), one.text, one.note)));
    return made;
  }

  async function draw(event) {
    event?.preventDefault();
    running?.abort();
    const abort = (running = new AbortController());
    const query = new URLSearchParams({ base: base.value });
    SLOTS.forEach((slot, i) => { if (picks[i].value) query.set(slot, picks[i].value); });
    for (const element of [prompt, as, tokens, temperature, seed]) query.set(element.name, element.value);
    query.set("drawn", "1");
    remember(query);
    button.textContent = "Sample again";
    await Promise.all(lay().map((column) => one(column, abort.signal)));
  }

  async function one({ model, text, note }, signal) {
    const settings = { model, max_tokens: Number(tokens.value), temperature: Number(temperature.value), seed: Number(seed.value) };
    const [path, body] = as.value === "chat"
      ? ["/v1/chat/completions", { ...settings, messages: [{ role: "user", content: prompt.value }] }]
      : ["/v1/completions", { ...settings, prompt: prompt.value }];
    const begun = performance.now();
    text.classList.add("drawing");
    try {
      if (as.value === "text") text.append(h("span.given", {}, prompt.value));
      let length = 0;
      for await (const piece of stream(path, body, signal)) {
        text.append(piece);
        length += piece.length;
      }
      note.textContent = `${length} characters in ${((performance.now() - begun) / 1000).toFixed(2)} s`;
    } catch (error) {
      if (error.name === "AbortError") return;
      note.className = "note bad";
      note.textContent = error.message;
    } finally {
      text.classList.remove("drawing");
    }
  }

  const labelled = (text, element) => h("label", {}, h("span", {}, text), element);
  fill(main,
    h("form.card.sampling", { onsubmit: draw },
      labelled("Prompt", prompt),
      h("div.row", {}, labelled("Prompt is", as), labelled("Base", base), labelled("Most tokens", tokens), labelled("Temperature", temperature), labelled("Seed", seed)),
      h("div.row", {}, picks.map((pick, i) => labelled(`Adapter ${i + 1}`, pick)), button)),
    columns);
  offer();
  lay();
  if (value("drawn") && prompt.value) draw();
  return { end: () => running?.abort() };
}

const runOf = (path) => path.replace("tinker://", "").split("/")[0];
const nameOf = (path) => path.replace("tinker://", "").split("/").slice(2).join("/");
const label = (path) => `${nameOf(path)} (${shortId(runOf(path))})`;
