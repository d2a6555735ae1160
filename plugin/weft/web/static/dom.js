// Elements and words. All that comes from the cluster goes in as text nodes or attribute values: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `attributes`: `onX` is a listener, true an empty attribute; null, undefined and false leave it out. */
export function h(name, attributes, ...children) {
  return dress(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function s(name, attributes, ...children) {
  return dress(document.createElementNS(SVG, name), attributes, children);
}

function dress(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...present(children));
  return element;
}

const present = (children) => children.flat(Infinity).filter((child) => child != null && child !== false);

export const byId = (id) => document.getElementById(id);

/** Replaces what is in `element`, if it differs from what was put there last; `said` is what it is made from. */
const drawn = new WeakMap();
export function fill(element, said, make) {
  const text = JSON.stringify(said);
  if (drawn.get(element) === text) return false;
  drawn.set(element, text);
  const key = document.activeElement?.closest("[data-key]")?.dataset.key;
  element.replaceChildren(...present([make()]));
  if (key && !document.activeElement?.dataset.key) find(element, key)?.focus({ preventScroll: true });
  return true;
}

/** What has `data-key`; keys hold any text. */
export function find(element, key) {
  return [...element.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key);
}

/** Shapes tell a grade without its colour. */
const SHAPES = {
  good: () => [s("circle", { cx: 8, cy: 8, r: 7, class: "plate" }), s("path", { d: "M4.8 8.3l2.2 2.2 4.2-4.6", class: "mark" })],
  warning: () => [s("path", { d: "M8 1.2L15.3 14.4H.7z", class: "plate" }), s("path", { d: "M8 5.6v4.2M8 12v.1", class: "mark" })],
  error: () => [s("path", { d: "M8 .4L15.6 8 8 15.6.4 8z", class: "plate" }), s("path", { d: "M5.8 5.8l4.4 4.4M10.2 5.8l-4.4 4.4", class: "mark" })],
  unknown: () => [s("circle", { cx: 8, cy: 8, r: 6, class: "ring" })],
};
const WORDS = { good: "fine", warning: "warning", error: "fault", unknown: "not known" };

/** A grade's sign: for the eye in SVG (`at` is its upper left corner there), and in words. */
export function sign(grade, at) {
  const place = at ? { x: at[0], y: at[1], "aria-hidden": "true" } : { role: "img", "aria-label": WORDS[grade] };
  return s("svg", { class: `sign ${grade}`, viewBox: "0 0 16 16", width: 16, height: 16, ...place }, SHAPES[grade]());
}

export function lock(at) {
  const place = at ? { x: at[0], y: at[1], "aria-hidden": "true" } : { role: "img", "aria-label": "encrypted" };
  return s("svg", { class: "lock", viewBox: "0 0 16 16", width: 13, height: 13, ...place },
    s("rect", { x: 2.5, y: 7, width: 11, height: 8, rx: 2 }), s("path", { d: "M5 7V4.6a3 3 0 0 1 6 0V7" }));
}

/** A command that a person may type, with a button that copies it; and on which host, unless that is "". */
export function command(text, host = "") {
  const button = h("button", { type: "button", class: "copy", "aria-label": `Copy: ${text}`, "data-key": `copy ${text}` }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return h("div", { class: "command" }, host && h("span", { class: "on" }, "on ", h("bdi", null, host)), h("code", null, text), button);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** `Tab` reaches one of `items`, arrows the others. */
export function roving(items, current) {
  const first = items.find((item) => item.dataset.key === current) ?? items[0];
  for (const [index, item] of items.entries()) {
    item.setAttribute("tabindex", item === first ? "0" : "-1");
    item.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -items.length, End: items.length }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = items[Math.min(items.length - 1, Math.max(0, index + step))];
      item.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  }
}

const number = new Intl.NumberFormat("en");
export const count = (n, one, many = `${one}s`) => `${number.format(n)} ${n === 1 ? one : many}`;
export const listed = (words) => words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
export const percent = (share) => `${share > 0 && share < 0.01 ? "<1" : Math.round(share * 100)} %`;

/** Seconds, as people say them. */
export function duration(seconds) {
  if (seconds < 1e-3) return `${Math.max(1, Math.round(seconds * 1e6))} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toPrecision(seconds < 0.1 ? 2 : 3)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

const twice = (n) => String(n).padStart(2, "0");

/** Unix time as this browser's clock shows it. */
export function clock(when) {
  const date = new Date(when * 1000);
  const minute = `${twice(date.getHours())}:${twice(date.getMinutes())}`;
  if (date.toDateString() === new Date().toDateString()) return `${minute}:${twice(date.getSeconds())}`;
  return `${date.getDate()} ${date.toLocaleString("en", { month: "short" })} ${minute}`;
}

/** Long names differ at their ends. */
export function shortened(text, length) {
  const letters = [...text];
  if (letters.length <= length) return text;
  const end = Math.ceil((length - 1) / 2);
  return `${letters.slice(0, length - 1 - end).join("")}…${letters.slice(-end).join("")}`;
}
