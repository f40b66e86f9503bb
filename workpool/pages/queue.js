import { drawLine, fillList, fillTable, find, seconds, show, whileVisible } from "./page.js";

const SAMPLES = 90;
const depths = new Array(SAMPLES).fill(null);
const running = new Array(SAMPLES).fill(null);
let credential = null;

const age = (text) => (text ? Date.now() / 1000 - Date.parse(text) / 1000 : null);

const COLUMNS = [
  { text: (item) => item.state },
  { text: (item) => seconds(age(item.created_at)), style: "number-cell" },
  { text: (item) => (item.latest_heartbeat_at ? `${seconds(age(item.latest_heartbeat_at))} ago` : "–") },
  { text: (item) => item.id, style: "id" },
  { text: (item) => item.data?.id ?? "–", style: "id" },
  { text: (item) => item.data?.type ?? "–" },
];

async function call(path) {
  const { environment, token } = credential;
  const url = `api/v1/cloud/environments/${encodeURIComponent(environment)}/work${path}`;
  const answer = await fetch(url, { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
  if (!answer.ok) throw new Error(answer.status === 401 ? "wrong token" : `status ${answer.status}`);
  return answer.json();
}

function remember(list, value) {
  list.shift();
  list.push(value ?? null);
}

function setState(text, style) {
  const state = find("state");
  state.textContent = text;
  state.className = `state ${style}`;
}

async function update() {
  if (credential === null) return;
  try {
    const [stats, list] = await Promise.all([call("/stats"), call("?limit=50&order=desc")]);
    setState("open", "good");
    find("shown").hidden = false;
    show("environment-shown", credential.environment);
    remember(depths, stats.depth);
    remember(running, stats.running);
    show("depth", String(stats.depth));
    show("running", String(stats.running ?? "–"));
    drawLine("depth-line", depths);
    drawLine("running-line", running);
    fillList("queue", [
      ["delivered, not acknowledged", stats.pending],
      ["oldest waits for", seconds(age(stats.oldest_queued_at))],
      ["stopped", stats.stopped ?? "–"],
      ["workers that poll", stats.workers_polling],
    ]);
    fillTable("items", list.data, COLUMNS);
  } catch (error) {
    setState(error.message, "bad");
  }
}

find("opener").addEventListener("submit", (event) => {
  event.preventDefault();
  credential = { environment: find("environment").value.trim(), token: find("token").value };
  depths.fill(null);
  running.fill(null);
  update();
});

whileVisible(update, 2000);
