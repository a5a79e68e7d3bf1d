/* <rope-dial query="7" key="4" dim="32" base="10000">: two positions, one score.
 *
 * A query at position m and a key at position n carry the same content, (1, 0) in each
 * of dim/2 pairs. RoPE turns pair j by position times base^(-2j/dim). The reader moves
 * the positions: the hands turn, the score follows the distance m - n and nothing else.
 * Every number shown is computed from the two turned vectors, the score included, so
 * that "shift both" proves its point instead of assuming it.
 */
(() => {
  if (customElements.get("rope-dial")) return;
  const LAST = 127; // positions 0 to LAST
  const DIALS = 5; // clocks shown, from the fastest pair to the slowest
  const clamp = (x) => Math.min(LAST, Math.max(0, x));

  class RopeDial extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.pairs && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      const dim = Number(this.getAttribute("dim") || 32);
      const base = Number(this.getAttribute("base") || 10000);
      this.pairs = dim / 2;
      this.theta = Array.from({ length: this.pairs }, (_, j) =>
        base ** ((-2 * j) / dim));
      this.shown = Array.from({ length: DIALS }, (_, i) =>
        Math.round((i * (this.pairs - 1)) / (DIALS - 1)));
      this.m = clamp(Number(this.getAttribute("query") || 7));
      this.n = clamp(Number(this.getAttribute("key") || 4));
      this.scores = Array.from({ length: 2 * LAST + 1 }, (_, i) =>
        this.score(Math.max(0, i - LAST), Math.max(0, LAST - i)));
      this.low = Math.min(0, ...this.scores) - 0.06; // the curve's lower edge
      this.innerHTML = this.markup();
      this.classList.add("ready");
      this.querySelectorAll("input").forEach((input) =>
        input.addEventListener("input", () => {
          this[input.name] = Number(input.value);
          this.draw();
        }));
      this.querySelectorAll("button").forEach((button) =>
        button.addEventListener("click", () => this.shift(Number(button.value))));
      this.draw();
    }

    /* The vector (1, 0, 1, 0, ...) turned to a position: dim numbers. */
    turned(position) {
      return this.theta.flatMap((t) =>
        [Math.cos(position * t), Math.sin(position * t)]);
    }

    /* The score per pair, so that 1 is "all hands agree". */
    score(m, n) {
      const [q, k] = [this.turned(m), this.turned(n)];
      return q.reduce((sum, x, i) => sum + x * k[i], 0) / this.pairs;
    }

    shift(by) {
      const step = Math.max(-Math.min(this.m, this.n),
        Math.min(by, LAST - Math.max(this.m, this.n)));
      this.m += step;
      this.n += step;
      this.draw();
    }

    markup() {
      const clock = (j) => `<div class="clock"><svg viewBox="-1.15 -1.15 2.3 2.3"
        aria-hidden="true"><circle r="1.05"/><path class="wedge"/>
        <line class="k" x2="1"/><line class="q" x2="1"/></svg>
        <b>pair ${j}</b><span>a turn in<br>${this.turn(j)}</span></div>`;
      const slider = (name, label) => `<label class="${name === "m" ? "q" : "k"}">
        <span>${label}</span><input type="range" name="${name}" min="0" max="${LAST}">
        <output></output></label>`;
      const points = this.scores.map((s, i) => `${i - LAST},${(-s).toFixed(3)}`);
      return `<div class="sliders">
        ${slider("m", "query at m")}${slider("n", "key at n")}
        <div class="both"><span>shift both</span>${[-10, -1, 1, 10].map((s) =>
          `<button type="button" value="${s}" aria-label="shift both positions by ${s}">
          ${s > 0 ? "+" : "−"}${Math.abs(s)}</button>`).join("")}</div></div>
        <div class="clocks">${this.shown.map(clock).join("")}</div>
        <div class="curve"><svg viewBox="${-LAST} -1.06 ${2 * LAST} ${1.06 - this.low}"
        preserveAspectRatio="none" aria-hidden="true"><path class="zero"
        d="M${-LAST} 0H${LAST} M${-LAST} -1H${LAST} M0 -1.06V${-this.low}"/>
        <polyline points="${points.join(" ")}"/></svg><i class="here"></i>
        <span class="tick" style="top:${this.height(1)}">score 1</span>
        <span class="tick" style="top:${this.height(0)}">0</span>
        <span class="left">m − n = −${LAST}</span><span class="mid">0</span>
        <span class="right">${LAST}</span></div>
        <p class="say" role="status" aria-live="polite"></p>`;
    }

    /* Where a score lies in the curve's box, from its top. */
    height(score) {
      return `${(((1.06 - score) / (1.06 - this.low)) * 100).toFixed(2)}%`;
    }

    turn(j) {
      const period = (2 * Math.PI) / this.theta[j];
      return `${period < 100 ? period.toFixed(1)
        : Math.round(period).toLocaleString("en")} positions`;
    }

    draw() {
      const { m, n } = this;
      for (const input of this.querySelectorAll("input")) {
        input.value = this[input.name];
        input.nextElementSibling.textContent = this[input.name];
      }
      const turn = (line, angle) => line.setAttribute("transform",
        `rotate(${((-angle * 180) / Math.PI).toFixed(2)})`);
      this.querySelectorAll(".clock").forEach((clock, i) => {
        const t = this.theta[this.shown[i]];
        turn(clock.querySelector(".q"), m * t);
        turn(clock.querySelector(".k"), n * t);
        const [a, b] = [n * t, m * t]; // the wedge: the difference, by the short way
        const gap = Math.atan2(Math.sin(b - a), Math.cos(b - a));
        const at = (x) =>
          [0.55 * Math.cos(x), -0.55 * Math.sin(x)].map((c) => c.toFixed(3));
        clock.querySelector(".wedge").setAttribute("d",
          `M0 0 L${at(a)} A.55 .55 0 0 ${gap > 0 ? 0 : 1} ${at(a + gap)} Z`);
      });
      const score = this.score(m, n);
      const here = this.querySelector(".here");
      here.style.left = `${((m - n + LAST) / (2 * LAST)) * 100}%`;
      here.style.top = this.height(score);
      const slow = (Math.abs(m - n) * this.theta[this.pairs - 1] * 180) / Math.PI;
      this.querySelector(".say").innerHTML =
        `Distance m − n = <b>${m - n}</b>, score <b>${score.toFixed(6)}</b> of 1. Over
        this distance pair 0 makes ${(Math.abs(m - n) / (2 * Math.PI)).toFixed(2)}
        turns, pair ${this.pairs - 1} moves ${slow.toFixed(2)} degrees.`;
    }
  }
  customElements.define("rope-dial", RopeDial);
})();
