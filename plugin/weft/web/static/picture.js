// The picture: hosts are the warp, networks the weft. A thread has a knot at each host that has endpoints of its network
// and passes under the others; an encrypted one is twisted of two strands. Above the hosts, arcs tell who does not reach whom.

import { count, lock, roving, s, shortened, sign } from "./dom.js";
import { columns, encrypted, title, trouble } from "./health.js";

const WIDE = 640;
const FEW = 6;
const ARCS = 24;
const KNOT = 11;

/** @returns an SVG for `hosts` and `networks` in `width` pixels; `choose(key, ids)` is called for what the user picks (of a column of hosts, all their ids). */
export function picture({ hosts, networks, pairs, width, chosen, choose, fresh }) {
  const wide = width >= WIDE;
  const gutter = wide ? 216 : 0;
  const room = width - gutter;
  const least = hosts.length * (wide ? 56 : 46) > room ? 60 : 46; // where several hosts share a column, it needs more words
  const cols = columns(hosts, Math.max(2, Math.floor(room / least)));
  const pitch = Math.min(room / Math.max(1, cols.length), 200);
  const left = gutter + (wide ? 0 : (room - pitch * cols.length) / 2);
  cols.forEach((col, i) => { col.x = left + pitch * (i + 0.5); });
  const arcs = arcsOf(cols, pairs, hosts.length);
  const sky = arcs.length ? 22 + Math.max(...arcs.map((arc) => arc.height)) : 4;
  const heads = sky + 52;
  const step = wide ? 52 : 68;
  const height = heads + 14 + step * Math.max(1, networks.length);
  const rows = networks.map((network, i) => ({ network, top: heads + 10 + step * i, y: heads + 10 + step * i + (wide ? step / 2 : 46) }));
  const box = { cols, pitch, gutter, width, wide, step, chosen, choose, fresh };

  const links = arcs.map((arc) => drawArc(arc, sky, box));
  const tops = cols.map((col) => drawHead(col, sky, { ...box, prefix: prefixOf(hosts) }));
  const threads = rows.map((row) => drawNetwork(row, box));
  for (const group of [links, tops, threads]) roving(group, chosen);
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": summary(hosts, networks) },
    s("g", { "aria-hidden": "true" }, cols.map((col) => drawWarp(col, heads, height))),
    named("Networks", threads), named("Hosts", tops), named("Who reaches whom", links));
}

const named = (label, items) => items.length ? s("g", { role: "group", "aria-label": label }, items) : null;
const summary = (hosts, networks) => `${count(hosts.length, "host")} and ${count(networks.length, "network")}. Tab goes from hosts to networks, arrow keys within them.`;

function item({ key, ids }, label, { chosen, choose }, classes, ...children) {
  const pick = () => choose(key, ids);
  return s("g", {
    class: `item ${classes}${chosen === key ? " chosen" : ""}`, role: "button", "aria-label": label, "data-key": key,
    "aria-pressed": String(chosen === key), onclick: pick,
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(); } },
  }, s("title", null, label), children);
}

// Hosts

function drawWarp(col, top, bottom) {
  const line = (x) => s("line", { class: `warp${col.silent ? " silent" : ""}`, x1: x, x2: x, y1: top, y2: bottom });
  return col.hosts.length > 1 ? [-2, 2].map((offset) => line(col.x + offset)) : line(col.x);
}

function drawHead(col, top, box) {
  const { hosts } = col;
  const many = hosts.length > 1;
  const endpoints = hosts.reduce((sum, host) => sum + host.endpoints, 0);
  const why = hosts.flatMap((host) => host.why);
  const state = col.silent ? "silent" : col.grade === "good" ? "well" : why[0] ?? col.grade;
  const label = `${many ? `${count(hosts.length, "host")}, ${col.name}` : `Host ${col.name}`}: ${state}, ${count(endpoints, "endpoint")}`;
  const room = Math.max(4, Math.floor((box.pitch - 2) / 7.2));
  const bare = (host) => host.name.slice(box.prefix);
  const range = `${bare(hosts[0])}–${bare(hosts.at(-1))}`;
  const lines = many ? [shortened(range, room), count(hosts.length, "host")] : [shortened(box.prefix && col.name.length > room ? bare(hosts[0]) : col.name, room), count(endpoints, "endpoint")];
  const half = box.pitch / 2 - 2;
  return item(col, label, box, `host ${col.grade}`,
    s("rect", { class: "hit", x: col.x - half, y: top - 2, width: 2 * half, height: 50, rx: 8 }),
    sign(col.grade, [col.x - 8, top + 1]),
    s("text", { x: col.x, y: top + 31, class: "name" }, lines[0]),
    (many || box.pitch >= 80) && s("text", { x: col.x, y: top + 44, class: "small" }, lines[1]));
}

/** How much the names of many hosts have in common, up to a separator. */
function prefixOf(hosts) {
  const [first, ...others] = hosts.map((host) => host.name);
  if (!others.length) return 0;
  let length = 0;
  while (length < first.length && others.every((name) => name[length] === first[length])) length += 1;
  return first.slice(0, length).search(/[^a-zA-Z0-9][a-zA-Z0-9]*$/) + 1;
}

// Networks

