// The details of what was chosen in the picture: a network, a host, two hosts; of nothing, those of the host that shows the page.

import { clock, command, count, duration, h, lock, percent, sign } from "./dom.js";
import { encrypted, title } from "./health.js";

const MOST = 60;

/**
 * @param bound what the buttons do, and whether `all` endpoints are shown.
 * @returns what makes its elements.
 */
export function panel(view, chosen, bound) {
  const [kind, ...rest] = (chosen ?? "").split(" ");
  const id = rest.join(" ");
  const network = kind === "network" && view.networks.find((one) => String(one.vni) === id);
  const host = kind === "host" && view.known.get(id);
  const pair = kind === "link" && view.pairs.find((one) => one.key === chosen);
  if (network) return () => ofNetwork(network, bound);
  if (host) return () => ofHost(view, host, bound);
  if (pair) return () => ofPair(pair, bound);
  return () => ofCluster(view.status);
}

function head(grade, what, name, close, extra) {
  return h("div", { class: "panel-head" },
    sign(grade),
    h("h3", { tabindex: "-1", "data-key": "panel" }, h("span", { class: "kind" }, what), " ", h("bdi", null, name), extra && " ", extra),
    close && h("button", { type: "button", class: "close", "aria-label": "Close", onclick: close, "data-key": "close" }, "×"));
}

const facts = (entries) => h("dl", { class: "facts" }, entries.filter(([, value]) => value != null && value !== "" && value !== false)
  .map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));

const reasons = (why) => why.length ? h("ul", { class: "why" }, why.map((text) => h("li", null, text))) : null;

function endpointTable(endpoints, place, { all, showAll }) {
  if (!endpoints.length) return h("p", { class: "empty" }, "No endpoints: no container is connected.");
  const shown = all ? endpoints : endpoints.slice(0, MOST);
  const rows = shown.map((one) => h("tr", null,
    h("td", null, h("bdi", { class: "strong" }, one.names[0] ?? one.id.slice(0, 12)), one.names.length > 1 && h("span", { class: "also" }, one.names.slice(1).join(", "))),
    h("td", null, one.addresses.map((address) => h("span", { class: "line" }, address)), h("span", { class: "also" }, one.mac)),
    h("td", null, h("bdi", null, place(one)))));
  return [
    h("table", { class: "endpoints" }, h("thead", null, h("tr", null, ["Name", "Address", place.title].map((text) => h("th", { scope: "col" }, text)))), h("tbody", null, rows)),
    shown.length < endpoints.length && h("p", null, h("button", { type: "button", class: "quiet", onclick: showAll, "data-key": "all endpoints" }, `Show all ${endpoints.length}`)),
  ];
}

function ofNetwork(network, bound) {
  const place = Object.assign((one) => one.host, { title: "Host" });
  return [
    head(network.grade, "Network", title(network), bound.close, encrypted(network) && lock()),
    reasons(network.why),
    facts([
      ["VNI", String(network.vni)],
      ["Subnet", network.subnets.join(", ")],
      ["Encryption", encrypted(network) ? network.encrypted : "none"],
      ["MTU", String(network.mtu || network.fitting_mtu)],
      ["Another MTU", Object.entries(network.other_mtu).map(([name, mtu]) => `${name}: ${mtu}`).join(", ")],
      ["Reach", network.internal && "internal: no way out"],
      ["State", network.retired && "retired: goes with its last container"],
    ]),
    h("h4", null, count(network.endpoints.length, "endpoint")),
    endpointTable(network.endpoints, place, bound),
  ];
}

const of = (view, host) => view.networks.flatMap((network) => network.endpoints
  .filter((one) => one.host === host.name).map((one) => ({ ...one, on: title(network) })));

function ofHost(view, host, bound) {
  const endpoints = of(view, host);
  const place = Object.assign((one) => one.on, { title: "Network" });
  return [
    head(host.grade, "Host", host.name, bound.close),
    reasons(host.why),
    facts([
      ["Underlay", host.underlay],
      ["State", host.alive ? "alive" : "silent"],
      ["weft", host.version],
      ["Id", host.id.slice(0, 12)],
    ]),
    h("h4", null, count(endpoints.length, "endpoint")),
    endpointTable(endpoints, place, bound),
  ];
}

function ofPair(pair, bound) {
  return [
    head(pair.grade, "Between", `${pair.a.name} and ${pair.b.name}`, bound.close),
    pair.links.map((link) => [
      h("h4", { class: "way" }, sign(link.grade), " ", h("bdi", null, link.sender.name), " → ", h("bdi", null, link.receiver.name), link.kind === "encrypted" && lock()),
      facts([
        ["Result", link.text],
        ["Round trip", link.rtt != null && duration(link.rtt)],
        ["Loss, small", link.small != null && percent(link.small)],
        ["Loss, full size", link.full != null && percent(link.full)],
        ["Largest passed", link.mtu != null && `${link.mtu} of ${link.size} bytes`],
        ["Corrupted", link.corrupt > 0 && String(link.corrupt)],
        ["Measured", link.when ? h("time", { datetime: new Date(link.when * 1000).toISOString() }, clock(link.when)) : "never"],
      ]),
    ]),
  ].flat(2);
}

function ofCluster(status) {
  const { host, store, engine, agent, names } = status;
  const resolver = names.problem || (names.address ? `${names.answers ? "answered" : "not answered"} at ${names.address}` : "off");
  return [
    head(status.problems.length ? "warning" : "good", "This host", host.name),
    reasons(status.problems),
    facts([
      ["Underlay", host.underlay],
      ["weft", `${host.version}, driver ${host.driver}`],
      ["Docker", engine.problem || engine.version],
      ["Store", store.problem || store.origin],
      ["Store latency", store.seconds != null && duration(store.seconds)],
      ["Kernel", agent.problem || (agent.synced ? `as wanted: ${count(agent.links, "link")}, ${count(agent.rows, "row")}` : "not compared yet")],
      ["Last comparison", agent.resynced != null && `${clock(agent.resynced)}${agent.seconds == null ? "" : `, took ${duration(agent.seconds)}`}`],
      ["Repaired", agent.repaired ? `${count(agent.repaired, "entry", "entries")} so far` : ""],
      ["Encryption", status.encryption],
      ["Names", resolver],
      ["Up since", host.started && clock(host.started)],
    ]),
    h("p", { class: "hint" }, "Choose a host or a network in the picture to see what is on it."),
  ];
}

/** What is shown instead of a picture when there is nothing to draw. */
export function firstSteps(driver) {
  return h("div", { class: "first" },
    h("h3", null, "No networks yet"),
    h("p", null, "Make one on any host; it appears on all of them, and here."),
    command(`docker network create -d ${driver} --ipam-driver ${driver} app`));
}
