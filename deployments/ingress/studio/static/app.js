// The page: views by the address, the key, and what holds everywhere.

import { Refused, call, hasKey, onTrouble, setKey } from "./api.js";
import { field, fill, h, toast } from "./dom.js";
import { showFleet } from "./fleet.js";
import { Maker } from "./make.js";
import { player } from "./player.js";
import { showSong } from "./song.js";
import { Library } from "./songs.js";

const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const banner = /** @type {HTMLElement} */ (document.getElementById("banner"));
const health = /** @type {HTMLElement} */ (document.getElementById("health"));
const keyButton = /** @type {HTMLButtonElement} */ (document.getElementById("key"));

const library = new Library();
const maker = new Maker(library);
player.mount(/** @type {HTMLElement} */ (document.getElementById("player")));

let view = new AbortController();

function route() {
  view.abort();
  view = new AbortController();
  const [name, id] = location.hash.replace(/^#\/?/, "").split("/");
  document.querySelectorAll("nav a[data-view]").forEach((a) => {
    const here = /** @type {HTMLElement} */ (a).dataset.view === (name === "fleet" ? "fleet" : "songs");
    if (here) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  });
  main.className = `view-${name || "songs"}`;
  if (name === "fleet") showFleet(main, view.signal);
  else if (name === "song" && id) void showSong(main, decodeURIComponent(id), library, view.signal);
  else {
    const list = h("section", { "aria-label": "Your songs" });
    fill(main, maker.form, list);
    library.show(list);
    if (matchMedia("(min-width: 900px)").matches && !name) maker.wish.focus({ preventScroll: true });
  }
  if (name) { main.focus({ preventScroll: true }); window.scrollTo(0, 0); }
}

// -- trouble

let asking = false;

/** Ask for a key, once at a time. @param {string} [why] */
function askKey(why) {
  if (asking) return;
  asking = true;
  const input = h("input", { type: "password", autocomplete: "current-password", required: true });
  const keep = h("input", { type: "checkbox" });
  const problem = h("p.error", { role: "alert", hidden: !why }, why || "");
  const dialog = h("dialog.key", { "aria-labelledby": "keytitle" }, h("form", { method: "dialog", onsubmit: async (/** @type {Event} */ event) => {
    event.preventDefault();
    setKey(input.value, keep.checked);
    try {
      await call("v1/jobs?limit=1");
      asking = false;
      dialog.close();
      dialog.remove();
      library.reset();
      void look();
      route();
    } catch (error) {
      problem.textContent = error instanceof Refused && error.status === 401 ? "The server does not know this key." : error instanceof Error ? error.message : String(error);
      problem.hidden = false;
      input.select();
    }
  } }, h("h2", { id: "keytitle" }, "This server wants a key"), h("p.muted", {}, "It is sent as a header, never as part of an address, and kept for this tab."), field("Key", input), h("label.check", {}, keep, " Keep it in this browser"), problem, h("div.row", {}, h("button.primary", { type: "submit" }, "Go on"), h("button.quiet", { type: "button", onclick: () => { asking = false; dialog.close(); dialog.remove(); } }, "Later"))));
  dialog.addEventListener("cancel", () => { asking = false; dialog.remove(); });
  document.body.append(dialog);
  dialog.showModal();
}

onTrouble((what) => {
  if (what === "key") askKey(hasKey() ? "The server does not know this key." : undefined);
  keyButton.hidden = what !== "key" && !hasKey();
  if (what === "away" || what === "back") health.hidden = what === "away";
  if (what === "away") { banner.textContent = "The server does not answer. What you made is safe there; this page goes on as soon as it is back."; banner.hidden = false; void comeBack(); }
  if (what === "back") { banner.hidden = true; toast("The server is back."); void library.poll(); }
});
keyButton.addEventListener("click", () => askKey());

async function comeBack() {
  for (let pause = 1000; !banner.hidden; pause = Math.min(10000, pause * 1.5)) {
    await new Promise((done) => setTimeout(done, pause));
    try { await call("livez"); return; } catch { /* not yet */ }
  }
}

/** What the fleet can do now, and what is missing. */
async function look() {
  try {
    const cluster = await call("v1/cluster");
    maker.learn(cluster);
    const notes = [...new Set(cluster.pools.map((/** @type {any} */ p) => p.notice).filter(Boolean))];
    fill(health, cluster.ready ? h("span.ready", {}, h("span.dot", {}), "ready") : h("a.warn", { href: "#/fleet" }, "Starting: see the fleet"), notes.length > 0 && h("span.notice", { title: notes.join(" ") }, "noise, not music: tiny checkpoint"));
    if (hasKey()) keyButton.hidden = false;
    setTimeout(look, cluster.ready ? 30000 : 3000);
  } catch {
    setTimeout(look, 5000);
  }
}

// -- keys

document.addEventListener("keydown", (event) => {
  const on = /** @type {HTMLElement} */ (event.target);
  const typing = on.matches?.("input, textarea, select, [contenteditable]");
  if (event.key === "Escape" && typing) { on.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === " " && !on.matches("button, a, summary")) { event.preventDefault(); player.toggle(); }
  if (event.key === "/") { const search = document.getElementById("search"); if (search) { event.preventDefault(); search.focus(); } }
  if ((event.key === "ArrowDown" || event.key === "ArrowUp") && document.getElementById("search")) library.walk(event);
});

window.addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => { if (document.hidden) library.rest(); else void library.poll(); });
route();
void look();
