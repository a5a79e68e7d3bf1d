/* <little-desk presets='[{"name": "…", "registers": 48, "threads": 224, "shared": 128,
 *   "asked": 64, "reads": 0.5}]' machines='[{"name": "H200", "bandwidth": 4.3e12}]'
 *   latency="700">:
 * how many warps does a multiprocessor hold, and how many bytes do they ask for?
 *
 * registers and asked (bytes that are asked for before the first is needed) are a
 * thread's, threads and shared (bytes) a block's; reads is the share of loads in all
 * bytes that move, latency in nanoseconds. The rules are those of
 * minidsv3.gpu.roofline, for compute capability 9.0.
 */
(() => {
  if (customElements.get("little-desk")) return;
  const [WARPS, BLOCKS, SHARED, PARTS, MANY] = [64, 32, 228 * 1024, 4, 132];
  const [REGISTERS, UNIT, SHARED_UNIT, SYSTEM] = [65536, 256, 128, 1024];
  const PRESETS = [ // examples, not measured: a page hands over its own
    { name: "a kernel", registers: 48, threads: 256, shared: 0, asked: 64,
      reads: 1 },
  ];
  const MACHINES = [{ name: "1 TB/s", bandwidth: 1e12 }];
  const SLIDERS = [ // name, words, unit, least, most, step
    ["registers", "registers", "a thread", 16, 255, 1],
    ["threads", "threads", "a block", 32, 1024, 32],
    ["shared", "shared memory", "KiB a block", 0, 227, 0.125],
    ["latency", "a load takes", "ns", 300, 1500, 10],
  ];
  const ASKED = [2, 4, 8, 16, 32, 64, 128];
  const READS = [[1 / 2, "½"], [2 / 3, "⅔"], [1, "all"]];
  const STOPS = { warps: "places for warps", registers: "registers",
    "shared memory": "shared memory", blocks: "places for blocks" };
  const up = (n, unit) => Math.ceil(n / unit) * unit;
  const kib = (bytes) => `${(bytes / 1024).toFixed(1)} KiB`;
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  class LittleDesk extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.now && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      const given = (name, other) => JSON.parse(this.getAttribute(name)) || other;
      this.presets = given("presets", PRESETS);
      this.machines = given("machines", MACHINES);
      this.now = { machine: 0, latency: given("latency", 700), ...this.presets[0] };
      this.innerHTML = this.markup();
      for (const name of ["preset", "machine"]) {
        this.querySelectorAll(`[name=${name}]`).forEach((one, i) => {
          one.textContent = this[`${name}s`][i].name;
        });
      }
      this.oninput = ({ target: { name, value } }) => this.change(
        { [name]: name === "shared" ? 1024 * value : +value });
      this.onclick = ({ target: { type, name, value } }) => type === "button"
        && this.change(name === "preset" ? this.presets[value] : { [name]: +value });
      this.change({});
    }

    markup() {
      const button = (name, value, text = "") =>
        `<button type="button" name="${name}" value="${value}">${text}</button>`;
      const group = (its, words, buttons) => `<div class="${its}" role="group"
        aria-label="${words}">${buttons.join("")}</div>`;
      const slider = ([name, words, unit, least, most, step]) => `<label><span>${words}
        <b aria-hidden="true"></b></span><input type="range" name="${name}" min="${
        least}" max="${most}" step="${step}" data-unit="${unit}"></label>`;
      return `${group("presets", "kernels to start from",
        this.presets.map((_, i) => button("preset", i)))}<div class="fields">${
        SLIDERS.map(slider).join("")}</div><p class="asked"><span>bytes a thread asks
        for at once</span>${group("counts", "bytes a thread asks for at once",
        ASKED.map((n) => button("asked", n, n)))}</p><p class="asked"><span>of the bytes
        that move, loads are</span>${group("counts", "loads, of the bytes that move",
        READS.map(([share, text]) => button("reads", share, text)))}</p>${group("machines", "machine",
        this.machines.map((_, i) => button("machine", i)))}<ul class="numbers">${
        ["blocks at a time", "warps, of 64", "loads under way, of the needed"].map(
        (name) => `<li><span>${name}</span><b></b><i></i></li>`).join("")}</ul>
        <div class="places" role="img">${"<i></i>".repeat(WARPS)}</div><p class="axis">
        64 places for warps; a shade is a block</p><div class="pipe" role="img"><i></i>
        <u></u></div><p class="axis">loads under way in one multiprocessor; mark:
        needed for the whole bandwidth</p><p class="say" role="status" aria-live="polite"></p>`;
    }

    change(some) {
      const { name, ...numbers } = some;
      Object.assign(this.now, numbers);
      this.draw();
    }

    /* How many blocks fit, by what is given out, and so how many there are. */
    get occupancy() {
      const { registers, threads, shared } = this.now;
      const warps = Math.ceil(threads / 32);
      const ofPart = Math.floor(REGISTERS / PARTS / up(32 * registers, UNIT));
      const limits = { warps: Math.floor(WARPS / warps),
        registers: Math.floor(PARTS * ofPart / warps),
        "shared memory": Math.floor(SHARED / up(shared + SYSTEM, SHARED_UNIT)),
        blocks: BLOCKS };
      const blocks = Math.min(...Object.values(limits));
      const limit = Object.keys(limits).find((one) => limits[one] === blocks);
      return { blocks, warps: blocks * warps, each: warps, limit };
    }

    get flight() { // bytes of one multiprocessor: what there is, what it takes
      const { threads, asked, reads, latency, machine } = this.now;
      const rate = reads * this.machines[machine].bandwidth;
      const needed = rate * latency * 1e-9 / MANY;
      return { under: this.occupancy.blocks * threads * asked, needed };
    }

    draw() {
      const [{ now }, { blocks, warps, each, limit }] = [this, this.occupancy];
      const { under, needed } = this.flight;
      const all = (selector, f) => this.querySelectorAll(selector).forEach(f);
      all("button", (one) => one.setAttribute("aria-pressed", one.name === "preset"
        ? Object.entries(this.presets[one.value]).every(([key, value]) =>
          key === "name" || now[key] === value)
        : now[one.name] === +one.value));
      all("input", (one) => {
        const value = one.name === "shared" ? now.shared / 1024 : now[one.name];
        one.value = value;
        const text = `${+value.toFixed(2)} ${one.dataset.unit}`;
        one.setAttribute("aria-valuetext", text);
        one.parentElement.querySelector("b").textContent = text;
      });
      all(".places i", (one, i) => {
        one.className = i >= warps ? "" : Math.floor(i / each) % 2 ? "odd" : "even";
      });
      const share = under / needed;
      const cards = [[blocks, `stopped by ${STOPS[limit]}`],
        [warps, `${Math.round(100 * warps / WARPS)} % occupied`],
        [`${share.toFixed(2)} ×`, `${kib(under)} of ${kib(needed)}`]];
      all(".numbers li", (one, i) => {
        [one.children[1].textContent, one.children[2].textContent] = cards[i];
      });
      this.classList.toggle("waits", share < 1);
      const longest = Math.max(under, needed) * 1.08;
      const pipe = this.querySelector(".pipe");
      pipe.style.setProperty("--under", `${100 * under / longest}%`);
      pipe.style.setProperty("--needed", `${100 * needed / longest}%`);
      pipe.setAttribute("aria-label", `${kib(under)} under way, ${kib(needed)} needed`);
      this.querySelector(".places").setAttribute("aria-label",
        `${warps} of ${WARPS} places taken by ${many(blocks, "block")}`);
      this.querySelector(".say").textContent = blocks === 0
        ? "Not one block fits: such a kernel cannot be started."
        : `${many(blocks, "block")} of ${many(each, "warp")}; a further one would need
          more ${STOPS[limit]}. ${share < 1 ? `If they ask and wait, memory is at most ${
          Math.floor(100 * share)} % busy.` : `There is enough to keep memory busy while ${
          Math.floor(100 / share)} % of the threads wait for it.`}`;
    }
  }
  customElements.define("little-desk", LittleDesk);
})();
