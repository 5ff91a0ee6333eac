// The library: the key's own songs, newest first, each with its life, kept true by the server's events.

import { ACTIVE, Refused, cancelJob, changeJob, follow, getJob, listJobs, short } from "./api.js";
import { about, clock, fill, h, moment, toast } from "./dom.js";
import { Feed } from "./feed.js";
import { player, titleOf, versionsOf } from "./player.js";
import { Sketch } from "./wave.js";

/** @typedef {import("./api.js").Job} Job */
/** @typedef {import("./api.js").Short} Short */

const STREAMS = 2; // a browser holds six connections to a server, for all its tabs
const POLL_MS = 2500;
const STAGES = /** @type {Record<string, string>} */ ({ queued: "waits", planning: "planning", planned: "planned, waits for a renderer", rendering: "rendering", decoding: "decoding", encoding: "encoding" });
/** What the list can be cut down to. @type {[string, string, Record<string, string>, (job: Short) => boolean][]} */
const FILTERS = [
  ["all", "All", {}, () => true],
  ["work", "In work", { state: "queued,running" }, (job) => ACTIVE.includes(job.state)],
  ["made", "Made", { state: "succeeded" }, (job) => job.state === "succeeded"],
  ["failed", "Not made", { state: "failed,cancelled" }, (job) => ["failed", "cancelled"].includes(job.state)],
  ["favourite", "Favourites", { favourite: "true" }, (job) => !!job.favourite],
];

export class Library {
  constructor() {
    /** @type {Map<string, Short>} */
    this.jobs = new Map();
    /** Those that stand in the page. @type {Map<string, HTMLElement>} */
    this.cards = new Map();
    /** @type {Map<string, () => void>} */
    this.streams = new Map();
    /** Which of them the list shows, as the server found them. @type {Set<string>} */
    this.found = new Set();
    /** @type {string | null} */
    this.cursor = null;
    this.done = false;
    this.asked = 0;
    this.q = "";
    this.filter = FILTERS[0];
    this.feed = new Feed("Songs", (id) => this.card(/** @type {Short} */ (this.jobs.get(id))));
    this.foot = h("p.muted.foot", {});
    this.end = new IntersectionObserver((seen) => { if (seen.some((e) => e.isIntersecting)) void this.more(); }, { rootMargin: "600px" });
    player.queue = () => this.shown();
    document.addEventListener("player-changed", () => this.mark());
    setInterval(() => void this.poll(), POLL_MS);
  }

  /** What the list shows, newest first. */
  shown() {
    const [, , , fits] = this.filter;
    const jobs = [...this.jobs.values()].filter((job) => (job.kind === "song" || job.kind === "plan") && fits(job) && (!this.q || this.found.has(job.id)));
    return jobs.sort((a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : -1));
  }

  /** Forget everything, such as after another key. */
  reset() {
    this.streams.forEach((stop) => stop());
    this.streams.clear();
    this.jobs.clear();
    this.cards.clear();
    this.search();
  }

  /** Begin the list anew. */
  search() {
    this.found.clear();
    this.cursor = null;
    this.done = false;
    this.asked += 1;
    this.loading = false;
    this.draw();
    void this.more();
  }

