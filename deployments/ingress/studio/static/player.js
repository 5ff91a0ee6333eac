// The player at the bottom: one song at a time, its versions switched in place, wherever one browses.

import { ACTIVE, at, getJob, short } from "./api.js";
import { h, fill, clock, toast } from "./dom.js";
import { Wave, peaksOf } from "./wave.js";

/** @typedef {import("./api.js").Short} Short */

/** Formats, the smallest first, and what a browser calls them. */
const KINDS = [["mp3", "audio/mpeg"], ["opus", "audio/ogg; codecs=opus"], ["aac", "audio/mp4"], ["flac", "audio/flac"], ["wav", "audio/wav"], ["wav24", "audio/wav"], ["wav32", "audio/wav"]];

/** Address of the file of one version that a browser plays best. @param {Short} job @param {number} index @returns {string | null} */
export function playable(job, index) {
  const files = (job.audio || []).filter((file) => file.index === index);
  const probe = document.createElement("audio");
  const known = KINDS.filter(([format, kind]) => files.some((file) => file.format === format) && probe.canPlayType(kind));
  return (files.find((file) => file.format === known[0]?.[0]) || files[0])?.url ?? null;
}

/** The versions of a song. @param {Short} job */
export const versionsOf = (job) => [...new Set((job.audio || []).map((file) => file.index))];

class Player {
  constructor() {
    this.audio = new Audio();
    this.audio.preload = "auto";
    /** @type {Short | null} */
    this.job = null;
    this.item = 0;
    /** It is heard while it is made. */
    this.live = false;
    this.turn = 0;
    /** @type {{start: number, end: number} | null} */
    this.loop = null;
    /** @type {() => Short[]} */
    this.queue = () => [];
    this.wave = new Wave();
    this.parts = /** @type {any} */ ({});
    for (const name of ["play", "pause", "ended", "loadedmetadata", "waiting", "playing"]) this.audio.addEventListener(name, () => this.show());
    this.audio.addEventListener("timeupdate", () => this.tick());
    this.audio.addEventListener("ended", () => { if (this.live) void this.look(); else this.next(); });
    this.audio.addEventListener("error", () => this.broken());
    document.addEventListener("job", (event) => this.heard(/** @type {CustomEvent} */ (event).detail));
  }

