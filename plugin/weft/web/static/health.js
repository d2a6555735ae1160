// What a state means: who is well, who reaches whom, what is shown of many. Pure: state in, values out.

import { count, duration, listed, percent } from "./dom.js";

const RANK = { good: 0, unknown: 1, warning: 2, error: 3 };
const order = new Intl.Collator("en", { numeric: true }).compare;

export const worst = (grades) => grades.reduce((a, b) => (RANK[b] > RANK[a] ? b : a), "good");
export const trouble = (grade) => RANK[grade] >= RANK.warning;

/** @returns {{grade: string, text: string}} of one direction of one kind. */
export function judge(link) {
  if (link.small == null) return { grade: "unknown", text: "not measured" };
  if (link.small >= 1) return { grade: "error", text: link.attested ? "nothing arrives" : "no answer" };
  if (link.corrupt) return { grade: "error", text: "arrives corrupted" };
  if (link.full >= 1) return { grade: "error", text: link.mtu ? `over ${link.mtu} bytes lost` : "large packets lost" };
  const loss = Math.max(link.small, link.full ?? 0, link.offloaded ?? 0);
  if (loss > 0) return { grade: "warning", text: `${percent(loss)} lost` };
  return { grade: "good", text: link.rtt == null ? "fine" : duration(link.rtt) };
}

/**
 * The state with all that follows from it.
 *
 * hosts: grade, why[]; networks: grade, why[], counts (host id -> endpoints); pairs: two hosts with their `links` in
 * both directions (each with grade and text), grade and text, worst first.
 */
export function understand(state) {
  const findings = together(state.findings ?? []).sort((a, b) => RANK[b.severity] - RANK[a.severity]);
  const hosts = state.hosts.map((host) => ({ ...host, ...hostHealth(host, findings) })).sort((a, b) => order(a.name, b.name));
  const known = new Map();
  for (const host of hosts) {
    known.set(host.name, host);
    known.set(host.id, host);
  }
  const pairs = pairsOf(state.links, known);
  const bad = pairs.filter((pair) => trouble(pair.grade));
  const networks = state.networks.map((network) => understood(network, known, bad));
  networks.sort((a, b) => RANK[b.grade] - RANK[a.grade] || order(title(a), title(b)));
  return { ...state, examined: state.findings !== null, findings, hosts, known, pairs, networks };
}

export const title = (network) => network.name || `VNI ${network.vni}`;
export const encrypted = (network) => network.encrypted !== "no";

/** The same fault of several hosts is told once. */
function together(findings) {
  const found = new Map();
  for (const finding of findings) {
    const { hosts, ...told } = finding;
    const key = JSON.stringify(told);
    found.set(key, { ...told, hosts: [...new Set([...(found.get(key)?.hosts ?? []), ...hosts])] });
  }
  return [...found.values()];
}

function hostHealth(host, findings) {
  const why = findings.filter((finding) => finding.hosts.includes(host.name));
  const grade = worst([host.alive ? "good" : "error", ...why.map((finding) => finding.severity)]);
  return { grade, why: [...(host.alive ? [] : ["gives no signs of life"]), ...why.map((finding) => finding.cause)] };
}

function pairsOf(links, known) {
  const pairs = new Map();
  for (const link of links) {
    const ends = [known.get(link.from), known.get(link.to)];
    if (!ends[0] || !ends[1] || ends[0] === ends[1]) continue;
    ends.sort((a, b) => order(a.name, b.name));
    const key = `link ${ends[0].id} ${ends[1].id}`;
    if (!pairs.has(key)) pairs.set(key, { key, a: ends[0], b: ends[1], links: [] });
    pairs.get(key).links.push({ ...link, ...judge(link), sender: known.get(link.from), receiver: known.get(link.to) });
  }
  const all = [...pairs.values()].map((pair) => ({ ...pair, ...pairHealth(pair.links) }));
  return all.sort((a, b) => RANK[b.grade] - RANK[a.grade]);
}

/** One way only is worth knowing: `receiver` is who does not get it. */
function pairHealth(all) {
  const told = all.filter((link) => link.grade !== "unknown");
  const links = told.length ? told : all;
  const grade = worst(links.map((link) => link.grade));
  const found = links.filter((link) => link.grade === grade);
  const receivers = new Set(found.map((link) => link.receiver));
  const one = trouble(grade) && receivers.size === 1 ? found[0].receiver : null;
  const measured = found.filter((link) => link.rtt != null).map((link) => link.rtt);
  const text = grade === "good" && measured.length ? duration(Math.max(...measured)) : found[0].text;
  return { grade, text, receiver: one };
}

