// A long list of which only what is near the screen stands in the page: a thousand songs are as quick as ten.

import { h } from "./dom.js";

const PART = 20; // elements that come and go together
const NEAR = "900px"; // beyond the screen
const GUESS_PX = 86; // of an element that has not been seen

/** @typedef {{box: HTMLElement, ids: string[], from: number, near: boolean, tall: number}} Part */

export class Feed {
  /**
   * @param {string} label
   * @param {(id: string) => HTMLElement} make gives an element; the same one for as long as it stands in the page
   */
  constructor(label, make) {
    this.make = make;
    /** @type {Part[]} */
    this.parts = [];
    this.size = -1;
    this.list = h("div.songs", { role: "feed", "aria-label": label });
    this.watch = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) {
        const part = this.parts.find((one) => one.box === target);
        if (!part || !this.list.isConnected) continue;
        part.near = isIntersecting;
        this.place(part);
      }
    }, { rootMargin: `${NEAR} 0px` });
  }

  /** Show these, in this order. @param {string[]} ids @param {boolean} all whether there are no more of them */
  show(ids, all) {
    this.size = all ? ids.length : -1;
    const wanted = Math.ceil(ids.length / PART);
    for (const { box } of this.parts.splice(wanted)) {
      this.watch.unobserve(box);
      box.remove();
    }
    while (this.parts.length < wanted) {
      const box = h("div.part", { role: "presentation" });
      this.parts.push({ box, ids: [], from: 0, near: !this.parts.length, tall: 0 });
      this.list.append(box);
      this.watch.observe(box);
    }
    this.parts.forEach((part, i) => {
      part.from = i * PART;
      part.ids = ids.slice(part.from, part.from + PART);
      this.place(part);
    });
  }

  /** @param {Part} part */
  place(part) {
    const { box, ids, from } = part;
    if (!part.near && from && !box.contains(document.activeElement)) { // a feed is never empty: the first ones stay
      if (box.firstChild && box.offsetHeight) part.tall = box.offsetHeight;
      box.replaceChildren();
      box.style.height = `${part.tall || ids.length * GUESS_PX}px`;
      return;
    }
    box.style.height = "";
    ids.forEach((id, i) => {
      const element = this.make(id);
      element.setAttribute("aria-posinset", String(from + i + 1));
      element.setAttribute("aria-setsize", String(this.size));
      if (box.children[i] !== element) box.insertBefore(element, box.children[i] || null);
    });
    while (box.children.length > ids.length) box.lastElementChild?.remove();
  }

  /** The element one further in a direction, the first one from nowhere. @param {Element | null} from @param {1 | -1} step @returns {HTMLElement | null} */
  beside(from, step) {
    const card = from?.closest("[aria-posinset]");
    const at = card && this.list.contains(card) ? Number(card.getAttribute("aria-posinset")) - 1 + step : 0;
    const part = this.parts[Math.floor(at / PART)];
    if (!part) return null;
    part.near = true; // it may not have come near yet
    this.place(part);
    return /** @type {HTMLElement | null} */ (part.box.children[at % PART] || null);
  }
}
