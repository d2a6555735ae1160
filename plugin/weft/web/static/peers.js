// The matrix: rows send, columns receive. Of many hosts those in trouble come first.

import { count, h, lock, percent, sign } from "./dom.js";
import { judge, trouble } from "./health.js";

const MOST = 12;

/** Hosts worth a row. */
export function shownPeers(hosts, pairs) {
  if (hosts.length <= MOST) return hosts;
  const ids = new Set(hosts.map((host) => host.id));
  const bad = new Set(pairs.filter((pair) => trouble(pair.grade)).flatMap((pair) => [pair.a, pair.b]).filter((host) => ids.has(host.id)));
  const rank = (host) => (bad.has(host) ? 0 : trouble(host.grade) ? 1 : 2);
  const chosen = new Set([...hosts].sort((a, b) => rank(a) - rank(b)).slice(0, MOST));
  return hosts.filter((host) => chosen.has(host));
}

export function lead(all, shown, pairs) {
  if (all.length < 2) return "One host so far. Another one joins when its weft uses the same store.";
  if (!pairs.length) return "Nothing is measured yet.";
  const links = pairs.flatMap((pair) => pair.links);
  const bad = links.filter((link) => trouble(link.grade)).length;
  const sum = `${count(links.length, "direction")} measured, ${bad ? `${bad} in trouble` : "all fine"}.`;
  const part = shown.length < all.length ? ` Shown are ${shown.length} of ${all.length} hosts, those in trouble first; search for others above.` : "";
  return `Rows send, columns receive: round trip, and the largest packet that passed. ${sum}${part}`;
}

export function matrix(hosts, pairs) {
  const cells = new Map();
  for (const link of pairs.flatMap((pair) => pair.links)) {
    const key = `${link.sender.id} ${link.receiver.id}`;
    cells.set(key, [...(cells.get(key) ?? []), link]);
  }
  const top = h("tr", null, h("th", { class: "corner", scope: "col" }, h("span", { class: "unseen" }, "from, to")), hosts.map((host) => h("th", { scope: "col" }, h("bdi", null, host.name))));
  const rows = hosts.map((from) => h("tr", null, h("th", { scope: "row" }, h("bdi", null, from.name)), hosts.map((to) => cell(from, to, cells.get(`${from.id} ${to.id}`)))));
  return h("table", { class: "matrix" }, h("thead", null, top), h("tbody", null, rows));
}

function cell(from, to, links) {
  if (from === to) return h("td", { class: "self" }, h("span", { class: "unseen" }, "itself"));
  if (!links) return h("td", { class: "none" }, h("span", { class: "unseen" }, "not measured"), h("span", { "aria-hidden": "true" }, "·"));
  return h("td", null, [...links].sort((a, b) => b.kind.localeCompare(a.kind)).map(measured));
}

function measured(link) {
  const { grade, text } = judge(link);
  const loss = link.full > 0 && link.full < 1 ? `full size ${percent(link.full)} lost` : "";
  const mtu = link.mtu == null ? "" : `${link.mtu} bytes`;
  return h("div", { class: `measured ${grade}` }, sign(grade),
    h("span", { class: "result" }, text, link.kind === "encrypted" && lock()),
    grade === "good" || loss ? h("span", { class: "also" }, loss || mtu) : null);
}
