/* <cache-calculator preset="DeepSeek-V3">: what it costs to remember a text.
 *
 * The reader chooses a model's shape, a context and how many people talk to it. Bars
 * compare four kinds of attention on one scale from zero, and wrong beliefs with them.
 */
(() => {
  if (customElements.get("cache-calculator")) return;
  const GPU = 80 * 2 ** 30; // bytes
  const FIELDS = { // words, symbol, the largest value that is taken
    layers: ["layers", "<var>L</var>", 1000], heads: ["heads", "N_h", 1024],
    groups: ["K/V heads", "N_kv", 1024], d_h: ["head width", "d_h", 16384],
    d_v: ["value width", "d_v", 16384], d_c: ["latent", "d_c", 16384],
    d_R: ["rotated key", "d_R", 16384], conversations: ["conversations", "", 10000],
  };
  const SHAPE = ["kind", ...Object.keys(FIELDS).slice(0, 7), "bytes"];
  const PRESETS = {
    "DeepSeek-V3": ["MLA", 61, 128, 8, 128, 128, 512, 64, 2],
    "V3 if it were MHA": ["MHA", 61, 128, 8, 128, 128, 512, 64, 2],
    "LLaMA-3.1-405B": ["GQA", 126, 128, 8, 128, 128, 512, 64, 2],
    "Qwen2.5-72B": ["GQA", 80, 64, 8, 128, 128, 512, 64, 2],
    "the book’s small model": ["MLA", 3, 4, 2, 32, 32, 32, 16, 4],
  };
  const KINDS = { // numbers kept for a token in one layer: formula, count, words
    MHA: ["heads × (d_h + d_v)", (v) => v.heads * (v.d_h + v.d_v),
      (v) => `Each of the ${v.heads} heads keeps a key and a value of its own.`],
    GQA: ["groups × (d_h + d_v)", (v) => v.groups * (v.d_h + v.d_v),
      (v) => `${v.heads} heads share ${v.groups} keys and values.`],
    MQA: ["d_h + d_v", (v) => v.d_h + v.d_v,
      (v) => `One key and one value are kept, the same for all ${v.heads} heads.`],
    MLA: ["d_c + d_R", (v) => v.d_c + v.d_R, (v, less) => less > 1
      ? `One latent, one rotated key for all heads: ${short(less)} times less than MHA.`
      : "The latent is as wide as what it stands for: nothing is saved."],
  };
  const BELIEFS = { // the same; the one without a count is about every kind
    "forget d_R": ["d_c", (v) => v.d_c,
      () => "The latent knows no positions. The rotated key does, and is kept too."],
    "forget the layers": ["", null,
      (v) => `Each of the ${v.layers} layers keeps numbers of its own.`],
    "a rotated key per head": ["d_c + heads × d_R", (v) => v.d_c + v.heads * v.d_R,
      (v) => `The rotated key is one key, and all ${v.heads} heads share it.`],
    "cache the expanded keys and values": ["heads × (d_h + d_R + d_v)",
      (v) => v.heads * (v.d_h + v.d_R + v.d_v),
      () => "The text would be the same, but the latent gives them again at need."],
  };
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB"];
  const whole = (x) => x.toLocaleString("en");
  const short = (x) => x < 999.5 ? String(+x.toPrecision(3)) : whole(Math.round(x));
  const times = (x) => x < 0.1 ? `1/${short(1 / x)}` : `${short(x)} ×`;
  const size = (x) => {
    const unit = UNITS.findLastIndex((_, i) => x >= 1024 ** i);
    return `${short(x / 1024 ** unit)} ${UNITS[unit]}`;
  };
  const script = (text) => text.replace(/(\w)_(\w+)/g, "<var>$1</var><sub>$2</sub>");
  const worked = (formula, v, numbers) => { // with symbols, with sizes, and computed
    const [symbols, sizes] = [(name) => FIELDS[name][1], (name) => v[name]].map(
      (its) => formula.replace(/heads|groups|d_./g, its));
    return `${script(symbols)} = ${sizes}${numbers ? ` = ${whole(numbers)}` : ""}`;
  };
  let made = 0; // radio buttons need a name of their own

  class CacheCalculator extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.good && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      this.good = {}; // the last values one could count with
      this.innerHTML = this.markup(`cache-${++made}`);
      this.addEventListener("input", () => this.draw());
      this.addEventListener("click", ({ target }) => {
        const { value } = target.closest("button") || {};
        if (value in PRESETS) this.set(value);
        else if (value) this.belief = this.belief === value ? "" : value;
        if (value) this.draw();
      });
      this.set(this.getAttribute("preset") || "DeepSeek-V3");
      this.draw();
    }

    markup(name) {
      const group = (its, words, names, first = "") => `<div class="${its}" role="group"
        aria-label="${words}">${first}${Object.keys(names).map((one) => `<button
        type="button" value="${one}">${script(one)}</button>`).join("")}</div>`;
      const field = (key) => `<label><span>${FIELDS[key][0]} ${script(FIELDS[key][1])}
        </span><input type="number" inputmode="numeric" name="${key}" min="1"
        max="${FIELDS[key][2]}" value="1"></label>`;
      return `${group("presets", "models to start from", PRESETS)}<div class="fields">${
        SHAPE.slice(1, 8).map(field).join("")}<label><span>a number takes</span><select
        name="bytes"><option value="4">4 bytes</option><option value="2">2 bytes
        </option><option value="1">1 byte</option></select></label>${
        field("conversations")}</div><p class="bad" role="alert"></p><label
        class="context"><span>context: <output></output></span><input type="range"
        name="step" min="0" max="20" value="14"><i><span>1K</span><span>32K</span>
        <span>1M</span></i></label><fieldset><legend>What is kept, four ways</legend>${
        Object.keys(KINDS).map((kind) => `<label class="bar"><input type="radio"
        name="${name}" value="${kind}"><b>${kind}</b><i></i><output></output></label>`)
        .join("")}<p class="bar wrong"><b>wrong</b><i></i><output></output></p>
        </fieldset><ul class="numbers">
        </ul>${group("beliefs", "wrong beliefs", BELIEFS, "<b>Wrong beliefs:</b>")}
        <p class="say" role="status" aria-live="polite"></p>`;
    }

    input(name) { return this.querySelector(`[name="${name}"]`); }
    get kind() { return this.querySelector(":checked[type=radio]").value; }
    get tokens() { // powers of two, and what lies half way between them
      const step = +this.input("step").value;
      return (step % 2 ? 1536 : 1024) * 2 ** Math.floor(step / 2);
    }

    set(preset) {
      PRESETS[preset].forEach((value, i) => {
        if (!i) this.querySelector(`[value="${value}"]`).checked = true;
        else this.input(SHAPE[i]).value = value;
      });
    }

    /* Take what is typed if one can count with it; mark and name what one cannot. */
    read() {
      const [{ good }, gqa] = [this, this.kind === "GQA"];
      const words = Object.entries(FIELDS).map(([name, [word, , most]]) => {
        const [input, text] = [this.input(name), this.input(name).value];
        const bad = !/^\d+$/.test(text) || +text < 1 || +text > most;
        if (!bad) good[name] = +text;
        const many = !bad && name === "groups" && +text > good.heads && gqa;
        input.setAttribute("aria-invalid", bad || many);
        return many ? `More K/V heads than heads: ${good.heads} count.` : bad &&
          `${word}: ${text || "this"} will not do, a whole number from 1 to ${
            whole(most)} will. Until then ${whole(good[name])} counts.`;
      });
      this.querySelector(".bad").textContent = words.filter(Boolean).join(" ");
      return { ...good, groups: Math.min(good.groups, good.heads),
        bytes: +this.input("bytes").value };
    }

    draw() {
      const [v, { kind, tokens }] = [this.read(), this];
      if (BELIEFS[this.belief]?.[1] && kind !== "MLA") this.belief = "";
      const cost = (numbers, bytes = numbers * v.layers * v.bytes) =>
        ({ numbers, bytes, total: bytes * tokens * v.conversations });
      const costs = Object.values(KINDS).map(([, count]) => cost(count(v)));
      const { numbers, bytes, total } = costs[Object.keys(KINDS).indexOf(kind)];
      const [, count] = BELIEFS[this.belief] || [];
      const wrong = count ? cost(count(v)) : cost(numbers, numbers * v.bytes);
      this.wrong = this.belief ? { ...wrong, factor: wrong.total / total } : null;
      Object.assign(this, { numbersPerToken: numbers, bytesPerToken: bytes, total,
        gpus: total / GPU, tokensPerGpu: Math.floor(GPU / bytes),
        timesSmaller: costs[0].numbers / numbers,
        likeGroups: numbers / costs[2].numbers });
      this.show(kind, v, costs.concat(this.wrong || []).map((one) => one.total));
    }

    show(kind, v, totals) {
      const { tokens, total, gpus, wrong } = this;
      const each = (selector, f) => this.querySelectorAll(selector).forEach(f);
      const context = tokens < 2 ** 20 ? `${tokens / 1024}K` : "1M";
      const said = `${context} = ${whole(tokens)} tokens`;
      this.input("step").setAttribute("aria-valuetext", said);
      this.querySelector(".context output").value = said;
      each(".presets button", (one) => one.setAttribute("aria-pressed", PRESETS[
        one.value].every((value, i) => value === (i ? v[SHAPE[i]] : kind))));
      each(".fields input", (one) => one.parentElement.classList.toggle("counts",
        `${KINDS[kind][0]} layers conversations`.includes(one.name)));
      each(".beliefs button", (one) => {
        one.disabled = BELIEFS[one.value][1] && kind !== "MLA";
        one.setAttribute("aria-pressed", one.value === this.belief);
      });
      each(".bar", (bar, i) => {
        bar.hidden = i >= totals.length;
        bar.style.setProperty("--long", totals[i] / Math.max(...totals));
        bar.lastChild.innerHTML = bar.hidden ? "" : `<b>${size(totals[i])}</b>
          <small>${times(totals[i] / total)}</small>`;
      });
      this.querySelector("ul").innerHTML = this.cards(KINDS[kind][0], v);
      const [its, count, words] = BELIEFS[this.belief] || KINDS[kind];
      const many = v.conversations > 1 ? `${whole(v.conversations)} × ` : "";
      this.querySelector(".say").innerHTML = `${words(v, this.timesSmaller)} ${wrong
        ? `Not ${count ? worked(its, v, wrong.numbers) : "one layer’s"} numbers: the
        cache would be ${times(wrong.factor)} as large.` : `${many}${context} tokens
        take ${size(total)}, ${gpus > 1 ? `${whole(Math.ceil(gpus))} GPUs of 80 GiB`
        : `${short(100 * gpus)} % of a GPU’s 80 GiB`}, for the cache alone.`}`;
    }

    cards(formula, v) {
      const [numbers, bytes] = [this.numbersPerToken, this.bytesPerToken].map(whole);
      return [["numbers, one layer", numbers, worked(formula, v)],
        ["bytes, all layers", bytes, `${numbers} × ${v.layers} layers × ${v.bytes} B`],
        ["everything", size(this.total),
          `${bytes} B × ${whole(this.tokens)} × ${whole(v.conversations)}`],
        ["GPUs of 80 GiB", short(this.gpus), "filled by the cache alone"],
        ["tokens in one GPU", whole(this.tokensPerGpu), "and nothing else in it"],
        ["beside MHA", times(1 / this.timesSmaller), `as GQA with ${
          short(this.likeGroups)} groups`]].map(([name, number, how]) =>
        `<li><span>${name}</span><b>${number}</b>${how}</li>`).join("");
    }
  }
  customElements.define("cache-calculator", CacheCalculator);
})();
