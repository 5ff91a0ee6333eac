// The server's public HTTP API, and what can go wrong with it. Nothing else of the page knows a path or a key.

/** @typedef {{id: string, kind: string, state: string, stage: string, progress: any, position: number, eta_s: number | null, cost: any, usage: any,
 *   created_at: number, started_at: number | null, finished_at: number | null, cancel_requested: boolean, attempts: number, placement: any,
 *   request: Record<string, any>, seeds: number[], warnings: any[], plan: any, error: any, result: any, links: {self: string, events: string, live: string[]}, notice: string | null,
 *   lineage?: {verb: Verb | null, parents: {job: string, item: number, field: string}[], regions: {start: number, end: number}[]} | null}} Job */

/** @typedef {"replace" | "extend" | "vary" | "cover" | "layer" | "stem"} Verb what can be made of a song */

/** A job in few words, as lists have it; what is empty is left out. `whole`: all of it, where it was asked for.
 * @typedef {{id: string, kind: string, state: string, stage?: string, progress?: any, position?: number, eta_s?: number, title?: string, favourite?: boolean,
 *   labels?: string[], prompt?: string, task?: string, duration?: number, bpm?: number, key_scale?: string, created_at: number, finished_at?: number,
 *   cancel_requested?: boolean, error?: string, audio?: {index: number, format: string, url: string}[]}} Short */

export const ACTIVE = ["queued", "running"];
const NAME = "acestep-key";
const base = new URL(".", document.baseURI);

/** What the server refused, or why it could not be asked. `status` 0: no answer came. */
export class Refused extends Error {
  /**
   * @param {number} status
   * @param {string} message
   * @param {{field?: string, message: string}[]} [errors]
   * @param {number | null} [retryAfter] seconds
   */
  constructor(status, message, errors = [], retryAfter = null) {
    super(message);
    this.status = status;
    this.errors = errors;
    this.retryAfter = retryAfter;
  }
}

let key = read(sessionStorage) || read(localStorage);

/** @param {Storage} store */
function read(store) {
  try { return store.getItem(NAME) || ""; } catch { return ""; }
}

export const hasKey = () => key !== "";

/**
 * @param {string} value empty: forget it
 * @param {boolean} keep beyond this tab
 */
export function setKey(value, keep) {
  key = value.trim();
  for (const store of [sessionStorage, localStorage]) {
    try { store.removeItem(NAME); } catch { /* storage is switched off: the key lives in memory */ }
  }
  try { if (key) (keep ? localStorage : sessionStorage).setItem(NAME, key); } catch { /* the same */ }
}

/** A path of the API as this page reaches it, also behind a proxy's prefix. @param {string} path */
export const at = (path) => new URL(path, base).href;

/** Called with "away" | "back" | "key". @type {(what: string) => void} */
let tell = () => {};
/** @param {(what: string) => void} listener */
export function onTrouble(listener) { tell = listener; }

let away = false;

/**
 * Ask the server.
 * @param {string} path relative, such as `v1/jobs`
 * @param {{method?: string, body?: any, headers?: Record<string, string>, signal?: AbortSignal}} [options] a body that is no FormData is sent as JSON
 * @returns {Promise<any>}
 */