  /** @param {HTMLElement} bar */
  mount(bar) {
    this.bar = bar;
    const p = this.parts;
    p.play = h("button.play", { type: "button", onclick: () => this.toggle() });
    p.title = h("a.title", { href: "#/" });
    p.versions = h("span.versions", {});
    p.time = h("span.time", {});
    p.loop = h("button.quiet", { type: "button", "aria-pressed": "false", title: "Play a region again and again: drag on the waveform", onclick: () => this.setLooping(!this.wave.choosing) }, "Loop");
    p.volume = h("input.volume", { type: "range", min: 0, max: 1, step: 0.02, value: String(volume()), "aria-label": "Volume", oninput: () => this.setVolume() });
    p.next = h("button.quiet", { type: "button", title: "Next song", onclick: () => this.next() }, "Next");
    this.wave.addEventListener("seek", (e) => this.seek(/** @type {CustomEvent} */ (e).detail.time));
    this.wave.addEventListener("region", () => {
      this.loop = this.wave.regions[0] || null;
      if (this.loop) this.audio.currentTime = this.loop.start;
    });
    fill(bar, p.play, h("div.now", {}, p.title, p.versions), this.wave, p.time, p.loop, p.next, p.volume);
    this.setVolume();
    const session = navigator.mediaSession;
    if (session) {
      session.setActionHandler("play", () => this.toggle(true));
      session.setActionHandler("pause", () => this.toggle(false));
      session.setActionHandler("nexttrack", () => this.next());
      session.setActionHandler("seekto", (d) => { if (d.seekTime !== undefined) this.seek(d.seekTime); });
    }
    // Playing draws at the pace of the screen only where motion is welcome.
    const calm = matchMedia("(prefers-reduced-motion: reduce)");
    const frame = () => { if (!this.audio.paused && !calm.matches && !document.hidden) this.tick(); requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
  }

  /** Whether there is sound, or will be. */
  get on() { return !this.audio.paused && !this.audio.error; }

  /**
   * Play a song from its file, or while it is made.
   * @param {Short} job
   * @param {number} [index]
   */
  async play(job, index = 0) {
    const same = this.job?.id === job.id;
    if (same && index === this.item && this.audio.src) { this.toggle(); return; }
    if (!same) this.setLooping(false);
    await this.load(job, index, same && !this.live ? this.audio.currentTime : 0, ACTIVE.includes(job.state));
  }

  /**
   * @param {Short} job
   * @param {number} item
   * @param {number} time where to begin
   * @param {boolean} ask the server where its sound is by now
   */
  async load(job, item, time, ask) {
    const mine = ++this.turn;
    let live = null;
    if (ask) {
      try {
        const whole = await getJob(job.id);
        job = short(whole);
        live = ACTIVE.includes(job.state) ? whole.links.live[item] : null;
      } catch (error) {
        toast(error instanceof Error ? error.message : String(error), "bad");
        return;
      }
      if (mine !== this.turn) return; // something else was chosen meanwhile
    }
    const url = live || playable(job, item);
    if (!url) return;
    this.job = job;
    this.item = item;
    this.live = live !== null;
    this.start(url, this.live ? 0 : time, true);
  }

  /** @param {string} url @param {number} time @param {boolean} on */
  start(url, time, on) {
    const job = /** @type {Short} */ (this.job);
    const item = this.item;
    this.audio.src = at(url);
    if (time) this.audio.currentTime = time;
    /** @type {HTMLElement} */ (this.bar).hidden = false;
    document.body.classList.add("playing");
    this.parts.loop.disabled = this.live;
    this.wave.peaks = null;
    this.wave.show(time, job.duration);
    this.wave.draw();
    if (on) this.begin();
    this.show();
    if (!this.live) void peaksOf(job.id, item).then((found) => {
      if (this.job?.id === job.id && this.item === item) { this.wave.peaks = found; this.wave.draw(); }
    });
  }

  /** What cannot be played says so by an event of its own. */
  begin() {
    this.audio.play().catch((error) => { if (error.name === "NotAllowedError") toast("Press play: the browser wants to be asked first."); });
  }

  /** News of the song that plays. Of one that was heard while it was made, its file takes over. @param {Short} job */
  heard(job) {
    if (this.job?.id !== job.id) return;
    this.job = job;
    this.parts.title.textContent = titleOf(job);
    if (!this.live || ACTIVE.includes(job.state)) return;
    this.live = false;
    const { currentTime, ended } = this.audio;
    const url = playable(job, this.item);
    if (!url) {
      this.forget(job.id);
      toast(`What you heard was not finished: ${job.error || job.state}`, "bad");
    } else if (ended) this.next();
    else this.start(url, currentTime, this.on);
  }

  /** The live sound has ended, well or not: what became of the song? */
  async look() {
    const { job } = this;
    if (!job) return;
    try {
      this.heard(short(await getJob(job.id)));
    } catch { /* told below */ }
    if (this.live && this.audio.error) toast("The sound broke off; the song is made all the same. Press play to listen again.", "bad");
  }

  /** @param {number} time seconds */
  seek(time) {
    if (this.live) { toast("While it is made it plays from its start on; once it is done you can jump about in it."); return; }
    this.audio.currentTime = time;
    this.tick();
  }

  /** @param {boolean} [on] */
  toggle(on = !this.on) {
    if (!this.job) return;
    if (!on) this.audio.pause();
    else if (this.audio.error) void this.load(this.job, this.item, this.audio.currentTime, true); // its link may have expired
    else this.begin();
  }

  next() {
    if (this.loop && this.job) { this.audio.currentTime = this.loop.start; void this.audio.play(); return; }
    const list = this.queue().filter((job) => job.audio?.length);
    const here = list.findIndex((job) => job.id === this.job?.id);
    if (here >= 0 && here + 1 < list.length) void this.play(list[here + 1]);
  }

  /** @param {boolean} on */
  setLooping(on) {
    this.wave.choosing = on ? "one" : "";
    if (!on) { this.loop = null; this.wave.regions = []; }
    this.parts.loop.setAttribute("aria-pressed", String(on));
    this.wave.draw();
  }

  setVolume() {
    this.audio.volume = Number(this.parts.volume.value);
    try { localStorage.setItem("acestep-volume", this.parts.volume.value); } catch { /* then it lasts for this visit */ }
  }

  /** A song was deleted. @param {string} id */
  forget(id) {
    if (this.job?.id !== id) return;
    this.audio.pause();
    this.audio.removeAttribute("src");
    this.job = null;
    /** @type {HTMLElement} */ (this.bar).hidden = true;
    document.body.classList.remove("playing");
  }

  broken() {
    if (!this.job || !this.audio.src) return;
    this.show();
    if (this.live) void this.look();
    else toast("This song cannot be played: its link has expired, or the server is away. Press play to try again.", "bad");
  }

  tick() {
    const { audio } = this;
    if (this.loop && audio.currentTime >= this.loop.end) audio.currentTime = this.loop.start;
    const duration = isFinite(audio.duration) && !this.live ? audio.duration : this.job?.duration || 0;
    this.wave.show(audio.currentTime, duration);
    const waits = this.live && this.on && !audio.ended && audio.readyState < HTMLMediaElement.HAVE_FUTURE_DATA;
    const said = waits ? "waits for its sound" : `${clock(audio.currentTime)} / ${duration ? clock(duration) : "…"}`;
    if (this.parts.time.textContent !== said) this.parts.time.textContent = said;
    document.dispatchEvent(new CustomEvent("playing-at", { detail: { id: this.job?.id, item: this.item, time: this.audio.currentTime } }));
  }

  show() {
    const job = this.job;
    if (!job) return;
    const p = this.parts;
    const { on } = this;
    p.play.classList.toggle("on", on);
    p.play.setAttribute("aria-label", on ? "Pause" : "Play");
    p.title.textContent = titleOf(job);
    p.title.href = `#/song/${job.id}`;
    const versions = versionsOf(job);
    fill(p.versions, versions.length > 1 && versions.map((i) =>
      h("button.version", { type: "button", "aria-pressed": String(i === this.item), "aria-label": `Version ${i + 1}`, onclick: () => this.play(job, i) }, String(i + 1))));
    this.tick();
    if (navigator.mediaSession) {
      navigator.mediaSession.metadata = new MediaMetadata({ title: titleOf(job), artist: "ACE-Step 1.5" });
      navigator.mediaSession.playbackState = on ? "playing" : "paused";
    }
    document.dispatchEvent(new CustomEvent("player-changed"));
  }

  /** @param {string} id @param {number} [index] */
  plays(id, index) {
    return this.job?.id === id && this.on && (index === undefined || index === this.item);
  }
}

function volume() {
  try { return Number(localStorage.getItem("acestep-volume") ?? 1); } catch { return 1; }
}

/** What a song is called: its title, else the start of its wish. @param {Short} job */
export function titleOf(job) {
  const text = job.title || job.prompt || (job.task && job.task !== "text2music" ? `${job.task} of a song` : job.kind === "plan" ? "A plan" : "A song");
  const line = text.trim().split("\n")[0];
  return line.length > 80 ? `${line.slice(0, 79)}…` : line;
}

export const player = new Player();
