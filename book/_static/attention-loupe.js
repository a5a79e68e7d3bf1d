/* <attention-loupe>: point at a byte and see which bytes it reads.
 *
 * The page supplies the data as JSON in a child script element (figures.loupe writes
 * it): {"ids": [T byte ids], "weights": [N_h][T][T], "heads": [names]}. Pointer, tap
 * and arrow keys choose the query byte; the buttons choose the head.
 */
(() => {
  if (customElements.get("attention-loupe")) return;
  const BOUNDARY = 256;

  /* What a byte looks like in its cell; the second value is its name in a sentence. */
  function glyph(id) {
    if (id === BOUNDARY) return ["◆", "document boundary"];
    if (id === 10) return ["↵", "newline"];
    if (id === 32) return ["·", "space"];
    if (id > 32 && id < 127) return [String.fromCharCode(id), String.fromCharCode(id)];
    const hex = id.toString(16).padStart(2, "0");
    return [hex, `byte 0x${hex}`];
  }

  class AttentionLoupe extends HTMLElement {
    connectedCallback() {
      const start = () => this.isConnected && !this.data && this.start();
      if (document.readyState !== "loading") start();
      else document.addEventListener("DOMContentLoaded", start, { once: true });
    }

    start() {
      this.data = JSON.parse(this.querySelector("script").textContent);
      this.head = 0;
      this.query = this.data.ids.length - 1;
      this.replaceChildren(this.headButtons(), this.byteCells(), this.sentence());
      this.classList.add("ready");
      this.draw();
    }

    headButtons() {
      const row = document.createElement("div");
      row.className = "heads";
      row.setAttribute("role", "group");
      row.setAttribute("aria-label", "attention head");
      row.append(...this.data.weights.map((_, h) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = this.data.heads[h] || `Head ${h}`;
        button.addEventListener("click", () => {
          this.head = h;
          this.draw();
        });
        return button;
      }));
      return row;
    }

    byteCells() {
      const box = document.createElement("div");
      box.className = "bytes";
      box.tabIndex = 0;
      box.setAttribute("role", "slider");
      box.setAttribute("aria-label", "query byte, arrow keys move it");
      box.setAttribute("aria-valuemin", 0);
      box.setAttribute("aria-valuemax", this.data.ids.length - 1);
      this.data.ids.forEach((id, i) => {
        const cell = document.createElement("span");
        cell.textContent = glyph(id)[0];
        cell.dataset.i = i;
        cell.classList.toggle("odd", id === BOUNDARY || id <= 32 || id > 126);
        box.append(cell);
        if (id === 10) box.append(document.createElement("br"));
      });
      const choose = (event) => {
        const cell = event.target.closest("[data-i]");
        if (cell) this.move(Number(cell.dataset.i));
      };
      box.addEventListener("pointerover", choose);
      box.addEventListener("pointerdown", choose);
      box.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8,
          Home: -this.query, End: this.data.ids.length }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        this.move(this.query + step);
      });
      return box;
    }

    sentence() {
      const p = document.createElement("p");
      p.className = "say";
      p.setAttribute("aria-live", "polite");
      return p;
    }

    move(i) {
      this.query = Math.min(this.data.ids.length - 1, Math.max(0, i));
      this.draw();
    }

    draw() {
      const { ids } = this.data;
      const row = this.data.weights[this.head][this.query];
      const most = Math.max(...row);
      this.querySelectorAll("button").forEach((button, h) =>
        button.setAttribute("aria-pressed", h === this.head));
      this.querySelectorAll("[data-i]").forEach((cell, i) => {
        // The square root lets a weight of 4 % be seen beside one of 70 %.
        const tint = 100 * Math.sqrt(row[i] / most);
        cell.style.setProperty("--weight", `${tint.toFixed(1)}%`);
        cell.classList.toggle("query", i === this.query);
        cell.classList.toggle("future", i > this.query);
      });
      const best = row.map((w, i) => [w, i]).sort((a, b) => b[0] - a[0]).slice(0, 3);
      const name = (i) => {
        const code = document.createElement("code");
        code.textContent = glyph(ids[i])[1];
        return code;
      };
      const say = this.querySelector(".say");
      say.replaceChildren(`Byte ${this.query} `, name(this.query), " reads ");
      best.forEach(([w, i], rank) => {
        if (w < 0.005) return;
        const where = i === this.query ? "itself" : `${this.query - i} back`;
        say.append(rank ? ", " : "", name(i), ` (${where}) ${(100 * w).toFixed(0)} %`);
      });
      say.append(".");
      const box = this.querySelector(".bytes");
      box.setAttribute("aria-valuenow", this.query);
      box.setAttribute("aria-valuetext", say.textContent);
    }
  }
  customElements.define("attention-loupe", AttentionLoupe);
})();
