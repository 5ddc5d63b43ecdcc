// Numbers, times and names as people read them.

const whole = new Intl.NumberFormat("en");

export function count(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) < 10000) return whole.format(Math.round(value));
  const units = ["k", "M", "G", "T"];
  let unit = -1;
  while (Math.abs(value) >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value.toFixed(value < 100 ? 1 : 0)} ${units[unit]}`;
}

export function bytes(value) {
  if (value < 1024) return `${value} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let unit = -1;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(value < 10 ? 1 : 0)} ${units[unit]}`;
}

export function loss(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 10000)) return value.toExponential(2);
  return value.toFixed(size < 10 ? 4 : 2);
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(0)} %`;
}

export function ago(seconds) {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 5) return "now";
  if (past < 60) return `${Math.floor(past)} s ago`;
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return `${Math.floor(past / 86400)} d ago`;
}

export function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

// What a run is called: the name that its owner gave, else the beginning of its id.
export function runName(run) {
  const given = run.user_metadata ?? {};
  const name = given.name ?? given.run_name ?? given.display_name;
  return name ? String(name) : shortId(run.id);
}

export function shortId(id) {
  const [session, , number] = id.split(":");
  return number === undefined ? id.slice(0, 16) : `${session.slice(0, 6)}·${number}`;
}

export function methodName(run) {
  return run.rank ? `${run.method} r${run.rank}` : run.method ?? "–";
}
