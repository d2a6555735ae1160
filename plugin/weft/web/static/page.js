// The page: follows /stream, draws what changed. State comes in parts, each whole: {"networks": [...], ...}.

import { byId, clock, command, count, fill, find, h, sign, s } from "./dom.js";
import { narrowed, understand, verdict } from "./health.js";
import { firstSteps, panel } from "./panel.js";
import { lead, matrix, shownPeers } from "./peers.js";
import { picture } from "./picture.js";

const ROWS = 12;
const MORE = 24;
const EVENTS = 8;
const SILENCE = 15_000;
const [SOONEST, LATEST] = [1_000, 5_000];

const chosen = { search: "", show: "all", scope: null, key: null, rows: ROWS, allEndpoints: false, allEvents: false };
let state = {};
let view = null;
const versions = {};
let counts = null;
let fresh = new Set();

// The stream

let source = null;
let silence = 0;
let pause = SOONEST;
let heard = null;

function connect() {
  source = new EventSource("stream");
  source.addEventListener("state", (event) => {
    const parts = JSON.parse(event.data);
    state = { ...state, ...parts };
    for (const name of Object.keys(parts)) versions[name] = (versions[name] ?? 0) + 1;
    view = understand(state);
    compareCounts();
    hear();
    draw();
  });
  source.addEventListener("beat", hear);
  source.addEventListener("error", lose);
  expect();
}

function expect() {
  clearTimeout(silence);
  silence = setTimeout(lose, SILENCE);
}

function hear() {
  heard = Date.now() / 1000;
  pause = SOONEST;
  expect();
  live("live", "Live");
}

/** A new connection begins with the whole state. */
function lose() {
  source.close();
  clearTimeout(silence);
  live("lost", heard ? `Lost contact: as of ${clock(heard)}, trying again` : "No answer yet, trying again");
  setTimeout(connect, pause);
  pause = Math.min(LATEST, pause * 2);
}

function live(mode, text) {
  document.documentElement.dataset.contact = mode;
  fill(byId("live"), [mode, text], () => [s("svg", { viewBox: "0 0 10 10", width: 10, height: 10, "aria-hidden": "true" }, s("circle", { cx: 5, cy: 5, r: 4 })), h("span", null, text)]);
}

// Drawing

function draw() {
  if (!view) return;
  const left = narrowed(view, chosen);
  drawSummary();
  drawFaults();
  drawPicture(left);
  drawPanel();
  drawPeers(left);
  drawEvents();
}

/** What the picture and the tables are made from, in short. */
const seen = () => [versions.hosts, versions.networks, versions.links, versions.findings, chosen.search, chosen.show, chosen.scope];

function drawSummary() {
  const { status } = view;
  const { grade, text } = verdict(view);
  const silent = view.hosts.filter((host) => !host.alive).length;
  const parts = [
    count(view.hosts.length, "host") + (silent ? `, ${silent} silent` : ""),
    count(view.networks.length, "network"),
    count(view.networks.reduce((sum, network) => sum + network.endpoints.length, 0), "endpoint"),
    status.encryption.startsWith("active") ? `encryption ${status.encryption}` : status.encryption.split(":")[0].replace("refused", "encryption refused"),
  ];
  document.title = `${grade === "good" ? "" : `${text} · `}weft on ${status.host.name}`;
  document.documentElement.dataset.grade = grade;
  fill(byId("where"), status.host.name, () => [h("span", { class: "unseen" }, "as seen by host "), h("bdi", null, status.host.name)]);
  fill(byId("verdict"), [grade, text], () => [sign(grade), h("span", null, text)]);
  fill(byId("counts"), parts, () => parts.map((part) => h("span", null, part)));
  fill(byId("footer"), status.host.version, () => `weft ${status.host.version} · this page only shows; changes are made with docker and weft`);
}

function drawFaults() {
  byId("faults").hidden = !view.findings.length;
  fill(byId("fault-list"), view.findings, () => view.findings.map((finding) => h("li", { class: `fault ${finding.severity}` },
    sign(finding.severity),
    h("div", { class: "told" },
      h("h3", null, finding.cause),
      h("p", { class: "evidence" }, finding.evidence),
      finding.command && command(finding.command, finding.hosts.length === 1 ? finding.hosts[0] : ""),
      h("p", { class: "tags" }, h("span", { class: "tag" }, finding.check), finding.hosts.map((name) => h("span", { class: "tag host" }, h("bdi", null, name))))))));
}

function drawPicture({ hosts, networks }) {
  const stage = byId("picture");
  const shown = networks.slice(0, chosen.rows);
  const width = Math.floor(stage.clientWidth);
  fill(stage, [seen(), chosen.rows, chosen.key, width], () => {
    if (!view.networks.length && !view.hosts.length) return firstSteps(view.status.host.driver);
    const drawing = hosts.length ? picture({ hosts, networks: shown, pairs: view.pairs, width, chosen: chosen.key, choose, fresh }) : null;
    if (!view.networks.length) return [drawing, firstSteps(view.status.host.driver)];
    return shown.length ? drawing : [h("p", { class: "empty" }, nothing())];
  });
  const rest = networks.length - shown.length;
  byId("more").hidden = !rest;
  fill(byId("more"), rest, () => h("button", { type: "button", class: "quiet", onclick: showMore, "data-key": "more" }, `Show ${Math.min(MORE, rest)} more of ${count(rest, "network")}`));
  byId("scope").hidden = !chosen.scope;
  fill(byId("scope"), [chosen.scope, hosts.length], () => [`Only ${count(chosen.scope?.length ?? 0, "host")}. `, h("button", { type: "button", class: "quiet", onclick: () => set({ scope: null }), "data-key": "scope" }, "Show all hosts")]);
}

