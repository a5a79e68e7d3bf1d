/* <fp8-dial>: twelve weights in eight bits, and what one of them costs the others.
 *
 * Three blocks of four weights. The reader makes the outlier in the second larger, and
 * gives the scale to the whole row or to each block. All is computed in float32 as in
 * minidsv3/fp8.py: s = max|w| / 448, q = the number of E4M3 nearest w / s, and q s.
 */
(() => {
  if (customElements.get("fp8-dial")) return;
  const WEIGHTS = [0.0213, -0.0086, 0.0031, -0.0147, 0.0118, 0, -0.0052, 0.0009,
    -0.0006, 0.00021, 0.00095, -0.00007].map(Math.fround);
  const [OUTLIER, BLOCK, LARGEST] = [5, 4, 448];
  const [LOW, HIGH] = [-20, 10]; // the lines go from 2^LOW to 2^HIGH
  const [LEAST, STEPS] = [0.03, 90]; // the outlier: 0.03 to 949, 20 steps a decade
  const SCALES = { tensor: "one scale a row", block: "one scale a block" };
  const ZERO = 2 ** -10; // up to here q is 0: half the least step

  /* From a number to the next; and of all finite ones the nearest, of two the even. */
  const step = (x) => 2 ** (Math.max(-6, Math.floor(Math.log2(x))) - 3);
  const e4m3 = (x) => {
    const [a, d] = [Math.abs(x), step(Math.abs(x))];
    const [below, rest] = [Math.floor(a / d), a / d - Math.floor(a / d)];
    const up = rest > 0.5 || (rest === 0.5 && below % 2);
    return Math.sign(x) * Math.min(LARGEST, (below + (up ? 1 : 0)) * d);
  };
  const GRID = []; // all that are not negative: 0, subnormal, normal
  for (let q = 0; q <= LARGEST; q += step(q)) GRID.push(q);

  const short = (x) => {
    const [three, large] = [+x.toPrecision(3), Math.abs(x) >= 1000];
    const text = large ? three.toLocaleString("en") : String(three);
    return text.replace(/^-/, "−").replace(/e(.*)/, (_, e) => `·10<sup>${e}</sup>`);
  };
  const percent = (x) => `${x < 0.0995 ? +(100 * x).toPrecision(2)
    : Math.round(100 * x)} %`;
  const at = (x) => // where a magnitude lies on a line, in percent
    Math.min(100, Math.max(0, (100 * (Math.log2(x) - LOW)) / (HIGH - LOW)));

  class Fp8Dial extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.weights && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      Object.assign(this, { e4m3, grid: GRID, weights: [...WEIGHTS], picked: 8,
        kind: "tensor" });
      this.innerHTML = this.markup();
      this.addEventListener("input", () => this.draw());
      this.addEventListener("click", ({ target }) => {
        const { name, value } = target.closest("button") || {};
        if (name === "weight") this.picked = +value;
        else if (value) this.kind = value;
        if (value) this.draw();
      });
      this.draw();
    }

    markup() {
      const buttons = Object.entries(SCALES).map(([kind, words]) =>
        `<button type="button" value="${kind}">${words}</button>`).join("");
      const weight = (i) => `<button type="button" name="weight" value="${i}"><b></b>
        <small></small></button>`;
      const block = (b) => `<div class="block"><p><b>block ${b + 1}</b>
        <span></span></p><div class="line"><i class="zero"></i><svg aria-hidden="true"
        viewBox="0 0 100 1" preserveAspectRatio="none"><path/><path/></svg>${
        "<i class='true'></i><i class='held'></i>".repeat(BLOCK)}</div><div
        class="weights" role="group" aria-label="weights of block ${b + 1}">${
        [0, 1, 2, 3].map((i) => weight(b * BLOCK + i)).join("")}</div></div>`;
      const ticks = [-5, -3, -1, 1].map((e) => `<span style="left:${at(10 ** e)}%">
        10${e === 1 ? "" : `<sup>−${-e}</sup>`}</span>`).join("");
      return `<div class="scales" role="group" aria-label="scales">${buttons}</div>
        <label class="outlier"><span>weight 6, the outlier: <output></output></span>
        <input type="range" min="0" max="${STEPS}" value="0"></label>
        <p class="head"><i class="key true"></i>the weight, <i class="key held"></i>what
        is left of it; <i class="key tick"></i>what E4M3 can hold, <i class="key
        zero"></i>what becomes 0</p>${[0, 1, 2].map(block).join("")}<div class="ticks"
        aria-hidden="true">${ticks}</div><p class="head lens-head"></p><div
        class="lens" role="img"><i class="axis"></i>${"<u></u>".repeat(5)}<i
        class="true"></i><i class="held"></i></div><ul class="numbers"></ul>
        <p class="say" role="status" aria-live="polite"></p>`;
    }

    /* Scales, what is stored and what is read, in float32 as the library has them. */
    compute() {
      const f = Math.fround;
      this.weights[OUTLIER] = f(LEAST * 10 ** (this.querySelector("input").value / 20));
      const size = this.kind === "block" ? BLOCK : WEIGHTS.length;
      this.scales = this.weights.map((_, i) => {
        const from = Math.floor(i / size) * size;
        const some = this.weights.slice(from, from + size).map(Math.abs);
        return f(Math.max(...some) / LARGEST);
      });
      this.stored = this.weights.map((w, i) => e4m3(f(w / this.scales[i])));
      this.held = this.stored.map((q, i) => f(q * this.scales[i]));
      this.steps = this.weights.map((w, i) =>
        step(Math.abs(f(w / this.scales[i]))) * this.scales[i]);
      this.errors = this.weights.map((w, i) => Math.abs(this.held[i] - w));
      this.flushed = this.stored.filter((q) => !q).length;
      this.mean = this.weights.reduce((sum, w, i) => i === OUTLIER ? sum
        : sum + this.errors[i] / Math.abs(w), 0) / (WEIGHTS.length - 1);
    }

    draw() {
      this.compute();
      const each = (selector, f) => this.querySelectorAll(selector).forEach(f);
      const { weights, scales, stored, held, errors, picked } = this;
      const large = short(weights[OUTLIER]);
      this.querySelector(".outlier output").innerHTML = large;
      this.querySelector("input").setAttribute("aria-valuetext", large);
      each(".scales button", (one) =>
        one.setAttribute("aria-pressed", one.value === this.kind));
      each(".block", (block, b) => {
        const s = scales[b * BLOCK];
        block.querySelector("p span").innerHTML = `s = ${short(s)}`;
        block.querySelector(".line .zero").style.width = `${at(ZERO * s)}%`;
        block.querySelectorAll("path").forEach((path, fine) => path.setAttribute("d",
          GRID.filter((q) => q && fine == (q > 2 ** -6 && Math.log2(q) % 1 > 0))
            .map((q) => `M${at(q * s).toFixed(2)} 0V1`).join("")));
      });
      each(".line .true", (dot, i) => {
        dot.style.left = `${at(Math.abs(weights[i]))}%`;
        dot.classList.toggle("picked", i === picked);
      });
      each(".line .held", (dot, i) => { // one of zero lies at the left end
        dot.style.left = `${stored[i] ? at(Math.abs(held[i])) : 0}%`;
        dot.classList.toggle("lost", !stored[i]);
        dot.classList.toggle("picked", i === picked);
      });
      each(".weights button", (one, i) => {
        one.setAttribute("aria-pressed", i === picked);
        one.classList.toggle("lost", !stored[i]);
        one.firstChild.innerHTML = short(weights[i]);
        one.lastElementChild.textContent = stored[i]
          ? `± ${percent(errors[i] / Math.abs(weights[i]))}` : "becomes 0";
      });
      this.lens();
      this.querySelector(".numbers").innerHTML = this.cards();
      this.querySelector(".say").innerHTML = this.sentence();
    }

    /* The picked weight among the five nearest numbers, drawn without logarithm. */
    lens() {
      const { picked } = this;
      const [w, q, s] = [this.weights, this.stored, this.scales].map((x) =>
        Math.abs(x[picked]));
      const near = GRID.indexOf(q);
      const first = Math.max(0, Math.min(near - 2, GRID.length - 5));
      const marks = GRID.slice(first, first + 5).map((q) => q * s);
      const to = (x) => 8 + (84 * (x - marks[0])) / (marks[4] - marks[0]);
      this.querySelectorAll(".lens u").forEach((mark, i) => {
        mark.style.left = `${to(marks[i])}%`;
        mark.classList.toggle("nearest", first + i === near);
        mark.innerHTML = `<span>${short(marks[i])}</span>`;
      });
      this.querySelector(".lens .true").style.left = `${to(w)}%`;
      this.querySelector(".lens .held").style.left = `${to(q * s)}%`;
      this.querySelector(".lens-head").innerHTML = `<b>Weight ${picked + 1}</b> without
        its sign, and the five nearest numbers that its scale allows:`;
      this.querySelector(".lens").ariaLabel = `weight ${w.toPrecision(3)} among ${
        marks.map((m) => m.toPrecision(3)).join(", ")}`;
    }

    cards() {
      const { picked, scales, stored, steps, errors, weights } = this;
      const [s, q, d, error, w] = [scales, stored, steps, errors, weights].map(
        (its) => its[picked]);
      const whose = this.kind === "block" ? "its block" : "the row";
      return [["scale", short(s), `max|w| / 448 of ${whose}`],
        ["stored", short(q), "q, one byte"],
        ["step here", short(d), "from a number to the next"],
        ["error", percent(error / Math.abs(w)), "of this weight"],
        ["small weights", percent(this.mean), "error of the other 11, mean"],
        ["become 0", this.flushed, "of 12 weights"]].map(([name, number, how]) =>
        `<li><span>${name}</span><b>${number}</b>${how}</li>`).join("");
    }

    sentence() {
      const q = Math.abs(this.stored[this.picked]);
      const [large, least] = [Math.max, Math.min].map((f) =>
        f(...this.weights.map(Math.abs)));
      const where = !q ? "At most half the least step: it is gone." : q >= 2 ** -6
        ? "The step here grows with the number: no error is above a sixteenth."
        : "Below 2<sup>−6</sup> s each step is 2<sup>−9</sup> s: the less, the worse.";
      return `${where} The largest weight is ${short(large / least)} times the least; ${
        this.kind === "block" ? "its scale reaches no further than its block."
        : "one scale keeps the digits of what is up to 28,672 times less than it."}`;
    }
  }
  customElements.define("fp8-dial", Fp8Dial);
})();
