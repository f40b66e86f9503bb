import { drawLine, fillList, fillTable, find, seconds, show, whileVisible } from "./page.js";

const SAMPLES = 90;
const latencies = new Array(SAMPLES).fill(null);
const ratios = new Array(SAMPLES).fill(null);
let before = null;

const COLUMNS = [
  { text: (one) => (one.environment_id ? `${one.handler} · ${one.environment_id}` : one.handler) },
  { text: (one) => seconds(one.age_seconds), style: "number-cell" },
  { text: (one) => String(one.attempt), style: "number-cell" },
  { text: (one) => seconds(one.lease_seconds), style: "number-cell" },
  { text: (one) => seconds(one.silence_seconds), style: "number-cell" },
  { text: (one) => one.session_id ?? "not shown", style: "id" },
  { text: (one) => one.work_id ?? "not shown", style: "id" },
];

const ENVIRONMENT_COLUMNS = [
  { text: (one) => one.environment_id, style: "id" },
  { text: (one) => String(one.slots?.busy ?? "–"), style: "number-cell" },
  { text: (one) => String(one.slots?.free ?? "–"), style: "number-cell" },
  { text: (one) => String(one.outcomes?.completed ?? "–"), style: "number-cell" },
  { text: (one) => one.reasons.join("; ") || "ready" },
];

function remember(list, value) {
  list.shift();
  list.push(value);
}

// Both lines are differences of counters between two looks: they cost the worker nothing.
function sample(polls) {
  if (before === null) {
    before = polls;
    return;
  }
  const answers = polls.answers - before.answers;
  const items = polls.item - before.item;
  const nulls = polls.null - before.null;
  remember(latencies, answers > 0 ? (polls.seconds - before.seconds) / answers : null);
  remember(ratios, items + nulls > 0 ? nulls / (items + nulls) : null);
  before = polls;
}

function last(list) {
  return list.findLast((value) => value !== null) ?? null;
}

function showStatus(status) {
  const good = status.reasons.length === 0;
  const state = find("state");
  state.textContent = good ? "ready" : "not ready";
  state.className = `state ${good ? "good" : "bad"}`;
  show("worker", `${status.worker_id} · ${status.environment_id} · ${status.version}`);
  document.title = `${status.slots.busy}/${status.slots.limit} ${status.worker_id}`;
  const reasons = status.reasons.map((reason) => {
    const line = document.createElement("li");
    line.textContent = reason;
    return line;
  });
  find("reasons").replaceChildren(...reasons);
  show("busy", String(status.slots.busy));
  show("slots", `of ${status.slots.limit} busy`);
  find("busy-bar").style.width = `${(100 * status.slots.busy) / status.slots.limit}%`;
  find("kept-bar").style.width = `${(100 * status.slots.reserved) / status.slots.limit}%`;
  fillList("queue", [
    ["reserved by polls", status.slots.reserved],
    ["items that wait for a slot", status.queue.waiting],
    ["items that wait for their handler", status.queue.set_aside],
  ]);
  fillList("pollers", Object.entries(status.pollers));
  fillList("outcomes", Object.entries(status.outcomes));
  fillList("leases", [
    ["held", status.leases.held],
    ["shortest", seconds(status.leases.shortest_seconds)],
    ["items gained from other workers", status.reclaims.gained],
    ["items lost to other workers", status.reclaims.lost],
    ["event loop blocked", seconds(status.loop_blocked_seconds)],
  ]);
  sample(status.polls);
  const { polls } = status; // until a poll ends while somebody looks: the mean since the start
  show("latency", seconds(last(latencies) ?? (polls.answers ? polls.seconds / polls.answers : null)));
  const found = polls.item + polls.null;
  const ratio = last(ratios) ?? (found ? polls.null / found : null);
  show("ratio", ratio === null ? "–" : `${Math.round(100 * ratio)} %`);
  drawLine("latency-line", latencies);
  drawLine("ratio-line", ratios, 1);
  find("several").hidden = !status.environments; // a worker with one environment has no list
  fillTable("environments", status.environments ?? [], ENVIRONMENT_COLUMNS);
  fillTable("sessions", status.sessions, COLUMNS);
  const hidden = status.sessions_running - status.sessions.length;
  show("more", hidden > 0 ? `(the oldest ${status.sessions.length} of ${status.sessions_running})` : "");
}

async function update() {
  try {
    const answer = await fetch("live.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    showStatus(await answer.json());
  } catch (error) {
    const state = find("state");
    state.textContent = "no answer";
    state.className = "state bad";
  }
}

whileVisible(update, 2000);
