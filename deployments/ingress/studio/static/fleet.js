// The fleet: what it made in the last hour, pools, their cards, what runs and waits, and why each is as it is.

import { call, Refused } from "./api.js";
import { h, fill, about, moment } from "./dom.js";

const ROLE = /** @type {Record<string, string>} */ ({ plan: "Planner", render: "Renderer" });
const LOOK_MS = 2000;
const HOUR_MS = 20000;

/** @param {HTMLElement} main @param {AbortSignal} gone */
export function showFleet(main, gone) {
  const view = new FleetView();
  fill(main, h("div.bar", {}, h("h1", {}, "Fleet"), view.links), view.problem, view.box);
  const every = async (/** @type {number} */ pause, /** @type {() => Promise<void>} */ look) => {
    if (gone.aborted) return;
    try {
      if (!document.hidden) await look();
    } catch (error) {
      if (!gone.aborted && error instanceof Refused && error.status) view.say(error.message);
    }
    if (!gone.aborted) setTimeout(() => void every(pause, look), pause);
  };
  void every(LOOK_MS, async () => view.draw(await call("v1/cluster", { signal: gone })));
  void every(HOUR_MS, async () => view.drawHour(await call("v1/cluster/throughput", { signal: gone })));
}

class FleetView {
  constructor() {
    this.links = h("nav.links", { "aria-label": "More of this server" });
    this.problem = h("p.error", { role: "alert", hidden: true });
    this.tiles = h("div.tiles", {});
    this.missing = h("ul.error", { hidden: true });
    this.hour = h("div.hour", {}, h("p.muted", {}, "Looking …"));
    this.pools = h("div.pools", {});
    this.nodes = h("tbody", {});
    /** @type {Map<string, PoolCard>} */
    this.cards = new Map();
    this.box = h("div.fleet", {},
      this.tiles, this.missing, h("h2", {}, "The last hour"), this.hour, h("h2", {}, "Pools"), this.pools, h("h2", {}, "Machines"),
      h("div.scroll.machines", { tabindex: "0", role: "region", "aria-label": "Machines" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Name", "Tier", "Cards", "Cores", "Labels", "Metrics"].map((t) => h("th", { scope: "col" }, t)))), this.nodes)));
  }

  /** @param {string} text */
  say(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  /** @param {any} fleet */
  draw(fleet) {
    this.say("");
    const { jobs, missing } = fleet;
    renew(this.links, [link("API", "docs"), link("Dashboard", fleet.dashboard)]);
    renew(this.tiles, [
      tile(fleet.ready ? "Ready" : "Not ready", fleet.ready ? "both stages can serve" : missing.join("; ") || "something is missing", fleet.ready ? "good" : "bad"),
      tile(jobs.running, "jobs running"), tile(jobs.queued, "jobs waiting"), tile(jobs.succeeded, "made"), tile(jobs.failed, "failed", jobs.failed ? "warn" : "")]);
    renew(this.missing, missing.map((/** @type {string} */ text) => h("li", {}, text)));
    this.missing.hidden = fleet.ready || !missing.length;
    const names = new Set(fleet.pools.map((/** @type {any} */ pool) => pool.name));
    for (const [name, card] of this.cards) if (!names.has(name)) { card.element.remove(); this.cards.delete(name); }
    for (const pool of fleet.pools) {
      let card = this.cards.get(pool.name);
      if (!card) {
        this.cards.set(pool.name, card = new PoolCard());
        this.pools.append(card.element);
      }
      card.draw(pool);
    }
    renew(this.nodes, fleet.nodes.map((/** @type {any} */ node) => h("tr", {}, h("td", {}, node.name), h("td", {}, node.tier || "–"), h("td", {}, node.gpus), h("td", {}, node.cpus),
      h("td.wrap", {}, Object.entries(node.labels).map(([k, v]) => `${k}=${v}`).join(" ") || "–"), h("td", {}, link("metrics", node.metrics) || "–"))));
  }

  /** @param {{minutes: any[], errors: {type: string, count: number}[]}} hour */
  drawHour({ minutes, errors }) {
    const sum = (/** @type {string} */ name) => minutes.reduce((all, minute) => all + minute[name], 0);
    const [made, failed, cancelled] = [sum("succeeded"), sum("failed"), sum("cancelled")];
    const most = Math.max(4, ...minutes.map((m) => m.succeeded + m.failed));
    const part = (/** @type {string} */ kind, /** @type {number} */ n) => {
      const bar = h(`i.${kind}`, {});
      bar.style.height = `${(100 * n) / most}%`;
      return n ? bar : null;
    };
    const told = `${made} made${failed ? `, ${failed} failed` : ""}${cancelled ? `, ${cancelled} cancelled` : ""}${made ? `, ${about(sum("audio_s"))} of sound` : ""}`;
    fill(this.hour,
      h("figure", {},
        h("div.bars", { role: "img", "aria-label": `Jobs that ended in each minute of the last hour: ${told}` }, h("span.most", {}, most),
          minutes.map((m) => h("span", { title: `${moment(m.at)}: ${m.succeeded} made, ${m.failed} failed` }, part("failed", m.failed), part("made", m.succeeded)))),
        h("div.axis", { "aria-hidden": "true" }, h("span", {}, "an hour ago"), h("span", {}, "jobs a minute"), h("span", {}, "now"))),
      h("div", {}, h("p.sum", {}, told), errors.length > 0 && h("ul.errors", { "aria-label": "Errors by type" }, errors.map((error) => h("li", {}, h("span", {}, error.type.replaceAll("_", " ")), h("strong", {}, error.count))))));
  }
}

/** A pool, kept as it is while what it shows changes: who reads its settings keeps place and focus. */
class PoolCard {
  constructor() {
    this.head = h("header", {});
    this.facts = h("dl", {});
    this.warnings = h("div", {});
    this.settings = h("div", {});
    this.details = h("details", { ontoggle: () => this.drawSettings() }, h("summary", {}, "Settings and limits"), this.settings);
    this.element = h("article.pool", {}, this.head, this.facts, this.warnings, this.details);
  }

  /** @param {any} pool */
  draw(pool) {
    this.pool = pool;
    const { running, starting, target } = pool.replicas;
    const load = pool.backlog;
    renew(this.head, [h("h3", {}, pool.name), h("span.tag", {}, ROLE[pool.role]), h(`span.tag.${running ? "good" : "warn"}`, {}, running || pool.status !== "RUNNING" ? pool.status.toLowerCase().replaceAll("_", " ") : starting ? "starting" : target ? "waits" : "at rest")]);
    renew(this.facts, [
      row("Model", pool.model || "not loaded yet"),
      row("Card", [pool.device || (pool.tiers.length ? `waits for ${pool.tiers.join(" or ")}` : "–"), pool.tier && ` (${pool.tier}${pool.memory_gib ? `, ${pool.memory_gib.toFixed(1)} GiB` : ""})`]),
      row("Replicas", `${running} running${starting ? `, ${starting} starting` : ""}${target !== running ? `, ${target} wanted` : ""} (${pool.scale.min} to ${pool.scale.max})`),
      row("Runs", load.running_jobs ? `${load.running_jobs} ${load.running_jobs === 1 ? "job" : "jobs"}, ${about(load.running_s)} left` : "nothing"),
      row("Waits", load.waiting_s ? about(load.waiting_s) : "nothing"),
      pool.reason && row("Why not", pool.reason),
      pool.notice && row("Note", pool.notice),
      pool.disabled && row("Off", pool.disabled)]);
    renew(this.warnings, (pool.warnings || []).map((/** @type {string} */ text) => h("p.warn", {}, text)));
    this.drawSettings();
  }

  drawSettings() {
    if (!this.details.open) return;
    const { settings = {}, limits = {}, stats = {} } = this.pool;
    const plain = (/** @type {any} */ values) => Object.entries(values || {}).map(([name, value]) => [name, show(value), ""]);
    renew(this.settings, [
      table(Object.entries(settings || {}).map(([name, value]) => (value && typeof value === "object" && "value" in value ? [name, show(value.value), value.reason || value.why] : [name, show(value), ""]))),
      table(plain(limits)), table(plain(stats))]);
  }
}

/** Replace what stands there, where it says something else. @param {HTMLElement} place @param {any[]} children */
function renew(place, children) {
  const shown = document.createElement(place.tagName);
  fill(shown, children);
  if (place.innerHTML !== shown.innerHTML) place.replaceChildren(...shown.childNodes);
}

/** A link that leads somewhere from here: an address of the server's own machine does so only on that machine. @param {string} text @param {string | null | undefined} url */
function link(text, url) {
  if (!url) return null;
  const to = new URL(url, document.baseURI);
  const own = (/** @type {string} */ host) => /^(localhost|127\..*|\[::1\])$/.test(host);
  if (own(to.hostname) && !own(location.hostname)) return null;
  return h("a", { href: to.href, target: "_blank", rel: "noopener" }, text);
}

/** @param {any} big @param {string} small @param {string} [kind] */
const tile = (big, small, kind = "") => h(`div.tile${kind ? `.${kind}` : ""}`, {}, h("strong", {}, big), h("span", {}, small));
/** @param {string} name @param {any} value */
const row = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
/** @param {any} value */
const show = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
/** @param {any[][]} rows */
const table = (rows) => rows.length ? h("table.small", {}, h("tbody", {}, rows.map(([name, value, why]) => h("tr", {}, h("th", { scope: "row" }, name), h("td.wrap", {}, value), h("td.wrap.muted", {}, why))))) : null;
