// The fleet: pools, their cards, what runs and waits, and why each is as it is.

import { call, Refused } from "./api.js";
import { h, fill, about } from "./dom.js";

const ROLE = /** @type {Record<string, string>} */ ({ plan: "Planner", render: "Renderer" });

/** @param {HTMLElement} main @param {AbortSignal} gone */
export function showFleet(main, gone) {
  const box = h("div.fleet", {}, h("p.muted", {}, "Looking …"));
  fill(main, h("h1", {}, "Fleet"), box);
  /** @type {Set<string>} */
  const open = new Set();
  const look = async () => {
    if (gone.aborted) return;
    try {
      if (!document.hidden) draw(box, await call("v1/cluster", { signal: gone }), open);
    } catch (error) {
      if (error instanceof Refused && error.status) fill(box, h("p.error", {}, error.message));
    }
    if (!gone.aborted) setTimeout(look, 2000);
  };
  void look();
}

/** @param {HTMLElement} box @param {any} fleet @param {Set<string>} open */
function draw(box, fleet, open) {
  const jobs = fleet.jobs || {};
  fill(
    box,
    h("div.tiles", {},
      tile(fleet.ready ? "Ready" : "Not ready", fleet.ready ? "both stages can serve" : (fleet.missing || []).join("; ") || "something is missing", fleet.ready ? "good" : "bad"),
      tile(String(jobs.running || 0), "jobs running"),
      tile(String(jobs.queued || 0), "jobs waiting"),
      tile(String(jobs.succeeded || 0), "made"),
      tile(String(jobs.failed || 0), "failed", jobs.failed ? "warn" : "")),
    fleet.ready || !(fleet.missing || []).length ? null : h("ul.error", {}, fleet.missing.map((/** @type {string} */ text) => h("li", {}, text))),
    h("h2", {}, "Pools"),
    h("div.pools", {}, fleet.pools.map((/** @type {any} */ pool) => poolCard(pool, open))),
    h("h2", {}, "Machines"),
    h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Machines" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Name", "Tier", "Cards", "Cores", "Labels"].map((t) => h("th", { scope: "col" }, t)))),
      h("tbody", {}, fleet.nodes.map((/** @type {any} */ node) => h("tr", {}, h("td", {}, node.name), h("td", {}, node.tier || "–"), h("td", {}, node.gpus), h("td", {}, node.cpus),
        h("td.wrap", {}, Object.entries(node.labels).map(([k, v]) => `${k}=${v}`).join(" ") || "–")))))),
  );
}

/** @param {string} big @param {string} small @param {string} [kind] */
const tile = (big, small, kind = "") => h(`div.tile${kind ? `.${kind}` : ""}`, {}, h("strong", {}, big), h("span", {}, small));

/** @param {any} pool @param {Set<string>} open */
function poolCard(pool, open) {
  const { running, starting, target } = pool.replicas;
  const load = pool.backlog;
  const settings = Object.entries(pool.settings || {});
  const details = h("details", { ontoggle: (/** @type {any} */ e) => (e.target.open ? open.add(pool.name) : open.delete(pool.name)) },
    h("summary", {}, "Settings and limits"),
    table(settings.map(([name, value]) => [name, value && typeof value === "object" && "value" in value ? [show(value.value), value.reason || value.why] : [show(value), ""]])),
    pool.limits && table(Object.entries(pool.limits).map(([name, value]) => [name, [show(value), ""]])),
    pool.stats && table(Object.entries(pool.stats).map(([name, value]) => [name, [show(value), ""]])));
  details.open = open.has(pool.name);
  return h("article.pool", {},
    h("header", {}, h("h3", {}, pool.name), h("span.tag", {}, ROLE[pool.role] || pool.role), h(`span.tag.${running ? "good" : "warn"}`, {}, pool.status.toLowerCase())),
    h("dl", {},
      row("Model", pool.model || "not loaded yet"),
      row("Card", [pool.device || (pool.tiers.length ? `waits for ${pool.tiers.join(" or ")}` : "–"), pool.tier && ` (${pool.tier}${pool.memory_gib ? `, ${pool.memory_gib.toFixed(1)} GiB` : ""})`]),
      row("Replicas", `${running} running${starting ? `, ${starting} starting` : ""}${target !== running ? `, ${target} wanted` : ""} (${pool.scale.min} to ${pool.scale.max})`),
      row("Runs", load.running_jobs ? `${load.running_jobs} jobs, ${about(load.running_s)} left` : "nothing"),
      row("Waits", load.waiting_s ? about(load.waiting_s) : "nothing"),
      pool.reason && row("Why not", pool.reason),
      pool.notice && row("Note", pool.notice),
      pool.disabled && row("Off", pool.disabled)),
    (pool.warnings || []).map((/** @type {string} */ text) => h("p.warn", {}, text)),
    details);
}

/** @param {string} name @param {any} value */
const row = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
/** @param {any} value */
const show = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
/** @param {[string, [string, string]][]} rows */
const table = (rows) => rows.length ? h("table.small", {}, h("tbody", {}, rows.map(([name, [value, why]]) => h("tr", {}, h("th", { scope: "row" }, name), h("td.wrap", {}, value), h("td.wrap.muted", {}, why))))) : null;
