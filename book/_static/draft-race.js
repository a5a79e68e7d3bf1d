/* <draft-race presets='[{"name": "…", "a": 0.9, "c": 0.1, "e": 0.2}]'>: do they pay?
 *
 * Two writers on one time axis, whose unit is a plain pass of the trunk. A round of the
 * second is k drafts, c each, and a pass that judges them: 1, and e for each further
 * token it reads. A draft is kept with probability a, given that those before it were.
 * A preset may also have k (else 1) and what a clock said: "measured": 1.2.
 */
(() => {
  if (customElements.get("draft-race")) return;
  const [PASSES, KS] = [10, [1, 2, 3]]; // the time that is drawn; drafts a round
  const TEXT = "for·n·in·range(10):·print(n,·n**2,·n**3)"; // a letter is a token
  const PRESETS = [ // examples, not measured: a page hands over its own
    { name: "deep trunk", a: 0.88, c: 0.03, e: 0.02 },
    { name: "shallow trunk", a: 0.88, c: 0.4, e: 0.3 },
    { name: "careless draft", a: 0.4, c: 0.2, e: 0.3 },
  ];
  const SLIDERS = [["a", "drafts kept", 1], ["c", "cost of a draft", 1],
    ["e", "of a further token", 1.5]];
  const two = (x) => x.toFixed(2);
  const at = (x) => `${(100 * x).toFixed(3)}%`;
  const tokens = (n) => `${n} token${n === 1 ? "" : "s"}`;

  class DraftRace extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.now && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      const given = JSON.parse(this.getAttribute("presets") || "null");
      this.presets = (given || PRESETS).map((one) => ({ k: 1, ...one }));
      this.now = {};
      this.innerHTML = this.markup();
      this.querySelectorAll("[name=preset]").forEach((one, i) => {
        one.textContent = this.presets[i].name;
      });
      const listen = ({ target: { name, value } }) =>
        this.change(name === "preset" ? this.presets[value] : { [name]: +value });
      this.oninput = listen;
      this.onclick = (event) => event.target.type === "button" && listen(event);
      this.change(this.presets[0]);
    }

    markup() {
      const button = (name, value, text = "") =>
        `<button type="button" name="${name}" value="${value}">${text}</button>`;
      const slider = ([name, words, to]) => `<label><span>${name}: ${words} <b
        aria-hidden="true"></b></span><input type="range" min="0" step="0.01" name=
        "${name}" max="${Math.max(to, ...this.presets.map((p) => p[name]))}"></label>`;
      const line = (kind, words) => `<p class="head"><span>${words}</span><b></b></p>
        <div class="line ${kind}"></div>`;
      const key = (name, words) => `<span><i class="key ${name}"></i>${words}</span> `;
      const letter = (name, words) =>
        `<span class="out"><b class="${name}">${words[0]}</b>${words.slice(1)}</span> `;
      return `<div class="presets" role="group" aria-label="numbers to start from">${
        this.presets.map((_, i) => button("preset", i)).join("")}</div>
        <div class="counts" role="group" aria-label="drafts a round">k: drafts a round
        ${KS.map((k) => button("k", k, k)).join("")}</div>
        <div class="fields">${SLIDERS.map(slider).join("")}</div><ul class="numbers">${
        ["speed-up", "tokens a round", "time of a round"].map((name) =>
        `<li><span>${name}</span><b></b><i></i></li>`).join("")}</ul><p class="keys">${
        key("draft", "draft")}${key("pass", "pass")}${key("extra", "its further tokens")
        }${letter("kept", "k kept")}${letter("refused", "× refused")}${letter("own",
        "t the trunk’s own")}</p><div class="race" role="img">${line("plain",
        "without drafts")}${line("drafted", "with drafts")}<div class="ticks">${
        [0, 2, 4, 6, 8, 10].map((t) => `<span>${t}</span>`).join("")}</div><p
        class="axis">time, in plain passes</p></div><div class="texts">What they have
        written: <code></code><code></code></div><div class="plot" role="img">${[1, 2,
        3, 4].map((s) => `<u class="s${s}">${s}</u>`).join("")}<svg viewBox="0 0 1 1"
        preserveAspectRatio="none">${"<path/>".repeat(3)}</svg><i class="even"></i><i
        class="clock"></i><i class="here"></i>${KS.map((k) => `<span class="k${k}">k =
        ${k}</span>`).join("")}</div><p class="axis">speed-up against a, from none kept
        to all; red: break-even</p><p class="say" role="status" aria-live="polite"></p>`;
    }

    change(some) { // kept exact, even where a slider's thumb stands on a hundredth
      for (const name of "kace") this.now[name] = some[name] ?? this.now[name];
      this.preset = this.presets.find((one) =>
        [..."kace"].every((name) => one[name] === this.now[name]));
      this.draw();
    }

    /* What to expect of a round: 1 + a + … + a^k tokens, in 1 + k (c + e) passes. */
    tokens(a = this.now.a, k = this.now.k) {
      return k ? 1 + a * this.tokens(a, k - 1) : 1;
    }

    time(k = this.now.k) { return 1 + k * (this.now.c + this.now.e); }
    speed(a = this.now.a, k = this.now.k) { return this.tokens(a, k) / this.time(k); }

    get even() { // the least acceptance, in 0.0001, that does not lose; none: NaN
      let some = 0;
      while (some <= 1e4 && this.speed(some / 1e4) < 1 - 1e-9) some++;
      return some > 1e4 ? NaN : some / 1e4;
    }

    /* The rounds that begin within a time. Chance is drawn as an even pattern, one for
       each place in a round: with a common one, the fates of a round's drafts would
       hang together, and their shares would not be a, a², a³. */
    race(passes, k = this.now.k) {
      const [rounds, time, judged] = [[], this.time(k), Array(k).fill(0)];
      const upTo = (n) => Math.floor(n * this.now.a + 0.5);
      for (let n = 0; n * time < passes - 1e-9; n++) {
        let kept = 0;
        while (kept < k && upTo(judged[kept] + 1) > upTo(judged[kept]++)) kept++;
        const end = (n + 1) * time;
        rounds.push({ start: n * time, end, kept, done: end < passes + 1e-9 });
      }
      return rounds;
    }

    draw() {
      const { k, a } = this.now;
      const each = (selector, f) => this.querySelectorAll(selector).forEach(f);
      each("button", (one) => one.setAttribute("aria-pressed", one.name === "k"
        ? +one.value === k : this.presets[one.value] === this.preset));
      each("input", (one) => {
        const value = one.value = this.now[one.name];
        const text = one.name === "a" ? `${Math.round(100 * a)} %` : two(value);
        one.setAttribute("aria-valuetext", text);
        one.previousElementSibling.lastElementChild.textContent = text;
      });
      const numbers = [this.speed(), this.tokens(), this.time()];
      each(".numbers b", (one, i) => { one.textContent = two(numbers[i]); });
      const sums = ["tokens / time", "1 + a + a² + a³".slice(0, 5 * k),
        k > 1 ? `1 + ${k} (c + e)` : "1 + c + e"];
      each(".numbers i", (one, i) => { one.textContent = sums[i]; });
      this.classList.toggle("loses", numbers[0] < 1);
      this.style.setProperty("--rows", k + 1);
      const n = [0, k].map((k, i) => this.lay(i ? ".drafted" : ".plain", k));
      each(".race .head b", (one, i) => { one.textContent = tokens(n[i]); });
      each("code", (one, i) => { one.textContent = TEXT.slice(0, n[i]); });
      this.querySelector(".race").ariaLabel = `In the time of ${PASSES} plain passes ${
        tokens(n[0])} without drafts, ${tokens(n[1])} with drafts`;
      this.plot();
      this.querySelector(".say").textContent = this.sentence();
    }

    /* One writer's boxes and, below the end of each finished round, what it wrote. */
    lay(line, k) {
      let written = 0;
      const letter = (name) => `<b class="${name}">${TEXT[written++]}</b>`;
      const whole = [...Array(k).fill(["draft", this.now.c]), ["pass", 1],
        ...Array(k).fill(["extra", this.now.e])];
      this.querySelector(line).innerHTML = this.race(PASSES, k).map((round) => {
        let x = round.start / PASSES;
        const box = ([name, width]) => `<i class="${name}" style="left:${at(x)};width:${
          at(-x + (x += width / PASSES))}"></i>`;
        const boxes = whole.map(box).join("");
        if (!round.done) return boxes;
        const out = Array.from({ length: round.kept }, () => letter("kept"));
        if (round.kept < k) out.push("<b class='refused'>×</b>");
        return `${boxes}<span class="out" style="right:${at(1 - round.end / PASSES)}">${
          out.join("")}${letter("own")}</span>`;
      }).join("");
      return written;
    }

    /* Speed-up against acceptance, for the chosen k and, thin, for the others. */
    plot() {
      const { k, a } = this.now;
      const top = Math.max(2, ...KS.map((k) => Math.ceil(this.speed(1, k))));
      const put = (name, x, y) => {
        const one = this.querySelector(`.plot ${name}`);
        one.hidden = !(y <= top && x >= 0);
        Object.assign(one.style, { left: at(x), bottom: at(y / top) });
      };
      this.querySelectorAll("path").forEach((path, i) => {
        path.classList.toggle("own", i + 1 === k);
        path.setAttribute("d", `M${Array.from({ length: 51 }, (_, x) =>
          `${x / 50} ${1 - this.speed(x / 50, i + 1) / top}`).join("L")}`);
      });
      const [middle, up] = [this.speed(1, 2), this.time(1) > 2 ? -1 : 1];
      for (const k of KS) put(`.k${k}`, 1, middle + up * (k - 2) // names stand apart
        * Math.max(0.11 * top, Math.abs(this.speed(1, k) - middle)));
      for (const s of [1, 2, 3, 4]) put(`.s${s}`, 0, s);
      put(".even", this.even, 1);
      put(".here", a, this.speed());
      put(".clock", a, this.preset?.measured ?? NaN);
      this.querySelector(".plot").ariaLabel = `Speed-up from ${two(this.speed(0))}, no
        draft kept, to ${two(this.speed(1))}, all kept`;
    }

    sentence() {
      const [s, even, clock] = [this.speed(), this.even, this.preset?.measured];
      const of = (k) => this.speed(this.now.a, k);
      const best = KS.reduce((most, k) => of(k) > of(most) ? k : most);
      return `${s < 0.995 ? "Below break-even: drafting loses." : s < 1.005
        ? "Break-even: nothing is gained." : "Drafting gains."} At these costs ${
        isNaN(even) ? "it would lose if every draft were kept."
        : `it pays once more than ${Math.round(100 * even)} % are kept.`}${
        best === this.now.k || of(best) < 1.005 ? "" : ` With k = ${best}: ${
        two(of(best))}${best > this.now.k ? ", if later drafts do as well" : ""}.`}${
        clock ? ` Measured: ${two(clock)}.` : ""}`;
    }
  }
  customElements.define("draft-race", DraftRace);
})();