const nothing = () => chosen.search ? "Nothing has that name or address." : chosen.show === "trouble" ? "No network is in trouble." : "No network is encrypted.";

/** Knots whose number has just grown, by network and host. */
function compareCounts() {
  const now = new Map(view.networks.flatMap((network) => [...network.counts].map(([id, n]) => [`${network.vni} ${id}`, n])));
  fresh = new Set(counts ? [...now].filter(([key, n]) => n > (counts.get(key) ?? 0)).map(([key]) => key) : []);
  counts = now;
}

function drawPanel() {
  byId("legend").hidden = !view.networks.length;
  const make = panel(view, chosen.key, { all: chosen.allEndpoints, close, showAll: () => set({ allEndpoints: true }) });
  fill(byId("panel"), chosen.key ? [seen(), chosen.key, chosen.allEndpoints] : [view.status], make);
}

function drawPeers({ hosts }) {
  const shown = shownPeers(hosts, view.pairs);
  fill(byId("peers-lead"), lead(view.hosts, shown, view.pairs), () => lead(view.hosts, shown, view.pairs));
  byId("peers").hidden = view.hosts.length < 2 || !view.pairs.length;
  fill(byId("peers"), seen(), () => matrix(shown, view.pairs));
}

function drawEvents() {
  const events = [...view.events].sort((a, b) => b.id - a.id);
  const shown = chosen.allEvents ? events : events.slice(0, EVENTS);
  fill(byId("events"), shown, () => shown.length ? shown.map(drawEvent) : h("li", { class: "empty" }, "Nothing has happened yet."));
  byId("events-more").hidden = shown.length === events.length;
  fill(byId("events-more"), events.length, () => h("button", { type: "button", class: "quiet", onclick: () => set({ allEvents: true }), "data-key": "events" }, `Show all ${events.length}`));
}

function drawEvent({ when, severity, source: from, text }) {
  const grade = severity === "info" ? null : severity;
  return h("li", { class: severity },
    h("time", { datetime: new Date(when * 1000).toISOString() }, clock(when)),
    h("span", { class: "mark" }, grade && sign(grade)), h("span", { class: "source" }, from), h("span", { class: "text" }, text));
}

// What the user does

function set(change) {
  Object.assign(chosen, change);
  draw();
}

function choose(key, ids) {
  if (ids?.size > 1) return set({ scope: [...ids] });
  set({ key: chosen.key === key ? null : key, allEndpoints: false });
  if (!chosen.key) return;
  const heading = find(byId("panel"), "panel");
  const below = byId("panel").getBoundingClientRect().top > byId("picture").getBoundingClientRect().bottom - 1;
  heading?.focus({ preventScroll: !below });
}

/** Back to where it was chosen. */
function close() {
  const key = chosen.key;
  set({ key: null });
  find(byId("picture"), key ?? "")?.focus();
}

function showMore() {
  set({ rows: chosen.rows + MORE });
}

function legend() {
  const drawn = (...children) => s("svg", { viewBox: "0 0 44 16", width: 44, height: 16, "aria-hidden": "true" }, children);
  const warp = s("line", { class: "warp", x1: 22, x2: 22, y1: 0, y2: 16 });
  const twist = (side) => s("path", { class: side < 0 ? "second" : null, d: `M2 8${[1, -1, 1, -1].map((way) => `q5 ${6.4 * side * way} 10 0`).join("")}` });
  const entries = [
    [drawn(s("g", { class: "thread" }, s("path", { d: "M2 8H42" })), s("g", { class: "knot" }, s("rect", { x: 14, y: 0, width: 16, height: 16, rx: 8 }), s("text", { x: 22, y: 12 }, "2"))), "plain, with two endpoints"],
    [drawn(s("g", { class: "thread" }, twist(1), twist(-1))), "encrypted"],
    [drawn(warp.cloneNode(), s("g", { class: "thread" }, s("path", { d: "M2 8H15M29 8H42" }))), "passes by"],
    [drawn(s("line", { class: "warp silent", x1: 22, x2: 22, y1: 0, y2: 16 })), "silent host"],
  ];
  byId("legend").append(...entries.map(([sample, text]) => h("li", null, sample, text)));
}

legend();
byId("tools").addEventListener("submit", (event) => event.preventDefault());
byId("search").addEventListener("input", (event) => set({ search: event.target.value, rows: ROWS }));
byId("tools").addEventListener("change", (event) => event.target.name === "show" && set({ show: event.target.value, rows: ROWS }));
document.addEventListener("keydown", (event) => event.key === "Escape" && chosen.key && close());
new ResizeObserver(() => draw()).observe(byId("picture"));
connect();
