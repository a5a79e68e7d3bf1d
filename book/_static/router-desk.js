/* <router-desk>: sixteen experts, two faders each, and the rule that picks four.
 *
 * DeepSeek-V3's router in a size that fits a page: of 4 groups of 4 the 2 with the best
 * pairs stay open, and the 4 best experts there are chosen (DeepSeek-V3: 8 groups of
 * 32, 4 open, 8 chosen). A bias moves the choice s + b and never the gate, which is
 * 2.5 s over the sum of the chosen s. Four classic mistakes can be switched on.
 *
 * This file moves and routes; router-group.js draws, router-verdict.js finds the words.
 */
(() => {
  if (customElements.get("router-desk")) return;
  const [GROUPS, SIZE, OPEN, K, SCALE] = [4, 4, 2, 4, 2.5];
  const PRESETS = { // s and b in hundredths
    balanced: ["62 35 48 27  41 45 30 22  58 20 64 39  33 46 44 18", ""],
    "one loud expert": ["71 30 58 22  20 94 15 12  35 66 61 28  44 31 52 25", ""],
    "a bias brings one in": ["62 35 48 27  41 45 30 22  58 20 64 39  33 46 44 18",
      "0 0 0 25"],
    "all biases negative": ["72 31 55 24  30 28 33 22  66 37 26 45  30 42 21 38",
      "-45 -35 -48 -32  -38 -40 -36 -30  -42 -44 -34 -47  -39 -46 -33 -41"],
  };
  const RULES = {
    none: "as in DeepSeek-V3",
    gates: "wrong: gates from s + b",
    zero: "wrong: closed groups masked with 0",
    max: "wrong: group score = its best expert",
    softmax: "wrong: softmax over the experts",
  };
  const LIMITS = { s: [0.01, 0.99], b: [-0.5, 0.5] };
  const ALL = Array.from({ length: GROUPS * SIZE }, (_, i) => i);
  const home = (i) => Math.floor(i / SIZE); // its group
  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const round = (x) => Math.round(1e9 * x) / 1e9; // what looks tied is tied
  const best = (x, n) => x.map((_, i) => i) // ties: the lower index wins
    .sort((i, j) => x[j] - x[i] || i - j).slice(0, n);
  const pair = (choice, g) => // the two best choices of a group
    best(choice.slice(g * SIZE, (g + 1) * SIZE), 2).map((i) => choice[g * SIZE + i]);
  const show = (x) => Number.isFinite(x)
    ? (Math.abs(x) < 0.005 ? 0 : x).toFixed(2).replace("-", "−") : "∞";

  function route(s, b, rule) {
    const odds = s.map((v) => v / (1 - v)); // exp of the logit whose sigmoid is s
    const affinity = rule === "softmax" ? odds.map((v) => v / sum(odds)) : s;
    const choice = affinity.map((v, i) => round(v + b[i]));
    const groupScores = Array.from({ length: GROUPS }, (_, g) => {
      const [one, two] = pair(choice, g);
      return rule === "max" ? one : round(one + two);
    });
    const kept = best(groupScores, OPEN).sort((g, h) => g - h);
    const masked = choice.map((v, i) =>
      kept.includes(home(i)) ? v : rule === "zero" ? 0 : -Infinity);
    const chosen = best(masked, K);
    const weight = rule === "gates" ? choice : affinity;
    const total = round(sum(chosen.map((i) => weight[i])));
    const gates = weight.map((v, i) => chosen.includes(i) ? (SCALE * v) / total : 0);
    return { affinity, choice, groupScores, kept, masked, chosen, gates };
  }

  class RouterDesk extends HTMLElement {
    connectedCallback() {
      const parts = ["router-group", "router-verdict"].map((name) =>
        customElements.whenDefined(name));
      const start = () => Promise.all(parts).then(() =>
        this.isConnected && !this.s && this.start());
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      Object.assign(this, { rule: "none", at: 0, limits: LIMITS });
      Object.assign(this, { route, best, home, show }); // for the parts below
      this.innerHTML = this.markup();
      this.classList.add("ready");
      this.querySelectorAll(".presets button").forEach((button) =>
        button.addEventListener("click", () => this.load(button.textContent)));
      this.querySelector("select").onchange = (event) => {
        this.rule = event.target.value;
        this.draw();
      };
      this.querySelectorAll("input").forEach((field) => {
        field.oninput = () => field.value && (field.name === "expert"
          ? this.select(+field.value) : this.move(field.name, this.at, +field.value));
        field.onchange = () => this.fill(true); // what was typed, as it was taken
      });
      this.load("balanced");
    }

    markup() {
      const field = (name, least, most, step) => `<label>${name} <input type="number"
        name="${name}" min="${least}" max="${most}" step="${step}"></label>`;
      return `<div class="presets" role="group" aria-label="scores to start from">${
        Object.keys(PRESETS).map((p) => `<button type="button">${p}</button>`).join("")}
        </div><p class="head">Drag <b class="s">● the affinity s</b> and <b
        class="b">◆ the bias b</b>. <span><i class="key line"></i>choice s + b,</span>
        <span><i class="key bar"></i>the fourth choice</span></p><div class="groups">${
        "<router-group></router-group>".repeat(GROUPS)}</div>
        <div class="mix" aria-hidden="true">${"<i></i>".repeat(K)}</div>
        <p class="sum"></p><div class="act"><label>Rule <select>${
        Object.entries(RULES).map(([key, name]) =>
          `<option value="${key}">${name}</option>`).join("")}</select></label>
        <span class="type">${field("expert", 0, ALL.length - 1, 1)}${
        field("s", ...LIMITS.s, 0.01)}${field("b", ...LIMITS.b, 0.01)}</span></div>
        <router-verdict class="say" role="status" aria-live="polite"></router-verdict>`;
    }

    members(g) { return ALL.filter((i) => home(i) === g); }

    scored(g) { // the parts of a group's score, and the score
      const parts = pair(this.choice, g);
      return this.rule === "max" ? parts.slice(0, 1) : [...parts, this.groupScores[g]];
    }

    select(i) {
      if (!ALL.includes(i)) return;
      this.at = i;
      this.draw();
    }

    move(v, i, value) {
      const [least, most] = LIMITS[v];
      this[v][i] = Math.min(most, Math.max(least, Math.round(100 * value) / 100));
      this.preset = null;
      this.draw();
    }

    load(preset) {
      [this.s, this.b] = PRESETS[preset].map((text) => ALL.map((i) =>
        (text.split(/\s+/)[i] || 0) / 100));
      this.preset = preset;
      this.draw();
    }

    fill(all) { // the fields, but not the one in which somebody types
      const values = { expert: this.at, s: this.s[this.at], b: this.b[this.at] };
      this.querySelectorAll("input").forEach((field) => {
        if (all || field !== document.activeElement) field.value = values[field.name];
      });
    }

    draw() {
      Object.assign(this, route(this.s, this.b, this.rule));
      const { masked, chosen, gates, rule } = this;
      this.style.setProperty("--bar", `${50 * (masked[chosen[K - 1]] + 0.5)}%`);
      this.querySelectorAll("router-group").forEach((group) => group.draw(this));
      this.querySelectorAll(".mix i").forEach((part, x) => {
        part.textContent = chosen[x];
        part.style.flexGrow = Math.abs(gates[chosen[x]]) || 0;
        part.classList.toggle("minus", gates[chosen[x]] < 0);
      });
      this.querySelector(".sum").innerHTML = `${chosen.map((i) => `${show(gates[i])}
        E<sub>${i}</sub>`).join(" + ").replaceAll("+ −", "− ")} + the shared expert.
        The gates sum to <b>${show(sum(chosen.map((i) => gates[i])))}</b>.`;
      this.querySelectorAll(".presets button").forEach((one) =>
        one.setAttribute("aria-pressed", one.textContent === this.preset));
      this.querySelector("select").classList.toggle("wrong", rule !== "none");
      this.fill();
      this.querySelector("router-verdict").judge(this);
    }
  }
  customElements.define("router-desk", RouterDesk);
})();