  /** @param {HTMLElement} place */
  show(place) {
    const search = h("input", { type: "search", maxlength: 200, placeholder: "Search words and lyrics ( / )", "aria-label": "Search songs", value: this.q, oninput: (/** @type {any} */ e) => {
      this.q = e.target.value.trim();
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.search(), 250);
    } });
    search.id = "search";
    const select = h("select", { "aria-label": "Which songs", onchange: (/** @type {any} */ e) => { this.filter = FILTERS.find(([name]) => name === e.target.value) || FILTERS[0]; this.search(); } }, FILTERS.map((f) => h("option", { value: f[0], selected: f === this.filter }, f[1])));
    fill(place, h("div.bar", {}, h("h2", {}, "Your songs"), search, select), this.feed.list, this.foot);
    this.end.disconnect();
    this.end.observe(this.foot);
    this.draw();
    if (!this.jobs.size) void this.more();
  }

  async more() {
    if (this.loading || this.done) return;
    this.loading = true;
    const asked = this.asked;
    this.foot.textContent = "Looking …";
    const { state, ...query } = this.filter[2];
    const params = [["view", "short"], ["limit", "50"], ...Object.entries(query), ...(state ? state.split(",").map((s) => ["state", s]) : []), ...(this.q ? [["q", this.q]] : []), ...(this.cursor ? [["cursor", this.cursor]] : [])];
    try {
      const page = await listJobs(params);
      if (asked !== this.asked) return;
      for (const job of page.jobs) { this.found.add(job.id); this.put(job, false); }
      this.cursor = page.next;
      this.done = !page.next;
      this.loading = false;
      this.draw();
      if (!this.done && this.foot.getBoundingClientRect().top < window.innerHeight + 600) void this.more();
    } catch (error) {
      if (asked !== this.asked) return;
      this.loading = false;
      this.foot.textContent = error instanceof Refused ? error.message : "The list could not be read.";
      if (error instanceof Refused && error.status !== 401) setTimeout(() => void this.more(), 1000 * (error.retryAfter || 3));
    }
  }

  /** @param {Job | Short} job @param {boolean} [draw] */
  put(job, draw = true) {
    const now = short(job);
    const known = this.jobs.get(now.id);
    if (known?.finished_at && !now.finished_at) return; // an answer that was overtaken
    this.jobs.set(now.id, now);
    if (!known) this.found.add(now.id);
    if (draw) { known ? this.redraw(now) : this.draw(); }
    document.dispatchEvent(new CustomEvent("job", { detail: now }));
    if (known && known.state !== now.state && draw) this.draw();
    if ("links" in job) this.attend(/** @type {Job} */ (job));
    else if (!ACTIVE.includes(now.state)) this.leave(now.id);
    else if (!document.hidden && !this.streams.has(now.id) && this.streams.size < STREAMS) void this.refresh(now.id);
  }

  /** Follow what is not over, few at a time. @param {Job} job */
  attend(job) {
    if (!ACTIVE.includes(job.state)) { this.leave(job.id); return; }
    if (document.hidden || this.streams.has(job.id) || this.streams.size >= STREAMS) return;
    this.streams.set(job.id, follow(job, (event, data) => {
      const now = this.jobs.get(job.id);
      if (event === "lost") { this.leave(job.id); return; }
      if (event === "progress" && now) {
        const { stage, done, total } = data;
        this.put({ ...now, state: "running", stage, progress: { stage, done, total } });
      } else void this.refresh(job.id);
    }));
  }

  /** Nobody looks: what was followed is asked for when somebody does. */
  rest() {
    for (const id of [...this.streams.keys()]) this.leave(id);
  }

  /** @param {string} id */
  leave(id) {
    this.streams.get(id)?.();
    this.streams.delete(id);
  }

  /** @param {string} id */
  async refresh(id) {
    try {
      this.put(await getJob(id));
    } catch (error) {
      if (error instanceof Refused && error.status === 404) this.drop(id);
    }
  }

  /** What has no stream of its own is asked for; so are places and arrival times, which no event tells. */
  async poll() {
    if (document.hidden) return;
    const waiting = [...this.jobs.values()].filter((job) => ACTIVE.includes(job.state));
    if (!waiting.length) return;
    try {
      const page = await listJobs([["view", "short"], ["state", "queued"], ["state", "running"], ["limit", "200"]]);
      const there = new Set(page.jobs.map((job) => job.id));
      page.jobs.forEach((job) => this.put(job));
      for (const job of waiting) if (!there.has(job.id)) await this.refresh(job.id);
    } catch { /* api.js tells; the next look may do */ }
  }

  /** @param {string} id */
  drop(id) {
    this.leave(id);
    this.jobs.delete(id);
    this.cards.get(id)?.remove();
    this.cards.delete(id);
    player.forget(id);
    this.draw();
  }

  draw() {
    const jobs = this.shown();
    for (const [id, card] of this.cards) if (!card.isConnected) this.cards.delete(id);
    this.feed.show(jobs.map((job) => job.id), this.done);
    if (!this.loading) this.foot.textContent = jobs.length ? (this.done ? "" : "Scroll for more") : !this.done ? "Looking …" : this.q || this.filter !== FILTERS[0] ? "Nothing matches." : "No songs yet. Write a wish and press Enter.";
  }

  /** @param {Short} job @returns {HTMLElement} */
  card(job) {
    const known = this.cards.get(job.id);
    if (known) return known;
    const card = h("article.song", { tabindex: "-1", data: { id: job.id } });
    this.cards.set(job.id, card);
    this.redraw(job);
    return card;
  }

  /** @param {Short} job */
  redraw(job) {
    const card = this.cards.get(job.id);
    if (!card) return;
    const versions = versionsOf(job);
    const made = versions.length > 0;
    const heard = made || canBeHeard(job);
    card.dataset.state = job.state;
    const key = JSON.stringify([job.state, job.stage, job.progress, job.position, job.eta_s && Math.round(job.eta_s), job.error, job.cancel_requested, job.title, job.favourite, player.plays(job.id), player.item]);
    if (card.dataset.drawn === key) return;
    card.dataset.drawn = key;
    const focus = card.contains(document.activeElement) ? /** @type {HTMLElement} */ (document.activeElement).dataset.act : null;
    fill(
      card,
      heard
        ? h(`button.play${player.plays(job.id) ? ".on" : ""}${made ? "" : ".live"}`, { type: "button", data: { act: "play" }, title: made ? null : "Listen while it is made", "aria-label": `${player.plays(job.id) ? "Pause" : made ? "Play" : "Listen to"} ${titleOf(job)}`, onclick: () => void player.play(job, player.job?.id === job.id ? player.item : versions[0] || 0) })
        : h("span.state", { "aria-hidden": "true" }, job.state === "failed" ? "!" : job.state === "cancelled" ? "×" : job.kind === "plan" ? "≡" : "…"),
      h("div.about", {},
        h("a.title", { href: `#/song/${job.id}`, dir: "auto", data: { act: "title" } }, titleOf(job)),
        h("p.muted", {}, describe(job)),
        job.state === "running" && progress(job),
        job.error && h("p.error", {}, job.error)),
      made && new Sketch(job.id, versions[0]),
      h("div.acts", {},
        versions.length > 1 && versions.map((i) => h("button.version", { type: "button", data: { act: `v${i}` }, "aria-pressed": String(player.plays(job.id, i)), "aria-label": `Play version ${i + 1}`, onclick: () => void player.play(job, i) }, String(i + 1))),
        ACTIVE.includes(job.state) && h("button.quiet", { type: "button", data: { act: "cancel" }, disabled: job.cancel_requested, onclick: () => void this.cancel(job) }, job.cancel_requested ? "Stopping …" : "Cancel"),
        (job.state === "failed" || job.state === "cancelled") && h("button.quiet", { type: "button", data: { act: "again" }, onclick: () => void this.again(job.id) }, "Try again"),
        made && h("button.quiet.heart", { type: "button", data: { act: "like" }, "aria-pressed": String(!!job.favourite), "aria-label": "Favourite", onclick: () => void this.change(job.id, { favourite: !job.favourite }) }, job.favourite ? "♥\ufe0e" : "♡\ufe0e")),
    );
    if (focus) /** @type {HTMLElement | null} */ (card.querySelector(`[data-act="${focus}"]`))?.focus();
  }

  mark() {
    for (const id of this.cards.keys()) {
      const job = this.jobs.get(id);
      if (job) this.redraw(job);
    }
  }

  /** @param {string} id */
  async again(id) {
    try {
      document.dispatchEvent(new CustomEvent("remake", { detail: { job: await getJob(id), how: "same" } }));
    } catch (error) {
      toast(error instanceof Error ? error.message : String(error), "bad");
    }
  }

  /** @param {string} id @param {{title?: string | null, favourite?: boolean}} changes */
  async change(id, changes) {
    try {
      this.put(await changeJob(id, changes));
    } catch (error) {
      toast(error instanceof Error ? error.message : String(error), "bad");
    }
  }

  /** @param {{id: string}} asked */
  async cancel({ id }) {
    const job = this.jobs.get(id);
    if (job) this.put({ ...job, cancel_requested: true });
    try {
      this.put(await cancelJob(id));
    } catch (error) {
      toast(error instanceof Error ? error.message : String(error), "bad");
      void this.refresh(id);
    }
  }

  /** Keyboard: arrows walk the list. @param {KeyboardEvent} event */
  walk(event) {
    const next = this.feed.beside(document.activeElement, event.key === "ArrowDown" ? 1 : -1);
    if (!next) return;
    event.preventDefault();
    /** @type {HTMLElement | null} */ (next.querySelector("a.title"))?.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest", behavior: "instant" });
  }
}

