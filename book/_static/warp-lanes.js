/* <warp-lanes>: the 32 lanes of a warp in a <warp-stepper>, what each gives and gets,
 * and who gets it from whom. */
(() => {
  if (customElements.get("warp-lanes")) return;
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const list = (value) => (Array.isArray(value) ? value : [value]);

  /* A value in few characters: −.13, 3.14, 2.9e5. */
  const short = (value) => {
    const clean = (text) => text.replace("-", "−").replace("e+", "e")
      .replace(/^(−?)0\./, "$1.");
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "string") return clean(value.replace("Infinity", "∞"));
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e4) return clean(`${value}`);
    if (size >= 9999.5) return clean(value.toExponential(value > 0 ? 1 : 0));
    if (size < 0.005) return clean(value.toExponential(0));
    return clean(value.toFixed(size < 0.995 ? 2 : size < 9.95 ? 1 + (value > 0)
      : size < 99.5 ? +(value > 0) : 0));
  };

  class WarpLanes extends HTMLElement {
    connectedCallback() {
      const lane = (i) => `<div class="lane" data-lane="${i}"><i>${i}</i><b></b><b></b
        ></div>`;
      this.innerHTML = `<svg></svg>${range(32).map(lane).join("")}`;
      this.cells = [...this.querySelectorAll(".lane")];
      this.watch = new ResizeObserver(() => this.step && this.arcs());
      this.watch.observe(this);
    }

    disconnectedCallback() { this.watch.disconnect(); }

    show(step, picked, threads) {
      [this.step, this.picked] = [step, picked];
      const rows = [step.gives, step.gets].map((row) => row ?? []);
      const first = rows.map((row) => row.map((value) => list(value)[0]));
      const used = first.map((row) => row.some((value) => value !== null));
      const numbers = first.flat().filter((value) => typeof value === "number");
      const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
      const shade = (value) => (typeof value !== "number" ? +(value === true)
        : high > low ? (value - low) / (high - low) : 0.5);
      this.cells.forEach((cell, i) => {
        cell.classList.toggle("out", !step.lanes.includes(i));
        cell.classList.toggle("none", i >= threads);
        cell.classList.toggle("picked", i === picked);
        cell.querySelectorAll("b").forEach((one, k) => {
          const value = first[k][i] ?? null;
          one.hidden = !used[k] && (k > 0 || used[1]);
          one.textContent = value === null ? "" : short(value);
          one.classList.toggle("long", /^.{5}|^\d{4}/.test(one.textContent));
          one.style.setProperty("--shade", value === null ? "0%"
            : `${(4 + 36 * shade(value)).toFixed(1)}%`);
        });
      });
      this.arcs();
    }

    /* Lines from who gives to who gets, behind the lanes. In a row they are arcs above
       it, else straight. Two lanes that exchange do not share a line. */
    arcs() {
      const from = this.step.from ?? [];
      const { left, top } = this.getBoundingClientRect();
      const boxes = this.cells.map((cell) => cell.getBoundingClientRect());
      const gap = parseFloat(getComputedStyle(this).paddingTop);
      const across = (i) => Math.abs(boxes[from[i]].x - boxes[i].x);
      const moved = range(from.length).filter((i) => ![null, i].includes(from[i]));
      const reach = Math.max(1, ...moved.map(across));
      const svg = this.querySelector("svg");
      svg.setAttribute("viewBox", `0 0 ${this.clientWidth} ${this.clientHeight}`);
      svg.innerHTML = moved.map((i) => {
        const [a, b] = [boxes[from[i]], boxes[i]];
        const [x, u] = [a, b].map((box) =>
          box.x - left + box.width / 2 + (from[i] < i ? -3 : 3));
        const level = a.top === b.top;
        const [y, v] = [a.top < b.top ? a.bottom : a.top,
          a.top > b.top ? b.bottom : b.top].map((at) => at - top);
        const way = a.top > b.top ? -1 : 1; // into the lane: down or up
        const up = y - gap * (0.5 + 0.75 * across(i) / reach);
        const path = level ? `M${x} ${y}C${x} ${up} ${u} ${up} ${u} ${v - 4}`
          : `M${x} ${y}L${u} ${v - 4 * way}`;
        return `<g data-from="${from[i]}" data-to="${i}" class="${i === this.picked
          ? "own" : ""}"><path d="${path}"/><path class="tip" d="M${u} ${v}l-2.5 ${
          -5 * way}h5z"/></g>`;
      }).join("");
    }
  }
  customElements.define("warp-lanes", WarpLanes);
})();