export async function call(path, options = {}) {
  /** @type {Record<string, string>} */
  const headers = { Accept: "application/json", ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let body = options.body;
  if (body !== undefined && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(at(path), { method: options.method || "GET", headers, body, signal: options.signal, cache: "no-store" });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    if (!away) { away = true; tell("away"); }
    throw new Refused(0, "The server does not answer. This page tries again by itself.");
  }
  const text = await answer.text();
  let said = null;
  try { said = text ? JSON.parse(text) : null; } catch { /* told below */ }
  if (away && answer.status < 500) { away = false; tell("back"); }
  if (answer.ok) {
    if (text && said === null) throw new Refused(answer.status, "The server's answer could not be read.");
    return said;
  }
  const wait = Number(answer.headers.get("Retry-After"));
  const retry = isFinite(wait) && wait > 0 ? wait : null;
  if (answer.status === 401) tell("key");
  if (answer.status === 503 && said === null) {
    if (!away) { away = true; tell("away"); }
  }
  const errors = Array.isArray(said?.errors) ? said.errors : [];
  const detail = typeof said?.detail === "string" ? said.detail : said?.title;
  throw new Refused(answer.status, detail || `The server answered ${answer.status}.`, errors, retry);
}

/** A key that makes a submit safe to send again. */
const once = () => `page-${Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("")}`;

/**
 * Submit, and again until an answer comes: the same key gives the same job.
 * @param {string} path
 * @param {any} body
 * @returns {Promise<Job>}
 */
export async function submit(path, body) {
  const headers = { "Idempotency-Key": once() };
  for (let pause = 500; ; pause = Math.min(5000, 2 * pause)) {
    try {
      return await call(path, { method: "POST", body, headers });
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 0) throw error;
      await new Promise((done) => setTimeout(done, pause));
    }
  }
}

/** Make something of a song. @param {string} id @param {Verb} verb @param {any} body */
export const edit = (id, verb, body) => submit(`v1/jobs/${encodeURIComponent(id)}/${verb}`, body);

/** @param {string} id @returns {Promise<Job>} */
export const getJob = (id) => call(`v1/jobs/${encodeURIComponent(id)}`);
/** @param {string} id @param {{title?: string | null, favourite?: boolean, labels?: string[]}} changes @returns {Promise<Job>} */
export const changeJob = (id, changes) => call(`v1/jobs/${encodeURIComponent(id)}`, { method: "PATCH", body: changes });
/** Forget a job with its audio. @param {string} id */
export const purgeJob = (id) => call(`v1/jobs/${encodeURIComponent(id)}?purge=true`, { method: "DELETE" });
/** A page of jobs in few words. @param {string[][]} query names and values @returns {Promise<{jobs: Short[], next: string | null}>} */
export const listJobs = (query) => call(`v1/jobs?${new URLSearchParams(query)}`);

/** A whole job in few words. @param {any} job @returns {Short} */
export function short(job) {
  if (!job.links) return job;
  const meta = job.plan?.metadata || {};
  const items = job.result?.items || [];
  return {
    id: job.id, kind: job.kind, state: job.state, stage: job.stage, progress: job.progress, position: job.position, eta_s: job.eta_s, title: job.title, favourite: job.favourite, labels: job.labels,
    prompt: job.request.prompt, task: job.request.task, duration: items[0]?.duration ?? meta.duration, bpm: meta.bpm, key_scale: meta.keyscale, created_at: job.created_at, finished_at: job.finished_at ?? undefined,
    cancel_requested: job.cancel_requested && ACTIVE.includes(job.state), error: job.state === "failed" ? job.error?.message : undefined,
    audio: items.flatMap((/** @type {any} */ item) => item.audio.map((/** @type {any} */ file) => ({ index: item.index, format: file.format, url: file.url }))),
  };
}

/** @param {string} id @returns {Promise<Job>} */
export const cancelJob = (id) => call(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });

/**
 * Follow a job by its events.
 * @param {{links: {events: string}}} job
 * @param {(event: string, data: any) => void} heard
 * @returns {() => void} stop
 */
export function follow(job, heard) {
  const events = new EventSource(at(job.links.events));
  for (const name of ["queued", "started", "planned", "progress", "requeued", "succeeded", "failed", "cancelled"]) {
    events.addEventListener(name, (message) => {
      let data = {};
      try { data = JSON.parse(/** @type {MessageEvent} */ (message).data); } catch { /* an event without data is one, too */ }
      heard(name, data);
      if (["succeeded", "failed", "cancelled"].includes(name)) events.close();
    });
  }
  events.onerror = () => { if (events.readyState === EventSource.CLOSED) heard("lost", {}); };
  return () => events.close();
}