function understood(network, known, bad) {
  const counts = new Map();
  for (const endpoint of network.endpoints) {
    const id = known.get(endpoint.host)?.id ?? endpoint.host;
    counts.set(id, (counts.get(id) ?? 0) + 1);
  }
  const why = [];
  if (network.unencryptable.length) why.push({ grade: "error", text: `no usable WireGuard key on ${listed(network.unencryptable)}` });
  if (encrypted(network) && network.encrypted.startsWith("refused")) why.push({ grade: "error", text: `encryption ${network.encrypted}` });
  const kind = encrypted(network) ? "encrypted" : "plain";
  for (const { a, b, links } of bad) {
    const hit = counts.has(a.id) && counts.has(b.id) && links.filter((link) => link.kind === kind && trouble(link.grade));
    for (const link of hit || []) why.push({ grade: link.grade, text: `${link.sender.name} to ${link.receiver.name}: ${link.text}` });
  }
  const silent = [...counts.keys()].map((id) => known.get(id)).filter((host) => host && !host.alive);
  if (silent.length) why.push({ grade: "warning", text: `${listed(silent.map((host) => host.name))} gives no signs of life` });
  return { ...network, counts, why: why.map((one) => one.text), grade: worst(why.map((one) => one.grade)) };
}

/** The page's headline. */
export function verdict({ status, examined, findings, hosts, pairs }) {
  const errors = findings.filter((finding) => finding.severity === "error").length;
  const warnings = findings.length - errors;
  const silent = hosts.filter((host) => !host.alive);
  const problems = status.problems.length;
  if (errors) return { grade: "error", text: count(errors, "fault") + (warnings ? ` and ${count(warnings, "warning")}` : "") };
  if (silent.length) return { grade: "error", text: silent.length > 3 ? `${silent.length} hosts are silent` : `${listed(silent.map((host) => host.name))} ${silent.length > 1 ? "are" : "is"} silent` };
  if (pairs.some((pair) => pair.grade === "error")) return { grade: "error", text: "Not every host reaches every other" };
  if (problems) return { grade: "warning", text: count(problems, "problem") + ` on ${status.host.name}` };
  if (warnings || pairs.some((pair) => pair.grade === "warning")) return { grade: "warning", text: warnings ? count(warnings, "warning") : "Some packets are lost" };
  if (!examined) return { grade: "unknown", text: "Looking for faults…" };
  return { grade: "good", text: "All is well" };
}

/** @returns what a search leaves: hosts, and networks each with `found` (its endpoints that match by themselves). */
export function narrowed(view, { search, show, scope }) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const has = (...texts) => words.every((word) => texts.some((text) => String(text).toLowerCase().includes(word)));
  const hosts = view.hosts.filter((host) => !scope || scope.includes(host.id));
  const networks = [];
  for (const network of view.networks) {
    if ((show === "trouble" && !trouble(network.grade)) || (show === "encrypted" && !encrypted(network))) continue;
    if (scope && !scope.some((id) => network.counts.has(id))) continue;
    const whole = has(network.name, network.vni, ...network.subnets);
    const found = words.length ? network.endpoints.filter((one) => has(network.name, network.vni, one.host, one.mac, ...one.addresses, ...one.names)) : [];
    if (whole || found.length) networks.push({ ...network, found: whole ? [] : found });
  }
  return { hosts: hosts.filter((host) => keeps(host, { words, has, show, networks })), networks };
}

function keeps(host, { words, has, show, networks }) {
  const used = networks.some((network) => network.counts.has(host.id));
  if (show === "trouble") return trouble(host.grade) || used;
  if (!words.length) return show === "all" || used;
  return has(host.name, host.underlay, host.id) || used;
}

/** At most `most` columns of hosts: those in trouble stand alone, neighbours by name share one. */
export function columns(hosts, most) {
  if (hosts.length <= most) return hosts.map((host) => column([host]));
  const alone = new Set(hosts.filter((host) => trouble(host.grade)).slice(0, Math.floor(most / 2)));
  const rest = hosts.filter((host) => !alone.has(host));
  const places = most - alone.size;
  const parts = Array.from({ length: places }, (_, i) => rest.slice(Math.floor((i * rest.length) / places), Math.floor(((i + 1) * rest.length) / places)));
  const all = [...[...alone].map((host) => [host]), ...parts.filter((part) => part.length)].map(column);
  return all.sort((a, b) => order(a.hosts[0].name, b.hosts[0].name));
}

function column(hosts) {
  const [first, last] = [hosts[0].name, hosts.at(-1).name];
  return {
    hosts,
    ids: new Set(hosts.map((host) => host.id)),
    key: hosts.length > 1 ? `hosts ${hosts[0].id} ${hosts.length}` : `host ${hosts[0].id}`,
    name: hosts.length > 1 ? `${first} to ${last}` : first,
    grade: worst(hosts.map((host) => host.grade)),
    silent: hosts.every((host) => !host.alive),
  };
}
