/* <schedule-desk>: learning rate, λ and γ over a training run.
 *
 * Two rates: the library's, linear warm-up and a half cosine, and DeepSeek-V3's, which
 * stays at the peak for 10 of 14.8 trillion tokens (report, section 4.2), here as
 * shares of the steps. The reader sets the run and drags a step; λ and γ stand below.
 */
(() => {
  if (customElements.get("schedule-desk")) return;
  const TOKENS = 14.8; // trillions, of the whole run
  const [PEAK, DOWN, FLOOR] = [10, 14.3, 14.633]; // where V3's rate leaves its stages
  const [FIRST, LAST] = [2.2e-4, 7.3e-6]; // V3's peak, and its rate at the very end
  const CHOICES = {
    steps: [100, 200, 300, 500, 1000, 2000, 5000, 1e4, 2e4, 5e4, 1e5, 240000],
    warmup: [0, 1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000],
    peak: [1e-4, 2.2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2],
    share: [0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1],
  };
  const WORDS = { steps: "steps", warmup: "warm-up", peak: "peak rate",
    share: "floor, of the peak" };
  const PRESETS = {
    "TrainConfig’s": ["cosine", 1000, 50, 2e-3, 0.1],
    "DeepSeek-V3’s": ["stages", 240000, 2000, 2.2e-4, 0.1],
  };
  const KINDS = { cosine: "half cosine", stages: "V3’s stages" };
  const KEYS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 100,
    PageDown: -100, Home: -1e9, End: 1e9 };
  const POINTS = 400; // of a curve
  const whole = (x) => x.toLocaleString("en");
  const small = (x) => { // 0.0002 as 2·10⁻⁴
    const [a, e] = (+x.toPrecision(3)).toExponential().split("e");
    return x ? `${a}·10<sup>${e.replace("-", "−").replace("+", "")}</sup>` : "0";
  };
  const plain = (x) => x < 0.001 && x ? (+x.toPrecision(3)).toExponential() : String(x);
  const fall = (done) => (1 + Math.cos(Math.PI * Math.min(done, 1))) / 2;

  class ScheduleDesk extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.kind && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      this.innerHTML = this.markup();
      this.addEventListener("input", ({ target: { name, value } }) => {
        const at = this.step / this.steps;
        this[name] = CHOICES[name][value];
        this.step = Math.round(at * this.steps);
        this.draw();
      });
      this.querySelectorAll("button").forEach((button) =>
        button.addEventListener("click", () => {
          if (button.value in PRESETS) this.set(button.value);
          else this.kind = button.value;
          this.draw();
        }));
      const [charts, grip] = ["charts", "grip"].map((c) => this.querySelector(`.${c}`));
      const move = ({ clientX }) => {
        const { left, width } = charts.getBoundingClientRect();
        this.step = Math.round(((clientX - left) / width) * this.steps);
        this.draw();
      };
      charts.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        grip.focus({ preventScroll: true });
        charts.setPointerCapture(event.pointerId);
        move(event);
      });
      charts.addEventListener("pointermove", (event) =>
        charts.hasPointerCapture(event.pointerId) && move(event));
      grip.addEventListener("keydown", (event) => {
        if (!(event.key in KEYS)) return;
        event.preventDefault();
        this.step += Math.round(KEYS[event.key] * Math.max(1, this.steps / 1000));
        this.draw();
      });
      this.set("TrainConfig’s");
      this.draw();
    }

    markup() {
      const group = (its, words, names) => `<div class="${its}" role="group"
        aria-label="${words}">${Object.entries(names).map(([value, text]) => `<button
        type="button" value="${value}">${text}</button>`).join("")}</div>`;
      const presets = Object.fromEntries(Object.keys(PRESETS).map((one) => [one, one]));
      const slider = (name) => `<label><span>${WORDS[name]} <output></output></span>
        <input type="range" name="${name}" min="0" max="${CHOICES[name].length - 1}">
        </label>`;
      const chart = (name, words) => `<p class="head"><b>${words}</b><span></span></p>
        <div class="${name} chart"><svg viewBox="0 0 1 1" preserveAspectRatio="none"
        aria-hidden="true"><path class="other"/><path class="own"/></svg><i></i></div>`;
      return `${group("presets", "runs to start from", presets)}<div class="fields">${
        Object.keys(CHOICES).map(slider).join("")}</div>${group("presets kinds",
        "the rate’s shape", KINDS)}<div class="charts">${chart("rate",
        "learning rate")}${chart("lambda", "λ, the weight of the MTP loss")}${
        chart("gamma", "γ, the step of a bias")}<b class="grip"
        role="slider" tabindex="0" aria-label="step" aria-valuemin="1"></b></div>
        <p class="ends" aria-hidden="true"><span>step 1</span><span></span></p><ul
        class="numbers"></ul><p class="say" role="status" aria-live="polite"></p>`;
    }

    set(preset) {
      const was = this.step / this.steps || 0.6;
      [this.kind, this.steps, this.warmup, this.peak, this.share] = PRESETS[preset];
      this.step = Math.round(was * this.steps);
    }

    get floor() { return this.peak * this.share; }

    /* As learning_rate in minidsv3/training/numpy_ref.py; or V3's, over its tokens. */
    rate(step, kind = this.kind) {
      const { steps, warmup, peak, floor } = this;
      if (step <= warmup) return peak * (warmup ? step / warmup : 1);
      const tokens = (TOKENS * step) / steps;
      if (kind === "stages" && tokens <= PEAK) return peak;
      if (kind === "stages" && tokens > FLOOR)
        return Math.min(floor, (peak * LAST) / FIRST);
      const done = kind === "stages" ? (tokens - PEAK) / (DOWN - PEAK)
        : (step - warmup) / Math.max(1, steps - warmup);
      return floor + fall(done) * (peak - floor);
    }

    lambda(step) { return step - 1 < (PEAK / TOKENS) * this.steps ? 0.3 : 0.1; }
    gamma(step) { return step - 1 < (DOWN / TOKENS) * this.steps ? 0.001 : 0; }

    draw() {
      this.warmup = Math.min(this.warmup, this.steps);
      this.step = Math.min(this.steps, Math.max(1, this.step));
      const { step, steps, kind, peak } = this;
      const now = { rate: this.rate(step), lambda: this.lambda(step),
        gamma: this.gamma(step), tokens: (TOKENS * step) / steps };
      this.now = now;
      const tops = { rate: peak, lambda: 0.3, gamma: 0.001 };
      const each = (selector, f) => this.querySelectorAll(selector).forEach(f);
      const curve = (f, top) => Array.from({ length: POINTS + 1 }, (_, i) =>
        (i * steps) / POINTS).concat(this.warmup).sort((a, b) => a - b).map((s) =>
        `${s ? "L" : "M"}${(s / steps).toFixed(4)} ${(1 - f(s) / top).toFixed(4)}`)
        .join("").replace(/^L/, "M");
      for (const name in tops) {
        const chart = this.querySelector(`.${name}`);
        const draw = (path, f) => chart.querySelector(path).setAttribute("d", f);
        draw(".own", curve((s) => this[name](s), tops[name]));
        if (name === "rate") draw(".other", curve((s) =>
          this.rate(s, kind === "cosine" ? "stages" : "cosine"), peak));
        chart.lastChild.style.top = `${100 - (100 * now[name]) / tops[name]}%`;
        chart.previousElementSibling.lastChild.innerHTML = `0 to ${
          name === "rate" ? small(peak) : tops[name]}`;
      }
      this.style.setProperty("--at", step / steps);
      each("input", (input) => {
        const value = this[input.name];
        input.value = CHOICES[input.name].findLastIndex((one) => one <= value);
        input.previousElementSibling.lastChild.innerHTML = input.name === "peak"
          ? small(value) : whole(value);
        input.setAttribute("aria-valuetext", plain(value));
      });
      each("button", (one) => one.setAttribute("aria-pressed", one.value in PRESETS
        ? PRESETS[one.value].every((v, i) => v === [kind, steps, this.warmup, peak,
          this.share][i]) : one.value === kind));
      const grip = this.querySelector(".grip");
      grip.setAttribute("aria-valuemax", steps);
      grip.setAttribute("aria-valuenow", step);
      this.querySelector(".ends").lastChild.textContent = `step ${whole(steps)}`;
      this.querySelector(".numbers").innerHTML = this.cards(now);
      this.querySelector(".say").innerHTML = this.sentence(now);
    }

    cards({ rate, lambda, gamma, tokens }) {
      const other = this.kind === "cosine" ? "stages" : "cosine";
      return [["step", whole(this.step), `of ${whole(this.steps)}`],
        ["learning rate", small(rate), `${+((100 * rate) / this.peak).toPrecision(3)} %
          of the peak`], ["the other shape", small(this.rate(this.step, other)),
          `${KINDS[other]}, dashed`], ["λ", lambda, "times the MTP loss"],
        ["γ", gamma, "a step of each bias"], ["as V3’s tokens",
          `${tokens.toFixed(2)} T`, `of ${TOKENS} T`]].map(([name, number, how]) =>
        `<li><span>${name}</span><b>${number}</b>${how}</li>`).join("");
    }

    sentence({ rate, tokens, lambda, gamma }) {
      const { step, warmup, steps, kind } = this;
      const stage = step <= warmup
        ? `Warm-up: a step adds 1/${whole(warmup)} of the peak.`
        : kind === "cosine" ? "A half cosine: slow, fast, slow."
        : tokens <= PEAK ? "At the peak, for two thirds of the run."
        : tokens <= DOWN ? "A half cosine, over 4.3 T tokens."
        : tokens <= FLOOR ? "At the floor, for 333 B tokens."
        : "The last 167 B tokens, at a thirtieth of the peak.";
      const end = step < steps ? "" : " This is the last step.";
      return `${stage}${end} ${lambda > 0.1 ? "λ falls" : "λ fell"} after step ${
        whole(Math.ceil((PEAK / TOKENS) * steps))}, ${gamma ? "γ becomes" : "γ became"}
        0 after step ${whole(Math.ceil((DOWN / TOKENS) * steps))}.`;
    }
  }
  customElements.define("schedule-desk", ScheduleDesk);
})();
