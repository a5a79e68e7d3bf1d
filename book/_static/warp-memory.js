/* <warp-memory>: what a step of a <warp-stepper> touches, sectors of global memory or
 * banks of shared memory; or a bar where everybody waits. */
(() => {
  if (customElements.get("warp-memory")) return;
  const [LANES, SECTOR, BANKS, WORD] = [32, 32, 32, 4]; // bytes: a sector, a word
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const percent = (part) => `${(100 * part).toFixed(3)}%`;

  class WarpMemory extends HTMLElement {
    show(step, picked) {
      [this.step, this.picked] = [step, picked];
      const who = { syncwarp: "the warp", syncthreads: "the block" }[step.op];
      this.innerHTML = step.space === "global" ? this.sectors()
        : step.space === "shared" ? this.banks()
        : who ? `<p class="bar">${who} waits here</p>` : "<p>No memory is touched.</p>";
      this.setAttribute("role", "img");
      this.ariaLabel = this.querySelector("p").textContent;
    }

    /* The bytes of lane i, unit by unit: [unit, its first byte there, how many]. */
    pieces(i, unit) {
      const first = this.step.offsets[i];
      const end = first + this.step.width;
      const start = Math.floor(first / unit);
      return range(Math.ceil(end / unit) - start).map((k) => {
        const from = Math.max(first, (start + k) * unit);
        return [start + k, from % unit, Math.min(end, (start + k + 1) * unit) - from];
      });
    }

    /* The picked lane's pieces come last, over those of others. */
    get lanes() {
      const { lanes } = this.step;
      const own = lanes.filter((i) => i === this.picked);
      return [...lanes.filter((i) => i !== this.picked), ...own];
    }

    sectors() {
      const { array, sectors } = this.step;
      const found = new Map();
      for (const i of this.lanes) {
        for (const [sector, from, n] of this.pieces(i, SECTOR)) {
          if (!found.has(sector)) found.set(sector, new Map());
          found.get(sector).set(from, [n, i === this.picked ? "own" : ""]);
        }
      }
      const piece = ([from, [n, kind]]) => `<i class="${kind}" style="left:${
        percent(from / SECTOR)};width:${percent(n / SECTOR)}"></i>`;
      const boxes = [...found].sort(([a], [b]) => a - b).map(([sector, parts]) =>
        `<span class="sector" data-sector="${sector}"><u>${SECTOR * sector}</u><span>${
        [...parts].map(piece).join("")}</span></span>`);
      return `<p><code>${array}</code>, global: ${sectors} sector${sectors === 1 ? ""
        : "s"} of 32 bytes; above each its first byte</p><div class="sectors">${
        boxes.join("")}</div>`;
    }

    /* A line of 32 banks for each pass. A wide access goes a part of the warp at a
       time; a word that several lanes want goes once, except to atomics. */
    passes() {
      const { step, picked } = this;
      const part = Math.max(1, BANKS * WORD / Math.max(step.width, WORD));
      const rows = [];
      for (let first = 0; first < LANES; first += part) {
        const [base, words] = [rows.length, range(BANKS).map(() => [])];
        for (const i of this.lanes.filter((i) => first <= i && i < first + part)) {
          for (const [word] of this.pieces(i, WORD)) {
            const inBank = words[word % BANKS];
            const known = step.op === "atomic" ? -1 : inBank.indexOf(word);
            const row = base + (known < 0 ? inBank.push(word) - 1 : known);
            rows[row] ??= range(BANKS).fill("");
            rows[row][word % BANKS] = i === picked ? "own" : "on";
          }
        }
      }
      return rows;
    }

    banks() {
      const { array, passes } = this.step;
      const line = (row) => `<span class="pass">${row.map((kind) =>
        `<i class="${kind}"></i>`).join("")}</span>`;
      const number = (n) => `<u style="left:${percent((n + 0.5) / BANKS)}">${n}</u>`;
      return `<p><code>${array}</code>, shared: ${passes} pass${passes === 1 ? "" : "es"
        } over the 32 banks, a line for each</p><div class="banks">${
        this.passes().map(line).join("")}<span class="numbers">${
        [0, 8, 16, 24, 31].map(number).join("")}</span></div>`;
    }
  }
  customElements.define("warp-memory", WarpMemory);
})();