/** Whether a song that is not made yet may have sound by now. @param {{kind: string, state: string}} job */
export const canBeHeard = (job) => job.kind === "song" && job.state === "running";

/** One line on a job. @param {Short} job */
export function describe(job) {
  if (job.state === "queued" && job.stage !== "planned") {
    const place = job.position ? `${job.position === 1 ? "next" : `number ${job.position}`} in the queue` : "waits";
    return job.eta_s ? `${place} · done in about ${about(job.eta_s)}` : place;
  }
  if (ACTIVE.includes(job.state)) {
    const p = job.progress;
    const stage = job.stage || "queued";
    const unit = /** @type {Record<string, string>} */ ({ planning: "codes", rendering: "steps" })[stage] || "parts";
    const how = p && p.total && p.stage === stage ? `, ${p.done} of ${p.total} ${unit}` : "";
    return `${STAGES[stage] || stage}${how}${job.eta_s ? ` · done in about ${about(job.eta_s)}` : ""}`;
  }
  if (job.state === "cancelled") return `cancelled ${moment(job.finished_at || job.created_at)}`;
  if (job.state === "failed") return `failed ${moment(job.finished_at || job.created_at)}`;
  return [job.kind === "plan" ? "a plan" : job.duration && clock(job.duration), job.bpm && `${job.bpm} bpm`, job.key_scale, moment(job.created_at)].filter(Boolean).join(" · ");
}

/** @param {Short} job */
function progress(job) {
  const p = job.progress;
  const bar = h("progress", { max: "1", "aria-label": "Progress" });
  if (p && p.total && p.stage === job.stage) bar.value = p.done / p.total;
  return bar;
}
