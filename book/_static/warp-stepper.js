/* <warp-stepper>: what one warp of a kernel does, step by step. Its child, a script of
 * type application/json, is what book/gpu_stepper.py makes of the simulator's trace. */
(() => {
  if (customElements.get("warp-stepper")) return;
  const BUTTONS = { first: "|◀", back: "◀", next: "▶", last: "▶|" };
  const KEYS = { Home: "first", ArrowLeft: "back", ArrowRight: "next", End: "last" };
  const list = (value) => (Array.isArray(value) ? value : [value]);
  const whole = (value) => list(value).map((one) => `${one}`.replace("-", "−"))
    .join(", ");

  class WarpStepper extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.data && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      this.data = JSON.parse(this.querySelector("script").textContent);
      [this.at, this.lane, this.source] = [0, 0, null];
      this.setAttribute("role", "group");
      this.ariaLabel = `kernel ${this.data.kernel}, step by step`;
      this.innerHTML = this.markup();
      this.oninput = ({ target: { name, value } }) => this.go({ [name]: +value });
      this.onclick = ({ target }) => {
        const [button, cell] = [target.closest("button"), target.closest(".lane")];
        if (button) this.go({ at: this.goal(button.name) });
        else if (cell) this.go({ lane: +cell.dataset.lane });
      };
      this.onkeydown = (event) => { // a slider has its own keys
        const held = ["altKey", "ctrlKey", "metaKey", "shiftKey"].some((k) => event[k]);
        if (held || !KEYS[event.key] || !event.target.closest("button")) return;
        event.preventDefault();
        this.go({ at: this.goal(KEYS[event.key]) });
      };
      this.draw();
    }

    get last() { return this.data.steps.length - 1; }
    get step() { return this.data.steps[this.at]; }

    goal(name) {
      return { first: 0, back: this.at - 1, next: this.at + 1, last: this.last }[name];
    }

    markup() {
      const { kernel, block, warp, steps } = this.data;
      const button = (name) => `<button type="button" name="${name}" aria-label="${name
        } step">${BUTTONS[name]}</button>`;
      const slider = (name, words, to) => `<label><span>${words} <b aria-hidden="true"
        ></b></span><input type="range" name="${name}" min="0" max="${to}"></label>`;
      const where = `block ${block.join(", ").replace(/(, 0)+$/, "")}, warp ${warp}`;
      return `<p class="head"><span>kernel <code>${kernel}</code>, ${where}</span><span
        class="in"></span></p><pre tabindex="0" role="region" aria-label="source"></pre>
        <div class="act">${Object.keys(BUTTONS).map(button).join("")}${slider("at",
        "step", this.last)}</div><p class="say" role="status" aria-live="polite"></p>
        <warp-lanes aria-hidden="true" class="${steps.some((step) => step.from)
        ? "arcs" : ""}"></warp-lanes><p class="key"></p><div class="pick">${slider(
        "lane", "lane", 31)}</div><p class="detail"></p><warp-memory></warp-memory>`;
    }

    go({ at = this.at, lane = this.lane }) {
      this.at = Math.min(Math.max(at, 0), this.last);
      this.lane = Math.min(Math.max(lane, 0), 31);
      this.draw();
    }

    draw() {
      const { step, at, lane, last } = this;
      const put = (some, text) => {
        const one = this.querySelector(some);
        if (one.textContent !== text) one.textContent = text; // so that it is said once
      };
      const slide = (name, value, shown, words) => {
        const slider = this.querySelector(`[name=${name}]`);
        slider.value = value;
        slider.setAttribute("aria-valuetext", words);
        put(`label:has([name=${name}]) b`, shown);
      };
      this.querySelectorAll("button").forEach(({ name }, i, all) =>
        all[i].setAttribute("aria-disabled", this.goal(name) === at
          || this.goal(name) < 0 || this.goal(name) > last));
      this.drawSource();
      put(".say", step.say);
      put(".key", this.key());
      put(".detail", this.detail());
      slide("at", at, `${at + 1} of ${last + 1}`,
        `${at + 1} of ${last + 1}, line ${step.line}`);
      slide("lane", lane, `${lane}`, this.detail());
      this.querySelector("warp-lanes").show(step, lane, this.data.threads);
      this.querySelector("warp-memory").show(step, lane);
    }

    /* The function where the step is, its line in the middle. */
    drawSource() {
      const { lines, name } = this.data.sources[this.step.source];
      const pre = this.querySelector("pre");
      if (this.source !== this.step.source) {
        this.source = this.step.source;
        pre.innerHTML = lines.map(([n]) => `<span data-line="${n}"><u>${n}</u><code
          ></code></span>`).join("");
        lines.forEach(([, text], i) => {
          pre.children[i].lastChild.textContent = text;
        });
        this.querySelector(".in").textContent = name === this.data.kernel ? ""
          : `in ${name}`;
      }
      for (const one of pre.children) {
        const here = +one.dataset.line === this.step.line;
        one.classList.toggle("here", here);
        if (here) one.setAttribute("aria-current", "step");
        else one.removeAttribute("aria-current");
        if (here) pre.scrollTop = one.offsetTop - (pre.clientHeight
          - one.offsetHeight) / 2;
      }
    }

    /* What the lanes' cells hold. */
    key() {
      const { op, from, gives, gets } = this.step;
      if (op.startsWith("sync")) return "No values: the lanes only wait.";
      const several = [gives, gets].some((row) => row?.some((v) => list(v).length > 1));
      const what = { read: "what it reads", write: "what it writes",
        atomic: "what it leaves in memory and, below, what was there" }[op]
        ?? (from ? "what it gives and, below, what it gets" : gets
          ? "what it hands in and, below, what it gets" : "what it hands in");
      return `In each lane: ${what}${several ? ", the first of several" : ""
        }. Deeper blue: larger. Dashed: takes no part.`;
    }

    /* All that is known of the picked lane, in words. */
    detail() {
      const { step, lane, data } = this;
      const name = `Lane ${lane}`;
      if (lane >= data.threads) return `${name} is not there: the block has no more.`;
      if (!step.lanes.includes(lane)) return `${name} takes no part.`;
      const [gives, gets] = [step.gives[lane], step.gets?.[lane] ?? null];
      if (step.space) {
        const n = list(gives ?? gets).length;
        const index = step.indices && `[${list(step.indices[lane]).join(", ")}]`;
        const more = n > 1 ? ` and ${n - 1} more` : "";
        const place = index ? `${step.array}${index}${more}` : `${n} of ${step.array}`;
        const bytes = `from byte ${step.offsets[lane]} on`;
        return `${name}, ${place}, ${bytes}: ${step.op === "read" ? whole(gets)
          : step.op === "write" ? whole(gives)
          : `${whole(gets)} becomes ${whole(gives)}`}.`;
      }
      if (step.from) return `${name} gives ${whole(gives)} and gets ${whole(gets)}, ${
        step.from[lane] === lane ? "its own" : `lane ${step.from[lane]}’s`}.`;
      if (gives === null) return `${name} waits.`;
      return `${name} hands in ${whole(gives)}${gets === null ? ""
        : ` and gets ${whole(gets)}`}.`;
    }
  }
  customElements.define("warp-stepper", WarpStepper);
})();
