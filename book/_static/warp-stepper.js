/* <warp-stepper>: what one warp of a kernel does, step by step. Its child, a script of
 * type application/json, is what book/gpu_stepper.py makes of the simulator's trace. */
(() => {
  if (customElements.get("warp-stepper")) return;
  const [LANES, SECTOR, BANKS, WORD] = [32, 32, 32, 4]; // bytes: a sector, a word
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const minus = (text) => text.replace("-", "−").replace("e+", "e");
  const list = (value) => (Array.isArray(value) ? value : [value]);
  const percent = (part) => `${(100 * part).toFixed(3)}%`;

  /* A value in five characters, or whole. */
  const short = (value) => {
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "string") return minus(value.replace("Infinity", "∞")).slice(0, 5);
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e4) return minus(`${value}`);
    if (size >= 1e4 || size < 0.005) return minus(value.toExponential(size < 1 ? 0 : 1));
    const text = value.toPrecision(size < 1 ? 2 : 3);
    return minus(text.includes("e") ? value.toFixed(0) : text);
  };
  const whole = (value) => list(value).map((one) => minus(String(one))).join(", ");

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
      this.ariaLabel = `Kernel ${this.data.kernel}, step by step`;
      this.innerHTML = this.markup();
      this.find = (some) => this.querySelector(some);
      this.oninput = ({ target: { name, value } }) => this.go({ [name]: +value });
      this.onclick = ({ target }) => {
        const [button, cell] = [target.closest("button"), target.closest(".lane")];
        if (button) this.go({ at: this.goal(button.name) });
        else if (cell) this.go({ lane: +cell.dataset.lane });
      };
      this.onkeydown = (event) => { // a slider has its own keys
        const name = { ArrowLeft: "back", ArrowRight: "next", Home: "first",
          End: "last" }[event.key];
        if (!name || !event.target.closest("button") || event.altKey || event.ctrlKey
          || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        this.go({ at: this.goal(name) });
      };
      this.draw();
    }

    get last() { return this.data.steps.length - 1; }

    goal(name) {
      return { first: 0, back: this.at - 1, next: this.at + 1, last: this.last }[name];
    }

    markup() {
      const { kernel, block, warp, steps } = this.data;
      const button = (name, sign) => `<button type="button" name="${name}"
        aria-label="${name} step">${sign}</button>`;
      const slider = (name, words, to) => `<label class="${name}"><span>${words} <b
        aria-hidden="true"></b></span><input type="range" name="${name}" min="0" max="${
        to}"></label>`;
      const lane = (i) => `<div class="lane" data-lane="${i}"><i>${i}</i><b></b><b></b
        ></div>`;
      const where = block.join(", ").replace(/(, 0)+$/, "");
      return `<p class="head"><span>kernel <code>${kernel}</code>, block ${where}, warp ${
        warp}</span><span class="in"></span></p><pre tabindex="0" role="region"
        aria-label="source"></pre><div class="act">${button("first", "⏮︎")}${
        button("back", "◀︎")}${button("next", "▶︎")}${button("last", "⏭︎")}${
        slider("at", "step", this.last)}</div><p class="say" role="status"
        aria-live="polite"></p><div class="lanes${steps.some((step) => step.from)
        ? " arcs" : ""}" aria-hidden="true"><svg></svg>${range(LANES).map(lane).join("")
        }</div><p class="key"></p><div class="pick">${slider("lane", "lane", LANES - 1)
        }</div><p class="detail"></p><div class="memory" role="img"></div>`;
    }

    go({ at = this.at, lane = this.lane }) {
      this.at = Math.min(Math.max(at, 0), this.last);
      this.lane = Math.min(Math.max(lane, 0), LANES - 1);
      this.draw();
    }

    get step() { return this.data.steps[this.at]; }

    draw() {
      const { step, at, lane, last } = this;
      const put = (some, text) => {
        const one = this.find(some);
        if (one.textContent !== text) one.textContent = text; // said once
      };
      this.drawSource();
      for (const name of ["first", "back", "next", "last"])
        this.find(`[name=${name}]`).setAttribute("aria-disabled",
          String(name === "first" || name === "back" ? at === 0 : at === last));
      put(".say", step.say);
      put(".at b", `${at + 1} of ${last + 1}`);
      put(".lane b", "");
      put(".pick b", `${lane}`);
      put(".detail", this.detail());
      put(".key", this.key());
      Object.assign(this.find("[name=at]"), { value: at,
        ariaValueText: `${at + 1} of ${last + 1}, line ${step.line}` });
      Object.assign(this.find("[name=lane]"), { value: lane,
        ariaValueText: this.detail() });
      this.drawLanes();
      this.drawMemory();
      this.drawArcs();
    }

    drawSource() {
      const { lines, name } = this.data.sources[this.step.source];
      const pre = this.find("pre");
      if (this.source !== this.step.source) {
        this.source = this.step.source;
        pre.innerHTML = lines.map(([n]) => `<span data-line="${n}"><u>${n}</u><code></code
          ></span>`).join("");
        lines.forEach(([, text], i) => { pre.children[i].lastChild.textContent = text; });
        this.find(".in").textContent = name === this.data.kernel ? "" : `in ${name}`;
      }
      for (const one of pre.children) {
        const here = +one.dataset.line === this.step.line;
        one.classList.toggle("here", here);
        one.toggleAttribute("aria-current", here);
        if (here) one.setAttribute("aria-current", "step");
        if (here) pre.scrollTop = one.offsetTop - (pre.clientHeight - one.offsetHeight) / 2;
      }
    }

    drawLanes() {
      const { step } = this;
      const rows = [step.gives, step.gets];
      const single = rows.map((row) => (row || []).map((v) => list(v)[0]));
      const numbers = single.flat().filter((v) => typeof v === "number");
      const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
      const shade = (v) => (v === true ? 1 : typeof v !== "number" ? 0
        : high > low ? (v - low) / (high - low) : 0.5);
      const used = rows.map((row) => !!row?.some((v) => v !== null));
      this.querySelectorAll(".lane[data-lane]").forEach((cell, i) => {
        cell.classList.toggle("out", !step.lanes.includes(i));
        cell.classList.toggle("none", i >= this.data.threads);
        cell.classList.toggle("picked", i === this.lane);
        cell.querySelectorAll("b").forEach((one, k) => {
          const value = rows[k]?.[i] ?? null;
          one.hidden = !used[k] && (k > 0 || used[1]);
          one.textContent = value === null ? "" : short(list(value)[0]);
          one.classList.toggle("more", Array.isArray(value) && value.length > 1);
          one.style.setProperty("--shade", value === null ? "0%"
            : `${(4 + 36 * shade(single[k][i])).toFixed(1)}%`);
        });
      });
    }

    /* What the cells hold. */
    key() {
      const { op, gives, gets } = this.step;
      const many = [gives, gets].some((row) => row?.some((v) => list(v).length > 1))
        ? " The first of several values is shown." : "";
      const what = op.startsWith("sync") ? "No values: they only wait."
        : op === "read" ? "In each lane: what it reads."
        : op === "write" ? "In each lane: what it writes."
        : op === "atomic" ? "In each lane: what is in memory afterwards, and before."
        : this.step.from ? "In each lane: what it gives, above; what it gets, below."
        : gets ? "In each lane: what it hands in, and what it gets."
        : "In each lane: what it hands in.";
      return `${what}${many} Darker: larger. Dashed: takes no part.`;
    }

    /* All that is known of the lane that is picked, in words. */
    detail() {
      const { step, lane } = this;
      const name = `Lane ${lane}`;
      if (lane >= this.data.threads) return `${name} is not there: the block ends before.`;
      if (!step.lanes.includes(lane)) return `${name} takes no part.`;
      const [gives, gets] = [step.gives?.[lane], step.gets?.[lane]].map((value) =>
        (value === null || value === undefined ? null : whole(value)));
      if (step.space) {
        const place = `${step.array}[${list(step.indices[lane]).join(", ")}${
          list(gives ?? gets).length && list(step.gives[lane] ?? step.gets[lane]).length
          > 1 ? " …" : ""}]`;
        const from = `${place}, byte ${step.offsets[lane]} on`;
        if (step.op === "read") return `${name}: ${from}: ${gets}.`;
        if (step.op === "write") return `${name}: ${from}, becomes ${gives}.`;
        return `${name}: ${from}: was ${gets}, becomes ${gives}.`;
      }
      if (step.from) return `${name}: gives ${gives}, gets ${gets} from lane ${
        step.from[lane]}${step.from[lane] === lane ? ", itself" : ""}.`;
      if (gives === null) return `${name} waits.`;
      return `${name}: hands in ${gives}${gets === null ? "" : `; gets ${gets}`}.`;
    }

    /* Lines from the lane that gives to the one that gets, behind the lanes: one row's
       go above it as arcs, others straight. */
    drawArcs() {
      const [svg, grid] = [this.find(".lanes svg"), this.find(".lanes")];
      const { from } = this.step;
      svg.innerHTML = "";
      if (!from) return;
      const cells = [...grid.querySelectorAll(".lane")];
      const box = (i) => cells[i].getBoundingClientRect();
      const { left, top } = grid.getBoundingClientRect();
      svg.setAttribute("viewBox", `0 0 ${grid.clientWidth} ${grid.clientHeight}`);
      const gap = parseFloat(getComputedStyle(grid).paddingTop);
      const reach = Math.max(1, ...from.map((source, i) => (source === null ? 0
        : Math.abs(box(source).x - box(i).x))));
      svg.innerHTML = range(LANES).filter((i) => ![null, i].includes(from[i])).map((i) => {
        const [a, b] = [box(from[i]), box(i)];
        const side = from[i] < i ? -1 : 1; // two lanes that change do not share a line
        const [x, u] = [a, b].map((one) => one.x - left + one.width / 2 + 3 * side);
        const level = a.top === b.top;
        const [y, v] = [level || a.top > b.top ? a.top : a.bottom,
          level || a.top < b.top ? b.top : b.bottom].map((one) => one - top);
        const up = y - gap * (0.35 + 0.6 * Math.abs(u - x) / reach) * 1.3;
        const path = level ? `M${x} ${y}C${x} ${up} ${u} ${up} ${u} ${v - 3}`
          : `M${x} ${y}L${u} ${v - 3 * Math.sign(v - y)}`;
        const way = level || v > y ? 1 : -1;
        const kind = i === this.lane ? "own" : "";
        return `<g data-from="${from[i]}" data-to="${i}" class="${kind}"><path d="${path
          }"/><path class="tip" d="M${u} ${v}l-2.5 ${-5 * way}h5z"/></g>`;
      }).join("");
    }

    drawMemory() {
      const { step } = this;
      const memory = this.find(".memory");
      memory.className = `memory ${step.space ?? step.op}`;
      const global = step.space === "global";
      if (!step.space) memory.innerHTML = step.op.startsWith("sync")
        ? `<p class="bar">${step.op === "syncwarp" ? "the warp" : "the block"} waits here
          </p>` : "";
      else memory.innerHTML = global ? this.sectors() : this.banks();
      memory.ariaLabel = step.space ? memory.querySelector("p").textContent
        : memory.textContent.trim() || "no memory is touched";
    }

    /* Bytes of lane i, in units: [unit, first byte in it, bytes in it]. */
    pieces(i, unit) {
      const [first, end] = [this.step.offsets[i], this.step.offsets[i] + this.step.width];
      const n = Math.floor((end - 1) / unit) - Math.floor(first / unit) + 1;
      return range(n).map((k) => {
        const start = Math.floor(first / unit) + k;
        const from = Math.max(first, start * unit);
        return [start, from - start * unit, Math.min(end, (start + 1) * unit) - from];
      });
    }

    sectors() {
      const { step } = this;
      const found = new Map();
      for (const i of step.lanes) for (const [sector, from, n] of this.pieces(i, SECTOR)) {
        const parts = found.get(sector) ?? found.set(sector, new Map()).get(sector);
        const own = i === this.lane || parts.get(from)?.own;
        parts.set(from, { n, own });
      }
      const boxes = [...found].sort(([a], [b]) => a - b).map(([sector, parts]) =>
        `<span class="sector" data-sector="${sector}"><u>${SECTOR * sector}</u><span>${
        [...parts].map(([from, { n, own }]) => `<i class="${own ? "own" : ""}" style="left:${
        percent(from / SECTOR)};width:${percent(n / SECTOR)}"></i>`).join("")
        }</span></span>`);
      return `<p><code>${step.array}</code>, global: ${step.sectors} sector${
        step.sectors === 1 ? "" : "s"} of 32 bytes, from the byte written above it</p
        ><div class="sectors">${boxes.join("")}</div>`;
    }

    /* A line of 32 banks for each pass; wide accesses go a part of the warp at a time. */
    banks() {
      const { step } = this;
      const part = Math.max(1, BANKS * WORD / Math.max(step.width, WORD));
      const rows = [];
      for (let first = 0; first < LANES; first += part) {
        const base = rows.length;
        const filled = new Map(); // of a bank: the words it gives in this part
        for (const i of step.lanes.filter((i) => i >= first && i < first + part))
          for (const [word] of this.pieces(i, WORD)) {
            const bank = word % BANKS;
            const words = filled.get(bank) ?? filled.set(bank, []).get(bank);
            let row = step.op === "atomic" ? -1 : words.indexOf(word);
            if (row < 0) row = words.push(word) - 1;
            rows[base + row] ??= range(BANKS).fill("");
            rows[base + row][bank] = i === this.lane || rows[base + row][bank] === "own"
              ? "own" : "on";
          }
      }
      return `<p><code>${step.array}</code>, shared: ${step.passes} pass${
        step.passes === 1 ? "" : "es"} over the 32 banks, a line for each</p><div
        class="banks">${rows.map((row) => `<span class="pass">${row.map((kind) =>
        `<i class="${kind}"></i>`).join("")}</span>`).join("")}<span class="numbers">${
        [0, 8, 16, 24, 31].map((n) => `<u style="left:${percent((n + 0.5) / BANKS)}">${n
        }</u>`).join("")}</span></div>`;
    }
  }
  customElements.define("warp-stepper", WarpStepper);
})();
