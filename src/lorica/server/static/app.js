// The page: which view is shown, and one stream of changes for all of them. Its only state is the key; everything else
// is asked from the server, and what is looked at stands in the address, so that a reload shows the same.

import { API, Refused, follow, get, key } from "./api.js";
import * as charts from "./charts.js";
import { fill, h } from "./dom.js";
import * as checkpoints from "./views/checkpoints.js";
import * as engine from "./views/engine.js";
import * as runs from "./views/runs.js";
import * as run from "./views/run.js";
import * as sample from "./views/sample.js";
import * as tenants from "./views/tenants.js";

const VIEWS = [
  ["runs", "Runs", runs],
  ["engine", "Queue & engine", engine],
  ["checkpoints", "Checkpoints", checkpoints],
  ["sample", "Sample", sample],
  ["tenants", "Tenants", tenants],
];
const main = document.getElementById("main");
const who = document.getElementById("who");
let current = null;
let overview = null;

// `#/runs/ID?on=a` → {view: "runs", rest: "ID", query}
function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, ...rest] = path.split("/");
  return { view: view || "runs", rest: decodeURIComponent(rest.join("/")), query: new URLSearchParams(query) };
}

function chosen({ view, rest }) {
  if (view === "runs" && rest) return run;
  return (VIEWS.find(([name]) => name === view) ?? VIEWS[0])[2];
}

// Change the address without a step in the history: what a control chose.
export function remember(query) {
  const path = location.hash.split("?")[0] || "#/runs";
  const text = query.toString();
  history.replaceState(null, "", text ? `${path}?${text}` : path);
}

async function show() {
  current?.end?.();
  const at = place();
  fill(document.getElementById("nav"), VIEWS.map(([name, title]) =>
    h("a", { href: `#/${name}`, "aria-current": name === at.view ? "page" : null }, title)));
  const view = chosen(at);
  const begun = { end: null };
  current = begun;
  fill(main);
  try {
    const made = await view.show(main, { overview, at, remember });
    if (current === begun) current = made;
    else made?.end?.();
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  if (error instanceof Refused && error.status === 401) return signIn(error.message);
  fill(main, h("p.sentence.bad", { role: "alert" }, error.message));
}

function signIn(message = "") {
  current?.end?.();
  current = null;
  fill(document.getElementById("nav"));
  fill(who);
  const input = h("input", { type: "password", placeholder: "tml-…", autocomplete: "off", required: true, id: "key", "aria-label": "API key" });
  const enter = (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    start();
  };
  fill(main, h("form.card.sign-in", { onsubmit: enter },
    h("h1", {}, "Lorica"),
    h("p", {}, "An API key opens this page. The server printed one at its first start; ", h("code", {}, "lorica keys create"), " makes another."),
    h("div.row", {}, input, h("button.primary", { type: "submit" }, "Open")),
    message ? h("p.bad", { role: "alert" }, message) : null));
  input.focus();
}

function signOut() {
  key.clear();
  location.reload();
}

function status(state) {
  if (state === "refused") return signIn("This API key is not valid any more.");
  const dot = document.getElementById("live");
  if (!dot) return;
  dot.className = `link ${state}`;
  dot.textContent = state === "live" ? "live" : "reconnecting";
}

async function start() {
  try {
    overview = await get(`${API}/overview`);
  } catch (error) {
    return failed(error);
  }
  await charts.load(overview.charts);
  fill(who,
    h("span.link", { id: "live" }, "connecting"),
    h("span.tenant", { title: overview.operator ? "An operator's key: it sees all tenants." : "This key sees its own tenant." },
      overview.tenant, overview.operator ? h("small", {}, "operator") : null),
    h("button.plain", { onclick: signOut }, "Sign out"));
  await show();
  follow((kind, data) => current?.heard?.(kind, data), status);
}

addEventListener("hashchange", () => { if (overview) show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.recolour();
  current?.heard?.("reload", {});
});
if (key.get()) start();
else signIn();