function drawNetwork({ network, top, y }, box) {
  const { cols } = box;
  const at = cols.map((col) => [...col.ids].reduce((sum, id) => sum + (network.counts.get(id) ?? 0), 0));
  const used = at.flatMap((n, i) => (n ? [i] : []));
  const spread = [...network.counts.keys()].length;
  const state = network.why[0] ?? (network.retired ? "retired" : "well");
  const label = `Network ${title(network)}: ${encrypted(network) ? "encrypted" : "plain"}, ` +
    `${count(network.endpoints.length, "endpoint")} on ${count(spread, "host")}, ${state}`;
  return item({ key: `network ${network.vni}` }, label, box, `network ${network.grade}`,
    s("rect", { class: "hit", x: 1, y: top + 1, width: box.width - 2, height: box.step - 2, rx: 10 }),
    nameOf(network, top, y, box),
    used.length ? thread(network, used, y, cols) : s("line", { class: "unused", x1: cols[0]?.x ?? 0, x2: cols.at(-1)?.x ?? 0, y1: y, y2: y }),
    used.map((i) => knot(cols[i], y, at[i], [...cols[i].ids].some((id) => box.fresh.has(`${network.vni} ${id}`)))));
}

/** Sign, name and lock; beneath, or beside on a phone, the subnet. */
function nameOf(network, top, y, { wide, width }) {
  const text = shortened(title(network), wide ? 18 : 16);
  const [first = "", ...others] = network.subnets;
  const detail = network.retired ? "retired" : others.length ? `${first} +${others.length}` : first;
  const line = wide ? y - 3 : top + 21;
  return [
    sign(network.grade, [12, wide ? y - 16 : top + 8]),
    s("text", { x: 36, y: line, class: "name" }, text),
    encrypted(network) && lock([40 + text.length * 8, line - 11]),
    wide ? s("text", { x: 36, y: y + 14, class: "small" }, shortened(detail, 24))
      : s("text", { x: width - 12, y: line, class: "small end" }, shortened(detail, Math.floor((width - 180) / 7))),
  ];
}

function thread(network, used, y, cols) {
  const [first, last] = [used[0], used.at(-1)];
  const strands = encrypted(network) ? [1, -1] : [0];
  const ends = first === last ? [[cols[first].x - 36, cols[first].x + 36]] : spans(used, first, last, cols);
  return s("g", { class: "thread" }, ends.map(([from, to]) => strands.map((side) => s("path", { d: strand(from, to, y, side), class: side < 0 ? "second" : null }))));
}

/** From knot to knot, with a gap where it passes under a warp. */
function spans(used, first, last, cols) {
  const edge = (i, way) => cols[i].x + way * (used.includes(i) ? 0 : 7);
  return Array.from({ length: last - first }, (_, k) => [edge(first + k, 1), edge(first + k + 1, -1)]);
}

function strand(from, to, y, side) {
  if (!side) return `M${from} ${y}H${to}`;
  const waves = Math.max(2, Math.round((to - from) / 9));
  const half = (to - from) / waves;
  return `M${from} ${y}` + Array.from({ length: waves }, (_, i) => `q${half / 2} ${(i % 2 ? -1 : 1) * side * 6.4} ${half} 0`).join("");
}

function knot(col, y, n, fresh) {
  const text = n > 999 ? "999+" : String(n);
  const width = 2 * KNOT + Math.max(0, text.length - 2) * 7;
  return s("g", { class: `knot${col.silent ? " silent" : ""}` },
    fresh && s("circle", { class: "pulse", cx: col.x, cy: y, r: KNOT }),
    s("rect", { x: col.x - width / 2, y: y - KNOT, width, height: 2 * KNOT, rx: KNOT }),
    s("text", { x: col.x, y: y + 4 }, text));
}

// Who reaches whom

/** Between few hosts all, else only the worst. Those between the same columns are one. */
function arcsOf(cols, pairs, hosts) {
  const place = new Map(cols.flatMap((col, i) => [...col.ids].map((id) => [id, i])));
  const found = new Map();
  for (const pair of pairs) {
    const ends = [place.get(pair.a.id), place.get(pair.b.id)].sort((a, b) => a - b);
    const shown = trouble(pair.grade) || (hosts <= FEW && pair.grade === "good");
    if (!shown || ends[0] === ends[1] || ends.includes(undefined)) continue;
    const key = ends.join(" ");
    if (!found.has(key)) found.set(key, { pair, from: cols[ends[0]], to: cols[ends[1]], span: ends[1] - ends[0], pairs: 0 });
    found.get(key).pairs += 1;
  }
  const arcs = [...found.values()].slice(0, ARCS);
  const narrow = cols.length > FEW;
  return arcs.map((arc) => ({ ...arc, height: narrow ? 16 + 6 * Math.min(arc.span, 8) : 14 + 20 * arc.span })).reverse();
}

function drawArc({ pair, from, to, height, pairs }, floor, box) {
  const grow = (height * 4) / 3;
  const middle = (from.x + to.x) / 2;
  const apex = floor - 6 - height;
  const d = `M${from.x} ${floor - 6}C${from.x} ${floor - 6 - grow} ${to.x} ${floor - 6 - grow} ${to.x} ${floor - 6}`;
  const one = pair.receiver ? ` to ${pair.receiver.name}` : "";
  const more = pairs > 1 ? `, and ${count(pairs - 1, "pair")} more` : "";
  const text = pairs > 1 ? `${pairs} pairs` : `${pair.text}${arrow(pair, from)}`;
  const fits = box.pitch > 84 && to.x - from.x > text.length * 6 + 30;
  const bad = trouble(pair.grade);
  return item(pair, `${pair.a.name} and ${pair.b.name}: ${pair.text}${one}${more}`, box, `arc ${pair.grade}`,
    s("path", { class: "wide", d }), s("path", { class: "line", d }),
    bad && sign(pair.grade, [fits ? middle - text.length * 2.85 - 12 : middle - 8, apex - 8]),
    fits && s("text", { x: middle + (bad ? 8 : 0), y: apex + 4 }, text));
}

/** Points to who does not get what is sent. */
function arrow({ receiver, a }, from) {
  if (!receiver) return "";
  const leftward = from.ids.has(receiver.id);
  return leftward ? " ←" : " →";
}
