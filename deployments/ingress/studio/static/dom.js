// Building blocks of the page. Text is always text: nothing here takes markup.

/** @typedef {any} Child a node, text, a number, a list of them; nothing where it is null, undefined or false */

/**
 * An element with attributes, listeners (`onclick`) and children.
 * @param {string} tag `name`, `name.class`, `name.class.other`
 * @param {Record<string, any>} [props]
 * @param {...Child} children
 * @returns {any}
 */
export function h(tag, props, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key === "value" || key === "checked" || key === "disabled") /** @type {any} */ (element)[key] = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  add(element, children);
  return element;
}

/**
 * @param {Element} parent
 * @param {Child} child
 */
function add(parent, child) {
  if (child === null || child === undefined || child === false) return;
  if (Array.isArray(child)) child.forEach((one) => add(parent, one));
  else parent.append(child instanceof Node ? child : String(child));
}

/**
 * Replace what an element holds.
 * @param {Element} parent
 * @param {...Child} children
 */
export function fill(parent, ...children) {
  parent.replaceChildren();
  add(parent, children);
}

const RIGHT_TO_LEFT = /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/u;
/** Which way lyrics run; their section tags are English in every language. @param {string} lyrics */
export const directionOf = (lyrics) => (RIGHT_TO_LEFT.test(lyrics.replace(/\[[^\]]*\]/g, "")) ? "rtl" : "ltr");

/** Seconds as m:ss. @param {number | null | undefined} s */
export function clock(s) {
  if (s === null || s === undefined || !isFinite(s)) return "–:––";
  const whole = Math.max(0, Math.floor(s));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Seconds for people. @param {number} s */
export function about(s) {
  if (s < 1) return "a moment";
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return `${(s / 3600).toFixed(1)} h`;
}

/** @param {number} n */
export function bytes(n) {
  if (n < 1e6) return `${Math.max(1, Math.round(n / 1e3))} kB`;
  return n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`;
}

/** Unix seconds as a moment of the reader. @param {number} at */
export function moment(at) {
  const date = new Date(at * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/**
 * A message that goes by itself.
 * @param {string} text
 * @param {"info" | "bad"} [kind]
 */
export function toast(text, kind = "info") {
  const box = /** @type {HTMLElement} */ (document.getElementById("toasts"));
  const note = h(`p.toast.${kind}`, {}, text);
  box.append(note);
  setTimeout(() => note.remove(), kind === "bad" ? 10000 : 4000);
}

let ids = 0;
/** An id that is used once. */
export const newId = () => `u${++ids}`;

/**
 * A labelled control; errors of the server appear beside it.
 * @param {string} label
 * @param {HTMLElement} control
 * @param {string} [hint]
 * @param {string} [name] the request's field
 */
export function field(label, control, hint, name) {
  control.id = control.id || newId();
  const help = hint ? h("small", { id: `${control.id}h` }, hint) : null;
  if (help) control.setAttribute("aria-describedby", help.id);
  return h("div.field", { data: name ? { field: name } : {} }, h("label", { for: control.id }, label), control, help, h("em.wrong", { role: "alert", hidden: true }));
}

/**
 * Show what the server found wrong beside the fields it names. Returns what has no field here.
 * @param {Element} form
 * @param {{field?: string, message: string}[]} errors
 */
export function markWrong(form, errors) {
  form.querySelectorAll("em.wrong").forEach((e) => { e.textContent = ""; /** @type {any} */ (e).hidden = true; });
  form.querySelectorAll("[aria-invalid]").forEach((e) => e.removeAttribute("aria-invalid"));
  const left = [];
  let first = null;
  for (const error of errors) {
    const name = (error.field || "").split(".")[0];
    const box = name && form.querySelector(`[data-field="${CSS.escape(name)}"]`);
    if (!box) { left.push(error); continue; }
    const note = /** @type {HTMLElement} */ (box.querySelector("em.wrong"));
    note.textContent = error.message;
    note.hidden = false;
    const control = box.querySelector("input, select, textarea");
    control?.setAttribute("aria-invalid", "true");
    for (let up = box.parentElement; up; up = up.parentElement) if (up instanceof HTMLDetailsElement) up.open = true;
    first = first || control;
  }
  if (first instanceof HTMLElement) {
    first.focus({ preventScroll: true });
    first.closest(".field")?.scrollIntoView({ block: "nearest" }); // with what is said of it
  }
  return left;
}
