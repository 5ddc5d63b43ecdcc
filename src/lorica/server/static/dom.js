// Elements from plain calls. Text is always text: nothing that a tenant wrote is ever read as HTML.

export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && key !== "list" && key !== "form") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

export function fill(element, ...children) {
  element.replaceChildren();
  add(element, children);
}

// A table: columns are {name, of, number?, title?, class?}; `of` gives text or an element.
export function table(columns, rows, { empty, row } = {}) {
  if (!rows.length) return h("p.sentence", {}, empty);
  const head = h("tr", {}, columns.map((c) => h("th", { className: c.number ? "number" : "", title: c.title }, c.name)));
  const body = rows.map((one) => {
    const cells = columns.map((c) => h("td", { className: [c.number ? "number" : "", c.class ?? ""].join(" ").trim() }, c.of(one)));
    return h("tr", row ? row(one) : {}, cells);
  });
  return h("div.scroll", {}, h("table", {}, h("thead", {}, head), h("tbody", {}, body)));
}

export function card(title, ...children) {
  return h("section.card", {}, title ? h("h2", {}, title) : null, children);
}

// Calls of one kind that come close together become one, in the next frame or after `wait` milliseconds.
export function soon(work, wait = 0) {
  let pending = false;
  return () => {
    if (pending) return;
    pending = true;
    const run = () => { pending = false; work(); };
    if (wait) setTimeout(run, wait);
    else requestAnimationFrame(run);
  };
}
