// The server's JSON and its stream of changes. The key lives in sessionStorage and nowhere else.

const KEY = "lorica-key";
export const API = "/api/lorica/v1";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function ask(path, options = {}) {
  return fetch(path, { ...options, headers: { "x-api-key": key.get(), ...options.headers } });
}

async function refusal(response) {
  const told = await response.json().catch(() => ({}));
  const error = typeof told.error === "object" ? told.error?.message : told.error;
  return new Refused(response.status, error ?? `The server answered ${response.status}.`);
}

export async function get(path) {
  const response = await ask(path);
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Server-sent events of a response, which EventSource could not ask for with a key: {event, data}.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r", "");
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let event = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      }
      if (data.length) yield { event, data: data.join("\n") };
    }
  }
}

// Hear of changes until the page goes; after a loss of the connection, again. `state` hears "live" and "lost".
export async function follow(heard, state) {
  let pause = 500;
  for (;;) {
    try {
      const response = await ask(`${API}/events`);
      if (response.status === 401) return state("refused");
      if (!response.ok) throw await refusal(response);
      state("live");
      pause = 500;
      for await (const { event, data } of events(response)) heard(event, JSON.parse(data));
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof Refused || error.name === "NetworkError")) throw error;
    }
    state("lost");
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(2 * pause, 10000);
  }
}

// Text of a completion or an assistant's turn as it comes.
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const { data } of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message);
    for (const choice of chunk.choices ?? []) yield choice.text ?? choice.delta?.content ?? "";
  }
}
