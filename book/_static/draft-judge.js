/* <draft-judge tokens="resxld" context="for i in ">: why a draft leaves the law exact.
 *
 * The reader drags the model's law p and the draft's law q of six tokens. A draft is
 * kept with probability min(1, p/q); a refusal draws from what p has beyond q. Below
 * stands what comes out: bars by computing, dots by running the procedure.
 */
(() => {
  if (customElements.get("draft-judge")) return;
  const P = [0.42, 0.2, 0.14, 0.11, 0.08, 0.05];
  const PRESETS = {
    "draft = model": [P, P],
    "good draft": [P, [0.5, 0.13, 0.19, 0.07, 0.06, 0.05]],
    "bad draft": [P, [0.05, 0.1, 0.05, 0.3, 0.15, 0.35]],
    greedy: [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]],
  };
  const KEYS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1,
    PageUp: 10, PageDown: -10, Home: -100, End: 100 };
  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const percent = (x) => `${Math.abs(100 * x).toFixed(1)} %`;
  const clamp = (x, most) => Math.min(most, Math.max(0, Math.round(100 * x) / 100));

  class DraftJudge extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.p && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      this.tokens = [...(this.getAttribute("tokens") || "resxld")]; // six, as in P
      this.seed = 20241226; // the same draws for every reader
      this.innerHTML = this.markup();
      this.classList.add("ready");
      this.querySelectorAll(".presets button").forEach((button) =>
        button.addEventListener("click", () => this.changed(button.textContent)));
      this.querySelector(".draw").addEventListener("click", () => this.sample(1000));
      this.querySelector("input").onchange = () => this.changed(this.preset);
      this.querySelectorAll("[role=slider]").forEach((grip) => this.listen(grip));
      this.changed("good draft");
    }

    markup() {
      const grip = (law, whose, t, x) => `<b class="${law}" role="slider" tabindex="0"
        aria-label="${whose} law ${law}, byte ${t}" aria-valuemin="0" data-x="${x}"
        aria-valuemax="100" aria-orientation="vertical"><span></span></b>`;
      const columns = (inside) => this.tokens.map((t, x) =>
        `<div class="column">${inside(t, x)}</div>`).join("");
      const grid = "<i class='grid'></i>".repeat(3);
      const number = (name, formula) => `<li><i class="key ${name}"></i>${name}
        <span>${formula}</span><output></output></li>`;
      return `<div class="presets" role="group" aria-label="laws to start from">${
        Object.keys(PRESETS).map((p) => `<button type="button">${p}</button>`).join("")}
        </div><p class="head">The byte after <code>${(this.getAttribute("context")
        || "for i in ").replaceAll(" ", "·")}</code>: drag <b class="p">● the model’s p</b> and
        <b class="q">◆ the draft’s q</b></p>
        <div class="laws chart" role="group" aria-label="p and q">${grid}${columns(
        (t, x) => `<i class="kept"></i><i class="missing"></i><i class="refused"></i>
        ${grip("p", "model’s", t, x)}${grip("q", "draft’s", t, x)}`)}</div>
        <div class="names" aria-hidden="true">${columns((t) =>
        `<code>${t}</code>`)}</div><ul class="numbers">${number("kept", "Σ min(p, q)")}
        ${number("refused", "Σ (q − p)⁺")}${number("missing", "Σ (p − q)⁺")}
        ${number("tokens a pass", "1 + kept")}</ul>
        <p class="head">What comes out: <i class="key kept"></i>kept + <i class="key
        again"></i>drawn after a refusal, against <i class="key line"></i>p<span
        class="seen" hidden> and <i class="key dot"></i>the draws</span></p>
        <div class="out chart" role="img">${grid}${columns(() => `<i class="kept"></i><i
        class="again"></i><i class="line"></i><i class="dot" hidden></i>`)}</div>
        <div class="act"><button type="button" class="draw">draw 1000</button><label>
        <input type="checkbox" role="switch">wrong rule: after a refusal draw from p
        </label></div><p class="say" role="status" aria-live="polite"></p>`;
    }

    /* Pointer and keys of one grip. A drag starts from the law as it was, so that a bar
       pulled to the top and back changes nothing. */
    listen(grip) {
      const [law, x, column] = [grip.className, +grip.dataset.x, grip.parentElement];
      let drag = null;
      grip.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        grip.focus({ preventScroll: true });
        grip.setPointerCapture(event.pointerId);
        drag = { from: this[law], y: event.clientY, v: this[law][x] };
        this.classList.add("drag");
      });
      grip.addEventListener("pointermove", (event) => {
        if (!drag) return;
        const up = ((drag.y - event.clientY) / column.clientHeight) * this.top;
        this.move(law, x, clamp(drag.v + up, this.top), drag.from);
      });
      grip.addEventListener("lostpointercapture", () => {
        drag = null;
        this.classList.remove("drag");
        this.draw();
      });
      grip.addEventListener("keydown", (event) => {
        if (!(event.key in KEYS)) return;
        event.preventDefault();
        this.move(law, x, clamp(this[law][x] + KEYS[event.key] / 100, 1), this[law]);
      });
    }

    /* Token x of a law becomes v; the others share the rest as they did before. */
    move(law, x, v, from) {
      const rest = sum(from.filter((_, i) => i !== x));
      this[law] = from.map((f, i) => i === x ? v
        : (1 - v) * (rest > 1e-9 ? f / rest : 1 / (from.length - 1)));
      this.changed();
    }

    changed(preset) { // a preset's name, or nothing
      if (preset) [this.p, this.q] = PRESETS[preset];
      Object.assign(this, { preset, counts: P.map(() => 0), accepted: 0 });
      this.draw();
    }

    get wrong() { return this.querySelector("input").checked; }
    get kept() { return this.p.map((v, i) => Math.min(v, this.q[i])); }

    /* The law after a refusal: what p has beyond q, or p itself, the mistake. */
    get again() {
      const beyond = this.p.map((v, i) => v - this.kept[i]);
      return this.wrong || sum(beyond) < 1e-9 ? this.p
        : beyond.map((v) => v / sum(beyond));
    }

    get law() { // what comes out
      return this.kept.map((v, i) => v + (1 - sum(this.kept)) * this.again[i]);
    }

    /* The procedure itself, n times. Random numbers by Park and Miller. */
    sample(n) {
      const random = () => (this.seed = (this.seed * 48271) % 2147483647) / 2147483647;
      const pick = (law) => {
        let u = random() * sum(law);
        const x = law.findIndex((v) => (u -= v) < 0);
        return x < 0 ? pick(law) : x;
      };
      const { p, q, again } = this;
      for (let i = 0; i < n; i++) {
        let x = pick(q);
        if (random() * q[x] < p[x]) this.accepted++;
        else x = pick(again);
        this.counts[x]++;
      }
      this.draw();
    }

    draw() {
      const { p, q, kept, counts, law } = this;
      const [all, n] = [sum(kept), sum(counts)];
      if (!this.matches(".drag")) this.top = Math.max(...p, ...q) > 0.55 ? 1 : 0.6;
      const high = (v) => `${((100 * v) / this.top).toFixed(2)}%`;
      const each = (selector, f) => this.querySelectorAll(selector).forEach(f);
      each(".chart", (chart) => chart.querySelectorAll(".column").forEach((one, i) => {
        const v = { p: p[i], q: q[i], kept: kept[i], again: law[i] - kept[i],
          dot: counts[i] / (n || 1) };
        for (const name in v) one.style.setProperty(`--${name}`, high(v[name]));
      }));
      each(".grid", (line, i) => {
        const share = (this.top < 1 ? [0.2, 0.4, 0.6] : [0.5, 1, 1])[i % 3];
        line.style.bottom = high(share);
        line.textContent = `${(100 * share).toFixed(0)} %`;
      });
      each("[role=slider]", (grip) => {
        const v = this[grip.className][grip.dataset.x];
        grip.setAttribute("aria-valuenow", (100 * v).toFixed(1));
        grip.setAttribute("aria-valuetext", grip.firstChild.textContent = percent(v));
      });
      each(".presets button", (one) =>
        one.setAttribute("aria-pressed", one.textContent === this.preset));
      each(".dot, .seen", (one) => { one.hidden = !n; });
      const numbers = [all, sum(q) - all, sum(p) - all].map(percent);
      each("output", (out, i) => { out.value = numbers[i] || (1 + all).toFixed(2); });
      this.querySelector(".out").ariaLabel = `What comes out: ${law.map((v, i) =>
        `${this.tokens[i]} ${percent(v)}, p ${percent(p[i])}`).join("; ")}`;
      this.querySelector(".say").innerHTML = this.sentence(n, p, law);
    }

    sentence(n, p, law) {
      const worst = (x) => x.indexOf(Math.max(...x));
      const far = worst(law.map((v, i) => Math.abs(v - p[i])));
      const name = (i) => `<code>${this.tokens[i]}</code>`;
      if (!n && Math.abs(law[far] - p[far]) > 1e-9)
        return `Not p: ${name(far)} comes out with ${percent(law[far])} instead of
          ${percent(p[far])}. Can 1000 draws tell?`;
      if (!n && this.wrong) return "Here the wrong rule gives p too. No test would tell.";
      if (!n) return `Refused and missing are equal, since p and q both sum to 1 (it is
        their total variation). Refusals put back just what is missing: out comes p.`;
      const z = this.counts.map((c, i) => // in standard errors, 0/0 is none
        Math.abs(c - n * p[i]) / Math.sqrt(n * p[i] * (1 - p[i])) || 0);
      const x = worst(z);
      return `${n} drawn, ${this.accepted} drafts kept. Furthest from p: ${name(x)} with
        ${percent(this.counts[x] / n)} instead of ${percent(p[x])}: ${z[x].toFixed(1)}
        standard errors, ${z[x] > 4 ? "not chance" : z[x] < 2.5 ? "chance"
        : "draw more"}.`;
    }
  }
  customElements.define("draft-judge", DraftJudge);
})();
